//! Charts as SVG.

use plotters::{
    chart::{ChartBuilder, ChartContext},
    coord::ranged1d::ValueFormatter,
    prelude::*,
};

/// A named line or cloud of points.
pub struct Series {
    pub name: String,
    pub points: Vec<(f64, f64)>,
}

/// How an axis is called and how its numbers are written.
#[derive(Clone, Copy)]
pub struct Axis {
    pub title: &'static str,
    pub format: fn(&f64) -> String,
}

const SIZE: (u32, u32) = (900, 380);
/// The width of the names beside the chart.
const LEGEND: u32 = 190;
const FONT: &str = "sans-serif";
/// Colours that readers with any colour vision tell apart (Okabe and Ito 2008).
const COLOURS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(80, 80, 80),
];

/// Lines with dots, the vertical axis logarithmic; `None` where nothing is to be drawn.
pub fn lines(series: &[Series], x: Axis, y: Axis) -> Option<String> {
    draw(series, |root| {
        let (across, up) = (range(series, |point| point.0), log_range(series)?);
        let chart = &mut builder(root).build_cartesian_2d(across, up.log_scale()).ok()?;
        axes(chart, x, y)?;
        for (index, series) in series.iter().enumerate() {
            let paint = colour(index);
            let line = LineSeries::new(series.points.iter().copied(), paint.stroke_width(2)).point_size(3);
            chart.draw_series(line).ok()?;
        }
        legend(root, series.iter())
    })
}

/// Points alone, both axes linear.
pub fn cloud(series: &[Series], x: Axis, y: Axis) -> Option<String> {
    draw(series, |root| {
        let (across, up) = (range(series, |point| point.0), range(series, |point| point.1));
        let chart = &mut builder(root).build_cartesian_2d(across, up).ok()?;
        axes(chart, x, y)?;
        for (index, series) in series.iter().enumerate() {
            let paint = colour(index);
            let dots = series
                .points
                .iter()
                .map(|&point| Circle::new(point, 2, paint.mix(0.6).filled()));
            chart.draw_series(dots).ok()?;
        }
        legend(root, series.iter())
    })
}

/// Points with a line through those of the front, both axes linear.
pub fn front(series: &[Series], front: &Series, x: Axis, y: Axis) -> Option<String> {
    draw(series, |root| {
        let (across, up) = (range(series, |point| point.0), range(series, |point| point.1));
        let chart = &mut builder(root).build_cartesian_2d(across, up).ok()?;
        axes(chart, x, y)?;
        let grey = colour(series.len());
        let line = LineSeries::new(front.points.iter().copied(), grey.mix(0.6).stroke_width(2));
        chart.draw_series(line).ok()?;
        for (index, series) in series.iter().enumerate() {
            let paint = colour(index);
            let dots = series.points.iter().map(|&point| Circle::new(point, 4, paint.filled()));
            chart.draw_series(dots).ok()?;
        }
        legend(root, series.iter().chain([front]))
    })
}

/// Lines over time; the shares have an axis of their own on the right, from 0 to 1.
pub fn timeline(counts: &[Series], shares: &[Series], x: Axis, y: Axis) -> Option<String> {
    draw(counts, |root| {
        let across = range(counts, |point| point.0);
        let up = range(counts, |point| point.1);
        let mut chart = builder(root)
            .right_y_label_area_size(if shares.is_empty() { 0 } else { 48 })
            .build_cartesian_2d(across.clone(), up)
            .ok()?
            .set_secondary_coord(across, 0.0..1.0);
        axes(&mut chart, x, y)?;
        if !shares.is_empty() {
            let mut mesh = chart.configure_secondary_axes();
            mesh.y_desc("occupancy").y_label_formatter(&percent).draw().ok()?;
        }
        for (index, series) in counts.iter().enumerate() {
            let paint = colour(index);
            let line = LineSeries::new(series.points.iter().copied(), paint.stroke_width(2));
            chart.draw_series(line).ok()?;
        }
        for (index, series) in shares.iter().enumerate() {
            let paint = colour(counts.len() + index);
            let line = LineSeries::new(series.points.iter().copied(), paint.stroke_width(1));
            chart.draw_secondary_series(line).ok()?;
        }
        legend(root, counts.iter().chain(shares))
    })
}

/// A share as a percentage.
pub fn percent(share: &f64) -> String {
    format!("{:.0} %", share * 100.0)
}

/// A time in milliseconds with its unit.
pub fn milliseconds(value: &f64) -> String {
    match *value {
        v if v >= 1000.0 => format!("{} s", v / 1e3),
        v => format!("{v} ms"),
    }
}

/// A plain number.
pub fn number(value: &f64) -> String {
    format!("{}", (value * 1000.0).round() / 1000.0)
}

type Root<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;

fn draw(series: &[Series], chart: impl FnOnce(&Root) -> Option<()>) -> Option<String> {
    if series.iter().all(|series| series.points.is_empty()) {
        return None;
    }
    let mut svg = String::new();
    let root = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
    root.fill(&WHITE).ok()?;
    chart(&root)?;
    root.present().ok()?;
    drop(root);
    Some(svg)
}

fn builder<'a, 'b>(root: &'b Root<'a>) -> ChartBuilder<'b, 'b, SVGBackend<'a>>
where
    'a: 'b,
{
    let mut builder = ChartBuilder::on(root);
    builder
        .margin(12)
        .margin_right(LEGEND as i32 + 10)
        .x_label_area_size(42)
        .y_label_area_size(64);
    builder
}

fn axes<X, Y>(chart: &mut ChartContext<SVGBackend, Cartesian2d<X, Y>>, x: Axis, y: Axis) -> Option<()>
where
    X: Ranged<ValueType = f64> + ValueFormatter<f64>,
    Y: Ranged<ValueType = f64> + ValueFormatter<f64>,
{
    let mut mesh = chart.configure_mesh();
    mesh.x_desc(x.title)
        .y_desc(y.title)
        .x_label_formatter(&x.format)
        .y_label_formatter(&y.format);
    mesh.light_line_style(BLACK.mix(0.05)).bold_line_style(BLACK.mix(0.12));
    mesh.label_style((FONT, 13)).axis_desc_style((FONT, 14)).draw().ok()
}

/// The series' names beside the chart, where they cover nothing.
fn legend<'s>(root: &Root, series: impl Iterator<Item = &'s Series>) -> Option<()> {
    let left = (SIZE.0 - LEGEND) as i32;
    for (index, series) in series.enumerate() {
        let (top, colour) = (20 + 20 * index as i32, colour(index));
        root.draw(&Rectangle::new([(left, top), (left + 12, top + 10)], colour.filled()))
            .ok()?;
        root.draw(&Text::new(
            shortened(&series.name),
            (left + 18, top - 2),
            (FONT, 13).into_font(),
        ))
        .ok()?;
    }
    Some(())
}

fn colour(index: usize) -> RGBColor {
    COLOURS[index % COLOURS.len()]
}

/// As much of a name as has room.
fn shortened(name: &str) -> String {
    const ROOM: usize = 24;
    match name.chars().count() {
        0..=ROOM => name.to_owned(),
        count => format!("…{}", name.chars().skip(count - ROOM + 1).collect::<String>()),
    }
}

/// From 0 (or the least value, where that is below) to a little above the largest value.
fn range(series: &[Series], pick: fn(&(f64, f64)) -> f64) -> std::ops::Range<f64> {
    let values = series.iter().flat_map(|series| series.points.iter().map(pick));
    let (least, most) = values.fold((0.0_f64, 0.0_f64), |(least, most), value| {
        (least.min(value), most.max(value))
    });
    let most = if most > least { most } else { least + 1.0 };
    least..most + (most - least) * 0.05
}

/// Whole powers of ten around the values above 0.
fn log_range(series: &[Series]) -> Option<std::ops::Range<f64>> {
    let values = series
        .iter()
        .flat_map(|series| series.points.iter().map(|point| point.1));
    let values: Vec<f64> = values.filter(|&value| value > 0.0).collect();
    let least = values.iter().copied().reduce(f64::min)?;
    let most = values.iter().copied().reduce(f64::max)?;
    let floor = 10f64.powf(least.log10().floor());
    Some(floor..10f64.powf((most * 1.01).log10().ceil()).max(floor * 10.0))
}

/// The coordinate that spreads percentiles out towards 100: 1 at 90, 2 at 99, 3 at 99.9.
pub fn nines(percentile: f64) -> f64 {
    -(1.0 - percentile / 100.0).max(1e-6).log10()
}

/// A percentile written from its coordinate, as exactly as its distance to 100 needs.
pub fn from_nines(nines: &f64) -> String {
    let percentile = 100.0 * (1.0 - 10f64.powf(-nines));
    let decimals = nines.floor().max(0.0) as usize;
    let text = format!("{percentile:.decimals$}");
    let text = if decimals > 0 {
        text.trim_end_matches('0').trim_end_matches('.')
    } else {
        &text
    };
    format!("P{text}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_spread_by_their_nines() {
        assert_eq!(nines(90.0).round(), 1.0);
        assert!((nines(99.9) - 3.0).abs() < 1e-9);
        assert_eq!(nines(100.0), 6.0);
        assert_eq!(from_nines(&2.0), "P99");
        assert_eq!(from_nines(&3.0), "P99.9");
        assert_eq!(from_nines(&0.0), "P0");
        assert_eq!(from_nines(&0.7), "P80");
    }

    #[test]
    fn charts_hold_their_series() {
        let series = [Series {
            name: "first <one>".into(),
            points: vec![(0.0, 3.0), (2.0, 40.0)],
        }];
        let axis = Axis {
            title: "requests/s",
            format: number,
        };
        let charts = [
            lines(&series, axis, axis),
            cloud(&series, axis, axis),
            timeline(&series, &series, axis, axis),
        ];
        for svg in charts.map(|svg| svg.unwrap()) {
            assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
            assert!(svg.contains("first &lt;one&gt;") && svg.contains("requests/s"));
        }
        assert!(lines(&[], axis, axis).is_none());
    }
}
