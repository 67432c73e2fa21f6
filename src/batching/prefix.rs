//! The prefix tree: which full blocks hold the keys and values of which tokens.
//!
//! A node is a full block; its place in the tree is the tokens from the prompt's start through the block's last slot.
//! Children are found by the tokens themselves, so a hash collision can never serve another prompt's block. The node of
//! a block has the block's number, so the tree needs no numbering of its own.

use std::collections::{BTreeSet, HashMap};

use super::BlockId;
use crate::request::TokenId;

#[derive(Debug)]
struct Node {
    parent: Option<BlockId>,
    tokens: Box<[TokenId]>,
    children: HashMap<Box<[TokenId]>, BlockId>,
    last_used: u64,
    /// Whether no sequence holds the block.
    idle: bool,
}

/// Blocks found by the tokens they hold, and the order in which to give them up.
#[derive(Debug, Default)]
pub struct PrefixTree {
    roots: HashMap<Box<[TokenId]>, BlockId>,
    nodes: HashMap<BlockId, Node>,
    /// Idle nodes without children, least recently used first.
    evictable: BTreeSet<(u64, BlockId)>,
    idle: usize,
    clock: u64,
}

impl PrefixTree {
    /// The node below `parent` (`None`: at the root) that holds `tokens`.
    pub fn child(&self, parent: Option<BlockId>, tokens: &[TokenId]) -> Option<BlockId> {
        match parent {
            None => self.roots.get(tokens).copied(),
            Some(parent) => self.nodes.get(&parent)?.children.get(tokens).copied(),
        }
    }

    pub fn contains(&self, block: BlockId) -> bool {
        self.nodes.contains_key(&block)
    }

    /// Adds a block that a sequence holds, with every block above it. The caller has seen that [`Self::child`] finds
    /// nothing there.
    pub fn insert(&mut self, parent: Option<BlockId>, tokens: &[TokenId], block: BlockId) {
        let siblings = match parent {
            None => &mut self.roots,
            Some(parent) => match self.nodes.get_mut(&parent) {
                Some(node) => &mut node.children,
                None => return,
            },
        };
        siblings.insert(tokens.into(), block);
        let node = Node {
            parent,
            tokens: tokens.into(),
            children: HashMap::new(),
            last_used: self.clock,
            idle: false,
        };
        self.nodes.insert(block, node);
    }

    /// A sequence took hold of an idle block.
    pub fn hold(&mut self, block: BlockId) {
        if let Some(node) = self.nodes.get_mut(&block).filter(|node| node.idle) {
            node.idle = false;
            self.idle -= 1;
            self.evictable.remove(&(node.last_used, block));
        }
    }

    /// The last sequence that held the block let go of it.
    pub fn release(&mut self, block: BlockId) {
        if let Some(node) = self.nodes.get_mut(&block) {
            self.clock += 1;
            node.last_used = self.clock;
            node.idle = true;
            self.idle += 1;
            if node.children.is_empty() {
                self.evictable.insert((node.last_used, block));
            }
        }
    }

    /// Forgets the least recently used leaf that nobody holds; its block is free. O(log n).
    pub fn evict(&mut self) -> Option<BlockId> {
        let (_, block) = self.evictable.pop_first()?;
        let node = self.nodes.remove(&block)?;
        self.idle -= 1;
        match node.parent {
            None => {
                self.roots.remove(&node.tokens);
            }
            Some(above) => {
                if let Some(parent) = self.nodes.get_mut(&above) {
                    parent.children.remove(&node.tokens);
                    if parent.idle && parent.children.is_empty() {
                        self.evictable.insert((parent.last_used, above));
                    }
                }
            }
        }
        Some(block)
    }

    /// Blocks in the tree that nobody holds. All can be evicted, leaves first: who holds a block holds those above it.
    pub fn idle(&self) -> usize {
        self.idle
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn evicts_leaves_first_and_least_recently_used_first() {
        let mut tree = PrefixTree::default();
        tree.insert(None, &[1, 2], 0);
        tree.insert(Some(0), &[3, 4], 1);
        tree.insert(Some(0), &[5, 6], 2);
        // A sequence lets go of its last block first.
        for block in [2, 1, 0] {
            tree.release(block);
        }
        assert_eq!(tree.idle(), 3);
        assert_eq!(
            [tree.evict(), tree.evict(), tree.evict(), tree.evict()],
            [Some(2), Some(1), Some(0), None]
        );
        assert_eq!(tree.child(None, &[1, 2]), None);
    }

    #[test]
    fn a_held_block_is_not_evicted() {
        let mut tree = PrefixTree::default();
        tree.insert(None, &[1], 7);
        assert_eq!(tree.evict(), None);
        tree.release(7);
        tree.hold(7);
        assert_eq!(tree.evict(), None);
    }

    #[test]
    fn the_same_tokens_below_another_parent_are_another_node() {
        let mut tree = PrefixTree::default();
        tree.insert(None, &[1], 0);
        tree.insert(None, &[2], 1);
        tree.insert(Some(0), &[9], 2);
        assert_eq!(tree.child(Some(0), &[9]), Some(2));
        assert_eq!(tree.child(Some(1), &[9]), None);
    }
}
