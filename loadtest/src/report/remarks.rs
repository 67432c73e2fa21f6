//! What a reader must know before believing the figures.

use super::{
    Probe, Report, Run,
    table::{milliseconds, short},
};

const BESIDE_A_REST: &str = "the server had not ended what the load before it left";

/// Of the search and every load.
pub fn remarks(report: &Report) -> Vec<String> {
    let mut remarks = of_search(&report.search);
    remarks.extend(report.runs.iter().flat_map(|run| of_run(&run.label, run)));
    remarks
}

/// Of the loads that a search for the highest rate tried, which are shown nowhere else.
fn of_search(search: &[Probe]) -> Vec<String> {
    let remark = |applies: fn(&Probe) -> bool, what: &str| {
        let rates: Vec<String> = search
            .iter()
            .filter(|probe| applies(probe))
            .map(|probe| short(probe.rate))
            .collect();
        (!rates.is_empty()).then(|| format!("search, at {} requests/s: {what}", rates.join(", ")))
    };
    let remarks = [
        remark(
            |probe| probe.late,
            "the generator itself was late: this machine was too busy, take the highest rate with care",
        ),
        remark(|probe| probe.failed > 0, "some requests failed"),
        remark(|probe| probe.unsettled, BESIDE_A_REST),
    ];
    remarks.into_iter().flatten().collect()
}

/// Of one load.
pub fn of_run(label: &str, run: &Run) -> Vec<String> {
    let mut remarks = Vec::new();
    if !run.requests.errors.is_empty() {
        let kinds = run
            .requests
            .errors
            .iter()
            .map(|(kind, count)| format!("{count} {kind}"));
        remarks.push(format!(
            "{label}: {} of {} requests failed: {}",
            run.requests.failed,
            run.requests.sent,
            kinds.collect::<Vec<_>>().join(", ")
        ));
    }
    if let (true, Some(lateness)) = (run.late, &run.lateness_ms) {
        remarks.push(format!(
            "{label}: the generator itself was late, {} at P99: this machine was too busy, take the latencies with care",
            milliseconds(lateness.p99)
        ));
    }
    if run.unsettled {
        remarks.push(format!("{label}: {BESIDE_A_REST}"));
    }
    if run.interrupted {
        remarks.push(format!(
            "{label}: ended early with {} requests unfinished",
            run.requests.unfinished
        ));
    }
    remarks
}
