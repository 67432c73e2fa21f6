//! The search's experiments as a table, a chart and a page.

use super::{Experiment, SCHEDULES, Search, Trial, remarks, toml, window};
use crate::report::{
    charts::{Frame, Series, cloud},
    escaped,
    figures::{COUNT, Figure, LATENCY},
    html,
    scale::Axis,
    table::{markdown, milliseconds, short},
};

/// Every experiment, those on the front first, as a Markdown table.
pub fn table(search: &Search) -> String {
    let front = search.front();
    let is_on_front = |experiment: &&Experiment| front.iter().any(|other| std::ptr::eq(*other, *experiment));
    let mut order: Vec<&Experiment> = front.clone();
    order.extend(search.tried.iter().filter(|experiment| !is_on_front(experiment)));
    let rows: Vec<Vec<String>> = order
        .iter()
        .map(|experiment| {
            let Trial { knobs, rate } = &experiment.trial;
            vec![
                short(*rate),
                knobs.schedule.clone(),
                knobs.window_policy.clone(),
                window(knobs),
                knobs.max_batch.to_string(),
                knobs.step_tokens.to_string(),
                short(experiment.goodput),
                short(experiment.run.achieved_rate),
                experiment.p99_ms.map_or("-".to_owned(), milliseconds),
                if is_on_front(experiment) { "yes" } else { "" }.to_owned(),
            ]
        })
        .collect();
    let titles = [
        "offered/s",
        "schedule",
        "policy",
        "window",
        "max batch",
        "step tokens",
        "goodput/s",
        "achieved/s",
        "E2E P99",
        "front",
    ];
    markdown(&titles, &rows)
}

/// The chart of goodput against P99.
pub fn figure(search: &Search) -> Option<Figure> {
    let points = |experiments: &mut dyn Iterator<Item = &Experiment>| -> Vec<(f64, f64)> {
        experiments
            .filter_map(|experiment| Some((experiment.p99_ms?, experiment.goodput)))
            .collect()
    };
    let of = |(colour, schedule): (usize, &&str)| {
        let mut of = search.tried.iter().filter(|one| one.trial.knobs.schedule == **schedule);
        Series::new(colour, *schedule, points(&mut of))
    };
    let mut series: Vec<Series> = SCHEDULES.iter().enumerate().map(of).collect();
    series.retain(|series| !series.points.is_empty());
    let front = Series::new(6, "front (line and rings)", points(&mut search.front().into_iter())).paler(0.5);
    let frame = Frame {
        title: "Goodput against P99",
        x: Axis {
            title: "E2E P99",
            ..LATENCY
        },
        y: Axis {
            title: "goodput, requests/s",
            ..COUNT
        },
    };
    let svg = cloud(&series, Some(&front), &frame)?;
    let name = "front".to_owned();
    Some(Figure { name, svg })
}

/// The chart, the table and the recommendation as one HTML file.
pub fn page(search: &Search) -> String {
    let toml = search.best().map(|best| toml(&best.trial.knobs)).unwrap_or_default();
    let reasons: String = search
        .reasons()
        .iter()
        .map(|reason| format!("<li>{}</li>", escaped(reason)))
        .collect();
    let figure = figure(search).map(|figure| figure.svg).unwrap_or_default();
    html::document(
        "Tuning",
        &format!(
            "<figure>{figure}</figure>\n<h2>Experiments</h2>\n<pre>{}</pre>\n{}<h2>Recommended</h2>\n<pre>{}</pre>\n\
             <ul>{reasons}</ul>",
            escaped(&table(search)),
            html::paragraphs(&remarks(&search.tried)),
            escaped(&toml),
        ),
    )
}
