//! Policy only: window, buckets, scheduler, KV blocks, prefix tree. No tensor, no I/O, no clock of its own (the time
//! is an argument), so that the same code runs in the server and under property tests.

mod admission;
mod blocks;
mod buckets;
mod limits;
mod lru;
mod namespace;
mod outlook;
mod policy;
mod predict;
mod prefix;
mod queue;
mod scheduler;
mod window;

pub use admission::{Accepted, Ask, Cause, Gate, Refusal};
pub use blocks::{BlockCounts, BlockId, BlockPool, PinCounts};
pub use buckets::{Buckets, BucketsError};
pub use limits::{Limits, TooLarge};
pub use namespace::{CacheScope, Namespace};
pub use outlook::{Line, Outlook, Work};
pub use policy::{Schedule, WindowPolicy};
pub use predict::Estimates;
pub use prefix::{AUTOMATIC_PIN_REQUESTS, CachedPrefix, NodeId};
pub use scheduler::{
    Admission, Arrival, Batch, Change, Computed, Config, ConfigError, Pin, PinError, Plan, Row, Scheduler, Sequence,
    SequenceId,
};

/// The most that `max_batch` may be set to.
pub const MAX_BATCH: u64 = 4096;
/// The most that `step_tokens` may be set to.
pub const MAX_STEP_TOKENS: u64 = 1 << 20;
