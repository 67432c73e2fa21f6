//! The device's side of a step: the model, its KV cache, and the scheduler that owns the cache's blocks.

use std::path::PathBuf;

use candle_core::{DType, Device};
use sconce_models::{Decoder, Draw, KvCache, ModelError, Span, Step, without_backtrace};

use crate::batching::{BlockPool, Config, ConfigError, Plan, Scheduler};

/// What the engine is made from.
#[derive(Debug, Clone)]
pub struct Settings {
    /// A GGUF file, or a folder with `config.json` and safetensors.
    pub path: PathBuf,
    pub device: Device,
    /// The type of weights and KV cache; `None` takes float32 on the CPU and bfloat16 elsewhere.
    pub dtype: Option<DType>,
    /// `max_model_len` in it is the longest sequence asked for; see [`Self::max_model_len`].
    pub batching: Config,
    /// The longest sequence, if it was asked for; else the model's own limit, or what the KV cache holds if that is less.
    pub max_model_len: Option<usize>,
    /// Whether `path` is a `config.json` and the weights are random.
    pub dummy: bool,
    /// Bytes for the KV cache; `None` takes what is left of `gpu_memory` on a GPU, and [`DEFAULT_KV_MEMORY`] on the CPU.
    pub kv_memory: Option<u64>,
    /// The share of a GPU's memory that weights, steps and KV cache may take together.
    pub gpu_memory: f64,
    /// Whether a GPU's decode steps run as CUDA graphs.
    pub cuda_graphs: bool,
    /// Slots in a block.
    pub block_size: usize,
    pub prefix_cache: bool,
}

/// The KV cache's size where none is asked for: a hundred chats of the default model, within the memory of a small
/// machine.
pub const DEFAULT_KV_MEMORY: u64 = 640 << 20;

/// What a device computes in where nothing else is asked for.
pub fn default_dtype(device: &Device) -> DType {
    if device.is_cpu() { DType::F32 } else { DType::BF16 }
}

/// Why the engine could not be made.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error("cannot allocate a KV cache of {blocks} blocks: {source}; lower kv-memory")]
    KvCache { blocks: usize, source: candle_core::Error },
    #[error("the largest step does not fit the GPU's memory: {0}; lower step-tokens or max-batch")]
    LargestStep(candle_core::Error),
    #[error("decode steps cannot be captured as CUDA graphs: {0}; try `--cuda-graphs=false`, or a lower gpu-memory")]
    Prepare(candle_core::Error),
    #[error("kv-memory of {bytes} bytes holds no block ({block_bytes} bytes each); raise kv-memory")]
    NoBlocks { bytes: u64, block_bytes: usize },
    #[error("max-model-len is {asked}, but the model was made for {limit} tokens")]
    BeyondModel { asked: usize, limit: usize },
    #[error(transparent)]
    Config(#[from] ConfigError),
}

pub struct Model {
    pub scheduler: Scheduler,
    pub kv_tokens: usize,
    decoder: Decoder,
    cache: KvCache,
}

impl Model {
    pub fn load(settings: &Settings) -> Result<Self, LoadError> {
        let dtype = settings.dtype.unwrap_or(default_dtype(&settings.device));
        let load = if settings.dummy { Decoder::dummy } else { Decoder::load };
        let decoder = load(&settings.path, &settings.device, dtype)?;
        let config = decoder.config();
        let bytes = match settings.kv_memory {
            Some(bytes) => bytes,
            None => default_kv_memory(&decoder, settings)?,
        };
        let block_bytes = KvCache::bytes_per_block(config, settings.block_size, dtype);
        let blocks = (bytes / block_bytes as u64) as usize;
        if blocks == 0 {
            return Err(LoadError::NoBlocks { bytes, block_bytes });
        }
        let kv_tokens = blocks * settings.block_size;
        let limit = config.max_position_embeddings;
        let max_model_len = match settings.max_model_len {
            Some(asked) if asked > limit => return Err(LoadError::BeyondModel { asked, limit }),
            Some(asked) => asked,
            None => limit.min(kv_tokens),
        };
        let batching = Config {
            max_model_len,
            ..settings.batching.clone()
        };
        let pool = BlockPool::new(blocks, settings.block_size, settings.prefix_cache);
        let scheduler = Scheduler::new(batching, pool)?;
        let mut cache =
            KvCache::new(config, blocks, settings.block_size, dtype, &settings.device).map_err(|error| {
                LoadError::KvCache {
                    blocks,
                    source: without_backtrace(error),
                }
            })?;
        let (tokens, rows) = largest_step(&settings.batching);
        decoder
            .prepare(&mut cache, tokens, rows, settings.cuda_graphs)
            .map_err(|error| LoadError::Prepare(without_backtrace(error)))?;
        Ok(Self {
            scheduler,
            kv_tokens,
            decoder,
            cache,
        })
    }

    pub fn vocab_size(&self) -> usize {
        self.decoder.config().vocab_size
    }

    /// Whether the device chooses tokens itself.
    pub fn samples(&self) -> bool {
        self.decoder.samples()
    }

    /// Runs a plan: the logits of its sampling rows, one after the other, `[rows × vocabulary]`.
    pub fn forward(&mut self, plan: &Plan) -> candle_core::Result<Vec<f32>> {
        let step = self.step(plan)?;
        self.decoder.forward(&step, &mut self.cache)?.flatten_all()?.to_vec1()
    }

    /// Runs a plan and lets the device choose a token for each sampling row by its draw; `None` where a logit is no number.
    pub fn sample(&mut self, plan: &Plan, draws: &[Draw]) -> candle_core::Result<Vec<Option<u32>>> {
        let step = self.step(plan)?;
        self.decoder.sample(&step, &mut self.cache, draws)
    }

    /// A plan as the model takes it.
    fn step(&self, plan: &Plan) -> candle_core::Result<Step> {
        let mut step = Step {
            tokens: Vec::new(),
            sequences: Vec::with_capacity(plan.rows.len()),
        };
        for row in &plan.rows {
            let Some(sequence) = self.scheduler.sequence(row.id) else {
                candle_core::bail!("the plan names sequence {}, which does not run", row.id)
            };
            step.tokens
                .extend_from_slice(&sequence.tokens()[row.start..row.start + row.len]);
            let block_table = sequence.blocks().to_vec();
            step.sequences.push(Span {
                start: row.start,
                len: row.len,
                block_table,
                logits: row.samples,
            });
        }
        Ok(step)
    }
}

/// What the KV cache gets where nothing else is asked for: on a GPU, what weights and the largest step leave.
fn default_kv_memory(decoder: &Decoder, settings: &Settings) -> Result<u64, LoadError> {
    let (tokens, rows) = largest_step(&settings.batching);
    let room = decoder.room_for_kv(settings.gpu_memory, tokens, rows);
    let room = room.map_err(|error| LoadError::LargestStep(without_backtrace(error)))?;
    Ok(room.unwrap_or(DEFAULT_KV_MEMORY))
}

/// Tokens of the largest step, and its rows that want logits.
fn largest_step(batching: &Config) -> (usize, usize) {
    (batching.step_tokens.max(batching.max_batch), batching.max_batch)
}
