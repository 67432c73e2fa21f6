//! The experiment that dynamic batching is about: one request at a time against batches that stay together against
//! batches that requests join and leave at every step, with windows of several lengths, at the same loads.

use super::{Experiment, Knobs, Trial, remarks, window};
use crate::report::{
    charts::{Frame, Series, lines},
    escaped,
    figures::{COUNT, Figure, LATENCY, RATE},
    html,
    scale::Axis,
    table::{markdown, milliseconds, percent, short},
};

/// The windows of each schedule that has batches, in milliseconds.
pub const WINDOWS_MS: [f64; 4] = [0.0, 5.0, 20.0, 50.0];

/// The settings compared; a schedule without batches has no window.
pub fn settings(start: &Knobs) -> Vec<Knobs> {
    let mut settings = vec![Knobs {
        schedule: "sequential".to_owned(),
        window_policy: "none".to_owned(),
        batch_window_ms: 0.0,
        ..start.clone()
    }];
    for schedule in ["dynamic", "continuous"] {
        settings.extend(WINDOWS_MS.map(|batch_window_ms| Knobs {
            schedule: schedule.to_owned(),
            window_policy: "fixed".to_owned(),
            batch_window_ms,
            ..start.clone()
        }));
    }
    settings
}

/// All settings at the first rate, then all at the next.
pub fn trials(start: &Knobs, rates: &[f64]) -> Vec<Trial> {
    let at = |&rate: &f64| settings(start).into_iter().map(move |knobs| Trial { knobs, rate });
    rates.iter().flat_map(at).collect()
}

/// How a row or a line is called.
fn name(knobs: &Knobs) -> String {
    match knobs.schedule.as_str() {
        "sequential" => knobs.schedule.clone(),
        schedule => format!("{schedule}, {}", window(knobs)),
    }
}

/// A setting, and its experiments in the order of the rates; `None` where it was not tried.
type Row<'a> = (&'a Knobs, Vec<Option<&'a Experiment>>);

/// The rates in the order in which they were tried, and the experiments of each setting by these rates.
fn sorted(experiments: &[Experiment]) -> (Vec<f64>, Vec<Row<'_>>) {
    let (mut rates, mut settings): (Vec<f64>, Vec<&Knobs>) = (Vec::new(), Vec::new());
    for Trial { knobs, rate } in experiments.iter().map(|one| &one.trial) {
        if !rates.contains(rate) {
            rates.push(*rate);
        }
        if !settings.contains(&knobs) {
            settings.push(knobs);
        }
    }
    let of = |knobs: &Knobs, rate: f64| {
        let wanted = |one: &&Experiment| one.trial.rate == rate && one.trial.knobs == *knobs;
        experiments.iter().find(wanted)
    };
    let row = |knobs| (knobs, rates.iter().map(|&rate| of(knobs, rate)).collect());
    let rows = settings.into_iter().map(row).collect();
    (rates, rows)
}

/// A row a setting; for each rate the goodput, the percentiles of E2E, the busy share, and the mean number of sequences
/// in a step.
pub fn table(experiments: &[Experiment]) -> String {
    let (rates, settings) = sorted(experiments);
    let mut titles = vec!["schedule".to_owned(), "window".to_owned()];
    for rate in &rates {
        titles.push(format!("{rate}/s: goodput"));
        titles.extend(["P50", "P99", "busy", "batch"].map(str::to_owned));
    }
    let rows: Vec<Vec<String>> = settings
        .iter()
        .map(|(knobs, tried)| {
            let mut row = vec![knobs.schedule.clone()];
            row.push(if knobs.schedule == "sequential" {
                "-".to_owned()
            } else {
                window(knobs)
            });
            row.extend(tried.iter().flat_map(|one| cells(*one)));
            row
        })
        .collect();
    let titles: Vec<&str> = titles.iter().map(String::as_str).collect();
    markdown(&titles, &rows)
}

fn cells(experiment: Option<&Experiment>) -> [String; 5] {
    let cell = |value: Option<String>| value.unwrap_or_else(|| "-".to_owned());
    let e2e = experiment.and_then(|one| one.run.latency_ms.get(&crate::slo::Metric::E2e));
    let utilisation = experiment.map(|one| &one.run.utilisation);
    let batch = |one: &Experiment| Some(one.run.utilisation.occupancy? * one.trial.knobs.max_batch as f64);
    [
        cell(experiment.map(|one| short(one.goodput))),
        cell(e2e.map(|summary| milliseconds(summary.p50))),
        cell(e2e.map(|summary| milliseconds(summary.p99))),
        cell(utilisation.and_then(|seen| seen.busy).map(percent)),
        cell(experiment.and_then(batch).map(short)),
    ]
}

/// The charts of goodput and of P99 against the load, a line a setting.
pub fn figures(experiments: &[Experiment]) -> Vec<Figure> {
    let (_, settings) = sorted(experiments);
    let series = |pick: fn(&Experiment) -> Option<f64>| -> Vec<Series> {
        let line = |(knobs, tried): &Row| {
            let (colour, strength) = look(knobs);
            let point = |one: &&Experiment| Some((one.trial.rate, pick(one)?));
            let mut points: Vec<(f64, f64)> = tried.iter().flatten().filter_map(point).collect();
            points.sort_by(|a, b| a.0.total_cmp(&b.0));
            Series::new(colour, name(knobs), points).paler(strength)
        };
        settings.iter().map(line).collect()
    };
    let frame = |title, y| Frame { title, x: RATE, y };
    let goodput = Axis {
        title: "goodput, requests/s",
        ..COUNT
    };
    let p99 = Axis {
        title: "E2E P99",
        ..LATENCY
    };
    let charts = [
        (
            "schedules-p99",
            lines(&series(|one| one.p99_ms), &frame("P99 by schedule and window", p99)),
        ),
        (
            "schedules-goodput",
            lines(
                &series(|one| Some(one.goodput)),
                &frame("Goodput by schedule and window", goodput),
            ),
        ),
    ];
    let figures = charts.into_iter().filter_map(|(name, svg)| {
        Some(Figure {
            name: name.to_owned(),
            svg: svg?,
        })
    });
    figures.collect()
}

/// A colour a schedule; the longer the window, the paler.
fn look(knobs: &Knobs) -> (usize, f64) {
    let index = WINDOWS_MS
        .iter()
        .position(|&window| window == knobs.batch_window_ms)
        .unwrap_or(0);
    let strength = [1.0, 0.75, 0.5, 0.3][index];
    match knobs.schedule.as_str() {
        "sequential" => (6, 1.0),
        "dynamic" => (0, strength),
        _ => (1, strength),
    }
}

/// The charts and the table as one HTML file.
pub fn page(experiments: &[Experiment]) -> String {
    let figures: String = figures(experiments)
        .iter()
        .map(|figure| format!("<figure>{}</figure>\n", figure.svg))
        .collect();
    html::document(
        "Schedules and windows",
        &format!(
            "{figures}<pre>{}</pre>\n{}",
            escaped(&table(experiments)),
            html::paragraphs(&remarks(experiments))
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::{
        super::tests::{experiment, start},
        *,
    };

    #[test]
    fn every_setting_meets_every_load_once() {
        let trials = trials(&start(), &[0.5, 1.0, 2.0]);
        assert_eq!(trials.len(), 27);
        assert!(trials[..9].iter().all(|trial| trial.rate == 0.5));
        assert!(
            !trials
                .iter()
                .enumerate()
                .any(|(index, trial)| trials[..index].contains(trial))
        );
    }

    #[test]
    fn the_table_has_a_row_a_setting_and_a_gap_where_nothing_was_tried() {
        let trials = trials(&start(), &[1.0, 2.0]);
        // The last setting was not tried under the second load.
        let experiments = trials[..17].iter().map(|trial| {
            let mut tried = experiment(trial.knobs.clone(), trial.rate, 700.0 * trial.rate);
            tried.trial = trial.clone();
            tried
        });
        let experiments: Vec<Experiment> = experiments.collect();
        let table = table(&experiments);
        let rows: Vec<&str> = table.lines().skip(2).collect();
        assert_eq!(rows.len(), 9, "{table}");
        assert!(rows[0].starts_with("| sequential |      - |         1.00 |"), "{table}");
        let empty = |row: &str| row.split('|').filter(|cell| cell.trim() == "-").count();
        assert_eq!(empty(rows[8]), empty(rows[7]) + 1, "{table}");
        let names: Vec<String> = figures(&experiments).into_iter().map(|figure| figure.name).collect();
        assert_eq!(names, ["schedules-p99", "schedules-goodput"]);
        assert!(page(&experiments).contains("continuous, 50ms"));
    }
}
