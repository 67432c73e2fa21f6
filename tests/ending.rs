//! How a server ends, and what it reads again while it runs, by the signals it gets.
#![cfg(unix)]

mod common;

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    thread,
    time::Duration,
};

use common::{Server, completion};
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(60);

/// A completion that takes seconds.
fn long(max_tokens: usize) -> Value {
    completion(&[1, 2, 3, 4], max_tokens)
}

/// The lines of a stream that has begun.
fn streaming(server: &Server, max_tokens: usize) -> impl Iterator<Item = String> + use<> {
    let mut body = long(max_tokens);
    body["stream"] = json!(true);
    let response = server.post("/v1/completions", &body);
    assert_eq!(response.status(), 200);
    let mut lines = BufReader::new(response)
        .lines()
        .map(|line| line.expect("the stream goes on"));
    assert!(lines.next().expect("a first event").starts_with("data: "));
    lines.filter(|line| line.starts_with("data: "))
}

fn told_to_end(server: &Server) {
    server.signal("-TERM");
    server.wait_until("it does not accept any more", PATIENCE, || {
        server.get("/ready").status() == 503
    });
}

#[test]
fn what_runs_is_finished_and_nothing_new_begins() {
    let server = Server::start(&["--drain-timeout", "10m"]);
    // Connections that nobody uses: one was used once, one never.
    let mut used = TcpStream::connect(server.address()).expect("connects");
    write!(used, "GET /health HTTP/1.1\r\nhost: here\r\n\r\n").expect("writes");
    used.read_exact(&mut [0; 12]).expect("an answer");
    let unused = TcpStream::connect(server.address()).expect("connects");

    let mut events = streaming(&server, 400);
    told_to_end(&server);
    let refused = server.post("/v1/completions", &long(1));
    assert_eq!(refused.status(), 503);
    assert_eq!(refused.headers()["connection"], "close");
    assert!(refused.headers().contains_key("retry-after"));
    assert_eq!(refused.json::<Value>().expect("JSON")["error"]["code"], "shutting_down");
    assert_eq!(server.get("/health").status(), 200);

    assert_eq!(events.by_ref().last().as_deref(), Some("data: [DONE]"));
    assert_eq!(server.wait().code(), Some(0));
    drop((used, unused));
}

#[test]
fn what_is_not_done_in_time_ends_with_one_error_each() {
    let server = Server::start(&["--drain-timeout", "200ms", "--request-timeout", "24h"]);
    let events = streaming(&server, 8000);
    let whole = thread::scope(|scope| {
        let whole = scope.spawn(|| server.post("/v1/completions", &long(8000)));
        server.wait_until("both run", PATIENCE, || server.metric("sconce_running") == 2.0);
        server.signal("-TERM");
        whole.join().expect("an answer")
    });
    assert_eq!(whole.status(), 503);
    assert_eq!(whole.json::<Value>().expect("JSON")["error"]["code"], "shutting_down");
    let errors: Vec<String> = events.filter(|event| event.contains("\"error\"")).collect();
    assert_eq!(errors.len(), 1, "{errors:?}");
    assert!(errors[0].contains("shutting_down"), "{errors:?}");
    assert_eq!(server.wait().code(), Some(0));
}

#[test]
fn a_second_signal_ends_at_once() {
    let server = Server::start(&["--drain-timeout", "10m"]);
    let events = streaming(&server, 8000);
    told_to_end(&server);
    server.signal("-TERM");
    assert_eq!(server.wait().code(), Some(130));
    drop(events);
}

#[test]
fn a_hangup_reads_the_settings_again() {
    let folder = tempfile::tempdir().expect("a folder");
    let (file, log) = (folder.path().join("sconce.toml"), folder.path().join("log"));
    fs::write(&file, "max-batch = 5\nlog-level = \"info\"\n").expect("writes");
    let arguments = [
        "--admin",
        "--step-tokens",
        "64",
        "--config",
        file.to_str().expect("text"),
    ];
    let server = Server::start_logging_to(fs::File::create(&log).expect("a file"), &arguments);
    let setting = |name: &str| server.get("/admin/batching").json::<Value>().expect("JSON")[name].clone();
    let logged = |text: &str| fs::read_to_string(&log).expect("text").contains(text);
    let hangup_until = |text: &str| {
        server.signal("-HUP");
        server.wait_until(text, PATIENCE, || logged(text));
    };
    assert_eq!((setting("max_batch"), setting("step_tokens")), (json!(5), json!(64)));

    // A flag outranks the file as it did at the start.
    let changed = "max-batch = 7\nstep-tokens = 128\nrequest-timeout = \"1ms\"\nqueue = 9\nlog-level = \"debug\"\n\
                   [[pin]]\nprompt = \"x\"\n";
    fs::write(&file, changed).expect("writes");
    hangup_until("settings read again");
    assert_eq!((setting("max_batch"), setting("step_tokens")), (json!(7), json!(64)));
    let late = server.post("/v1/completions", &long(50));
    // Whether a first token came before the deadline was looked at is a matter of milliseconds.
    let cut = late.status() == 504 || late.json::<Value>().expect("JSON")["choices"][0]["stop_reason"] == "deadline";
    assert!(cut, "the timeout has changed");
    assert!(
        logged("change with the next start: queue, [[pin]]\n"),
        "what cannot change is named, and nothing else"
    );
    assert!(logged("DEBUG"), "the level has changed");

    for (text, said) in [
        ("max-batch = 1000\n", "cannot decode a batch of 1000"),
        ("max-batch = \n", "not TOML"),
        ("max-bach = 5\n", "did you mean `max-batch`?"),
    ] {
        fs::write(&file, text).expect("writes");
        hangup_until(said);
        assert_eq!(setting("max_batch"), json!(7));
    }
}
