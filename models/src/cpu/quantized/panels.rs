//! Quantized weights laid out for the kernels: panels of 16 outputs, block by block.
//!
//! A kernel multiplies four neighbouring inputs at a time, of eight outputs or of all sixteen: 32 or 64 weights in a
//! vector, output by output. So both halves of the outputs lie side by side.

use std::ops::Range;

use candle_core::{Result, bail};
use half::f16;
use rayon::prelude::*;

use super::{Activations, BLOCK, TILE, WIDTH, portable};
#[cfg(target_arch = "x86_64")]
use super::{avx2, avx512};
use crate::cpu::panels::in_turn;
use crate::cpu::stored::{Format, StoredMatrix};

/// Outputs of half a panel: those of a vector of 32 bytes.
pub const LANES: usize = 8;
/// Inputs that are summed in a lane at once.
pub const STEP: usize = 4;

/// 32 inputs of 16 outputs, in halves of eight outputs. Vectors `i` have the weights of inputs `4 i` on in their low
/// nibbles, and of inputs `16 + 4 i` on in their high ones.
#[repr(align(64))]
#[derive(Clone, Copy)]
pub struct FourBits {
    pub nibbles: [[[u8; BLOCK]; 2]; 4],
    pub scales: [[f16; LANES]; 2],
    pub minima: [[f16; LANES]; 2],
}

/// 32 inputs of 16 outputs, in halves of eight outputs. Vectors `i` have the weights of inputs `4 i` on. Filled up to whole
/// cache lines a block would take 6 % more to read.
#[repr(align(32))]
#[derive(Clone, Copy)]
pub struct EightBits {
    pub values: [[[i8; BLOCK]; 2]; 8],
    pub scales: [[f16; LANES]; 2],
}

/// A block of either type.
pub trait Block: Copy + Send + Sync {
    const EMPTY: Self;

    /// Sets the weight of `input` for an output of one half, which was empty.
    fn set(&mut self, half: usize, output: usize, input: usize, value: i8);

    /// The weight of `input` for an output of one half.
    fn value(&self, half: usize, output: usize, input: usize) -> i8;

    fn set_scale(&mut self, half: usize, output: usize, scale: f16, minimum: f16);

    /// Scale and minimum of an output of one half.
    fn scale(&self, half: usize, output: usize) -> (f32, f32);
}

impl Block for FourBits {
    const EMPTY: Self = Self {
        nibbles: [[[0; BLOCK]; 2]; 4],
        scales: [[f16::ZERO; LANES]; 2],
        minima: [[f16::ZERO; LANES]; 2],
    };

    fn set(&mut self, half: usize, output: usize, input: usize, value: i8) {
        let byte = &mut self.nibbles[input % 16 / STEP][half][STEP * output + input % STEP];
        *byte |= (value as u8 & 15) << if input < 16 { 0 } else { 4 };
    }

    fn value(&self, half: usize, output: usize, input: usize) -> i8 {
        let byte = self.nibbles[input % 16 / STEP][half][STEP * output + input % STEP];
        (if input < 16 { byte & 15 } else { byte >> 4 }) as i8
    }

    fn set_scale(&mut self, half: usize, output: usize, scale: f16, minimum: f16) {
        (self.scales[half][output], self.minima[half][output]) = (scale, minimum);
    }

    fn scale(&self, half: usize, output: usize) -> (f32, f32) {
        (self.scales[half][output].to_f32(), self.minima[half][output].to_f32())
    }
}

impl Block for EightBits {
    const EMPTY: Self = Self {
        values: [[[0; BLOCK]; 2]; 8],
        scales: [[f16::ZERO; LANES]; 2],
    };

    fn set(&mut self, half: usize, output: usize, input: usize, value: i8) {
        self.values[input / STEP][half][STEP * output + input % STEP] = value;
    }

    fn value(&self, half: usize, output: usize, input: usize) -> i8 {
        self.values[input / STEP][half][STEP * output + input % STEP]
    }

    fn set_scale(&mut self, half: usize, output: usize, scale: f16, _minimum: f16) {
        self.scales[half][output] = scale;
    }

    fn scale(&self, half: usize, output: usize) -> (f32, f32) {
        (self.scales[half][output].to_f32(), 0.0)
    }
}

/// The panels of a matrix, block by block; `source` tells of each panel which matrix it is cut from, and the how-manieth
/// of that matrix it is.
fn build<'a, B: Block>(count: usize, source: impl Fn(usize) -> (&'a StoredMatrix, usize) + Sync) -> Vec<B> {
    let per_panel = source(0).0.depth / BLOCK;
    let indices = (0..count * per_panel).into_par_iter();
    let blocks = indices.map(|index| {
        let (matrix, nth) = source(index / per_panel);
        let mut block = B::EMPTY;
        let outputs = (nth * WIDTH..matrix.outputs()).take(WIDTH);
        for (column, output) in outputs.enumerate() {
            let (half, lane) = (column / LANES, column % LANES);
            let at = output * per_panel + index % per_panel;
            for (input, &value) in matrix.values[at * BLOCK..][..BLOCK].iter().enumerate() {
                block.set(half, lane, input, value);
            }
            block.set_scale(
                half,
                lane,
                f16::from_f32(matrix.scales[at]),
                f16::from_f32(matrix.minima[at]),
            );
        }
        block
    });
    blocks.collect()
}

/// What multiplies. All give the same sums.
#[derive(Debug, Clone, Copy)]
enum Kernel {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Portable,
}

impl Kernel {
    /// The fastest first.
    const ALL: &[Self] = &[
        #[cfg(target_arch = "x86_64")]
        Self::Avx512,
        #[cfg(target_arch = "x86_64")]
        Self::Avx2,
        Self::Portable,
    ];

    /// Whether this processor runs it.
    fn is_there(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => avx512::is_there(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => avx2::is_there(),
            Self::Portable => true,
        }
    }

    fn best() -> Self {
        let mut there = Self::ALL.iter().copied().filter(|kernel| kernel.is_there());
        there.next().unwrap_or(Self::Portable)
    }
}

enum Blocks {
    Four(Vec<FourBits>),
    Eight(Vec<EightBits>),
}

/// A packed matrix. The last panel is filled up with zeros.
pub struct QuantizedPanels {
    /// `[panels, depth / BLOCK]`
    blocks: Blocks,
    pub depth: usize,
    /// Outputs: columns over all panels, without the filling.
    pub outputs: usize,
}

impl QuantizedPanels {
    /// Packs a matrix that was rounded to what is multiplied, panel by panel.
    ///
    /// # Errors
    /// It was not.
    pub fn pack(matrix: &StoredMatrix) -> Result<Self> {
        Self::new(matrix, matrix.outputs().div_ceil(WIDTH), |panel| (matrix, panel))
    }

    /// Packs two matrices of equal shape, a panel of `first` and the same panel of `second` in turn.
    ///
    /// # Errors
    /// They are not alike, or were not rounded to what is multiplied.
    pub fn pack_pairs(first: &StoredMatrix, second: &StoredMatrix) -> Result<Self> {
        let shape = |matrix: &StoredMatrix| (matrix.format, matrix.depth, matrix.outputs());
        if shape(first) != shape(second) {
            bail!(
                "a pair of matrices {:?} and {:?} is not alike",
                shape(first),
                shape(second)
            )
        }
        let count = 2 * first.outputs().div_ceil(WIDTH);
        Self::new(first, count, in_turn(first, second))
    }

    fn new<'a>(
        matrix: &StoredMatrix,
        count: usize,
        source: impl Fn(usize) -> (&'a StoredMatrix, usize) + Sync,
    ) -> Result<Self> {
        let no_minima = || matrix.minima.iter().all(|&minimum| minimum == 0.0);
        Ok(Self {
            blocks: match matrix.format {
                Format::FourBy32 => Blocks::Four(build(count, source)),
                Format::EightBy32 if no_minima() => Blocks::Eight(build(count, source)),
                other => bail!("a matrix in {other:?} was not rounded to what is multiplied in whole numbers"),
            },
            depth: matrix.depth,
            outputs: matrix.outputs(),
        })
    }

    /// Bytes of the weights.
    pub fn bytes(&self) -> usize {
        match &self.blocks {
            Blocks::Four(blocks) => size_of_val(blocks.as_slice()),
            Blocks::Eight(blocks) => size_of_val(blocks.as_slice()),
        }
    }

    /// Panel `index` times some rows: `sums` becomes `[rows, WIDTH]`.
    pub fn multiply(&self, index: usize, x: &Activations, rows: Range<usize>, sums: &mut [f32]) {
        self.multiply_by(Kernel::best(), index, x, rows, sums);
    }

    /// As [`Self::multiply`], by a kernel that is there.
    fn multiply_by(&self, kernel: Kernel, index: usize, x: &Activations, rows: Range<usize>, sums: &mut [f32]) {
        assert!(kernel.is_there());
        let (sums, _) = sums.as_chunks_mut::<WIDTH>();
        assert_eq!(sums.len(), rows.len());
        sums.fill([0.0; WIDTH]);
        let per_panel = self.depth / BLOCK;
        let range = index * per_panel..(index + 1) * per_panel;
        for (x, sums) in x.tiles(rows).zip(sums.chunks_mut(TILE)) {
            let range = range.clone();
            match (kernel, &self.blocks) {
                (Kernel::Portable, Blocks::Four(blocks)) => portable::multiply(&blocks[range], x, sums),
                (Kernel::Portable, Blocks::Eight(blocks)) => portable::multiply(&blocks[range], x, sums),
                #[cfg(target_arch = "x86_64")]
                // SAFETY: the processor has what the function needs, by the assertion; so in the other cases.
                (Kernel::Avx512, Blocks::Four(blocks)) => unsafe { avx512::four_bits(&blocks[range], x, sums) },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: as above.
                (Kernel::Avx512, Blocks::Eight(blocks)) => unsafe { avx512::eight_bits(&blocks[range], x, sums) },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: as above.
                (Kernel::Avx2, Blocks::Four(blocks)) => unsafe { avx2::four_bits(&blocks[range], x, sums) },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: as above.
                (Kernel::Avx2, Blocks::Eight(blocks)) => unsafe { avx2::eight_bits(&blocks[range], x, sums) },
            }
        }
    }

    /// Writes the weights of output `index` to `row`, as an embedding lookup wants them.
    pub fn gather(&self, index: usize, row: &mut [f32]) {
        let first = index / WIDTH * (self.depth / BLOCK);
        match &self.blocks {
            Blocks::Four(blocks) => gather(&blocks[first..], index % WIDTH, row),
            Blocks::Eight(blocks) => gather(&blocks[first..], index % WIDTH, row),
        }
    }
}

fn gather<B: Block>(blocks: &[B], column: usize, row: &mut [f32]) {
    let (half, lane) = (column / LANES, column % LANES);
    for (block, row) in blocks.iter().zip(row.chunks_exact_mut(BLOCK)) {
        let (scale, minimum) = block.scale(half, lane);
        for (input, weight) in row.iter_mut().enumerate() {
            *weight = scale * f32::from(block.value(half, lane, input)) + minimum;
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::quantized::GgmlDType;

    use super::super::super::{numbers, quantized_numbers};
    use super::*;

    fn stored(outputs: usize, depth: usize, dtype: GgmlDType, seed: u32) -> (StoredMatrix, Vec<f32>) {
        let (stored, stands_for) = quantized_numbers(outputs, depth, dtype, seed);
        (super::super::read(&stored).unwrap(), stands_for)
    }

    #[test]
    fn every_output_is_found_again() {
        for outputs in [1, 15, 16, 17, 67] {
            for dtype in [GgmlDType::Q4_1, GgmlDType::Q5_0, GgmlDType::Q8_0] {
                let (matrix, weights) = stored(outputs, 96, dtype, 3);
                let panels = QuantizedPanels::pack(&matrix).unwrap();
                for (output, weights) in weights.chunks_exact(96).enumerate() {
                    let mut row = vec![0.0; 96];
                    panels.gather(output, &mut row);
                    assert_eq!(row, weights, "output {output} of {outputs} as {dtype:?}");
                }
            }
        }
    }

    /// Of Q4_K, factors are rounded.
    #[test]
    fn outputs_with_rounded_factors_are_nearly_found() {
        let (matrix, weights) = stored(5, 256, GgmlDType::Q4K, 3);
        let panels = QuantizedPanels::pack(&matrix).unwrap();
        let mut row = vec![0.0; 256];
        panels.gather(4, &mut row);
        let off = row
            .iter()
            .zip(&weights[4 * 256..])
            .map(|(found, exact)| (found - exact).abs());
        let most = off.fold(0.0, f32::max);
        assert!(0.0 < most && most < 1e-3, "{most}");
    }

    #[test]
    fn what_was_not_rounded_is_refused() {
        for dtype in [GgmlDType::Q5_1, GgmlDType::Q6K] {
            let matrix = StoredMatrix::read(&quantized_numbers(1, 256, dtype, 3).0).unwrap();
            assert!(QuantizedPanels::pack(&matrix).is_err(), "{dtype:?}");
            assert!(QuantizedPanels::pack_pairs(&matrix, &matrix).is_err(), "{dtype:?}");
        }
    }

    /// Each product is exactly what the definition gives with the rounded activations: whole numbers summed a block,
    /// then two fused multiply-adds.
    #[test]
    fn kernels_do_what_the_definition_says() {
        for (outputs, depth, count) in [
            (1, 32, 1),
            (16, 64, 2),
            (17, 96, 5),
            (18, 64, 6),
            (33, 64, 39),
            (40, 1024, 17),
        ] {
            for dtype in [GgmlDType::Q4_0, GgmlDType::Q4_1, GgmlDType::Q8_0] {
                let (matrix, _) = stored(outputs, depth, dtype, 4);
                let panels = QuantizedPanels::pack(&matrix).unwrap();
                let mut buffer = Vec::new();
                // What was rounded before leaves nothing behind.
                Activations::round(&vec![f32::NAN; count * depth], depth, &mut buffer);
                let x = Activations::round(&numbers(count * depth, 5), depth, &mut buffer);
                for panel in 0..outputs.div_ceil(WIDTH) {
                    for (kernel, sums) in by_all(&panels, panel, &x, count) {
                        for (at, &sum) in sums.iter().enumerate() {
                            let (row, output) = (at / WIDTH, panel * WIDTH + at % WIDTH);
                            let exact = if output < outputs {
                                defined(&matrix, &x, row, output)
                            } else {
                                0.0
                            };
                            assert_eq!(
                                sum, exact,
                                "{kernel:?}: row {row}, output {output} of {outputs} x {depth}, {dtype:?}"
                            );
                        }
                    }
                }
            }
        }
    }

    /// What each kernel that this processor runs gives.
    fn by_all(panels: &QuantizedPanels, index: usize, x: &Activations, count: usize) -> Vec<(Kernel, Vec<f32>)> {
        let there = Kernel::ALL.iter().filter(|kernel| kernel.is_there());
        let sums = there.map(|&kernel| {
            let mut sums = vec![f32::NAN; count * WIDTH];
            panels.multiply_by(kernel, index, x, 0..count, &mut sums);
            (kernel, sums)
        });
        sums.collect()
    }

    fn defined(matrix: &StoredMatrix, x: &Activations, row: usize, output: usize) -> f32 {
        let blocks = matrix.depth / BLOCK;
        (0..blocks).fold(0.0, |sum, block| {
            let (at, group) = (output * blocks + block, x.group(row, block));
            let values = matrix.values[at * BLOCK..][..BLOCK].iter().zip(&group.values);
            let whole: i32 = values.map(|(&w, &x)| i32::from(w) * i32::from(x)).sum();
            let sum = (whole as f32).mul_add(matrix.scales[at] * group.scale, sum);
            match matrix.format {
                Format::FourBy32 => matrix.minima[at].mul_add(group.sum, sum),
                _ => sum,
            }
        })
    }

    /// The largest numbers there are overflow nothing.
    #[test]
    fn extremes_are_summed_exactly() {
        for (format, weights) in [
            (Format::FourBy32, [15, 15]),
            (Format::FourBy32, [15, 0]),
            (Format::EightBy32, [127, 127]),
            (Format::EightBy32, [127, -128]),
            (Format::EightBy32, [-128, -128]),
        ] {
            let depth = 64;
            let matrix = StoredMatrix {
                format,
                depth,
                values: weights.iter().cycle().take(16 * depth).copied().collect(),
                scales: vec![1.0; 16 * 2],
                minima: vec![0.0; 16 * 2],
            };
            for signs in [[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]] {
                let x: Vec<f32> = signs.iter().cycle().take(3 * depth).copied().collect();
                let mut buffer = Vec::new();
                let x = Activations::round(&x, depth, &mut buffer);
                let panels = QuantizedPanels::pack(&matrix).unwrap();
                for (kernel, sums) in by_all(&panels, 0, &x, 3) {
                    for (at, &sum) in sums.iter().enumerate() {
                        let exact = defined(&matrix, &x, at / WIDTH, at % WIDTH);
                        assert_eq!(sum, exact, "{kernel:?}: {weights:?} {signs:?}");
                    }
                }
            }
        }
    }
}
