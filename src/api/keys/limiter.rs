//! So many a minute, with refunds: governor's limiter over a store that this module can settle afterwards.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use governor::clock::{Clock, MonotonicClock, Reference};
use governor::middleware::NoOpMiddleware;
use governor::nanos::Nanos;
use governor::state::{InMemoryState, NotKeyed, StateStore};
use governor::{Quota, RateLimiter};

const MINUTE: Duration = Duration::from_secs(60);

/// A quota that fills continuously, at most a minute's worth (the generic cell rate algorithm, as a leaky bucket).
#[derive(Debug)]
pub(super) struct Limiter<C: Clock = MonotonicClock> {
    limit: NonZeroU32,
    /// In how long one is earned.
    each: Duration,
    rate: RateLimiter<NotKeyed, Ledger, C, NoOpMiddleware<C::Instant>>,
    ledger: Ledger,
    clock: C,
    start: C::Instant,
}

/// governor's own state, shared so that what was charged too much or too little can be settled: it holds the time at
/// which the quota will be whole again.
#[derive(Debug, Clone, Default)]
struct Ledger(Arc<InMemoryState>);

impl StateStore for Ledger {
    type Key = NotKeyed;

    fn measure_and_replace<T, F, E>(&self, key: &NotKeyed, f: F) -> Result<T, E>
    where
        F: Fn(Option<Nanos>) -> Result<(T, Nanos), E>,
    {
        self.0.measure_and_replace(key, f)
    }
}

/// Why nothing was charged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Exceeded {
    /// It will fit after this long, if nobody else takes it.
    Until(Duration),
    /// It is more than a whole minute's quota.
    Never,
}

/// What is left of a quota.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Left {
    pub limit: u32,
    pub remaining: u32,
    /// Until the quota is whole again.
    pub reset: Duration,
}

impl Limiter {
    pub fn a_minute(limit: NonZeroU32) -> Self {
        Self::with_clock(limit, MonotonicClock)
    }
}

impl<C: Clock + Clone> Limiter<C> {
    fn with_clock(limit: NonZeroU32, clock: C) -> Self {
        let ledger = Ledger::default();
        Self {
            limit,
            each: MINUTE / limit.get(),
            start: clock.now(),
            rate: RateLimiter::new(Quota::per_minute(limit), ledger.clone(), clock.clone()),
            ledger,
            clock,
        }
    }

    pub fn limit(&self) -> NonZeroU32 {
        self.limit
    }

    /// Takes `count` out of the quota, or nothing.
    pub fn charge(&self, count: NonZeroU32) -> Result<(), Exceeded> {
        match self.rate.check_n(count) {
            Ok(Ok(())) => Ok(()),
            Ok(Err(until)) => Err(Exceeded::Until(until.wait_time_from(self.clock.now()))),
            Err(_) => Err(Exceeded::Never),
        }
    }

    /// Corrects a charge: what was not used comes back at once; what was used beyond it is owed, and is earned before
    /// anything else is.
    pub fn settle(&self, charged: u64, used: u64) {
        let now = self.now();
        let worth = |count: u64| {
            u64::try_from(self.each.as_nanos())
                .unwrap_or(u64::MAX)
                .saturating_mul(count)
        };
        let settled = self.ledger.measure_and_replace(&NotKeyed::NonKey, |whole_at| {
            let whole_at = whole_at.unwrap_or_default().max(now).as_u64();
            let corrected = if used > charged {
                whole_at.saturating_add(worth(used - charged))
            } else {
                whole_at.saturating_sub(worth(charged - used))
            };
            Ok::<_, std::convert::Infallible>(((), Nanos::from(corrected)))
        });
        let Ok(()) = settled;
    }

    pub fn left(&self) -> Left {
        // An error leaves the state as it is: this only reads.
        let whole_at = self
            .ledger
            .measure_and_replace(&NotKeyed::NonKey, Err::<((), Nanos), _>);
        let whole_at = whole_at.err().flatten().unwrap_or_default();
        let reset = Duration::from(whole_at.saturating_sub(self.now()));
        let missing = reset.as_nanos().div_ceil(self.each.as_nanos().max(1));
        let missing = u32::try_from(missing).unwrap_or(u32::MAX);
        Left {
            limit: self.limit.get(),
            remaining: self.limit.get().saturating_sub(missing),
            reset,
        }
    }

    fn now(&self) -> Nanos {
        self.clock.now().duration_since(self.start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use governor::clock::FakeRelativeClock;

    fn limiter(limit: u32) -> (Limiter<FakeRelativeClock>, FakeRelativeClock) {
        let clock = FakeRelativeClock::default();
        // The limiter takes "nothing yet" and "whole at time zero" for the same.
        let limiter = Limiter::with_clock(count(limit), clock.clone());
        clock.advance(Duration::from_secs(1));
        (limiter, clock)
    }

    fn count(count: u32) -> NonZeroU32 {
        NonZeroU32::new(count).unwrap()
    }

    fn left(limiter: &Limiter<FakeRelativeClock>) -> (u32, Duration) {
        let left = limiter.left();
        (left.remaining, left.reset)
    }

    #[test]
    fn a_minute_is_spent_and_earned_back() {
        let (limiter, clock) = limiter(60);
        assert_eq!(left(&limiter), (60, Duration::ZERO));
        limiter.charge(count(45)).unwrap();
        assert_eq!(left(&limiter), (15, Duration::from_secs(45)));
        assert_eq!(limiter.charge(count(20)), Err(Exceeded::Until(Duration::from_secs(5))));
        assert_eq!(left(&limiter), (15, Duration::from_secs(45)));
        clock.advance(Duration::from_secs(5));
        limiter.charge(count(20)).unwrap();
        assert_eq!(left(&limiter), (0, MINUTE));
        clock.advance(Duration::from_secs(100));
        assert_eq!(left(&limiter), (60, Duration::ZERO));
        assert_eq!(limiter.charge(count(61)), Err(Exceeded::Never));
    }

    #[test]
    fn what_was_not_used_comes_back_and_what_was_used_beyond_is_owed() {
        let (limiter, clock) = limiter(60);
        limiter.charge(count(60)).unwrap();
        limiter.settle(60, 10);
        assert_eq!(left(&limiter), (50, Duration::from_secs(10)));
        limiter.charge(count(50)).unwrap();
        limiter.settle(50, 80);
        assert_eq!(left(&limiter), (0, Duration::from_secs(90)));
        assert_eq!(limiter.charge(count(1)), Err(Exceeded::Until(Duration::from_secs(31))));
        clock.advance(Duration::from_secs(31));
        limiter.charge(count(1)).unwrap();
    }

    #[test]
    fn a_refund_never_gives_more_than_a_minute() {
        let (limiter, clock) = limiter(60);
        limiter.charge(count(30)).unwrap();
        clock.advance(Duration::from_secs(30));
        limiter.settle(30, 0);
        assert_eq!(left(&limiter), (60, Duration::ZERO));
        assert_eq!(limiter.charge(count(60)), Ok(()));
        assert!(limiter.charge(count(1)).is_err());
    }
}
