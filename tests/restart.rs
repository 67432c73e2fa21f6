//! What outlives a server: its cache file, whole whatever ends the process.
#![cfg(unix)]

mod common;

use std::{fs, path::Path, time::Duration};

use common::{Server, completion, text};
use serde_json::{Value, json};

/// Six blocks and four tokens, each prompt with tokens of its own.
fn prompt(number: u64) -> Vec<u64> {
    (0..100).map(|token| 1000 + number * 101 + token * 7).collect()
}

fn cached_tokens(answer: &Value) -> u64 {
    answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        .as_u64()
        .expect("a count")
}

fn start(file: &Path, more: &[&str]) -> Server {
    let file = file.to_str().expect("text");
    Server::start(&[&["--admin", "--cache-file", file], more].concat())
}

fn end(server: Server) {
    server.signal("-TERM");
    assert_eq!(server.wait().code(), Some(0));
}

#[test]
fn a_repeated_prompt_is_answered_from_the_file_after_a_restart() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("kv.cache");
    let asked = completion(&prompt(0), 8);

    let server = start(&file, &[]);
    let first = server.ask("/v1/completions", &asked);
    assert_eq!(cached_tokens(&first), 0);
    let saved = server.ask("/v1/cache/save", &json!({}));
    assert_eq!(saved["blocks"], 6, "{saved}");
    let size = fs::metadata(&file).expect("the file is there").len();
    assert_eq!(saved["bytes"], size);
    server.ask("/v1/completions", &completion(&prompt(1), 8));
    end(server);
    assert!(
        fs::metadata(&file).expect("the file is there").len() > size,
        "saved at the end as well"
    );

    let server = start(&file, &[]);
    for number in [0, 1] {
        let again = server.ask("/v1/completions", &completion(&prompt(number), 8));
        assert_eq!(cached_tokens(&again), 96);
        if number == 0 {
            assert_eq!(text(&again), text(&first));
        }
    }
    end(server);

    // Blocks of another size mean nothing here: the server starts cold, and writes its own at the end.
    let server = start(&file, &["--block-size", "32"]);
    let cold = server.ask("/v1/completions", &asked);
    assert_eq!((cached_tokens(&cold), text(&cold)), (0, text(&first)));
    end(server);
}

#[test]
fn a_server_killed_while_it_saves_leaves_the_old_file() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("kv.cache");
    let server = start(&file, &[]);
    let first = server.ask("/v1/completions", &completion(&prompt(0), 8));
    server.ask("/v1/cache/save", &json!({}));
    let old = fs::read(&file).expect("the file is there");
    for number in 1..6 {
        server.ask("/v1/completions", &completion(&prompt(number), 1));
    }
    let part = folder.path().join("kv.cache.part");
    std::thread::scope(|scope| {
        let save = scope.spawn(|| server.try_post("/v1/cache/save", &json!({})));
        while !fs::metadata(&part).is_ok_and(|part| part.len() > 0) && !save.is_finished() {
            std::thread::yield_now();
        }
        server.signal("-KILL");
    });
    drop(server);
    let left = fs::read(&file).expect("the file is there");
    // If the save was quicker than the signal, the new file is there, whole.
    assert!(left == old || !part.exists());

    let server = start(&file, &[]);
    let again = server.ask("/v1/completions", &completion(&prompt(0), 8));
    assert_eq!((cached_tokens(&again), text(&again)), (96, text(&first)));
    // What the killed server left beside the file is in nobody's way.
    server.ask("/v1/cache/save", &json!({}));
    assert!(!part.exists());
    drop(server);
}

#[test]
fn a_cache_file_that_cannot_work_is_refused_at_the_start() {
    let refused = |arguments: &[&str], part: &str| {
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_sconce"))
            .args(["serve", "--port", "0", "--log-level", "error"])
            .args(arguments)
            .output()
            .expect("runs");
        let said = String::from_utf8(output.stderr).expect("text");
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains(part) && said.lines().count() == 1, "{said}");
    };
    refused(&["--cache-file", "kv.cache", "--no-prefix-cache"], "no-prefix-cache");
    refused(&["--cache-file", "/nowhere/kv.cache"], "/nowhere/kv.cache");
}

#[test]
fn without_a_cache_file_there_is_nothing_to_save() {
    let server = Server::start(&["--admin"]);
    assert_eq!(server.post("/v1/cache/save", &json!({})).status(), 404);
    server.signal("-TERM");
    server.wait_until("the end", Duration::from_secs(30), || {
        server.try_get("/health").is_none()
    });
}
