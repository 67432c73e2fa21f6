//! Spans as a collector receives them: a client's trace goes on through the server, from its socket to its steps.

mod common;

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    thread,
};

use common::{Server, chat};
use serde_json::Value;

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const PARENT: &str = "b7ad6b7169203331";

#[test]
fn a_clients_trace_goes_on_to_the_step() {
    let (endpoint, exports) = collector();
    let server = Server::start(&["--otlp-endpoint", &endpoint]);
    sconce_loadtest::tls::prepare();
    let client = reqwest::blocking::Client::new();
    let request = client.post(server.url("/v1/chat/completions"));
    let request = request.header("traceparent", format!("00-{TRACE}-{PARENT}-01"));
    let request = request.header("x-request-id", "traced-1");
    let response = request.json(&chat("A secret question", 4)).send().expect("an answer");
    assert_eq!(response.status(), 200);
    drop(response.bytes());
    server.signal("-TERM");
    assert!(server.wait().success());

    let bodies: Vec<String> = exports.try_iter().collect();
    assert!(
        bodies.iter().all(|body| !body.contains("secret")),
        "no text of a prompt"
    );
    let spans: Vec<Value> = bodies.iter().flat_map(|body| spans(body)).collect();
    let request = spans.iter().find(|span| attribute(span, "request_id") == "traced-1");
    let request = request.unwrap_or_else(|| panic!("no span of the request in {bodies:?}"));
    assert_eq!(
        (&request["traceId"], &request["parentSpanId"]),
        (&TRACE.into(), &PARENT.into())
    );
    assert_eq!(request["kind"], 2, "a server's span");
    assert_eq!(attribute(request, "http.response.status_code"), "200");

    let phases = ["queue", "prefill", "decode"].map(|name| {
        let mut found = spans
            .iter()
            .filter(|span| span["name"] == name && span["traceId"] == TRACE);
        let phase = found.next().unwrap_or_else(|| panic!("no span {name}"));
        assert_eq!(phase["parentSpanId"], request["spanId"], "{name}");
        time(phase)
    });
    let whole = time(request);
    assert!(
        whole.0 <= phases[0].0 && phases[2].1 <= whole.1,
        "{phases:?} within {whole:?}"
    );
    assert!(
        phases
            .windows(2)
            .all(|pair| pair[0].1 <= pair[1].1 && pair[0].0 <= pair[1].0)
    );

    let steps: Vec<_> = spans.iter().filter(|span| span["name"] == "step").collect();
    assert!(steps.len() >= 4, "{} steps", steps.len());
    assert!(steps.iter().all(|step| attribute(step, "rows") == "1"));
    let linked = |step: &&&Value| step["links"][0]["spanId"] == request["spanId"];
    assert_eq!(steps.iter().filter(linked).count(), 1, "the step that admitted it");
}

/// A collector that takes whatever is posted: its address, and the bodies.
fn collector() -> (String, mpsc::Receiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address");
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        for stream in listener.incoming() {
            take(stream.expect("a connection"), &sender);
        }
    });
    (format!("http://{address}"), receiver)
}

/// Reads one request, hands its body over and answers it: whoever has the answer may end, and count on the body.
fn take(mut stream: TcpStream, bodies: &mpsc::Sender<String>) {
    let mut reader = BufReader::new(stream.try_clone().expect("a second handle"));
    let mut length = 0;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).expect("a header");
        let line = line.trim().to_ascii_lowercase();
        if let Some(value) = line.strip_prefix("content-length:") {
            length = value.trim().parse().expect("a length");
        }
        if line.is_empty() {
            break;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).expect("the body");
    let answer =
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}";
    // Whoever looked at the bodies may be gone, and so may the server.
    let _ = bodies.send(String::from_utf8(body).expect("JSON is text"));
    let _ = stream.write_all(answer.as_bytes());
}

/// The spans of an export.
fn spans(body: &str) -> Vec<Value> {
    let export: Value = serde_json::from_str(body).expect("JSON");
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let resources = list(&export["resourceSpans"]);
    let scopes = resources.iter().flat_map(|resource| list(&resource["scopeSpans"]));
    scopes.flat_map(|scope| list(&scope["spans"])).collect()
}

/// An attribute's value as text; empty where there is none.
fn attribute(span: &Value, key: &str) -> String {
    let attributes = span["attributes"].as_array().expect("attributes");
    let found = attributes.iter().find(|attribute| attribute["key"] == key);
    let value = found.and_then(|attribute| attribute["value"].as_object()?.values().next());
    value.map_or(String::new(), |value| {
        value.as_str().map_or(value.to_string(), str::to_owned)
    })
}

/// A span's begin and end in nanoseconds since 1970.
fn time(span: &Value) -> (u64, u64) {
    let nanos = |key: &str| span[key].as_str().and_then(|text| text.parse().ok()).expect("a time");
    (nanos("startTimeUnixNano"), nanos("endTimeUnixNano"))
}
