//! A client that stops reading, and others beside it: the engine waits for nobody.

mod common;

use std::{
    io::{Read, Write},
    net::TcpStream,
    thread,
    time::Duration,
};

use common::{Server, tiny};
use serde_json::json;
use tokio::net::TcpSocket;

const LIMIT: Duration = Duration::from_secs(60);
const CHOICES: u32 = 128;

/// A connection whose system takes little that is not read.
fn narrow(server: &Server) -> TcpStream {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .expect("a runtime");
    let address = server.address().parse().expect("an address");
    let stream = runtime.block_on(async {
        let socket = TcpSocket::new_v4().expect("a socket");
        socket.set_recv_buffer_size(4096).expect("a size");
        socket.connect(address).await.expect("connects")
    });
    let stream = stream.into_std().expect("a stream");
    stream.set_nonblocking(false).expect("as before");
    stream
}

#[test]
fn others_go_on_while_a_reader_stalls() {
    let folder = tiny::model();
    // What is not read is cut long after the others are answered.
    let server = Server::start_quietly(&[
        "--model",
        tiny::path(&folder),
        "--write-timeout",
        "20s",
        "--device",
        "cpu",
    ]);
    let neighbour = json!({"prompt": [5, 6, 7], "max_tokens": 50, "temperature": 0, "ignore_eos": true});
    let expected = server.ask("/v1/completions", &neighbour)["choices"].take();
    let ended = "sconce_sequences_total{outcome=\"length\"}";
    let before = server.metric(ended);

    // Many choices with what each of their tokens could have been: more than the buffers of both ends hold.
    let body = json!({
        "messages": [{"role": "user", "content": "AB"}], "max_tokens": 60, "n": CHOICES, "temperature": 1.0,
        "logprobs": true, "top_logprobs": 20, "ignore_eos": true, "stream": true,
    });
    let body = body.to_string();
    let mut stalled = narrow(&server);
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stalled.write_all((head + &body).as_bytes()).expect("sends");
    stalled.read_exact(&mut [0; 16]).expect("the answer begins");

    let answers = thread::scope(|scope| {
        // Beside its tokens, and after them.
        let beside = scope.spawn(|| server.ask("/v1/completions", &neighbour)["choices"].take());
        server.wait_until("all its tokens are there", LIMIT, || {
            server.metric(ended) >= before + f64::from(CHOICES)
        });
        [
            beside.join().expect("no panic"),
            server.ask("/v1/completions", &neighbour)["choices"].take(),
        ]
    });
    assert!(answers.iter().all(|answer| *answer == expected), "{answers:?}");
    let streamed = server.stream("/v1/completions", &neighbour);
    let text: String = streamed
        .iter()
        .filter_map(|event| event["choices"][0]["text"].as_str())
        .collect();
    assert_eq!(text, expected[0]["text"].as_str().expect("a text"));
    // So it was waited for all along.
    server.wait_until("it is cut", LIMIT, || {
        server.metric("sconce_connections_cut_total{cause=\"stalled\"}") == 1.0
    });
    server.wait_until("its blocks are free", LIMIT, || {
        server.metric("sconce_kv_blocks{state=\"held\"}") == 0.0
    });
}
