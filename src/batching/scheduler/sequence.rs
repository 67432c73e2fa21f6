//! A request's tokens as the scheduler sees them.

use std::{sync::Arc, time::Instant};

use crate::{
    batching::BlockId,
    request::{Tenant, TokenId},
};

/// Sequences are numbered as they arrive: the smaller, the older.
pub type SequenceId = u64;

/// A request, as far as scheduling goes.
#[derive(Debug, Clone)]
pub struct Arrival {
    /// At least one token, at most `max_model_len`.
    pub prompt: Vec<TokenId>,
    /// The most tokens it may generate.
    pub max_tokens: usize,
    pub tenant: Arc<Tenant>,
    /// Smaller goes first among the tenant's own.
    pub priority: i32,
    pub arrival: Instant,
    pub deadline: Option<Instant>,
}

/// A request's tokens as the scheduler sees them.
#[derive(Debug)]
pub struct Sequence {
    pub(super) tokens: Vec<TokenId>,
    pub(super) prompt_len: usize,
    /// How many of `tokens` have their keys and values in the cache.
    pub(super) computed: usize,
    /// How many of `blocks` are full and kept for their tokens.
    pub(super) kept: usize,
    pub(super) blocks: Vec<BlockId>,
    pub(super) max_tokens: usize,
    pub(super) tenant: Arc<Tenant>,
    pub(super) arrival: Instant,
    pub(super) deadline: Option<Instant>,
    pub(super) admitted: Option<Instant>,
}

impl Sequence {
    pub(super) fn new(arrival: Arrival) -> Self {
        Self {
            prompt_len: arrival.prompt.len(),
            tokens: arrival.prompt,
            computed: 0,
            kept: 0,
            blocks: Vec::new(),
            max_tokens: arrival.max_tokens,
            tenant: arrival.tenant,
            arrival: arrival.arrival,
            deadline: arrival.deadline,
            admitted: None,
        }
    }

    /// The prompt and what was generated so far.
    pub fn tokens(&self) -> &[TokenId] {
        &self.tokens
    }

    pub fn generated(&self) -> usize {
        self.tokens.len() - self.prompt_len
    }

    /// The block table.
    pub fn blocks(&self) -> &[BlockId] {
        &self.blocks
    }
}
