//! The charts of one report, or of several side by side.

use super::{
    Report, Run, Summary, Turn,
    charts::{Frame, Series, cloud, lines, timeline},
    scale::{Axis, Scale, milliseconds, number, percentile},
};
use crate::{run::Sample, slo::Metric};

/// A chart that can stand alone.
pub struct Figure {
    /// As a file is called, without its ending.
    pub name: String,
    pub svg: String,
}

pub(crate) const RATE: Axis = Axis {
    title: "offered load, requests/s",
    format: number,
    scale: Scale::Linear,
};

pub(crate) const LATENCY: Axis = Axis {
    title: "latency",
    format: milliseconds,
    scale: Scale::Log,
};

pub(crate) const COUNT: Axis = Axis {
    title: "requests",
    format: number,
    scale: Scale::Linear,
};

const TIME: Axis = Axis {
    title: "TTFT",
    format: milliseconds,
    scale: Scale::Linear,
};

/// Those charts for which the reports have data.
pub fn figures(reports: &[Report]) -> Vec<Figure> {
    let runs: Vec<&Run> = reports.iter().flat_map(|report| &report.runs).collect();
    let mut figures = Vec::new();
    let mut add = |name: String, svg: Option<String>| figures.extend(svg.map(|svg| Figure { name, svg }));
    add("latency-against-load".to_owned(), latency_against_load(reports));
    add("percentiles".to_owned(), percentiles(&runs));
    add("scatter".to_owned(), scatter(&runs));
    add("turns".to_owned(), turns(&runs));
    for (index, run) in runs.iter().enumerate() {
        add(format!("timeline-{}", index + 1), over_time(run));
    }
    figures
}

/// E2E and TTFT of one report, or the E2E of several.
fn latency_against_load(reports: &[Report]) -> Option<String> {
    let mut series = Vec::new();
    let metrics: &[Metric] = match reports.len() {
        1 => &[Metric::E2e, Metric::Ttft],
        _ => &[Metric::E2e],
    };
    for report in reports {
        for &metric in metrics {
            for (percentile, strength, pick) in [
                ("P99", 1.0, (|summary| summary.p99) as fn(&Summary) -> f64),
                ("P50", 0.5, |summary| summary.p50),
            ] {
                let point = |run: &Run| Some((run.offered_rate?, pick(run.latency_ms.get(&metric)?)));
                let mut points: Vec<_> = report.runs.iter().filter_map(point).collect();
                points.sort_by(|a, b| a.0.total_cmp(&b.0));
                let name = format!("{} {} {percentile}", report.name, metric.name().to_uppercase());
                series.push(Series::new(series.len() / 2, name.trim(), points).paler(strength));
            }
        }
    }
    let loads = series.iter().map(|series| series.points.len()).max().unwrap_or(0);
    let frame = Frame {
        title: "Latency against load",
        x: RATE,
        y: LATENCY,
    };
    if loads > 1 || reports.len() > 1 {
        lines(&series, &frame)
    } else {
        None
    }
}

/// A single load shows its TTFT too.
fn percentiles(runs: &[&Run]) -> Option<String> {
    let curve = |run: &Run, metric: Metric, colour, name: &str| {
        let points = run.curves.get(&metric)?.iter();
        let points = points.filter(|[percentile, _]| *percentile < 100.0);
        Some(Series::new(
            colour,
            name,
            points.map(|&[percentile, latency]| (percentile, latency)).collect(),
        ))
    };
    let series: Vec<Series> = match runs {
        [run] => {
            let both = [(Metric::E2e, "E2E"), (Metric::Ttft, "TTFT")].into_iter().enumerate();
            both.filter_map(|(colour, (metric, name))| curve(run, metric, colour, name))
                .collect()
        }
        runs => {
            let runs = runs.iter().enumerate();
            runs.filter_map(|(colour, run)| curve(run, Metric::E2e, colour, &run.label))
                .collect()
        }
    };
    let x = Axis {
        title: "percentile of requests",
        format: percentile,
        scale: Scale::Nines,
    };
    let title = if runs.len() == 1 {
        "Latency by percentile"
    } else {
        "E2E by percentile"
    };
    lines(&series, &Frame { title, x, y: LATENCY })
}

fn scatter(runs: &[&Run]) -> Option<String> {
    let of = |(colour, run): (usize, &&Run)| {
        let points = run.scatter.iter().map(|&[ttft, tpot]| (ttft, tpot)).collect();
        Series::new(colour, run.label.clone(), points)
    };
    let series: Vec<Series> = runs.iter().enumerate().map(of).collect();
    let frame = Frame {
        title: "Each request's TTFT and TPOT",
        x: TIME,
        y: Axis { title: "TPOT", ..TIME },
    };
    cloud(&series, None, &frame)
}

fn turns(runs: &[&Run]) -> Option<String> {
    let point = |turn: &Turn| Some((f64::from(turn.turn), turn.ttft_p50_ms?));
    let with_turns = runs.iter().filter(|run| !run.turns.is_empty()).enumerate();
    let of = |(colour, run): (usize, &&Run)| {
        Series::new(colour, run.label.clone(), run.turns.iter().filter_map(point).collect())
    };
    let series: Vec<Series> = with_turns.map(of).collect();
    let frame = Frame {
        title: "TTFT by turn of the conversation",
        x: Axis { title: "turn", ..COUNT },
        y: Axis {
            title: "TTFT P50",
            ..TIME
        },
    };
    lines(&series, &frame)
}

fn over_time(run: &Run) -> Option<String> {
    let series = |colour, name: &str, pick: fn(&Sample) -> Option<f64>| {
        let points = run
            .timeline
            .iter()
            .filter_map(|sample| Some((sample.seconds, pick(sample)?)));
        Series::new(colour, name, points.collect())
    };
    let mut counts = vec![
        series(0, "in flight", |sample| Some(sample.in_flight as f64)),
        series(1, "queued at the server", |sample| sample.waiting),
    ];
    counts.retain(|series| !series.points.is_empty());
    let mut shares = vec![series(2, "occupancy (right)", |sample| sample.occupancy)];
    shares.retain(|series| !series.points.is_empty());
    let frame = Frame {
        title: &format!("Requests over time, {}", run.label),
        x: Axis {
            title: "seconds",
            ..COUNT
        },
        y: COUNT,
    };
    timeline(&counts, &shares, &frame)
}
