//! The paged KV cache: one pool of keys and one of values a layer, cut into blocks that block tables name.

use candle_core::{CpuStorage, DType, Device, Result, Shape, Storage, Tensor, bail, op::BackpropOp};
use half::vec::HalfBitsVecExt;
use half::{bf16, f16};

use crate::Config;

/// Keys and values of all sequences, a pool of blocks in each layer.
///
/// A block holds `block_size` positions of every KV head. Within a block keys lie as
/// `[kv_heads, head_dim, block_size]`, so that a query meets several keys in one vector, and values as
/// `[kv_heads, block_size, head_dim]`. On a GPU both lie as `[block_size, kv_heads, head_dim]`.
#[derive(Debug)]
pub struct KvCache {
    pub(crate) layers: Vec<Pools>,
    blocks: usize,
    block_size: usize,
    /// What steps need on a GPU besides; made by the first of them.
    #[cfg(feature = "cuda")]
    pub(crate) workspace: Option<crate::cuda::Workspace>,
}

/// One layer's pools.
#[derive(Debug)]
pub(crate) struct Pools {
    /// `[blocks, kv_heads, head_dim, block_size]`
    pub keys: Tensor,
    /// `[blocks, kv_heads, block_size, head_dim]`
    pub values: Tensor,
}

impl KvCache {
    /// A pool of `blocks` blocks of `block_size` positions, stored as `dtype` (f32, bf16 or f16). The memory is
    /// reserved; a block becomes resident when it is first written.
    pub fn new(config: &Config, blocks: usize, block_size: usize, dtype: DType, device: &Device) -> Result<Self> {
        if blocks == 0 || block_size == 0 {
            bail!("KV cache: {blocks} blocks of {block_size} positions hold nothing")
        }
        if device.is_cpu() {
            // A vector that cannot be had ends the process; a reservation that cannot be had is an error.
            let bytes = blocks.saturating_mul(Self::bytes_per_block(config, block_size, dtype));
            if Vec::<u8>::new().try_reserve_exact(bytes).is_err() {
                bail!("KV cache: {bytes} bytes cannot be had")
            }
        }
        let (heads, dim) = (config.kv_heads, config.head_dim);
        let pools = |_| {
            let on_gpu = [blocks, block_size, heads, dim];
            let [keys, values] = match device.is_cpu() {
                true => [[blocks, heads, dim, block_size], [blocks, heads, block_size, dim]],
                false => [on_gpu, on_gpu],
            };
            let (keys, values) = (zeros(&keys, dtype, device)?, zeros(&values, dtype, device)?);
            Ok(Pools { keys, values })
        };
        let layers = (0..config.layers).map(pools).collect::<Result<_>>()?;
        Ok(Self {
            layers,
            blocks,
            block_size,
            #[cfg(feature = "cuda")]
            workspace: None,
        })
    }

    /// Bytes that one block takes over all layers, keys and values together.
    pub fn bytes_per_block(config: &Config, block_size: usize, dtype: DType) -> usize {
        2 * config.layers * config.kv_heads * config.head_dim * block_size * dtype.size_in_bytes()
    }

    /// Number of blocks in the pool.
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Positions in a block.
    pub fn block_size(&self) -> usize {
        self.block_size
    }
}

/// Zeros that the operating system hands out page by page as they are touched. candle's own zeros of the half types
/// are written out, which would make the whole pool resident.
fn zeros(shape: &[usize], dtype: DType, device: &Device) -> Result<Tensor> {
    if !device.is_cpu() {
        return Tensor::zeros(shape, dtype, device);
    }
    let len = shape.iter().product();
    let storage = match dtype {
        DType::F32 => CpuStorage::F32(vec![0f32; len]),
        DType::BF16 => CpuStorage::BF16(vec![0u16; len].reinterpret_into::<bf16>()),
        DType::F16 => CpuStorage::F16(vec![0u16; len].reinterpret_into::<f16>()),
        other => bail!("KV cache: cannot store {other:?}; choose f32, bf16 or f16"),
    };
    Ok(Tensor::from_storage(
        Storage::Cpu(storage),
        Shape::from(shape),
        BackpropOp::none(),
        false,
    ))
}
