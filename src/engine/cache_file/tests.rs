//! The file against pools whose contents tell which tokens they belong to, and against bytes that are no such file.

use std::{
    fs,
    path::Path,
    sync::{Arc, LazyLock},
};

use candle_core::{DType, Device};
use proptest::prelude::*;
use sconce_models::{Config, Rope, RopeScaling};
use tokio::sync::oneshot;

use super::{format::Writer, replace::Replacement, *};
use crate::batching::BlockCounts;

const BLOCK_SIZE: usize = 2;
const BLOCK_BYTES: usize = 32;

fn identity() -> Identity {
    Identity {
        weights: "5c0".into(),
        dtype: "f32".into(),
        block_size: BLOCK_SIZE,
        block_bytes: BLOCK_BYTES,
        layout: KvCache::layout(DType::F32, &Device::Cpu),
    }
}

/// A pool and the KV cache of a model with one layer and one head of two dimensions.
struct Memory {
    pool: BlockPool,
    cache: KvCache,
}

impl Memory {
    fn new(blocks: usize) -> Self {
        let config = Config {
            architecture: "llama".into(),
            hidden_size: 2,
            intermediate_size: 2,
            vocab_size: 8,
            layers: 1,
            heads: 1,
            kv_heads: 1,
            head_dim: 2,
            rms_norm_eps: 1e-5,
            rope: Rope {
                theta: 1e4,
                scaling: RopeScaling::None,
            },
            max_position_embeddings: 64,
            sliding_window: None,
            qkv_bias: false,
            qk_norm: false,
            tie_word_embeddings: true,
        };
        let cache = KvCache::new(&config, blocks, BLOCK_SIZE, DType::F32, &Device::Cpu).unwrap();
        assert_eq!(cache.block_bytes(), BLOCK_BYTES);
        let pool = BlockPool::new(blocks, BLOCK_SIZE, true);
        Self { pool, cache }
    }

    /// Runs a sequence as the engine would, and gives its blocks unless they do not fit.
    fn start(&mut self, namespace: &Namespace, tokens: &[TokenId]) -> Option<Vec<BlockId>> {
        let now = Instant::now();
        let mut table = self.pool.take(namespace, now, None, tokens);
        for index in table.len()..tokens.len() / BLOCK_SIZE {
            let Some(block) = self.pool.allocate() else {
                self.pool.release(&table);
                return None;
            };
            let through = &tokens[..(index + 1) * BLOCK_SIZE];
            self.cache.write_block(block, &contents(through)).unwrap();
            let above = index.checked_sub(1).map(|above| table[above]);
            table.push(
                self.pool
                    .keep(namespace, now, above, &through[index * BLOCK_SIZE..], block),
            );
        }
        Some(table)
    }

    fn run(&mut self, namespace: &Namespace, tokens: &[TokenId]) {
        let table = self.start(namespace, tokens).unwrap();
        self.pool.release(&table);
    }

    /// How many blocks of a prompt are cached; each must hold what was computed for its tokens.
    fn cached(&mut self, namespace: &Namespace, tokens: &[TokenId]) -> usize {
        let table = self.pool.take(namespace, Instant::now(), None, tokens);
        for (index, &block) in table.iter().enumerate() {
            let mut found = Vec::new();
            self.cache.read_block(block, &mut found).unwrap();
            assert_eq!(found, contents(&tokens[..(index + 1) * BLOCK_SIZE]));
        }
        self.pool.release(&table);
        table.len()
    }

    fn save(&self, file: &Arc<CacheFile>) -> Result<Saved, SaveError> {
        let (mut saves, outcome) = ask();
        while saves.wake(Instant::now()).is_some() {
            saves.advance(Some(file), &self.pool, &self.cache);
        }
        outcome.blocking_recv().unwrap()
    }
}

fn tenant(name: &str) -> Namespace {
    Namespace::Private {
        tenant: Some(name.into()),
        salt: None,
    }
}

fn ask() -> (Saves, oneshot::Receiver<Result<Saved, SaveError>>) {
    let (reply, outcome) = oneshot::channel();
    let mut saves = Saves::default();
    saves.ask(reply);
    (saves, outcome)
}

/// What the block at the end of these tokens holds: all of them matter.
fn contents(through: &[TokenId]) -> Vec<u8> {
    let mixed = through
        .iter()
        .fold(17u32, |mixed, token| mixed.wrapping_mul(31).wrapping_add(*token));
    // Any bits but those of numbers that are not finite.
    (0..BLOCK_BYTES).map(|i| (mixed >> (i % 4)) as u8 & 0x3f).collect()
}

fn file(folder: &Path) -> Arc<CacheFile> {
    Arc::new(CacheFile {
        path: folder.join("kv.cache"),
        identity: identity(),
    })
}

/// A file of three prompts, two of which begin alike.
fn bytes() -> Vec<u8> {
    static BYTES: LazyLock<Vec<u8>> = LazyLock::new(written);
    BYTES.clone()
}

fn written() -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let mut memory = Memory::new(8);
    for prompt in [[1, 1, 2, 2, 3, 3], [1, 1, 5, 5, 6, 6], [7, 7, 7, 7, 7, 7]] {
        memory.run(&tenant("a"), &prompt);
    }
    let saved = memory.save(&file(folder.path())).unwrap();
    let bytes = fs::read(folder.path().join("kv.cache")).unwrap();
    assert_eq!((saved.blocks, saved.bytes), (8, bytes.len() as u64));
    bytes
}

/// Reads bytes as a file into an empty pool of `blocks` blocks.
fn restore(bytes: &[u8], here: Identity, blocks: usize) -> (Memory, Result<(usize, usize), Refusal>) {
    let mut memory = Memory::new(blocks);
    let file = CacheFile {
        path: "unused".into(),
        identity: here,
    };
    let read = file.restore(bytes, bytes.len() as u64, &mut memory.pool, &mut memory.cache);
    (memory, read)
}

fn refusal(bytes: &[u8]) -> Refusal {
    let (memory, read) = restore(bytes, identity(), 8);
    let empty = BlockCounts {
        free: 8,
        ..BlockCounts::default()
    };
    assert_eq!(memory.pool.counts(), empty, "nothing of a refused file is used");
    read.unwrap_err()
}

#[test]
fn prompts_are_found_again() {
    let (mut memory, read) = restore(&bytes(), identity(), 12);
    assert_eq!(read.unwrap(), (8, 0));
    assert_eq!(memory.cached(&tenant("a"), &[1, 1, 2, 2, 3, 3, 9]), 3);
    assert_eq!(memory.cached(&tenant("a"), &[1, 1, 5, 5, 6, 6]), 3);
    assert_eq!(memory.cached(&tenant("a"), &[7, 7, 7, 7, 8, 8]), 2);
    assert_eq!(memory.pool.counts().cached, 8);
}

#[test]
fn a_tenant_finds_its_own_blocks_and_those_of_everyone() {
    let folder = tempfile::tempdir().unwrap();
    let mut memory = Memory::new(8);
    memory.run(&Namespace::Shared, &[1, 1]);
    memory.run(&tenant("a"), &[1, 1, 2, 2]);
    memory.run(&tenant("b"), &[3, 3]);
    memory.save(&file(folder.path())).unwrap();
    let (mut memory, read) = restore(&fs::read(folder.path().join("kv.cache")).unwrap(), identity(), 8);
    assert_eq!(read.unwrap(), (3, 0));
    let mut cached = |name, tokens: &[TokenId]| memory.cached(&tenant(name), tokens);
    assert_eq!([cached("a", &[1, 1, 2, 2]), cached("b", &[1, 1, 2, 2])], [2, 1]);
    assert_eq!([cached("a", &[3, 3]), cached("b", &[3, 3])], [0, 1]);
}

#[test]
fn the_most_recently_used_fit_into_a_smaller_pool_and_keep_their_order() {
    let (mut memory, read) = restore(&bytes(), identity(), 5);
    assert_eq!(read.unwrap(), (5, 3));
    assert_eq!(memory.cached(&tenant("a"), &[7, 7, 7, 7, 7, 7]), 3);
    assert_eq!(memory.cached(&tenant("a"), &[1, 1, 5, 5, 6, 6]), 2, "its beginning");
    // Used last now; the next block takes the place of the leaf used longest ago.
    let block = memory.pool.allocate().unwrap();
    assert_eq!(memory.cached(&tenant("a"), &[7, 7, 7, 7, 7, 7]), 2);
    assert_eq!(memory.cached(&tenant("a"), &[1, 1, 5, 5]), 2);
    memory.pool.release(&[block]);
}

#[test]
fn a_file_of_another_server_is_refused() {
    type Change = fn(&mut Identity);
    let changes: [(&str, Change); 4] = [
        ("another model", |other| other.weights = "other".into()),
        ("dtype f32, not bf16", |other| other.dtype = "bf16".into()),
        ("block-size 2, not 4", |other| other.block_size = 4),
        ("another layout", |other| other.layout += 1),
    ];
    for (said, change) in changes {
        let mut here = identity();
        change(&mut here);
        let refusal = restore(&bytes(), here, 8).1.unwrap_err().to_string();
        assert!(refusal.contains(said), "{refusal}");
    }
    let mut older = bytes();
    older[8] = 0;
    assert!(matches!(refusal(&older), Refusal::Version(0)));
    assert!(matches!(refusal(b"GGUF and more bytes"), Refusal::NotACacheFile));
    assert!(matches!(refusal(b""), Refusal::NotACacheFile));
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let bytes = bytes();
    for len in 0..bytes.len() {
        refusal(&bytes[..len]);
    }
    refusal(&[&bytes[..], &[0]].concat());
}

#[test]
fn lengths_beyond_the_file_are_refused_before_they_are_allocated() {
    let mut header = bytes();
    header[12..16].copy_from_slice(&u32::MAX.to_le_bytes());
    assert!(matches!(refusal(&header), Refusal::Damaged("a length is out of range")));
    let mut namespace = Vec::new();
    Writer::new(&mut namespace, &identity()).unwrap();
    namespace.push(1);
    namespace.extend(u32::MAX.to_le_bytes());
    assert!(matches!(
        refusal(&namespace),
        Refusal::Damaged("a length is out of range")
    ));
}

#[test]
fn a_block_above_itself_or_in_no_namespace_is_refused() {
    let write = |namespaces: &[&str], namespace, above| {
        let mut bytes = Vec::new();
        let mut writer = Writer::new(&mut bytes, &identity()).unwrap();
        namespaces.iter().for_each(|text| writer.namespace(text).unwrap());
        writer.block(namespace, above, &[1, 1], &[0; BLOCK_BYTES]).unwrap();
        writer.finish().unwrap();
        bytes
    };
    assert!(restore(&write(&["null"], 0, None), identity(), 8).1.is_ok());
    refusal(&write(&["null"], 0, Some(0)));
    refusal(&write(&["null"], 1, None));
    refusal(&write(&[], 0, None));
    refusal(&write(&["no namespace"], 0, None));
    refusal(&write(&["null", "null"], 0, None));
}

#[test]
fn a_save_that_breaks_off_leaves_the_old_file_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("kv.cache");
    fs::write(&path, "old").unwrap();
    let names = || {
        let mut names: Vec<_> = fs::read_dir(folder.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        names.sort();
        names
    };
    for blocks in 0..4 {
        let mut writer = Writer::new(Replacement::create(&path).unwrap(), &identity()).unwrap();
        writer.namespace("null").unwrap();
        for _ in 0..blocks {
            writer.block(0, None, &[1, 1], &[0; BLOCK_BYTES]).unwrap();
        }
        drop(writer);
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(names(), ["kv.cache", "kv.cache.lock"]);
    }
    // What a killed process leaves is in nobody's way.
    fs::write(folder.path().join("kv.cache.part"), [7; 100_000]).unwrap();
    Memory::new(1).save(&file(folder.path())).unwrap();
    assert!(fs::metadata(&path).unwrap().len() < 1000);
    assert_eq!(names(), ["kv.cache", "kv.cache.lock"]);
}

#[test]
fn a_save_into_nowhere_says_so() {
    let missing = file(Path::new("/nowhere"));
    let error = Memory::new(1).save(&missing).unwrap_err().to_string();
    assert!(error.contains("/nowhere/kv.cache"), "{error}");
    let (mut saves, outcome) = ask();
    let memory = Memory::new(1);
    saves.advance(None, &memory.pool, &memory.cache);
    assert!(matches!(outcome.blocking_recv().unwrap(), Err(SaveError::NoCacheFile)));
}

#[derive(Debug, Clone)]
enum Action {
    Start(&'static str, Vec<TokenId>),
    End(usize),
    /// The engine's turn to copy blocks.
    Copy,
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        3 => (prop::sample::select(vec!["a", "b"]), prop::collection::vec(0u32..2, 2..12))
            .prop_map(|(name, tokens)| Action::Start(name, tokens)),
        2 => (0usize..4).prop_map(Action::End),
        1 => Just(Action::Copy),
    ]
}

proptest! {
    // Each case writes a file through to the disk.
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Whatever is computed, let go and evicted while a save runs: what the file has is what was computed for its tokens.
    #[test]
    fn a_save_among_running_requests_holds_only_what_is_true(actions in prop::collection::vec(action(), 1..60)) {
        let folder = tempfile::tempdir().unwrap();
        let file = file(folder.path());
        let mut memory = Memory::new(9);
        for prompt in [[0, 0, 1, 1, 0, 1], [1, 0, 1, 1, 0, 0], [1, 1, 0, 1, 1, 1]] {
            memory.run(&tenant("a"), &prompt);
        }
        let (mut saves, outcome) = ask();
        let (mut live, mut prompts) = (Vec::new(), Vec::new());
        for action in actions {
            match action {
                Action::Start(name, tokens) => {
                    live.extend(memory.start(&tenant(name), &tokens));
                    prompts.push((name, tokens));
                }
                Action::End(index) if index < live.len() => {
                    memory.pool.release(&live.swap_remove(index));
                }
                Action::End(_) => {}
                Action::Copy => saves.advance(Some(&file), &memory.pool, &memory.cache),
            }
        }
        while saves.wake(Instant::now()).is_some() {
            saves.advance(Some(&file), &memory.pool, &memory.cache);
        }
        let saved = outcome.blocking_recv().unwrap().unwrap();
        let (mut read, taken) = restore(&fs::read(&file.path).unwrap(), identity(), 9);
        prop_assert_eq!(taken.unwrap(), (saved.blocks as usize, 0));
        prop_assert_eq!(read.pool.counts().cached, saved.blocks as usize);
        for (name, prompt) in prompts {
            read.cached(&tenant(name), &prompt);
        }
    }
}

proptest! {
    #[test]
    fn flipped_bits_are_refused(flips in prop::collection::vec(any::<prop::sample::Index>(), 1..4)) {
        let good = bytes();
        let mut bad = good.clone();
        for flip in flips {
            let bit = flip.index(good.len() * 8);
            bad[bit / 8] ^= 1 << (bit % 8);
        }
        prop_assume!(bad != good);
        refusal(&bad);
    }

    #[test]
    fn random_bytes_are_refused(
        begins_well in any::<bool>(),
        random in prop::collection::vec(prop_oneof![0u8..3, any::<u8>()], 0..600),
        cut in any::<prop::sample::Index>(),
    ) {
        let good = bytes();
        let start = if begins_well { &good[..cut.index(good.len())] } else { &[] };
        let bad = [start, &random].concat();
        prop_assume!(bad != good);
        refusal(&bad);
    }
}
