//! Hostile input at every door: requests, chat templates, model files, cache files, streams of tokens. Whatever comes, the
//! answer is a value or an error: no panic, no hang, and no more than [`MOST_MEMORY`] for any of it.
//!
//! Few cases run by default; `scripts/fuzz.sh` runs a hundred thousand of each.

mod cache_file;
mod files;
mod requests;
mod streams;
mod templates;

use std::path::Path;
use std::sync::{LazyLock, Mutex};

use peak_alloc::PeakAlloc;
use proptest::prelude::*;
use sconce::text::Tokenizer;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

/// Bytes that one case may take at once.
const MOST_MEMORY: usize = 100 << 20;

const VOCABULARY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/smollm2-vocabulary.gguf");
static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| Tokenizer::open(Path::new(VOCABULARY)).expect("the fixture"));

/// As many cases as `PROPTEST_CASES` says, and few without it.
fn config() -> ProptestConfig {
    let cases = std::env::var("PROPTEST_CASES")
        .ok()
        .and_then(|cases| cases.parse().ok());
    ProptestConfig {
        cases: cases.unwrap_or(48),
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

/// Runs one case, alone, and fails where it took too much memory.
fn within_memory<T>(case: impl FnOnce() -> T) -> T {
    // The allocator counts for the whole process, so cases of several tests must not overlap.
    static ALONE: Mutex<()> = Mutex::new(());
    let _alone = ALONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    LazyLock::force(&TOKENIZER);
    let before = ALLOCATOR.current_usage();
    ALLOCATOR.reset_peak_usage();
    let result = case();
    let took = ALLOCATOR.peak_usage().saturating_sub(before);
    assert!(took <= MOST_MEMORY, "took {took} bytes at once");
    result
}

/// Any JSON, not large.
fn json() -> impl Strategy<Value = serde_json::Value> {
    let leaf = prop_oneof![
        Just(serde_json::Value::Null),
        any::<bool>().prop_map(Into::into),
        any::<i64>().prop_map(Into::into),
        any::<f64>().prop_map(|number| serde_json::json!(number)),
        "\\PC{0,12}".prop_map(Into::into),
    ];
    leaf.prop_recursive(4, 24, 6, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Into::into),
            prop::collection::vec(("[a-z_]{1,8}", inner), 0..6).prop_map(|fields| fields.into_iter().collect()),
        ]
    })
}

/// A change to a file or a body: bytes overwritten, a number made extreme, an end cut off, a piece repeated.
#[derive(Debug, Clone)]
enum Mutation {
    Set(prop::sample::Index, u8),
    Number(prop::sample::Index, u64),
    Cut(prop::sample::Index),
    Repeat(prop::sample::Index, usize, usize),
}

fn mutations() -> impl Strategy<Value = Vec<Mutation>> {
    let at = any::<prop::sample::Index>;
    let extreme = prop_oneof![
        Just(0),
        Just(u64::MAX),
        Just(1 << 31),
        Just(1 << 40),
        Just(u64::from(u32::MAX)),
        0..70_000u64
    ];
    let one = prop_oneof![
        6 => (at(), any::<u8>()).prop_map(|(at, byte)| Mutation::Set(at, byte)),
        6 => (at(), extreme).prop_map(|(at, number)| Mutation::Number(at, number)),
        1 => at().prop_map(Mutation::Cut),
        1 => (at(), 1..40usize, 1..200usize).prop_map(|(at, length, times)| Mutation::Repeat(at, length, times)),
    ];
    prop::collection::vec(one, 1..6)
}

/// The bytes with all changes, none of them behind the first `reach`.
fn mutated(bytes: &[u8], reach: usize, mutations: &[Mutation]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for mutation in mutations {
        let reach = reach.min(bytes.len());
        if reach == 0 {
            break;
        }
        match mutation {
            Mutation::Set(at, byte) => bytes[at.index(reach)] = *byte,
            Mutation::Number(at, number) => {
                let at = at.index(reach);
                let end = (at + 8).min(bytes.len());
                bytes[at..end].copy_from_slice(&number.to_le_bytes()[..end - at]);
            }
            Mutation::Cut(at) => bytes.truncate(at.index(reach)),
            Mutation::Repeat(at, length, times) => {
                let at = at.index(reach);
                let piece = bytes[at..(at + length).min(bytes.len())].repeat(*times);
                bytes.splice(at..at, piece);
            }
        }
    }
    bytes
}
