//! The device's side of a step: the model, its KV cache, and the scheduler that owns the cache's blocks.

use std::{collections::HashMap, panic::resume_unwind, path::PathBuf, sync::Arc, thread, time::Duration};

use candle_core::{DType, Device, bail};
use sconce_models::{Carried, Decoder, Draw, KvCache, ModelError, Pending, Span, Step, without_backtrace};

use super::{
    Memory,
    cache_file::{self, CacheFile, Identity},
    kv_room::{KvRoom, KvTooSmall},
};
use crate::{
    batching::{BlockPool, CacheScope, Config, ConfigError, Namespace, Plan, Scheduler, SequenceId},
    request::{Request, TokenId},
};

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
    /// Whether the matrices of a GGUF file are kept as they are stored.
    pub quantized: bool,
    /// Bytes for the KV cache; `None` takes what is left of `gpu_memory` on a GPU, and a share of what is free on the
    /// CPU: [`Memory::for_kv_cache`].
    pub kv_memory: Option<u64>,
    /// The share of a GPU's memory that weights, steps and KV cache may take together.
    pub gpu_memory: f64,
    /// Whether a GPU's decode steps run as CUDA graphs.
    pub cuda_graphs: bool,
    /// Whether a step is enqueued while a GPU runs the one before.
    pub overlap: bool,
    /// Slots in a block.
    pub block_size: usize,
    pub prefix_cache: bool,
    /// Keeps the prefix cache's blocks from one run to the next.
    pub cache_file: Option<PathBuf>,
    pub cache_scope: CacheScope,
    /// The share of the KV cache that pinned prompts may hold, 0 to 1. Less where a sequence of the greatest length
    /// would not fit beside them.
    pub pin_share: f64,
    /// A step that takes longer is hung.
    pub step_timeout: Duration,
}

/// What a device computes in where nothing else is asked for.
pub fn default_dtype(device: &Device) -> DType {
    if device.is_cpu() { DType::F32 } else { DType::BF16 }
}

/// Why the engine could not be made.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error("cannot allocate a KV cache of {blocks} blocks: {source}; lower {setting}")]
    KvCache {
        blocks: usize,
        source: Box<candle_core::Error>,
        setting: &'static str,
    },
    #[error("the largest step does not fit the GPU's memory: {0}; lower step-tokens or max-batch")]
    LargestStep(candle_core::Error),
    #[error("decode steps cannot be captured as CUDA graphs: {0}; try `--cuda-graphs=false`, or a lower gpu-memory")]
    Prepare(candle_core::Error),
    #[error(transparent)]
    KvTooSmall(#[from] KvTooSmall),
    #[error("max-model-len is {asked}, but the model was made for {limit} tokens")]
    BeyondModel { asked: usize, limit: usize },
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("cache-file keeps what no-prefix-cache switches off; leave out one of them")]
    NoPrefixCache,
    #[error("the folder of the cache file {} does not exist; make it, or choose another cache-file", .0.display())]
    NoCacheFolder(PathBuf),
    #[error("cannot read {} for its hash: {source}", path.display())]
    Hash { path: PathBuf, source: std::io::Error },
}

impl Settings {
    /// What would otherwise be found out when the file is written, at the end.
    fn check_cache_file(&self) -> Result<(), LoadError> {
        match &self.cache_file {
            Some(_) if !self.prefix_cache => Err(LoadError::NoPrefixCache),
            Some(path) if !cache_file::folder(path).is_dir() => Err(LoadError::NoCacheFolder(path.clone())),
            _ => Ok(()),
        }
    }

    /// What there is for the KV cache, in blocks of `block_bytes`: on a GPU, where nothing was asked for, what weights and
    /// the largest step leave.
    fn kv_room(&self, decoder: &Decoder, block_bytes: usize) -> Result<KvRoom, LoadError> {
        if let Some(bytes) = self.kv_memory {
            return Ok(KvRoom::Asked(bytes));
        }
        let (tokens, rows) = largest_step(&self.batching);
        let memory = decoder.memory_beside_kv(tokens, rows);
        let memory = memory.map_err(|error| LoadError::LargestStep(without_backtrace(error)))?;
        Ok(match memory {
            Some(memory) => KvRoom::Gpu {
                share: self.gpu_memory,
                memory,
            },
            None => {
                let asked = self.max_model_len.unwrap_or(0).div_ceil(self.block_size);
                KvRoom::Main(Memory::look().for_kv_cache(asked as u64 * block_bytes as u64))
            }
        })
    }

    /// The longest sequence that was asked for, of a model made for `limit` tokens.
    fn asked_context(&self, limit: usize) -> Result<Option<usize>, LoadError> {
        match self.max_model_len {
            Some(asked) if asked > limit => Err(LoadError::BeyondModel { asked, limit }),
            asked => Ok(asked),
        }
    }
}

/// The decoder and, where there is to be one, the cache file, whose hash of the weights is taken beside their loading.
fn load_weights(settings: &Settings, dtype: DType) -> Result<(Decoder, Option<Arc<CacheFile>>), LoadError> {
    let load = || match (settings.dummy, settings.quantized) {
        (true, true) => Err(ModelError::NotQuantized {
            path: settings.path.clone(),
        }),
        (true, false) => Decoder::dummy(&settings.path, &settings.device, dtype),
        (false, true) => Decoder::load_quantized(&settings.path, &settings.device, dtype),
        (false, false) => Decoder::load(&settings.path, &settings.device, dtype),
    };
    let Some(path) = settings.cache_file.clone() else {
        return Ok((load()?, None));
    };
    let (decoder, hash) = thread::scope(|scope| {
        let hash = scope.spawn(|| cache_file::weights_hash(&settings.path));
        (load(), hash.join().unwrap_or_else(|panic| resume_unwind(panic)))
    });
    let decoder = decoder?;
    let identity = Identity {
        weights: hash.map_err(|source| LoadError::Hash {
            path: settings.path.clone(),
            source,
        })?,
        // The same weights give other keys and values when they are multiplied as they are stored.
        dtype: dtype.as_str().to_string() + if settings.quantized { ", quantized" } else { "" },
        block_size: settings.block_size,
        block_bytes: KvCache::bytes_per_block(decoder.config(), settings.block_size, dtype),
        layout: KvCache::layout(dtype, &settings.device),
    };
    Ok((decoder, Some(Arc::new(CacheFile { path, identity }))))
}

/// A model's weights, and what is to be made of them. Whatever is made of the same ones shares them.
#[derive(Clone)]
pub struct Weights {
    decoder: Arc<Decoder>,
    cache_file: Option<Arc<CacheFile>>,
    settings: Settings,
}

impl Weights {
    /// Reads the weights, which takes most of the time that an engine needs to start.
    pub fn load(settings: &Settings) -> Result<Self, LoadError> {
        settings.check_cache_file()?;
        let (decoder, cache_file) = load_weights(settings, settings.dtype())?;
        Ok(Self {
            decoder: Arc::new(decoder),
            cache_file,
            settings: settings.clone(),
        })
    }

    /// Whether a GPU computes with them.
    pub fn on_gpu(&self) -> bool {
        !self.settings.device.is_cpu()
    }

    pub(super) fn step_timeout(&self) -> Duration {
        self.settings.step_timeout
    }

    #[cfg(test)]
    pub(super) fn set_step_timeout(&mut self, timeout: Duration) {
        self.settings.step_timeout = timeout;
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
    cache_scope: CacheScope,
    decoder: Arc<Decoder>,
    pub cache: KvCache,
    pub cache_file: Option<Arc<CacheFile>>,
    /// Whether a step is enqueued while the device runs the one before.
    pub overlap: bool,
    /// An earlier step's logits, in whose memory the next ones are written.
    logits: Vec<f32>,
    /// Stands in for a device that chooses tokens itself.
    #[cfg(test)]
    pub late: Option<super::late::Late>,
}

/// A step's tokens, which the device may not have chosen yet.
pub enum Awaited {
    Device(Pending),
    #[cfg(test)]
    Late(super::late::Tokens),
}

impl Model {
    /// A scheduler and a KV cache for these weights, with the cache file's blocks if there is one.
    pub fn new(weights: &Weights) -> Result<Self, LoadError> {
        let Weights {
            decoder,
            cache_file,
            settings,
        } = weights;
        let (config, dtype) = (decoder.config(), settings.dtype());
        let limit = config.max_position_embeddings;
        let asked = settings.asked_context(limit)?;
        let block_bytes = KvCache::bytes_per_block(config, settings.block_size, dtype);
        let room = settings.kv_room(decoder, block_bytes)?;
        let max_model_len = room.context(asked, limit, settings.block_size, block_bytes)?;
        let blocks = (room.bytes() / block_bytes as u64) as usize;
        let kv_tokens = blocks * settings.block_size;
        let batching = Config {
            max_model_len,
            ..settings.batching.clone()
        };
        let pin_budget = (blocks as f64 * settings.pin_share) as usize;
        let pool = BlockPool::new(blocks, settings.block_size, settings.prefix_cache).with_pin_budget(pin_budget);
        let mut scheduler = Scheduler::new(batching, pool)?;
        let mut cache =
            KvCache::new(config, blocks, settings.block_size, dtype, &settings.device).map_err(|error| {
                LoadError::KvCache {
                    blocks,
                    source: Box::new(without_backtrace(error)),
                    setting: room.setting(),
                }
            })?;
        if let Some(file) = &cache_file {
            file.load(scheduler.blocks_mut(), &mut cache);
        }
        let (tokens, rows) = largest_step(&settings.batching);
        decoder
            .prepare(&mut cache, tokens, rows, settings.cuda_graphs)
            .map_err(|error| LoadError::Prepare(without_backtrace(error)))?;
        Ok(Self {
            scheduler,
            kv_tokens,
            cache_scope: settings.cache_scope,
            decoder: decoder.clone(),
            cache,
            cache_file: cache_file.clone(),
            overlap: settings.overlap,
            logits: Vec::new(),
            #[cfg(test)]
            late: None,
        })
    }

    /// Where a request's blocks are found and kept.
    pub fn namespace(&self, request: &Request) -> Namespace {
        self.cache_scope
            .namespace(&request.tenant.name, request.cache_salt.as_deref())
    }

    pub fn vocab_size(&self) -> usize {
        self.decoder.config().vocab_size
    }

    /// Whether the device chooses tokens itself.
    pub fn samples(&self) -> bool {
        #[cfg(test)]
        if self.late.is_some() {
            return true;
        }
        self.decoder.samples()
    }

    /// Runs a plan: the logits of its sampling rows, one after the other, `[rows × vocabulary]`.
    pub fn forward(&mut self, plan: &Plan) -> candle_core::Result<Vec<f32>> {
        let (step, unknown) = self.step(plan)?;
        if !unknown.is_empty() {
            bail!("the plan goes on from a step that has not ended")
        }
        let mut logits = std::mem::take(&mut self.logits);
        self.decoder.logits(&step, &mut self.cache, &mut logits)?;
        Ok(logits)
    }

    /// Takes logits back that are not needed any more.
    pub fn keep(&mut self, logits: Vec<f32>) {
        self.logits = logits;
    }

    /// Puts a plan on the device, behind what it runs, where a token for each sampling row is chosen by its draw. What the
    /// host does not know of the plan's tokens, the step `before` chooses.
    pub fn enqueue(
        &mut self,
        plan: &Plan,
        draws: &[Draw],
        before: Option<(&Plan, &Awaited)>,
    ) -> candle_core::Result<Awaited> {
        let (step, unknown) = self.step(plan)?;
        let rows = before.iter().flat_map(|(before, _)| &before.rows);
        let rows: HashMap<_, _> = rows.filter(|row| row.samples).map(|row| row.id).zip(0..).collect();
        let mut tokens = Vec::with_capacity(unknown.len());
        for (index, id) in unknown {
            let Some(&row) = rows.get(&id) else {
                bail!("no step is choosing the token that sequence {id} goes on from")
            };
            tokens.push((index, row));
        }
        #[cfg(test)]
        if let Some(late) = &mut self.late {
            let before = before.map(|(_, awaited)| awaited);
            return late.enqueue(&self.decoder, &mut self.cache, step, draws, tokens, before);
        }
        let carried = match before {
            Some((_, Awaited::Device(from))) if !tokens.is_empty() => Some(Carried { from, tokens }),
            _ => None,
        };
        let pending = self.decoder.enqueue(&step, &mut self.cache, draws, carried)?;
        Ok(Awaited::Device(pending))
    }

    /// Waits for a step's tokens, one a sampling row; `None` where a logit was no number.
    pub fn wait(&mut self, awaited: Awaited) -> candle_core::Result<Vec<Option<TokenId>>> {
        match awaited {
            Awaited::Device(pending) => self.decoder.wait(pending, &mut self.cache),
            #[cfg(test)]
            Awaited::Late(tokens) => tokens.wait(),
        }
    }

    /// A plan as the model takes it, and which of its tokens are not known yet: their places, and whose they are.
    fn step(&self, plan: &Plan) -> candle_core::Result<(Step, Vec<(usize, SequenceId)>)> {
        let mut step = Step {
            tokens: Vec::new(),
            sequences: Vec::with_capacity(plan.rows.len()),
        };
        let mut unknown = Vec::new();
        for row in &plan.rows {
            let Some(sequence) = self.scheduler.sequence(row.id) else {
                bail!("the plan names sequence {}, which does not run", row.id)
            };
            let (tokens, end) = (sequence.tokens(), row.start + row.len);
            step.tokens.extend_from_slice(&tokens[row.start..end.min(tokens.len())]);
            if end > tokens.len() {
                unknown.push((step.tokens.len(), row.id));
                step.tokens.push(0);
            }
            let block_table = sequence.blocks().to_vec();
            step.sequences.push(Span {
                start: row.start,
                len: row.len,
                block_table,
                logits: row.samples,
            });
        }
        Ok((step, unknown))
    }
}

/// Tokens of the largest step, and its rows that want logits.
fn largest_step(batching: &Config) -> (usize, usize) {
    (batching.step_tokens.max(batching.max_batch), batching.max_batch)
}
