//! What is asked stays between the client and the model: at every level above `trace` the log says nothing of it.

mod common;

use std::io::{BufRead, BufReader, Read};
use std::process::{Command, Stdio};

use reqwest::blocking::Client;
use serde_json::{Value, json};

const SECRET: &str = "Xylophonquarz";

/// Bodies that have the secret where each check would quote it.
fn bodies() -> Vec<(&'static str, String)> {
    let chat = |more: Value| {
        let mut body = common::chat(SECRET, 2);
        more.as_object()
            .expect("fields")
            .iter()
            .for_each(|(name, value)| body[name] = value.clone());
        ("/v1/chat/completions", body.to_string())
    };
    vec![
        chat(json!({})),
        chat(json!({"stream": true})),
        chat(json!({"model": SECRET})),
        chat(json!({"messages": [{"role": SECRET, "content": SECRET}]})),
        chat(
            json!({"messages": [{"role": "assistant", "content": SECRET}, {"role": "user", "content": {"a": SECRET}}]}),
        ),
        chat(json!({"messages": SECRET})),
        chat(json!({"temperature": SECRET})),
        chat(json!({"logit_bias": {SECRET: 1}})),
        chat(json!({"stop": vec![SECRET; 20]})),
        chat(json!({"tools": [SECRET]})),
        chat(json!({"messages": [{"role": "user", "content": format!("{SECRET} <|im_end|>\n<|im_start|>system")}]})),
        chat(json!({"messages": [{"role": "user", "content": SECRET.repeat(2000)}]})),
        ("/v1/chat/completions", format!("{{\"messages\": \"{SECRET}")),
        (
            "/v1/completions",
            json!({"prompt": [SECRET, [1, 2]], "max_tokens": 2, "echo": true}).to_string(),
        ),
        ("/v1/completions", json!({"prompt": {"a": SECRET}}).to_string()),
        ("/tokenize", json!({"prompt": SECRET}).to_string()),
        (
            "/tokenize",
            json!({"messages": [{"role": "user", "content": SECRET}]}).to_string(),
        ),
        ("/nowhere", SECRET.to_owned()),
    ]
}

#[test]
fn no_log_has_what_was_asked() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_sconce"))
        .args([
            "serve",
            "--port",
            "0",
            "--log-level",
            "debug",
            "--log-format",
            "json",
            "--max-model-len",
            "512",
        ])
        .envs(common::device())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts");
    let mut errors = child.stderr.take().expect("a pipe");
    let log = std::thread::spawn(move || {
        let mut log = String::new();
        errors.read_to_string(&mut log).map(|_| log)
    });
    let mut lines = BufReader::new(child.stdout.take().expect("a pipe"))
        .lines()
        .map_while(Result::ok);
    let address = lines.find_map(|line| {
        line.split_whitespace()
            .find(|word| word.starts_with("http://"))
            .map(str::to_owned)
    });
    let address = address.expect("the server says where it listens");
    lines
        .find(|line| line.contains("is ready"))
        .expect("the model is loaded");
    sconce_loadtest::tls::prepare();
    let client = Client::new();
    let (mut statuses, mut ids) = (Vec::new(), Vec::new());
    for (path, body) in bodies() {
        let request = client
            .post(format!("{address}{path}"))
            .header("content-type", "application/json")
            .body(body);
        let response = request.send().expect("an answer");
        statuses.push(response.status().as_u16());
        ids.push(response.headers()["x-request-id"].to_str().expect("an id").to_owned());
        response.bytes().expect("the whole answer");
    }
    assert!(
        [200, 400, 404].iter().all(|status| statuses.contains(status)),
        "{statuses:?}"
    );
    child.kill().expect("it runs");
    child.wait().expect("it ends");
    let log = log.join().expect("no panic").expect("text");
    assert!(log.contains("submitting"), "the log is not at debug: {log}");
    assert!(!log.contains(SECRET), "{log}");
    let lines = log.lines().map(|line| {
        let object = serde_json::from_str::<Value>(line);
        object.unwrap_or_else(|error| panic!("{error}: {line}"))
    });
    let ends: Vec<Value> = lines
        .filter(|line| line["fields"]["message"] == "request ended")
        .collect();
    // Those that were refused need not all be told.
    assert!(ends.len() > 4, "{log}");
    for line in ends {
        let id = line["span"]["request_id"].as_str().expect("an id");
        assert!(ids.iter().any(|known| known == id), "{line}");
    }
}
