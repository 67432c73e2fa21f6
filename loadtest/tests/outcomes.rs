//! Each way in which a request can go is counted as what it is, and bad input is refused before any load.

mod mock;

use std::{collections::BTreeMap, net::TcpListener, sync::Arc, time::Duration};

use mock::{END, Mock, Reply, drive, token};
use sconce_loadtest::{
    arrivals::Arrivals,
    check::{self, CheckError},
    client::{Api, Target},
    report::Run,
    slo::Metric,
    workload::Lengths,
};

const BURST: Arrivals = Arrivals::Burst;

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
        7 => Reply::after(Duration::from_secs(3)),
        8 => Reply::stream(
            now,
            vec![(now, token(" slow")), (Duration::from_secs(3), END.to_owned())],
        ),
        _ => Reply::after(now),
    });
    let measured = drive(&server.asked(Duration::from_millis(700)), BURST, 12);
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
    assert!(
        run.latency_ms
            .values()
            .all(|summary| summary.count <= 3 && summary.max < 600.0)
    );
}

#[test]
fn a_slow_first_token_is_a_ttft_and_a_slow_stream_a_tpot() {
    let ms = Duration::from_millis;
    let server = Mock::start(move |_| {
        let parts = vec![(ms(0), token(" a")), (ms(120), token(" b") + END)];
        Reply::stream(ms(250), parts)
    });
    let run = Run::of(
        "slow",
        None,
        drive(&server.asked(Duration::from_secs(9)), BURST, 3),
        None,
    );
    let p50 = |metric| run.latency_ms[&metric].p50;
    assert!((245.0..350.0).contains(&p50(Metric::Ttft)), "{}", p50(Metric::Ttft));
    assert!((110.0..220.0).contains(&p50(Metric::Tpot)), "{}", p50(Metric::Tpot));
    assert!((110.0..220.0).contains(&p50(Metric::Itl)), "{}", p50(Metric::Itl));
    assert!((365.0..520.0).contains(&p50(Metric::E2e)), "{}", p50(Metric::E2e));
    assert_eq!((run.tokens.prompt, run.tokens.output), (15, 6));
}

#[test]
fn nobody_listening_is_a_refusal() {
    let server = Mock::start(|_| Reply::after(Duration::ZERO));
    let mut asked = server.asked(Duration::from_secs(1));
    asked.target = Target::new(&free_url(), None, Duration::from_secs(1)).unwrap();
    let run = Run::of("gone", None, drive(&asked, BURST, 4), None);
    assert_eq!(run.requests.errors, errors(&[("refused", 4)]));
}

#[test]
fn a_connection_that_ends_before_an_answer_is_given_a_second_chance_and_no_third() {
    let now = Duration::ZERO;
    let server = Mock::start(move |index| {
        if index % 2 == 0 {
            Reply::none()
        } else {
            Reply::after(now)
        }
    });
    let asked = server.asked(Duration::from_secs(5));
    for number in 1..=3 {
        let run = Run::of("closed", None, drive(&asked, BURST, 1), None);
        assert_eq!((run.requests.answered, run.requests.failed), (1, 0));
        assert_eq!(server.bodies.lock().unwrap().len(), 2 * number);
    }

    let server = Mock::start(|_| Reply::none());
    let run = Run::of(
        "gone",
        None,
        drive(&server.asked(Duration::from_secs(5)), BURST, 2),
        None,
    );
    assert_eq!(run.requests.errors, errors(&[("connection", 2)]));
    assert_eq!(server.bodies.lock().unwrap().len(), 4);
}

#[test]
fn a_session_carries_the_servers_answers() {
    let server = Mock::start(|_| Reply::after(Duration::ZERO));
    let mut asked = server.asked(Duration::from_secs(5));
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
    let strict = server.asked(Duration::from_secs(5));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let error = runtime.block_on(check::model(&strict.target, None)).unwrap_err();
    assert!(matches!(error, CheckError::Certificate { .. }), "{error}");
    let mut trusting = strict.clone();
    trusting.target = strict.target.with_any_certificate().unwrap();
    let run = Run::of("secret", None, drive(&trusting, BURST, 5), None);
    assert_eq!((run.requests.answered, run.tokens.output), (5, 10));
}

/// An address where nobody listens.
fn free_url() -> String {
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    format!("http://{address}")
}

#[test]
fn an_unreachable_server_and_a_missing_model_are_refused() {
    let server = Mock::start(|_| Reply::status(500));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let asked = server.asked(Duration::from_secs(1));
        assert_eq!(check::model(&asked.target, None).await.unwrap(), "mock");
        assert_eq!(check::model(&asked.target, Some("mock")).await.unwrap(), "mock");
        let missing = check::model(&asked.target, Some("other")).await.unwrap_err();
        assert!(
            matches!(&missing, CheckError::NoModel { has, .. } if has == &["mock"]),
            "{missing}"
        );
        let probe = check::probe(&asked.target, Api::Chat, &asked.form).await.unwrap_err();
        assert!(probe.to_string().contains("status_500"), "{probe}");
        let nobody = Target::new(&free_url(), None, Duration::from_secs(1)).unwrap();
        let error = check::model(&nobody, None).await.unwrap_err();
        assert!(matches!(error, CheckError::Unreachable { .. }), "{error}");
    });
    for bad in ["", "localhost:8080", "ftp://x", "http://"] {
        assert!(check::url(bad).is_err(), "{bad}");
    }
    assert!(server.bodies.lock().unwrap().len() == 1, "no load was sent");
}
