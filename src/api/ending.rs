//! How the HTTP side ends: what generates is counted, nothing new begins, and what is not done in time is cut off.

use std::sync::Arc;

use tokio::sync::watch;

/// Counts what generates, and says how far the end has come.
#[derive(Debug, Clone)]
pub(super) struct Ending(Arc<watch::Sender<State>>);

#[derive(Debug, Clone, Copy, Default)]
struct State {
    /// Generations that have begun and whose response has not ended.
    running: usize,
    stopping: bool,
    cut: bool,
}

/// One generation, from its beginning to its drop.
#[derive(Debug)]
pub(super) struct Running {
    ending: Ending,
    changes: watch::Receiver<State>,
}

impl Ending {
    pub fn new() -> Self {
        Self(Arc::new(watch::Sender::new(State::default())))
    }

    /// Nothing begins from now on.
    pub fn stop(&self) {
        self.0.send_modify(|state| state.stopping = true);
    }

    pub fn stopping(&self) -> bool {
        self.0.borrow().stopping
    }

    /// Counts one more generation; `None` once the server is stopping.
    pub fn begin(&self) -> Option<Running> {
        let begun = self.0.send_if_modified(|state| {
            state.running += usize::from(!state.stopping);
            !state.stopping
        });
        begun.then(|| Running {
            ending: self.clone(),
            changes: self.0.subscribe(),
        })
    }

    /// Completes when nothing generates.
    pub async fn idle(&self) {
        // The sender lives in `self`, so this cannot fail.
        let _ = self.0.subscribe().wait_for(|state| state.running == 0).await;
    }

    /// Ends every generation that still runs; gives how many.
    pub fn cut(&self) -> usize {
        let mut running = 0;
        self.0.send_modify(|state| {
            state.cut = true;
            running = state.running;
        });
        running
    }
}

impl Running {
    /// Completes when the generation is to end, done or not.
    pub async fn cut(&mut self) {
        // The sender lives in `self`, so this cannot fail.
        let _ = self.changes.wait_for(|state| state.cut).await;
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.ending.0.send_modify(|state| state.running -= 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn is_idle_when_the_last_has_ended_and_lets_none_begin() {
        let ending = Ending::new();
        ending.idle().await;
        let (one, mut two) = (ending.begin().unwrap(), ending.begin().unwrap());
        ending.stop();
        assert!(ending.stopping() && ending.begin().is_none());
        let mut idle = tokio::spawn({
            let ending = ending.clone();
            async move { ending.idle().await }
        });
        drop(one);
        tokio::task::yield_now().await;
        assert!(!idle.is_finished());
        assert_eq!(ending.cut(), 1);
        two.cut().await;
        drop(two);
        (&mut idle).await.unwrap();
    }
}
