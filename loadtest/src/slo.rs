//! The latency that is promised: `e2e.p99=2s,ttft.p99=500ms`.

use std::{fmt, str::FromStr, time::Duration};

use serde::{Deserialize, Serialize};

use crate::recorder::Record;

/// What is measured of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Metric {
    /// Time to first token.
    Ttft,
    /// Time per output token after the first.
    Tpot,
    /// Inter-token latency: the gap between two pieces of a streamed answer.
    Itl,
    /// From the intended time of sending to the last byte.
    E2e,
}

impl Metric {
    pub const ALL: [Metric; 4] = [Metric::Ttft, Metric::Tpot, Metric::Itl, Metric::E2e];

    pub fn name(self) -> &'static str {
        match self {
            Metric::Ttft => "ttft",
            Metric::Tpot => "tpot",
            Metric::Itl => "itl",
            Metric::E2e => "e2e",
        }
    }
}

/// One promise: at least `percentile` % of all requests sent stay within `limit`; a request that failed does not.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Target {
    pub metric: Metric,
    /// Above 0, at most 100.
    pub percentile: f64,
    pub limit: Duration,
}

/// All promises together.
#[derive(Debug, Clone, PartialEq)]
pub struct Slo(pub Vec<Target>);

/// Why an SLO was not understood.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error(
    "`{part}` is not a promise such as `e2e.p99=2s` or `ttft.p99.9=500ms` (of ttft, tpot, itl, e2e), joined by commas"
)]
pub struct SloError {
    part: String,
}

impl FromStr for Slo {
    type Err = SloError;

    fn from_str(text: &str) -> Result<Self, SloError> {
        let targets = text.split(',').map(|part| {
            target(part.trim()).ok_or_else(|| SloError {
                part: part.trim().to_owned(),
            })
        });
        Ok(Slo(targets.collect::<Result<_, _>>()?))
    }
}

fn target(part: &str) -> Option<Target> {
    let (what, limit) = part.split_once('=')?;
    let (metric, percentile) = what.trim().split_once('.')?;
    let metric = Metric::ALL.into_iter().find(|candidate| candidate.name() == metric)?;
    let percentile: f64 = match percentile {
        "max" => 100.0,
        number => number.strip_prefix('p')?.parse().ok()?,
    };
    let limit = seconds(limit.trim())?;
    (percentile > 0.0 && percentile <= 100.0 && !limit.is_zero()).then_some(Target {
        metric,
        percentile,
        limit,
    })
}

/// A duration such as `500ms` or `1.5s`.
pub fn seconds(text: &str) -> Option<Duration> {
    let (number, unit) = match () {
        () if text.ends_with("us") => (text.strip_suffix("us")?, 1e-6),
        () if text.ends_with("µs") => (text.strip_suffix("µs")?, 1e-6),
        () if text.ends_with("ms") => (text.strip_suffix("ms")?, 1e-3),
        () if text.ends_with('m') => (text.strip_suffix('m')?, 60.0),
        () => (text.strip_suffix('s')?, 1.0),
    };
    let number: f64 = number.trim().parse().ok()?;
    Duration::try_from_secs_f64(number * unit).ok()
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}.p{}={:?}", self.metric.name(), self.percentile, self.limit)
    }
}

impl fmt::Display for Slo {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let parts: Vec<String> = self.0.iter().map(Target::to_string).collect();
        f.write_str(&parts.join(","))
    }
}

impl Slo {
    /// Does a request keep every limit? Goodput counts these. An inter-token limit binds the request's longest gap.
    pub fn kept_by(&self, record: &Record) -> bool {
        self.0.iter().all(|target| target.kept_by(record))
    }

    /// Is every promise kept by the answered requests, those that failed, and those that were cut short? `None` where that
    /// cannot be told: nothing was sent, the requests that were cut short would decide, or no answer has the latency.
    pub fn verdict(&self, records: &[Record], failed: u64, unfinished: u64) -> Option<bool> {
        let verdicts: Vec<_> = self
            .0
            .iter()
            .map(|target| target.verdict(records, failed, unfinished))
            .collect();
        if verdicts.contains(&Some(false)) {
            return Some(false);
        }
        (!verdicts.contains(&None)).then_some(true)
    }
}

impl Target {
    /// A latency that was not measured (an answer of one token has no gap) breaks no promise.
    pub fn kept_by(&self, record: &Record) -> bool {
        let limit = self.limit.as_micros() as u64;
        self.value(record).is_none_or(|value| value <= limit)
    }

    fn value(&self, record: &Record) -> Option<u64> {
        match self.metric {
            Metric::Ttft => record.ttft,
            Metric::Tpot => record.tpot,
            Metric::Itl => record.longest_gap,
            Metric::E2e => Some(record.e2e),
        }
    }

    fn verdict(&self, records: &[Record], failed: u64, unfinished: u64) -> Option<bool> {
        let all = (records.len() as u64 + failed + unfinished) as f64;
        let kept = records.iter().filter(|record| self.kept_by(record)).count() as u64;
        // The slack is for percentiles that are not exact in binary.
        let enough = |kept: u64| kept as f64 >= all * self.percentile / 100.0 - 1e-9;
        if !enough(kept + unfinished) {
            return Some(false);
        }
        let measured = records.iter().any(|record| self.value(record).is_some());
        (measured && enough(kept)).then_some(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_promises() {
        let slo: Slo = "e2e.p99=2s, ttft.p99.9=500ms,itl.max=250us".parse().unwrap();
        assert_eq!(slo.0[0].limit, Duration::from_secs(2));
        assert_eq!((slo.0[1].metric, slo.0[1].percentile), (Metric::Ttft, 99.9));
        assert_eq!(
            (slo.0[2].limit, slo.0[2].percentile),
            (Duration::from_micros(250), 100.0)
        );
        assert_eq!(slo.to_string().parse::<Slo>().unwrap(), slo);
    }

    #[test]
    fn refuses_what_is_no_promise() {
        for bad in [
            "",
            "e2e",
            "e2e.p99",
            "e2e.p99=",
            "e2e.p99=2",
            "e2e.p101=2s",
            "e2e.p0=2s",
            "e2e.p99=0s",
            "latency.p99=2s",
            "e2e.99=2s",
            "e2e.p99=2s,,",
            "e2e.p99=-1s",
        ] {
            assert!(bad.parse::<Slo>().is_err(), "{bad}");
        }
    }

    #[test]
    fn failures_break_promises() {
        let slo: Slo = "e2e.p90=1s".parse().unwrap();
        let record = |e2e| Record {
            e2e,
            ..Record::default()
        };
        let mut records = vec![record(900_000); 90];
        assert_eq!(slo.verdict(&records, 10, 0), Some(true));
        assert_eq!(slo.verdict(&records, 11, 0), Some(false));
        records.push(record(1_100_000));
        assert!(!slo.kept_by(&records[90]));
        assert_eq!(slo.verdict(&records, 9, 0), Some(true));
    }

    #[test]
    fn what_is_not_known_is_not_said() {
        let slo: Slo = "e2e.p90=1s".parse().unwrap();
        let record = Record {
            e2e: 900_000,
            ..Record::default()
        };
        let records = vec![record; 90];
        assert_eq!(
            slo.verdict(&records, 0, 10),
            Some(true),
            "however they would have ended"
        );
        assert_eq!(slo.verdict(&records, 0, 11), None);
        assert_eq!(slo.verdict(&records, 10, 1), None);
        assert_eq!(slo.verdict(&records, 12, 1), Some(false), "however it would have ended");
        assert_eq!(slo.verdict(&[], 0, 0), None);
        assert_eq!(slo.verdict(&[], 1, 0), Some(false));
        let gaps: Slo = "e2e.p90=1s,itl.p90=1s".parse().unwrap();
        assert_eq!(gaps.verdict(&records, 0, 0), None, "no answer had a gap");
    }
}
