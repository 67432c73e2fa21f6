//! Models as llama.cpp's converter writes them to GGUF files.

use std::{collections::HashMap, fs, path::Path};

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Tensor};
use sconce_models::Config;

/// llama.cpp's order of the rows of Q and K: the halves of each head interleaved.
fn interleave(weight: &Tensor, heads: usize) -> Tensor {
    let (rows, width) = weight.dims2().unwrap();
    let halves = weight.reshape((heads, 2, rows / heads / 2, width)).unwrap();
    halves
        .transpose(1, 2)
        .unwrap()
        .contiguous()
        .unwrap()
        .reshape((rows, width))
        .unwrap()
}

pub fn gguf_name(name: &str) -> String {
    let names = [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("model.layers", "blk"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ];
    names
        .iter()
        .fold(name.to_string(), |name, (from, to)| name.replace(from, to))
}

/// Metadata as llama.cpp's converter writes it.
fn metadata(config: &Config) -> Vec<(String, Value)> {
    let number = |key: &str, value: usize| (format!("{}.{key}", config.architecture), Value::U32(value as u32));
    let mut metadata = vec![
        (
            "general.architecture".to_string(),
            Value::String(config.architecture.clone()),
        ),
        number("block_count", config.layers),
        number("context_length", config.max_position_embeddings),
        number("embedding_length", config.hidden_size),
        number("feed_forward_length", config.intermediate_size),
        number("attention.head_count", config.heads),
        number("attention.head_count_kv", config.kv_heads),
        number("attention.key_length", config.head_dim),
        (
            format!("{}.attention.layer_norm_rms_epsilon", config.architecture),
            Value::F32(config.rms_norm_eps as f32),
        ),
        (
            format!("{}.rope.freq_base", config.architecture),
            Value::F32(config.rope.theta as f32),
        ),
    ];
    metadata.extend(
        config
            .sliding_window
            .map(|window| number("attention.sliding_window", window)),
    );
    metadata
}

/// Matrices are stored as `dtype`, and all else as float32.
pub fn quantize(tensor: &Tensor, dtype: GgmlDType) -> QTensor {
    let dtype = if tensor.rank() == 2 { dtype } else { GgmlDType::F32 };
    QTensor::quantize(&tensor.to_dtype(DType::F32).unwrap(), dtype).unwrap()
}

/// Writes tensors of these Hugging Face names, each stored as `dtype` says of its name in GGUF; `change` is applied to them
/// first.
pub fn write_gguf_of(
    config: &Config,
    mut tensors: HashMap<String, Tensor>,
    dtype: impl Fn(&str) -> GgmlDType,
    path: &Path,
    change: impl Fn(&mut HashMap<String, Tensor>),
) {
    if config.architecture == "llama" || config.architecture == "mistral" {
        for (name, tensor) in &mut tensors {
            for (part, heads) in [("q_proj.weight", config.heads), ("k_proj.weight", config.kv_heads)] {
                if name.ends_with(part) {
                    *tensor = interleave(tensor, heads);
                }
            }
        }
    }
    tensors = tensors
        .into_iter()
        .map(|(name, tensor)| (gguf_name(&name), tensor))
        .collect();
    change(&mut tensors);
    let quantized: Vec<_> = tensors
        .iter()
        .map(|(name, tensor)| (name.as_str(), quantize(tensor, dtype(name))))
        .collect();
    let quantized: Vec<_> = quantized.iter().map(|(name, tensor)| (*name, tensor)).collect();
    let metadata = metadata(config);
    let metadata: Vec<_> = metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
    gguf_file::write(&mut fs::File::create(path).unwrap(), &metadata, &quantized).unwrap();
}
