//! What lies between the projections: RMS norm, the rotation of queries and keys, and their way into the KV cache.

use candle_core::{CpuStorage, CustomOp1, InplaceOp2, InplaceOp3, Layout, Result, Shape, Tensor, bail};
use half::{bf16, f16};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::{slice, slice_mut};

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

/// `x *= weight / rms(x)` for one row.
#[inline(always)]
fn normalise(x: &mut [f32], weight: &[f32], eps: f32) {
    let scale = 1.0 / (sum_of_squares(x) / x.len() as f32 + eps).sqrt();
    for (x, weight) in x.iter_mut().zip(weight) {
        *x = *x * scale * weight;
    }
}

/// Root mean square layer normalisation (Zhang and Sennrich, 2019).
pub struct RmsNorm {
    /// `[width]`
    pub weight: Vec<f32>,
    pub eps: f32,
}

impl RmsNorm {
    /// Normalises each row of `[rows, width]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        x.apply_op1_no_bwd(self)
    }
}

impl CustomOp1 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let mut out = slice::<f32>(storage, layout)?.to_vec();
        let width = self.weight.len();
        out.par_chunks_mut(width * ROWS_A_THREAD)
            .for_each(|rows| Arch::new().dispatch(Normalise { norm: self, rows }));
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }
}

/// Some rows to normalise.
struct Normalise<'a> {
    norm: &'a RmsNorm,
    rows: &'a mut [f32],
}

impl WithSimd for Normalise<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for row in self.rows.chunks_exact_mut(self.norm.weight.len()) {
            normalise(row, &self.norm.weight, self.norm.eps);
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
    /// In place on `qkv` (`[rows, (query + key + value heads) * head_dim]`), by `cos` and `sin`
    /// (`[rows, head_dim / 2]`).
    pub fn forward(&self, qkv: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<()> {
        qkv.inplace_op3(cos, sin, self)
    }

    #[inline(always)]
    fn head<S: Simd>(&self, simd: S, index: usize, head: &mut [f32], cos: &[f32], sin: &[f32]) {
        let norm = if index < self.query_heads {
            self.query_norm
        } else {
            self.key_norm
        };
        if let Some(norm) = norm {
            normalise(head, &norm.weight, norm.eps);
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

impl InplaceOp3 for Rotate<'_> {
    fn name(&self) -> &'static str {
        "rotate"
    }

    fn cpu_fwd(
        &self,
        qkv: &mut CpuStorage,
        qkv_layout: &Layout,
        cos: &CpuStorage,
        cos_layout: &Layout,
        sin: &CpuStorage,
        sin_layout: &Layout,
    ) -> Result<()> {
        let (cos, sin) = (slice::<f32>(cos, cos_layout)?, slice::<f32>(sin, sin_layout)?);
        let (_, width) = qkv_layout.shape().dims2()?;
        let half = self.head_dim / 2;
        let chunks = slice_mut(qkv, qkv_layout)?.par_chunks_mut(width * ROWS_A_THREAD);
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
        Ok(())
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
    /// Column of the half's first head in a row.
    pub column: usize,
}

impl Store<'_> {
    /// From `qkv` (`[rows, ...]`) into `pool` (keys `[blocks, heads, head_dim, block_size]`, values
    /// `[blocks, heads, block_size, head_dim]`).
    pub fn forward(&self, pool: &Tensor, qkv: &Tensor) -> Result<()> {
        pool.inplace_op2(qkv, self)
    }

    fn write<T: Copy>(&self, pool: &mut [T], shape: [usize; 4], qkv: &[f32], width: usize, convert: impl Fn(f32) -> T) {
        let [_, heads, a, b] = shape;
        let (dim, block_size) = if self.half == Half::Keys { (a, b) } else { (b, a) };
        for (row, &slot) in qkv.chunks_exact(width).zip(self.slots) {
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

impl InplaceOp2 for Store<'_> {
    fn name(&self) -> &'static str {
        "store"
    }

    fn cpu_fwd(&self, pool: &mut CpuStorage, layout: &Layout, qkv: &CpuStorage, qkv_layout: &Layout) -> Result<()> {
        let (blocks, heads, a, b) = layout.shape().dims4()?;
        let shape = [blocks, heads, a, b];
        let (rows, width) = qkv_layout.shape().dims2()?;
        if layout.start_offset() != 0 || rows != self.slots.len() {
            bail!("store: {} slots for {rows} rows", self.slots.len())
        }
        let qkv = slice(qkv, qkv_layout)?;
        match pool {
            CpuStorage::F32(pool) => self.write(pool, shape, qkv, width, |x| x),
            CpuStorage::BF16(pool) => self.write(pool, shape, qkv, width, bf16::from_f32),
            CpuStorage::F16(pool) => self.write(pool, shape, qkv, width, f16::from_f32),
            _ => bail!("store: the KV cache holds neither f32, bf16 nor f16"),
        }
        Ok(())
    }
}
