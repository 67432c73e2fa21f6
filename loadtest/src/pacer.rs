//! A thread that hands things over at their times.
//!
//! An asynchronous runtime's timer counts milliseconds; a thread that sleeps wakes within some hundred microseconds.

use std::{
    thread,
    time::{Duration, Instant},
};

use tokio::sync::mpsc;

/// A sleep this short may end too late for several items: a processor that rests takes time to wake, on a virtual machine
/// milliseconds. Where items follow one another so closely, this thread stays awake, and yields to whoever has work.
const SHORT: Duration = Duration::from_millis(5);

/// Sends each item at its instant, in order; ends when the receiver is dropped. Items are made on this thread, each
/// before its time has come.
pub fn pace<T: Send + 'static>(
    items: impl Iterator<Item = (Instant, T)> + Send + 'static,
) -> mpsc::UnboundedReceiver<T> {
    let (sender, receiver) = mpsc::unbounded_channel();
    thread::spawn(move || {
        for (at, item) in items {
            wait_until(at);
            if sender.send(item).is_err() {
                break;
            }
        }
    });
    receiver
}

fn wait_until(at: Instant) {
    let left = at.saturating_duration_since(Instant::now());
    if left >= SHORT {
        thread::sleep(left);
    }
    while Instant::now() < at {
        thread::yield_now();
    }
}
