//! A thread that hands things over at their times.
//!
//! An asynchronous runtime's timer counts milliseconds; a thread that sleeps wakes within some ten microseconds.

use std::{thread, time::Instant};

use tokio::sync::mpsc;

/// Sends each item at its instant, in order; ends when the receiver is dropped. Items are made on this thread, each
/// before its time has come.
pub fn pace<T: Send + 'static>(
    items: impl Iterator<Item = (Instant, T)> + Send + 'static,
) -> mpsc::UnboundedReceiver<T> {
    let (sender, receiver) = mpsc::unbounded_channel();
    thread::spawn(move || {
        for (at, item) in items {
            thread::sleep(at.saturating_duration_since(Instant::now()));
            if sender.send(item).is_err() {
                break;
            }
        }
    });
    receiver
}
