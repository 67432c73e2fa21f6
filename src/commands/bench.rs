//! `sconce bench`: what the model does without HTTP, beside what the device could.

use std::time::{Duration, Instant};

use candle_core::Device;
use sconce_models::{Config, Decoder, KvCache, ModelError, Span, Step, ceilings};

use super::{device, model_files, model_files::PullError};
use crate::{config::Bench, engine};

/// Tokens that each sequence already has when it decodes.
const CONTEXT: usize = 128;
/// How long each line is measured, at least.
const BUDGET: Duration = Duration::from_secs(1);

/// Why nothing could be measured.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    #[error(transparent)]
    Pull(#[from] PullError),
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(transparent)]
    Device(#[from] device::DeviceError),
    #[error("a step failed: {0}; fewer tokens or a smaller batch may fit")]
    Step(#[from] candle_core::Error),
}

/// The device's measured limits.
struct Ceilings {
    /// GB/s, read and written together.
    copy: f64,
    /// GFLOP/s of a large matmul.
    matmul: f64,
}

/// Measures and prints a table.
pub fn run(settings: Bench) -> Result<(), BenchError> {
    device::set_threads(settings.model.threads);
    let path = model_files::resolve(&settings.choice.model)?;
    let device = device::open(settings.model.device)?;
    let dtype = device::dtype(settings.model.dtype).unwrap_or(engine::default_dtype(&device));
    let decoder = Decoder::load(&path, &device, dtype)?;
    let config = decoder.config();
    let most = config
        .max_position_embeddings
        .min(settings.model.max_model_len.unwrap_or(usize::MAX));
    let prefills: Vec<_> = [128, 512, 2048, 8192]
        .into_iter()
        .filter(|&length| length <= most)
        .collect();
    let mut decodes: Vec<_> = [1, 2, 4, 8, 16, 32, 64]
        .into_iter()
        .filter(|&batch| batch < settings.batching.max_batch)
        .collect();
    decodes.push(settings.batching.max_batch);

    let ceilings = Ceilings {
        copy: ceilings::copy_bandwidth(&device, BUDGET)?,
        matmul: ceilings::matmul_rate(&device, dtype, BUDGET)?,
    };
    println!("model    {} ({dtype:?} on {device:?})", settings.choice.model);
    println!(
        "ceilings copy {:.1} GB/s, matmul {:.0} GFLOP/s\n",
        ceilings.copy,
        ceilings.matmul
    );
    println!(
        "{:<8} {:>6} {:>10} {:>10} {:>8} {:>8}",
        "phase", "tokens", "ms a step", "tokens/s", "of FLOPs", "of bytes"
    );
    let measure = Measure {
        decoder: &decoder,
        device: &device,
        dtype,
        block_size: settings.model.block_size,
        ceilings,
    };
    for length in prefills {
        measure.line("prefill", 1, 0, length)?;
    }
    for batch in decodes {
        measure.line("decode", batch, CONTEXT, 1)?;
    }
    Ok(())
}

struct Measure<'a> {
    decoder: &'a Decoder,
    device: &'a Device,
    dtype: candle_core::DType,
    block_size: usize,
    ceilings: Ceilings,
}

impl Measure<'_> {
    /// The median time of a step that runs `tokens` tokens for each of `batch` sequences behind `context` others.
    fn line(&self, phase: &str, batch: usize, context: usize, tokens: usize) -> Result<(), BenchError> {
        let config = self.decoder.config();
        let per_sequence = (context + tokens).div_ceil(self.block_size);
        let mut cache = KvCache::new(config, per_sequence * batch, self.block_size, self.dtype, self.device)?;
        let spans = (0..batch).map(|index| Span {
            start: context,
            len: tokens,
            block_table: (0..per_sequence)
                .map(|block| (index * per_sequence + block) as u32)
                .collect(),
            logits: true,
        });
        let ids = (0..batch * tokens)
            .map(|index| (index * 31 % config.vocab_size) as u32)
            .collect();
        let step = Step {
            tokens: ids,
            sequences: spans.collect(),
        };
        let mut times = Vec::new();
        let started = Instant::now();
        // The first pass warms caches and pages.
        while times.len() < 4 || started.elapsed() < BUDGET {
            let begun = Instant::now();
            self.decoder.forward(&step, &mut cache)?.to_device(&Device::Cpu)?;
            times.push(begun.elapsed().as_secs_f64());
        }
        times.remove(0);
        times.sort_by(f64::total_cmp);
        let seconds = times[times.len() / 2];
        let work = work(config, batch, context, tokens, self.dtype.size_in_bytes());
        println!(
            "{phase:<8} {:>6} {:>10.2} {:>10.0} {:>7.0}% {:>7.0}%",
            batch * tokens,
            seconds * 1e3,
            (batch * tokens) as f64 / seconds,
            100.0 * work.flops / 1e9 / seconds / self.ceilings.matmul,
            100.0 * work.bytes / 1e9 / seconds / self.ceilings.copy,
        );
        Ok(())
    }
}

/// What a step needs at least.
struct Work {
    flops: f64,
    bytes: f64,
}

/// Each weight is read once a step and multiplied once a token, the vocabulary projection once a sequence; a token's
/// attention reads all keys and values before it.
fn work(config: &Config, batch: usize, context: usize, tokens: usize, size: usize) -> Work {
    let (heads, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
    let attention = config.hidden_size * (2 * heads + 2 * kv);
    let mlp = 3 * config.hidden_size * config.intermediate_size;
    let weights = config.layers * (attention + mlp);
    let head = config.vocab_size * config.hidden_size;
    let rows = batch * tokens;
    let seen = batch * (tokens * context + tokens * (tokens + 1) / 2);
    let flops = 2 * rows * weights + 2 * batch * head + 4 * seen * heads * config.layers;
    let bytes = size * (weights + head + 2 * kv * config.layers * batch * (context + 2 * tokens));
    Work {
        flops: flops as f64,
        bytes: bytes as f64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // The figures for the default model: 106 million weights in the layers, 28 million in the vocabulary.
    #[test]
    fn a_decoded_token_costs_two_operations_a_weight() {
        let config: Config = serde_json::from_value(serde_json::json!({
            "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "vocab_size": 49152,
            "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 8192, "rope_theta": 1e5, "tie_word_embeddings": true
        }))
        .unwrap();
        let work = work(&config, 1, 0, 1, 4);
        assert!((work.flops / (2.0 * 134.5e6) - 1.0).abs() < 0.01, "{}", work.flops);
        assert!((work.bytes / (4.0 * 134.5e6) - 1.0).abs() < 0.01, "{}", work.bytes);
    }
}
