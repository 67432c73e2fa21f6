//! A request that was let in and whose turn does not come in time, over a real socket.

mod common;

use std::time::{Duration, Instant};

use common::{Server, completion, send_by_hand};
use serde_json::{Value, json};

const COMPLETIONS: &str = "/v1/completions";
const LIMIT: Duration = Duration::from_secs(60);
/// So many that the time between being overtaken and being late is not missed by an engine that is held up.
const TOKENS: usize = 100;

#[test]
fn one_that_cannot_make_it_any_more_hears_so_before_its_deadline() {
    let server = Server::start(&["--device", "cpu", "--max-batch", "1", "--request-timeout", "24h"]);
    // Teaches the server what its steps take, and that answers are short.
    let mut took = Duration::ZERO;
    for _ in 0..2 {
        let begun = Instant::now();
        server.ask(COMPLETIONS, &completion(&[300, 301], TOKENS));
        took = begun.elapsed();
    }
    let judged = server.metric("sconce_prediction_error_ratio_count");
    // So that nobody expects this one to last.
    let lasting = completion(&[300, 301], 8000);
    let _lasting = send_by_hand(&server, COMPLETIONS, "lasts", &lasting);
    server.wait_until("it runs", LIMIT, || server.metric("sconce_running") == 1.0);
    let mut body = completion(&[300, 301, 302], TOKENS);
    body["timeout_ms"] = json!((6 * took).as_millis().max(5000) as u64);
    let refused = server.post(COMPLETIONS, &body);
    assert_eq!(refused.status(), 429);
    let seconds = refused.headers()["retry-after"].to_str().expect("text").parse::<u64>();
    assert!(seconds.is_ok_and(|seconds| seconds >= 1));
    assert_eq!(refused.json::<Value>().expect("JSON")["error"]["code"], "overtaken");
    for (metric, value) in [
        ("sconce_cuts_total{cause=\"overtaken\"}", 1.0),
        ("sconce_sequences_total{outcome=\"refused\"}", 1.0),
        ("sconce_prediction_error_ratio_count", judged + 1.0),
    ] {
        server.wait_until(metric, LIMIT, || server.metric(metric) == value);
    }
}
