//! The KV blocks: which are free, who holds them, which are kept for their tokens.
//!
//! Paging after Kwon et al. 2023 (PagedAttention, section 4): a sequence's keys and values lie in blocks of a fixed
//! number of slots, found through its block table. Blocks are counted by holder, so that sequences can share them.

use std::time::Instant;

use super::{
    Namespace,
    prefix::{CachedPrefix, NodeId, PrefixTree},
};
use crate::request::TokenId;

/// A block's index in the KV pool.
pub type BlockId = u32;

/// All blocks of the KV pool. Each is free, held by one or more sequences, or cached: held by none and kept for its
/// tokens until its memory is needed. A block that a pinned prompt holds stays until the prompt is unpinned.
#[derive(Debug)]
pub struct BlockPool {
    block_size: usize,
    /// Taken from the end, so that the pages last used are used again first.
    free: Vec<BlockId>,
    holders: Vec<u32>,
    prefix: Option<PrefixTree>,
}

/// How many blocks are in each state; they add up to the pool.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BlockCounts {
    pub free: usize,
    /// Held by sequences, and not pinned.
    pub held: usize,
    /// Held by nobody, and not pinned.
    pub cached: usize,
    pub pinned: usize,
}

/// What the prefix cache holds for good, and what it gave up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PinCounts {
    /// The most blocks that pinned prompts may hold.
    pub budget: usize,
    /// Blocks that pinned prompts hold.
    pub asked: usize,
    /// Blocks kept because many requests used them.
    pub automatic: usize,
    /// Cached blocks given up since the start.
    pub evictions: u64,
}

impl BlockPool {
    /// A pool of `blocks` free blocks of `block_size` slots each.
    pub fn new(blocks: usize, block_size: usize, prefix_cache: bool) -> Self {
        Self {
            block_size,
            free: (0..blocks as BlockId).rev().collect(),
            holders: vec![0; blocks],
            prefix: prefix_cache.then(|| PrefixTree::new(block_size)),
        }
    }

    /// Lets pinned prompts hold so many blocks; without a prefix cache there are none.
    pub fn with_pin_budget(mut self, blocks: usize) -> Self {
        self.set_pin_budget(blocks);
        self
    }

    /// Lowers the budget for pinned prompts so that a sequence of `tokens` tokens always finds room beside them.
    pub fn leave_room_for(&mut self, tokens: usize) {
        let most = self.holders.len().saturating_sub(self.blocks_for(tokens));
        self.set_pin_budget(self.pins().budget.min(most));
    }

    fn set_pin_budget(&mut self, blocks: usize) {
        if let Some(tree) = &mut self.prefix {
            tree.set_pin_budget(blocks);
        }
    }

    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// How many blocks `tokens` tokens take.
    pub fn blocks_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.block_size)
    }

    /// How many tokens fit if one sequence had the pool to itself.
    pub fn capacity(&self) -> usize {
        self.holders.len() * self.block_size
    }

    /// How many blocks [`Self::allocate`] can still give.
    pub fn available(&self) -> usize {
        self.free.len() + self.prefix.as_ref().map_or(0, PrefixTree::idle)
    }

    pub fn counts(&self) -> BlockCounts {
        let free = self.free.len();
        let pins = self.pins();
        let pinned = pins.asked + pins.automatic;
        let cached = self.prefix.as_ref().map_or(0, PrefixTree::cached);
        BlockCounts {
            free,
            cached,
            pinned,
            held: self.holders.len() - free - cached - pinned,
        }
    }

    pub fn pins(&self) -> PinCounts {
        self.prefix.as_ref().map_or(PinCounts::default(), |tree| PinCounts {
            budget: tree.pin_budget(),
            asked: tree.pinned(),
            automatic: tree.protected(),
            evictions: tree.evictions(),
        })
    }

    pub fn has_prefix_cache(&self) -> bool {
        self.prefix.is_some()
    }

    /// The prefixes that a tenant may be told of, in no order. Looks at every block.
    pub fn prefixes(&self, reader: &str) -> Vec<CachedPrefix> {
        self.prefix.as_ref().map_or_else(Vec::new, |tree| tree.prefixes(reader))
    }

    /// A block for a sequence to write into; the caller holds it. Gives up the least recently used cached block when
    /// none is free, and `None` when every block is held.
    pub fn allocate(&mut self) -> Option<BlockId> {
        let block = match self.free.pop() {
            Some(block) => block,
            None => self.prefix.as_mut()?.evict()?,
        };
        self.holders[block as usize] = 1;
        Some(block)
    }

    /// The longest cached run of full blocks that holds the beginning of `tokens` below the block `above` (`None`: from
    /// the prompt's start), in order; the request that arrived at `arrival` now holds each of them.
    pub fn take(
        &mut self,
        namespace: &Namespace,
        arrival: Instant,
        above: Option<BlockId>,
        tokens: &[TokenId],
    ) -> Vec<BlockId> {
        let Some(tree) = &mut self.prefix else {
            return Vec::new();
        };
        let found = tree.find(namespace, above, tokens);
        for &block in &found {
            tree.hold(block, arrival);
            self.holders[block as usize] += 1;
        }
        found
    }

    /// Keeps a full block for its tokens. `above` is the sequence's preceding block (`None` for its first), itself kept
    /// and held, or forgotten since: then the block is not kept. Gives the block the sequence now holds in its place:
    /// where another sequence has computed the same tokens first, its block, the duplicate being freed.
    pub fn keep(
        &mut self,
        namespace: &Namespace,
        arrival: Instant,
        above: Option<BlockId>,
        tokens: &[TokenId],
        block: BlockId,
    ) -> BlockId {
        let Some(tree) = &mut self.prefix else { return block };
        let kept = tree.keep(namespace, above, tokens, block, arrival);
        if kept != block {
            tree.hold(kept, arrival);
            self.holders[kept as usize] += 1;
            self.release(&[block]);
        }
        kept
    }

    /// Whether all of these blocks are kept for their tokens.
    pub fn are_kept(&self, blocks: &[BlockId]) -> bool {
        let tree = self.prefix.as_ref();
        blocks
            .iter()
            .all(|&block| tree.is_some_and(|tree| tree.contains(block)))
    }

    /// From now on nobody finds the blocks of a sequence, nor what goes on from them. Whoever holds any of them for later
    /// is to let go.
    pub fn forget(&mut self, blocks: &[BlockId]) {
        if let (Some(tree), Some(&first)) = (&mut self.prefix, blocks.first()) {
            self.free.extend(tree.forget(first));
        }
    }

    /// Every block kept for its tokens, those in use first, then the most recently used; a block comes after those above
    /// it.
    pub fn kept_by_use(&self) -> Vec<NodeId> {
        self.prefix.as_ref().map_or_else(Vec::new, PrefixTree::by_use)
    }

    /// The namespace of a kept block, the block above and its tokens, if it is still kept for them.
    pub fn kept(&self, id: NodeId) -> Option<(&Namespace, Option<BlockId>, &[TokenId])> {
        self.prefix.as_ref()?.get(id)
    }

    /// Lets go of a sequence's blocks, the last first, so that a prompt's beginning is what stays cached longest.
    pub fn release(&mut self, blocks: &[BlockId]) {
        for &block in blocks.iter().rev() {
            let holders = &mut self.holders[block as usize];
            *holders -= 1;
            if *holders > 0 {
                continue;
            }
            match &mut self.prefix {
                Some(tree) if tree.contains(block) => tree.release(block),
                _ => self.free.push(block),
            }
        }
    }

    /// How many blocks pinning the kept blocks `blocks` would take from the budget, with those that a prompt of
    /// `tokens` tokens has beyond them.
    pub fn unpinned(&self, blocks: &[BlockId], tokens: usize) -> usize {
        let pinned = self.prefix.as_ref().map_or(0, |tree| tree.pinned_among(blocks));
        self.blocks_for(tokens) - pinned
    }

    /// The cached run that holds the beginning of `tokens`, without holding it.
    pub fn look_up(&self, namespace: &Namespace, tokens: &[TokenId]) -> Vec<BlockId> {
        self.prefix
            .as_ref()
            .map_or_else(Vec::new, |tree| tree.find(namespace, None, tokens))
    }

    /// A pinned prompt takes over a sequence's blocks, all of them kept.
    pub fn pin(&mut self, blocks: &[BlockId]) {
        if let Some(tree) = &mut self.prefix {
            blocks.iter().for_each(|&block| tree.pin(block));
        }
    }

    /// A pinned prompt lets go of its blocks.
    pub fn unpin(&mut self, blocks: &[BlockId]) {
        if let Some(tree) = &mut self.prefix {
            blocks.iter().for_each(|&block| tree.unpin(block));
        }
        self.release(blocks);
    }
}

#[cfg(test)]
#[path = "blocks_tests.rs"]
mod tests;
