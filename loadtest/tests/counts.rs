//! What counts of a run, with all that a run can have: a warm-up, a key, a deadline, whole answers, an SLO.

mod mock;

use std::time::Duration;

use mock::{Mock, Reply, send};
use sconce_loadtest::{
    arrivals::Arrivals,
    client::Target,
    report::{Requests, Run, Tokens},
    run::Load,
    slo::{Metric, Slo},
};

/// Where nothing is to time out.
const PATIENCE: Duration = Duration::from_secs(60);
const WHOLE: &str =
    "{\"choices\": [{\"text\": \" a b\"}], \"usage\": {\"prompt_tokens\": 5, \"completion_tokens\": 2}}";

#[test]
fn a_warm_up_goes_out_alike_and_counts_nowhere() {
    let now = Duration::ZERO;
    let (server, bytes) = Mock::start_keeping(move |_| Reply::stream(now, vec![(now, WHOLE.to_owned())]));
    let mut asked = server.asked(PATIENCE);
    asked.form.stream = false;
    let target = Target::new(&server.url, Some("s3cret".to_owned()), PATIENCE).unwrap();
    asked.target = target.with_deadline(Some(Duration::from_millis(2500)));
    let load = Load {
        arrivals: Arrivals::Constant { rate: 40.0 },
        requests: Some(30),
        duration: None,
        // Of twenty requests.
        warmup: Duration::from_millis(500),
        seed: 11,
        part: 0,
    };
    let slo: Slo = "e2e.p99=60s".parse().unwrap();
    let run = Run::of("all", Some(40.0), send(&asked, load), Some(&slo));

    let bodies = server.bodies.lock().unwrap();
    assert_eq!(bodies.len(), 50);
    for body in bodies.iter() {
        let body: serde_json::Value = serde_json::from_str(body).unwrap();
        assert_eq!((&body["model"], &body["stream"]), (&"mock".into(), &false.into()));
        assert!(
            body["max_tokens"].as_u64() > Some(0) && body["stream_options"].is_null(),
            "{body}"
        );
    }
    assert_eq!(headers(&bytes.lock().unwrap()).len(), 50);
    for headers in headers(&bytes.lock().unwrap()) {
        assert!(headers.contains("authorization: bearer s3cret\r\n"), "{headers}");
        assert!(headers.contains("x-request-timeout-ms: 2500\r\n"), "{headers}");
    }

    let thirty = Requests {
        sent: 30,
        answered: 30,
        ..Requests::default()
    };
    assert_eq!(run.requests, thirty);
    let counted: Vec<(Metric, u64)> = run.latency_ms.iter().map(|(&metric, of)| (metric, of.count)).collect();
    assert_eq!(counted, [(Metric::E2e, 30)]);
    assert_eq!(run.lateness_ms.as_ref().map(|lateness| lateness.count), Some(30));
    assert!(run.scatter.is_empty() && run.turns.is_empty());
    adds_up(&run);
}

/// Thirty answers, all in time, with five tokens in and two out.
fn adds_up(run: &Run) {
    let per_second = |count: f64| Some(count / run.seconds);
    assert_eq!(Some(run.achieved_rate), per_second(30.0));
    assert_eq!((run.goodput, run.slo_kept), (per_second(30.0), Some(true)));
    let tokens = Tokens {
        prompt: Some(150),
        cached: None,
        output: Some(60),
        output_per_second: per_second(60.0),
        total_per_second: per_second(210.0),
    };
    assert_eq!(run.tokens, tokens);
    // From the first that was sent to the last is within the run.
    let sent_rate = run.sent_rate.unwrap();
    assert!(29.0 / sent_rate <= run.seconds, "{sent_rate} {}", run.seconds);
}

/// Those of each generation request, in lower case.
fn headers(connections: &[Vec<u8>]) -> Vec<String> {
    let mut found = Vec::new();
    for bytes in connections {
        let text = String::from_utf8(bytes.clone()).unwrap().to_lowercase();
        let requests = text.split("post /v1/completions http/1.1\r\n").skip(1);
        found.extend(requests.map(|request| {
            request
                .split_inclusive("\r\n\r\n")
                .next()
                .unwrap_or_default()
                .to_owned()
        }));
    }
    found
}
