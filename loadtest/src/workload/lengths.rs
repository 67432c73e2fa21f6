//! Distributions of lengths in tokens (or of turns).

use std::{fmt, str::FromStr};

use rand::{Rng, RngExt};
use rand_distr::{Distribution, LogNormal};

/// A distribution of whole numbers from 1.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Lengths {
    Fixed(u32),
    /// Both ends included.
    Uniform {
        least: u32,
        most: u32,
    },
    /// Cut at `most`.
    LogNormal {
        median: f64,
        sigma: f64,
        most: u32,
    },
}

/// Why a distribution was not understood.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("lengths are `128`, `64..192` or `lognormal:MEDIAN,SIGMA,MOST`, from 1 to 1000000")]
pub struct LengthsError;

/// No length is longer.
pub(crate) const MOST_TOKENS: u32 = 1_000_000;

impl FromStr for Lengths {
    type Err = LengthsError;

    fn from_str(text: &str) -> Result<Self, LengthsError> {
        let number = |text: &str| text.trim().parse::<u32>().map_err(|_| LengthsError);
        let lengths = if let Some(rest) = text.strip_prefix("lognormal:") {
            let parts: Vec<&str> = rest.split(',').collect();
            let [median, sigma, most] = parts[..] else {
                return Err(LengthsError);
            };
            Lengths::LogNormal {
                median: median.trim().parse().map_err(|_| LengthsError)?,
                sigma: sigma.trim().parse().map_err(|_| LengthsError)?,
                most: number(most)?,
            }
        } else if let Some((least, most)) = text.split_once("..") {
            Lengths::Uniform {
                least: number(least)?,
                most: number(most)?,
            }
        } else {
            Lengths::Fixed(number(text)?)
        };
        if lengths.is_sound() {
            Ok(lengths)
        } else {
            Err(LengthsError)
        }
    }
}

impl fmt::Display for Lengths {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Lengths::Fixed(length) => write!(f, "{length}"),
            Lengths::Uniform { least, most } => write!(f, "{least}..{most}"),
            Lengths::LogNormal { median, sigma, most } => write!(f, "lognormal:{median},{sigma},{most}"),
        }
    }
}

impl Lengths {
    fn is_sound(self) -> bool {
        match self {
            Lengths::Fixed(length) => (1..=MOST_TOKENS).contains(&length),
            Lengths::Uniform { least, most } => 1 <= least && least <= most && most <= MOST_TOKENS,
            Lengths::LogNormal { median, sigma, most } => {
                (1.0..=f64::from(most)).contains(&median) && (0.0..=10.0).contains(&sigma) && most <= MOST_TOKENS
            }
        }
    }

    pub fn sample(self, random: &mut impl Rng) -> u32 {
        match self {
            Lengths::Fixed(length) => length,
            Lengths::Uniform { least, most } => random.random_range(least..=most),
            Lengths::LogNormal { median, sigma, most } => {
                // A sigma from 0 to 10 is all that LogNormal asks.
                let lengths = LogNormal::new(median.ln(), sigma).expect("finite sigma");
                (lengths.sample(random).round() as u32).clamp(1, most)
            }
        }
    }

    /// The mean, the cut of a log-normal aside.
    pub fn mean(self) -> f64 {
        match self {
            Lengths::Fixed(length) => f64::from(length),
            Lengths::Uniform { least, most } => (f64::from(least) + f64::from(most)) / 2.0,
            Lengths::LogNormal { median, sigma, most } => (median * (sigma * sigma / 2.0).exp()).min(f64::from(most)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{SeedableRng, rngs::Xoshiro256PlusPlus};

    #[test]
    fn reads_what_it_writes() {
        for text in ["128", "64..192", "lognormal:100,0.5,1024"] {
            assert_eq!(text.parse::<Lengths>().unwrap().to_string(), text);
        }
        for bad in [
            "",
            "0",
            "0..4",
            "9..4",
            "-3",
            "lognormal:100",
            "lognormal:0,1,10",
            "lognormal:5,x,10",
            "1e3",
        ] {
            assert!(bad.parse::<Lengths>().is_err(), "{bad}");
        }
    }

    #[test]
    fn samples_have_the_stated_shape() {
        let mut random = Xoshiro256PlusPlus::seed_from_u64(3);
        let mut take = |text: &str| -> Vec<u32> {
            let lengths: Lengths = text.parse().unwrap();
            (0..20_000).map(|_| lengths.sample(&mut random)).collect()
        };
        let mean = |sample: &[u32]| sample.iter().map(|&n| f64::from(n)).sum::<f64>() / sample.len() as f64;
        let uniform = take("64..192");
        assert_eq!((uniform.iter().min(), uniform.iter().max()), (Some(&64), Some(&192)));
        assert!((mean(&uniform) - 128.0).abs() < 2.0);
        let mut lognormal = take("lognormal:100,0.5,400");
        assert!((mean(&lognormal) / 113.3 - 1.0).abs() < 0.03);
        lognormal.sort_unstable();
        assert!((97..=103).contains(&lognormal[10_000]));
        assert!(lognormal[19_999] <= 400);
    }
}
