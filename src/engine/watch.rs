//! What watches an engine from outside its thread: its pulse, who waits for it, and how it ended.
//!
//! A thread that hangs can tell nobody, so what is needed to tell its clients lies here and not with it.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::sync::{mpsc::WeakUnboundedSender, oneshot};

use crate::request::{Event, Failure, Request};

/// How an engine's thread ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// Nobody could send requests any more, and all had ended.
    Finished,
    /// It panicked. What it panicked with.
    Panicked(String),
    /// A step ran for longer than the step timeout; the thread is left to itself and does nothing more when it wakes.
    Hung,
    /// The device does not answer any more, in the driver's words.
    DeviceLost(String),
}

impl End {
    /// What those who waited are told, unless all have their answers.
    fn failure(&self) -> Option<Failure> {
        match self {
            Self::Finished => None,
            Self::Panicked(_) => Some(Failure::EngineLost("it failed".into())),
            Self::Hung => Some(Failure::EngineLost("a step took too long".into())),
            Self::DeviceLost(reason) => Some(Failure::EngineLost(format!("its device was lost: {reason}"))),
        }
    }
}

/// Written by the engine thread, read by its [`Guard`]; neither waits for the other.
#[derive(Debug)]
pub(super) struct Pulse {
    origin: Instant,
    /// Milliseconds from `origin` to the last sign of life, plus one; 0 while the thread waits for requests.
    beat: AtomicU64,
    abandoned: AtomicBool,
}

impl Pulse {
    fn new() -> Self {
        Self {
            origin: Instant::now(),
            beat: AtomicU64::new(0),
            abandoned: AtomicBool::new(false),
        }
    }

    /// The thread begins a piece of work that should not take long.
    pub fn beat(&self) {
        self.beat.store(self.now() + 1, Ordering::Relaxed);
    }

    /// The thread waits for requests, for as long as it takes.
    pub fn rest(&self) {
        self.beat.store(0, Ordering::Relaxed);
    }

    /// The engine is lost; whoever waits is told after this.
    pub fn abandon(&self) {
        self.abandoned.store(true, Ordering::Release);
    }

    /// Whether the engine is lost. Its thread, if it still runs, is to end and touch nothing.
    pub fn abandoned(&self) -> bool {
        self.abandoned.load(Ordering::Acquire)
    }

    fn now(&self) -> u64 {
        self.origin.elapsed().as_millis() as u64
    }

    fn silent_for(&self) -> Duration {
        match self.beat.load(Ordering::Relaxed) {
            0 => Duration::ZERO,
            beat => Duration::from_millis(self.now().saturating_sub(beat - 1)),
        }
    }
}

/// Everyone who waits for an engine. A lock, because a hung thread cannot be asked, and because a request must either
/// enter before the engine is given up, and be told, or be refused.
#[derive(Debug)]
pub(super) struct Waiters(Mutex<Option<Entered>>);

#[derive(Debug, Default)]
struct Entered {
    events: Vec<WeakUnboundedSender<Event>>,
    /// How long `events` may grow before those that ended are taken out.
    limit: usize,
}

impl Waiters {
    fn new() -> Self {
        Self(Mutex::new(Some(Entered::default())))
    }

    /// Notes who is to be told; false if the engine has been given up.
    pub fn enter(&self, requests: &[Request]) -> bool {
        let mut entered = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(Entered { events, limit }) = entered.as_mut() else {
            return false;
        };
        if events.len() > *limit {
            events.retain(|sender| sender.strong_count() > 0);
            *limit = (2 * events.len()).max(256);
        }
        events.extend(requests.iter().map(|request| request.events.downgrade()));
        true
    }

    /// Tells everyone who still waits, and lets nobody in from now on.
    pub fn close(&self, failure: &Failure) {
        let entered = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        for sender in entered.into_iter().flat_map(|entered| entered.events) {
            // The sender of a request that has its answer is gone, or its receiver is.
            if let Some(sender) = sender.upgrade() {
                let _ = sender.send(Event::Failed(failure.clone()));
            }
        }
    }
}

/// What an engine thread and those outside it share.
#[derive(Debug, Clone)]
pub(super) struct Watch {
    pub pulse: Arc<Pulse>,
    pub waiters: Arc<Waiters>,
}

impl Watch {
    pub fn new() -> Self {
        Self {
            pulse: Arc::new(Pulse::new()),
            waiters: Arc::new(Waiters::new()),
        }
    }

    /// Unless the engine ended as it should, everyone who waits for it is told how it did.
    pub fn tell(&self, end: &End) {
        if let Some(failure) = end.failure() {
            self.pulse.abandon();
            self.waiters.close(&failure);
        }
    }
}

/// Watches one engine thread.
#[derive(Debug)]
pub struct Guard {
    pub(super) watch: Watch,
    pub(super) ended: oneshot::Receiver<End>,
    pub(super) step_timeout: Duration,
}

impl Guard {
    /// Waits until the engine has ended, or has given no sign of life for the step timeout. Whoever waited for it has
    /// then been told.
    pub async fn wait(mut self) -> End {
        let often = (self.step_timeout / 4).clamp(Duration::from_millis(5), Duration::from_secs(1));
        let mut look = tokio::time::interval(often);
        loop {
            tokio::select! {
                ended = &mut self.ended => {
                    return ended.unwrap_or_else(|_| End::Panicked("the thread ended without a word".into()));
                }
                _ = look.tick() => {
                    if self.watch.pulse.silent_for() > self.step_timeout {
                        return self.give_up();
                    }
                }
            }
        }
    }

    fn give_up(&self) -> End {
        self.watch.tell(&End::Hung);
        End::Hung
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::mpsc;

    use super::*;
    use crate::engine::tests::{greedy, request};

    #[test]
    fn those_who_wait_are_told_once_and_nobody_enters_after_them() {
        let watch = Watch::new();
        let (waiting, mut told) = request(vec![1], greedy(1));
        let (answered, mut done) = request(vec![1], greedy(1));
        assert!(watch.waiters.enter(std::slice::from_ref(&waiting)));
        assert!(watch.waiters.enter(std::slice::from_ref(&answered)));
        drop(answered);
        watch.tell(&End::Finished);
        assert!(told.try_recv().is_err());
        watch.tell(&End::Hung);
        watch.tell(&End::Hung);
        assert!(matches!(told.try_recv(), Ok(Event::Failed(Failure::EngineLost(_)))));
        assert_eq!(told.try_recv(), Err(mpsc::error::TryRecvError::Empty));
        assert_eq!(done.try_recv(), Err(mpsc::error::TryRecvError::Disconnected));
        assert!(watch.pulse.abandoned() && !watch.waiters.enter(&[waiting]));
    }

    #[tokio::test]
    async fn a_thread_that_rests_is_not_given_up_and_one_that_is_silent_in_its_work_is() {
        let watch = Watch::new();
        let (_thread, ended) = oneshot::channel();
        let guard = Guard {
            watch: watch.clone(),
            ended,
            step_timeout: Duration::from_millis(20),
        };
        let guarding = tokio::spawn(guard.wait());
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(!guarding.is_finished() && !watch.pulse.abandoned());
        watch.pulse.beat();
        assert_eq!(guarding.await.unwrap(), End::Hung);
        assert!(watch.pulse.abandoned());
    }
}
