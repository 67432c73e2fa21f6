//! A panic in a request's path is logged as everything else is, and without what it quotes of the request.

mod common;

use std::fs::{self, File};

use common::{Server, send_by_hand, tiny};
use serde_json::{Value, json};
use std::{io::Read, time::Duration};

/// Of the characters that the small model knows.
const SECRET: &str = "XYLOPHONQUARZ";
const LIMIT: Duration = Duration::from_secs(60);

/// The log, whose every line is an object, of a server in which requests panicked, and the ids that were answered.
fn log_of_panics(level: &str) -> (Vec<Value>, Vec<String>) {
    let (folder, logs) = (tiny::model(), tempfile::tempdir().expect("a folder"));
    let path = logs.path().join("log");
    let arguments = [
        "--model",
        tiny::path(&folder),
        "--device",
        "cpu",
        "--log-format",
        "json",
        "--log-level",
        level,
    ];
    let server = Server::start_logging_to(File::create(&path).expect("a file"), &arguments);
    let requests = [
        ("fault.quote.0", "/v1/completions", json!({"prompt": SECRET})),
        (
            "fault.quote.0.stream",
            "/v1/completions",
            json!({"prompt": SECRET, "stream": true}),
        ),
        ("fault.quote.0.chat", "/v1/chat/completions", common::chat(SECRET, 1)),
        ("fine", "/v1/completions", json!({"prompt": SECRET, "max_tokens": 2})),
    ];
    let mut ids = Vec::new();
    for (id, path, body) in requests {
        let mut answer = String::new();
        let mut socket = send_by_hand(&server, path, id, &body);
        socket.read_to_string(&mut answer).expect("the answer ends");
        let status = if id == "fine" { "200" } else { "500" };
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{answer}");
        let head = answer.to_lowercase();
        ids.extend(
            head.lines()
                .find_map(|line| line.strip_prefix("x-request-id: "))
                .map(str::to_owned),
        );
    }
    let lines = || fs::read_to_string(&path).expect("text");
    // Probes, whose lines are shorter, are logged as well.
    server.wait_until("all is logged", LIMIT, || lines().matches("\"total_ms\"").count() == 4);
    assert_eq!(server.metric("sconce_request_panics_total{place=\"handler\"}"), 3.0);
    let lines = lines();
    let lines = lines.lines().map(|line| {
        let object = serde_json::from_str::<Value>(line);
        object.unwrap_or_else(|error| panic!("{error}: {line}"))
    });
    (lines.collect(), ids)
}

fn with_message<'a>(lines: &'a [Value], message: &str) -> Vec<&'a Value> {
    lines
        .iter()
        .filter(|line| line["fields"]["message"] == message)
        .collect()
}

#[test]
fn a_panic_is_logged_without_what_it_quotes() {
    let (lines, ids) = log_of_panics("debug");
    assert_eq!(ids.len(), 4);
    let told: Vec<_> = with_message(&lines, "request ended");
    let told: Vec<_> = told.iter().filter(|line| line["level"] == "INFO").collect();
    assert_eq!(told.len(), 4);
    for (line, id) in told.iter().zip(&ids) {
        assert_eq!(line["span"]["request_id"].as_str(), Some(id.as_str()), "{line}");
    }
    let panics = with_message(&lines, "a thread panicked");
    assert_eq!(panics.len(), 3, "{lines:?}");
    for (line, id) in panics.iter().zip(&ids) {
        assert_eq!(
            (&line["level"], &line["span"]["request_id"]),
            (&json!("ERROR"), &json!(id))
        );
        let location = line["fields"]["location"].as_str().expect("a place");
        assert!(location.contains("fault_injection.rs:"), "{location}");
        assert!(line["fields"]["thread"].is_string(), "{line}");
    }
    assert!(!format!("{lines:?}").contains(SECRET));
}

#[test]
fn a_server_whose_log_nobody_reads_goes_on() {
    let folder = tiny::model();
    let (reader, writer) = std::io::pipe().expect("a pipe");
    let server = Server::start_logging_to(writer, &["--model", tiny::path(&folder), "--device", "cpu"]);
    drop(reader);
    for (id, status) in [
        ("fault.handler.0", 500),
        ("fine", 200),
        ("fault.handler.0", 500),
        ("fine", 200),
    ] {
        let mut answer = String::new();
        let mut socket = send_by_hand(
            &server,
            "/v1/completions",
            id,
            &json!({"prompt": SECRET, "max_tokens": 2}),
        );
        socket.read_to_string(&mut answer).expect("the answer ends");
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{answer}");
    }
}

#[test]
fn at_trace_a_panic_says_what_it_says() {
    let (lines, _) = log_of_panics("info,sconce=trace");
    let told = with_message(&lines, "what it panicked with");
    assert_eq!(told.len(), 3);
    for line in told {
        assert_eq!(line["level"], "TRACE");
        assert!(
            line["fields"]["panic"].as_str().expect("a text").contains(SECRET),
            "{line}"
        );
    }
}
