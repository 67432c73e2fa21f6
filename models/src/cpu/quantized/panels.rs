//! Quantized weights laid out for the kernels: panels of 16 outputs, block by block.
//!
//! A kernel multiplies four neighbouring inputs at a time, of eight outputs: 32 weights in a vector, output by output.

use std::ops::Range;

use candle_core::{Result, bail};
use half::f16;
use rayon::prelude::*;

use super::rows::Bits;
use super::{Activations, BLOCK, Rows, WIDTH, portable};

/// Outputs of a vector.
pub const LANES: usize = 8;
/// Inputs that are summed in a lane at once.
pub const STEP: usize = 4;

/// 32 inputs of 16 outputs, in halves of eight outputs. Vector `i` has the weights of inputs `4 i` on in its low nibbles,
/// and of inputs `16 + 4 i` on in its high ones.
#[repr(C, align(32))]
#[derive(Clone, Copy)]
pub struct FourBits {
    pub nibbles: [[[u8; BLOCK]; 4]; 2],
    pub scales: [[f16; LANES]; 2],
    pub minima: [[f16; LANES]; 2],
}

/// 32 inputs of 16 outputs, in halves of eight outputs. Vector `i` has the weights of inputs `4 i` on.
#[repr(C, align(32))]
#[derive(Clone, Copy)]
pub struct EightBits {
    pub values: [[[i8; BLOCK]; 8]; 2],
    pub scales: [[f16; LANES]; 2],
}

impl FourBits {
    fn empty() -> Self {
        Self {
            nibbles: [[[0; BLOCK]; 4]; 2],
            scales: [[f16::ZERO; LANES]; 2],
            minima: [[f16::ZERO; LANES]; 2],
        }
    }

    /// The weight of `input` for an output of one half.
    pub fn value(&self, half: usize, output: usize, input: usize) -> i32 {
        let byte = self.nibbles[half][input % 16 / STEP][STEP * output + input % STEP];
        i32::from(if input < 16 { byte & 15 } else { byte >> 4 })
    }

    fn set(&mut self, column: usize, rows: &Rows, output: usize, block: usize) {
        let (half, lane) = (column / LANES, column % LANES);
        let at = output * (rows.depth / BLOCK) + block;
        for (input, &value) in rows.values[at * BLOCK..][..BLOCK].iter().enumerate() {
            let byte = &mut self.nibbles[half][input % 16 / STEP][STEP * lane + input % STEP];
            *byte |= (value as u8 & 15) << if input < 16 { 0 } else { 4 };
        }
        (self.scales[half][lane], self.minima[half][lane]) = (rows.scales[at], rows.minima[at]);
    }
}

impl EightBits {
    fn empty() -> Self {
        Self {
            values: [[[0; BLOCK]; 8]; 2],
            scales: [[f16::ZERO; LANES]; 2],
        }
    }

    /// The weight of `input` for an output of one half.
    pub fn value(&self, half: usize, output: usize, input: usize) -> i32 {
        i32::from(self.values[half][input / STEP][STEP * output + input % STEP])
    }

    fn set(&mut self, column: usize, rows: &Rows, output: usize, block: usize) {
        let (half, lane) = (column / LANES, column % LANES);
        let at = output * (rows.depth / BLOCK) + block;
        for (input, &value) in rows.values[at * BLOCK..][..BLOCK].iter().enumerate() {
            self.values[half][input / STEP][STEP * lane + input % STEP] = value;
        }
        self.scales[half][lane] = rows.scales[at];
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
    pub fn pack(rows: &Rows) -> Self {
        let outputs = rows.values.len() / rows.depth;
        Self::build(outputs.div_ceil(WIDTH), outputs, rows.depth, rows.bits, |panel| {
            (rows, panel)
        })
    }

    /// Packs two matrices of equal shape, a panel of `first` and the same panel of `second` in turn.
    ///
    /// # Errors
    /// They are not alike.
    pub fn pack_pairs(first: &Rows, second: &Rows) -> Result<Self> {
        let shape = |rows: &Rows| (rows.bits, rows.depth, rows.values.len());
        if shape(first) != shape(second) {
            bail!(
                "a pair of matrices {:?} and {:?} is not alike",
                shape(first),
                shape(second)
            )
        }
        let outputs = first.values.len() / first.depth;
        let count = 2 * outputs.div_ceil(WIDTH);
        Ok(Self::build(count, outputs, first.depth, first.bits, |panel| {
            (if panel % 2 == 0 { first } else { second }, panel / 2)
        }))
    }

    /// `source` tells of each panel which matrix it is cut from, and the how-manieth of that matrix it is.
    fn build<'a>(
        count: usize,
        outputs: usize,
        depth: usize,
        bits: Bits,
        source: impl Fn(usize) -> (&'a Rows, usize) + Sync,
    ) -> Self {
        let per_panel = depth / BLOCK;
        let fill = |set: &mut dyn FnMut(usize, &Rows, usize, usize), index: usize| {
            let (rows, nth) = source(index / per_panel);
            for column in (0..WIDTH).take_while(|column| nth * WIDTH + column < outputs) {
                set(column, rows, nth * WIDTH + column, index % per_panel);
            }
        };
        let indices = (0..count * per_panel).into_par_iter();
        let blocks = match bits {
            Bits::Four => Blocks::Four(
                indices
                    .map(|index| {
                        let mut block = FourBits::empty();
                        fill(
                            &mut |column, rows, output, at| block.set(column, rows, output, at),
                            index,
                        );
                        block
                    })
                    .collect(),
            ),
            Bits::Eight => Blocks::Eight(
                indices
                    .map(|index| {
                        let mut block = EightBits::empty();
                        fill(
                            &mut |column, rows, output, at| block.set(column, rows, output, at),
                            index,
                        );
                        block
                    })
                    .collect(),
            ),
        };
        Self { blocks, depth, outputs }
    }

    /// Panel `index` times some rows: `sums` becomes `[rows, WIDTH]`.
    pub fn multiply(&self, index: usize, x: &Activations, rows: Range<usize>, sums: &mut [f32]) {
        let (sums, _) = sums.as_chunks_mut::<WIDTH>();
        sums.fill([0.0; WIDTH]);
        let per_panel = self.depth / BLOCK;
        let range = index * per_panel..(index + 1) * per_panel;
        #[cfg(target_arch = "x86_64")]
        if super::avx2::is_there() {
            match &self.blocks {
                // SAFETY: the processor has what the function needs.
                Blocks::Four(blocks) => unsafe { super::avx2::four_bits(&blocks[range], x, rows, sums) },
                // SAFETY: as above.
                Blocks::Eight(blocks) => unsafe { super::avx2::eight_bits(&blocks[range], x, rows, sums) },
            }
            return;
        }
        match &self.blocks {
            Blocks::Four(blocks) => portable::four_bits(&blocks[range], x, rows, sums),
            Blocks::Eight(blocks) => portable::eight_bits(&blocks[range], x, rows, sums),
        }
    }

    /// Writes the weights of output `index` to `row`, as an embedding lookup wants them.
    pub fn gather(&self, index: usize, row: &mut [f32]) {
        let (panel, half, lane) = (index / WIDTH, index % WIDTH / LANES, index % LANES);
        for (block, row) in row.chunks_exact_mut(BLOCK).enumerate() {
            let at = panel * (self.depth / BLOCK) + block;
            for (input, weight) in row.iter_mut().enumerate() {
                *weight = match &self.blocks {
                    Blocks::Four(blocks) => {
                        let (scale, minimum) = (blocks[at].scales[half][lane], blocks[at].minima[half][lane]);
                        scale.to_f32() * blocks[at].value(half, lane, input) as f32 + minimum.to_f32()
                    }
                    Blocks::Eight(blocks) => {
                        blocks[at].scales[half][lane].to_f32() * blocks[at].value(half, lane, input) as f32
                    }
                };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::quantized::{GgmlDType, QTensor};
    use candle_core::{Device, Tensor};

    use super::super::super::numbers;
    use super::*;

    fn stored(outputs: usize, depth: usize, dtype: GgmlDType, seed: u32) -> (Rows, Vec<f32>) {
        let weights = Tensor::from_vec(numbers(outputs * depth, seed), (outputs, depth), &Device::Cpu).unwrap();
        let stored = QTensor::quantize(&weights, dtype).unwrap();
        let stands_for = stored.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap();
        (Rows::read(&stored).unwrap(), stands_for.to_vec1().unwrap())
    }

    #[test]
    fn every_output_is_found_again() {
        for outputs in [1, 15, 16, 17, 67] {
            for dtype in [GgmlDType::Q4_1, GgmlDType::Q8_0] {
                let (rows, weights) = stored(outputs, 96, dtype, 3);
                let panels = QuantizedPanels::pack(&rows);
                for (output, weights) in weights.chunks_exact(96).enumerate() {
                    let mut row = vec![0.0; 96];
                    panels.gather(output, &mut row);
                    assert_eq!(row, weights, "output {output} of {outputs} as {dtype:?}");
                }
            }
        }
    }

    /// Each product is exactly what the definition gives with the rounded activations: whole numbers summed a block,
    /// then two fused multiply-adds.
    #[test]
    fn kernels_do_what_the_definition_says() {
        for (outputs, depth, count) in [(1, 32, 1), (16, 64, 2), (17, 96, 5), (40, 1024, 17)] {
            for dtype in [GgmlDType::Q4_0, GgmlDType::Q4_1, GgmlDType::Q8_0] {
                let (rows, _) = stored(outputs, depth, dtype, 4);
                let panels = QuantizedPanels::pack(&rows);
                let x = Activations::round(&numbers(count * depth, 5), depth);
                for panel in 0..outputs.div_ceil(WIDTH) {
                    let mut sums = vec![f32::NAN; count * WIDTH];
                    panels.multiply(panel, &x, 0..count, &mut sums);
                    for (row, sums) in sums.chunks_exact(WIDTH).enumerate() {
                        for (column, &sum) in sums.iter().enumerate() {
                            let output = panel * WIDTH + column;
                            let exact = if output < outputs {
                                defined(&rows, &x, row, output)
                            } else {
                                0.0
                            };
                            assert_eq!(
                                sum, exact,
                                "row {row}, output {output} of {outputs} x {depth}, {dtype:?}"
                            );
                        }
                    }
                }
            }
        }
    }

    fn defined(rows: &Rows, x: &Activations, row: usize, output: usize) -> f32 {
        let blocks = rows.depth / BLOCK;
        (0..blocks).fold(0.0, |sum, block| {
            let (at, group) = (output * blocks + block, x.block(block, row..row + 1)[0]);
            let values = rows.values[at * BLOCK..][..BLOCK].iter().zip(&group.values);
            let whole: i32 = values.map(|(&w, &x)| i32::from(w) * i32::from(x)).sum();
            let sum = (whole as f32).mul_add(rows.scales[at].to_f32() * group.scale, sum);
            match rows.bits {
                Bits::Four => rows.minima[at].to_f32().mul_add(group.sum, sum),
                Bits::Eight => sum,
            }
        })
    }

    /// The largest numbers there are overflow nothing.
    #[test]
    fn extremes_are_summed_exactly() {
        for (bits, weights) in [
            (Bits::Four, [15, 0]),
            (Bits::Eight, [127, -128]),
            (Bits::Eight, [-127, -127]),
        ] {
            let depth = 64;
            let rows = Rows {
                bits,
                depth,
                values: weights.iter().cycle().take(16 * depth).copied().collect(),
                scales: vec![f16::ONE; 16 * 2],
                minima: vec![f16::ZERO; 16 * 2],
            };
            for signs in [[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]] {
                let x: Vec<f32> = signs.iter().cycle().take(3 * depth).copied().collect();
                let x = Activations::round(&x, depth);
                let (mut sums, mut plain) = (vec![0.0; 3 * WIDTH], vec![[0.0; WIDTH]; 3]);
                let panels = QuantizedPanels::pack(&rows);
                panels.multiply(0, &x, 0..3, &mut sums);
                match &panels.blocks {
                    Blocks::Four(blocks) => portable::four_bits(blocks, &x, 0..3, &mut plain),
                    Blocks::Eight(blocks) => portable::eight_bits(blocks, &x, 0..3, &mut plain),
                }
                assert_eq!(sums, plain.as_flattened());
                assert_eq!(sums[5], defined(&rows, &x, 0, 5), "{weights:?} {signs:?}");
            }
        }
    }
}
