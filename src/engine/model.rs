//! The device's side of a step: the model, its KV cache, and the scheduler that owns the cache's blocks.

use std::{path::PathBuf, sync::Arc, time::Duration};

use candle_core::{DType, Device};
use sconce_models::{Decoder, KvCache, ModelError, Span, Step, without_backtrace};

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
    /// Bytes for the KV cache; `None` takes [`DEFAULT_KV_MEMORY`].
    pub kv_memory: Option<u64>,
    /// Slots in a block.
    pub block_size: usize,
    pub prefix_cache: bool,
    /// A step that takes longer is hung.
    pub step_timeout: Duration,
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
    #[error("kv-memory of {bytes} bytes holds no block ({block_bytes} bytes each); raise kv-memory")]
    NoBlocks { bytes: u64, block_bytes: usize },
    #[error("max-model-len is {asked}, but the model was made for {limit} tokens")]
    BeyondModel { asked: usize, limit: usize },
    #[error(transparent)]
    Config(#[from] ConfigError),
}

/// A model's weights, and what is to be made of them. Whatever is made of the same ones shares them.
#[derive(Clone)]
pub struct Weights {
    decoder: Arc<Decoder>,
    settings: Settings,
}

impl Weights {
    /// Reads the weights, which takes most of the time that an engine needs to start.
    pub fn load(settings: &Settings) -> Result<Self, LoadError> {
        let decoder = Decoder::load(&settings.path, &settings.device, settings.dtype())?;
        Ok(Self {
            decoder: Arc::new(decoder),
            settings: settings.clone(),
        })
    }

    pub(super) fn step_timeout(&self) -> Duration {
        self.settings.step_timeout
    }
}

impl Settings {
    fn dtype(&self) -> DType {
        self.dtype.unwrap_or(default_dtype(&self.device))
    }
}

pub struct Model {
    pub scheduler: Scheduler,
    pub kv_tokens: usize,
    decoder: Arc<Decoder>,
    cache: KvCache,
}

impl Model {
    /// A scheduler and an empty KV cache for these weights.
    pub fn new(weights: &Weights) -> Result<Self, LoadError> {
        let Weights { decoder, settings } = weights;
        let (config, dtype) = (decoder.config(), settings.dtype());
        let bytes = settings.kv_memory.unwrap_or(DEFAULT_KV_MEMORY);
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
        let cache = KvCache::new(config, blocks, settings.block_size, dtype, &settings.device).map_err(|error| {
            LoadError::KvCache {
                blocks,
                source: without_backtrace(error),
            }
        })?;
        Ok(Self {
            scheduler,
            kv_tokens,
            decoder: decoder.clone(),
            cache,
        })
    }

    pub fn vocab_size(&self) -> usize {
        self.decoder.config().vocab_size
    }

    /// Whether the KV cache can be used; a panic while it was written makes it useless.
    pub fn cache_is_whole(&self) -> bool {
        self.cache.is_whole()
    }

    /// Runs a plan: the logits of its sampling rows, one after the other, `[rows × vocabulary]`.
    pub fn forward(&mut self, plan: &Plan) -> candle_core::Result<Vec<f32>> {
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
        self.decoder.forward(&step, &mut self.cache)?.flatten_all()?.to_vec1()
    }
}
