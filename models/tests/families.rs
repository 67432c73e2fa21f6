//! Every family on small random weights, against logits that PyTorch computed for them; the same weights as
//! safetensors and as GGUF; and files that are not as they should be.
//!
//! With `SCONCE_TEST_DEVICE=cuda` the first GPU computes, where it has kernels for a model's head size.

mod common;

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::{self, Value};
use candle_core::{DType, Device, Tensor};
use common::gguf::{gguf_name, quantize, write_gguf_of};
use sconce_models::{Config, Decoder, KvCache, ModelError, RopeScaling, Span, Step};
use serde::Deserialize;
use tempfile::TempDir;

const FAMILIES: [&str; 7] = [
    "llama-untied",
    "llama-tied",
    "llama3-scaled",
    "llama3-scaled-old",
    "mistral-window",
    "qwen2",
    "qwen3",
];

#[derive(Deserialize)]
struct Expected {
    tokens: Vec<u32>,
    logits: Vec<Vec<f32>>,
}

fn folder(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(family)
}

fn expected(family: &str) -> Expected {
    serde_json::from_str(&fs::read_to_string(folder(family).join("logits.json")).unwrap()).unwrap()
}

fn load(path: &Path) -> Result<Decoder, ModelError> {
    Decoder::load(path, &Device::Cpu, DType::F32)
}

/// A family's model on the device of the tests; `None`, and said so, where a GPU has no kernels for its head size.
fn load_on(device: &Device, family: &str, dtype: DType) -> Option<Decoder> {
    match Decoder::load(&folder(family), device, dtype) {
        Err(error @ ModelError::UnsupportedOnGpu { .. }) => {
            println!("{family}: left out: {error}");
            None
        }
        loaded => Some(loaded.unwrap()),
    }
}

/// Logits of the last token of each chunk.
fn logits(decoder: &Decoder, tokens: &[u32], chunk: usize, block_size: usize, dtype: DType) -> Vec<Vec<f32>> {
    logits_on(&Device::Cpu, decoder, tokens, chunk, block_size, dtype)
}

/// The same where the decoder is on this device.
fn logits_on(
    device: &Device,
    decoder: &Decoder,
    tokens: &[u32],
    chunk: usize,
    block_size: usize,
    dtype: DType,
) -> Vec<Vec<f32>> {
    let blocks = tokens.len().div_ceil(block_size);
    let mut cache = KvCache::new(decoder.config(), blocks, block_size, dtype, device).unwrap();
    // Blocks in reverse, so that nothing works by their lying in order.
    let block_table: Vec<u32> = (0..blocks as u32).rev().collect();
    let mut rows = Vec::new();
    for (index, chunk_tokens) in tokens.chunks(chunk).enumerate() {
        let (start, len) = (index * chunk, chunk_tokens.len());
        let span = Span {
            start,
            len,
            block_table: block_table.clone(),
            logits: true,
        };
        let step = Step {
            tokens: chunk_tokens.to_vec(),
            sequences: vec![span],
        };
        rows.extend(decoder.forward(&step, &mut cache).unwrap().to_vec2().unwrap());
    }
    rows
}

fn distance(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn logits_are_pytorchs() {
    let device = common::device();
    for family in FAMILIES {
        let Some(decoder) = load_on(&device, family, DType::F32) else {
            continue;
        };
        let Expected {
            tokens,
            logits: expected,
        } = expected(family);
        let run = |chunk, block_size| logits_on(&device, &decoder, &tokens, chunk, block_size, DType::F32);
        let decoded = run(1, 16);
        for (position, (found, expected)) in decoded.iter().zip(&expected).enumerate() {
            let distance = distance(found, expected);
            assert!(distance < 2e-4, "{family}, position {position}: off by {distance}");
        }
        for block_size in [1, 5, 8, 16, 64] {
            // A GPU's blocks are powers of two, and its sums may differ in their last bits.
            if !device.is_cpu() && block_size == 5 {
                continue;
            }
            for chunk in [1, 3, 10, tokens.len()] {
                let found = run(chunk, block_size);
                let (found, decoded) = (found.last().unwrap(), decoded.last().unwrap());
                let same = found == decoded || !device.is_cpu() && distance(found, decoded) < 2e-4;
                assert!(same, "{family}: blocks of {block_size}, chunks of {chunk}");
            }
        }
    }
}

#[test]
fn half_precision_stays_near() {
    let device = common::device();
    for dtype in [DType::BF16, DType::F16] {
        for family in ["llama-untied", "llama-tied", "qwen3"] {
            let Some(decoder) = load_on(&device, family, dtype) else {
                continue;
            };
            let Expected {
                tokens,
                logits: expected,
            } = expected(family);
            let expected = expected.last().unwrap();
            let scale = expected.iter().fold(0f32, |max, x| max.max(x.abs()));
            let most = scale * if dtype == DType::BF16 { 0.1 } else { 0.01 };
            let whole = logits_on(&device, &decoder, &tokens, tokens.len(), 16, dtype);
            let off = distance(&whole[0], expected);
            assert!(off < most, "{family} as {dtype:?}: off by {off}");
            let decoded = logits_on(&device, &decoder, &tokens, 1, 16, dtype);
            let decoded = decoded.last().unwrap();
            let same = *decoded == whole[0] || !device.is_cpu() && distance(decoded, expected) < most;
            assert!(same, "{family} as {dtype:?}: chunks");
        }
    }
}

fn tensors(family: &str) -> HashMap<String, Tensor> {
    let files = fs::read_dir(folder(family)).unwrap().map(|entry| entry.unwrap().path());
    let files = files.filter(|path| path.extension().is_some_and(|extension| extension == "safetensors"));
    files
        .flat_map(|path| candle_core::safetensors::load(path, &Device::Cpu).unwrap())
        .collect()
}

/// Writes a family's fixture as GGUF, `change` applied to its tensors first.
fn write_gguf(family: &str, path: &Path, change: impl Fn(&mut HashMap<String, Tensor>)) {
    let config = Config::from_json(&folder(family).join("config.json")).unwrap();
    write_gguf_of(&config, tensors(family), |_| GgmlDType::F32, path, change);
}

#[test]
fn gguf_equals_its_safetensors_twin() {
    let temporary = TempDir::new().unwrap();
    for family in ["llama-untied", "llama-tied", "mistral-window", "qwen2", "qwen3"] {
        let path = temporary.path().join(family);
        write_gguf(family, &path, |_| {});
        let tokens = expected(family).tokens;
        let (gguf, safetensors) = (load(&path).unwrap(), load(&folder(family)).unwrap());
        assert_eq!(gguf.config(), safetensors.config(), "{family}");
        let run = |decoder| logits(decoder, &tokens, tokens.len(), 16, DType::F32);
        assert!(run(&gguf) == run(&safetensors), "{family}");
    }
}

/// A llama with rows as long as the longest quantization block and heads as wide as a GPU's kernels need them, its numbers
/// made up.
const WIDE: &str = r#"{
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 256, "vocab_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "max_position_embeddings": 64, "tie_word_embeddings": false
}"#;

fn wide_tensors() -> HashMap<String, Tensor> {
    let layer = |part: &str| format!("model.layers.0.{part}.weight");
    let shapes: [(String, &[usize]); 12] = [
        ("model.embed_tokens.weight".into(), &[32, 256]),
        ("lm_head.weight".into(), &[32, 256]),
        ("model.norm.weight".into(), &[256]),
        (layer("input_layernorm"), &[256]),
        (layer("post_attention_layernorm"), &[256]),
        (layer("self_attn.q_proj"), &[256, 256]),
        (layer("self_attn.k_proj"), &[128, 256]),
        (layer("self_attn.v_proj"), &[128, 256]),
        (layer("self_attn.o_proj"), &[256, 256]),
        (layer("mlp.gate_proj"), &[256, 256]),
        (layer("mlp.up_proj"), &[256, 256]),
        (layer("mlp.down_proj"), &[256, 256]),
    ];
    let numbers = |(index, (name, shape)): (usize, (String, &[usize]))| (name, made_up(shape, 7 + index));
    shapes.into_iter().enumerate().map(numbers).collect()
}

/// Waves of a growing frequency, so that sums over a row do not cancel out as those of others do.
fn made_up(shape: &[usize], frequency: usize) -> Tensor {
    let number = |i: usize| ((i * i * frequency) as f64 * 0.37).sin() as f32 / 8.0;
    let values: Vec<f32> = (0..shape.iter().product()).map(number).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// A model as a GGUF file at `path`, and as a folder of plain numbers that are those the file's types stand for.
fn twins(
    config: &str,
    tensors: HashMap<String, Tensor>,
    stored: impl Fn(&str) -> GgmlDType,
    path: &Path,
) -> [Decoder; 2] {
    let twin = TempDir::new().unwrap();
    fs::write(twin.path().join("config.json"), config).unwrap();
    let plain: HashMap<_, _> = tensors
        .iter()
        .map(|(name, tensor)| {
            let stored = quantize(tensor, stored(&gguf_name(name)));
            (name, stored.dequantize(&Device::Cpu).unwrap())
        })
        .collect();
    candle_core::safetensors::save(&plain, twin.path().join("model.safetensors")).unwrap();
    let config = Config::from_json(&twin.path().join("config.json")).unwrap();
    write_gguf_of(&config, tensors, stored, path, |_| {});
    [load(path).unwrap(), load(twin.path()).unwrap()]
}

#[test]
fn every_type_of_gguf_tensor_is_read() {
    use GgmlDType::*;
    let temporary = TempDir::new().unwrap();
    let gguf = temporary.path().join("model.gguf");
    let mut seen: Vec<Vec<Vec<f32>>> = Vec::new();
    for dtype in [F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2K, Q3K, Q4K, Q5K, Q6K] {
        let twins = twins(WIDE, wide_tensors(), |_| dtype, &gguf);
        let [found, plain] = twins.each_ref().map(five_logits);
        match dtype {
            F32 | F16 | BF16 | Q2K | Q3K => assert!(found == plain, "{dtype:?}"),
            _ => assert_near(&found, &plain, FLOAT32),
        }
        // What has blocks of four to eight bits stays nearly so small.
        let [bytes, plain] = twins.each_ref().map(|decoder| decoder.weight_bytes().unwrap());
        match dtype {
            F32 | F16 | BF16 | Q2K | Q3K => assert_eq!(bytes, plain, "{dtype:?}"),
            _ => assert!(bytes * 2 < plain, "{dtype:?}: {bytes} of {plain}"),
        }
        assert!(!seen.contains(&found), "{dtype:?} changes nothing");
        assert_near(&kept_quantized(&gguf), &found, EIGHT_BITS);
        seen.push(found);
    }
}

fn five_logits(decoder: &Decoder) -> Vec<Vec<f32>> {
    logits(decoder, &[3, 1, 4, 1, 5], 5, 16, DType::F32)
}

fn kept_quantized(gguf: &Path) -> Vec<Vec<f32>> {
    five_logits(&Decoder::load_quantized(gguf, &Device::Cpu, DType::F32).unwrap())
}

/// What activations in eight bits cost.
const EIGHT_BITS: f32 = 0.05;
/// What it costs to round otherwise, by no less digits than float32 has: blocks may be multiplied as whole numbers.
const FLOAT32: f32 = 2e-6;

fn assert_near(found: &[Vec<f32>], exact: &[Vec<f32>], within: f32) {
    let (found, exact) = (found.concat(), exact.concat());
    let norm = |numbers: &[f32]| numbers.iter().map(|x| x * x).sum::<f32>().sqrt();
    let off: Vec<f32> = found.iter().zip(&exact).map(|(found, exact)| found - exact).collect();
    assert!(norm(&off) < within * norm(&exact), "{} of {}", norm(&off), norm(&exact));
}

/// As files have it that give some matrices more bits than others, side by side in one projection too.
#[test]
fn gguf_tensors_of_several_types_are_read_side_by_side() {
    let temporary = TempDir::new().unwrap();
    let gguf = temporary.path().join("model.gguf");
    let check = |config: &str, tensors, stored: fn(&str) -> GgmlDType| {
        let [found, plain] = twins(config, tensors, stored, &gguf).each_ref().map(five_logits);
        assert_near(&found, &plain, FLOAT32);
        assert_near(&kept_quantized(&gguf), &found, EIGHT_BITS);
    };
    check(WIDE, wide_tensors(), |name| match name {
        "blk.0.attn_v.weight" => GgmlDType::Q6K,
        "blk.0.ffn_up.weight" => GgmlDType::Q8_0,
        "blk.0.attn_output.weight" => GgmlDType::F16,
        "blk.0.ffn_down.weight" | "output.weight" => GgmlDType::Q4K,
        _ => GgmlDType::Q4_1,
    });
    check(WIDE, wide_tensors(), |name| match name {
        "blk.0.attn_v.weight" => GgmlDType::Q3K,
        "blk.0.ffn_up.weight" => GgmlDType::Q6K,
        _ => GgmlDType::Q4K,
    });
    // With a bias, and an embedding table that is the output projection too.
    for family in ["qwen2", "llama-tied"] {
        let config = fs::read_to_string(folder(family).join("config.json")).unwrap();
        check(&config, tensors(family), |name| match name {
            name if name.contains("ffn_down") => GgmlDType::F32,
            _ => GgmlDType::Q8_0,
        });
    }
}

/// A tensor's name in its layer's attention, and its length.
type Vector = (&'static str, usize);

/// What each family adds to the wide llama: settings, and tensors.
const WIDE_FAMILIES: [(&str, &str, &[Vector]); 4] = [
    ("llama", "", &[]),
    ("mistral", r#""sliding_window": 9,"#, &[]),
    (
        "qwen2",
        "",
        &[("q_proj.bias", 256), ("k_proj.bias", 128), ("v_proj.bias", 128)],
    ),
    (
        "qwen3",
        r#""head_dim": 64,"#,
        &[("q_norm.weight", 64), ("k_norm.weight", 64)],
    ),
];

/// Fails unless every logit is within this share of the largest.
fn assert_rows_near(found: &[Vec<f32>], expected: &[Vec<f32>], share: f32, what: &str) {
    let scale = expected.concat().iter().fold(0f32, |most, x| most.max(x.abs()));
    for (row, (found, expected)) in found.iter().zip(expected).enumerate() {
        let off = distance(found, expected);
        assert!(off <= share * scale, "{what}, row {row}: off by {off} of {scale}");
    }
}

#[test]
fn a_gpu_computes_what_the_cpu_does() {
    let device = common::device();
    if device.is_cpu() {
        println!("left out: no GPU is named");
        return;
    }
    let temporary = TempDir::new().unwrap();
    let (folder, gguf) = (temporary.path(), temporary.path().join("model.gguf"));
    let tokens: Vec<u32> = (0..40).map(|i| i * 7 % 32).collect();
    for (family, settings, more) in WIDE_FAMILIES {
        let config = WIDE.replace(
            r#""model_type": "llama","#,
            &format!(r#""model_type": "{family}", {settings}"#),
        );
        fs::write(folder.join("config.json"), config).unwrap();
        let mut tensors = wide_tensors();
        for (index, (name, len)) in more.iter().enumerate() {
            tensors.insert(format!("model.layers.0.self_attn.{name}"), made_up(&[*len], 50 + index));
        }
        candle_core::safetensors::save(&tensors, folder.join("model.safetensors")).unwrap();
        let expected = logits(&load(folder).unwrap(), &tokens, 1, 16, DType::F32);
        for (dtype, share) in [(DType::F32, 1e-4), (DType::F16, 0.01), (DType::BF16, 0.1)] {
            let decoder = Decoder::load(folder, &device, dtype).unwrap();
            let what = format!("{family} as {dtype:?}");
            assert_rows_near(
                &logits_on(&device, &decoder, &tokens, 1, 16, dtype),
                &expected,
                share,
                &what,
            );
            let whole = logits_on(&device, &decoder, &tokens, tokens.len(), 16, dtype);
            assert_rows_near(&whole, &expected[tokens.len() - 1..], share, &what);
        }
        let config = Config::from_json(&folder.join("config.json")).unwrap();
        for stored in [GgmlDType::Q4_1, GgmlDType::Q8_0, GgmlDType::Q6K] {
            write_gguf_of(&config, tensors.clone(), |_| stored, &gguf, |_| {});
            let decoder = Decoder::load_quantized(&gguf, &device, DType::F32).unwrap();
            // A step of one row and one of many go through different kernels.
            for chunk in [1, tokens.len()] {
                let exact = logits(&load(&gguf).unwrap(), &tokens, chunk, 16, DType::F32);
                let found = logits_on(&device, &decoder, &tokens, chunk, 16, DType::F32);
                assert_near(&found, &exact, EIGHT_BITS);
            }
        }
        println!("{family}: on the GPU as on the CPU");
    }
}

#[test]
fn gguf_carries_llama3_scaling_as_divisors() {
    let family = "llama3-scaled";
    let (
        temporary,
        Expected {
            tokens,
            logits: expected,
        },
    ) = (TempDir::new().unwrap(), expected(family));
    let path = temporary.path().join("model.gguf");
    // What llama.cpp's converter computes of factor 8, low 1, high 4, original 16, theta 500, head size 8.
    let divisor = |i: usize| {
        let turns = 16.0 * 500f64.powf(-(i as f64) / 4.0) / (2.0 * std::f64::consts::PI);
        let keep = ((turns - 1.0) / 3.0).clamp(0.0, 1.0);
        (1.0 / (keep + (1.0 - keep) / 8.0)) as f32
    };
    let divisors: Vec<f32> = (0..4).map(divisor).collect();
    assert!(divisors.iter().any(|&d| d > 1.0 && d < 8.0), "no frequency is blended");
    write_gguf(family, &path, |tensors| {
        tensors.insert(
            "rope_freqs.weight".into(),
            Tensor::new(divisors.as_slice(), &Device::Cpu).unwrap(),
        );
    });
    let decoder = load(&path).unwrap();
    assert_eq!(decoder.config().rope.scaling, RopeScaling::Divisors(divisors));
    let found = logits(&decoder, &tokens, tokens.len(), 16, DType::F32);
    assert!(distance(&found[0], expected.last().unwrap()) < 2e-4);
}

fn refusal(path: &Path) -> String {
    let message = load(path).err().expect("the file must be refused").to_string();
    assert!(
        !message.contains('\n') && message.contains(path.to_str().unwrap()),
        "{message}"
    );
    message
}

#[test]
fn a_damaged_gguf_is_refused() {
    let temporary = TempDir::new().unwrap();
    let path = temporary.path().join("model.gguf");
    write_gguf("llama-tied", &path, |_| {});
    let whole = fs::read(&path).unwrap();
    for len in [0, 3, 20, 500, whole.len() / 2, whole.len() - 1000] {
        fs::write(&path, &whole[..len]).unwrap();
        assert!(refusal(&path).contains("damaged"), "{len} bytes");
    }
    fs::remove_file(&path).unwrap();
    assert!(refusal(&path).contains("cannot read"));
}

#[test]
fn a_missing_or_misshapen_tensor_is_named() {
    let temporary = TempDir::new().unwrap();
    let path = temporary.path().join("model.gguf");
    write_gguf("llama-tied", &path, |tensors| {
        drop(tensors.remove("blk.1.ffn_up.weight"))
    });
    assert!(refusal(&path).contains("lacks tensor blk.1.ffn_up.weight"));
    write_gguf("llama-tied", &path, |tensors| {
        let norm = Tensor::ones(31, DType::F32, &Device::Cpu).unwrap();
        tensors.insert("blk.0.attn_norm.weight".into(), norm);
    });
    let message = refusal(&path);
    assert!(
        message.contains("blk.0.attn_norm.weight") && message.contains("[31]") && message.contains("[32]"),
        "{message}"
    );
}

#[test]
fn an_unknown_architecture_is_refused_with_those_that_are_known() {
    let temporary = TempDir::new().unwrap();
    let path = temporary.path().join("model.gguf");
    let architecture = Value::String("mamba".into());
    gguf_file::write(
        &mut fs::File::create(&path).unwrap(),
        &[("general.architecture", &architecture)],
        &[],
    )
    .unwrap();
    let message = refusal(&path);
    assert!(
        message.contains("mamba is not supported") && message.contains("llama, mistral, qwen2, qwen3"),
        "{message}"
    );
}

#[test]
fn a_damaged_folder_is_refused() {
    let temporary = TempDir::new().unwrap();
    let copy = |name: &str| fs::copy(folder("llama-tied").join(name), temporary.path().join(name)).unwrap();
    assert!(refusal(temporary.path()).contains("cannot read"));
    copy("config.json");
    assert!(refusal(temporary.path()).contains("model.safetensors: "));
    copy("model.safetensors");
    assert!(load(temporary.path()).is_ok());
    let file = temporary.path().join("model.safetensors");
    let whole = fs::read(&file).unwrap();
    fs::write(&file, &whole[..whole.len() - 100]).unwrap();
    assert!(refusal(temporary.path()).contains("behind the end"));
    fs::write(&file, &whole[..100]).unwrap();
    assert!(refusal(temporary.path()).contains("longer than the file"));
    fs::write(temporary.path().join("config.json"), "{").unwrap();
    assert!(refusal(temporary.path()).contains("damaged"));
}

#[test]
fn a_type_without_arithmetic_is_refused() {
    let refused = Decoder::load(&folder("qwen2"), &Device::Cpu, DType::I64)
        .err()
        .unwrap()
        .to_string();
    assert!(refused.contains("i64") && refused.contains("bf16"), "{refused}");
}
