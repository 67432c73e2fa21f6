//! Charts as SVG, on a white ground of their own so that they read the same on a dark page.

use std::ops::Range;

use plotters::{
    chart::DualCoordChartContext,
    coord::ranged1d::{DefaultFormatting, KeyPointHint},
    prelude::*,
};

use super::scale::{Axis, Scale};
use super::table::percent;

/// A named line or cloud of points.
pub struct Series {
    pub name: String,
    pub points: Vec<(f64, f64)>,
    /// Series of one colour belong together.
    pub colour: usize,
    /// From 1 (full) down to 0: tells series of one colour apart.
    pub strength: f64,
}

impl Series {
    pub fn new(colour: usize, name: impl Into<String>, points: Vec<(f64, f64)>) -> Self {
        Self {
            name: name.into(),
            points,
            colour,
            strength: 1.0,
        }
    }

    pub fn paler(self, strength: f64) -> Self {
        Self { strength, ..self }
    }

    /// Mixed with the white ground, so that crossing lines stay as they are.
    fn paint(&self) -> RGBColor {
        let RGBColor(red, green, blue) = COLOURS[self.colour % COLOURS.len()];
        let mixed = |part: u8| (255.0 - (255.0 - f64::from(part)) * self.strength).round() as u8;
        RGBColor(mixed(red), mixed(green), mixed(blue))
    }
}

/// What stands around the plotted points.
pub struct Frame<'a> {
    pub title: &'a str,
    pub x: Axis,
    pub y: Axis,
}

const SIZE: (u32, u32) = (900, 400);
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

/// Lines with dots; `None` where nothing is to be drawn.
pub fn lines(series: &[Series], frame: &Frame) -> Option<String> {
    draw(series, &[], false, frame, |mut chart, series| {
        for series in series {
            let line = LineSeries::new(placed(series, frame), series.paint().stroke_width(2)).point_size(3);
            chart.draw_series(line).ok()?;
        }
        Some(())
    })
}

/// Points alone; those of `front` are joined by a line and ringed.
pub fn cloud(series: &[Series], front: Option<&Series>, frame: &Frame) -> Option<String> {
    draw(series, front.as_slice(), false, frame, |mut chart, series| {
        if let Some(front) = front {
            let line = LineSeries::new(placed(front, frame), front.paint().stroke_width(2));
            chart.draw_series(line).ok()?;
            let rings = placed(front, frame).map(|at| Circle::new(at, 7, front.paint().stroke_width(2)));
            chart.draw_series(rings).ok()?;
        }
        let size = if front.is_some() { 4 } else { 3 };
        for series in series {
            let dots = placed(series, frame).map(|at| Circle::new(at, size, series.paint().filled()));
            chart.draw_series(dots).ok()?;
        }
        Some(())
    })
}

/// Lines over time; the shares have an axis of their own on the right, from 0 to 1.
pub fn timeline(counts: &[Series], shares: &[Series], frame: &Frame) -> Option<String> {
    let others: Vec<&Series> = shares.iter().collect();
    draw(counts, &others, !shares.is_empty(), frame, |mut chart, counts| {
        for series in counts {
            let line = LineSeries::new(placed(series, frame), series.paint().stroke_width(2));
            chart.draw_series(line).ok()?;
        }
        if shares.is_empty() {
            return Some(());
        }
        let mut mesh = chart.configure_secondary_axes();
        mesh.y_desc("occupancy")
            .axis_desc_style((FONT, 14))
            .label_style((FONT, 13));
        mesh.y_label_formatter(&|share: &f64| percent(*share)).draw().ok()?;
        for series in shares {
            let line = LineSeries::new(series.points.iter().copied(), series.paint().stroke_width(1));
            chart.draw_secondary_series(line).ok()?;
        }
        Some(())
    })
}

/// The places along an axis, with a tick at some of them.
struct Places {
    span: Range<f64>,
    ticks: Vec<f64>,
}

impl Places {
    fn along(scale: Scale, span: Range<f64>) -> Self {
        let ticks = scale.ticks(&span);
        Self { span, ticks }
    }
}

impl Ranged for Places {
    type FormatOption = DefaultFormatting;
    type ValueType = f64;

    fn map(&self, place: &f64, (first, last): (i32, i32)) -> i32 {
        let share = (place - self.span.start) / (self.span.end - self.span.start);
        first + (share * f64::from(last - first)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        // The lighter lines between the ticks are left out.
        if hint.weight().allow_light_points() {
            Vec::new()
        } else {
            self.ticks.clone()
        }
    }

    fn range(&self) -> Range<f64> {
        self.span.clone()
    }
}

/// A chart with a second axis on its right, which few use.
type Chart<'a, 'b> = DualCoordChartContext<'a, SVGBackend<'b>, Plane, Plane>;
type Plane = Cartesian2d<Places, Places>;

/// The points that the frame has a place for.
fn placed<'s>(series: &'s Series, frame: &'s Frame) -> impl Iterator<Item = (f64, f64)> + 's {
    let shown = |&&(_, y): &&(f64, f64)| frame.y.scale != Scale::Log || y > 0.0;
    let place = |&(x, y): &(f64, f64)| (frame.x.scale.place(x), frame.y.scale.place(y));
    series.points.iter().filter(shown).map(place)
}

/// Draws what surrounds the points, with room for an axis on the right, then lets `points` draw them on the chart. The
/// series span the axes; the others are named beside it too.
fn draw(
    series: &[Series],
    others: &[&Series],
    right: bool,
    frame: &Frame,
    points: impl for<'a, 'b> FnOnce(Chart<'a, 'b>, &[Series]) -> Option<()>,
) -> Option<String> {
    let all = || series.iter().flat_map(|series| &series.points);
    let across = frame.x.scale.span(all().map(|point| point.0))?;
    let up = frame.y.scale.span(all().map(|point| point.1))?;
    let mut svg = String::new();
    let root = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
    root.fill(&WHITE).ok()?;
    let title = (FONT, 17).into_font().style(FontStyle::Bold);
    root.draw(&Text::new(frame.title.to_owned(), (16, 12), title)).ok()?;
    legend(&root, series.iter().chain(others.iter().copied()))?;
    let (x, y) = (frame.x.scale, frame.y.scale);
    let mut builder = ChartBuilder::on(&root);
    builder.margin(12).margin_top(44).margin_right(LEGEND as i32 + 14);
    builder.x_label_area_size(46).y_label_area_size(72);
    builder.right_y_label_area_size(if right { 58 } else { 0 });
    let mut chart = builder
        .build_cartesian_2d(Places::along(x, across.clone()), Places::along(y, up))
        .ok()?
        .set_secondary_coord(Places::along(x, across), Places::along(Scale::Linear, 0.0..1.0));
    let mut mesh = chart.configure_mesh();
    mesh.x_desc(frame.x.title).y_desc(frame.y.title);
    mesh.bold_line_style(BLACK.mix(0.1))
        .axis_desc_style((FONT, 14))
        .label_style((FONT, 13));
    let written = |axis: Axis| move |place: &f64| (axis.format)(axis.scale.value(*place));
    let (x_label, y_label) = (written(frame.x), written(frame.y));
    mesh.x_label_formatter(&x_label).y_label_formatter(&y_label);
    mesh.draw().ok()?;
    points(chart, series)?;
    root.present().ok()?;
    drop(root);
    Some(svg)
}

type Root<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;

/// The series' names beside the chart, where they cover nothing.
fn legend<'s>(root: &Root, series: impl Iterator<Item = &'s Series>) -> Option<()> {
    let left = (SIZE.0 - LEGEND) as i32;
    for (index, series) in series.enumerate() {
        let top = 48 + 21 * index as i32;
        root.draw(&Rectangle::new(
            [(left, top), (left + 12, top + 11)],
            series.paint().filled(),
        ))
        .ok()?;
        root.draw(&Text::new(
            shortened(&series.name),
            (left + 18, top - 1),
            (FONT, 13).into_font(),
        ))
        .ok()?;
    }
    Some(())
}

/// As much of a name as has room.
fn shortened(name: &str) -> String {
    const ROOM: usize = 24;
    match name.chars().count() {
        0..=ROOM => name.to_owned(),
        count => format!("…{}", name.chars().skip(count - ROOM + 1).collect::<String>()),
    }
}

#[cfg(test)]
mod tests {
    use super::{super::scale::number, *};

    #[test]
    fn charts_hold_their_series() {
        let series = [Series::new(0, "first <one>", vec![(0.0, 3.0), (2.0, 40.0)])];
        let axis = |scale| Axis {
            title: "requests/s",
            format: number,
            scale,
        };
        let frame = Frame {
            title: "A & B",
            x: axis(Scale::Linear),
            y: axis(Scale::Log),
        };
        let charts = [
            lines(&series, &frame),
            cloud(&series, Some(&series[0]), &frame),
            timeline(&series, &series, &frame),
        ];
        for svg in charts.map(|svg| svg.unwrap()) {
            assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
            for text in ["first &lt;one&gt;", "requests/s", "A &amp; B"] {
                assert!(svg.contains(text), "{text}");
            }
        }
        assert!(lines(&[], &frame).is_none());
        let hidden = Series::new(0, "none above 0", vec![(1.0, 0.0)]);
        assert!(lines(&[hidden], &frame).is_none());
    }
}
