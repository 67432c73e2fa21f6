use std::time::{Duration, Instant, SystemTime};

use hdrhistogram::serialization::interval_log::{IntervalLogIterator, LogEntry};
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

/// A report of these runs, and of no search.
pub(crate) fn report(runs: Vec<Run>) -> Report {
    let report = json!({"schema": 1, "generator": "sconce-loadtest 0.1.0", "began": 1.0, "url": "http://x", "model": "m",
        "workload": "chat", "token_counts": "", "arrivals": "poisson", "stream": true, "seed": 1, "slo": "e2e.p99=1s",
        "target_rate": null, "interrupted": false, "runs": runs});
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

#[test]
fn a_search_is_reported_with_what_speaks_against_it() {
    let probe = |rate, slo_kept| Probe {
        rate,
        slo_kept,
        late: rate == 8.0,
        failed: if rate > 4.0 { 3 } else { 0 },
        unsettled: rate == 2.0,
    };
    let mut report = report(vec![run("50 %", 2.0)]);
    report.search = vec![probe(2.0, true), probe(4.0, true), probe(8.0, false)];
    report.target_rate = Some(4.0);
    let text = table::text(&report);
    for said in [
        "highest rate that keeps the SLO: 4.00 requests/s (3 loads tried)",
        "! search, at 8.00 requests/s: the generator itself was late",
        "! search, at 8.00 requests/s: some requests failed",
        "! search, at 2.00 requests/s: the server had not ended",
    ] {
        assert!(text.contains(said), "{said}: {text}");
    }
    report.target_rate = None;
    report.search_unfinished = true;
    let text = table::text(&report);
    assert!(
        text.contains("unfinished: 4.00 requests/s kept the SLO so far (3 loads tried)"),
        "{text}"
    );
    assert!(!text.contains("highest rate that keeps the SLO:"), "{text}");
    report.search.truncate(0);
    report.runs.truncate(0);
    let text = table::text(&report);
    assert!(
        text.contains("unfinished: none kept the SLO so far") && !text.contains('|'),
        "{text}"
    );
}

#[test]
fn a_run_is_remarked_on() {
    let mut run = run("80 %", 2.0);
    assert_eq!(remarks::of_run("80 %", &run), [""; 0]);
    run.unsettled = true;
    run.requests.failed = 2;
    run.requests.errors = BTreeMap::from([("refused".to_owned(), 2)]);
    assert_eq!(
        remarks::of_run("80 %", &run),
        [
            "80 %: 2 of 1 requests failed: 2 refused",
            "80 %: the server had not ended what the load before it left"
        ]
    );
}

#[test]
fn loads_in_one_log_have_tags_of_their_own() {
    let mut run = measured(&[(1, 100)]);
    run.label = "50 %".to_owned();
    let tags = |log: &str| -> Vec<String> {
        let entries = IntervalLogIterator::new(log.as_bytes()).map(Result::unwrap);
        let tags = entries.filter_map(|entry| match entry {
            LogEntry::Interval(interval) => Some(interval.tag().unwrap().as_str().to_owned()),
            _ => None,
        });
        tags.collect()
    };
    let plain = tags(&run.hdr_log);
    assert!(plain.contains(&"e2e".to_owned()), "{plain:?}");
    let labelled: Vec<String> = plain.iter().map(|tag| format!("50%-{tag}")).collect();
    assert_eq!(tags(&run.labelled_log()), labelled);
}
