//! The prefix tree: which full blocks hold the keys and values of which tokens.
//!
//! A node is a full block; its place in the tree is the tokens from the prompt's start through the block's last slot.
//! All nodes lie in one hash table, under their namespace, the block above and their tokens; what is found there is
//! compared by all three, so a hash collision can never serve another prompt's block. The node of a block has the
//! block's number, so the tree needs no numbering of its own.
//!
//! Who holds a block holds those above it and lets go of them after it. So in the order in which blocks were let go a
//! block stands before those above it, and the least recently used one is always a leaf.
//!
//! Blocks that many requests used are kept longest: they stand in a list of their own, which is given up only when the
//! other is empty (a segmented LRU, Karedla et al. 1994, with the pinned prompts' budget as the limit of its protected
//! segment).

use std::{
    collections::HashSet,
    hash::{BuildHasher, RandomState},
    sync::Arc,
    time::Instant,
};

use hashbrown::HashTable;

use super::{BlockId, Namespace, lru::LruList};
use crate::request::TokenId;

/// A block used by so many requests is kept as if it were pinned, as far as the budget for pinned prompts goes.
pub const AUTOMATIC_PIN_REQUESTS: u32 = 8;

#[derive(Debug)]
struct Node {
    namespace: Arc<Namespace>,
    parent: Option<BlockId>,
    /// Blocks from the root to here.
    depth: u32,
    hash: u64,
    /// Requests that computed or found the block, and when the last of them arrived.
    requests: u32,
    last_arrival: Instant,
    /// Pinned prompts that hold the block.
    pins: u32,
    /// Kept because many requests used it. Then so is the block above.
    protected: bool,
    /// Whether nobody holds the block: it is in one of the two lists.
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
#[derive(Debug)]
pub struct PrefixTree {
    block_size: usize,
    hasher: RandomState,
    table: HashTable<BlockId>,
    /// By block: every block of the pool has a place, most of them without a node at first.
    nodes: Vec<Option<Node>>,
    /// By block, its tokens one after the other.
    tokens: Vec<TokenId>,
    /// Those that have blocks. Nodes share these, so that two namespaces are the same if their addresses are.
    namespaces: HashSet<Arc<Namespace>>,
    /// Idle blocks, the protected ones apart.
    idle: LruList,
    idle_protected: LruList,
    pinned: usize,
    protected: usize,
    pin_budget: usize,
    evictions: u64,
    inserted: u64,
}

/// What is known of a cached prefix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CachedPrefix {
    pub tokens: usize,
    /// Requests that computed or found all of it.
    pub requests: u32,
    /// Whether it is pinned, by somebody or automatically.
    pub pinned: bool,
}

impl PrefixTree {
    pub fn new(block_size: usize) -> Self {
        Self {
            block_size,
            hasher: RandomState::new(),
            table: HashTable::new(),
            nodes: Vec::new(),
            tokens: Vec::new(),
            namespaces: HashSet::new(),
            idle: LruList::default(),
            idle_protected: LruList::default(),
            pinned: 0,
            protected: 0,
            pin_budget: 0,
            evictions: 0,
            inserted: 0,
        }
    }

    /// The longest run of cached blocks that holds the beginning of `tokens` below `above` (`None`: from the prompt's
    /// start), as far as it may be found from `namespace`.
    pub fn find(&self, namespace: &Namespace, above: Option<BlockId>, tokens: &[TokenId]) -> Vec<BlockId> {
        let own = self.namespaces.get(namespace);
        let shared = self.namespaces.get(&Namespace::Shared);
        let found = self.walk([own, shared], above, tokens);
        if shared.is_none() || *namespace == Namespace::Shared {
            return found;
        }
        let by_shared = self.walk([shared, own], above, tokens);
        if by_shared.len() > found.len() {
            by_shared
        } else {
            found
        }
    }

    /// Goes down from `above` block by block, looking into the namespaces in their order.
    fn walk(
        &self,
        namespaces: [Option<&Arc<Namespace>>; 2],
        above: Option<BlockId>,
        tokens: &[TokenId],
    ) -> Vec<BlockId> {
        let mut found = Vec::new();
        for tokens in tokens.chunks_exact(self.block_size) {
            let above = found.last().copied().or(above);
            let mut places = namespaces.iter().flatten();
            match places.find_map(|namespace| self.child(namespace, above, tokens)) {
                Some(block) => found.push(block),
                None => break,
            }
        }
        found
    }

    fn child(&self, namespace: &Arc<Namespace>, above: Option<BlockId>, tokens: &[TokenId]) -> Option<BlockId> {
        // Below a private block there is nothing of another namespace.
        let may_have_it =
            |above: &Node| Arc::ptr_eq(&above.namespace, namespace) || *above.namespace == Namespace::Shared;
        if !above.is_none_or(|above| self.node(above).is_some_and(may_have_it)) {
            return None;
        }
        self.at(self.hash(namespace, above, tokens), namespace, above, tokens)
    }

    /// The block under this hash, if it is the one that is meant.
    fn at(&self, hash: u64, namespace: &Arc<Namespace>, above: Option<BlockId>, tokens: &[TokenId]) -> Option<BlockId> {
        let same = |&block: &BlockId| {
            self.node(block)
                .is_some_and(|node| node.parent == above && Arc::ptr_eq(&node.namespace, namespace))
                && self.tokens(block) == tokens
        };
        self.table.find(hash, same).copied()
    }

    fn hash(&self, namespace: &Arc<Namespace>, above: Option<BlockId>, tokens: &[TokenId]) -> u64 {
        self.hasher.hash_one((Arc::as_ptr(namespace), above, tokens))
    }

    fn node(&self, block: BlockId) -> Option<&Node> {
        self.nodes.get(block as usize)?.as_ref()
    }

    fn node_mut(&mut self, block: BlockId) -> Option<&mut Node> {
        self.nodes.get_mut(block as usize)?.as_mut()
    }

    fn tokens(&self, block: BlockId) -> &[TokenId] {
        let start = block as usize * self.block_size;
        &self.tokens[start..start + self.block_size]
    }

    pub fn contains(&self, block: BlockId) -> bool {
        self.node(block).is_some()
    }

    /// Adds a block that somebody holds, with every block above it, unless there is one with the same tokens, or one
    /// above was forgotten. Gives the block to hold now.
    pub fn keep(
        &mut self,
        namespace: &Namespace,
        above: Option<BlockId>,
        tokens: &[TokenId],
        block: BlockId,
        arrival: Instant,
    ) -> BlockId {
        // Below a block that was forgotten nothing would be found, or, once it holds other tokens, something wrong.
        if above.is_some_and(|above| !self.contains(above)) {
            return block;
        }
        if let Some(same) = self.shared_child(above, tokens) {
            return same;
        }
        let namespace = self.intern(namespace, above);
        let hash = self.hash(&namespace, above, tokens);
        if let Some(same) = self.at(hash, &namespace, above, tokens) {
            return same;
        }
        let place = block as usize;
        if self.nodes.len() <= place {
            self.nodes.resize_with(place + 1, || None);
            self.tokens.resize((place + 1) * self.block_size, 0);
        }
        self.tokens[place * self.block_size..][..self.block_size].copy_from_slice(tokens);
        let depth = above.and_then(|above| self.node(above)).map_or(0, |above| above.depth) + 1;
        self.nodes[place] = Some(Node {
            namespace,
            parent: above,
            depth,
            hash,
            requests: 1,
            last_arrival: arrival,
            pins: 0,
            protected: false,
            idle: false,
            number: self.inserted,
        });
        self.inserted += 1;
        let nodes = &self.nodes;
        self.table.insert_unique(hash, block, |&block| {
            nodes[block as usize].as_ref().map_or(0, |node| node.hash)
        });
        block
    }

    /// What everyone's namespace has below a block, if that is everyone's too.
    fn shared_child(&self, above: Option<BlockId>, tokens: &[TokenId]) -> Option<BlockId> {
        let everyones = |above| {
            self.node(above)
                .is_some_and(|node| *node.namespace == Namespace::Shared)
        };
        if !above.is_none_or(everyones) {
            return None;
        }
        self.child(self.namespaces.get(&Namespace::Shared)?, above, tokens)
    }

    /// The namespace as the nodes share it; mostly it is that of the block above.
    fn intern(&mut self, namespace: &Namespace, above: Option<BlockId>) -> Arc<Namespace> {
        if let Some(above) = above.and_then(|above| self.node(above))
            && *above.namespace == *namespace
        {
            return above.namespace.clone();
        }
        if let Some(known) = self.namespaces.get(namespace) {
            return known.clone();
        }
        let namespace = Arc::new(namespace.clone());
        self.namespaces.insert(namespace.clone());
        namespace
    }

    /// A request that arrived at `arrival` took hold of a block. Of requests that arrived together, as the choices of
    /// one answer do, only one counts.
    pub fn hold(&mut self, block: BlockId, arrival: Instant) {
        let Some(node) = self.nodes.get_mut(block as usize).and_then(Option::as_mut) else {
            return;
        };
        if node.idle {
            node.idle = false;
            let list = if node.protected {
                &mut self.idle_protected
            } else {
                &mut self.idle
            };
            list.remove(block);
        }
        if arrival > node.last_arrival {
            node.last_arrival = arrival;
            node.requests = node.requests.saturating_add(1);
        }
        if node.requests >= AUTOMATIC_PIN_REQUESTS && !node.protected {
            self.protect(block);
        }
    }

    /// Keeps a held block longer than others, if that goes with the budget.
    fn protect(&mut self, block: BlockId) {
        let parent = self.node(block).and_then(|node| node.parent);
        let below_protected = parent.is_none_or(|above| self.node(above).is_some_and(|above| above.protected));
        let unpinned = self.node(block).is_some_and(|node| node.pins == 0);
        if !below_protected || (unpinned && !self.make_room(1)) {
            return;
        }
        if let Some(node) = self.node_mut(block) {
            node.protected = true;
        }
        self.protected += usize::from(unpinned);
    }

    /// Ends the protection of the blocks used least recently until `more` pinned ones fit the budget. False: they
    /// cannot, because the others are in use.
    fn make_room(&mut self, more: usize) -> bool {
        while self.pinned + self.protected + more > self.pin_budget {
            let Some(block) = self.idle_protected.pop() else {
                return false;
            };
            if let Some(node) = self.node_mut(block) {
                node.protected = false;
            }
            self.protected -= 1;
            self.idle.push(block);
        }
        true
    }

    /// The last that held the block let go of it.
    pub fn release(&mut self, block: BlockId) {
        let Some(node) = self.nodes.get_mut(block as usize).and_then(Option::as_mut) else {
            return;
        };
        node.idle = true;
        if node.protected {
            self.idle_protected.push(block);
            self.make_room(0);
        } else {
            self.idle.push(block);
        }
    }

    /// Forgets the least recently used leaf that nobody holds; its block is free. O(1).
    pub fn evict(&mut self) -> Option<BlockId> {
        let block = self.idle.pop().or_else(|| self.idle_protected.pop())?;
        self.remove(block);
        self.evictions += 1;
        Some(block)
    }

    /// Takes a node, which is in neither list of idle ones any more, out of the tree.
    fn remove(&mut self, block: BlockId) {
        let Some(node) = self.nodes.get_mut(block as usize).and_then(Option::take) else {
            return;
        };
        if let Ok(entry) = self.table.find_entry(node.hash, |&other| other == block) {
            entry.remove();
        }
        match node.pins {
            0 => self.protected -= usize::from(node.protected),
            _ => self.pinned -= 1,
        }
        // The set and this node were the last to know the namespace.
        if Arc::strong_count(&node.namespace) == 2 {
            self.namespaces.remove(&node.namespace);
        }
    }

    /// Takes a block and all below it out of the tree, as what they hold is not to be trusted. Gives those that nobody
    /// holds: they are free. The others are, once they are let go of. O(n log n).
    pub fn forget(&mut self, block: BlockId) -> Vec<BlockId> {
        let mut by_depth: Vec<(u32, BlockId)> = (0..)
            .zip(&self.nodes)
            .filter_map(|(block, node)| Some((node.as_ref()?.depth, block)))
            .collect();
        by_depth.sort_unstable();
        let mut doomed = HashSet::new();
        for (_, other) in by_depth {
            let parent = self.node(other).and_then(|node| node.parent);
            if other == block || parent.is_some_and(|above| doomed.contains(&above)) {
                doomed.insert(other);
            }
        }
        let mut free = Vec::new();
        for block in doomed {
            let Some(&Node { idle, protected, .. }) = self.node(block) else {
                continue;
            };
            if idle {
                match protected {
                    true => self.idle_protected.remove(block),
                    false => self.idle.remove(block),
                }
                free.push(block);
            }
            self.remove(block);
        }
        free
    }

    /// Blocks in the tree that nobody holds. All can be evicted.
    pub fn idle(&self) -> usize {
        self.idle.len() + self.idle_protected.len()
    }

    /// Idle blocks that are not pinned, automatically or otherwise.
    pub fn cached(&self) -> usize {
        self.idle.len()
    }

    pub fn evictions(&self) -> u64 {
        self.evictions
    }

    /// The most blocks that pinned prompts hold, and the automatically pinned beside them.
    pub fn pin_budget(&self) -> usize {
        self.pin_budget
    }

    pub fn set_pin_budget(&mut self, blocks: usize) {
        self.pin_budget = blocks;
    }

    /// Blocks that pinned prompts hold.
    pub fn pinned(&self) -> usize {
        self.pinned
    }

    /// Blocks that are pinned automatically and not otherwise.
    pub fn protected(&self) -> usize {
        self.protected
    }

    /// How many of `blocks` a pinned prompt holds already.
    pub fn pinned_among(&self, blocks: &[BlockId]) -> usize {
        let pinned = |block: &&BlockId| self.node(**block).is_some_and(|node| node.pins > 0);
        blocks.iter().filter(pinned).count()
    }

    /// A pinned prompt holds the block from now on. The caller has seen that it goes with the budget.
    pub fn pin(&mut self, block: BlockId) {
        let Some(node) = self.node_mut(block) else { return };
        node.pins += 1;
        if node.pins == 1 {
            let protected = usize::from(node.protected);
            self.protected -= protected;
            self.pinned += 1;
            self.make_room(0);
        }
    }

    /// A pinned prompt is about to let go of the block.
    pub fn unpin(&mut self, block: BlockId) {
        let Some(node) = self.node_mut(block) else { return };
        node.pins -= 1;
        if node.pins == 0 {
            let protected = usize::from(node.protected);
            self.protected += protected;
            self.pinned -= 1;
        }
    }

    /// Every node, those in use first, then those that would be given up last; a node comes after those above it.
    /// O(n log n).
    pub fn by_use(&self) -> Vec<NodeId> {
        let places = (0..).zip(&self.nodes);
        let mut in_use: Vec<(u32, BlockId)> = places
            .filter_map(|(block, node)| Some((block, node.as_ref().filter(|node| !node.idle)?)))
            .map(|(block, node)| (node.depth, block))
            .collect();
        in_use.sort_unstable();
        let in_use = in_use.into_iter().map(|(_, block)| block);
        let idle = self.idle_protected.latest_first().chain(self.idle.latest_first());
        let id = |block| {
            let number = self.node(block)?.number;
            Some(NodeId { block, number })
        };
        in_use.chain(idle).filter_map(id).collect()
    }

    /// A node's namespace, the block above it and its tokens, if it is still there.
    pub fn get(&self, id: NodeId) -> Option<(&Namespace, Option<BlockId>, &[TokenId])> {
        let node = self.node(id.block).filter(|node| node.number == id.number)?;
        Some((&node.namespace, node.parent, self.tokens(id.block)))
    }

    /// The prefixes that a tenant may be told of, in no order: wherever the tree ends, or fewer requests went on.
    /// Looks at every block.
    pub fn prefixes(&self, reader: &str) -> Vec<CachedPrefix> {
        let mut most_below = vec![0; self.nodes.len()];
        for node in self.nodes.iter().flatten() {
            if let Some(above) = node.parent {
                let most: &mut u32 = &mut most_below[above as usize];
                *most = node.requests.max(*most);
            }
        }
        let ends = self.nodes.iter().zip(most_below).filter_map(|(node, most_below)| {
            let node = node.as_ref()?;
            (node.requests > most_below && node.namespace.is_open_to(reader)).then_some(node)
        });
        ends.map(|node| CachedPrefix {
            tokens: node.depth as usize * self.block_size,
            requests: node.requests,
            pinned: node.pins > 0 || node.protected,
        })
        .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl PrefixTree {
        /// Whatever was done to it, the tree has no node without those above it, and every node is found.
        pub fn assert_whole(&self) {
            let mut idle = 0;
            for (block, node) in self.nodes.iter().enumerate() {
                let Some(node) = node else { continue };
                let block = block as BlockId;
                assert_eq!(
                    self.child(&node.namespace, node.parent, self.tokens(block)),
                    Some(block)
                );
                let above = node
                    .parent
                    .map(|above| self.node(above).expect("evicted before those below it"));
                assert!(!node.protected || above.is_none_or(|above| above.protected));
                assert!(node.idle || above.is_none_or(|above| !above.idle));
                assert_eq!(node.depth, above.map_or(0, |above| above.depth) + 1);
                idle += usize::from(node.idle);
            }
            assert_eq!(idle, self.idle());
            assert_eq!(self.table.len(), self.nodes.iter().flatten().count());
            let used: HashSet<_> = self.nodes.iter().flatten().map(|node| &node.namespace).collect();
            assert_eq!(
                used.len(),
                self.namespaces.len(),
                "a namespace without blocks is forgotten"
            );
        }
    }

    #[test]
    fn nodes_come_by_use_and_after_those_above() {
        let mut tree = tree(
            1,
            &[
                (None, &[1], 0),
                (Some(0), &[2], 1),
                (None, &[3], 4),
                (Some(4), &[4], 3),
                (Some(3), &[5], 2),
            ],
        );
        // One sequence goes on; of the other's blocks the first is let go last.
        tree.release(1);
        tree.release(0);
        let order = tree.by_use();
        assert_eq!(order.iter().map(|id| id.block).collect::<Vec<_>>(), [4, 3, 2, 0, 1]);
        assert_eq!(tree.get(order[4]), Some((&space(), Some(0), [2].as_slice())));
        assert_eq!(tree.evict(), Some(1));
        tree.keep(&space(), Some(0), &[2], 1, Instant::now());
        assert_eq!(tree.get(order[4]), None, "another node of the same block");
    }

    fn space() -> Namespace {
        Namespace::Private {
            tenant: None,
            salt: None,
        }
    }

    fn tree(block_size: usize, nodes: &[(Option<BlockId>, &[TokenId], BlockId)]) -> PrefixTree {
        let mut tree = PrefixTree::new(block_size);
        for (above, tokens, block) in nodes {
            tree.keep(&space(), *above, tokens, *block, Instant::now());
        }
        tree
    }

    #[test]
    fn evicts_leaves_first_and_least_recently_used_first() {
        let mut tree = tree(2, &[(None, &[1, 2], 0), (Some(0), &[3, 4], 1), (Some(0), &[5, 6], 2)]);
        // A sequence lets go of its last block first.
        for block in [2, 1, 0] {
            tree.release(block);
        }
        assert_eq!(tree.idle(), 3);
        assert_eq!(
            [tree.evict(), tree.evict(), tree.evict(), tree.evict()],
            [Some(2), Some(1), Some(0), None]
        );
        assert!(tree.find(&space(), None, &[1, 2]).is_empty());
        assert_eq!(tree.evictions(), 3);
    }

    #[test]
    fn a_held_block_is_not_evicted() {
        let mut tree = tree(1, &[(None, &[1], 7)]);
        assert_eq!(tree.evict(), None);
        tree.release(7);
        tree.hold(7, Instant::now());
        assert_eq!(tree.evict(), None);
    }

    #[test]
    fn the_same_tokens_below_another_parent_are_another_node() {
        let tree = tree(1, &[(None, &[1], 0), (None, &[2], 1), (Some(0), &[9], 2)]);
        assert_eq!(tree.find(&space(), Some(0), &[9]), [2]);
        assert!(tree.find(&space(), Some(1), &[9]).is_empty());
    }

    #[test]
    fn a_hash_that_collides_serves_nobody_elses_block() {
        let mut tree = tree(2, &[(None, &[1, 2], 0)]);
        // Another prompt's block is put under the hash of [3, 4].
        let namespace = tree.namespaces.get(&space()).expect("known").clone();
        let collided = tree.hash(&namespace, None, &[3, 4]);
        tree.table.insert_unique(collided, 0, |_| collided);
        assert!(tree.find(&space(), None, &[3, 4]).is_empty());
    }

    #[test]
    fn prefixes_are_told_of_by_their_length_and_their_requests() {
        let mut tree = tree(2, &[(None, &[1, 2], 0), (Some(0), &[3, 4], 1)]);
        tree.hold(0, Instant::now() + std::time::Duration::from_secs(1));
        let mut found = tree.prefixes("anyone");
        found.sort_by_key(|prefix| prefix.tokens);
        let of = |tokens, requests| CachedPrefix {
            tokens,
            requests,
            pinned: false,
        };
        assert_eq!(found, [of(2, 2), of(4, 1)]);
    }
}
