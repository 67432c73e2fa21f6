use std::time::{Duration, Instant, SystemTime};

use serde_json::json;

use super::*;
use crate::client::Answer;

/// A run as a report has it that was written before there were the latest fields.
pub(crate) fn run(label: &str, rate: f64) -> Run {
    let report = json!({"label": label, "offered_rate": rate, "achieved_rate": rate, "seconds": 1.0,
        "requests": {"sent": 1, "answered": 1, "failed": 0, "unfinished": 0, "errors": {}},
        "tokens": {"prompt": 1, "output": 1, "output_per_second": 1.0, "total_per_second": 1.0},
        "latency_ms": {}, "lateness_ms": null, "late": false, "slo_kept": true, "goodput": rate,
        "utilisation": {}, "timeline": [], "curves": {}, "scatter": [], "interrupted": false});
    serde_json::from_value(report).unwrap()
}

/// A whole run: each pair is how late a request was sent and how long it took, in milliseconds.
fn measured(requests: &[(u64, u64)]) -> Run {
    let start = Instant::now();
    let mut recorder = Recorder::beginning(start);
    for &(lateness, e2e) in requests {
        let answer = Answer {
            tokens: None,
            gaps: Vec::new(),
            end: start + Duration::from_millis(e2e),
            output_tokens: None,
            prompt_tokens: None,
            cached_tokens: None,
            text: String::new(),
        };
        recorder.sent(Duration::from_millis(lateness));
        recorder.ended(start, start, 1, &Ok(answer));
    }
    let measured = Measured {
        recorder,
        samples: Vec::new(),
        utilisation: Utilisation::default(),
        began: SystemTime::now(),
        length: Duration::from_secs(1),
        interrupted: false,
        gave_up: false,
    };
    Run::of("load", None, measured, None)
}

#[test]
fn a_generator_is_late_by_itself_or_beside_the_latencies() {
    assert!(measured(&[(11, 10_000)]).late);
    assert!(!measured(&[(9, 10_000)]).late);
    assert!(measured(&[(2, 100)]).late, "2 % of the latency");
    assert!(!measured(&[(2, 1000)]).late);
    assert!(!measured(&[]).late);
}

#[test]
fn what_was_sent_has_a_rate_where_there_is_time_in_it() {
    assert_eq!(measured(&[]).sent_rate, None);
    assert_eq!(measured(&[(0, 1)]).sent_rate, None);
    let run = measured(&[(0, 1); 50]);
    // So many were sent within this test, which the rate must allow for.
    assert!(
        run.sent_rate.is_some_and(|rate| rate > 49.0 / 60.0),
        "{:?}",
        run.sent_rate
    );
}

#[test]
fn one_table_tells_the_latencies_and_what_the_server_did() {
    let mut busy = run("50 %", 2.0);
    busy.sent_rate = Some(1.9);
    busy.utilisation.busy = Some(0.7);
    busy.utilisation.running_mean = Some(1.25);
    busy.utilisation.step_mean_ms = Some(28.0);
    let (titles, rows) = table::cells(&table::MAIN, &[busy, run("80 %", 3.2)]);
    let cell = |row: usize, title: &str| {
        let column = titles
            .iter()
            .position(|found| *found == title)
            .unwrap_or_else(|| panic!("{title}"));
        rows[row][column].as_str()
    };
    for (title, cells) in [
        ("offered/s", ["2.00", "3.20"]),
        ("sent/s", ["1.90", "-"]),
        ("busy", ["70 %", "-"]),
        ("running", ["1.25", "-"]),
        ("step ms", ["28.0", "-"]),
    ] {
        assert_eq!([cell(0, title), cell(1, title)], cells, "{title}");
    }
    let (titles, _) = table::cells(&table::MAIN, &[run("a server that says nothing", 1.0)]);
    assert!(!titles.contains(&"busy"), "{titles:?}");
}
