//! What lies between the projections: RMS norm, the rotation of queries and keys, and their way into the KV cache.

use candle_core::{CpuStorage, InplaceOp1, Layout, Result, Tensor, bail};
use half::{bf16, f16};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

/// Rows below which waking other threads costs more than it saves.
pub const ROWS_A_THREAD: usize = 16;

/// Sum of squares, in 16 interleaved sums that are then added up in order.
#[inline(always)]
fn sum_of_squares(x: &[f32]) -> f32 {
    let mut sums = [0f32; 16];
    let (chunks, rest) = x.as_chunks::<16>();
    for chunk in chunks {
        for (sum, value) in sums.iter_mut().zip(chunk) {
            *sum = value.mul_add(*value, *sum);
        }
    }
    for (sum, value) in sums.iter_mut().zip(rest) {
        *sum = value.mul_add(*value, *sum);
    }
    sums.iter().sum()
}

/// `1 / rms(x)` of one row.
#[inline(always)]
fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    1.0 / (sum_of_squares(x) / x.len() as f32 + eps).sqrt()
}

/// Root mean square layer normalisation (Zhang and Sennrich, 2019).
pub struct RmsNorm {
    /// `[width]`
    pub weight: Vec<f32>,
    pub eps: f32,
}

impl RmsNorm {
    /// `out` becomes `x` (`[rows, width]`) with each row normalised.
    pub fn forward(&self, x: &[f32], out: &mut Vec<f32>) {
        out.resize(x.len(), 0.0);
        let rows = self.weight.len() * ROWS_A_THREAD;
        out.par_chunks_mut(rows)
            .zip(x.par_chunks(rows))
            .for_each(|(out, x)| Arch::new().dispatch(Normalise { norm: self, x, out }));
    }
}

/// Some rows to normalise.
struct Normalise<'a> {
    norm: &'a RmsNorm,
    x: &'a [f32],
    out: &'a mut [f32],
}

impl WithSimd for Normalise<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let RmsNorm { weight, eps } = self.norm;
        let width = weight.len();
        for (x, out) in self.x.chunks_exact(width).zip(self.out.chunks_exact_mut(width)) {
            let scale = inverse_rms(x, *eps);
            for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
                *out = x * scale * weight;
            }
        }
    }
}

/// Turns queries and keys by their positions' angles, after their norm where the family has one (Qwen3).
pub struct Rotate<'a> {
    /// Query heads and key heads: the first of the heads in a row.
    pub query_heads: usize,
    pub key_heads: usize,
    pub head_dim: usize,
    pub query_norm: Option<&'a RmsNorm>,
    pub key_norm: Option<&'a RmsNorm>,
}

impl Rotate<'_> {
    /// In place on `qkv` (`[rows, width]`, of query, key and value heads), by `cos` and `sin` (`[rows, head_dim / 2]`).
    pub fn forward(&self, qkv: &mut [f32], width: usize, cos: &[f32], sin: &[f32]) {
        let half = self.head_dim / 2;
        let chunks = qkv.par_chunks_mut(width * ROWS_A_THREAD);
        let angles = cos
            .par_chunks(half * ROWS_A_THREAD)
            .zip(sin.par_chunks(half * ROWS_A_THREAD));
        chunks.zip(angles).for_each(|(rows, (cos, sin))| {
            Arch::new().dispatch(RotateRows {
                rotate: self,
                rows,
                width,
                cos,
                sin,
            });
        });
    }

    #[inline(always)]
    fn head<S: Simd>(&self, simd: S, index: usize, head: &mut [f32], cos: &[f32], sin: &[f32]) {
        let norm = if index < self.query_heads {
            self.query_norm
        } else {
            self.key_norm
        };
        if let Some(RmsNorm { weight, eps }) = norm {
            let scale = inverse_rms(head, *eps);
            for (x, weight) in head.iter_mut().zip(weight) {
                *x = *x * scale * weight;
            }
        }
        let (low, high) = head.split_at_mut(self.head_dim / 2);
        // By whole vectors: a head is too short for the loop that the compiler would make.
        let ((low, last_low), (high, last_high)) = (S::as_mut_simd_f32s(low), S::as_mut_simd_f32s(high));
        let ((cos, last_cos), (sin, last_sin)) = (S::as_simd_f32s(cos), S::as_simd_f32s(sin));
        for (((a, b), &cos), &sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
            (*a, *b) = (
                simd.sub_f32s(simd.mul_f32s(*a, cos), simd.mul_f32s(*b, sin)),
                simd.add_f32s(simd.mul_f32s(*b, cos), simd.mul_f32s(*a, sin)),
            );
        }
        for (((a, b), cos), sin) in last_low.iter_mut().zip(last_high).zip(last_cos).zip(last_sin) {
            (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
        }
    }
}

/// Some rows to rotate.
struct RotateRows<'a> {
    rotate: &'a Rotate<'a>,
    rows: &'a mut [f32],
    width: usize,
    cos: &'a [f32],
    sin: &'a [f32],
}

impl WithSimd for RotateRows<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Rotate {
            query_heads,
            key_heads,
            head_dim,
            ..
        } = *self.rotate;
        let angles = self
            .cos
            .chunks_exact(head_dim / 2)
            .zip(self.sin.chunks_exact(head_dim / 2));
        for (row, (cos, sin)) in self.rows.chunks_exact_mut(self.width).zip(angles) {
            for (index, head) in row.chunks_exact_mut(head_dim).take(query_heads + key_heads).enumerate() {
                self.rotate.head(simd, index, head, cos, sin);
            }
        }
    }
}

/// Which half of the KV cache a [`Store`] writes.
#[derive(Clone, Copy, PartialEq)]
pub enum Half {
    Keys,
    Values,
}

/// Writes the keys or values of a step into their slots in a pool.
pub struct Store<'a> {
    pub half: Half,
    /// Slot of every row.
    pub slots: &'a [usize],
    /// `[rows, width]`
    pub qkv: &'a [f32],
    pub width: usize,
    /// Column of the half's first head in a row.
    pub column: usize,
}

impl Store<'_> {
    /// Into `pool` (keys `[blocks, heads, head_dim, block_size]`, values `[blocks, heads, block_size, head_dim]`). An error if
    /// there is not a slot for each row, or if the pool is no floats on the CPU.
    pub fn forward(&self, pool: &Tensor) -> Result<()> {
        pool.inplace_op1(self)
    }

    fn write<T: Copy>(&self, pool: &mut [T], shape: [usize; 4], convert: impl Fn(f32) -> T) {
        let [_, heads, a, b] = shape;
        let (dim, block_size) = if self.half == Half::Keys { (a, b) } else { (b, a) };
        for (row, &slot) in self.qkv.chunks_exact(self.width).zip(self.slots) {
            let (block, offset) = (slot / block_size, slot % block_size);
            for (head, values) in row[self.column..].chunks_exact(dim).take(heads).enumerate() {
                let block = &mut pool[(block * heads + head) * dim * block_size..][..dim * block_size];
                let places = match self.half {
                    Half::Keys => block[offset..].iter_mut().step_by(block_size),
                    Half::Values => block[offset * dim..].iter_mut().step_by(1),
                };
                places.zip(values).for_each(|(to, &value)| *to = convert(value));
            }
        }
    }
}

impl InplaceOp1 for Store<'_> {
    fn name(&self) -> &'static str {
        "store"
    }

    fn cpu_fwd(&self, pool: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let (blocks, heads, a, b) = layout.shape().dims4()?;
        let shape = [blocks, heads, a, b];
        if layout.start_offset() != 0 || self.qkv.len() != self.slots.len() * self.width {
            bail!("store: {} slots for {} numbers", self.slots.len(), self.qkv.len())
        }
        match pool {
            CpuStorage::F32(pool) => self.write(pool, shape, |x| x),
            CpuStorage::BF16(pool) => self.write(pool, shape, bf16::from_f32),
            CpuStorage::F16(pool) => self.write(pool, shape, f16::from_f32),
            _ => bail!("store: the KV cache holds neither f32, bf16 nor f16"),
        }
        Ok(())
    }
}
