//! The KV blocks: which are free, who holds them, which are kept for their tokens.
//!
//! Paging after Kwon et al. 2023 (PagedAttention, section 4): a sequence's keys and values lie in blocks of a fixed
//! number of slots, found through its block table. Blocks are counted by holder, so that sequences can share them.

use super::prefix::{NodeId, PrefixTree};
use crate::request::TokenId;

/// A block's index in the KV pool.
pub type BlockId = u32;

/// All blocks of the KV pool. Each is free, held by one or more sequences, or cached: held by none and kept for its
/// tokens until its memory is needed.
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
    pub held: usize,
    pub cached: usize,
}

impl BlockPool {
    /// A pool of `blocks` free blocks of `block_size` slots each.
    pub fn new(blocks: usize, block_size: usize, prefix_cache: bool) -> Self {
        Self {
            block_size,
            free: (0..blocks as BlockId).rev().collect(),
            holders: vec![0; blocks],
            prefix: prefix_cache.then(PrefixTree::default),
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
        self.free.len() + self.cached()
    }

    pub fn counts(&self) -> BlockCounts {
        let (free, cached) = (self.free.len(), self.cached());
        BlockCounts {
            free,
            cached,
            held: self.holders.len() - free - cached,
        }
    }

    fn cached(&self) -> usize {
        self.prefix.as_ref().map_or(0, PrefixTree::idle)
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

    /// The longest cached prefix of `tokens` in full blocks, in order; the caller holds each of them.
    pub fn take_prefix(&mut self, tokens: &[TokenId]) -> Vec<BlockId> {
        let mut found = Vec::new();
        let Some(tree) = &mut self.prefix else { return found };
        for tokens in tokens.chunks_exact(self.block_size) {
            let Some(block) = tree.child(found.last().copied(), tokens) else {
                break;
            };
            tree.hold(block);
            self.holders[block as usize] += 1;
            found.push(block);
        }
        found
    }

    /// Keeps a full block for its tokens. `above` is the sequence's preceding block (`None` for its first), itself kept
    /// and held. Gives the block the sequence now holds in its place: where another sequence has computed the same
    /// tokens first, its block, the duplicate being freed.
    pub fn keep(&mut self, above: Option<BlockId>, tokens: &[TokenId], block: BlockId) -> BlockId {
        let Some(tree) = &mut self.prefix else { return block };
        match tree.child(above, tokens) {
            None => {
                tree.insert(above, tokens, block);
                block
            }
            Some(same) if same == block => block,
            Some(same) => {
                tree.hold(same);
                self.holders[same as usize] += 1;
                self.release(&[block]);
                same
            }
        }
    }

    /// Every block kept for its tokens, those in use first, then the most recently used; a block comes after those above
    /// it.
    pub fn kept_by_use(&self) -> Vec<NodeId> {
        self.prefix.as_ref().map_or_else(Vec::new, PrefixTree::by_use)
    }

    /// The block above a kept block and its tokens, if it is still kept for them.
    pub fn kept(&self, id: NodeId) -> Option<(Option<BlockId>, &[TokenId])> {
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
}

#[cfg(test)]
mod tests {
    use std::collections::{HashMap, HashSet};

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn shares_what_another_sequence_computed() {
        let mut pool = BlockPool::new(4, 2, true);
        let first = pool.allocate().unwrap();
        assert_eq!(pool.keep(None, &[1, 2], first), first);
        assert_eq!(pool.take_prefix(&[1, 2, 3]), [first]);
        // A second sequence that computed the same tokens ends up with the first one's block.
        let duplicate = pool.allocate().unwrap();
        assert_eq!(pool.keep(None, &[1, 2], duplicate), first);
        assert_eq!(
            pool.counts(),
            BlockCounts {
                free: 3,
                held: 1,
                cached: 0
            }
        );
        for _ in 0..3 {
            pool.release(&[first]);
        }
        assert_eq!(
            pool.counts(),
            BlockCounts {
                free: 3,
                held: 0,
                cached: 1
            }
        );
    }

    #[test]
    fn without_the_cache_nothing_is_kept() {
        let mut pool = BlockPool::new(1, 2, false);
        let block = pool.allocate().unwrap();
        assert_eq!(pool.keep(None, &[1, 2], block), block);
        pool.release(&[block]);
        assert!(pool.take_prefix(&[1, 2]).is_empty());
        assert_eq!(
            pool.counts(),
            BlockCounts {
                free: 1,
                held: 0,
                cached: 0
            }
        );
    }

    #[derive(Debug, Clone)]
    enum Action {
        /// Start a sequence with these tokens (few distinct ones, so that prefixes meet).
        Start(Vec<TokenId>),
        /// End the n-th live sequence.
        End(usize),
    }

    fn action() -> impl Strategy<Value = Action> {
        prop_oneof![
            3 => prop::collection::vec(0u32..2, 1..20).prop_map(Action::Start),
            2 => (0usize..8).prop_map(Action::End),
        ]
    }

    /// Takes the cached prefix, allocates the rest, keeps the full blocks; gives everything back if it does not fit.
    fn start(pool: &mut BlockPool, tokens: &[TokenId]) -> Option<Vec<BlockId>> {
        let mut table = pool.take_prefix(tokens);
        let cached = table.len();
        while table.len() < pool.blocks_for(tokens.len()) {
            match pool.allocate() {
                Some(block) => table.push(block),
                None => {
                    pool.release(&table);
                    return None;
                }
            }
        }
        for (index, tokens) in tokens.chunks_exact(pool.block_size()).enumerate().skip(cached) {
            let above = index.checked_sub(1).map(|above| table[above]);
            table[index] = pool.keep(above, tokens, table[index]);
        }
        Some(table)
    }

    proptest! {
        /// No block is owned twice, leaked, or freed while held; equal block means equal tokens before and in it.
        #[test]
        fn every_block_is_accounted_for(actions in prop::collection::vec(action(), 1..60), cache in any::<bool>()) {
            let mut pool = BlockPool::new(12, 2, cache);
            let mut live: Vec<(Vec<TokenId>, Vec<BlockId>)> = Vec::new();
            for action in actions {
                match action {
                    Action::Start(tokens) => {
                        let room = pool.available();
                        match start(&mut pool, &tokens) {
                            Some(table) => live.push((tokens, table)),
                            None => prop_assert!(room < pool.blocks_for(tokens.len())),
                        }
                    }
                    Action::End(index) if index < live.len() => {
                        let (_, table) = live.swap_remove(index);
                        pool.release(&table);
                    }
                    Action::End(_) => {}
                }
                let mut contents: HashMap<BlockId, &[TokenId]> = HashMap::new();
                for (tokens, table) in &live {
                    for (index, &block) in table.iter().enumerate() {
                        let through = &tokens[..((index + 1) * 2).min(tokens.len())];
                        if let Some(other) = contents.insert(block, through) {
                            prop_assert!(cache && other == through && through.len() == (index + 1) * 2);
                        }
                    }
                }
                let held: HashSet<_> = contents.keys().copied().collect();
                prop_assert!(pool.free.iter().all(|block| !held.contains(block)));
                prop_assert_eq!(pool.counts().held, held.len());
            }
            for (_, table) in live.drain(..) {
                pool.release(&table);
            }
            prop_assert_eq!(pool.available(), 12);
            prop_assert_eq!((0..12).filter_map(|_| pool.allocate()).collect::<HashSet<_>>().len(), 12);
        }
    }
}
