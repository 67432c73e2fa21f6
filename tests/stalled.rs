//! A client that stops reading, and others beside it: the engine waits for nobody.

mod common;

use std::{
    io::{Read, Write},
    net::TcpStream,
    thread,
    time::{Duration, Instant},
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

/// A request whose client reads the beginning of its answer and no more. It has many choices with what each of their
/// tokens could have been: more than the buffers of both ends hold.
fn stalled(server: &Server) -> TcpStream {
    let body = json!({
        "messages": [{"role": "user", "content": "AB"}], "max_tokens": 60, "n": CHOICES, "temperature": 1.0,
        "logprobs": true, "top_logprobs": 20, "ignore_eos": true, "stream": true,
    });
    let body = body.to_string();
    let mut stalled = narrow(server);
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stalled.write_all((head + &body).as_bytes()).expect("sends");
    stalled.read_exact(&mut [0; 16]).expect("the answer begins");
    stalled
}

/// Bytes of memory that the server's process takes.
#[cfg(target_os = "linux")]
fn memory(server: &Server) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", server.id())).expect("the server runs");
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .expect("a size");
    let kibibytes = line.trim().trim_end_matches("kB").trim();
    kibibytes.parse::<u64>().expect("a number") * 1024
}

/// Clients that read nothing of long answers: what waits for them is small, and the server ends when its time is over.
#[test]
#[cfg(target_os = "linux")]
fn a_stalled_reader_costs_little_memory_and_does_not_hold_up_the_end() {
    let folder = tiny::model();
    let arguments = [
        "--model",
        tiny::path(&folder),
        "--device",
        "cpu",
        "--write-timeout",
        "1h",
        "--drain-timeout",
        "1s",
    ];
    let server = Server::start_quietly(&arguments);
    let ended = || server.metric("sconce_sequences_total{outcome=\"length\"}");
    let choices = f64::from(CHOICES);
    // What a server takes when it works for the first time.
    let answers = stalled(&server);
    server.wait_until("all its tokens are there", LIMIT, || ended() >= choices);
    let before = memory(&server);
    let more: Vec<TcpStream> = (2..=8)
        .map(|count| {
            let stalled = stalled(&server);
            server.wait_until("all its tokens are there", LIMIT, || {
                ended() >= f64::from(count) * choices
            });
            stalled
        })
        .collect();
    let grown = memory(&server).saturating_sub(before);
    // Each waits with 7,680 tokens and what 20 others were; as text they would be 15 MB.
    assert!(grown < 7 * (8 << 20), "{grown} bytes for {} answers", more.len());

    server.signal("-TERM");
    let begun = Instant::now();
    assert_eq!(server.wait().code(), Some(0));
    assert!(begun.elapsed() < LIMIT);
    drop((answers, more));
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

    let _stalled = stalled(&server);
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
