//! What a run or a rubric found, in the shape of the JSON report (`docs/loadtest.md` describes it).

pub(crate) mod charts;
pub mod compare;
pub mod figures;
pub mod html;
pub mod remarks;
pub(crate) mod scale;
pub mod table;
#[cfg(test)]
pub(crate) mod tests;
mod turns;

pub(crate) use html::escaped;
pub use turns::Turn;

use std::{collections::BTreeMap, time::UNIX_EPOCH};

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use crate::{
    recorder::{Record, Recorder},
    run::{Measured, Sample},
    slo::{Metric, Slo},
    utilisation::Utilisation,
};

/// The version of the report's shape; a change that breaks a reader raises it.
pub const SCHEMA: u32 = 1;
/// Points of a scatter at most.
const SCATTER: usize = 2000;
/// A run is marked where the generator's P99 lateness exceeds this, or this share of the median E2E.
const LATE_MS: f64 = 10.0;
const LATE_SHARE: f64 = 0.01;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    pub schema: u32,
    pub generator: String,
    /// Seconds since 1970.
    pub began: f64,
    pub url: String,
    pub model: String,
    pub workload: String,
    /// How prompt lengths were made.
    pub token_counts: String,
    pub arrivals: String,
    pub stream: bool,
    pub seed: u64,
    pub slo: Option<String>,
    /// The rate that the rubric's shares refer to; absent where the search for it was not finished.
    pub target_rate: Option<f64>,
    /// The loads that the search for the highest rate tried, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub search: Vec<Probe>,
    /// The user ended the search before the highest rate was known.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub search_unfinished: bool,
    pub interrupted: bool,
    pub runs: Vec<Run>,
    /// Tells it from those that it is set beside; empty where it is alone.
    #[serde(skip)]
    pub name: String,
}

/// A load that the search tried.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Probe {
    pub rate: f64,
    pub slo_kept: bool,
    /// The generator was so late that it mattered.
    #[serde(default)]
    pub late: bool,
    /// Requests that failed.
    #[serde(default)]
    pub failed: u64,
    /// As a run's.
    #[serde(default)]
    pub unsettled: bool,
}

/// One load. Rates are a second; latencies count from the intended time of sending.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Run {
    pub label: String,
    /// The arrival process's mean rate; absent where all came at once.
    pub offered_rate: Option<f64>,
    /// The requests that were sent, less one, over the seconds from the first to the last; absent where there are none.
    #[serde(default)]
    pub sent_rate: Option<f64>,
    /// Answered requests over `seconds`.
    pub achieved_rate: f64,
    /// From the start of the measured part to the end of its last request.
    pub seconds: f64,
    pub requests: Requests,
    pub tokens: Tokens,
    /// By metric: `ttft`, `tpot`, `itl`, `e2e`; a metric that was not measured is absent.
    pub latency_ms: BTreeMap<Metric, Summary>,
    /// How much later than intended requests went out.
    pub lateness_ms: Option<Summary>,
    /// How long refused requests (429 or 503) waited to hear it; absent where none was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refusal_ms: Option<Summary>,
    /// The lateness was large enough to matter.
    pub late: bool,
    /// The server still had requests of the load before when this one began.
    #[serde(default)]
    pub unsettled: bool,
    /// Absent without an SLO, and where the run cannot tell.
    pub slo_kept: Option<bool>,
    /// Requests a second that kept every limit of the SLO.
    pub goodput: Option<f64>,
    pub utilisation: Utilisation,
    pub timeline: Vec<Sample>,
    /// By metric: pairs of percentile and milliseconds.
    pub curves: BTreeMap<Metric, Vec<[f64; 2]>>,
    /// The requests of sessions by their place in them; empty where every session had one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub turns: Vec<Turn>,
    /// Pairs of TTFT and TPOT in milliseconds, of at most 2000 requests.
    pub scatter: Vec<[f64; 2]>,
    pub interrupted: bool,
    /// The histograms of every second as an interval log.
    #[serde(skip)]
    pub hdr_log: String,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Requests {
    pub sent: u64,
    pub answered: u64,
    pub failed: u64,
    /// Still running when the run was cut short.
    pub unfinished: u64,
    /// By kind: `refused`, `timed_out`, `status_429` and so on, `broken_stream`, `bad_json`, `error_event`,
    /// `connection`.
    pub errors: BTreeMap<String, u64>,
}

/// What the server does not say is absent.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Tokens {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt: Option<u64>,
    /// Those of the prompts that the server found in its prefix cache.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cached: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output_per_second: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total_per_second: Option<f64>,
}

impl Tokens {
    /// Those of the answered requests, and over the seconds that all took.
    fn of(records: &[Record], seconds: f64) -> Self {
        let sum = |of: fn(&Record) -> Option<u32>| records.iter().filter_map(of).map(u64::from).reduce(|a, b| a + b);
        // No answer has no tokens; of answers a server may not say how many they have.
        let known = |total: Option<u64>| total.or(records.is_empty().then_some(0));
        let prompt = known(sum(|record| record.prompt_tokens));
        let output = known(sum(|record| record.output_tokens));
        Self {
            prompt,
            cached: sum(|record| record.cached_tokens),
            output,
            output_per_second: output.map(|output| output as f64 / seconds),
            total_per_second: prompt.zip(output).map(|(a, b)| (a + b) as f64 / seconds),
        }
    }
}

/// Milliseconds.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    pub count: u64,
    pub mean: f64,
    pub p50: f64,
    pub p90: f64,
    pub p99: f64,
    pub p999: f64,
    pub max: f64,
}

impl Summary {
    fn of(histogram: &Histogram<u64>) -> Option<Self> {
        let at = |quantile| histogram.value_at_quantile(quantile) as f64 / 1e3;
        (!histogram.is_empty()).then(|| Summary {
            count: histogram.len(),
            mean: histogram.mean() / 1e3,
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            p999: at(0.999),
            max: histogram.max() as f64 / 1e3,
        })
    }
}

impl Run {
    /// Sums a run up.
    pub fn of(label: &str, offered_rate: Option<f64>, mut measured: Measured, slo: Option<&Slo>) -> Self {
        let comment = format!("{label}; values in microseconds");
        let hdr_log = measured.recorder.take_log(&comment, measured.began, measured.length);
        let recorder = &measured.recorder;
        let seconds = measured.length.as_secs_f64().max(1e-9);
        let answered = recorder.records.len() as u64;
        let by_metric = Metric::ALL
            .into_iter()
            .map(|metric| (metric, recorder.histogram(metric)));
        let lateness_ms = Summary::of(&recorder.lateness);
        let lateness = lateness_ms.as_ref().map_or(0.0, |summary| summary.p99);
        let median = recorder.e2e.value_at_quantile(0.5) as f64 / 1e3;
        let good = |slo: &Slo| recorder.records.iter().filter(|record| slo.kept_by(record)).count();
        Run {
            label: label.to_owned(),
            offered_rate,
            sent_rate: recorder.sent_rate(),
            achieved_rate: answered as f64 / seconds,
            seconds,
            requests: Requests {
                sent: recorder.sent,
                answered,
                failed: recorder.failed(),
                unfinished: recorder.unfinished,
                errors: recorder.failures.clone(),
            },
            tokens: Tokens::of(&recorder.records, seconds),
            latency_ms: by_metric
                .clone()
                .filter_map(|(metric, h)| Some((metric, Summary::of(h)?)))
                .collect(),
            late: lateness > LATE_MS || (answered > 0 && lateness > LATE_SHARE * median),
            lateness_ms,
            unsettled: false,
            refusal_ms: Summary::of(&recorder.refusals),
            slo_kept: match measured.gave_up {
                true => slo.map(|_| false),
                false => slo.and_then(|slo| slo.verdict(&recorder.records, recorder.failed(), recorder.unfinished)),
            },
            goodput: slo.map(|slo| good(slo) as f64 / seconds),
            curves: by_metric
                .filter(|(_, h)| !h.is_empty())
                .map(|(metric, h)| (metric, curve(h)))
                .collect(),
            turns: turns::of(&recorder.records),
            scatter: scatter(recorder),
            utilisation: measured.utilisation,
            timeline: measured.samples,
            interrupted: measured.interrupted,
            hdr_log,
        }
    }

    /// The interval log under tags that begin with the load's label, such as `50%-e2e`, so that readers tell it from the
    /// other loads' in the same file.
    pub fn labelled_log(&self) -> String {
        // Tags have neither spaces nor commas.
        let label = self.label.replace([' ', ','], "");
        let tagged = |line: &str| match line.strip_prefix("Tag=") {
            Some(rest) => format!("Tag={label}-{rest}\n"),
            None => format!("{line}\n"),
        };
        self.hdr_log.lines().map(tagged).collect()
    }
}

/// Percentiles that come closer to 100 with each step, as far as the sample has values for.
fn curve(histogram: &Histogram<u64>) -> Vec<[f64; 2]> {
    let mut points = Vec::new();
    let mut left = 1.0;
    while left * histogram.len() as f64 >= 0.5 {
        for part in [1.0, 0.9, 0.8, 0.7, 0.6] {
            let quantile = 1.0 - left * part;
            points.push([quantile * 100.0, histogram.value_at_quantile(quantile) as f64 / 1e3]);
        }
        left /= 2.0;
    }
    points.push([100.0, histogram.max() as f64 / 1e3]);
    points
}

fn scatter(recorder: &Recorder) -> Vec<[f64; 2]> {
    let every = recorder.records.len().div_ceil(SCATTER).max(1);
    let records = recorder.records.iter().step_by(every);
    records
        .filter_map(|record| Some([record.ttft? as f64 / 1e3, record.tpot? as f64 / 1e3]))
        .collect()
}

/// Seconds since 1970.
pub(crate) fn unix_seconds(time: std::time::SystemTime) -> f64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}
