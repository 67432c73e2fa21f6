//! The kernels as functions of a device, and their launches.

use std::sync::Arc;

use candle_core::cuda_backend::cudarc;
use candle_core::{DType, Result, bail};
use cudarc::driver::sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
use cudarc::driver::{CudaFunction, CudaModule, CudaStream, LaunchConfig, PushKernelArg};
use cudarc::nvrtc::Ptx;

use super::device_error;
use super::metadata::TILE_ROWS;

/// Head sizes that the attention kernels are compiled for.
pub const HEAD_DIMS: [usize; 9] = [64, 80, 96, 112, 128, 160, 192, 224, 256];
/// Query heads that a block of the decode kernel works on.
const GROUP: usize = 4;
const THREADS: u32 = 256;
/// Tokens that a block of `edit_logits` edits: `SEGMENT` in `kernels/sample.cu`.
const SEGMENT: usize = 8192;
/// Shared memory that a block has without asking for more.
const PLAIN_SHARED: u32 = 48 << 10;

macro_rules! image {
    ($name:literal) => {
        include_bytes!(concat!(env!("OUT_DIR"), "/", $name, ".fatbin"))
    };
}

/// The compiled file that a kernel is in.
fn image(kernel: &str) -> &'static [u8] {
    match kernel {
        name if name.starts_with("attention_prefill") => image!("attention_prefill"),
        name if name.starts_with("attention_") => image!("attention_decode"),
        name if name.starts_with("rope_") => image!("rope"),
        "sample" | "edit_logits" | "set_slots" => image!("sample"),
        _ => image!("elementwise"),
    }
}

/// A kernel by its name, allowed to use `shared` bytes of dynamic shared memory.
#[cfg(test)]
pub fn find(context: &Arc<cudarc::driver::CudaContext>, name: &str, shared: u32) -> Result<CudaFunction> {
    let module = context
        .load_module(Ptx::from_binary(image(name).to_vec()))
        .map_err(device_error)?;
    function(&module, name, shared)
}

fn function(module: &Arc<CudaModule>, name: &str, shared: u32) -> Result<CudaFunction> {
    let function = module.load_function(name).map_err(device_error)?;
    if shared > PLAIN_SHARED {
        let attribute = CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        function.set_attribute(attribute, shared as i32).map_err(device_error)?;
    }
    Ok(function)
}

/// Dynamic shared memory of a block of the prefill kernel: `Tile::BYTES` there.
pub fn prefill_shared(head_dim: usize) -> u32 {
    let keys = if head_dim <= 128 { 64 } else { 32 };
    (2 * (TILE_ROWS + 4 * keys) * (head_dim + 8)) as u32
}

/// An address on the device.
pub type Address = u64;

/// What a kernel is given, in the order of its parameters.
enum Argument {
    Address(Address),
    Int(i32),
    Float(f32),
}

macro_rules! from {
    ($type:ty, $variant:ident, $convert:expr) => {
        impl From<$type> for Argument {
            fn from(value: $type) -> Self {
                Self::$variant($convert(value))
            }
        }
    };
}
from!(Address, Address, |address| address);
from!(usize, Int, |count| count as i32);
from!(f32, Float, |value| value);

/// Builds the list of a launch's arguments.
macro_rules! arguments {
    ($($value:expr),* $(,)?) => { &[$(Argument::from($value)),*] };
}

/// The kernels for one number type and head size, on one stream.
pub struct Kernels {
    stream: Arc<CudaStream>,
    embed: CudaFunction,
    angles: CudaFunction,
    residual_norm: CudaFunction,
    rope_store: CudaFunction,
    silu_mul: CudaFunction,
    decode: CudaFunction,
    merge: CudaFunction,
    /// `None` for float32, which has no tensor cores.
    prefill: Option<CudaFunction>,
    set_slots: CudaFunction,
    edit_logits: CudaFunction,
    sample: CudaFunction,
}

/// Sizes of a model that launches need, checked when it was loaded.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    pub hidden: usize,
    pub inner: usize,
    pub vocabulary: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// 0 where there is no window.
    pub window: usize,
    pub eps: f32,
}

/// One layer's pools and how they are cut.
#[derive(Debug, Clone, Copy)]
pub struct Pool {
    pub keys: Address,
    pub values: Address,
    pub block_size: usize,
}

/// The lists of [`super::metadata::Places`] that decodes need, as addresses.
#[derive(Debug, Clone, Copy)]
pub struct Decodes {
    pub count: usize,
    pub rows: Address,
    pub lengths: Address,
    pub starts: Address,
    pub tables: Address,
    /// Parts into which each sequence's keys are cut.
    pub splits: usize,
    pub sums: Address,
    pub totals: Address,
}

/// The lists of tiles.
#[derive(Debug, Clone, Copy)]
pub struct Tiles {
    pub count: usize,
    pub lists: [Address; 5],
    pub tables: Address,
}

/// The lists by which rows of logits get their tokens.
#[derive(Debug, Clone, Copy)]
pub struct Choices {
    pub count: usize,
    pub draws: Address,
    pub pairs: Address,
}

/// What sequences' next tokens depend on, which lies on the device from step to step.
#[derive(Debug, Clone, Copy)]
pub struct States {
    pub slots: Address,
    pub counts: Address,
}

impl Kernels {
    pub fn load(stream: &Arc<CudaStream>, dtype: DType, sizes: &Sizes) -> Result<Self> {
        let suffix = match dtype {
            DType::F32 => "float",
            DType::BF16 => "bf16",
            DType::F16 => "f16",
            other => bail!("no kernels for {other:?}"),
        };
        let context = stream.context();
        let modules: Vec<_> = [
            "elementwise",
            "rope_",
            "attention_decode",
            "attention_prefill",
            "sample",
        ]
        .into_iter()
        .map(|file| {
            context
                .load_module(Ptx::from_binary(image(file).to_vec()))
                .map_err(device_error)
        })
        .collect::<Result<_>>()?;
        let [elementwise, rope, decode, prefill, sample] = modules.as_slice() else {
            bail!("the kernels are incomplete")
        };
        let typed = |name: &str| format!("{name}_{suffix}");
        let sized = |name: &str| format!("{name}_{suffix}_{}", sizes.head_dim);
        let tiles = || function(prefill, &sized("attention_prefill"), prefill_shared(sizes.head_dim));
        Ok(Self {
            stream: stream.clone(),
            embed: function(elementwise, &typed("embed"), 0)?,
            angles: function(elementwise, "angles", 0)?,
            residual_norm: function(elementwise, &typed("residual_norm"), 4 * sizes.hidden as u32)?,
            rope_store: function(rope, &typed("rope_store"), 0)?,
            silu_mul: function(elementwise, &typed("silu_mul"), 0)?,
            decode: function(decode, &sized("attention_decode"), 0)?,
            merge: function(decode, &sized("attention_merge"), 0)?,
            prefill: (dtype != DType::F32).then(tiles).transpose()?,
            set_slots: function(sample, "set_slots", 0)?,
            edit_logits: function(sample, "edit_logits", 0)?,
            sample: function(sample, "sample", 0)?,
        })
    }

    /// Whether chunks of a prompt attend in tiles.
    pub fn tiles(&self) -> bool {
        self.prefill.is_some()
    }

    /// # Safety
    /// The arguments are those of the kernel's parameters, the addresses are of this device and hold what the kernel
    /// reads and writes on this grid until the stream has come past the launch.
    unsafe fn launch(
        &self,
        function: &CudaFunction,
        grid: (usize, usize, usize),
        block: u32,
        shared: u32,
        arguments: &[Argument],
    ) -> Result<()> {
        if grid.0 == 0 {
            return Ok(());
        }
        let mut builder = self.stream.launch_builder(function);
        for argument in arguments {
            match argument {
                Argument::Address(value) => builder.arg(value),
                Argument::Int(value) => builder.arg(value),
                Argument::Float(value) => builder.arg(value),
            };
        }
        let config = LaunchConfig {
            grid_dim: (grid.0 as u32, grid.1 as u32, grid.2 as u32),
            block_dim: (block, 1, 1),
            shared_mem_bytes: shared,
        };
        // SAFETY: the caller's promise.
        unsafe { builder.launch(config) }.map_err(device_error)?;
        Ok(())
    }

    // The launches below take their buffers from a `Workspace` that was made to hold the step's shape, and their lists
    // from a `Metadata` of a step that was checked against the model and the cache; the sizes are the model's.

    /// `x[t] = table[tokens[t]]`, where a token may be one that the step before chose into `sampled`.
    pub fn embed(
        &self,
        s: &Sizes,
        tokens: usize,
        table: Address,
        ids: Address,
        sampled: Address,
        x: Address,
    ) -> Result<()> {
        let arguments = arguments![table, ids, sampled, x, s.hidden, s.vocabulary];
        // SAFETY: `table` is [vocabulary, hidden], `x` [tokens, hidden]; ids are below the vocabulary or name rows of the
        // step before, which `sampled` holds.
        unsafe { self.launch(&self.embed, (tokens, 1, 1), THREADS, 0, arguments) }
    }

    /// Cosines and sines of the tokens' positions.
    pub fn angles(
        &self,
        s: &Sizes,
        tokens: usize,
        positions: Address,
        inverse: Address,
        angles: [Address; 2],
    ) -> Result<()> {
        let arguments = arguments![positions, inverse, angles[0], angles[1], s.head_dim / 2];
        // SAFETY: `inverse` is [head_dim / 2], both of `angles` [tokens, head_dim / 2].
        unsafe { self.launch(&self.angles, (tokens, 1, 1), 128, 0, arguments) }
    }

    /// `x += delta`, `out = norm(x)`, for all of `rows` rows, or of those that the list `chosen` names, without storing `x`.
    /// An address of 0 is no delta, no list.
    #[allow(clippy::too_many_arguments, reason = "each is an argument of the kernel")]
    pub fn residual_norm(
        &self,
        s: &Sizes,
        rows: usize,
        x: Address,
        delta: Address,
        chosen: Address,
        weight: Address,
        out: Address,
    ) -> Result<()> {
        let arguments = arguments![x, delta, chosen, weight, out, s.hidden, s.eps];
        // SAFETY: `x`, `delta` and `out` are [rows or more, hidden], `weight` is [hidden], `chosen` names rows of `x`; the
        // shared memory holds one row.
        unsafe {
            self.launch(
                &self.residual_norm,
                (rows, 1, 1),
                THREADS,
                4 * s.hidden as u32,
                arguments,
            )
        }
    }

    /// Rotates queries in place and stores keys and values; `extras` are the bias and the norms of queries and keys, 0
    /// where there is none.
    #[allow(clippy::too_many_arguments, reason = "each is an argument of the kernel")]
    pub fn rope_store(
        &self,
        s: &Sizes,
        tokens: usize,
        qkv: Address,
        extras: [Address; 3],
        angles: [Address; 2],
        slots: Address,
        pool: Pool,
    ) -> Result<()> {
        let all = s.heads + 2 * s.kv_heads;
        let [bias, query_norm, key_norm] = extras;
        let arguments = arguments![
            qkv,
            bias,
            query_norm,
            key_norm,
            angles[0],
            angles[1],
            slots,
            pool.keys,
            pool.values,
            s.heads,
            s.kv_heads,
            s.head_dim,
            s.eps
        ];
        // SAFETY: `qkv` is [tokens, heads + 2 kv_heads, head_dim], the extras [heads + 2 kv_heads, head_dim] and
        // [head_dim], the angles [tokens, head_dim / 2]; the step's check keeps slots within the pools. One warp a head.
        unsafe { self.launch(&self.rope_store, (tokens, all.div_ceil(4), 1), 128, 0, arguments) }
    }

    /// `out = silu(gate) * up`, which lie side by side.
    pub fn silu_mul(&self, s: &Sizes, tokens: usize, gate_up: Address, out: Address, wide: usize) -> Result<()> {
        let blocks = s.inner.div_ceil(THREADS as usize * wide);
        let arguments = arguments![gate_up, out, s.inner];
        // SAFETY: `gate_up` is [tokens, 2 inner], `out` [tokens, inner], and `inner` a multiple of 16 bytes, as the model's
        // loading checked.
        unsafe { self.launch(&self.silu_mul, (tokens, blocks, 1), THREADS, 0, arguments) }
    }

    /// Attention of queries that attend alone: `out` from the queries in `qkv`.
    pub fn decode(&self, s: &Sizes, qkv: Address, pool: Pool, d: Decodes, out: Address) -> Result<()> {
        let pieces = (s.heads / s.kv_heads).div_ceil(GROUP);
        let arguments = arguments![
            qkv,
            (s.heads + 2 * s.kv_heads) * s.head_dim,
            pool.keys,
            pool.values,
            d.rows,
            d.lengths,
            d.starts,
            d.tables,
            out,
            d.sums,
            d.totals,
            s.heads,
            s.kv_heads,
            pool.block_size.trailing_zeros() as usize,
            s.window,
            1.0 / (s.head_dim as f32).sqrt(),
        ];
        let grid = (d.count, s.kv_heads * pieces, d.splits);
        // SAFETY: rows are the step's, of `qkv` and `out`; each table covers its length within the pools; `sums` and
        // `totals` are [count, heads, splits, head_dim] and [.., 2] where there is more than one split.
        unsafe { self.launch(&self.decode, grid, 128, 0, arguments)? };
        if d.splits == 1 {
            return Ok(());
        }
        let arguments = arguments![d.sums, d.totals, d.rows, d.lengths, out, d.splits, s.window];
        // SAFETY: as above, and the launch before wrote every split that a length uses.
        unsafe { self.launch(&self.merge, (d.count, s.heads, 1), 128, 0, arguments) }
    }

    /// Attention of chunks of prompts: `out` from the queries in `qkv`.
    pub fn prefill(&self, s: &Sizes, qkv: Address, pool: Pool, tiles: Tiles, out: Address) -> Result<()> {
        let (Some(function), true) = (&self.prefill, tiles.count > 0) else {
            return Ok(());
        };
        let [first, position, len, start, offset] = tiles.lists;
        let arguments = arguments![
            qkv,
            (s.heads + 2 * s.kv_heads) * s.head_dim,
            pool.keys,
            pool.values,
            first,
            position,
            len,
            start,
            offset,
            tiles.tables,
            out,
            s.heads,
            s.kv_heads,
            pool.block_size.trailing_zeros() as usize,
            s.window,
            1.0 / (s.head_dim as f32).sqrt(),
        ];
        let shared = prefill_shared(s.head_dim);
        // SAFETY: tiles are of the step's spans, whose rows `qkv` and `out` hold and whose tables cover them within the
        // pools; the shared memory is what the kernel's tiles take.
        unsafe { self.launch(function, (tiles.count, s.kv_heads, 1), 128, shared, arguments) }
    }

    /// Sets `count` slots as the list `sets` says, with counts out of the list `pairs`.
    pub fn set_slots(&self, s: &Sizes, count: usize, sets: Address, pairs: Address, states: States) -> Result<()> {
        let arguments = arguments![sets, pairs, states.slots, states.counts, s.vocabulary];
        // SAFETY: `sets` has `SET_WORDS` a slot, whose counts lie behind `pairs` and name tokens of the vocabulary; `slots`
        // holds all that are named, `counts` is [slots, vocabulary] for those that have counts.
        unsafe { self.launch(&self.set_slots, (count, 1, 1), 1024, 0, arguments) }
    }

    /// Applies the rows' penalties and biases to their logits and chooses a token for each into `sampled`, in place of what
    /// the step before chose. What that changes of the sequences' states is changed in place.
    pub fn sample(&self, s: &Sizes, c: Choices, states: States, logits: Address, sampled: Address) -> Result<()> {
        let States { slots, counts } = states;
        // SAFETY: `logits` is [count, vocabulary], `draws` has `DRAW_WORDS` a row, its biases lie behind `pairs` and name
        // tokens of the vocabulary; `slots` holds all that rows have, each one row's, `counts` is [slots, vocabulary] for
        // those with penalties; `sampled` is [count].
        unsafe {
            let edit = arguments![logits, c.draws, c.pairs, counts, s.vocabulary];
            let segments = s.vocabulary.div_ceil(SEGMENT);
            self.launch(&self.edit_logits, (c.count, segments, 1), 256, 0, edit)?;
            let choose = arguments![logits, c.draws, slots, counts, sampled, s.vocabulary];
            self.launch(&self.sample, (c.count, 1, 1), 1024, 0, choose)
        }
    }
}
