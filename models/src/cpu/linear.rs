//! Projections by packed weights: `x W^T`, with what follows it done while the result is in the cache.

use std::ops::Range;

use candle_core::{CpuStorage, CustomOp1, DType, InplaceOp2, Layout, Result, Shape, Tensor, bail};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::bfloat16::{self, Bfloat16Panels};
use super::panels::{Aligned, Block, Panels, stored_as};
use super::quantized::{self, QuantizedPanels, Rows};
use super::tile::{Column, for_row_tiles, multiply, tile_rows};
use super::{Stripes, math, slice, slice_mut};

/// Most inputs that are multiplied before the next rows' turn, so that a block of a panel stays in the first-level cache.
const DEPTH_BLOCK: usize = 384;
/// Activations, in floats, that a thread works on at a time: a quarter of a usual second-level cache.
const ROW_BLOCK: usize = 32 * 1024;

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
            Self::Bfloat16(panels) => panels.depth,
            Self::Quantized(panels) => panels.depth,
        }
    }

    fn outputs(&self) -> usize {
        match self {
            Self::Dense(panels) => panels.outputs,
            Self::Bfloat16(panels) => panels.outputs,
            Self::Quantized(panels) => panels.outputs,
        }
    }

    /// Columns of a panel.
    fn width(&self) -> usize {
        match self {
            Self::Dense(panels) => panels.width,
            Self::Bfloat16(_) => bfloat16::WIDTH,
            Self::Quantized(_) => quantized::WIDTH,
        }
    }

    /// Bytes that a product reads.
    fn bytes(&self) -> usize {
        match self {
            Self::Dense(panels) => panels.bytes(),
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

    /// Packs a weight that stays quantized; activations are rounded to eight bits for it.
    pub fn quantized(weight: &Rows, bias: Option<Vec<f32>>) -> Self {
        Self {
            matrix: Matrix::Quantized(QuantizedPanels::pack(weight)),
            bias,
        }
    }

    /// Bytes of the weight.
    pub fn bytes(&self) -> usize {
        self.matrix.bytes()
    }

    /// `x W^T + bias`: `[rows, in]` to `[rows, out]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        x.apply_op1_no_bwd(self)
    }

    /// `x += a W^T`: the projection of `a` (`[rows, in]`) added to `x` (`[rows, out]`) in place.
    pub fn add_to(&self, x: &Tensor, a: &Tensor) -> Result<()> {
        x.inplace_op2(a, self)
    }

    /// The weights of some outputs, one row each, `[indices, in]`: an embedding lookup in a tied output projection.
    pub fn gather(&self, indices: &[u32], device: &candle_core::Device) -> Result<Tensor> {
        let depth = self.matrix.depth();
        let mut rows = vec![0.0; indices.len() * depth];
        for (row, &index) in rows.chunks_exact_mut(depth).zip(indices) {
            match &self.matrix {
                Matrix::Dense(panels) => panels.gather(index as usize, row),
                Matrix::Bfloat16(panels) => panels.gather(index as usize, row),
                Matrix::Quantized(panels) => panels.gather(index as usize, row),
            }
        }
        Tensor::from_vec(rows, (indices.len(), depth), device)
    }
}

impl CustomOp1 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        product(
            &self.matrix,
            storage,
            layout,
            Epilogue::Write {
                bias: self.bias.as_deref(),
            },
        )
    }
}

impl InplaceOp2 for Linear {
    fn name(&self) -> &'static str {
        "linear-add"
    }

    fn cpu_fwd(&self, x: &mut CpuStorage, x_layout: &Layout, a: &CpuStorage, a_layout: &Layout) -> Result<()> {
        let a = slice(a, a_layout)?;
        run(&self.matrix, a, slice_mut(x, x_layout)?, Epilogue::Add)
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

    /// Packs weights that stay quantized, both in as many bits.
    pub fn quantized(gate: &Rows, up: &Rows) -> Result<Self> {
        Ok(Self {
            matrix: Matrix::Quantized(QuantizedPanels::pack_pairs(gate, up)?),
        })
    }

    /// Bytes of the weights.
    pub fn bytes(&self) -> usize {
        self.matrix.bytes()
    }

    /// `[rows, in]` to `[rows, out]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        x.apply_op1_no_bwd(self)
    }
}

impl CustomOp1 for GateUp {
    fn name(&self) -> &'static str {
        "gate-up"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        product(&self.matrix, storage, layout, Epilogue::SwiGlu)
    }
}

fn product(matrix: &Matrix, storage: &CpuStorage, layout: &Layout, epilogue: Epilogue) -> Result<(CpuStorage, Shape)> {
    let x = slice(storage, layout)?;
    let (rows, outputs) = (x.len() / matrix.depth(), matrix.outputs());
    let mut out = vec![0.0; rows * outputs];
    run(matrix, x, &mut out, epilogue)?;
    Ok((CpuStorage::F32(out), Shape::from((rows, outputs))))
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
    let operands = match matrix {
        Matrix::Dense(panels) => Operands::Dense { panels, x },
        Matrix::Bfloat16(panels) => Operands::Bfloat16 {
            panels,
            x: bfloat16::Activations::round(x, depth),
        },
        Matrix::Quantized(panels) => Operands::Quantized {
            panels,
            x: quantized::Activations::round(x, depth),
        },
    };
    (0..tasks).into_par_iter().for_each(|task| {
        let units = task * units / tasks..(task + 1) * units / tasks;
        Arch::new().dispatch(Stripe {
            operands: &operands,
            depth,
            outputs,
            width,
            rows,
            units,
            epilogue,
            out,
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
    Bfloat16 {
        panels: &'a Bfloat16Panels,
        x: bfloat16::Activations,
    },
    Quantized {
        panels: &'a QuantizedPanels,
        x: quantized::Activations,
    },
}

/// One task: all rows of some columns of the product.
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

impl WithSimd for Stripe<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Stripe { depth, width, .. } = self;
        let per_unit = if matches!(self.epilogue, Epilogue::SwiGlu) {
            2
        } else {
            1
        };
        let activations = match self.operands {
            Operands::Dense { .. } => ROW_BLOCK,
            // Activations are half as large, and a quarter.
            Operands::Bfloat16 { .. } => 2 * ROW_BLOCK,
            Operands::Quantized { .. } => 4 * ROW_BLOCK,
        };
        let block = (activations / depth).clamp(24, 96).min(self.rows);
        // Vectors of sums that lie across two cache lines take longer.
        let mut sums = Aligned::zeros(per_unit * block * width);
        let sums = sums.get_mut();
        let mut buffer = Vec::new();
        for first in (0..self.rows).step_by(block) {
            let rows = block.min(self.rows - first);
            for unit in self.units.clone() {
                for (index, sums) in sums.chunks_exact_mut(block * width).enumerate() {
                    let (panel, sums) = (unit * per_unit + index, &mut sums[..rows * width]);
                    match self.operands {
                        Operands::Dense { panels, x } => {
                            dense(
                                simd,
                                panels,
                                panel,
                                &x[first * depth..][..rows * depth],
                                sums,
                                &mut buffer,
                            );
                        }
                        Operands::Bfloat16 { panels, x } => panels.multiply(panel, x, first..first + rows, sums),
                        Operands::Quantized { panels, x } => panels.multiply(panel, x, first..first + rows, sums),
                    }
                }
                self.finish::<S>(first, rows, unit, sums, block * width);
            }
        }
    }
}

/// `sums = x * panel`: `sums` `[rows, width]`, `x` `[rows, depth]`.
#[inline(always)]
fn dense<S: Simd>(simd: S, panels: &Panels, index: usize, x: &[f32], sums: &mut [f32], buffer: &mut Vec<f32>) {
    let depth = panels.depth;
    // Blocks of nearly equal depth, so that none is hardly worth its overhead.
    let depth_block = depth.div_ceil(depth.div_ceil(DEPTH_BLOCK));
    let few = sums.len() <= 2 * tile_rows::<S>() * panels.width;
    for k in (0..depth).step_by(depth_block) {
        match panels.block(index, k, depth_block.min(depth - k)) {
            // Each weight is used once or twice: converting it each time is less work than writing it somewhere.
            Block::Bf16(weights) if few => accumulate(simd, x, depth, k, weights, sums),
            block => accumulate(simd, x, depth, k, block.widened(buffer), sums),
        }
    }
}

/// `sums[row] (+)= x[row][k..] * weights`, from zero where `k` is 0: `sums` `[rows, width]`, `x` `[rows, depth]`.
#[inline(always)]
fn accumulate<S: Simd, W: Column>(simd: S, x: &[f32], depth: usize, k: usize, weights: &[W], sums: &mut [f32]) {
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
        // SAFETY: each row of `x` has `block` floats from `k` on, and `weights` is `[block, 2 vectors]`.
        unsafe { multiply(simd, block, &a, weights.as_ptr(), width, &mut acc) };
        sums[first..first + MR].copy_from_slice(&acc);
    });
}

impl Stripe<'_> {
    /// Moves finished sums to their place in the result; `up_at` is where the second panel of a pair begins.
    #[inline(always)]
    fn finish<S: Simd>(&self, first: usize, rows: usize, unit: usize, sums: &[f32], up_at: usize) {
        let Stripe { width, outputs, .. } = *self;
        let column = unit * width;
        let columns = width.min(outputs - column);
        for row in 0..rows {
            let sums_row = &sums[row * width..][..columns];
            // SAFETY: each task has its own units, so its own columns; one row of them at a time is borrowed here.
            let out = unsafe { self.out.part((first + row) * outputs + column, columns) };
            match self.epilogue {
                Epilogue::Write { bias: None } => match (S::as_mut_simd_f32s(out), S::as_simd_f32s(sums_row)) {
                    // A whole panel, without a call.
                    (([to, next], []), ([sum, after], [])) => (*to, *next) = (*sum, *after),
                    _ => out.copy_from_slice(sums_row),
                },
                Epilogue::Write { bias: Some(bias) } => {
                    for ((to, sum), bias) in out.iter_mut().zip(sums_row).zip(&bias[column..][..columns]) {
                        *to = sum + bias;
                    }
                }
                Epilogue::Add => {
                    for (to, sum) in out.iter_mut().zip(sums_row) {
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
mod tests {
    use candle_core::Device;
    use candle_core::quantized::{GgmlDType, QTensor};

    use super::super::numbers;
    use super::*;

    fn dot(a: &[f32], b: &[f32]) -> f64 {
        a.iter().zip(b).map(|(&a, &b)| a as f64 * b as f64).sum()
    }

    fn near(found: f32, exact: f64, depth: usize) {
        assert!(
            (found as f64 - exact).abs() < 1e-6 * depth as f64,
            "{found} is not {exact}"
        );
    }

    #[test]
    fn products_of_odd_sizes_are_exact_to_rounding() {
        for (rows, inputs, outputs) in [
            (1, 1, 1),
            (2, 15, 16),
            (3, 16, 15),
            (5, 17, 31),
            (7, 257, 17),
            (13, 511, 67),
            (25, 600, 33),
            (97, 31, 101),
        ] {
            let (x, weight) = (numbers(rows * inputs, 1), numbers(outputs * inputs, 2));
            let (up, bias) = (numbers(outputs * inputs, 3), numbers(outputs, 4));
            let input = Tensor::from_vec(x.clone(), (rows, inputs), &Device::Cpu).unwrap();
            let linear = Linear::new(&weight, inputs, Some(bias.clone()), DType::F32).unwrap();
            let product: Vec<Vec<f32>> = linear.forward(&input).unwrap().to_vec2().unwrap();
            let sum = Tensor::ones((rows, outputs), DType::F32, &Device::Cpu).unwrap();
            linear.add_to(&sum, &input).unwrap();
            let sum: Vec<Vec<f32>> = sum.to_vec2().unwrap();
            let gate_up = GateUp::new(&weight, &up, inputs, DType::F32).unwrap();
            let gated: Vec<Vec<f32>> = gate_up.forward(&input).unwrap().to_vec2().unwrap();
            for row in 0..rows {
                let x = &x[row * inputs..][..inputs];
                for output in 0..outputs {
                    let exact = dot(x, &weight[output * inputs..][..inputs]);
                    near(product[row][output], exact + bias[output] as f64, inputs + 10);
                    near(sum[row][output], exact + 1.0, inputs + 10);
                    let silu = exact / (1.0 + (-exact).exp());
                    let up = dot(x, &up[output * inputs..][..inputs]);
                    near(gated[row][output], silu * up, 20 * (inputs + 10));
                }
            }
        }
    }

    #[test]
    fn quantized_products_of_odd_sizes_are_near() {
        for (rows, inputs, outputs, dtype) in [
            (1, 32, 1, GgmlDType::Q4_1),
            (3, 64, 9, GgmlDType::Q8_0),
            (5, 96, 17, GgmlDType::Q4_0),
            (97, 576, 67, GgmlDType::Q4_1),
            (25, 1024, 43, GgmlDType::Q8_0),
        ] {
            let stored = |seed| {
                let weights = Tensor::from_vec(numbers(outputs * inputs, seed), (outputs, inputs), &Device::Cpu);
                let stored = QTensor::quantize(&weights.unwrap(), dtype).unwrap();
                let weights: Vec<f32> = stored
                    .dequantize(&Device::Cpu)
                    .unwrap()
                    .flatten_all()
                    .unwrap()
                    .to_vec1()
                    .unwrap();
                (Rows::read(&stored).unwrap(), weights)
            };
            let ((weight, exact), (up, exact_up)) = (stored(21), stored(22));
            let (x, bias) = (numbers(rows * inputs, 23), numbers(outputs, 24));
            // Of activations to one, rounded to 1 / 127, each is off by half of that at most, one way or the other.
            let within = 6.0 / 254.0 * (inputs as f64 / 9.0).sqrt();
            Near {
                x,
                exact,
                exact_up,
                bias: bias.clone(),
                inputs,
                within,
            }
            .check(
                Linear::quantized(&weight, None),
                Linear::quantized(&weight, Some(bias)),
                GateUp::quantized(&weight, &up).unwrap(),
            );
        }
    }

    /// Whether this processor would choose them or not.
    #[test]
    fn bfloat16_products_of_odd_sizes_are_near() {
        for (rows, inputs, outputs) in [(1, 1, 1), (3, 15, 47), (5, 64, 48), (9, 257, 49), (97, 300, 101)] {
            let (weight, up) = (numbers(outputs * inputs, 25), numbers(outputs * inputs, 26));
            let (x, bias) = (numbers(rows * inputs, 27), numbers(outputs, 28));
            let linear = |bias| Linear {
                matrix: Matrix::Bfloat16(Bfloat16Panels::pack(&weight, inputs)),
                bias,
            };
            let gate_up = GateUp {
                matrix: Matrix::Bfloat16(Bfloat16Panels::pack_pairs(&weight, &up, inputs)),
            };
            // Each of two factors to one is off by 1 / 512 at most, one way or the other.
            let within = 6.0 * 2.0 / 512.0 * (inputs as f64 / 9.0).sqrt();
            let (linear, biased) = (linear(None), linear(Some(bias.clone())));
            Near {
                x,
                exact: weight.clone(),
                exact_up: up.clone(),
                bias,
                inputs,
                within,
            }
            .check(linear, biased, gate_up);
        }
    }

    /// What products are near to, and how near.
    struct Near {
        /// `[rows, inputs]`
        x: Vec<f32>,
        /// `[outputs, inputs]`
        exact: Vec<f32>,
        exact_up: Vec<f32>,
        /// `[outputs]`
        bias: Vec<f32>,
        inputs: usize,
        within: f64,
    }

    impl Near {
        fn check(self, linear: Linear, biased: Linear, gate_up: GateUp) {
            let Self { inputs, within, .. } = self;
            let (rows, outputs) = (self.x.len() / inputs, self.bias.len());
            let input = Tensor::from_vec(self.x.clone(), (rows, inputs), &Device::Cpu).unwrap();
            let product: Vec<Vec<f32>> = linear.forward(&input).unwrap().to_vec2().unwrap();
            let sum = Tensor::ones((rows, outputs), DType::F32, &Device::Cpu).unwrap();
            linear.add_to(&sum, &input).unwrap();
            let sum: Vec<Vec<f32>> = sum.to_vec2().unwrap();
            let biased: Vec<Vec<f32>> = biased.forward(&input).unwrap().to_vec2().unwrap();
            let gated: Vec<Vec<f32>> = gate_up.forward(&input).unwrap().to_vec2().unwrap();
            for row in 0..rows {
                let x = &self.x[row * inputs..][..inputs];
                for output in 0..outputs {
                    let exact = dot(x, &self.exact[output * inputs..][..inputs]);
                    let up = dot(x, &self.exact_up[output * inputs..][..inputs]);
                    let silu = exact / (1.0 + (-exact).exp());
                    for (found, exact, within) in [
                        (product[row][output], exact, within),
                        (sum[row][output], exact + 1.0, within),
                        (biased[row][output], exact + self.bias[output] as f64, within),
                        (
                            gated[row][output],
                            silu * up,
                            within * (exact.abs() + up.abs() + 1.0) * 1.1,
                        ),
                    ] {
                        let off = (found as f64 - exact).abs();
                        assert!(
                            off <= within,
                            "row {row}, output {output} of {outputs}: {found} is not {exact}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn a_row_is_the_same_in_any_batch() {
        let (inputs, outputs) = (300, 83);
        let weight = numbers(outputs * inputs, 5);
        let x = Tensor::from_vec(numbers(128 * inputs, 6), (128, inputs), &Device::Cpu).unwrap();
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let linear = Linear::new(&weight, inputs, None, dtype).unwrap();
            let all: Vec<Vec<f32>> = linear.forward(&x).unwrap().to_vec2().unwrap();
            for batch in 1..=128 {
                let first = 128 - batch;
                let some = linear.forward(&x.narrow(0, first, batch).unwrap()).unwrap();
                assert!(
                    some.to_vec2::<f32>().unwrap() == all[first..],
                    "batch of {batch} as {dtype:?}"
                );
            }
        }
    }

    /// What a file stores in bfloat16 takes no more memory in float32, and multiplies as if it did.
    #[test]
    fn weights_that_are_bfloat16_stay_so_and_give_float32s_products() {
        let (inputs, outputs) = (300, 83);
        let narrow = |seed| -> Vec<f32> {
            let numbers = numbers(outputs * inputs, seed).into_iter();
            numbers.map(|number| half::bf16::from_f32(number).to_f32()).collect()
        };
        let (weight, up) = (narrow(8), narrow(9));
        let linear = Linear::new(&weight, inputs, None, DType::F32).unwrap();
        let gate_up = GateUp::new(&weight, &up, inputs, DType::F32).unwrap();
        let wide = |panels: Result<Panels>| Matrix::Dense(panels.unwrap());
        let wide_linear = Linear {
            matrix: wide(Panels::pack(&weight, inputs, DType::F32)),
            bias: None,
        };
        let wide_gate_up = GateUp {
            matrix: wide(Panels::pack_pairs(&weight, &up, inputs, DType::F32)),
        };
        assert_eq!(
            (2 * linear.bytes(), 2 * gate_up.bytes()),
            (wide_linear.bytes(), wide_gate_up.bytes())
        );
        for rows in [1, 11, 40] {
            let x = Tensor::from_vec(numbers(rows * inputs, 10), (rows, inputs), &Device::Cpu).unwrap();
            let vec = |product: Result<Tensor>| product.unwrap().to_vec2::<f32>().unwrap();
            assert!(vec(linear.forward(&x)) == vec(wide_linear.forward(&x)), "{rows} rows");
            assert!(vec(gate_up.forward(&x)) == vec(wide_gate_up.forward(&x)), "{rows} rows");
        }
        let mut one_wide = weight;
        one_wide[17] = 0.3;
        assert_eq!(
            Linear::new(&one_wide, inputs, None, DType::F32).unwrap().bytes(),
            wide_linear.bytes()
        );
    }

    #[test]
    fn lookup_finds_the_rows_that_were_packed() {
        let weight = numbers(40 * 7, 7);
        let linear = Linear::new(&weight, 7, None, DType::F32).unwrap();
        let rows: Vec<Vec<f32>> = linear.gather(&[39, 0, 17], &Device::Cpu).unwrap().to_vec2().unwrap();
        assert_eq!(rows, [&weight[39 * 7..], &weight[..7], &weight[17 * 7..18 * 7]]);
    }
}
