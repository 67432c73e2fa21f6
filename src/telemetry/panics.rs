//! What is logged of a panic: where it was, and in which thread. What it says may quote what a client sent (a slice of a
//! text out of its bounds does), so that only `trace` shows it.

use std::backtrace::Backtrace;
use std::panic::PanicHookInfo;

/// Logs panics from now on as everything else is logged, in place of printing them.
pub fn log_panics() {
    std::panic::set_hook(Box::new(log));
}

fn log(panic: &PanicHookInfo) {
    let location = panic.location().map(tracing::field::display);
    let thread = std::thread::current();
    tracing::error!(location, thread = thread.name(), "a thread panicked");
    tracing::trace!(%panic, backtrace = %Backtrace::capture(), "what it panicked with");
}
