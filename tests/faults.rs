//! Faults over a real socket with the real model: who is at fault ends, the others answer as if nothing had been; and
//! what no step can outlive is told to everyone. A request asks for its fault by its id.

mod common;

use std::{fs, io::Read, process::Command, time::Duration};

use common::{Server, all_at_once, chat, completion, send_by_hand, text, tiny};
use serde_json::{Value, json};
use tempfile::NamedTempFile;

const CHAT: &str = "/v1/chat/completions";
const LIMIT: Duration = Duration::from_secs(60);
/// However slow the machine is, nobody is refused for what is ahead of them.
const PATIENT: &str = "--request-timeout=24h";
/// Tokens of an answer that lasts longer than any test.
const LASTING: usize = 4000;
const QUESTIONS: [&str; 3] = ["What is the capital of France?", "Name an animal.", "Count to ten."];

fn question(index: usize) -> Value {
    let mut body = chat(QUESTIONS[index % QUESTIONS.len()], 16);
    body["ignore_eos"] = json!(true);
    body
}

/// The whole answer to a request with this id: its status, and its body.
fn ask(server: &Server, id: &str, body: &Value) -> (u16, String) {
    ask_at(server, CHAT, id, body)
}

fn ask_at(server: &Server, path: &str, id: &str, body: &Value) -> (u16, String) {
    let mut answer = String::new();
    let mut socket = send_by_hand(server, path, id, body);
    socket.read_to_string(&mut answer).expect("the answer ends");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head and a body");
    let status = head.split(' ').nth(1).expect("a status").parse().expect("a number");
    (status, body.to_owned())
}

/// That a request failed in the way it should: with a status before its first token, else with its stream's last event.
fn failed(answer: (u16, String), late: bool, code: &str) {
    let (status, body) = answer;
    let errors = body.matches("\"error\"").count();
    assert_eq!((errors, body.contains("[DONE]")), (1, false), "{status} {body}");
    assert!(body.contains(code), "{status} {body}");
    assert_eq!(status == 200, late, "{status} {body}");
}

fn expected(server: &Server) -> Vec<String> {
    (0..QUESTIONS.len())
        .map(|index| text(&server.ask(CHAT, &question(index))))
        .collect()
}

fn fault(server: &Server, cause: &str) -> f64 {
    server.metric(&format!("sconce_faults_total{{cause=\"{cause}\"}}"))
}

fn idle(server: &Server) {
    server.wait_until("nothing runs", LIMIT, || {
        ["sconce_running", "sconce_waiting", "sconce_kv_blocks{state=\"held\"}"]
            .iter()
            .all(|name| server.metric(name) == 0.0)
    });
}

/// That a fault of the whole engine is told to its request and to those that run beside it, on a server that was idle.
fn fails_with_its_neighbours(server: &Server, id: &str, neighbours: usize) {
    let stream = |max_tokens: usize| {
        let mut body = question(0);
        (body["stream"], body["max_tokens"]) = (json!(true), json!(max_tokens));
        body
    };
    let answers = std::thread::scope(|scope| {
        let beside = || ask(server, "neighbour", &stream(LASTING));
        let beside: Vec<_> = (0..neighbours).map(|_| scope.spawn(beside)).collect();
        server.wait_until("the neighbours run", LIMIT, || {
            server.metric("sconce_running") == neighbours as f64
        });
        let mut answers = vec![ask(server, id, &stream(16))];
        answers.extend(beside.into_iter().map(|thread| thread.join().expect("no panic")));
        answers
    });
    for answer in answers {
        let begun = answer.0 == 200;
        failed(answer, begun, "engine_lost");
    }
}

#[test]
fn a_fault_has_one_victim() {
    let server = Server::start_quietly(&[]);
    let expected = expected(&server);
    let faults = [
        ("nan", 3),
        ("nan", 0),
        ("infinity", 2),
        ("sampler", 4),
        ("step", 2),
        ("step", 0),
        ("step-panic", 1),
        ("detokenizer", 2),
        ("handler", 0),
    ];
    let mut work: Vec<Box<dyn FnOnce() + Send>> = Vec::new();
    for (index, (name, after)) in faults.into_iter().enumerate() {
        let server = &server;
        work.push(Box::new(move || {
            let mut body = question(index);
            body["stream"] = json!(true);
            let answer = ask(server, &format!("fault.{name}.{after}"), &body);
            failed(answer, after > 0, "server_error");
        }));
    }
    for index in 0..2 * QUESTIONS.len() {
        let (server, expected) = (&server, &expected[index % QUESTIONS.len()]);
        work.push(Box::new(move || {
            assert_eq!(&text(&server.ask(CHAT, &question(index))), expected);
        }));
    }
    all_at_once(work);
    idle(&server);
    assert_eq!(fault(&server, "not_a_number"), 3.0);
    assert_eq!(fault(&server, "sampler_panicked"), 1.0);
    // A pass of several rows fails before the guilty one stands alone.
    assert!(fault(&server, "step_failed") >= 2.0 && fault(&server, "step_panicked") >= 1.0);
    assert_eq!(server.metric("sconce_request_panics_total{place=\"text\"}"), 1.0);
    assert_eq!(server.metric("sconce_request_panics_total{place=\"handler\"}"), 1.0);
    assert_eq!(server.metric("sconce_sequences_total{outcome=\"failed\"}"), 7.0);
}

#[test]
fn what_gave_no_numbers_is_computed_again() {
    let server = Server::start_quietly(&["--step-tokens", "32", "--max-batch", "8"]);
    // Its first chunks are kept in earlier steps than the one that fails.
    let prompt: Vec<u64> = (1000..1100).collect();
    let body = completion(&prompt, 4);
    let cached = || {
        let answer = server.ask("/v1/completions", &body);
        answer["usage"]["prompt_tokens_details"]["cached_tokens"]
            .as_u64()
            .expect("a count")
    };
    for index in 0..2 {
        failed(
            ask_at(&server, "/v1/completions", &format!("fault.nan.{index}"), &body),
            false,
            "server_error",
        );
        idle(&server);
        assert_eq!(server.metric("sconce_kv_blocks{state=\"cached\"}"), 0.0);
        assert_eq!(cached(), 0);
        assert_eq!(cached(), 96, "what the answered request computed is kept");
    }
}

#[test]
fn short_memory_makes_smaller_steps_and_the_same_answers() {
    let server = Server::start_quietly(&[]);
    let expected = expected(&server);
    let ids = ["fault.out-of-memory.0", "fault.out-of-memory.3", "plain"];
    let work = ids.iter().cycle().take(6).enumerate();
    let work = work.map(|(index, id)| {
        let (server, expected) = (&server, &expected);
        move || {
            let (status, body) = ask(server, id, &question(index));
            let answer: Value = serde_json::from_str(&body).expect("JSON");
            assert_eq!((status, &text(&answer)), (200, &expected[index % QUESTIONS.len()]));
        }
    });
    all_at_once(work.collect());
    idle(&server);
    // Each fault happens once, and to a pass of more than a token: where the first ones made the passes short, the last
    // ones find none.
    assert!((1.0..=4.0).contains(&fault(&server, "out_of_memory")));
}

#[test]
fn a_hung_step_is_given_up_and_the_engine_runs_again() {
    // No step of a machine that has other things to do takes as long.
    let server = Server::start_quietly(&["--device", "cpu", "--step-timeout", "10s", "--max-batch", "3", PATIENT]);
    let expected = expected(&server);
    idle(&server);
    let asked = |stream: bool, max_tokens: usize| {
        let mut body = question(0);
        (body["stream"], body["max_tokens"]) = (json!(stream), json!(max_tokens));
        body
    };
    let count = |name: &str, count: f64| server.wait_until(name, LIMIT, || server.metric(name) == count);
    let answers = std::thread::scope(|scope| {
        // Three run; the one that is to hang and two more wait for a place.
        let mut asking = Vec::new();
        for (stream, running) in [(true, 1.0), (false, 2.0)] {
            let (server, body) = (&server, asked(stream, LASTING));
            asking.push((stream, scope.spawn(move || ask(server, "runs", &body))));
            count("sconce_running", running);
        }
        let leaving = send_by_hand(&server, CHAT, "leaves", &asked(false, LASTING));
        count("sconce_running", 3.0);
        let waiting = [(true, "fault.hang.3", 1.0), (false, "waits", 2.0), (true, "waits", 3.0)];
        for (stream, id, waiting) in waiting {
            let (server, body) = (&server, asked(stream, 16));
            asking.push((stream, scope.spawn(move || ask(server, id, &body))));
            count("sconce_waiting", waiting);
        }
        // The oldest one takes the place, and hangs.
        drop(leaving);
        let answers = asking
            .into_iter()
            .map(|(stream, thread)| (stream, thread.join().expect("no panic")));
        answers.collect::<Vec<_>>()
    });
    for (index, (stream, answer)) in answers.into_iter().enumerate() {
        // Only a stream's status goes out before its end.
        let begun = answer.0 == 200;
        assert_eq!(begun, stream && index < 3, "{answer:?}");
        failed(answer, begun, "engine_lost");
    }
    server.wait_until("it is ready", LIMIT, || server.get("/ready").status() == 200);
    for (index, expected) in expected.iter().enumerate() {
        assert_eq!(&text(&server.ask(CHAT, &question(index))), expected);
    }
    assert_eq!(server.metric("sconce_engine_restarts_total{cause=\"hung\"}"), 1.0);
    idle(&server);
}

#[test]
fn a_deadline_is_kept_in_a_step_that_hangs() {
    let server = Server::start_quietly(&["--device", "cpu", "--max-batch", "1"]);
    let mut body = question(0);
    body["timeout_ms"] = json!(10_000);
    let (hung, waiting) = std::thread::scope(|scope| {
        let hung = scope.spawn(|| ask(&server, "fault.hang.1", &body));
        server.wait_until("it runs", LIMIT, || server.metric("sconce_running") == 1.0);
        let waiting = ask(&server, "waits", &body);
        (hung.join().expect("no panic"), waiting)
    });
    let (status, answer) = hung;
    assert_eq!(status, 200, "{answer}");
    let answer: Value = serde_json::from_str(&answer).expect("JSON");
    assert_eq!(answer["choices"][0]["stop_reason"], "deadline", "{answer}");
    assert!(!text(&answer).is_empty(), "{answer}");
    failed(waiting, false, "deadline_passed");
    // The step goes on for as long as it may.
    assert_eq!(server.metric("sconce_engine_restarts_total{cause=\"hung\"}"), 0.0);
}

#[test]
fn a_server_is_not_ready_while_its_engine_starts_again() {
    let settings = NamedTempFile::new().expect("a file");
    // So many steps come before the new engine serves.
    let pin = format!("[[pin]]\nprompt = '{}'\n", "word ".repeat(1000));
    fs::write(settings.path(), pin).expect("writes");
    let path = settings.path().to_str().expect("a path");
    let slow = ["--device", "cpu", "--max-batch", "1", "--step-tokens", "4"];
    let room = ["--max-model-len", "2048", "--kv-memory", "640MiB"];
    let server = Server::start_quietly(&[["--config", path, PATIENT].as_slice(), &slow, &room].concat());
    failed(ask(&server, "fault.engine.0", &question(0)), false, "engine_lost");
    let unready = server.get("/ready");
    assert_eq!(unready.status(), 503);
    assert!(unready.text().expect("text").contains("engine_lost"));
    assert_eq!(server.post(CHAT, &question(0)).status(), 503);
    server.wait_until("it is ready", Duration::from_secs(240), || {
        server.get("/ready").status() == 200
    });
    server.ask(CHAT, &question(0));
}

#[test]
fn nothing_is_kept_of_what_an_engine_that_panicked_computed() {
    let server = Server::start_quietly(&[PATIENT]);
    let expected = expected(&server);
    let cached = || server.metric("sconce_cached_tokens_total");
    let before = cached();
    assert_eq!(text(&server.ask(CHAT, &question(0))), expected[0]);
    assert!(cached() > before, "the question is in the prefix cache");
    idle(&server);
    fails_with_its_neighbours(&server, "fault.engine.2", 2);
    server.wait_until("it is ready", LIMIT, || server.get("/ready").status() == 200);
    assert_eq!(server.metric("sconce_engine_restarts_total{cause=\"panicked\"}"), 1.0);
    let before = cached();
    assert_eq!(text(&server.ask(CHAT, &question(0))), expected[0]);
    assert_eq!(cached(), before, "the KV cache is a new one");
    idle(&server);
}

#[test]
fn a_replaced_models_engine_that_fails_is_counted() {
    let folder = tiny::model();
    let server = Server::start_quietly(&["--admin", "--max-batch", "1", "--device", "cpu", PATIENT]);
    let mut lasting = question(0);
    lasting["max_tokens"] = json!(LASTING);
    let answer = std::thread::scope(|scope| {
        let before = send_by_hand(&server, CHAT, "before", &lasting);
        server.wait_until("it runs", LIMIT, || server.metric("sconce_running") == 1.0);
        let failing = scope.spawn(|| ask(&server, "fault.engine.0", &question(0)));
        server.wait_until("it waits", LIMIT, || server.metric("sconce_waiting") == 1.0);
        server.ask("/admin/model", &json!({"model": tiny::path(&folder)}));
        // Now that another model serves, the one that waits runs into its fault.
        drop(before);
        failing.join().expect("no panic")
    });
    failed(answer, false, "engine_lost");
    let failures = || server.metric("sconce_retired_engine_failures_total{cause=\"panicked\"}");
    server.wait_until("it is counted", LIMIT, || failures() == 1.0);
    assert_eq!(server.metric("sconce_engine_restarts_total{cause=\"panicked\"}"), 0.0);
    server.ask("/v1/completions", &completion(&[5, 6, 7], 4));
}

#[test]
fn an_engine_that_fails_too_often_ends_the_server() {
    let server = Server::start_quietly(&[PATIENT]);
    let expected = expected(&server);
    for time in 0..4 {
        idle(&server);
        fails_with_its_neighbours(&server, "fault.engine.2", 1);
        if time < 3 {
            server.wait_until("it is ready", LIMIT, || server.get("/ready").status() == 200);
            assert_eq!(text(&server.ask(CHAT, &question(1))), expected[1]);
            let restarts = server.metric("sconce_engine_restarts_total{cause=\"panicked\"}");
            assert_eq!(restarts, f64::from(time + 1));
        }
    }
    assert_eq!(server.wait().code(), Some(1));
}

#[test]
fn a_lost_device_ends_the_server_and_everyone_is_told() {
    let server = Server::start_quietly(&[PATIENT]);
    fails_with_its_neighbours(&server, "fault.device-lost.2", 2);
    assert_eq!(server.wait().code(), Some(1));
}

#[test]
fn a_loader_that_panics_ends_the_start_and_leaves_a_running_model() {
    let output = Command::new(env!("CARGO_BIN_EXE_sconce"))
        .args(["serve", "--port", "0", "--model", "fault.loader.0"])
        .output()
        .expect("runs");
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("made the loader panic"));

    let server = Server::start_quietly(&["--admin"]);
    let response = server.post("/admin/model", &json!({"model": "fault.loader.0"}));
    assert_eq!(response.status(), 400);
    assert!(response.text().expect("text").contains("made the loader panic"));
    server.ask(CHAT, &question(0));
}
