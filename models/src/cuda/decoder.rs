//! The decoder on a GPU. A step is one copy of its lists to the device, the same launches for every layer, and one copy of
//! what was chosen back to the host, which waits for it when it likes; a step of nothing but decodes runs as a CUDA graph
//! where one was captured.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::cuda_backend::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::CudaStream;
use candle_core::cuda_backend::cudarc::driver::result::{device, mem_pool};
use candle_core::cuda_backend::cudarc::driver::sys::{CUdevice_attribute, CUmemPool_attribute, CUmemoryPool};
use candle_core::{DType, Device, Result, Tensor, bail};

use super::blas::{Blas, Matrix};
use super::device_error;
use super::draw::{DRAW_WORDS, SET_WORDS, SlotRoom, check};
use super::kernels::{Address, Choices, Decodes, HEAD_DIMS, Kernels, Pool, Sizes, Tiles};
use super::metadata::{Metadata, Packing, Shape};
use super::quantized::Activations;
use super::weights::{Held, Layer, ModelWeights, Projection, address};
use super::workspace::{Addresses, Capacity, Sampled, Workspace};
use crate::decoder::built;
use crate::weights::Weights;
use crate::{Config, Draw, GpuMemory, KvCache, ModelError, Span, Step};

/// Blocks that keep a multiprocessor busy while the decode kernel reads keys and values.
const BLOCKS_PER_PROCESSOR: usize = 4;
/// Most parts into which one sequence's keys are cut.
const MOST_SPLITS: usize = 64;
/// Words that a workspace holds for lists at least.
const WORDS: usize = 1 << 17;
/// Words of lists that a token may have: its own, its decode's, its row's, its draw's and its slot's.
const LIST_WORDS: usize = 25;
/// Floats of a row that fit beside sums into a block's shared memory.
const MOST_HIDDEN: usize = 12_000;

/// A model's weights on a GPU and the kernels that run it.
pub(crate) struct CudaDecoder {
    /// Unlike any other decoder's.
    id: u64,
    config: Config,
    dtype: DType,
    sizes: Sizes,
    /// Whether matrices may be quantized, whose products allocate.
    quantized: bool,
    weights: ModelWeights,
    kernels: Kernels,
    blas: Blas,
    stream: Arc<CudaStream>,
    device: Device,
    processors: usize,
}

/// Where one step's launches find what they need.
struct Run<'a> {
    shape: Shape,
    at: Addresses,
    pools: &'a [Pool],
    decodes: Decodes,
    tiles: Tiles,
    ids: Address,
    positions: Address,
    slots: Address,
    rows: Address,
    draws: Address,
}

impl CudaDecoder {
    /// Puts a model's weights on the device as `dtype` (f32, bf16 or f16), or, if `quantized`, those as they are that the
    /// file stores so.
    pub fn load(
        weights: &Weights,
        config: Config,
        device: &CudaDevice,
        dtype: DType,
        quantized: bool,
    ) -> std::result::Result<Self, ModelError> {
        let sizes = sizes(&config, dtype)?;
        // SAFETY: everything of this device runs on its one stream, so an event would order nothing.
        unsafe { device.disable_event_tracking() };
        let stream = device.cuda_stream();
        // A device without pools has nothing to keep.
        let _ = keep_freed_memory(&stream);
        let processors = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let processors = stream.context().attribute(processors).map_err(device_error);
        static DECODERS: AtomicU64 = AtomicU64::new(0);
        Ok(Self {
            id: DECODERS.fetch_add(1, Ordering::Relaxed),
            quantized,
            weights: ModelWeights::load(weights, &config, device, dtype, quantized)?,
            kernels: Kernels::load(&stream, dtype, &sizes).map_err(built("the kernels"))?,
            blas: Blas::new(device, dtype).map_err(built("cuBLAS's workspace"))?,
            processors: processors.map_err(built("the device's properties"))? as usize,
            device: Device::Cuda(device.clone()),
            stream,
            sizes,
            dtype,
            config,
        })
    }

    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Runs a step that was checked; see [`crate::Decoder::forward`].
    pub fn forward(&self, step: &Step, cache: &mut KvCache) -> Result<Tensor> {
        let metadata = self.packing(cache, None).pack(step, &[]);
        let (workspace, pools) = self.begin(&metadata, cache)?;
        self.launch(&self.place(&metadata.shape, workspace.addresses(), &pools))?;
        let rows = metadata.shape.rows;
        let shape = (rows, self.config.vocab_size);
        if rows == 0 {
            return Tensor::zeros(shape, DType::F32, &Device::Cpu);
        }
        Tensor::from_vec(workspace.logits(rows, shape.1)?, shape, &Device::Cpu)
    }

    /// Enqueues a step that was checked; see [`crate::Decoder::enqueue`]. Of the step that chose the tokens that are carried,
    /// they are the given rows.
    pub fn enqueue(
        &self,
        step: &Step,
        cache: &mut KvCache,
        draws: &[Draw],
        carried: Option<(&Sampled, &[(usize, usize)])>,
    ) -> Result<Sampled> {
        let rows = step.sequences.iter().filter(|span| span.logits).count();
        check(draws, rows, self.config.vocab_size)?;
        let batch = (rows > 0 && Packing::is_decode(step)).then(|| graph_batch(rows));
        let mut metadata = self.packing(cache, batch).pack(step, draws);
        if let Some((from, tokens)) = carried {
            if !cache.workspace.as_ref().is_some_and(|workspace| workspace.holds(from)) {
                bail!("step: the tokens it goes on from are not on the device any more")
            }
            metadata.carry(tokens, from.rows())?;
        }
        let (workspace, pools) = self.begin(&metadata, cache)?;
        self.set_slots(&metadata, workspace.addresses())?;
        let replayed = match batch {
            Some(batch) => workspace.replay(batch)?,
            None => false,
        };
        if !replayed {
            let run = self.place(&metadata.shape, workspace.addresses(), &pools);
            let launches = || self.launch(&run).and_then(|()| self.choose(&run));
            launches()?;
            // It went with memory that had become too small, or was not among those captured at first.
            if let Some(batch) = batch.filter(|_| workspace.runs_graphs()) {
                workspace.capture(batch, launches)?;
            }
        }
        workspace.fetch(rows)
    }

    /// Waits for a step's tokens; see [`crate::Decoder::wait`].
    pub fn wait(&self, sampled: Sampled, cache: &mut KvCache) -> Result<Vec<Option<u32>>> {
        let tokens = sampled.wait()?;
        if let Some(workspace) = &mut cache.workspace {
            workspace.take_back(sampled);
        }
        let chosen = |token: u32| (token != u32::MAX).then_some(token);
        Ok(tokens.into_iter().map(chosen).collect())
    }

    /// Takes the memory for steps of up to `tokens` tokens and `rows` rows, and if `graphs`, captures graphs for batches of
    /// 1, 2, 4 and multiples of 8 up to the first that holds `rows`. There are none of quantized weights.
    pub fn prepare(&self, cache: &mut KvCache, tokens: usize, rows: usize, graphs: bool) -> Result<()> {
        let largest = graph_batch(rows);
        // All at once: graphs hold addresses, and growing would take them away.
        let most = Shape {
            tokens: tokens.max(largest),
            decodes: 0,
            tiles: 0,
            rows: largest,
        };
        let room = SlotRoom {
            slots: largest,
            counted: largest,
        };
        self.hold(cache, &most, 0, room)?.run_graphs(graphs && !self.quantized);
        let mut batches = vec![1, 2, 4];
        batches.extend((8..=largest).step_by(8));
        batches.retain(|&batch| graphs && !self.quantized && batch <= largest);
        for batch in batches {
            let metadata = self.packing(cache, Some(batch)).pack(&Step::default(), &[]);
            let (workspace, pools) = self.begin(&metadata, cache)?;
            let run = self.place(&metadata.shape, workspace.addresses(), &pools);
            let step = || self.launch(&run).and_then(|()| self.choose(&run));
            // Once without capture: kernels are loaded when they first run, which a capture does not allow.
            step()?;
            self.stream.synchronize().map_err(device_error)?;
            workspace.capture(batch, step)?;
        }
        Ok(())
    }

    /// See [`crate::Decoder::memory_beside_kv`].
    pub fn memory_beside_kv(&self, tokens: usize, rows: usize) -> Result<GpuMemory> {
        const BLOCK: usize = 16;
        let tokens = tokens.max(rows).max(1);
        let longest = tokens.min(self.config.max_position_embeddings);
        let blocks = longest.div_ceil(BLOCK);
        let mut trial = KvCache::new(&self.config, blocks, BLOCK, self.dtype, &self.device)?;
        // Every span may write to the same blocks: what they hold is of no use to anyone.
        let spans = (0..rows.max(1)).map(|index| Span {
            start: 0,
            len: if index == 0 {
                longest - (rows.max(1) - 1).min(longest - 1)
            } else {
                1
            },
            block_table: (0..blocks as u32).collect(),
            logits: true,
        });
        let mut step = Step {
            tokens: Vec::new(),
            sequences: spans.collect(),
        };
        let packed = step.sequences.iter().map(|span| span.len).sum();
        step.tokens = vec![0; packed];
        self.prepare(&mut trial, tokens.max(packed), rows, false)?;
        let sampled = self.enqueue(&step, &mut trial, &vec![Draw::greedy(); rows.max(1)], None)?;
        self.wait(sampled, &mut trial)?;
        self.stream.synchronize().map_err(device_error)?;
        if let Ok(pool) = memory_pool(&self.stream) {
            // SAFETY: the pool is the device's own.
            unsafe { mem_pool::trim_to(pool, 0) }.map_err(device_error)?;
        }
        let (free, total) = self.stream.context().mem_get_info().map_err(device_error)?;
        let trial_bytes = blocks * KvCache::bytes_per_block(&self.config, BLOCK, self.dtype);
        let padded = graph_batch(rows);
        let taken = total - free - trial_bytes + self.temporaries(tokens.max(padded), padded);
        Ok(GpuMemory {
            total: total as u64,
            taken: taken as u64,
        })
    }

    /// Bytes that candle allocates for the largest of a step's products with quantized matrices, and gives back: the
    /// activations as they are and in float32, the product in float32 and as it is, in parts and as one.
    fn temporaries(&self, tokens: usize, rows: usize) -> usize {
        if !self.quantized {
            return 0;
        }
        let (s, size) = (&self.config, self.dtype.size_in_bytes());
        let bytes =
            |rows: usize, inputs: usize, outputs: usize| rows * (inputs * (4 + size) + outputs * (4 + 2 * size));
        let attention = (s.heads + 2 * s.kv_heads) * s.head_dim;
        let inputs = s.intermediate_size.max(s.hidden_size).max(s.heads * s.head_dim);
        let layer = bytes(
            tokens,
            inputs,
            attention.max(2 * s.intermediate_size).max(s.hidden_size),
        );
        layer.max(bytes(rows, s.hidden_size, s.vocab_size))
    }

    fn packing(&self, cache: &KvCache, pad_to: Option<usize>) -> Packing {
        Packing {
            block_size: cache.block_size(),
            group: self.sizes.heads / self.sizes.kv_heads,
            tiles: self.kernels.tiles(),
            pad_to,
        }
    }

    /// The cache's workspace, large enough for a shape, a step's lists of so many words, and its slots.
    fn hold<'a>(
        &self,
        cache: &'a mut KvCache,
        shape: &Shape,
        words: usize,
        room: SlotRoom,
    ) -> Result<&'a mut Workspace> {
        if !cache.block_size().is_power_of_two() {
            bail!(
                "KV cache: blocks of {} positions; on a GPU they are a power of two",
                cache.block_size()
            )
        }
        let (dtype, layers) = (cache.layers[0].keys.dtype(), cache.layers.len());
        if dtype != self.dtype || layers != self.weights.layers.len() {
            bail!("KV cache: {layers} layers of {dtype:?} do not fit the model")
        }
        // Room for every block in some table, and shared ones in several.
        let lists = 2 * cache.blocks() + LIST_WORDS * shape.tokens;
        let capacity = Capacity {
            tokens: shape.tokens,
            rows: shape.rows.max(1),
            words: words.max(lists).max(WORDS).next_power_of_two(),
            parts: self.sizes.heads * self.blocks_wanted().max(1),
            slots: SlotRoom {
                slots: room.slots.next_power_of_two(),
                counted: room.counted.next_power_of_two(),
            },
        };
        Workspace::holding(
            &mut cache.workspace,
            self.id,
            &self.stream,
            self.dtype,
            &self.sizes,
            capacity,
        )
    }

    /// The cache's workspace with a step's lists on their way to it, and the layers' pools.
    fn begin<'a>(&self, metadata: &Metadata, cache: &'a mut KvCache) -> Result<(&'a mut Workspace, Vec<Pool>)> {
        let block_size = cache.block_size();
        let pool = |layer: &crate::kv::Pools| {
            Ok(Pool {
                keys: address(&layer.keys)?,
                values: address(&layer.values)?,
                block_size,
            })
        };
        let pools = cache.layers.iter().map(pool).collect::<Result<Vec<_>>>()?;
        let workspace = self.hold(cache, &metadata.shape, metadata.words.len(), metadata.room)?;
        workspace.upload(&metadata.words)?;
        Ok((workspace, pools))
    }

    /// Blocks of the decode kernel for each KV head and piece of its group, over all items, that keep the device busy.
    fn blocks_wanted(&self) -> usize {
        let pieces = (self.sizes.heads / self.sizes.kv_heads).div_ceil(4);
        self.processors * BLOCKS_PER_PROCESSOR / (self.sizes.kv_heads * pieces)
    }

    /// Parts into which each decode's keys are cut. Items times parts are never more than [`Self::blocks_wanted`], unless
    /// there is one part, which needs no memory.
    fn splits(&self, shape: &Shape) -> usize {
        (self.blocks_wanted() / shape.decodes.max(1)).clamp(1, MOST_SPLITS)
    }

    fn place<'a>(&self, shape: &Shape, at: Addresses, pools: &'a [Pool]) -> Run<'a> {
        let places = shape.places();
        let word = |place: usize| at.words + 4 * place as u64;
        let decodes = Decodes {
            count: shape.decodes,
            rows: word(places.decode_rows),
            lengths: word(places.decode_lengths),
            starts: word(places.decode_tables),
            tables: at.words,
            splits: self.splits(shape),
            sums: at.sums,
            totals: at.totals,
        };
        let tiles = Tiles {
            count: shape.tiles,
            lists: places.tiles.map(word),
            tables: at.words,
        };
        Run {
            shape: *shape,
            at,
            pools,
            decodes,
            tiles,
            ids: word(places.tokens),
            positions: word(places.positions),
            slots: word(places.slots),
            rows: word(places.rows),
            draws: word(places.draws),
        }
    }

    /// Puts a step's launches on the stream, up to the logits of its rows.
    fn launch(&self, run: &Run) -> Result<()> {
        let (s, k, at, tokens) = (&self.sizes, &self.kernels, &run.at, run.shape.tokens);
        k.embed(s, tokens, self.weights.embedding.address, run.ids, at.sampled, at.x)?;
        k.angles(
            s,
            tokens,
            run.positions,
            self.weights.inverse_frequencies.address,
            at.angles,
        )?;
        // What a layer's MLP gave is added when the next norm reads the residual stream.
        let mut delta = 0;
        for (layer, &pool) in self.weights.layers.iter().zip(run.pools) {
            k.residual_norm(s, tokens, at.x, delta, 0, layer.attention_norm.address, at.normed)?;
            self.attend(run, layer, pool)?;
            k.residual_norm(s, tokens, at.x, at.projected, 0, layer.mlp_norm.address, at.normed)?;
            self.multiply(&layer.gate_up, tokens, at.normed, at.gate_up)?;
            k.silu_mul(s, tokens, at.gate_up, at.activated, 16 / self.dtype.size_in_bytes())?;
            self.multiply(&layer.down, tokens, at.activated, at.projected)?;
            delta = at.projected;
        }
        let rows = run.shape.rows;
        k.residual_norm(s, rows, at.x, delta, run.rows, self.weights.norm.address, at.normed)?;
        let table = Matrix {
            weights: self.weights.embedding.address,
            outputs: s.vocabulary,
            inputs: s.hidden,
        };
        // SAFETY: `normed` holds the rows, `logits` [rows, vocabulary] in float32: the workspace was made for the shape.
        unsafe {
            match &self.weights.output {
                Some(output) => self.multiply_to(output, rows, at.normed, at.logits, true),
                None => self.blas.multiply(table, rows, at.normed, at.logits, true),
            }
        }
    }

    /// One layer's attention, from `normed` to `projected`.
    fn attend(&self, run: &Run, layer: &Layer, pool: Pool) -> Result<()> {
        let (s, k, at, tokens) = (&self.sizes, &self.kernels, &run.at, run.shape.tokens);
        let given = |held: &Option<Held>| held.as_ref().map_or(0, |held| held.address);
        let extras = [&layer.qkv_bias, &layer.query_norm, &layer.key_norm].map(given);
        self.multiply(&layer.qkv, tokens, at.normed, at.qkv)?;
        k.rope_store(s, tokens, at.qkv, extras, at.angles, run.slots, pool)?;
        k.decode(s, at.qkv, pool, run.decodes, at.attended)?;
        k.prefill(s, at.qkv, pool, run.tiles, at.attended)?;
        self.multiply(&layer.attention_output, tokens, at.attended, at.projected)
    }

    fn multiply(&self, projection: &Projection, rows: usize, x: Address, out: Address) -> Result<()> {
        // SAFETY: activations of the workspace, which was made for the step's tokens and the model's sizes.
        unsafe { self.multiply_to(projection, rows, x, out, false) }
    }

    /// # Safety
    /// As of [`Blas::multiply`].
    unsafe fn multiply_to(
        &self,
        projection: &Projection,
        rows: usize,
        x: Address,
        out: Address,
        float_out: bool,
    ) -> Result<()> {
        match projection {
            Projection::Dense { held, outputs, inputs } => {
                let matrix = Matrix {
                    weights: held.address,
                    outputs: *outputs,
                    inputs: *inputs,
                };
                // SAFETY: the caller's promise.
                unsafe { self.blas.multiply(matrix, rows, x, out, float_out) }
            }
            Projection::Quantized(quantized) => {
                let activations = Activations {
                    dtype: self.dtype,
                    device: &self.device,
                    stream: &self.stream,
                };
                // SAFETY: the caller's promise.
                unsafe { quantized.multiply(&activations, rows, x, out, float_out) }
            }
        }
    }

    /// Puts the choice of the rows' tokens on the stream. Biases are numbered from the lists' beginning.
    fn choose(&self, run: &Run) -> Result<()> {
        let at = &run.at;
        let choices = Choices {
            count: run.shape.rows,
            draws: run.draws,
            pairs: at.words,
        };
        self.kernels
            .sample(&self.sizes, choices, at.states, at.logits, at.sampled)
    }

    /// Puts on the stream what sets the slots of a step's rows. No graph has it, because few steps set any.
    fn set_slots(&self, metadata: &Metadata, at: Addresses) -> Result<()> {
        let sets = metadata.sets;
        let list = at.words + 4 * sets.place as u64;
        self.kernels
            .set_slots(&self.sizes, sets.count, list, at.words, at.states)
    }
}

/// The pool that everything on the stream's device is allocated from.
fn memory_pool(stream: &CudaStream) -> Result<CUmemoryPool> {
    let device = device::get(stream.context().ordinal() as i32).map_err(device_error)?;
    // SAFETY: the device is one that the driver named.
    unsafe { device::get_default_mem_pool(device) }.map_err(device_error)
}

/// Keeps what is freed for the next allocation. Without it the driver takes it back at every wait, so that products with
/// quantized matrices would map memory anew in every step.
fn keep_freed_memory(stream: &CudaStream) -> Result<()> {
    let pool = memory_pool(stream)?;
    let mut all = u64::MAX;
    let threshold = CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    // SAFETY: the pool is the device's own; the attribute is a 64-bit number.
    unsafe { mem_pool::set_attribute(pool, threshold, (&raw mut all).cast()) }.map_err(device_error)
}

/// The batch whose graph runs `rows` decodes.
fn graph_batch(rows: usize) -> usize {
    match rows {
        0..=2 => rows.max(1),
        3..=4 => 4,
        _ => rows.next_multiple_of(8),
    }
}

/// The sizes for the kernels, if there are kernels for the model.
fn sizes(config: &Config, dtype: DType) -> std::result::Result<Sizes, ModelError> {
    let unsupported = |what: String, supported: String| Err(ModelError::UnsupportedOnGpu { what, supported });
    if !HEAD_DIMS.contains(&config.head_dim) {
        return unsupported(format!("a head size of {}", config.head_dim), format!("{HEAD_DIMS:?}"));
    }
    let wide = 16 / dtype.size_in_bytes();
    if !config.intermediate_size.is_multiple_of(wide) || !config.hidden_size.is_multiple_of(wide) {
        return unsupported(
            format!(
                "a hidden size of {} with {} inside",
                config.hidden_size, config.intermediate_size
            ),
            format!("multiples of {wide}"),
        );
    }
    if config.hidden_size > MOST_HIDDEN {
        return unsupported(
            format!("a hidden size of {}", config.hidden_size),
            format!("up to {MOST_HIDDEN}"),
        );
    }
    Ok(Sizes {
        hidden: config.hidden_size,
        inner: config.intermediate_size,
        vocabulary: config.vocab_size,
        heads: config.heads,
        kv_heads: config.kv_heads,
        head_dim: config.head_dim,
        window: config.sliding_window.unwrap_or(0),
        eps: config.rms_norm_eps as f32,
    })
}

const _: () = assert!(
    DRAW_WORDS == 10 && SET_WORDS == 7,
    "kernels/sample.cu reads 10 words a row and 7 a slot that is set"
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_are_padded_to_the_next_graph() {
        let padded = [1, 2, 3, 5, 8, 9, 100, 513].map(graph_batch);
        assert_eq!(padded, [1, 2, 4, 8, 8, 16, 104, 520]);
    }
}
