//! What the prefix cache saves, and the prompts that are pinned in it.

use std::time::Duration;

use crate::{batching::Computed, telemetry::EngineMetrics};

/// Prices what was found in the cache at what computing a token has cost.
#[derive(Debug, Default)]
pub struct Savings {
    prefill_tokens: f64,
    /// In steps, as far as their tokens were prefill.
    prefill_seconds: f64,
    /// Found, and not yet priced: nothing was computed until now.
    unpriced: usize,
}

impl Savings {
    /// Prompt tokens were found that need not be computed.
    pub fn found(&mut self, tokens: usize, metrics: &EngineMetrics) {
        metrics.cache.tokens.inc_by(tokens as u64);
        self.unpriced += tokens;
    }

    /// A forward pass has computed these.
    pub fn computed(&mut self, computed: Computed, took: Duration, metrics: &EngineMetrics) {
        let Computed {
            prefill,
            decode,
            recomputed,
        } = computed;
        metrics.prefill_tokens.inc_by(prefill as u64);
        metrics.decode_tokens.inc_by(decode as u64);
        metrics.recomputed_tokens.inc_by(recomputed as u64);
        let tokens = prefill + decode + recomputed;
        if prefill > 0 {
            self.prefill_tokens += prefill as f64;
            self.prefill_seconds += took.as_secs_f64() * prefill as f64 / tokens as f64;
        }
        if self.prefill_tokens > 0.0 {
            let price = self.prefill_seconds / self.prefill_tokens;
            metrics.cache.saved_seconds.inc_by(self.unpriced as f64 * price);
            self.unpriced = 0;
        }
    }
}
