//! `sconce bench`: what the model does without HTTP, beside what the device could.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use candle_core::Device;
use sconce_models::{Config, Decoder, Draw, KvCache, ModelError, Span, Step, ceilings};
use serde::Serialize;

use super::{OutputError, device, model_files, model_files::PullError, say};
use crate::config::{Bench, LoadFormat};
use crate::engine;

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
    #[error("cannot write {}: {source}; choose another `--save-json`", path.display())]
    Write { path: PathBuf, source: std::io::Error },
    #[error("a step failed: {0}; fewer tokens or a smaller batch may fit")]
    Step(#[from] candle_core::Error),
    #[error(transparent)]
    Output(#[from] OutputError),
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
    let device = device::open(settings.model.device)?;
    let dtype = device::dtype(settings.model.dtype).unwrap_or(engine::default_dtype(&device));
    // Of quantized weights on a GPU, nearly what their file has.
    let mut file_bytes = None;
    let decoder = match settings.model.load_format {
        LoadFormat::Files => {
            let path = model_files::resolve(&settings.choice.model)?;
            if settings.model.quantized {
                file_bytes = path.metadata().ok().map(|file| file.len());
                Decoder::load_quantized(&path, &device, dtype)?
            } else {
                Decoder::load(&path, &device, dtype)?
            }
        }
        LoadFormat::Dummy if settings.model.quantized => {
            let path = settings.choice.model.into();
            return Err(ModelError::NotQuantized { path }.into());
        }
        LoadFormat::Dummy => Decoder::dummy(&model_files::shape(&settings.choice.model)?, &device, dtype)?,
    };
    let config = decoder.config();
    let most = config
        .max_position_embeddings
        .min(settings.model.max_model_len.unwrap_or(usize::MAX));
    // A GPU is busy only with longer prompts.
    let lengths = if device.is_cpu() {
        [128, 512, 2048]
    } else {
        [128, 1024, 8192]
    };
    let prefills: Vec<_> = lengths.into_iter().filter(|&length| length <= most).collect();
    let mut decodes: Vec<_> = [1, 2, 4, 8, 16, 32, 64]
        .into_iter()
        .filter(|&batch| batch < settings.batching.max_batch)
        .collect();
    decodes.push(settings.batching.max_batch);

    let ceilings = Ceilings {
        copy: ceilings::copy_bandwidth(&device, BUDGET)?,
        matmul: ceilings::matmul_rate(&device, dtype, decoder.arithmetic(), BUDGET)?,
    };
    say(format_args!(
        "model    {} ({dtype:?} on {device:?})\nceilings copy {:.1} GB/s, matmul {:.0} GFLOP/s\n",
        settings.choice.model, ceilings.copy, ceilings.matmul
    ))?;
    say(format_args!(
        "{:<8} {:>6} {:>10} {:>10} {:>8} {:>8}",
        "phase", "tokens", "ms a step", "tokens/s", "of FLOPs", "of bytes"
    ))?;
    let measure = Measure {
        decoder: &decoder,
        device: &device,
        dtype,
        block_size: settings.model.block_size,
        graphs: settings.model.cuda_graphs,
        weight_bytes: decoder.weight_bytes().or(file_bytes),
        ceilings,
    };
    let mut lines = Vec::new();
    for length in prefills {
        lines.push(measure.line("prefill", 1, 0, length)?);
    }
    for batch in decodes {
        lines.push(measure.line("decode", batch, CONTEXT, 1)?);
    }
    let Some(path) = settings.save_json else { return Ok(()) };
    let report = serde_json::json!({
        "model": settings.choice.model,
        "device": format!("{device:?}"),
        "dtype": dtype.as_str(),
        "cuda_graphs": settings.model.cuda_graphs,
        "quantized": settings.model.quantized,
        "ceilings": {"copy_gb_per_second": measure.ceilings.copy, "matmul_gflop_per_second": measure.ceilings.matmul},
        "steps": lines,
    });
    let text = format!("{report:#}\n");
    std::fs::write(&path, text).map_err(|source| BenchError::Write { path, source })
}

/// One row of the table.
#[derive(Serialize)]
struct Line {
    phase: &'static str,
    batch: usize,
    tokens: usize,
    seconds: f64,
    /// Of what the device's measured limits allow.
    share_of_flops: f64,
    share_of_bytes: f64,
}

struct Measure<'a> {
    decoder: &'a Decoder,
    device: &'a Device,
    dtype: candle_core::DType,
    block_size: usize,
    graphs: bool,
    /// Where they are known not to be all stored as `dtype`.
    weight_bytes: Option<u64>,
    ceilings: Ceilings,
}

impl Measure<'_> {
    /// The median time of a step that runs `tokens` tokens for each of `batch` sequences behind `context` others.
    fn line(&self, phase: &'static str, batch: usize, context: usize, tokens: usize) -> Result<Line, BenchError> {
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
        let graphs = self.graphs && tokens == 1;
        fill(&mut cache)?;
        self.decoder.prepare(&mut cache, batch * tokens, batch, graphs)?;
        let mut times = Vec::new();
        let started = Instant::now();
        // The first pass warms caches and pages.
        while times.len() < 4 || started.elapsed() < BUDGET {
            let begun = Instant::now();
            self.run(&step, &mut cache)?;
            times.push(begun.elapsed().as_secs_f64());
        }
        times.remove(0);
        times.sort_by(f64::total_cmp);
        let seconds = times[times.len() / 2];
        let size = self.dtype.size_in_bytes();
        let work = work(config, batch, context, tokens, size, self.weight_bytes);
        let line = Line {
            phase,
            batch,
            tokens: batch * tokens,
            seconds,
            share_of_flops: work.flops / 1e9 / seconds / self.ceilings.matmul,
            share_of_bytes: work.bytes / 1e9 / seconds / self.ceilings.copy,
        };
        say(format_args!(
            "{phase:<8} {:>6} {:>10.2} {:>10.0} {:>7.0}% {:>7.0}%",
            line.tokens,
            seconds * 1e3,
            line.tokens as f64 / seconds,
            100.0 * line.share_of_flops,
            100.0 * line.share_of_bytes,
        ))?;
        Ok(line)
    }

    /// A step to its end: tokens where the device chooses them, else logits.
    fn run(&self, step: &Step, cache: &mut KvCache) -> Result<(), BenchError> {
        if !self.decoder.samples() {
            self.decoder.forward(step, cache)?;
            return Ok(());
        }
        self.decoder
            .sample(step, cache, &vec![Draw::greedy(); step.sequences.len()])?;
        Ok(())
    }
}

/// Writes every block: memory that was never written is one page of zeros, over and over, which is read faster than a cache
/// in use.
fn fill(cache: &mut KvCache) -> Result<(), BenchError> {
    let contents = vec![0; cache.block_bytes()];
    for block in 0..cache.blocks() {
        cache.write_block(block as u32, &contents)?;
    }
    Ok(())
}

/// What a step needs at least.
struct Work {
    flops: f64,
    bytes: f64,
}

/// Each weight is read once a step and multiplied once a token, the vocabulary projection once a sequence; a token's
/// attention reads all keys and values before it.
fn work(config: &Config, batch: usize, context: usize, tokens: usize, size: usize, weight_bytes: Option<u64>) -> Work {
    let (heads, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
    let attention = config.hidden_size * (2 * heads + 2 * kv);
    let mlp = 3 * config.hidden_size * config.intermediate_size;
    let weights = config.layers * (attention + mlp);
    let head = config.vocab_size * config.hidden_size;
    let rows = batch * tokens;
    let seen = batch * (tokens * context + tokens * (tokens + 1) / 2);
    let flops = 2 * rows * weights + 2 * batch * head + 4 * seen * heads * config.layers;
    let read = weight_bytes.map_or(size * (weights + head), |bytes| bytes as usize);
    let bytes = read + size * 2 * kv * config.layers * batch * (context + 2 * tokens);
    Work {
        flops: flops as f64,
        bytes: bytes as f64,
    }
}

#[cfg(test)]
mod tests {
    use sconce_models::{Rope, RopeScaling};

    use super::*;

    // The figures for the default model: 106 million weights in the layers, 28 million in the vocabulary.
    #[test]
    fn a_decoded_token_costs_two_operations_a_weight() {
        let rope = Rope {
            theta: 1e5,
            scaling: RopeScaling::None,
        };
        let config = Config {
            architecture: "llama".into(),
            hidden_size: 576,
            intermediate_size: 1536,
            vocab_size: 49152,
            layers: 30,
            heads: 9,
            kv_heads: 3,
            head_dim: 64,
            rms_norm_eps: 1e-5,
            rope,
            max_position_embeddings: 8192,
            sliding_window: None,
            qkv_bias: false,
            qk_norm: false,
            tie_word_embeddings: true,
        };
        let work = work(&config, 1, 0, 1, 4, None);
        assert!((work.flops / (2.0 * 134.5e6) - 1.0).abs() < 0.01, "{}", work.flops);
        assert!((work.bytes / (4.0 * 134.5e6) - 1.0).abs() < 0.01, "{}", work.bytes);
    }
}
