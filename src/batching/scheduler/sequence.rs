//! A request's tokens as the scheduler sees them.

use std::{sync::Arc, time::Instant};

use crate::{
    batching::{BlockId, BlockPool, Namespace},
    request::{Tenant, TokenId},
};

/// Sequences are numbered as they arrive: the smaller, the older.
pub type SequenceId = u64;

/// A request, as far as scheduling goes.
#[derive(Debug, Clone)]
pub struct Arrival {
    /// At least one token, at most `max_model_len`.
    pub prompt: Vec<TokenId>,
    /// Where its blocks are found and kept.
    pub namespace: Namespace,
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
    pub(super) namespace: Namespace,
    /// How many of `tokens` have their keys and values in the cache.
    pub(super) computed: usize,
    /// How many will have them once the step under way has run.
    pub(super) planned: usize,
    /// Tokens behind `tokens` that steps under way choose.
    pub(super) awaited: usize,
    /// How many of `blocks` are full and kept for their tokens.
    pub(super) kept: usize,
    pub(super) blocks: Vec<BlockId>,
    /// How many of `tokens` were ever computed or found in the cache: more than `computed` after a preemption.
    reached: usize,
    /// How many tokens of the prompt were found in the cache before they were computed.
    cached: usize,
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
            namespace: arrival.namespace,
            computed: 0,
            planned: 0,
            awaited: 0,
            kept: 0,
            blocks: Vec::new(),
            reached: 0,
            cached: 0,
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

    /// How many tokens it has, with those that steps under way choose.
    pub(super) fn length(&self) -> usize {
        self.tokens.len() + self.awaited
    }

    /// Whether a step under way computes some of its tokens.
    pub(super) fn is_under_way(&self) -> bool {
        self.planned > self.computed
    }

    /// Whether it decodes next: all but its last token is computed, or is under way.
    pub(super) fn decodes(&self) -> bool {
        self.planned > 0 && self.planned + 1 == self.length()
    }

    /// Whether it ends with a token that a step under way chooses, whichever that is.
    pub(super) fn ends_under_way(&self, max_model_len: usize) -> bool {
        self.awaited > 0 && (self.generated() + self.awaited >= self.max_tokens || self.length() >= max_model_len)
    }

    /// Loses its blocks, and with them what a step under way is choosing for it.
    pub(super) fn start_over(&mut self) {
        self.blocks.clear();
        (self.computed, self.planned, self.awaited, self.kept) = (0, 0, 0, 0);
    }

    /// The block table.
    pub fn blocks(&self) -> &[BlockId] {
        &self.blocks
    }

    /// How many tokens of the prompt were found in the prefix cache, so far.
    pub fn cached_tokens(&self) -> usize {
        self.cached
    }

    /// The next full block that the cache might have: where it would be found, and its tokens. The last token is never
    /// looked for, so that it is computed and there are logits.
    pub(super) fn next_block(&self, block_size: usize) -> Option<NextBlock<'_>> {
        let start = self.kept * block_size;
        let end = start + block_size;
        (end < self.tokens.len()).then(|| (&self.namespace, self.last_kept(), &self.tokens[start..end]))
    }

    fn last_kept(&self) -> Option<BlockId> {
        self.kept.checked_sub(1).map(|last| self.blocks[last])
    }

    /// Takes hold of the blocks that the cache has for its next tokens.
    pub(super) fn take_cached(&self, pool: &mut BlockPool) -> Vec<BlockId> {
        // The last token is computed in any case.
        let known = &self.tokens[..self.tokens.len() - 1];
        let wanted = known.get(self.kept * pool.block_size()..).unwrap_or_default();
        pool.take(&self.namespace, self.arrival, self.last_kept(), wanted)
    }

    /// Goes on with blocks from [`Self::take_cached`], in place of its own that were to hold the same tokens; nothing of
    /// it is under way. Gives how many tokens of the prompt this saves.
    pub(super) fn accept(&mut self, cached: Vec<BlockId>, pool: &mut BlockPool) -> usize {
        if cached.is_empty() {
            return 0;
        }
        let replaced = self.kept..self.blocks.len().min(self.kept + cached.len());
        self.kept += cached.len();
        self.computed = self.kept * pool.block_size();
        self.planned = self.computed;
        let own: Vec<_> = self.blocks.splice(replaced, cached).collect();
        pool.release(&own);
        let saved = self.computed.min(self.prompt_len).saturating_sub(self.reached);
        self.reached = self.reached.max(self.computed);
        self.cached += saved;
        saved
    }

    /// Its tokens up to `end` are computed: keeps the blocks that are full now.
    pub(super) fn compute(&mut self, end: usize, pool: &mut BlockPool) -> Computed {
        let start = std::mem::replace(&mut self.computed, end);
        let (first_new, prompt) = (self.reached.clamp(start, end), self.prompt_len.clamp(start, end));
        self.reached = self.reached.max(end);
        let size = pool.block_size();
        while (self.kept + 1) * size <= end {
            let index = self.kept;
            let tokens = &self.tokens[index * size..(index + 1) * size];
            self.blocks[index] = pool.keep(
                &self.namespace,
                self.arrival,
                self.last_kept(),
                tokens,
                self.blocks[index],
            );
            self.kept += 1;
        }
        Computed {
            recomputed: first_new - start,
            prefill: prompt.saturating_sub(first_new),
            decode: end - prompt.max(first_new),
        }
    }
}

/// Where a block would be found: its namespace, the block above, its tokens.
pub(super) type NextBlock<'a> = (&'a Namespace, Option<BlockId>, &'a [TokenId]);

/// Tokens that a step computed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Computed {
    /// Of prompts, for the first time.
    pub prefill: usize,
    /// Generated ones, for the first time.
    pub decode: usize,
    /// Once more, after a preemption.
    pub recomputed: usize,
}

impl std::ops::AddAssign for Computed {
    fn add_assign(&mut self, more: Self) {
        self.prefill += more.prefill;
        self.decode += more.decode;
        self.recomputed += more.recomputed;
    }
}
