//! What is logged, changed while the program runs.

use std::sync::OnceLock;

use tracing_subscriber::{EnvFilter, reload};

/// Sets the filter of the process's log lines. There is one, as there is one standard error.
static CHANGE: OnceLock<Box<dyn Fn(EnvFilter) + Send + Sync>> = OnceLock::new();

/// A filter for log lines that [`set`] changes. `level` was read once already, when the setting was.
pub fn filter<S: 'static>(level: &str) -> reload::Layer<EnvFilter, S> {
    let (filter, handle) = reload::Layer::new(EnvFilter::new(level));
    // Only the first filter is the process's. It lives as long as the process, so changing it cannot fail.
    let _ = CHANGE.set(Box::new(move |filter| drop(handle.reload(filter))));
    filter
}

/// Logs what `level` says from now on.
pub fn set(level: &str) {
    if let Some(change) = CHANGE.get() {
        change(EnvFilter::new(level));
    }
}
