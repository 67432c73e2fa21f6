//! What was measured: histograms of latencies, one short record a request, errors by kind.

use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, Instant, SystemTime},
};

use hdrhistogram::Histogram;

use crate::{
    client::{Answer, Failure},
    intervals::Intervals,
    slo::Metric,
};

/// Latencies from a microsecond to two hours, to three significant digits.
const HIGHEST: u64 = 2 * 3600 * 1_000_000;
/// The tag of the generator's own lateness.
const LATENESS: &str = "lateness";
/// How far back the live view's percentiles look.
const ROLLING: Duration = Duration::from_secs(10);

/// One answered request. Times are in microseconds, counted from its intended time.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Record {
    /// The intended time, from the start of the run.
    pub at: u64,
    /// Which request of its session, from 1.
    pub turn: u32,
    pub e2e: u64,
    /// `None` for a whole answer.
    pub ttft: Option<u64>,
    /// `None` for a whole answer and for answers of one token.
    pub tpot: Option<u64>,
    pub longest_gap: Option<u64>,
    /// The numbers of tokens are `None` where the server does not say.
    pub prompt_tokens: Option<u32>,
    pub cached_tokens: Option<u32>,
    pub output_tokens: Option<u32>,
}

/// Collects a run.
#[derive(Debug)]
pub struct Recorder {
    pub ttft: Histogram<u64>,
    pub tpot: Histogram<u64>,
    pub itl: Histogram<u64>,
    pub e2e: Histogram<u64>,
    /// How much later than intended the generator sent.
    pub lateness: Histogram<u64>,
    /// From the intended time to hearing that there will be no answer (429 or 503).
    pub refusals: Histogram<u64>,
    pub records: Vec<Record>,
    pub failures: BTreeMap<String, u64>,
    pub sent: u64,
    /// When the first and the last request were handed to the HTTP client.
    sending: Option<(Instant, Instant)>,
    /// Sent, and ended neither with an answer nor a failure when the run was cut short.
    pub unfinished: u64,
    /// When the last request ended.
    pub last_end: Option<Instant>,
    recent: VecDeque<(Instant, u64)>,
    /// The same, second by second.
    intervals: Intervals,
}

/// An empty histogram of microseconds.
pub(crate) fn histogram() -> Histogram<u64> {
    // The bounds are constants that hdrhistogram accepts.
    Histogram::new_with_bounds(1, HIGHEST, 3).expect("valid bounds")
}

impl Recorder {
    /// For a run whose measured part begins at `start`.
    pub fn beginning(start: Instant) -> Self {
        Self {
            ttft: histogram(),
            tpot: histogram(),
            itl: histogram(),
            e2e: histogram(),
            lateness: histogram(),
            refusals: histogram(),
            records: Vec::new(),
            failures: BTreeMap::new(),
            sent: 0,
            sending: None,
            unfinished: 0,
            last_end: None,
            recent: VecDeque::new(),
            intervals: Intervals::beginning(start),
        }
    }

    /// A request was handed to the HTTP client this much after its intended time.
    pub fn sent(&mut self, lateness: Duration) {
        let now = Instant::now();
        self.sent += 1;
        self.sending = Some((self.sending.map_or(now, |(first, _)| first), now));
        let lateness = micros(lateness).max(1);
        self.lateness.saturating_record(lateness);
        self.intervals.record(now, LATENESS, lateness);
    }

    /// Requests a second from the first that was sent to the last; `None` where no time was between them.
    pub fn sent_rate(&self) -> Option<f64> {
        let (first, last) = self.sending?;
        let seconds = (last - first).as_secs_f64();
        (seconds > 0.0).then(|| (self.sent - 1) as f64 / seconds)
    }

    /// A session's `turn`-th request (from 1), to be sent at `intended` in a run that began at `start`, ended.
    pub fn ended(&mut self, start: Instant, intended: Instant, turn: u32, outcome: &Result<Answer, Failure>) {
        let now = Instant::now();
        match outcome {
            Ok(answer) => self.answered(start, intended, turn, answer),
            Err(failure) => *self.failures.entry(failure.to_string()).or_default() += 1,
        }
        if let Err(Failure::Status(429 | 503)) = outcome {
            let heard = now.saturating_duration_since(intended);
            self.refusals.saturating_record(micros(heard).max(1));
        }
        self.last_end = Some(now);
    }

    fn answered(&mut self, start: Instant, intended: Instant, turn: u32, answer: &Answer) {
        let since = |instant: Instant| micros(instant.saturating_duration_since(intended)).max(1);
        let streamed = answer.tokens.map(|(first, last)| (since(first), micros(last - first)));
        let record = Record {
            at: micros(intended.saturating_duration_since(start)),
            turn,
            e2e: since(answer.end),
            ttft: streamed.map(|(first, _)| first),
            tpot: streamed
                .zip(answer.output_tokens.filter(|&tokens| tokens > 1))
                .map(|((_, span), tokens)| span / u64::from(tokens - 1)),
            longest_gap: answer.gaps.iter().max().map(|&gap| micros(gap)),
            prompt_tokens: answer.prompt_tokens,
            cached_tokens: answer.cached_tokens,
            output_tokens: answer.output_tokens,
        };
        let now = Instant::now();
        self.latency(now, Metric::E2e, record.e2e);
        if let Some(ttft) = record.ttft {
            self.latency(now, Metric::Ttft, ttft);
        }
        if let Some(tpot) = record.tpot {
            self.latency(now, Metric::Tpot, tpot.max(1));
        }
        for &gap in &answer.gaps {
            self.latency(now, Metric::Itl, micros(gap).max(1));
        }
        self.recent.push_back((answer.end, record.e2e));
        self.records.push(record);
    }

    fn latency(&mut self, now: Instant, metric: Metric, value: u64) {
        let histogram = match metric {
            Metric::Ttft => &mut self.ttft,
            Metric::Tpot => &mut self.tpot,
            Metric::Itl => &mut self.itl,
            Metric::E2e => &mut self.e2e,
        };
        histogram.saturating_record(value);
        self.intervals.record(now, metric.name(), value);
    }

    /// Takes the histograms second by second, as an interval log (values in microseconds) tagged by metric.
    pub fn take_log(&mut self, comment: &str, began: SystemTime, length: Duration) -> String {
        let intervals = std::mem::replace(&mut self.intervals, Intervals::beginning(Instant::now()));
        intervals.log(comment, began, length)
    }

    /// Requests that ended in a failure.
    pub fn failed(&self) -> u64 {
        self.failures.values().sum()
    }

    pub fn histogram(&self, metric: Metric) -> &Histogram<u64> {
        match metric {
            Metric::Ttft => &self.ttft,
            Metric::Tpot => &self.tpot,
            Metric::Itl => &self.itl,
            Metric::E2e => &self.e2e,
        }
    }

    /// The 99th percentile of E2E over the last seconds, for the live view.
    pub fn rolling_p99(&mut self) -> Option<Duration> {
        let now = Instant::now();
        while self.recent.front().is_some_and(|(end, _)| now - *end > ROLLING) {
            self.recent.pop_front();
        }
        let mut values: Vec<u64> = self.recent.iter().map(|(_, e2e)| *e2e).collect();
        let index = (values.len() * 99).div_ceil(100).checked_sub(1)?;
        let (_, value, _) = values.select_nth_unstable(index);
        Some(Duration::from_micros(*value))
    }
}

fn micros(duration: Duration) -> u64 {
    duration.as_micros() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn latencies_count_from_the_intended_time() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let answer = Answer {
            tokens: Some((at(300), at(500))),
            gaps: vec![Duration::from_millis(50), Duration::from_millis(150)],
            end: at(510),
            output_tokens: Some(5),
            prompt_tokens: Some(9),
            cached_tokens: None,
            text: String::new(),
        };
        let mut recorder = Recorder::beginning(start);
        recorder.sent(Duration::from_millis(2));
        recorder.ended(start, at(100), 1, &Ok(answer));
        recorder.ended(start, at(100), 1, &Err(Failure::Status(503)));
        let record = recorder.records[0];
        assert_eq!((record.at, record.ttft, record.e2e), (100_000, Some(200_000), 410_000));
        assert_eq!((record.tpot, record.longest_gap), (Some(50_000), Some(150_000)));
        assert_eq!(recorder.itl.len(), 2);
        assert_eq!(recorder.failures, BTreeMap::from([("status_503".to_owned(), 1)]));
        assert_eq!((recorder.e2e.len(), recorder.refusals.len()), (1, 1));
    }
}
