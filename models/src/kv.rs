//! The paged KV cache: one pool of keys and one of values a layer, cut into blocks that block tables name.

use candle_core::{CpuStorage, DType, Device, Result, Shape, Storage, Tensor, bail, op::BackpropOp};
use half::vec::HalfBitsVecExt;
use half::{bf16, f16};

use crate::Config;
use crate::cpu::bfloat16::Bfloat16Panels;
use crate::cpu::compressed::CompressedPanels;

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
    /// What [`Self::read_block`] gives of a pool on `device` and how decoders with weights of `dtype` compute it. Another
    /// number whenever either changes, so that blocks saved by another version, or of another kind of device, are not taken
    /// for this one's.
    pub fn layout(dtype: DType, device: &Device) -> u32 {
        match device.is_cpu() {
            false => 2,
            // These processors round the activations, too.
            true if dtype == DType::BF16 && Bfloat16Panels::are_fast() => 4,
            // These round them otherwise where a file's blocks are multiplied.
            true if dtype == DType::F32 && CompressedPanels::go_by_digits() => 6,
            true => 3,
        }
    }

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

    /// Bytes that [`Self::read_block`] gives and [`Self::write_block`] takes.
    pub fn block_bytes(&self) -> usize {
        self.halves().map(half_bytes).sum()
    }

    /// Appends a block's contents to `bytes`: of each layer its keys, then its values, little-endian in the pool's type.
    pub fn read_block(&self, block: u32, bytes: &mut Vec<u8>) -> Result<()> {
        bytes.reserve(self.block_bytes());
        self.halves().try_for_each(|pool| {
            let half = pool.get(block as usize)?;
            match pool.device().is_cpu() {
                true => half.write_bytes(bytes),
                // Of a tensor on a GPU candle copies all memory to the host, and that of a part is the whole pool's.
                false => half.force_contiguous()?.write_bytes(bytes),
            }
        })
    }

    /// Fills a block with what [`Self::read_block`] gave of one, in this pool or in another like it.
    pub fn write_block(&mut self, block: u32, mut bytes: &[u8]) -> Result<()> {
        if bytes.len() != self.block_bytes() {
            bail!(
                "KV cache: a block has {} bytes, not {}",
                self.block_bytes(),
                bytes.len()
            )
        }
        for pool in self.halves() {
            let (half, rest) = bytes.split_at(half_bytes(pool));
            let mut shape = pool.dims().to_vec();
            shape[0] = 1;
            let contents = Tensor::from_raw_buffer(half, pool.dtype(), &shape, pool.device())?;
            pool.slice_set(&contents, 0, block as usize)?;
            bytes = rest;
        }
        Ok(())
    }

    /// Every layer's keys and values.
    fn halves(&self) -> impl Iterator<Item = &Tensor> {
        self.layers.iter().flat_map(|pools| [&pools.keys, &pools.values])
    }
}

/// Bytes of one block in a layer's keys or values.
fn half_bytes(pool: &Tensor) -> usize {
    pool.dims()[1..].iter().product::<usize>() * pool.dtype().size_in_bytes()
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Rope, RopeScaling};

    fn config() -> Config {
        Config {
            architecture: "llama".into(),
            hidden_size: 8,
            intermediate_size: 8,
            vocab_size: 8,
            layers: 2,
            heads: 2,
            kv_heads: 1,
            head_dim: 4,
            rms_norm_eps: 1e-5,
            rope: Rope {
                theta: 1e4,
                scaling: RopeScaling::None,
            },
            max_position_embeddings: 64,
            sliding_window: None,
            qkv_bias: false,
            qk_norm: false,
            tie_word_embeddings: true,
        }
    }

    #[test]
    fn a_block_moves_to_another_pool_and_touches_no_other_block() {
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let pool = || KvCache::new(&config(), 3, 2, dtype, &Device::Cpu).unwrap();
            let (mut one, mut other) = (pool(), pool());
            assert_eq!(one.block_bytes(), KvCache::bytes_per_block(&config(), 2, dtype));
            // Small numbers in each type, no two bytes alike within reach.
            let bytes: Vec<u8> = (0..one.block_bytes()).map(|i| (i % 61) as u8).collect();
            one.write_block(1, &bytes).unwrap();
            let read = |pool: &KvCache, block| {
                let mut bytes = Vec::new();
                pool.read_block(block, &mut bytes).unwrap();
                bytes
            };
            assert_eq!(read(&one, 1), bytes);
            for untouched in [0, 2] {
                assert!(read(&one, untouched).iter().all(|&byte| byte == 0));
            }
            other.write_block(2, &read(&one, 1)).unwrap();
            assert_eq!(read(&other, 2), bytes);
            assert!(other.write_block(0, &bytes[1..]).is_err());
            assert!(other.write_block(3, &bytes).is_err());
        }
    }
}
