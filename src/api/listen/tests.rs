//! Slow, silent and too many clients, over real sockets.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream as Socket};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::super::Server;
use super::super::testing::{server, token, tokenizer};
use super::*;
use crate::request::{Event, FinishReason, Request as Sequence};

const LONG: Duration = Duration::from_secs(60);
const SHORT: Duration = Duration::from_millis(100);
const PATIENT: Patience = Patience {
    connections: 16,
    head: LONG,
    stall: LONG,
    answer: LONG,
};

struct Running {
    address: SocketAddr,
    end: oneshot::Sender<()>,
    ended: JoinHandle<()>,
}

async fn start(server: Arc<Server>, patience: Patience) -> Running {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (end, told) = oneshot::channel();
    let ended = tokio::spawn(serve(listener, server, patience, async { drop(told.await) }));
    Running { address, end, ended }
}

fn connect(address: SocketAddr, send: &str) -> Socket {
    let mut socket = Socket::connect(address).unwrap();
    socket.set_read_timeout(Some(LONG)).unwrap();
    socket.write_all(send.as_bytes()).unwrap();
    socket
}

/// All that comes until the other side closes.
fn rest(socket: &mut Socket) -> String {
    let mut bytes = Vec::new();
    // A reset is an end as well.
    let _ = socket.read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}

fn streaming(choices: usize) -> String {
    asking(choices, true)
}

fn asking(choices: usize, stream: bool) -> String {
    let body = format!(
        r#"{{"messages": [{{"role": "user", "content": "Hi"}}], "stream": {stream}, "ignore_eos": true, "n": {choices}}}"#
    );
    format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
}

type Senders = Arc<Mutex<Vec<UnboundedSender<Event>>>>;

/// A server whose engine has sent `tokens` tokens to each sequence and keeps its channels open.
fn talkative(tokens: usize) -> (Arc<Server>, Senders) {
    let senders = Senders::default();
    let log = senders.clone();
    let hi = tokenizer().encode(" there", false).unwrap()[0];
    let submit = move |requests: Vec<Sequence>| {
        for request in requests {
            for _ in 0..tokens {
                let _ = request.events.send(Event::Token(token(hi)));
            }
            log.lock().unwrap().push(request.events);
        }
        Ok(())
    };
    (server(submit), senders)
}

fn until(what: &str, done: impl Fn() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < LONG, "waited too long until {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn a_reader_that_stops_reading_is_cut_and_its_request_cancelled() {
    // More than the buffers of both sockets hold.
    let (server, senders) = talkative(8000);
    let running = start(
        server.clone(),
        Patience {
            stall: SHORT,
            ..PATIENT
        },
    )
    .await;
    let mut stalled = connect(running.address, &streaming(8));
    stalled.read_exact(&mut [0; 16]).unwrap();
    let sent = || senders.lock().unwrap().clone();
    until("the engine hears of it", || {
        sent().len() == 8 && sent().iter().all(UnboundedSender::is_closed)
    });
    until("it is counted", || {
        (server.metrics_text)().contains("sconce_connections_cut_total{cause=\"stalled\"} 1")
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn a_reader_that_takes_a_little_now_and_then_is_cut_in_time() {
    let (server, senders) = talkative(8000);
    let answer = 4 * SHORT;
    let running = start(server.clone(), Patience { answer, ..PATIENT }).await;
    let trickling = connect(running.address, &streaming(8));
    until("the engine hears of it", || {
        // At its end the connection may be reset.
        let _ = (&trickling).read(&mut [0; 64]);
        let sent = senders.lock().unwrap();
        sent.len() == 8 && sent.iter().all(UnboundedSender::is_closed)
    });
    until("it is counted", || {
        (server.metrics_text)().contains("sconce_connections_cut_total{cause=\"stalled\"} 1")
    });
}

#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn a_client_that_leaves_is_noticed_whatever_it_sent_behind_its_request() {
    let (server, senders) = talkative(1);
    let running = start(server, PATIENT).await;
    let more = ["", "\r\n", "GET /health HTTP/1.1\r\nhost: x\r\n\r\n", "x"];
    for (asked, more) in (1..).zip(more) {
        let leaving = connect(running.address, &(asking(1, false) + more));
        until("it runs", || senders.lock().unwrap().len() == asked);
        // Sent later it is not in the same packet, nor read at the same time.
        (&leaving).write_all(more.as_bytes()).unwrap();
        leaving.shutdown(std::net::Shutdown::Write).unwrap();
        let sent = || senders.lock().unwrap().clone();
        until("the engine hears of it", || {
            sent().iter().all(UnboundedSender::is_closed)
        });
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn a_reader_that_waits_for_tokens_is_not_cut() {
    let (server, senders) = talkative(1);
    let running = start(
        server,
        Patience {
            stall: SHORT,
            ..PATIENT
        },
    )
    .await;
    let mut waiting = connect(running.address, &streaming(1));
    until("it runs", || !senders.lock().unwrap().is_empty());
    tokio::time::sleep(4 * SHORT).await;
    let sender = senders.lock().unwrap().remove(0);
    sender.send(Event::Finished(FinishReason::Length)).unwrap();
    let (mut answer, mut more) = (String::new(), [0; 1000]);
    while !answer.contains("data: [DONE]") {
        let count = waiting.read(&mut more).unwrap();
        assert!(count > 0, "closed after {answer}");
        answer += &String::from_utf8_lossy(&more[..count]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn slow_heads_and_idle_connections_are_closed() {
    let (server, _) = talkative(1);
    let running = start(server.clone(), Patience { head: SHORT, ..PATIENT }).await;
    let cut = || {
        let metrics = (server.metrics_text)();
        let line = "sconce_connections_cut_total{cause=\"slow_head\"} ";
        let count = metrics.lines().find_map(|found| found.strip_prefix(line));
        count.and_then(|count| count.parse().ok()).unwrap_or(0)
    };
    let closed = |begun| {
        let answer = rest(&mut connect(running.address, begun));
        assert!(!answer.contains("200 OK"), "{answer}");
    };
    closed("");
    // A busy machine may not send a head in time, so each is sent until it comes in time.
    until("the head that was begun is counted", || {
        closed("GET /health HTTP/1.1\r\nhost:");
        cut() > 0
    });
    let before = cut();
    until("a head in time is answered", || {
        let mut idle = connect(running.address, "GET /health HTTP/1.1\r\nhost: x\r\n\r\n");
        rest(&mut idle).starts_with("HTTP/1.1 200 OK")
    });
    assert_eq!(cut(), before, "whoever is idle is not cut short");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn a_slow_body_is_told_the_limit() {
    let server = super::super::testing::impatient(SHORT);
    let running = start(server, PATIENT).await;
    let head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{\"messages\"";
    let answer = rest(&mut connect(running.address, head));
    assert!(
        answer.starts_with("HTTP/1.1 408") && answer.contains("100ms"),
        "{answer}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn a_large_head_is_told_the_limit() {
    let (server, _) = talkative(1);
    let running = start(server.clone(), PATIENT).await;
    let with = |bytes: usize| {
        format!(
            "GET /health HTTP/1.1\r\nhost: x\r\nx-large: {}\r\n\r\n",
            "x".repeat(bytes)
        )
    };
    let answer = rest(&mut connect(
        running.address,
        &(with(40_000) + "GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"),
    ));
    assert!(
        answer.starts_with("HTTP/1.1 431") && answer.contains("32768"),
        "{answer}"
    );
    assert!(answer.contains("200 OK"), "{answer}");
    let mut huge = Socket::connect(running.address).unwrap();
    // The server hangs up in the middle of it.
    let _ = huge.write_all(with(400_000).as_bytes());
    assert!(!rest(&mut huge).contains("200 OK"));
    until("both are counted", || {
        (server.metrics_text)().contains("sconce_refusals_total{cause=\"headers_too_large\"} 2")
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn what_is_no_http_is_refused_and_counted() {
    let (server, _) = talkative(1);
    let running = start(server.clone(), PATIENT).await;
    let answer = rest(&mut connect(
        running.address,
        "GET /health HTTP/1.1\r\nno header\r\n\r\n",
    ));
    assert!(answer.starts_with("HTTP/1.1 400"), "{answer}");
    until("it is counted", || {
        (server.metrics_text)().contains("sconce_refusals_total{cause=\"malformed_head\"} 1")
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn one_connection_too_many_is_told_so() {
    let (server, senders) = talkative(1);
    let running = start(
        server,
        Patience {
            connections: 1,
            ..PATIENT
        },
    )
    .await;
    let first = connect(running.address, &streaming(1));
    until("it runs", || !senders.lock().unwrap().is_empty());
    let answer = rest(&mut connect(running.address, "GET /health HTTP/1.1\r\nhost: x\r\n\r\n"));
    assert!(
        answer.starts_with("HTTP/1.1 503") && answer.contains("too_many_connections"),
        "{answer}"
    );
    drop(first);
    let ask = "GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    until("there is room", || {
        rest(&mut connect(running.address, ask)).starts_with("HTTP/1.1 200")
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn at_the_end_what_runs_is_finished_and_nobody_is_let_in() {
    let (server, senders) = talkative(1);
    let running = start(server, PATIENT).await;
    let mut busy = connect(running.address, &streaming(1));
    let mut idle = connect(running.address, "GET /health HTTP/1.1\r\nhost: x\r\n\r\n");
    idle.read_exact(&mut [0; 16]).unwrap();
    until("it runs", || !senders.lock().unwrap().is_empty());
    running.end.send(()).unwrap();
    assert!(rest(&mut idle).contains("ok"));
    until("nobody is let in", || Socket::connect(running.address).is_err());
    assert!(!running.ended.is_finished());
    let sender = senders.lock().unwrap().remove(0);
    sender.send(Event::Finished(FinishReason::Length)).unwrap();
    assert!(rest(&mut busy).contains("data: [DONE]"));
    running.ended.await.unwrap();
}
