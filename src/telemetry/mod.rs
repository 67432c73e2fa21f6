//! What the server says of itself: metrics in Prometheus' text format, how full the device was, a recording of the
//! engine at work, and spans for a collector.

mod cache;
mod chrome;
mod gpu;
pub mod log_level;
mod metrics;
#[cfg(feature = "otlp")]
pub mod otlp;
mod page;
mod panics;
pub mod trace;

pub use chrome::chrome_trace;
pub use gpu::register as register_gpu;
pub use metrics::EngineMetrics;
pub use page::page;
pub use panics::log_panics;

use prometheus::{Encoder, Registry, TextEncoder};

/// All of a registry's metrics as Prometheus' text exposition format, version 0.0.4.
pub fn exposition(registry: &Registry) -> String {
    let mut text = Vec::new();
    // Writing to memory does not fail, and what was gathered is well formed.
    let _ = TextEncoder::new().encode(&registry.gather(), &mut text);
    String::from_utf8_lossy(&text).into_owned()
}
