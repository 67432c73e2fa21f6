//! The window: how long the oldest waiting request may be kept waiting for company.

use std::time::{Duration, Instant};

use super::WindowPolicy;

/// What the decision to close looks at.
#[derive(Debug, Clone, Copy)]
pub struct Waiting {
    /// Requests that wait.
    pub count: usize,
    /// When the oldest of them arrived.
    pub oldest_arrival: Instant,
    /// The earliest deadline among them.
    pub deadline: Option<Instant>,
    /// Whether the device has nothing else to run.
    pub device_idle: bool,
}

/// When the waiting requests become a batch: a time not after `now` means now.
///
/// `service` is how long a request takes once it is admitted, as far as is known: a batch that closed any later than
/// that before a deadline would miss it.
pub fn closes_at(
    policy: WindowPolicy,
    window: Duration,
    max_batch: usize,
    waiting: Waiting,
    service: Duration,
    now: Instant,
) -> Instant {
    let full = waiting.count >= max_batch;
    let timeout = waiting.oldest_arrival + window;
    match policy {
        _ if full => now,
        WindowPolicy::None => now,
        WindowPolicy::Fixed => timeout,
        WindowPolicy::Adaptive if waiting.device_idle => now,
        WindowPolicy::Adaptive => {
            let latest = waiting
                .deadline
                .map(|deadline| deadline.checked_sub(service).unwrap_or(now));
            latest.map_or(timeout, |latest| latest.min(timeout))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WINDOW: Duration = Duration::from_millis(20);
    const SERVICE: Duration = Duration::from_millis(100);

    /// Milliseconds from the oldest arrival to closing, asked 5 ms after it.
    fn closing(policy: WindowPolicy, count: usize, deadline_ms: Option<u64>, device_idle: bool) -> u128 {
        let oldest_arrival = Instant::now();
        let deadline = deadline_ms.map(|ms| oldest_arrival + Duration::from_millis(ms));
        let waiting = Waiting {
            count,
            oldest_arrival,
            deadline,
            device_idle,
        };
        let now = oldest_arrival + Duration::from_millis(5);
        closes_at(policy, WINDOW, 100, waiting, SERVICE, now)
            .duration_since(oldest_arrival)
            .as_millis()
    }

    #[test]
    fn fixed_waits_the_window_out_unless_full() {
        assert_eq!(closing(WindowPolicy::Fixed, 99, Some(10), true), 20);
        assert_eq!(closing(WindowPolicy::Fixed, 100, None, false), 5);
    }

    #[test]
    fn none_never_waits() {
        assert_eq!(closing(WindowPolicy::None, 1, None, false), 5);
    }

    #[test]
    fn adaptive_does_not_idle_the_device() {
        assert_eq!(closing(WindowPolicy::Adaptive, 1, None, true), 5);
        assert_eq!(closing(WindowPolicy::Adaptive, 1, None, false), 20);
    }

    #[test]
    fn adaptive_closes_in_time_for_a_deadline() {
        assert_eq!(closing(WindowPolicy::Adaptive, 1, Some(112), false), 12);
        assert_eq!(closing(WindowPolicy::Adaptive, 1, Some(500), false), 20);
    }
}
