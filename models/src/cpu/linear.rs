//! Projections by packed weights: `x W^T`, with what follows it done while the result is in the cache.

use std::cell::Cell;
use std::ops::Range;

use candle_core::{DType, Result, bail};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::bfloat16::{self, Bfloat16Panels};
use super::compressed::{self, CompressedPanels};
use super::panels::{Aligned, Block, Panels, stored_as, widen_bf16, widen_f16};
use super::quantized::{self, QuantizedPanels};
use super::stored::{BLOCK, StoredMatrix};
use super::tile::{Column, for_row_tiles, multiply, tile_rows};
use super::{Stripes, lend, math};
use crate::ceilings::Arithmetic;

/// Most inputs that are multiplied before the next rows' turn, so that a block of a panel stays in the first-level cache.
const DEPTH_BLOCK: usize = 384;
/// Activations, in floats, that a thread works on at a time where weights are not widened: a quarter of a usual second-level
/// cache, or more where that is less than `ROW_STEP` rows.
const ROW_BLOCK: usize = 32 * 1024;
/// Rows of a block, or half of one: whole tiles of every kind of product, but for those of compressed weights in float32.
const ROW_STEP: usize = 48;
const _: () = assert!(ROW_STEP.is_multiple_of(quantized::TILE) && ROW_STEP.is_multiple_of(compressed::TILE));

/// What becomes of a product.
#[derive(Clone, Copy)]
enum Epilogue<'a> {
    /// Written, after the bias is added.
    Write { bias: Option<&'a [f32]> },
    /// Added to what is there.
    Add,
    /// Panels come in pairs, gate and up: `silu(gate) * up` is written.
    SwiGlu,
}

/// Packed weights.
enum Matrix {
    Dense(Panels),
    /// In the blocks of a file, and multiplied with float32's accuracy.
    Compressed(CompressedPanels),
    /// In bfloat16, and multiplied as such.
    Bfloat16(Bfloat16Panels),
    Quantized(QuantizedPanels),
}

impl Matrix {
    /// Packs row-major `weight` to be multiplied as `dtype`.
    fn new(weight: &[f32], inputs: usize, dtype: DType) -> Result<Self> {
        Ok(match dtype {
            DType::BF16 if Bfloat16Panels::are_fast() => Self::Bfloat16(Bfloat16Panels::pack(weight, inputs)),
            _ => Self::Dense(Panels::pack(weight, inputs, stored_as(dtype, &[weight]))?),
        })
    }

    /// Packs row-major `gate` and `up` to be multiplied as `dtype`, a panel of one and a panel of the other in turn.
    fn gate_up(gate: &[f32], up: &[f32], inputs: usize, dtype: DType) -> Result<Self> {
        Ok(match dtype {
            DType::BF16 if Bfloat16Panels::are_fast() => Self::Bfloat16(Bfloat16Panels::pack_pairs(gate, up, inputs)),
            _ => Self::Dense(Panels::pack_pairs(gate, up, inputs, stored_as(dtype, &[gate, up]))?),
        })
    }

    fn depth(&self) -> usize {
        match self {
            Self::Dense(panels) => panels.depth,
            Self::Compressed(panels) => panels.depth,
            Self::Bfloat16(panels) => panels.depth,
            Self::Quantized(panels) => panels.depth,
        }
    }

    fn outputs(&self) -> usize {
        match self {
            Self::Dense(panels) => panels.outputs,
            Self::Compressed(panels) => panels.outputs,
            Self::Bfloat16(panels) => panels.outputs,
            Self::Quantized(panels) => panels.outputs,
        }
    }

    /// How it is multiplied.
    fn arithmetic(&self) -> Arithmetic {
        match self {
            Self::Dense(_) | Self::Bfloat16(_) => Arithmetic::Numbers,
            Self::Compressed(_) => Arithmetic::Blocks,
            Self::Quantized(_) => Arithmetic::Rounded,
        }
    }

    /// Columns of a panel.
    fn width(&self) -> usize {
        match self {
            Self::Dense(panels) => panels.width,
            Self::Compressed(panels) => panels.width,
            Self::Bfloat16(_) => bfloat16::WIDTH,
            Self::Quantized(_) => quantized::WIDTH,
        }
    }

    /// Bytes that a product reads.
    fn bytes(&self) -> usize {
        match self {
            Self::Dense(panels) => panels.bytes(),
            Self::Compressed(panels) => panels.bytes(),
            Self::Bfloat16(panels) => panels.bytes(),
            Self::Quantized(panels) => panels.bytes(),
        }
    }
}

/// A projection `[out, in]`, optionally with a bias `[out]`.
pub struct Linear {
    matrix: Matrix,
    bias: Option<Vec<f32>>,
}

impl Linear {
    /// Packs row-major `weight` (`[out, in]`) to be multiplied as `dtype`.
    pub fn new(weight: &[f32], inputs: usize, bias: Option<Vec<f32>>, dtype: DType) -> Result<Self> {
        Ok(Self {
            matrix: Matrix::new(weight, inputs, dtype)?,
            bias,
        })
    }

    /// Packs a weight as [`quantized::read`] gives it; activations are rounded to eight bits for it.
    pub fn quantized(weight: &StoredMatrix, bias: Option<Vec<f32>>) -> Result<Self> {
        Ok(Self {
            matrix: Matrix::Quantized(QuantizedPanels::pack(weight)?),
            bias,
        })
    }

    /// Packs a weight that stays in its format and is multiplied with float32's accuracy.
    pub fn compressed(weight: &StoredMatrix, bias: Option<Vec<f32>>) -> Self {
        Self {
            matrix: Matrix::Compressed(CompressedPanels::pack(weight)),
            bias,
        }
    }

    /// Bytes of the weight.
    pub fn bytes(&self) -> usize {
        self.matrix.bytes()
    }

    /// `out` becomes `x W^T + bias`: `[rows, in]` to `[rows, out]`. An error if `x` is no whole rows.
    pub fn forward(&self, x: &[f32], out: &mut Vec<f32>) -> Result<()> {
        let bias = self.bias.as_deref();
        product(&self.matrix, x, out, Epilogue::Write { bias })
    }

    /// `x += a W^T`: the projection of `a` (`[rows, in]`) added to `x` (`[rows, out]`). An error if they have not equally many
    /// rows.
    pub fn add_to(&self, x: &mut [f32], a: &[f32]) -> Result<()> {
        run(&self.matrix, a, x, Epilogue::Add)
    }

    /// `out` becomes the weights of some outputs, `[indices, in]`: an embedding lookup in a tied output projection.
    pub fn gather(&self, indices: &[u32], out: &mut Vec<f32>) {
        let depth = self.matrix.depth();
        out.resize(indices.len() * depth, 0.0);
        for (row, &index) in out.chunks_exact_mut(depth).zip(indices) {
            match &self.matrix {
                Matrix::Dense(panels) => panels.gather(index as usize, row),
                Matrix::Compressed(panels) => panels.gather(index as usize, row),
                Matrix::Bfloat16(panels) => panels.gather(index as usize, row),
                Matrix::Quantized(panels) => panels.gather(index as usize, row),
            }
        }
    }
}

/// The first half of the MLP: `silu(x G^T) * (x U^T)`.
pub struct GateUp {
    matrix: Matrix,
}

impl GateUp {
    /// Packs row-major `gate` and `up` (both `[out, in]`) to be multiplied as `dtype`.
    pub fn new(gate: &[f32], up: &[f32], inputs: usize, dtype: DType) -> Result<Self> {
        Ok(Self {
            matrix: Matrix::gate_up(gate, up, inputs, dtype)?,
        })
    }

    /// As [`Linear::quantized`], of weights of one format.
    pub fn quantized(gate: &StoredMatrix, up: &StoredMatrix) -> Result<Self> {
        Ok(Self {
            matrix: Matrix::Quantized(QuantizedPanels::pack_pairs(gate, up)?),
        })
    }

    /// Packs weights that stay in their one format and are multiplied with float32's accuracy.
    pub fn compressed(gate: &StoredMatrix, up: &StoredMatrix) -> Self {
        Self {
            matrix: Matrix::Compressed(CompressedPanels::pack_pairs(gate, up)),
        }
    }

    /// Bytes of the weights.
    pub fn bytes(&self) -> usize {
        self.matrix.bytes()
    }

    /// How they are multiplied.
    pub fn arithmetic(&self) -> Arithmetic {
        self.matrix.arithmetic()
    }

    /// `out` becomes the product: `[rows, in]` to `[rows, out]`. An error if `x` is no whole rows.
    pub fn forward(&self, x: &[f32], out: &mut Vec<f32>) -> Result<()> {
        product(&self.matrix, x, out, Epilogue::SwiGlu)
    }
}

/// Memory for activations as products take them.
#[derive(Default)]
struct Rounded {
    pairs: Vec<bfloat16::Pair>,
    groups: Vec<quantized::Group>,
    digits: compressed::Memory,
}

/// Memory for a task's sums, and for weights that it unpacks.
#[derive(Default)]
struct Scratch {
    sums: Aligned<f32>,
    unpacked: Vec<f32>,
}

thread_local! {
    /// Used again from product to product.
    static ROUNDED: Cell<Rounded> = Cell::default();
    /// Used again from task to task.
    static SCRATCH: Cell<Scratch> = Cell::default();
}

/// `out` becomes the product, of as many rows as `x` has; what was in it is overwritten.
fn product(matrix: &Matrix, x: &[f32], out: &mut Vec<f32>, epilogue: Epilogue) -> Result<()> {
    out.resize(x.len() / matrix.depth() * matrix.outputs(), 0.0);
    run(matrix, x, out, epilogue)
}

/// Computes all of `out` (`[rows, outputs]`) from `x` (`[rows, depth]`), panels shared out among the threads.
fn run(matrix: &Matrix, x: &[f32], out: &mut [f32], epilogue: Epilogue) -> Result<()> {
    let (depth, outputs, width) = (matrix.depth(), matrix.outputs(), matrix.width());
    let rows = x.len() / depth;
    if x.len() != rows * depth || out.len() != rows * outputs {
        bail!(
            "linear [{outputs}, {depth}]: {} activations in, {} out",
            x.len(),
            out.len()
        )
    }
    let units = outputs.div_ceil(width);
    // Some tasks a thread, so that one that was held up does not hold up the rest.
    let tasks = (rayon::current_num_threads() * if rows < 16 { 4 } else { 8 }).min(units);
    let out = Stripes::new(out);
    lend(&ROUNDED, |rounded| {
        let operands = Operands::prepare(matrix, x, rounded);
        (0..tasks).into_par_iter().for_each(|task| {
            let stripe = Stripe {
                operands: &operands,
                depth,
                outputs,
                width,
                rows,
                units: task * units / tasks..(task + 1) * units / tasks,
                epilogue,
                out,
            };
            lend(&SCRATCH, |scratch| Arch::new().dispatch(Task { stripe, scratch }));
        });
    });
    Ok(())
}

/// What is multiplied; `x` is `[rows, depth]`.
enum Operands<'a> {
    Dense {
        panels: &'a Panels,
        x: &'a [f32],
    },
    Compressed {
        panels: &'a CompressedPanels,
        x: compressed::Activations<'a>,
    },
    Bfloat16 {
        panels: &'a Bfloat16Panels,
        x: bfloat16::Activations<'a>,
    },
    Quantized {
        panels: &'a QuantizedPanels,
        x: quantized::Activations<'a>,
    },
}

impl<'a> Operands<'a> {
    /// Rounds what has to be rounded.
    fn prepare(matrix: &'a Matrix, x: &'a [f32], rounded: &'a mut Rounded) -> Self {
        let depth = matrix.depth();
        match matrix {
            Matrix::Dense(panels) => Self::Dense { panels, x },
            Matrix::Compressed(panels) => Self::Compressed {
                panels,
                x: panels.activations(x, &mut rounded.digits),
            },
            Matrix::Bfloat16(panels) => Self::Bfloat16 {
                panels,
                x: bfloat16::Activations::round(x, depth, &mut rounded.pairs),
            },
            Matrix::Quantized(panels) => Self::Quantized {
                panels,
                x: quantized::Activations::round(x, depth, &mut rounded.groups),
            },
        }
    }
}

/// All rows of some columns of the product.
struct Stripe<'a> {
    operands: &'a Operands<'a>,
    depth: usize,
    outputs: usize,
    /// Columns of a panel.
    width: usize,
    rows: usize,
    /// Panels, or pairs of them.
    units: Range<usize>,
    epilogue: Epilogue<'a>,
    out: Stripes,
}

/// Computes a stripe by the processor's instructions.
struct Task<'a> {
    stripe: Stripe<'a>,
    scratch: &'a mut Scratch,
}

impl WithSimd for Task<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        self.stripe.compute(simd, self.scratch);
    }
}

impl Stripe<'_> {
    #[inline(always)]
    fn compute<S: Simd>(&self, simd: S, scratch: &mut Scratch) {
        let Stripe { depth, width, .. } = *self;
        let per_unit = if matches!(self.epilogue, Epilogue::SwiGlu) {
            2
        } else {
            1
        };
        let activations = match self.operands {
            // Each block of rows widens the weights again, which costs more than activations that leave the cache. Where weights
            // are not widened but whole, they are unpacked for every tile, and it makes no difference.
            Operands::Dense { panels, .. } if panels.are_widened() => usize::MAX,
            Operands::Compressed { .. } => usize::MAX,
            Operands::Dense { .. } => ROW_BLOCK,
            // Activations are half as large, and a quarter.
            Operands::Bfloat16 { .. } => 2 * ROW_BLOCK,
            Operands::Quantized { .. } => 4 * ROW_BLOCK,
        };
        let steps = if 2 * ROW_STEP * depth <= activations { 2 } else { 1 };
        let block = (steps * ROW_STEP).min(self.rows);
        // Vectors of sums that lie across two cache lines take longer.
        let Scratch { sums, unpacked } = scratch;
        let sums = sums.room(per_unit * block * width);
        for first in (0..self.rows).step_by(block) {
            let rows = block.min(self.rows - first);
            for unit in self.units.clone() {
                self.fetch(first..first + rows, unit);
                for (index, sums) in sums.chunks_exact_mut(block * width).enumerate() {
                    let (panel, sums) = (unit * per_unit + index, &mut sums[..rows * width]);
                    match self.operands {
                        Operands::Dense { panels, x } => {
                            dense(simd, panels, panel, &x[first * depth..][..rows * depth], sums, unpacked);
                        }
                        Operands::Compressed { panels, x } => {
                            panels.multiply(simd, panel, x, first..first + rows, sums, unpacked);
                        }
                        Operands::Bfloat16 { panels, x } => panels.multiply(panel, x, first..first + rows, sums),
                        Operands::Quantized { panels, x } => panels.multiply(panel, x, first..first + rows, sums),
                    }
                }
                self.finish(simd, first, rows, unit, sums, block * width);
            }
        }
    }
}

/// `sums = x * panel`: `sums` `[rows, width]`, `x` `[rows, depth]`.
#[inline(always)]
fn dense<S: Simd>(simd: S, panels: &Panels, index: usize, x: &[f32], sums: &mut [f32], buffer: &mut Vec<f32>) {
    let depth = panels.depth;
    let depth_block = depth_block(depth);
    // Each weight is used once or twice: converting it each time is less work than writing it somewhere.
    let few = sums.len() <= 2 * tile_rows::<S>() * panels.width;
    for k in (0..depth).step_by(depth_block) {
        match panels.block(index, k, depth_block.min(depth - k)) {
            Block::F32(weights) => accumulate(simd, x, depth, k, weights, sums),
            Block::Bf16(weights) if few => accumulate(simd, x, depth, k, weights, sums),
            Block::Bf16(weights) => accumulate(simd, x, depth, k, widen_bf16(weights, buffer), sums),
            Block::F16(weights) => accumulate(simd, x, depth, k, widen_f16(weights, buffer), sums),
        }
    }
}

/// Inputs that are multiplied before the next rows' turn: blocks of nearly equal depth, so that none is hardly worth its
/// overhead, and of whole groups of stored weights.
pub(super) fn depth_block(depth: usize) -> usize {
    depth.div_ceil(depth.div_ceil(DEPTH_BLOCK)).next_multiple_of(BLOCK)
}

/// `sums[row] (+)= x[row][k..] * weights`, from zero where `k` is 0: `sums` `[rows, width]`, `x` `[rows, depth]`.
#[inline(always)]
pub(super) fn accumulate<S: Simd, W: Column>(
    simd: S,
    x: &[f32],
    depth: usize,
    k: usize,
    weights: &[W],
    sums: &mut [f32],
) {
    let width = 2 * S::F32_LANES;
    let (rows, block) = (sums.len() / width, weights.len() / width);
    assert!(k + block <= depth && rows * depth <= x.len());
    let (sums, _) = S::as_mut_simd_f32s(sums);
    let (sums, _) = sums.as_chunks_mut::<2>();
    for_row_tiles!(tile_rows::<S>(), rows, |first, MR| {
        let mut acc = [[simd.splat_f32s(0.0); 2]; MR];
        if k > 0 {
            acc.copy_from_slice(&sums[first..first + MR]);
        }
        let a: [_; MR] = std::array::from_fn(|m| x[(first + m) * depth + k..].as_ptr());
        let columns = [weights.as_ptr(), weights.as_ptr().wrapping_add(S::F32_LANES)];
        // SAFETY: each row of `x` has `block` floats from `k` on, and `weights` is `[block, 2 vectors]`.
        unsafe { multiply(simd, block, &a, &columns, width, &mut acc) };
        sums[first..first + MR].copy_from_slice(&acc);
    });
}

impl Stripe<'_> {
    /// Fetches where a unit's part of the result goes. It lies in many short pieces, for which `finish` would wait.
    #[inline(always)]
    fn fetch(&self, rows: Range<usize>, unit: usize) {
        let column = unit * self.width;
        let columns = self.width.min(self.outputs - column);
        for row in rows {
            self.out.fetch(row * self.outputs + column, columns);
        }
    }

    /// Moves finished sums to their place in the result; `up_at` is where the second panel of a pair begins.
    #[inline(always)]
    fn finish<S: Simd>(&self, simd: S, first: usize, rows: usize, unit: usize, sums: &[f32], up_at: usize) {
        let Stripe { width, outputs, .. } = *self;
        let column = unit * width;
        let columns = width.min(outputs - column);
        for row in 0..rows {
            let sums_row = &sums[row * width..][..columns];
            // SAFETY: each task has its own units, so its own columns; one row of them at a time is borrowed here.
            let out = unsafe { self.out.part((first + row) * outputs + column, columns) };
            match self.epilogue {
                Epilogue::Write { bias: None } => match (S::as_mut_simd_f32s(out), S::as_simd_f32s(sums_row)) {
                    // Whole vectors, without a call.
                    ((out, []), (sums, [])) => {
                        for (to, sum) in out.iter_mut().zip(sums) {
                            *to = *sum;
                        }
                    }
                    _ => out.copy_from_slice(sums_row),
                },
                Epilogue::Write { bias: Some(bias) } => {
                    for ((to, sum), bias) in out.iter_mut().zip(sums_row).zip(&bias[column..][..columns]) {
                        *to = sum + bias;
                    }
                }
                Epilogue::Add => {
                    // By whole vectors: a panel's columns are too few for the loop that the compiler would make.
                    let ((out, last), (sums, last_sums)) = (S::as_mut_simd_f32s(out), S::as_simd_f32s(sums_row));
                    for (to, sum) in out.iter_mut().zip(sums) {
                        *to = simd.add_f32s(*to, *sum);
                    }
                    for (to, sum) in last.iter_mut().zip(last_sums) {
                        *to += sum;
                    }
                }
                Epilogue::SwiGlu => {
                    for ((to, &gate), up) in out
                        .iter_mut()
                        .zip(sums_row)
                        .zip(&sums[up_at + row * width..][..columns])
                    {
                        *to = math::silu(gate) * up;
                    }
                }
            }
        }
    }
}

#[cfg(test)]
#[path = "linear_tests.rs"]
mod tests;
