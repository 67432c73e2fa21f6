//! Cache files: damaged ones, and those whose checksum is right and whose records nobody of good will would write.

use std::sync::LazyLock;

use candle_core::{DType, Device};
use proptest::prelude::*;
use sconce::batching::{BlockCounts, BlockPool};
use sconce::engine::{CacheFile, Identity};
use sconce_models::{Config, KvCache, Rope, RopeScaling};
use twox_hash::XxHash3_128;

use super::{config, json, mutated, mutations, within_memory};

const BLOCKS: usize = 8;
const BLOCK_SIZE: usize = 2;
const DIGEST: usize = 16;

/// A pool and the KV cache of a model with one layer and one head of two dimensions.
fn memory() -> (BlockPool, KvCache) {
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
    let cache = KvCache::new(&config, BLOCKS, BLOCK_SIZE, DType::F32, &Device::Cpu).expect("a small cache");
    (BlockPool::new(BLOCKS, BLOCK_SIZE, true), cache)
}

fn identity() -> Identity {
    Identity {
        weights: "5c0".into(),
        dtype: "f32".into(),
        block_size: BLOCK_SIZE,
        block_bytes: memory().1.block_bytes(),
        layout: KvCache::layout(DType::F32, &Device::Cpu),
    }
}

/// All before the records.
static HEAD: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let identity = serde_json::to_vec(&identity()).expect("plain data");
    let mut bytes = b"SCONCEKV".to_vec();
    for number in [1, identity.len() as u32] {
        bytes.extend(number.to_le_bytes());
    }
    bytes.extend(identity);
    bytes
});

fn namespace(text: &str) -> Vec<u8> {
    [&[1], &(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat()
}

fn block(namespace: u32, above: u32, tokens: [u32; BLOCK_SIZE], fill: u8) -> Vec<u8> {
    let mut bytes = vec![2];
    for number in [namespace, above].into_iter().chain(tokens) {
        bytes.extend(number.to_le_bytes());
    }
    bytes.resize(bytes.len() + identity().block_bytes, fill);
    bytes
}

/// The file of these records, with its end and the digest that its bytes have.
fn sealed(records: &[u8]) -> Vec<u8> {
    resealed([&HEAD[..], records, &[0], &[0; DIGEST]].concat())
}

/// With the digest that the bytes have in place of what stands there.
fn resealed(mut bytes: Vec<u8>) -> Vec<u8> {
    bytes.truncate(bytes.len().saturating_sub(DIGEST));
    let mut digest = XxHash3_128::new();
    digest.write(&bytes);
    bytes.extend(digest.finish_128().to_le_bytes());
    bytes
}

/// Two prompts that begin alike, and one of another tenant.
static GOOD: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let records = [
        namespace("[\"a\",null]"),
        block(0, u32::MAX, [1, 1], 1),
        block(0, 0, [2, 2], 2),
        block(0, 0, [3, 3], 3),
        namespace("null"),
        block(1, u32::MAX, [1, 1], 4),
    ];
    sealed(&records.concat())
});

/// What the pool has after a start with this file.
fn started_with(bytes: &[u8]) -> BlockCounts {
    within_memory(|| {
        let written = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(written.path(), bytes).expect("writes");
        let (mut pool, mut cache) = memory();
        let file = CacheFile {
            path: written.path().to_owned(),
            identity: identity(),
        };
        file.load(&mut pool, &mut cache);
        pool.counts()
    })
}

/// Records that are well formed each by itself, or nearly.
fn records() -> impl Strategy<Value = Vec<u8>> {
    let text = prop_oneof![
        4 => prop::sample::select(vec!["null", "[\"a\",null]", "[null,\"salt\"]", "[null,null]"]).prop_map(str::to_owned),
        1 => json().prop_map(|json| json.to_string()),
        1 => "\\PC{0,20}",
    ];
    let number = || prop_oneof![6 => 0..3u32, 1 => Just(u32::MAX), 1 => any::<u32>()];
    let above = prop_oneof![2 => Just(u32::MAX), 3 => 0..6u32, 1 => any::<u32>()];
    let record = prop_oneof![
        3 => text.prop_map(|text| namespace(&text)),
        6 => (number(), above, [number(), number()], any::<u8>())
            .prop_map(|(namespace, above, tokens, fill)| block(namespace, above, tokens, fill)),
        1 => prop::collection::vec(any::<u8>(), 1..4),
    ];
    prop::collection::vec(record, 0..16).prop_map(|records| records.concat())
}

#[test]
fn the_file_that_is_harmed_is_read_when_it_is_whole() {
    let read = BlockCounts {
        free: BLOCKS - 4,
        cached: 4,
        ..BlockCounts::default()
    };
    assert_eq!(started_with(&GOOD), read);
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn a_harmed_file_is_not_used(changes in mutations()) {
        let bytes = mutated(&GOOD, GOOD.len(), &changes);
        prop_assume!(bytes != *GOOD);
        prop_assert_eq!(started_with(&bytes).free, BLOCKS);
    }

    #[test]
    fn what_is_no_file_is_not_used(bytes in prop::collection::vec(any::<u8>(), 0..200), begins_well in any::<bool>()) {
        let start = if begins_well { &HEAD[..] } else { &[] };
        prop_assert_eq!(started_with(&[start, &bytes].concat()).free, BLOCKS);
    }

    #[test]
    fn a_hostile_file_with_a_right_checksum_is_used_or_not(
        bytes in prop_oneof![
            records().prop_map(|records| sealed(&records)),
            (records(), mutations()).prop_map(|(records, changes)| {
                let bytes = sealed(&records);
                resealed(mutated(&bytes, bytes.len(), &changes))
            }),
            mutations().prop_map(|changes| resealed(mutated(&GOOD, GOOD.len(), &changes))),
        ],
    ) {
        let counts = started_with(&bytes);
        prop_assert_eq!((counts.held, counts.pinned), (0, 0));
        prop_assert_eq!(counts.free + counts.cached, BLOCKS);
    }
}
