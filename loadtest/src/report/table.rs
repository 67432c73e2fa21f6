//! Tables for the terminal, which are Markdown too: a row a load.

use std::fmt::Write;

use super::{Report, Run, Summary, remarks::remarks};
use crate::slo::Metric;

/// A column: its title, and a run's cell; a column without any cell is left out.
type Column = (&'static str, fn(&Run) -> Option<String>);

const BUSY: Column = ("busy", |run| run.utilisation.busy.map(percent));
const RUNNING: Column = ("running", |run| run.utilisation.running_mean.map(short));
const STEP: Column = ("step ms", |run| run.utilisation.step_mean_ms.map(short));

/// What a reader looks at first.
pub const MAIN: [Column; 21] = [
    ("load", |run| Some(run.label.clone())),
    ("offered/s", |run| run.offered_rate.map(short)),
    ("sent/s", |run| run.sent_rate.map(short)),
    ("achieved/s", |run| Some(short(run.achieved_rate))),
    ("goodput/s", |run| run.goodput.map(short)),
    ("SLO", |run| {
        run.slo_kept.map(|kept| if kept { "kept" } else { "broken" }.to_owned())
    }),
    ("failed", |run| Some(run.requests.failed.to_string())),
    ("refused P50", |run| {
        run.refusal_ms.as_ref().map(|s| milliseconds(s.p50))
    }),
    ("P99", |run| run.refusal_ms.as_ref().map(|s| milliseconds(s.p99))),
    ("TTFT P50", |run| at(run, Metric::Ttft, |s| s.p50)),
    ("P99", |run| at(run, Metric::Ttft, |s| s.p99)),
    ("TPOT P50", |run| at(run, Metric::Tpot, |s| s.p50)),
    ("P99", |run| at(run, Metric::Tpot, |s| s.p99)),
    ("E2E P50", |run| at(run, Metric::E2e, |s| s.p50)),
    ("P99", |run| at(run, Metric::E2e, |s| s.p99)),
    ("out tok/s", |run| run.tokens.output_per_second.map(short)),
    ("cached", |run| {
        Some(percent(
            run.tokens.cached? as f64 / (run.tokens.prompt? as f64).max(1.0),
        ))
    }),
    ("all tok/s", |run| run.tokens.total_per_second.map(short)),
    BUSY,
    RUNNING,
    STEP,
];

/// What the server did meanwhile.
pub const UTILISATION: [Column; 17] = [
    ("load", |run| Some(run.label.clone())),
    BUSY,
    ("occupancy", |run| run.utilisation.occupancy.map(percent)),
    RUNNING,
    ("queue mean", |run| run.utilisation.queue_depth_mean.map(short)),
    ("max", |run| run.utilisation.queue_depth_max.map(short)),
    ("padding", |run| run.utilisation.padding_waste.map(percent)),
    ("KV use", |run| run.utilisation.kv_use.map(percent)),
    ("prefix hits", |run| run.utilisation.prefix_hits.map(percent)),
    ("preempted", |run| run.utilisation.preemptions.map(short)),
    ("window ms", |run| run.utilisation.window_wait_mean_ms.map(short)),
    ("queue ms", |run| run.utilisation.queue_wait_mean_ms.map(short)),
    STEP,
    ("CPU cores", |run| run.utilisation.cpu_cores.map(short)),
    ("memory MB", |run| {
        run.utilisation.memory_max_bytes.map(|bytes| short(bytes as f64 / 1e6))
    }),
    ("GPU", |run| run.utilisation.gpu.map(percent)),
    ("GPU MB", |run| {
        run.utilisation
            .gpu_memory_max_bytes
            .map(|bytes| short(bytes as f64 / 1e6))
    }),
];

fn at(run: &Run, metric: Metric, pick: fn(&Summary) -> f64) -> Option<String> {
    run.latency_ms.get(&metric).map(|summary| milliseconds(pick(summary)))
}

/// A time with its unit, to three digits.
pub(crate) fn milliseconds(value: f64) -> String {
    match value {
        v if v >= 10_000.0 => format!("{:.1} s", v / 1e3),
        v if v >= 1000.0 => format!("{:.2} s", v / 1e3),
        v if v >= 100.0 => format!("{v:.0} ms"),
        v if v >= 10.0 => format!("{v:.1} ms"),
        v => format!("{v:.2} ms"),
    }
}

pub(crate) fn short(value: f64) -> String {
    match value {
        0.0 => "0".to_owned(),
        v if v.abs() >= 100.0 => format!("{v:.0}"),
        v if v.abs() >= 10.0 => format!("{v:.1}"),
        v => format!("{v:.2}"),
    }
}

pub(crate) fn percent(share: f64) -> String {
    format!("{:.0} %", share * 100.0)
}

/// The titles and cells of the columns that have any cell.
pub fn cells(columns: &[Column], runs: &[Run]) -> (Vec<&'static str>, Vec<Vec<String>>) {
    let shown = columns
        .iter()
        .filter(|(_, cell)| runs.iter().any(|run| cell(run).is_some()));
    let shown: Vec<_> = shown.collect();
    let titles = shown.iter().map(|(title, _)| *title).collect();
    let row = |run: &Run| {
        shown
            .iter()
            .map(|(_, cell)| cell(run).unwrap_or_else(|| "-".to_owned()))
            .collect()
    };
    (titles, runs.iter().map(row).collect())
}

/// Titles and cells as an aligned Markdown table.
pub fn markdown(titles: &[&str], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells.chain([titles[column].chars().count(), 4]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..titles.len()).map(width).collect();
    let mut text = String::new();
    let mut line = |cells: Vec<&str>| {
        for (index, (cell, width)) in cells.iter().zip(&widths).enumerate() {
            let pad = " ".repeat(width - cell.chars().count());
            let cell = if index == 0 {
                format!("{cell}{pad}")
            } else {
                format!("{pad}{cell}")
            };
            // Writing to a String cannot fail.
            let _ = write!(text, "| {cell} ");
        }
        text.push_str("|\n");
    };
    line(titles.to_vec());
    let rules: Vec<String> = widths
        .iter()
        .enumerate()
        .map(|(index, width)| match index {
            0 => "-".repeat(*width),
            _ => format!("{}:", "-".repeat(width - 1)),
        })
        .collect();
    line(rules.iter().map(String::as_str).collect());
    for row in rows {
        line(row.iter().map(String::as_str).collect());
    }
    text
}

/// A table of some columns.
pub fn table(columns: &[Column], runs: &[Run]) -> String {
    let (titles, rows) = cells(columns, runs);
    markdown(&titles, &rows)
}

/// Every percentile of every metric.
pub fn percentiles(runs: &[Run]) -> (Vec<&'static str>, Vec<Vec<String>>) {
    let mut rows = Vec::new();
    for run in runs {
        for (metric, summary) in &run.latency_ms {
            let values = [
                summary.mean,
                summary.p50,
                summary.p90,
                summary.p99,
                summary.p999,
                summary.max,
            ];
            let mut row = vec![run.label.clone(), metric.name().to_uppercase()];
            row.extend(values.map(milliseconds));
            rows.push(row);
        }
    }
    (
        vec!["load", "metric", "mean", "P50", "P90", "P99", "P99.9", "max"],
        rows,
    )
}

/// The turns of sessions, where there are any.
pub fn turns(runs: &[Run]) -> (Vec<&'static str>, Vec<Vec<String>>) {
    let all = || {
        runs.iter()
            .flat_map(|run| run.turns.iter().map(move |turn| (run, turn)))
    };
    let mut titles = vec!["load", "turn", "requests", "prompt tokens"];
    let says_cached = all().any(|(_, turn)| turn.cached_tokens.is_some());
    if says_cached {
        titles.extend(["cached", "computed"]);
    }
    titles.extend(["TTFT P50", "P99", "E2E P50"]);
    let rows = all().map(|(run, turn)| {
        let time = |value: Option<f64>| value.map_or("-".to_owned(), milliseconds);
        let mut row = vec![run.label.clone(), turn.turn.to_string(), turn.answered.to_string()];
        let count = |value: Option<f64>| value.map_or("-".to_owned(), short);
        row.push(count(turn.prompt_tokens));
        if says_cached {
            let computed = turn
                .prompt_tokens
                .zip(turn.cached_tokens)
                .map(|(all, cached)| all - cached);
            row.extend([turn.cached_tokens, computed].map(count));
        }
        row.extend([
            time(turn.ttft_p50_ms),
            time(turn.ttft_p99_ms),
            milliseconds(turn.e2e_p50_ms),
        ]);
        row
    });
    (titles, rows.collect())
}

/// The whole report for a terminal.
pub fn text(report: &Report) -> String {
    let mut text = format!(
        "{} at {}\nworkload {} (lengths by {})\narrivals {}, seed {}{}\n",
        report.model,
        report.url,
        report.workload,
        report.token_counts,
        report.arrivals,
        report.seed,
        report.slo.as_ref().map_or(String::new(), |slo| format!(", SLO {slo}")),
    );
    text += &searched(report);
    if !report.runs.is_empty() {
        let _ = write!(text, "\n{}", table(&MAIN, &report.runs));
    }
    for (titles, rows) in [percentiles(&report.runs), turns(&report.runs)] {
        if !rows.is_empty() {
            let _ = write!(text, "\n{}", markdown(&titles, &rows));
        }
    }
    let (titles, rows) = cells(&UTILISATION, &report.runs);
    if titles.len() > 1 {
        let _ = write!(text, "\n{}", markdown(&titles, &rows));
    }
    if let Some(lateness) = report
        .runs
        .iter()
        .filter_map(|run| Some(run.lateness_ms.as_ref()?.p99))
        .reduce(f64::max)
    {
        let _ = writeln!(
            text,
            "\nThe generator sent within {} of the intended times at P99.",
            milliseconds(lateness)
        );
    }
    for remark in remarks(report) {
        let _ = writeln!(text, "! {remark}");
    }
    text
}

/// What the search for the highest rate came to, where there was one.
fn searched(report: &Report) -> String {
    let tried = format!("({} loads tried)", report.search.len());
    let kept = report
        .search
        .iter()
        .filter(|probe| probe.slo_kept)
        .map(|probe| probe.rate);
    match (report.target_rate, kept.reduce(f64::max)) {
        (_, Some(kept)) if report.search_unfinished => {
            format!(
                "search for the highest rate unfinished: {} requests/s kept the SLO so far {tried}\n",
                short(kept)
            )
        }
        (_, None) if report.search_unfinished => {
            format!("search for the highest rate unfinished: none kept the SLO so far {tried}\n")
        }
        (Some(rate), _) if !report.search.is_empty() => {
            format!("highest rate that keeps the SLO: {} requests/s {tried}\n", short(rate))
        }
        _ => String::new(),
    }
}
