//! One self-contained HTML file: tables and charts of one report, or of several side by side.

use std::fmt::Write;

use super::{
    Report, Run,
    charts::{Axis, Series, cloud, from_nines, lines, milliseconds, nines, number, timeline},
    table::{MAIN, UTILISATION, cells, percentiles, remarks},
};
use crate::{run::Sample, slo::Metric};

const STYLE: &str = "body{font:15px/1.45 system-ui,sans-serif;max-width:1180px;margin:2em auto;padding:0 1em;color:#222}\
h1{font-size:1.5em}h2{font-size:1.15em;margin-top:1.8em}.scroll{overflow-x:auto}\
table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums}\
th,td{padding:.3em .7em;border-bottom:1px solid #ddd;text-align:right;white-space:nowrap}\
th:first-child,td:first-child{text-align:left}figure{margin:1em 0}figure svg{max-width:100%;height:auto}\
figcaption{color:#555;font-size:13px}.remark{color:#a33}dl{display:grid;grid-template-columns:max-content 1fr;\
gap:.1em 1em}dt{color:#555}dd{margin:0}";

const RATE: Axis = Axis {
    title: "offered load, requests/s",
    format: number,
};
const LATENCY: Axis = Axis {
    title: "latency",
    format: milliseconds,
};

/// The page.
pub fn page(reports: &[Report]) -> String {
    let runs: Vec<Run> = reports.iter().flat_map(|report| report.runs.clone()).collect();
    let mut body = String::from("<h1>Load test</h1>\n");
    for report in reports {
        body += &facts(report);
    }
    for (title, (titles, rows)) in [
        ("Loads", cells(&MAIN, &runs)),
        ("Latencies", percentiles(&runs)),
        ("Utilisation", cells(&UTILISATION, &runs)),
    ] {
        if titles.len() > 1 {
            body += &format!("<h2>{title}</h2>\n{}", table(&titles, &rows));
        }
    }
    for remark in reports.iter().flat_map(remarks) {
        body += &format!("<p class=remark>{}</p>\n", escaped(&remark));
    }
    body += &charts(reports, &runs);
    format!(
        "<!doctype html>\n<html lang=en><meta charset=utf-8><meta name=viewport content=\"width=device-width\">\
         <title>Load test</title><style>{STYLE}</style>\n<body>\n{body}</body></html>\n"
    )
}

fn facts(report: &Report) -> String {
    let mut facts = vec![
        ("model", report.model.clone()),
        ("server", report.url.clone()),
        ("workload", report.workload.clone()),
        ("arrivals", format!("{}, seed {}", report.arrivals, report.seed)),
        ("answers", if report.stream { "streamed" } else { "whole" }.to_owned()),
    ];
    facts.extend(report.slo.clone().map(|slo| ("SLO", slo)));
    facts.extend(
        report
            .target_rate
            .map(|rate| ("100 %", format!("{rate:.2} requests/s"))),
    );
    let mut text = String::from("<dl>");
    for (name, value) in facts {
        // Writing to a String cannot fail.
        let _ = write!(text, "<dt>{name}</dt><dd>{}</dd>", escaped(&value));
    }
    text + "</dl>\n"
}

fn table(titles: &[&str], rows: &[Vec<String>]) -> String {
    let row = |tag: &str, cells: Vec<String>| {
        let cells: String = cells.iter().map(|cell| format!("<{tag}>{cell}</{tag}>")).collect();
        format!("<tr>{cells}</tr>\n")
    };
    let head = row("th", titles.iter().map(|title| escaped(title)).collect());
    let rows: String = rows
        .iter()
        .map(|cells| row("td", cells.iter().map(|cell| escaped(cell)).collect()))
        .collect();
    format!("<div class=scroll><table>{head}{rows}</table></div>\n")
}

fn charts(reports: &[Report], runs: &[Run]) -> String {
    let mut text = String::from("<h2>Charts</h2>\n");
    let mut add = |caption: &str, svg: Option<String>| {
        if let Some(svg) = svg {
            let _ = writeln!(
                text,
                "<figure>{svg}<figcaption>{}</figcaption></figure>",
                escaped(caption)
            );
        }
    };
    add("Latency against load", latency_against_load(reports));
    let curves: Vec<Series> = runs.iter().filter_map(|run| curve(run, Metric::E2e)).collect();
    let percentile = Axis {
        title: "percentile of requests",
        format: from_nines,
    };
    add("E2E by percentile", lines(&curves, percentile, LATENCY));
    let clouds: Vec<Series> = runs
        .iter()
        .map(|run| Series {
            name: run.label.clone(),
            points: run.scatter.iter().map(|&[ttft, tpot]| (ttft, tpot)).collect(),
        })
        .collect();
    let axis = |title| Axis {
        title,
        format: milliseconds,
    };
    add(
        "Each request's TTFT and TPOT",
        cloud(&clouds, axis("TTFT"), axis("TPOT")),
    );
    for run in runs {
        add(&format!("{}: requests over time", run.label), over_time(run));
    }
    text
}

fn latency_against_load(reports: &[Report]) -> Option<String> {
    let mut series = Vec::new();
    let several = reports.len() > 1;
    for (index, report) in reports.iter().enumerate() {
        let prefix = if several {
            format!("{} ({}) ", report.model, index + 1)
        } else {
            String::new()
        };
        for (metric, name, pick) in [
            (Metric::E2e, "E2E P50", (|s| s.p50) as fn(&super::Summary) -> f64),
            (Metric::E2e, "E2E P99", |s| s.p99),
            (Metric::Ttft, "TTFT P50", |s| s.p50),
            (Metric::Ttft, "TTFT P99", |s| s.p99),
        ] {
            let point = |run: &Run| Some((run.offered_rate?, pick(run.latency_ms.get(&metric)?)));
            let mut points: Vec<_> = report.runs.iter().filter_map(point).collect();
            points.sort_by(|a, b| a.0.total_cmp(&b.0));
            series.push(Series {
                name: format!("{prefix}{name}"),
                points,
            });
        }
    }
    let loads = series.iter().map(|series| series.points.len()).max().unwrap_or(0);
    if loads > 1 || several {
        lines(&series, RATE, LATENCY)
    } else {
        None
    }
}

fn curve(run: &Run, metric: Metric) -> Option<Series> {
    let points = run.curves.get(&metric)?;
    Some(Series {
        name: run.label.clone(),
        points: points
            .iter()
            .filter(|[percentile, _]| *percentile < 100.0)
            .map(|&[percentile, latency]| (nines(percentile), latency))
            .collect(),
    })
}

fn over_time(run: &Run) -> Option<String> {
    let series = |name: &str, pick: fn(&Sample) -> Option<f64>| Series {
        name: name.to_owned(),
        points: run
            .timeline
            .iter()
            .filter_map(|sample| Some((sample.seconds, pick(sample)?)))
            .collect(),
    };
    let counts: Vec<Series> = [
        series("in flight", |sample| Some(sample.in_flight as f64)),
        series("queued at the server", |sample| sample.waiting),
    ]
    .into_iter()
    .filter(|series| !series.points.is_empty())
    .collect();
    let shares = [series("occupancy", |sample| sample.occupancy)];
    let shares = if shares[0].points.is_empty() {
        &[][..]
    } else {
        &shares[..]
    };
    let axis = |title| Axis { title, format: number };
    timeline(&counts, shares, axis("seconds"), axis("requests"))
}

/// Text as HTML shows it.
pub(crate) fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}
