//! What a scheduler goes by, and what of it may change while it runs.

use std::time::Duration;

use crate::batching::{BlockPool, Buckets, Schedule, WindowPolicy};

/// What the scheduler goes by.
#[derive(Debug, Clone)]
pub struct Config {
    pub schedule: Schedule,
    pub window_policy: WindowPolicy,
    pub window: Duration,
    /// The most sequences that run at once, and the most that a batch gathers.
    pub max_batch: usize,
    /// The most tokens a step runs.
    pub step_tokens: usize,
    pub buckets: Buckets,
    /// The longest sequence, prompt and output together, in tokens.
    pub max_model_len: usize,
}

/// What may change while sequences run; `None` leaves a setting as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Change {
    pub schedule: Option<Schedule>,
    pub window_policy: Option<WindowPolicy>,
    pub window: Option<Duration>,
    pub max_batch: Option<usize>,
    pub step_tokens: Option<usize>,
}

impl Change {
    /// This change and then `later`.
    #[must_use]
    pub fn then(&self, later: &Self) -> Self {
        Self {
            schedule: later.schedule.or(self.schedule),
            window_policy: later.window_policy.or(self.window_policy),
            window: later.window.or(self.window),
            max_batch: later.max_batch.or(self.max_batch),
            step_tokens: later.step_tokens.or(self.step_tokens),
        }
    }
}

impl Config {
    pub(super) fn with(&self, change: &Change) -> Self {
        Self {
            schedule: change.schedule.unwrap_or(self.schedule),
            window_policy: change.window_policy.unwrap_or(self.window_policy),
            window: change.window.unwrap_or(self.window),
            max_batch: change.max_batch.unwrap_or(self.max_batch),
            step_tokens: change.step_tokens.unwrap_or(self.step_tokens),
            ..self.clone()
        }
    }

    pub(super) fn check(&self, blocks: &BlockPool) -> Result<(), ConfigError> {
        let Config {
            step_tokens,
            max_batch,
            max_model_len,
            ..
        } = *self;
        if step_tokens < max_batch {
            return Err(ConfigError::StepBelowBatch { step_tokens, max_batch });
        }
        if blocks.capacity() < max_model_len {
            return Err(ConfigError::CacheBelowContext {
                capacity: blocks.capacity(),
                max_model_len,
            });
        }
        Ok(())
    }
}

/// Settings that cannot work together.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    #[error(
        "a step of {step_tokens} tokens cannot decode a batch of {max_batch}; raise step-tokens or lower max-batch"
    )]
    StepBelowBatch { step_tokens: usize, max_batch: usize },
    #[error(
        "the KV cache holds {capacity} tokens, one sequence may have {max_model_len}; \
         enlarge the cache or lower max-model-len"
    )]
    CacheBelowContext { capacity: usize, max_model_len: usize },
}
