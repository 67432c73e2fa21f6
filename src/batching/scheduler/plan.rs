//! What a step runs, and what planning it changed.

use std::time::{Duration, Instant};

use super::SequenceId;

/// What one step runs, and what planning it changed.
#[derive(Debug, Default)]
pub struct Plan {
    /// Tokens to run, each sequence at most once.
    pub rows: Vec<Row>,
    /// Requests that left the queue.
    pub admitted: Vec<Admission>,
    /// Batches that closed.
    pub batches: Vec<Batch>,
    /// Sequences whose deadline passed; they are gone.
    pub expired: Vec<SequenceId>,
    /// Prompt tokens found in the prefix cache and not computed before, of all sequences.
    pub cached_tokens: usize,
    /// With no rows: when there may be some without a new arrival.
    pub wake: Option<Instant>,
}

impl Plan {
    /// How many tokens it runs.
    pub fn tokens(&self) -> usize {
        self.rows.iter().map(|row| row.len).sum()
    }
}

/// A run of one sequence's tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    pub id: SequenceId,
    /// Position of the first token.
    pub start: usize,
    pub len: usize,
    /// Whether the run reaches the sequence's end, so that its last logits give the next token.
    pub samples: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Admission {
    pub id: SequenceId,
    /// How much of its wait was for the window, with room for it to run.
    pub window: Duration,
    /// Prompt tokens found in the prefix cache so far; more may be found while it is prefilled.
    pub cached_tokens: usize,
}

/// What a closed batch gathered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Batch {
    pub requests: usize,
    pub prompt_tokens: usize,
    /// Positions that a padded layout would compute: every prompt as long as the longest.
    pub padded_tokens: usize,
}
