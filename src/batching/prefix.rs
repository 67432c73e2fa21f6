//! The prefix tree: which full blocks hold the keys and values of which tokens.
//!
//! A node is a full block; its place in the tree is the tokens from the prompt's start through the block's last slot.
//! Children are found by the tokens themselves, so a hash collision can never serve another prompt's block. The node of
//! a block has the block's number, so the tree needs no numbering of its own.

use std::cmp::Reverse;
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
    /// Tells the node from earlier and later ones of the same block.
    number: u64,
}

/// A node by its block and its own number: it names the same tokens as long as it is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NodeId {
    pub block: BlockId,
    number: u64,
}

/// Blocks found by the tokens they hold, and the order in which to give them up.
#[derive(Debug, Default)]
pub struct PrefixTree {
    roots: HashMap<Box<[TokenId]>, BlockId>,
    /// By block: every block of the pool has a place, most of them without a node at first.
    nodes: Vec<Option<Node>>,
    /// Idle nodes without children, least recently used first.
    evictable: BTreeSet<(u64, BlockId)>,
    idle: usize,
    clock: u64,
    inserted: u64,
}

impl PrefixTree {
    /// The node below `parent` (`None`: at the root) that holds `tokens`.
    pub fn child(&self, parent: Option<BlockId>, tokens: &[TokenId]) -> Option<BlockId> {
        match parent {
            None => self.roots.get(tokens).copied(),
            Some(parent) => self.node(parent)?.children.get(tokens).copied(),
        }
    }

    pub fn contains(&self, block: BlockId) -> bool {
        self.node(block).is_some()
    }

    fn node(&self, block: BlockId) -> Option<&Node> {
        self.nodes.get(block as usize)?.as_ref()
    }

    fn node_mut(&mut self, block: BlockId) -> Option<&mut Node> {
        self.nodes.get_mut(block as usize)?.as_mut()
    }

    /// Adds a block that a sequence holds, with every block above it. The caller has seen that [`Self::child`] finds
    /// nothing there.
    pub fn insert(&mut self, parent: Option<BlockId>, tokens: &[TokenId], block: BlockId) {
        let siblings = match parent {
            None => &mut self.roots,
            Some(parent) => match self.node_mut(parent) {
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
            number: self.inserted,
        };
        self.inserted += 1;
        let place = block as usize;
        if self.nodes.len() <= place {
            self.nodes.resize_with(place + 1, || None);
        }
        self.nodes[place] = Some(node);
    }

    /// A sequence took hold of an idle block.
    pub fn hold(&mut self, block: BlockId) {
        let Some(node) = self.node_mut(block).filter(|node| node.idle) else {
            return;
        };
        node.idle = false;
        if node.children.is_empty() {
            let key = (node.last_used, block);
            self.evictable.remove(&key);
        }
        self.idle -= 1;
    }

    /// The last sequence that held the block let go of it.
    pub fn release(&mut self, block: BlockId) {
        let now = self.clock + 1;
        let Some(node) = self.node_mut(block) else { return };
        node.last_used = now;
        node.idle = true;
        if node.children.is_empty() {
            self.evictable.insert((now, block));
        }
        self.clock = now;
        self.idle += 1;
    }

    /// Forgets the least recently used leaf that nobody holds; its block is free. O(log n).
    pub fn evict(&mut self) -> Option<BlockId> {
        let (_, block) = self.evictable.pop_first()?;
        let node = self.nodes.get_mut(block as usize)?.take()?;
        self.idle -= 1;
        match node.parent {
            None => {
                self.roots.remove(&node.tokens);
            }
            Some(above) => {
                if let Some(parent) = self.node_mut(above) {
                    parent.children.remove(&node.tokens);
                    if parent.idle && parent.children.is_empty() {
                        let key = (parent.last_used, above);
                        self.evictable.insert(key);
                    }
                }
            }
        }
        Some(block)
    }

    /// Every node, those in use first, then the most recently used; a node comes after those above it. O(n log n).
    pub fn by_use(&self) -> Vec<NodeId> {
        let mut found = Vec::new();
        let mut below: Vec<BlockId> = self.roots.values().copied().collect();
        while let Some(block) = below.pop() {
            if let Some(node) = self.node(block) {
                let used = if node.idle { node.last_used } else { u64::MAX };
                let number = node.number;
                found.push((used, NodeId { block, number }));
                below.extend(node.children.values());
            }
        }
        // Who held a block let go of those above it later, so the order of use has them first; among nodes in use the
        // order in which they were found does, which a stable sort keeps.
        found.sort_by_key(|&(used, _)| Reverse(used));
        found.into_iter().map(|(_, id)| id).collect()
    }

    /// The block above a node and the node's tokens, if it is still there.
    pub fn get(&self, id: NodeId) -> Option<(Option<BlockId>, &[TokenId])> {
        let node = self.node(id.block).filter(|node| node.number == id.number)?;
        Some((node.parent, &node.tokens))
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
    fn nodes_come_by_use_and_after_those_above() {
        let mut tree = PrefixTree::default();
        tree.insert(None, &[1], 0);
        tree.insert(Some(0), &[2], 1);
        tree.insert(None, &[3], 2);
        tree.insert(Some(2), &[4], 3);
        tree.insert(Some(3), &[5], 4);
        // One sequence goes on; of the other's blocks the first is let go last.
        tree.release(1);
        tree.release(0);
        let order = tree.by_use();
        assert_eq!(order.iter().map(|id| id.block).collect::<Vec<_>>(), [2, 3, 4, 0, 1]);
        assert_eq!(tree.get(order[4]), Some((Some(0), [2].as_slice())));
        assert_eq!(tree.evict(), Some(1));
        tree.insert(Some(0), &[2], 1);
        assert_eq!(tree.get(order[4]), None, "another node of the same block");
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
