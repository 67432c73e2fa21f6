//! Model files that were changed on purpose: each is read, or refused with an error; none panics, hangs, or takes more
//! memory than its own size explains. `scripts/fuzz.sh` runs a hundred thousand of each.

use std::path::Path;
use std::sync::{LazyLock, Mutex};

use candle_core::quantized::gguf_file::{Value as G, write};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use peak_alloc::PeakAlloc;
use proptest::prelude::*;
use sconce_models::{Decoder, ModelError};

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

/// Bytes that one case may take at once.
const MOST_MEMORY: usize = 100 << 20;

/// As many cases as `PROPTEST_CASES` says, and few without it.
fn config() -> ProptestConfig {
    let cases = std::env::var("PROPTEST_CASES")
        .ok()
        .and_then(|cases| cases.parse().ok());
    ProptestConfig {
        cases: cases.unwrap_or(64),
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

/// Loads, alone, and fails where that took too much memory. GGUF files are loaded in both ways.
fn load(path: &Path) -> Result<(), ModelError> {
    load_with(|| Decoder::load(path, &Device::Cpu, DType::F32))
}

fn load_with(load: impl FnOnce() -> Result<Decoder, ModelError>) -> Result<(), ModelError> {
    // The allocator counts for the whole process, so cases of several tests must not overlap.
    static ALONE: Mutex<()> = Mutex::new(());
    let _alone = ALONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let before = ALLOCATOR.current_usage();
    ALLOCATOR.reset_peak_usage();
    let result = load().map(drop);
    let took = ALLOCATOR.peak_usage().saturating_sub(before);
    assert!(took <= MOST_MEMORY, "took {took} bytes at once");
    result
}

/// A whole model in one GGUF file, and how long its header is.
static GGUF: LazyLock<(Vec<u8>, usize)> = LazyLock::new(|| {
    let (hidden, mlp, vocabulary) = (32usize, 32usize, 16usize);
    let size = |value: usize| G::U32(value as u32);
    let metadata = [
        ("general.architecture", G::String("llama".into())),
        ("llama.embedding_length", size(hidden)),
        ("llama.feed_forward_length", size(mlp)),
        ("llama.block_count", size(1)),
        ("llama.attention.head_count", size(2)),
        ("llama.attention.head_count_kv", size(1)),
        ("llama.context_length", size(64)),
        ("llama.attention.layer_norm_rms_epsilon", G::F32(1e-5)),
        (
            "tokenizer.ggml.tokens",
            G::Array(vec![G::String("a".into()); vocabulary]),
        ),
    ];
    let shapes = [
        ("token_embd.weight", vec![vocabulary, hidden]),
        ("output_norm.weight", vec![hidden]),
        ("rope_freqs.weight", vec![8]),
        ("blk.0.attn_norm.weight", vec![hidden]),
        ("blk.0.attn_q.weight", vec![hidden, hidden]),
        ("blk.0.attn_k.weight", vec![hidden / 2, hidden]),
        ("blk.0.attn_v.weight", vec![hidden / 2, hidden]),
        ("blk.0.attn_output.weight", vec![hidden, hidden]),
        ("blk.0.ffn_norm.weight", vec![hidden]),
        ("blk.0.ffn_gate.weight", vec![mlp, hidden]),
        ("blk.0.ffn_up.weight", vec![mlp, hidden]),
        ("blk.0.ffn_down.weight", vec![hidden, mlp]),
    ];
    let tensors: Vec<(&str, QTensor)> = shapes
        .iter()
        .map(|(name, shape)| {
            let ones = Tensor::ones(shape.as_slice(), DType::F32, &Device::Cpu).unwrap();
            let matrix = shape.len() == 2;
            let dtype = if matrix { GgmlDType::Q4_1 } else { GgmlDType::F32 };
            (*name, QTensor::quantize(&ones, dtype).unwrap())
        })
        .collect();
    let data: usize = tensors.iter().map(|(_, tensor)| tensor.storage_size_in_bytes()).sum();
    let metadata: Vec<(&str, &G)> = metadata.iter().map(|(key, value)| (*key, value)).collect();
    let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(name, tensor)| (*name, tensor)).collect();
    let mut bytes = std::io::Cursor::new(Vec::new());
    write(&mut bytes, &metadata, &tensors).unwrap();
    let bytes = bytes.into_inner();
    let header = bytes.len() - data;
    (bytes, header)
});

fn fixture(name: &str) -> Vec<u8> {
    std::fs::read(
        Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/fixtures/llama-tied")
            .join(name),
    )
    .unwrap()
}

static SAFETENSORS: LazyLock<Vec<u8>> = LazyLock::new(|| fixture("model.safetensors"));
static CONFIG: LazyLock<Vec<u8>> = LazyLock::new(|| fixture("config.json"));

/// A change to a file: bytes overwritten, a number made extreme, digits put in, an end cut off, a piece repeated.
#[derive(Debug, Clone)]
enum Mutation {
    Set(prop::sample::Index, u8),
    Number(prop::sample::Index, u64),
    Digits(prop::sample::Index, String),
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
        Just(1 << 62),
        0..70_000u64
    ];
    let one = prop_oneof![
        6 => (at(), any::<u8>()).prop_map(|(at, byte)| Mutation::Set(at, byte)),
        6 => (at(), extreme).prop_map(|(at, number)| Mutation::Number(at, number)),
        3 => (at(), "[0-9]{1,20}").prop_map(|(at, digits)| Mutation::Digits(at, digits)),
        1 => at().prop_map(Mutation::Cut),
        1 => (at(), 1..40usize, 1..200usize).prop_map(|(at, length, times)| Mutation::Repeat(at, length, times)),
    ];
    prop::collection::vec(one, 1..5)
}

/// The bytes with all changes, which begin within the first `reach`.
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
            Mutation::Digits(at, digits) => {
                let at = at.index(reach);
                bytes.splice(at..at, digits.bytes());
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

fn load_file(bytes: &[u8]) -> Result<(), ModelError> {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), bytes).unwrap();
    load(file.path())?;
    load_with(|| Decoder::load_quantized(file.path(), &Device::Cpu, DType::F32))
}

fn load_folder(config: &[u8], weights: &[u8]) -> Result<(), ModelError> {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("config.json"), config).unwrap();
    std::fs::write(folder.path().join("model.safetensors"), weights).unwrap();
    load(folder.path())
}

#[test]
fn unchanged_files_load() {
    load_file(&GGUF.0).unwrap();
    load_folder(&CONFIG, &SAFETENSORS).unwrap();
}

#[test]
fn sizes_that_no_model_has_are_refused() {
    let refuse = |value: &str| {
        let mut config: serde_json::Value = serde_json::from_slice(&CONFIG).unwrap();
        for key in [
            "hidden_size",
            "vocab_size",
            "num_hidden_layers",
            "intermediate_size",
            "max_position_embeddings",
        ] {
            config[key] = serde_json::from_str(value).unwrap();
            assert!(
                load_folder(config.to_string().as_bytes(), &SAFETENSORS).is_err(),
                "{key} = {value}"
            );
        }
    };
    let sizes = [
        "18446744073709551615",
        "4611686018427387904",
        "1099511627776",
        "-1",
        "1e300",
        "0",
    ];
    sizes.into_iter().for_each(refuse);
}

/// A header of nothing but brackets, and one that claims to be as long as memory.
#[test]
fn a_header_is_no_longer_than_its_file() {
    let header = |length: u64, rest: &[u8]| [&length.to_le_bytes()[..], rest].concat();
    let deep = "[".repeat(1 << 20);
    for weights in [
        header(u64::MAX, b"{}"),
        header(1 << 40, b"{}"),
        header(deep.len() as u64, deep.as_bytes()),
    ] {
        assert!(load_folder(&CONFIG, &weights).is_err());
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn a_changed_gguf_header_is_read_or_refused(changes in mutations()) {
        drop(load_file(&mutated(&GGUF.0, GGUF.1, &changes)));
    }

    #[test]
    fn bytes_behind_ggufs_magic_are_refused(rest in prop::collection::vec(any::<u8>(), 0..300), version in 0..5u32) {
        prop_assert!(load_file(&[b"GGUF", &version.to_le_bytes()[..], &rest].concat()).is_err());
    }

    #[test]
    fn a_changed_safetensors_header_is_read_or_refused(changes in mutations()) {
        let header = 8 + u64::from_le_bytes(SAFETENSORS[..8].try_into().unwrap()) as usize;
        drop(load_folder(&CONFIG, &mutated(&SAFETENSORS, header, &changes)));
    }

    #[test]
    fn a_changed_configuration_is_read_or_refused(changes in mutations()) {
        drop(load_folder(&mutated(&CONFIG, usize::MAX, &changes), &SAFETENSORS));
    }
}
