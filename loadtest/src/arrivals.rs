//! When requests are sent: a seeded sequence of times that does not depend on the server.

use std::time::Duration;

use rand::{RngExt, SeedableRng, rngs::Xoshiro256PlusPlus};
use rand_distr::{Distribution, Exp, Gamma};

/// The kinds of arrival processes, as a user names them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum ArrivalKind {
    /// Independent users: exponential gaps
    Poisson,
    /// Equal gaps
    Constant,
    /// Gamma-distributed gaps of a chosen burstiness
    Gamma,
    /// All at once
    Burst,
    /// Poisson at a rate that changes in steps
    Steps,
    /// The times of a trace file
    Trace,
}

/// An arrival process. Rates are requests a second and above 0.
#[derive(Debug, Clone, PartialEq)]
pub enum Arrivals {
    Poisson {
        rate: f64,
    },
    Constant {
        rate: f64,
    },
    /// Gaps follow a gamma distribution of shape `burstiness` and mean `1 / rate`: 1 is Poisson, less is burstier.
    Gamma {
        rate: f64,
        burstiness: f64,
    },
    Burst,
    Steps(Vec<Step>),
    /// Offsets from the start, ascending.
    Trace(Vec<Duration>),
}

/// A rate that holds for a while.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Step {
    pub rate: f64,
    pub length: Duration,
}

impl Arrivals {
    /// The times at which requests are to be sent, from the start, ascending. Endless for the processes with a rate,
    /// `Burst` included; the same seed gives the same times.
    pub fn times(&self, seed: u64) -> Box<dyn Iterator<Item = Duration> + Send> {
        let mut random = Xoshiro256PlusPlus::seed_from_u64(seed);
        match self {
            Arrivals::Poisson { rate } => {
                let gaps = exponential(*rate);
                sums(move || gaps.sample(&mut random))
            }
            Arrivals::Constant { rate } => {
                let rate = *rate;
                Box::new((0u64..).map(move |index| Duration::from_secs_f64(index as f64 / rate)))
            }
            Arrivals::Gamma { rate, burstiness } => {
                // Both are above 0, which is all that Gamma asks.
                let gaps = Gamma::new(*burstiness, 1.0 / (rate * burstiness)).expect("positive shape and scale");
                sums(move || gaps.sample(&mut random))
            }
            Arrivals::Burst => Box::new(std::iter::repeat(Duration::ZERO)),
            Arrivals::Steps(steps) => Box::new(step_times(steps, random).into_iter()),
            Arrivals::Trace(times) => Box::new(times.clone().into_iter()),
        }
    }

    /// The mean rate in requests a second; `None` where all come at once.
    pub fn rate(&self) -> Option<f64> {
        match self {
            Arrivals::Poisson { rate } | Arrivals::Constant { rate } | Arrivals::Gamma { rate, .. } => Some(*rate),
            Arrivals::Burst => None,
            Arrivals::Steps(steps) => {
                let length: f64 = steps.iter().map(|step| step.length.as_secs_f64()).sum();
                let requests: f64 = steps.iter().map(|step| step.rate * step.length.as_secs_f64()).sum();
                Some(requests / length)
            }
            Arrivals::Trace(times) => {
                let span = times.last()?.saturating_sub(*times.first()?).as_secs_f64();
                (span > 0.0).then(|| (times.len() - 1) as f64 / span)
            }
        }
    }

    /// The same process at another mean rate; `Burst` has none and stays as it is.
    pub fn at_rate(&self, rate: f64) -> Arrivals {
        let factor = rate / self.rate().unwrap_or(rate);
        match self {
            Arrivals::Poisson { .. } => Arrivals::Poisson { rate },
            Arrivals::Constant { .. } => Arrivals::Constant { rate },
            Arrivals::Gamma { burstiness, .. } => Arrivals::Gamma {
                rate,
                burstiness: *burstiness,
            },
            Arrivals::Burst => Arrivals::Burst,
            Arrivals::Steps(steps) => Arrivals::Steps(
                steps
                    .iter()
                    .map(|step| Step {
                        rate: step.rate * factor,
                        length: step.length,
                    })
                    .collect(),
            ),
            Arrivals::Trace(times) => Arrivals::Trace(times.iter().map(|time| time.div_f64(factor)).collect()),
        }
    }

    /// Does the process look the same at all times, so that a warm-up can precede it?
    pub fn is_stationary(&self) -> bool {
        matches!(
            self,
            Arrivals::Poisson { .. } | Arrivals::Constant { .. } | Arrivals::Gamma { .. }
        )
    }

    /// How reports name it.
    pub fn describe(&self) -> String {
        match self {
            Arrivals::Poisson { .. } => "poisson".to_owned(),
            Arrivals::Constant { .. } => "constant".to_owned(),
            Arrivals::Gamma { burstiness, .. } => format!("gamma, burstiness {burstiness}"),
            Arrivals::Burst => "burst".to_owned(),
            Arrivals::Steps(steps) => {
                let steps: Vec<String> = steps
                    .iter()
                    .map(|step| format!("{}/s for {:?}", step.rate, step.length))
                    .collect();
                format!("steps: {}", steps.join(", "))
            }
            Arrivals::Trace(times) => format!("trace of {} requests", times.len()),
        }
    }
}

fn exponential(rate: f64) -> Exp<f64> {
    // A rate above 0 is all that Exp asks.
    Exp::new(rate).expect("positive rate")
}

/// Running sums of gaps in seconds. The first request comes after the first gap, as in any renewal process.
fn sums(mut gap: impl FnMut() -> f64 + Send + 'static) -> Box<dyn Iterator<Item = Duration> + Send> {
    let mut time = 0.0;
    Box::new(std::iter::repeat_with(move || {
        time += gap();
        Duration::from_secs_f64(time)
    }))
}

/// A Poisson process keeps no memory, so a step may begin afresh where the one before it ended.
fn step_times(steps: &[Step], mut random: Xoshiro256PlusPlus) -> Vec<Duration> {
    let mut times = Vec::new();
    let mut begin = 0.0;
    for step in steps {
        let end = begin + step.length.as_secs_f64();
        let gaps = exponential(step.rate);
        let mut time = begin + gaps.sample(&mut random);
        while time < end {
            times.push(Duration::from_secs_f64(time));
            time += gaps.sample(&mut random);
        }
        begin = end;
    }
    times
}

/// A seed for a part of a run that must not share its numbers with another part.
pub(crate) fn derived_seed(seed: u64, part: u64) -> u64 {
    let mut random = Xoshiro256PlusPlus::seed_from_u64(seed ^ part.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    random.random()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gaps(arrivals: &Arrivals, count: usize) -> Vec<f64> {
        let times: Vec<f64> = arrivals
            .times(7)
            .take(count + 1)
            .map(|time| time.as_secs_f64())
            .collect();
        times.windows(2).map(|pair| pair[1] - pair[0]).collect()
    }

    #[test]
    fn gamma_keeps_the_mean_and_widens_the_spread() {
        let (rate, count) = (20.0, 50_000);
        let gaps = gaps(&Arrivals::Gamma { rate, burstiness: 0.25 }, count);
        let mean = gaps.iter().sum::<f64>() / count as f64;
        let variance = gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / count as f64;
        assert!((mean * rate - 1.0).abs() < 0.03, "{mean}");
        // Shape k has a squared coefficient of variation of 1 / k.
        assert!((variance / mean.powi(2) / 4.0 - 1.0).abs() < 0.1, "{variance}");
    }

    #[test]
    fn steps_follow_their_rates() {
        let step = |rate, seconds| Step {
            rate,
            length: Duration::from_secs(seconds),
        };
        let arrivals = Arrivals::Steps(vec![step(10.0, 200), step(50.0, 200)]);
        let times: Vec<_> = arrivals.times(1).collect();
        assert!(times.is_sorted());
        let early = times.iter().filter(|time| time.as_secs() < 200).count();
        assert!((1850..2150).contains(&early), "{early}");
        assert!((9700..10_300).contains(&(times.len() - early)), "{}", times.len());
        assert_eq!(arrivals.rate(), Some(30.0));
    }

    #[test]
    fn a_seed_repeats_its_times() {
        let arrivals = Arrivals::Poisson { rate: 3.0 };
        let take = |seed| arrivals.times(seed).take(50).collect::<Vec<_>>();
        assert_eq!(take(4), take(4));
        assert_ne!(take(4), take(5));
    }

    #[test]
    fn another_rate_keeps_the_shape() {
        let trace = Arrivals::Trace((0..=10).map(Duration::from_secs).collect());
        assert_eq!(trace.rate(), Some(1.0));
        let fast = trace.at_rate(4.0);
        assert_eq!(fast.rate(), Some(4.0));
        assert_eq!(fast.times(0).last(), Some(Duration::from_millis(2500)));
        let steps = Arrivals::Steps(vec![Step {
            rate: 2.0,
            length: Duration::from_secs(9),
        }]);
        assert_eq!(steps.at_rate(6.0).rate(), Some(6.0));
    }
}
