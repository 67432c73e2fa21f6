//! Each way in which a request can go is counted as what it is, and bad input is refused before any load.

mod mock;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use mock::{END, Mock, Reply, drive, token};
use sconce_loadtest::{
    arrivals::Arrivals,
    check::{self, CheckError},
    client::{Api, Target},
    report::{self, Run},
    slo::Metric,
    workload::Lengths,
};
use tokio::net::TcpSocket;

const BURST: Arrivals = Arrivals::Burst;
/// Where nothing is to time out.
const PATIENCE: Duration = Duration::from_secs(60);
/// Where something is: far more than an answer takes, and far less than the stall.
const TIMEOUT: Duration = Duration::from_secs(8);
const STALL: Duration = Duration::from_secs(20);

fn errors(pairs: &[(&str, u64)]) -> BTreeMap<String, u64> {
    pairs.iter().map(|&(kind, count)| (kind.to_owned(), count)).collect()
}

#[test]
fn failures_are_counted_by_kind_and_kept_out_of_the_latencies() {
    let now = Duration::ZERO;
    let server = Mock::start(move |index| match index {
        0 => Reply::stream(now, vec![(now, token(" cut"))]),
        1 => Reply {
            whole: false,
            ..Reply::stream(now, vec![(now, token(" broken"))])
        },
        2 => Reply::stream(now, vec![(now, "data: {not json\n\n".to_owned())]),
        3 => Reply::stream(now, vec![(now, "data: {\"unlike\": \"OpenAI\"}\n\n".to_owned())]),
        4 => Reply::stream(
            now,
            vec![
                (now, token(" a")),
                (now, "data: {\"error\": {\"message\": \"lost\"}}\n\n".to_owned()),
            ],
        ),
        5 => Reply::status(503),
        6 => Reply::status(429),
        7 => Reply::after(STALL),
        8 => Reply::stream(now, vec![(now, token(" slow")), (STALL, END.to_owned())]),
        _ => Reply::after(now),
    });
    let measured = drive(&server.asked(TIMEOUT), BURST, 12);
    let run = Run::of("mixed", None, measured, None);
    let expected = errors(&[
        ("bad_json", 2),
        ("broken_stream", 2),
        ("error_event", 1),
        ("status_429", 1),
        ("status_503", 1),
        ("timed_out", 2),
    ]);
    assert_eq!(run.requests.errors, expected);
    assert_eq!(
        (run.requests.sent, run.requests.answered, run.requests.failed),
        (12, 3, 9)
    );
    assert!(run.latency_ms.values().all(|summary| summary.count <= 3));
}

#[test]
fn a_whole_answer_may_be_empty_and_without_usage() {
    let whole = |body: &str| Reply::stream(Duration::ZERO, vec![(Duration::ZERO, body.to_owned())]);
    let server = Mock::start(move |index| match index {
        0 => whole("{\"choices\": [{\"message\": {\"role\": \"assistant\", \"content\": null}}]}"),
        1 => whole("{\"choices\": [{\"text\": \" a\"}]}"),
        2 => whole("{\"choices\": [{\"index\": 0}]}"),
        _ => whole("{\"choices\": []}"),
    });
    let mut asked = server.asked(PATIENCE);
    asked.form.stream = false;
    let run = Run::of("whole", None, drive(&asked, BURST, 4), None);
    assert_eq!(
        (run.requests.answered, run.requests.errors),
        (2, errors(&[("bad_json", 2)]))
    );
    // Nobody said how many tokens there were.
    assert_eq!(run.tokens, report::Tokens::default());
}

// A busy machine may make anything later, so there are lower bounds only. One that sees the first token late sees the
// second that much sooner after it.
#[test]
fn a_slow_first_token_is_a_ttft_and_a_slow_stream_a_tpot() {
    let ms = Duration::from_millis;
    let server = Mock::start(move |_| {
        let parts = vec![(ms(0), token(" a")), (ms(1500), token(" b") + END)];
        Reply::stream(ms(250), parts)
    });
    let run = Run::of("slow", None, drive(&server.asked(PATIENCE), BURST, 3), None);
    let mean = |metric| run.latency_ms[&metric].mean;
    let (ttft, tpot, e2e) = (mean(Metric::Ttft), mean(Metric::Tpot), mean(Metric::E2e));
    assert!(ttft >= 245.0, "{ttft}");
    assert!(tpot >= 500.0, "{tpot}");
    assert!(e2e >= 1740.0, "{e2e}");
    // The histograms keep three digits.
    assert!(ttft + tpot <= e2e * 1.01, "{ttft} and {tpot} make more than {e2e}");
    assert!((mean(Metric::Itl) - tpot).abs() <= tpot * 0.01, "{}", mean(Metric::Itl));
    assert_eq!((run.tokens.prompt, run.tokens.output), (Some(15), Some(6)));
}

#[test]
fn nobody_listening_is_a_refusal() {
    let server = Mock::start(|_| Reply::after(Duration::ZERO));
    let mut asked = server.asked(PATIENCE);
    let nobody = Nobody::new();
    asked.target = Target::new(&nobody.url(), None, PATIENCE).unwrap();
    let run = Run::of("gone", None, drive(&asked, BURST, 4), None);
    assert_eq!(run.requests.errors, errors(&[("refused", 4)]));
}

/// A run whose requests took less than half a second, since only a connection that breaks so soon has been closed before
/// the request reached it. Made again where the machine was busy; gives the requests that reached the server too.
fn at_once(reply: fn(usize) -> Reply, requests: u64) -> (Run, usize) {
    for _ in 0..50 {
        let server = Mock::start(reply);
        let run = Run::of("closed", None, drive(&server.asked(PATIENCE), BURST, requests), None);
        if run.seconds < 0.5 {
            return (run, server.bodies.lock().unwrap().len());
        }
    }
    panic!("the machine never has half a second");
}

#[test]
fn a_connection_that_ends_before_an_answer_is_given_a_second_chance_and_no_third() {
    let second = |index| match index % 2 {
        0 => Reply::none(),
        _ => Reply::after(Duration::ZERO),
    };
    for _ in 0..3 {
        let (run, bodies) = at_once(second, 1);
        assert_eq!((run.requests.answered, run.requests.failed, bodies), (1, 0, 2));
    }
    let (run, bodies) = at_once(|_| Reply::none(), 2);
    assert_eq!((run.requests.errors, bodies), (errors(&[("connection", 2)]), 4));
}

#[test]
fn a_session_carries_the_servers_answers() {
    let server = Mock::start(|_| Reply::after(Duration::ZERO));
    let mut asked = server.asked(PATIENCE);
    let mut workload = (*asked.workload).clone();
    workload.api = Api::Chat;
    workload.turns = Lengths::Fixed(3);
    workload.shared_prefix = 4;
    asked.workload = Arc::new(workload);
    let run = Run::of("chat", None, drive(&asked, BURST, 3), None);
    assert_eq!(run.requests.answered, 3);
    let turns: Vec<(u32, u64)> = run.turns.iter().map(|turn| (turn.turn, turn.answered)).collect();
    assert_eq!(turns, [(1, 1), (2, 1), (3, 1)]);
    let bodies = server.bodies.lock().unwrap();
    let roles = |body: &String| -> Vec<(String, String)> {
        let body: serde_json::Value = serde_json::from_str(body).unwrap();
        let messages = body["messages"].as_array().unwrap();
        let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
        messages
            .iter()
            .map(|message| (text(&message["role"]), text(&message["content"])))
            .collect()
    };
    let last = roles(&bodies[2]);
    let order: Vec<&str> = last.iter().map(|(role, _)| role.as_str()).collect();
    assert_eq!(order, ["system", "user", "assistant", "user", "assistant", "user"]);
    assert_eq!(last[2].1, " a b");
    assert_eq!(roles(&bodies[1]), last[..4]);
}

#[test]
fn https_needs_a_believed_certificate() {
    let server = Mock::start_secret(|_| Reply::after(Duration::ZERO));
    let strict = server.asked(PATIENCE);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let error = runtime.block_on(check::model(&strict.target, None)).unwrap_err();
    assert!(matches!(error, CheckError::Certificate { .. }), "{error}");
    let mut trusting = strict.clone();
    trusting.target = strict.target.with_any_certificate().unwrap();
    let run = Run::of("secret", None, drive(&trusting, BURST, 5), None);
    assert_eq!((run.requests.answered, run.tokens.output), (5, Some(10)));
}

/// A port that is taken by a socket that never listens: no other program can get it and answer.
struct Nobody(TcpSocket);

impl Nobody {
    fn new() -> Self {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind(([127, 0, 0, 1], 0).into()).unwrap();
        Self(socket)
    }

    fn url(&self) -> String {
        format!("http://{}", self.0.local_addr().unwrap())
    }
}

#[test]
fn an_unreachable_server_and_a_missing_model_are_refused() {
    let server = Mock::start(|_| Reply::status(500));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let asked = server.asked(PATIENCE);
        assert_eq!(check::model(&asked.target, None).await.unwrap(), "mock");
        assert_eq!(check::model(&asked.target, Some("mock")).await.unwrap(), "mock");
        let missing = check::model(&asked.target, Some("other")).await.unwrap_err();
        assert!(
            matches!(&missing, CheckError::NoModel { has, .. } if has == &["mock"]),
            "{missing}"
        );
        let probe = check::probe(&asked.target, Api::Chat, &asked.form).await.unwrap_err();
        assert!(probe.to_string().contains("status_500"), "{probe}");
        let nobody = Nobody::new();
        let target = Target::new(&nobody.url(), None, PATIENCE).unwrap();
        let error = check::model(&target, None).await.unwrap_err();
        assert!(matches!(error, CheckError::Unreachable { .. }), "{error}");
    });
    for bad in ["", "localhost:8080", "ftp://x", "http://"] {
        assert!(check::url(bad).is_err(), "{bad}");
    }
    assert!(server.bodies.lock().unwrap().len() == 1, "no load was sent");
}
