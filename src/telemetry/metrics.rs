//! What the engine counts. Names, meanings and units stand here once; the metrics page is made from them.

use std::sync::atomic::{AtomicU64, Ordering};

use prometheus::{
    Counter, Gauge, GaugeVec, Histogram, HistogramOpts, IntCounter, IntCounterVec, Opts, Registry, core::Collector,
};

use super::cache::CacheMetrics;

/// Upper bounds in seconds: from a window's milliseconds to a long generation.
const SECONDS: [f64; 16] = [
    0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 300.0,
];
const COUNTS: [f64; 11] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 100.0, 256.0, 1024.0, 4096.0];

/// The engine's counters. Cheap to update from the engine thread; read by whoever asks for `/metrics`.
#[derive(Debug)]
pub struct EngineMetrics {
    /// Whose gauges these are; the counters are all engines'.
    pub shown: Shown,
    pub busy_seconds: Counter,
    pub step_seconds: Histogram,
    pub step_tokens: Histogram,
    pub prefill_tokens: IntCounter,
    pub decode_tokens: IntCounter,
    pub recomputed_tokens: IntCounter,
    pub cache: CacheMetrics,
    pub batches: IntCounter,
    pub batch_requests: Histogram,
    /// By layout: `packed` (as it is) and `padded` (as it would be).
    pub prefill_positions: IntCounterVec,
    pub window_seconds: Histogram,
    pub queue_seconds: Histogram,
    pub waiting: Gauge,
    pub running: Gauge,
    pub max_batch: Gauge,
    pub occupancy_steps: Counter,
    /// By state: `free`, `held`, `cached`, `pinned`.
    pub kv_blocks: GaugeVec,
    pub preemptions: IntCounter,
    /// By how they ended: `OUTCOMES`.
    pub sequences: IntCounterVec,
    /// Predicted over actual time, less one.
    pub prediction_error: Histogram,
    pub prediction_margin: Gauge,
    /// By cause, see `FAULTS`.
    pub faults: IntCounterVec,
    /// By cause: `panicked`, `hung`.
    pub restarts: IntCounterVec,
    /// By cause: `device_lost`, `panicked`, `hung`.
    pub retired_failures: IntCounterVec,
    /// By outcome: `swapped`, `failed`.
    pub model_changes: IntCounterVec,
}

/// What can go wrong in a step or in what follows it.
pub const FAULTS: [&str; 6] = [
    "not_a_number",
    "sampler_panicked",
    "step_failed",
    "step_panicked",
    "out_of_memory",
    "device_lost",
];

/// The ways in which a sequence ends.
pub const OUTCOMES: [&str; 8] = [
    "stop",
    "length",
    "cut",
    "cancelled",
    "expired",
    "refused",
    "failed",
    "pinned",
];
/// How wrong a prediction was: -0.5 is half of what it took, 1 twice of it.
const ERRORS: [f64; 14] = [
    -0.8, -0.5, -0.3, -0.2, -0.1, -0.05, 0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0,
];

impl EngineMetrics {
    /// Makes the metrics and registers them; an error means that a name was taken.
    pub fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        let make = Maker(registry);
        let metrics = Self {
            shown: Shown::default(),
            busy_seconds: make.seconds(
                "sconce_busy_seconds_total",
                "Seconds in which a step ran, sampling included",
            )?,
            step_seconds: make.histogram("sconce_step_seconds", "Duration of a step", &SECONDS)?,
            step_tokens: make.histogram("sconce_step_tokens", "Tokens that a step ran", &COUNTS)?,
            prefill_tokens: make.counter(
                "sconce_prefill_tokens_total",
                "Prompt tokens computed; with sconce_cached_tokens_total, all tokens of the prompts that ran",
            )?,
            decode_tokens: make.counter("sconce_decode_tokens_total", "Generated tokens computed")?,
            recomputed_tokens: make.counter(
                "sconce_recomputed_tokens_total",
                "Tokens computed once more, after a preemption",
            )?,
            cache: CacheMetrics::new(&make)?,
            batches: make.counter("sconce_batches_total", "Batches that the window closed")?,
            batch_requests: make.histogram("sconce_batch_requests", "Requests in a closed batch", &COUNTS)?,
            prefill_positions: make.counters(
                "sconce_prefill_positions_total",
                "Prompt positions of closed batches, cached or not, in a packed and in a padded layout",
                "layout",
                &["packed", "padded"],
            )?,
            window_seconds: make.histogram(
                "sconce_window_seconds",
                "Wait of a request for its batch window",
                &SECONDS,
            )?,
            queue_seconds: make.histogram(
                "sconce_queue_seconds",
                "Wait of a request for room, window aside",
                &SECONDS,
            )?,
            waiting: make.gauge("sconce_waiting", "Sequences that wait for a batch")?,
            running: make.gauge("sconce_running", "Sequences admitted and not ended")?,
            max_batch: make.gauge("sconce_max_batch", "The most sequences that may run at once")?,
            occupancy_steps: make.seconds(
                "sconce_occupancy_steps_total",
                "Sum over steps of the share of max-batch that ran; over the number of steps it is the mean occupancy",
            )?,
            kv_blocks: make.gauges(
                "sconce_kv_blocks",
                "KV blocks",
                "state",
                &["free", "held", "cached", "pinned"],
            )?,
            preemptions: make.counter(
                "sconce_preemptions_total",
                "Sequences that lost their blocks for a while",
            )?,
            sequences: make.counters(
                "sconce_sequences_total",
                "Sequences that ended; `stop` at a stop token or string, `cut` at the deadline with tokens, `expired` \
                 without any, `refused` in the queue, `cancelled` by a client that left",
                "outcome",
                &OUTCOMES,
            )?,
            prediction_error: make.histogram(
                "sconce_prediction_error_ratio",
                "Time a request was expected to take when it came over the time it took, less 1; what came after it counts. One \
                 that was cut, expired or overtaken counts as if it had ended at its deadline, so it was off by more",
                &ERRORS,
            )?,
            prediction_margin: make.gauge(
                "sconce_prediction_margin",
                "What predictions are multiplied by before they are held against a deadline",
            )?,
            faults: make.counters(
                "sconce_faults_total",
                "Forward passes that failed, and rows that gave no token, by cause",
                "cause",
                &FAULTS,
            )?,
            restarts: make.counters(
                "sconce_engine_restarts_total",
                "Engines that failed as a whole and were started again, by cause",
                "cause",
                &["panicked", "hung"],
            )?,
            retired_failures: make.counters(
                "sconce_retired_engine_failures_total",
                "Engines of replaced models that failed before their last request had ended, by cause; they are not started \
                 again",
                "cause",
                &["device_lost", "panicked", "hung"],
            )?,
            model_changes: make.counters(
                "sconce_model_changes_total",
                "Models that were to be swapped in while the server runs",
                "outcome",
                &["swapped", "failed"],
            )?,
        };
        Ok(metrics)
    }
}

/// Which of a process's engines shows its state: one at a time.
#[derive(Debug, Default)]
pub struct Shown {
    engines: AtomicU64,
    /// 0 is none.
    shown: AtomicU64,
}

impl Shown {
    /// The number of another engine.
    pub fn another(&self) -> u64 {
        self.engines.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// From now on it is this one.
    pub fn show(&self, engine: u64) {
        self.shown.store(engine, Ordering::Relaxed);
    }

    /// Whether it is this one.
    pub fn is(&self, engine: u64) -> bool {
        self.shown.load(Ordering::Relaxed) == engine
    }
}

/// Makes metrics in a registry, with every label value present from the start.
pub(super) struct Maker<'a>(&'a Registry);

impl Maker<'_> {
    pub(super) fn register<M: Collector + Clone + 'static>(&self, metric: M) -> Result<M, prometheus::Error> {
        self.0.register(Box::new(metric.clone()))?;
        Ok(metric)
    }

    pub(super) fn counter(&self, name: &str, help: &str) -> Result<IntCounter, prometheus::Error> {
        self.register(IntCounter::new(name, help)?)
    }

    pub(super) fn seconds(&self, name: &str, help: &str) -> Result<Counter, prometheus::Error> {
        self.register(Counter::new(name, help)?)
    }

    pub(super) fn gauge(&self, name: &str, help: &str) -> Result<Gauge, prometheus::Error> {
        self.register(Gauge::new(name, help)?)
    }

    pub(super) fn histogram(&self, name: &str, help: &str, bounds: &[f64]) -> Result<Histogram, prometheus::Error> {
        self.register(Histogram::with_opts(
            HistogramOpts::new(name, help).buckets(bounds.to_vec()),
        )?)
    }

    pub(super) fn counters(
        &self,
        name: &str,
        help: &str,
        label: &str,
        values: &[&str],
    ) -> Result<IntCounterVec, prometheus::Error> {
        let metric = self.register(IntCounterVec::new(Opts::new(name, help), &[label])?)?;
        for value in values {
            metric.with_label_values(&[*value]);
        }
        Ok(metric)
    }

    pub(super) fn gauges(
        &self,
        name: &str,
        help: &str,
        label: &str,
        values: &[&str],
    ) -> Result<GaugeVec, prometheus::Error> {
        let metric = self.register(GaugeVec::new(Opts::new(name, help), &[label])?)?;
        for value in values {
            metric.with_label_values(&[*value]);
        }
        Ok(metric)
    }
}
