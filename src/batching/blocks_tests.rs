//! No block is lost, shared with a stranger, or found under other tokens than it holds.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use proptest::prelude::*;

use super::*;

const BLOCKS: usize = 14;
const SIZE: usize = 2;
const BUDGET: usize = 5;

fn namespace(number: usize) -> Namespace {
    let salt = |salt: &str| Namespace::Private {
        tenant: Some("a".into()),
        salt: Some(salt.into()),
    };
    [Namespace::Shared, salt("x"), salt("y")][number].clone()
}

fn counts(free: usize, held: usize, cached: usize) -> BlockCounts {
    BlockCounts {
        free,
        held,
        cached,
        pinned: 0,
    }
}

#[test]
fn shares_what_another_sequence_computed() {
    let (mut pool, space, now) = (BlockPool::new(4, 2, true), namespace(1), Instant::now());
    let first = pool.allocate().unwrap();
    assert_eq!(pool.keep(&space, now, None, &[1, 2], first), first);
    assert_eq!(pool.take(&space, now, None, &[1, 2, 3]), [first]);
    // A second sequence that computed the same tokens ends up with the first one's block.
    let duplicate = pool.allocate().unwrap();
    assert_eq!(pool.keep(&space, now, None, &[1, 2], duplicate), first);
    assert_eq!(pool.counts(), counts(3, 1, 0));
    for _ in 0..3 {
        pool.release(&[first]);
    }
    assert_eq!(pool.counts(), counts(3, 0, 1));
}

#[test]
fn what_is_forgotten_is_found_by_nobody_and_goes_on_for_nobody() {
    let (mut pool, space, now) = (BlockPool::new(6, SIZE, true), namespace(1), Instant::now());
    visit(&mut pool, &space, now, &[1, 2, 3, 4]);
    visit(&mut pool, &space, now, &[7, 8]);
    let one = pool.take(&space, now, None, &[1, 2]);
    pool.forget(&one);
    assert_eq!(pool.counts(), counts(4, 1, 1));
    assert!(pool.look_up(&space, &[1, 2, 3, 4]).is_empty());
    // Who still holds it goes on without keeping anything.
    let next = pool.allocate().unwrap();
    assert_eq!(pool.keep(&space, now, Some(one[0]), &[5, 6], next), next);
    pool.release(&[one[0], next]);
    assert_eq!(pool.counts(), counts(5, 0, 1));
    assert_eq!(visit(&mut pool, &space, now, &[7, 8]), 1);
}

#[test]
fn without_the_cache_nothing_is_kept() {
    let (mut pool, space, now) = (BlockPool::new(1, 2, false), namespace(1), Instant::now());
    let block = pool.allocate().unwrap();
    assert_eq!(pool.keep(&space, now, None, &[1, 2], block), block);
    pool.release(&[block]);
    assert!(pool.take(&space, now, None, &[1, 2]).is_empty());
    assert_eq!(pool.counts(), counts(1, 0, 0));
}

/// Computes a prompt and ends.
fn visit(pool: &mut BlockPool, space: &Namespace, arrival: Instant, tokens: &[TokenId]) -> usize {
    let mut table = pool.take(space, arrival, None, tokens);
    let found = table.len();
    for tokens in tokens.chunks_exact(SIZE).skip(found) {
        let block = pool.allocate().unwrap();
        table.push(pool.keep(space, arrival, table.last().copied(), tokens, block));
    }
    pool.release(&table);
    found
}

#[test]
fn a_namespace_is_a_cache_of_its_own() {
    let (mut pool, now) = (BlockPool::new(8, SIZE, true), Instant::now());
    visit(&mut pool, &namespace(1), now, &[1, 2, 3, 4]);
    assert_eq!(visit(&mut pool, &namespace(2), now, &[1, 2, 3, 4]), 0);
    assert_eq!(visit(&mut pool, &namespace(1), now, &[1, 2, 3, 4]), 2);
    assert_eq!(visit(&mut pool, &namespace(0), now, &[1, 2, 3, 4]), 0);
}

#[test]
fn what_is_shared_is_found_from_everywhere_and_continued_in_private() {
    let (mut pool, now) = (BlockPool::new(8, SIZE, true), Instant::now());
    visit(&mut pool, &namespace(0), now, &[1, 2]);
    assert_eq!(visit(&mut pool, &namespace(1), now, &[1, 2, 3, 4]), 1);
    assert_eq!(visit(&mut pool, &namespace(1), now, &[1, 2, 3, 4]), 2);
    assert_eq!(visit(&mut pool, &namespace(2), now, &[1, 2, 3, 4]), 1);
    assert_eq!(visit(&mut pool, &namespace(0), now, &[1, 2, 3, 4]), 1);
}

#[test]
fn the_longer_of_a_shared_and_an_own_prefix_is_taken() {
    let (mut pool, now) = (BlockPool::new(8, SIZE, true), Instant::now());
    visit(&mut pool, &namespace(1), now, &[1, 2, 3, 4]);
    visit(&mut pool, &namespace(0), now, &[1, 2]);
    assert_eq!(visit(&mut pool, &namespace(1), now, &[1, 2, 3, 4]), 2);
    visit(&mut pool, &namespace(0), now, &[1, 2, 3, 4, 5, 6]);
    assert_eq!(visit(&mut pool, &namespace(1), now, &[1, 2, 3, 4, 5, 6]), 3);
}

#[test]
fn a_prefix_of_many_requests_outlasts_others_but_not_the_need_for_its_memory() {
    let start = Instant::now();
    let at = |second| start + Duration::from_secs(second);
    let mut pool = BlockPool::new(6, SIZE, true).with_pin_budget(2);
    let (space, popular) = (namespace(1), [1, 2, 3, 4]);
    // The choices of one request, which arrived together, are one use.
    for _ in 0..20 {
        visit(&mut pool, &space, at(0), &popular);
    }
    assert_eq!(pool.pins().automatic, 0);
    for second in 1..8 {
        visit(&mut pool, &space, at(second), &popular);
    }
    assert_eq!(pool.counts().pinned, 2);
    // A flood of other prompts evicts only each other.
    for other in 10..30 {
        visit(&mut pool, &space, at(9), &[other, 0, other, 1, other, 2, other, 3]);
    }
    assert_eq!(visit(&mut pool, &space, at(9), &popular), 2);
    // Somebody who needs all of the memory gets it.
    assert_eq!((0..6).filter_map(|_| pool.allocate()).collect::<HashSet<_>>().len(), 6);
    assert_eq!(pool.pins().automatic, 0);
}

#[derive(Debug, Clone)]
enum Action {
    /// Start a sequence with these tokens (few distinct ones, so that prefixes meet) in a namespace.
    Start(usize, Vec<TokenId>),
    /// Let the n-th live sequence find or compute its next block.
    Advance(usize),
    /// End the n-th live sequence, wherever it is.
    End(usize),
    /// Turn the n-th live sequence into a pinned prompt, as far as it is computed and the budget goes.
    Pin(usize),
    Unpin(usize),
    /// Find the n-th live sequence's blocks for nobody any more, and end it.
    Forget(usize),
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        4 => (0usize..3, prop::collection::vec(0u32..2, 1..16)).prop_map(|(space, tokens)| Action::Start(space, tokens)),
        8 => (0usize..6).prop_map(Action::Advance),
        3 => (0usize..6).prop_map(Action::End),
        1 => (0usize..6).prop_map(Action::Pin),
        1 => (0usize..3).prop_map(Action::Unpin),
        1 => (0usize..6).prop_map(Action::Forget),
    ]
}

struct Live {
    space: usize,
    tokens: Vec<TokenId>,
    arrival: Instant,
    table: Vec<BlockId>,
    kept: usize,
}

/// A pool, who uses it, and what must lie in each block: the namespace in which it was written, and all tokens from the
/// prompt's start through the block's last slot. Nothing is forgotten when an owner ends, only when a block is written.
struct World {
    pool: BlockPool,
    live: Vec<Live>,
    pins: Vec<Vec<BlockId>>,
    contents: HashMap<BlockId, (usize, Vec<TokenId>)>,
}

impl World {
    fn start(&mut self, space: usize, tokens: Vec<TokenId>, arrival: Instant) -> Result<(), TestCaseError> {
        let mut table = self.pool.take(&namespace(space), arrival, None, &tokens);
        self.holds(&table, 0, space, &tokens)?;
        let kept = table.len();
        let wanted = self.pool.blocks_for(tokens.len()) - kept;
        if self.pool.available() < wanted {
            self.pool.release(&table);
            return Ok(());
        }
        for _ in 0..wanted {
            let block = self.pool.allocate();
            table.push(block.ok_or_else(|| TestCaseError::fail("fewer blocks than were available"))?);
        }
        self.live.push(Live {
            space,
            tokens,
            arrival,
            table,
            kept,
        });
        Ok(())
    }

    /// Blocks that were found must hold what is looked for, and be this namespace's or everyone's.
    fn holds(&self, found: &[BlockId], from: usize, space: usize, tokens: &[TokenId]) -> Result<(), TestCaseError> {
        for (index, block) in found.iter().enumerate() {
            let (owner, held) = &self.contents[block];
            prop_assert_eq!(held, &tokens[..(from + index + 1) * SIZE]);
            prop_assert!(*owner == space || *owner == 0, "another namespace's block");
        }
        Ok(())
    }

    fn advance(&mut self, index: usize) -> Result<(), TestCaseError> {
        let Live {
            space,
            tokens,
            arrival,
            table,
            kept,
        } = &mut self.live[index];
        let above = kept.checked_sub(1).map(|last| table[last]);
        let (space, from) = (*space, *kept);
        let found = self
            .pool
            .take(&namespace(space), *arrival, above, &tokens[from * SIZE..]);
        if !found.is_empty() {
            let own: Vec<_> = table.splice(from..from + found.len(), found.clone()).collect();
            self.pool.release(&own);
            *kept += found.len();
            let tokens = tokens.clone();
            return self.holds(&found, from, space, &tokens);
        }
        let end = tokens.len().min((from + 1) * SIZE);
        if let Some(&block) = table.get(from) {
            self.contents.insert(block, (space, tokens[..end].to_vec()));
        }
        if let Some(full) = tokens.chunks_exact(SIZE).nth(from) {
            table[from] = self.pool.keep(&namespace(space), *arrival, above, full, table[from]);
            *kept += 1;
        }
        Ok(())
    }

    fn pin(&mut self, index: usize) {
        let Live { table, kept, .. } = &self.live[index];
        let kept = table[..*kept].to_vec();
        let more = self.pool.unpinned(&kept, kept.len() * SIZE);
        if kept.is_empty() || !self.pool.are_kept(&kept) || self.pool.pins().asked + more > BUDGET {
            return;
        }
        let live = self.live.swap_remove(index);
        self.pool.release(&live.table[kept.len()..]);
        self.pool.pin(&kept);
        self.pins.push(kept);
    }

    fn act(&mut self, action: Action, now: Instant) -> Result<(), TestCaseError> {
        match action {
            Action::Start(space, tokens) => self.start(space, tokens, now)?,
            Action::Advance(index) if index < self.live.len() => self.advance(index)?,
            Action::End(index) if index < self.live.len() => {
                let live = self.live.swap_remove(index);
                self.pool.release(&live.table);
            }
            Action::Pin(index) if index < self.live.len() => self.pin(index),
            Action::Forget(index) if index < self.live.len() => {
                let live = self.live.swap_remove(index);
                self.pool.forget(&live.table);
                let found = self.pool.look_up(&namespace(live.space), &live.tokens);
                prop_assert!(found.iter().all(|block| !live.table.contains(block)));
                self.pool.release(&live.table);
                let pool = &mut self.pool;
                for blocks in self
                    .pins
                    .extract_if(.., |blocks| !pool.are_kept(blocks))
                    .collect::<Vec<_>>()
                {
                    self.pool.unpin(&blocks);
                }
            }
            Action::Unpin(index) if index < self.pins.len() => {
                let blocks = self.pins.swap_remove(index);
                self.pool.unpin(&blocks);
            }
            _ => {}
        }
        self.check()
    }

    fn check(&self) -> Result<(), TestCaseError> {
        let counts = self.pool.counts();
        prop_assert_eq!(counts.free + counts.held + counts.cached + counts.pinned, BLOCKS);
        let asked: HashSet<_> = self.pins.iter().flatten().collect();
        prop_assert_eq!(self.pool.pins().asked, asked.len());
        let held: HashSet<_> = self.live.iter().flat_map(|live| &live.table).chain(asked).collect();
        prop_assert!(self.pool.free.iter().all(|block| !held.contains(block)));
        prop_assert_eq!(self.pool.available(), BLOCKS - held.len());
        prop_assert!(counts.pinned <= BUDGET.max(held.len()));
        let mut writers = HashSet::new();
        for live in &self.live {
            let unkept = &live.table[live.kept..];
            prop_assert!(
                unkept.iter().all(|block| writers.insert(*block)),
                "two sequences write one block"
            );
            self.holds(&live.table[..live.kept], 0, live.space, &live.tokens)?;
        }
        if let Some(tree) = &self.pool.prefix {
            tree.assert_whole();
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(384))]

    /// Whoever starts, ends, pins and unpins: a block found in the cache holds exactly the tokens that were looked for,
    /// nobody writes another's block, every block is in one state, and none is lost.
    #[test]
    fn every_block_holds_what_it_is_found_under(
        actions in prop::collection::vec(action(), 1..160), cache in any::<bool>(),
    ) {
        let start = Instant::now();
        let pool = BlockPool::new(BLOCKS, SIZE, cache).with_pin_budget(BUDGET);
        let mut world = World { pool, live: Vec::new(), pins: Vec::new(), contents: HashMap::new() };
        for (second, action) in actions.into_iter().enumerate() {
            world.act(action, start + Duration::from_secs(second as u64))?;
        }
        let World { mut pool, live, pins, .. } = world;
        live.iter().for_each(|live| pool.release(&live.table));
        pins.iter().for_each(|blocks| pool.unpin(blocks));
        prop_assert_eq!(pool.available(), BLOCKS);
        prop_assert_eq!((0..BLOCKS).filter_map(|_| pool.allocate()).collect::<HashSet<_>>().len(), BLOCKS);
    }
}
