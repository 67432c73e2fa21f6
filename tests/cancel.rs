//! Clients that leave: wherever their request is, its place is free within a step.

mod common;

use std::{
    io::{Read, Write},
    net::{Shutdown, TcpStream},
    time::Duration,
};

use common::{Server, send_by_hand};
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(60);
const HELD: &str = "sconce_kv_blocks{state=\"held\"}";
const CANCELLED: &str = "sconce_sequences_total{outcome=\"cancelled\"}";
const STEPS: &str = "sconce_step_seconds_count";

/// A prompt that takes two thousand steps of 4 tokens.
fn long(stream: bool) -> Value {
    json!({"prompt": vec![300; 8000], "max_tokens": 8, "stream": stream})
}

/// A short prompt with an answer of thousands of tokens.
fn lasting(stream: bool) -> Value {
    json!({"prompt": [300, 301], "max_tokens": 8000, "ignore_eos": true, "stream": stream})
}

/// The request, and behind it bytes that nobody reads before it is answered.
fn send(server: &Server, id: &str, body: &Value, more: &str) -> TcpStream {
    let mut socket = send_by_hand(server, "/v1/completions", id, body);
    socket.write_all(more.as_bytes()).expect("sends");
    socket
}

#[test]
fn a_client_that_leaves_frees_its_place_wherever_its_request_is() {
    // However slow the machine is, the second one is let in behind the first.
    let patient = ["--request-timeout", "24h"];
    let small = ["--step-tokens", "4", "--max-batch", "1", "--no-prefix-cache"];
    let server = Server::start(&[patient.as_slice(), small.as_slice()].concat());
    let mut gone = 0.0;
    let next = "GET /health HTTP/1.1\r\nhost: x\r\n\r\n";
    for (stream, more) in [(true, ""), (false, ""), (true, "\r\n"), (false, "\r\n"), (false, next)] {
        if !more.is_empty() && cfg!(not(target_os = "linux")) {
            continue;
        }
        // In the middle of its prefill, with a second request waiting behind it.
        let prefilling = send(&server, "prefilling", &long(stream), more);
        let tokens = server.metric("sconce_prefill_tokens_total");
        server.wait_until("it is prefilled", LIMIT, || {
            server.metric("sconce_prefill_tokens_total") > tokens
        });
        let queued = send(&server, "queued", &lasting(stream), more);
        server.wait_until("the second waits", LIMIT, || server.metric("sconce_waiting") == 1.0);
        let held = server.metric(HELD);
        drop(queued);
        gone += 1.0;
        server.wait_until("the second is gone", LIMIT, || server.metric(CANCELLED) == gone);
        server.wait_until("nobody waits", LIMIT, || server.metric("sconce_waiting") == 0.0);
        assert_eq!(server.metric(HELD), held, "the first goes on");
        prefilling.shutdown(Shutdown::Both).expect("closes");
        gone += 1.0;
        free(&server, gone);

        // In the middle of its answer.
        let decoded = server.metric("sconce_decode_tokens_total");
        let mut decoding = send(&server, "decoding", &lasting(stream), more);
        if stream {
            decoding.read_exact(&mut [0; 64]).expect("the answer begins");
        }
        server.wait_until("it is decoded", LIMIT, || {
            server.metric("sconce_decode_tokens_total") > decoded
        });
        drop(decoding);
        gone += 1.0;
        free(&server, gone);
        assert!(server.metric("sconce_decode_tokens_total") - decoded < 8000.0);
    }
}

/// The request is gone, its blocks are free, and no further step runs for it.
fn free(server: &Server, gone: f64) {
    server.wait_until("it is gone", LIMIT, || server.metric(CANCELLED) == gone);
    server.wait_until("its blocks are free", LIMIT, || server.metric(HELD) == 0.0);
    let steps = server.metric(STEPS);
    assert_eq!(server.metric("sconce_running"), 0.0);
    assert_eq!(server.metric(STEPS), steps);
}
