//! A recording of the engine at work: its steps and batches, and the lives of its sequences, with their times.
//!
//! Nobody records most of the time; then each [`Timeline::note`] is the look at one flag. While somebody does, what is
//! noted goes through a bounded channel to the one task that asked; where that cannot keep up, notes are left out and
//! counted. A sequence is noted once, when it ends; those that still live are asked of the engine at the end.

use std::{
    collections::HashSet,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::sync::{Mutex, MutexGuard, mpsc};

use crate::request::Tenant;

/// Notes on their way to whoever records.
const CHANNEL: usize = 8192;
/// Notes that a recording keeps; more are left out.
const MOST: usize = 100_000;

/// One forward pass with its sampling.
#[derive(Debug, Clone, Copy)]
pub struct Step {
    pub began: Instant,
    pub ended: Instant,
    /// Sequences that took part.
    pub rows: usize,
    pub prefill_tokens: usize,
    pub decode_tokens: usize,
    pub max_batch: usize,
}

/// What a window gathered.
#[derive(Debug, Clone, Copy)]
pub struct Batch {
    /// Since when the window had held up the longest held of its requests.
    pub opened: Instant,
    pub closed: Instant,
    pub requests: usize,
    pub prompt_tokens: usize,
}

/// What waited, ran and was kept at one time.
#[derive(Debug, Clone, Copy)]
pub struct State {
    pub at: Instant,
    pub waiting: usize,
    pub running: usize,
    pub free_blocks: usize,
    pub held_blocks: usize,
    pub cached_blocks: usize,
}

/// A sequence's course, as far as it has come.
#[derive(Debug, Clone)]
pub struct Life {
    pub sequence: u64,
    /// The id of the client's request.
    pub request: String,
    pub tenant: Arc<Tenant>,
    pub prompt_tokens: usize,
    pub cached_tokens: usize,
    pub generated: usize,
    pub arrival: Instant,
    /// When it left the queue, and how much of its wait was for the window.
    pub admitted: Option<(Instant, Duration)>,
    pub first_token: Option<Instant>,
    pub last_token: Option<Instant>,
    /// When and how it ended.
    pub ended: Option<(Instant, &'static str)>,
}

/// What the engine notes.
#[derive(Debug)]
pub enum Note {
    Step(Step),
    Batch(Batch),
    State(State),
    Ended(Life),
}

/// Somebody else is recording.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a trace is being recorded already; try again when it has ended")]
pub struct Busy;

/// The way from the engine to whoever records.
#[derive(Debug)]
pub struct Timeline {
    on: AtomicBool,
    lost: AtomicU64,
    notes: mpsc::Sender<Note>,
    /// Locked by whoever records, for as long as that takes: there is one recording at a time.
    inbox: Mutex<mpsc::Receiver<Note>>,
}

impl Default for Timeline {
    fn default() -> Self {
        let (notes, inbox) = mpsc::channel(CHANNEL);
        Self {
            on: AtomicBool::new(false),
            lost: AtomicU64::new(0),
            notes,
            inbox: Mutex::new(inbox),
        }
    }
}

impl Timeline {
    /// Takes down what `note` gives, if anybody records. Never waits.
    pub fn note(&self, note: impl FnOnce() -> Note) {
        if self.on.load(Ordering::Relaxed) && self.notes.try_send(note()).is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Begins a recording; it goes on until the session is finished or dropped.
    pub fn begin(&self) -> Result<Session<'_>, Busy> {
        let mut inbox = self.inbox.try_lock().map_err(|_| Busy)?;
        // What came after the end of an earlier recording.
        while inbox.try_recv().is_ok() {}
        self.lost.store(0, Ordering::Relaxed);
        self.on.store(true, Ordering::Relaxed);
        let recording = Recording {
            began: Instant::now(),
            ..Recording::default()
        };
        Ok(Session {
            timeline: self,
            inbox,
            recording,
        })
    }
}

/// A recording that goes on.
pub struct Session<'a> {
    timeline: &'a Timeline,
    inbox: MutexGuard<'a, mpsc::Receiver<Note>>,
    recording: Recording,
}

impl Session<'_> {
    /// Takes in what is noted until `length` has passed.
    pub async fn gather(&mut self, length: Duration) {
        let end = tokio::time::Instant::now() + length;
        while tokio::time::Instant::now() < end {
            if let Ok(Some(note)) = tokio::time::timeout_at(end, self.inbox.recv()).await {
                self.recording.take(note);
            }
        }
    }

    /// Ends the recording; `live` are the sequences that had not ended.
    pub fn finish(mut self, live: Vec<Life>) -> Recording {
        self.timeline.on.store(false, Ordering::Relaxed);
        let mut recording = std::mem::take(&mut self.recording);
        while let Ok(note) = self.inbox.try_recv() {
            recording.take(note);
        }
        let ended: HashSet<_> = recording.lives.iter().map(Life::key).collect();
        let live = live.into_iter().filter(|life| !ended.contains(&life.key()));
        recording.lives.extend(live);
        recording.ended = Instant::now();
        recording.lost += self.timeline.lost.load(Ordering::Relaxed);
        recording
    }
}

impl Drop for Session<'_> {
    fn drop(&mut self) {
        self.timeline.on.store(false, Ordering::Relaxed);
    }
}

/// What was noted, in the order in which it ended.
#[derive(Debug)]
pub struct Recording {
    pub began: Instant,
    pub ended: Instant,
    pub steps: Vec<Step>,
    pub batches: Vec<Batch>,
    pub states: Vec<State>,
    pub lives: Vec<Life>,
    /// Notes that were left out.
    pub lost: u64,
}

impl Default for Recording {
    fn default() -> Self {
        let now = Instant::now();
        Self {
            began: now,
            ended: now,
            steps: Vec::new(),
            batches: Vec::new(),
            states: Vec::new(),
            lives: Vec::new(),
            lost: 0,
        }
    }
}

impl Recording {
    fn take(&mut self, note: Note) {
        if self.steps.len() + self.batches.len() + self.states.len() + self.lives.len() >= MOST {
            self.lost += 1;
            return;
        }
        match note {
            Note::Step(step) => self.steps.push(step),
            Note::Batch(batch) => self.batches.push(batch),
            Note::State(state) => self.states.push(state),
            Note::Ended(life) => self.lives.push(life),
        }
    }
}

impl Life {
    /// Sequences are numbered by their engine; a request's id tells those of different engines apart.
    fn key(&self) -> (u64, String) {
        (self.sequence, self.request.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> Note {
        Note::State(State {
            at: Instant::now(),
            waiting: 1,
            running: 2,
            free_blocks: 3,
            held_blocks: 4,
            cached_blocks: 5,
        })
    }

    #[tokio::test]
    async fn nothing_is_made_unless_somebody_records_and_only_one_does() {
        let timeline = Timeline::default();
        timeline.note(|| unreachable!("nobody asked"));
        let session = timeline.begin().unwrap();
        assert_eq!(timeline.begin().err(), Some(Busy));
        timeline.note(state);
        // Given up: what it left behind is not the next one's.
        drop(session);
        timeline.note(|| unreachable!("nobody asks any more"));
        let mut session = timeline.begin().unwrap();
        timeline.note(state);
        session.gather(Duration::from_millis(1)).await;
        timeline.note(state);
        let recording = session.finish(Vec::new());
        assert_eq!((recording.states.len(), recording.lost), (2, 0));
    }

    #[tokio::test]
    async fn a_slow_recorder_loses_notes_and_counts_them() {
        let timeline = Timeline::default();
        let session = timeline.begin().unwrap();
        for _ in 0..CHANNEL + 7 {
            timeline.note(state);
        }
        let recording = session.finish(Vec::new());
        assert_eq!((recording.states.len(), recording.lost), (CHANNEL, 7));
    }
}
