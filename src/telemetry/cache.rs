//! What the prefix cache counts.

use prometheus::{Counter, Gauge, GaugeVec, IntCounter, IntCounterVec};

use super::metrics::Maker;
use crate::batching::PinCounts;

/// The prefix cache's counters.
#[derive(Debug)]
pub struct CacheMetrics {
    pub tokens: IntCounter,
    /// By outcome: `hit`, `miss`.
    pub requests: IntCounterVec,
    pub saved_seconds: Counter,
    pub evictions: IntCounter,
    /// By kind: `asked`, `automatic`.
    pinned_blocks: GaugeVec,
    pin_budget: Gauge,
}

impl CacheMetrics {
    pub(super) fn new(make: &Maker) -> Result<Self, prometheus::Error> {
        Ok(Self {
            tokens: make.counter(
                "sconce_cached_tokens_total",
                "Prompt tokens found in the prefix cache, at admission or while others ran: prefill that was saved",
            )?,
            requests: make.counters(
                "sconce_prefix_requests_total",
                "Sequences whose prompt was done, by whether any of it was found in the prefix cache",
                "outcome",
                &["hit", "miss"],
            )?,
            saved_seconds: make.seconds(
                "sconce_saved_prefill_seconds_total",
                "Estimate: the tokens found in the prefix cache, each at what computing one has cost on the mean",
            )?,
            evictions: make.counter(
                "sconce_evictions_total",
                "Cached blocks given up because their memory was needed",
            )?,
            pinned_blocks: make.gauges(
                "sconce_pinned_blocks",
                "KV blocks that stay cached: asked for, or because many requests used them",
                "kind",
                &["asked", "automatic"],
            )?,
            pin_budget: make.gauge(
                "sconce_pin_budget_blocks",
                "The most KV blocks that may be pinned, by both kinds together",
            )?,
        })
    }

    /// A prompt is done, so many of its tokens were found.
    pub fn request(&self, cached_tokens: usize) {
        let outcome = if cached_tokens > 0 { "hit" } else { "miss" };
        self.requests.with_label_values(&[outcome]).inc();
    }

    pub fn observe(&self, pins: PinCounts) {
        for (kind, blocks) in [("asked", pins.asked), ("automatic", pins.automatic)] {
            self.pinned_blocks.with_label_values(&[kind]).set(blocks as f64);
        }
        self.pin_budget.set(pins.budget as f64);
    }
}
