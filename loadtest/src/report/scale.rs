//! Axes: where a value lies along one, and which values get a tick.

use std::ops::Range;

/// How an axis is called, how its numbers are written, and how it spreads them.
#[derive(Clone, Copy)]
pub struct Axis {
    pub title: &'static str,
    pub format: fn(f64) -> String,
    pub scale: Scale,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Scale {
    /// From 0.
    Linear,
    /// Each power of ten as wide as the next.
    Log,
    /// Percentiles, spread out towards 100: 90, 99 and 99.9 are equally far apart.
    Nines,
}

impl Scale {
    /// The place of a value along the axis.
    pub fn place(self, value: f64) -> f64 {
        match self {
            Scale::Linear => value,
            Scale::Log => value.max(f64::MIN_POSITIVE).log10(),
            Scale::Nines => -(1.0 - value / 100.0).max(1e-6).log10(),
        }
    }

    /// The value at a place.
    pub fn value(self, place: f64) -> f64 {
        match self {
            Scale::Linear => place,
            Scale::Log => 10f64.powf(place),
            Scale::Nines => 100.0 * (1.0 - 10f64.powf(-place)),
        }
    }

    /// The places that an axis for these values spans; `None` where there are none to show.
    pub fn span(self, values: impl Iterator<Item = f64>) -> Option<Range<f64>> {
        let shown = |value: &f64| value.is_finite() && (self != Scale::Log || *value > 0.0);
        let places: Vec<f64> = values.filter(shown).map(|value| self.place(value)).collect();
        let (least, most) = (
            places.iter().copied().reduce(f64::min)?,
            places.iter().copied().reduce(f64::max)?,
        );
        Some(match self {
            Scale::Linear | Scale::Nines => {
                let (least, most) = (least.min(0.0), most.max(0.0));
                let width = if most > least { most - least } else { 1.0 };
                least..least + width * 1.05
            }
            Scale::Log => {
                // Some room at both ends, and at least a factor of three in all.
                let room = (0.5 - (most - least)).max(0.0) / 2.0 + 0.04;
                least - room..most + room
            }
        })
    }

    /// The places of the ticks within a span.
    pub fn ticks(self, span: &Range<f64>) -> Vec<f64> {
        let ticks: Vec<f64> = match self {
            Scale::Linear => {
                let step = step((span.end - span.start) / 7.0);
                let (first, last) = ((span.start / step).ceil() as i64, (span.end / step).floor() as i64);
                (first..=last).map(|index| index as f64 * step).collect()
            }
            Scale::Log => {
                let steps: &[f64] = match span.end - span.start {
                    width if width < 0.8 => &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0],
                    width if width < 2.5 => &[1.0, 2.0, 5.0],
                    _ => &[1.0],
                };
                let decades = span.start.floor() as i32..=span.end.ceil() as i32;
                let of = |decade: i32| steps.iter().map(move |step| f64::from(decade) + step.log10());
                decades.flat_map(of).collect()
            }
            Scale::Nines => {
                let values = [0.0, 50.0, 75.0, 90.0, 95.0, 99.0, 99.9, 99.99, 99.999];
                values.map(|value| self.place(value)).to_vec()
            }
        };
        ticks
            .into_iter()
            .filter(|tick| (span.start..=span.end).contains(tick))
            .collect()
    }
}

/// The next of 1, 2, 5, 10, 20, 50, ...
fn step(least: f64) -> f64 {
    let decade = 10f64.powf(least.log10().floor());
    let steps = [1.0, 2.0, 5.0].map(|step| step * decade);
    steps.into_iter().find(|&step| step >= least).unwrap_or(decade * 10.0)
}

/// A time in milliseconds with its unit.
pub fn milliseconds(value: f64) -> String {
    if value >= 1000.0 {
        format!("{} s", number(value / 1e3))
    } else {
        format!("{} ms", number(value))
    }
}

/// A plain number, at most four digits after the point.
pub fn number(value: f64) -> String {
    format!("{}", (value * 1e4).round() / 1e4)
}

/// A percentile such as P99.9.
pub fn percentile(value: f64) -> String {
    format!("P{}", number(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(axis: Axis, values: &[f64]) -> Vec<String> {
        let span = axis.scale.span(values.iter().copied()).unwrap();
        let ticks = axis.scale.ticks(&span).into_iter();
        ticks.map(|tick| (axis.format)(axis.scale.value(tick))).collect()
    }

    #[test]
    fn ticks_are_round_numbers() {
        let axis = |scale, format| Axis {
            title: "",
            format,
            scale,
        };
        let seconds = axis(Scale::Linear, milliseconds);
        assert_eq!(
            written(seconds, &[300.0, 1150.0]),
            ["0 ms", "200 ms", "400 ms", "600 ms", "800 ms", "1 s", "1.2 s"]
        );
        let log = axis(Scale::Log, milliseconds);
        assert_eq!(written(log, &[40.0, 900.0]), ["50 ms", "100 ms", "200 ms", "500 ms"]);
        assert_eq!(written(log, &[1.0, 4000.0]), ["1 ms", "10 ms", "100 ms", "1 s"]);
        let nines = axis(Scale::Nines, percentile);
        assert_eq!(
            written(nines, &[0.0, 99.95]),
            ["P0", "P50", "P75", "P90", "P95", "P99", "P99.9"]
        );
        assert_eq!(
            written(axis(Scale::Linear, number), &[0.0]),
            ["0", "0.2", "0.4", "0.6", "0.8", "1"]
        );
    }

    #[test]
    fn percentiles_are_spread_by_their_nines() {
        for (percentile, place) in [(90.0, 1.0), (99.9, 3.0), (100.0, 6.0)] {
            assert!((Scale::Nines.place(percentile) - place).abs() < 1e-9);
        }
        assert!(Scale::Log.span([0.0].into_iter()).is_none());
    }
}
