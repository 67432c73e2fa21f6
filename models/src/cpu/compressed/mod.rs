//! Weights that stay in four or eight bits and are multiplied as exactly the numbers that they stand for, with float32's
//! accuracy: in whole numbers where the processor has the instruction, else in float32.
//!
//! A panel's inputs are cut into blocks of those that share a scale. A block has words of each column, with the values of
//! four or eight inputs in each, and then each column's scale and each column's minimum. So the weights of an input are
//! unpacked by the same operations in all lanes. Of four inputs, the first is in the lowest byte; of eight, the first four
//! are in the low nibbles of the bytes.

#[cfg(target_arch = "x86_64")]
mod digit_kernel;
#[cfg(target_arch = "x86_64")]
mod digits;
mod float;
#[cfg(target_arch = "x86_64")]
mod pairs;

use std::ops::Range;

#[cfg(target_arch = "x86_64")]
use digits::Digits;
use pulp::Simd;
use rayon::prelude::*;

use super::panels::{Aligned, in_turn, panel_width};
use super::stored::{Format, StoredMatrix};

/// Rows that are multiplied at a time begin at multiples of this.
pub const TILE: usize = 16;
/// How many blocks before its turn a block is fetched, whatever panel it belongs to.
const AHEAD: usize = 6;
/// Numbers of a column after the words: scale and minimum.
const FACTORS: usize = 2;

/// A matrix in panels, the last of which is filled up with zeros.
pub struct CompressedPanels {
    /// `[panels, depth / group, words and factors, width]`
    words: Aligned<u32>,
    format: Format,
    /// Inputs.
    pub depth: usize,
    /// Outputs: columns over all panels, without the filling.
    pub outputs: usize,
    /// Columns of a panel.
    pub width: usize,
    /// See [`Self::go_by_digits`].
    #[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "only x86 has a kernel"))]
    by_digits: bool,
}

/// Activations as the products take them: `[rows, depth]`.
pub enum Activations<'a> {
    Float(&'a [f32]),
    #[cfg(target_arch = "x86_64")]
    Digits(Digits<'a>),
}

/// Memory for activations in digits.
#[derive(Default)]
pub struct Memory {
    #[cfg(target_arch = "x86_64")]
    by_32: Vec<digits::Tile<32>>,
    #[cfg(target_arch = "x86_64")]
    by_16: Vec<digits::Tile<16>>,
}

/// Some blocks of a panel.
struct Compressed<'a> {
    /// `[blocks, words and factors, width]`
    words: &'a [u32],
    format: Format,
}

/// Words of a column in a block.
fn words(format: Format) -> usize {
    format.bits() * format.group() / 32
}

/// What is added to values of so many bits so that none is negative.
const fn offset(bits: usize) -> i32 {
    if bits == 8 { 128 } else { 0 }
}

/// The lowest bit of a value in its word.
const fn place(bits: usize, nth: usize) -> usize {
    8 * (nth % 4) + bits * (nth / 4)
}

impl CompressedPanels {
    /// Packs a matrix.
    pub fn pack(matrix: &StoredMatrix) -> Self {
        let count = matrix.outputs().div_ceil(panel_width());
        Self::build(matrix, count, panel_width(), |panel| (matrix, panel))
    }

    /// Packs two matrices of equal shape and format, a panel of `first` and the same panel of `second` in turn.
    pub fn pack_pairs(first: &StoredMatrix, second: &StoredMatrix) -> Self {
        let count = 2 * first.outputs().div_ceil(panel_width());
        Self::build(first, count, panel_width(), in_turn(first, second))
    }

    /// `count` panels of `width` columns; `source` tells of each which matrix it is cut from, and the how-manieth of that
    /// matrix it is. The matrices are of one shape and format, those of `matrix`.
    fn build<'a>(
        matrix: &StoredMatrix,
        count: usize,
        width: usize,
        source: impl Fn(usize) -> (&'a StoredMatrix, usize) + Sync,
    ) -> Self {
        let &StoredMatrix { format, depth, .. } = matrix;
        let (blocks, block_len) = (depth / format.group(), (words(format) + FACTORS) * width);
        let mut data = Aligned::zeros(count * blocks * block_len);
        let panels = data.get_mut().par_chunks_exact_mut(blocks * block_len).enumerate();
        panels.for_each(|(index, panel)| {
            let (matrix, nth) = source(index);
            for (column, output) in (nth * width..matrix.outputs()).take(width).enumerate() {
                for (block, packed) in panel.chunks_exact_mut(block_len).enumerate() {
                    let column = packed[column..].iter_mut().step_by(width);
                    pack_column(matrix, output * blocks + block, column);
                }
            }
        });
        Self {
            words: data,
            format,
            depth,
            outputs: matrix.outputs(),
            width,
            by_digits: Self::go_by_digits(),
        }
    }

    /// Whether activations are cut into digits, for which the processor has to have the instructions.
    pub fn go_by_digits() -> bool {
        #[cfg(target_arch = "x86_64")]
        return digits::are_fast() && panel_width() == digits::WIDTH;
        #[cfg(not(target_arch = "x86_64"))]
        return false;
    }

    /// Inputs `first..first + depth` of panel `index`: whole blocks.
    #[inline(always)]
    fn block(&self, index: usize, first: usize, depth: usize) -> Compressed<'_> {
        let group = self.format.group();
        assert!(first.is_multiple_of(group) && depth.is_multiple_of(group));
        let block_len = (words(self.format) + FACTORS) * self.width;
        let start = (index * self.depth + first) / group * block_len;
        Compressed {
            words: &self.words.get()[start..][..depth / group * block_len],
            format: self.format,
        }
    }

    /// The same, to be multiplied in float32 on any processor.
    #[cfg(test)]
    pub fn in_float32(self) -> Self {
        Self {
            by_digits: false,
            ..self
        }
    }

    /// Prepares `x` (`[rows, depth]`) for products with this matrix.
    #[cfg_attr(
        not(target_arch = "x86_64"),
        expect(unused_variables, reason = "only x86 has a kernel")
    )]
    pub fn activations<'a>(&self, x: &'a [f32], memory: &'a mut Memory) -> Activations<'a> {
        #[cfg(target_arch = "x86_64")]
        if self.by_digits {
            return Activations::Digits(Digits::round(x, self.depth, self.format, memory));
        }
        Activations::Float(x)
    }

    /// Panel `index` times some rows: `sums` becomes `[rows, width]`. What rows share of the weights is kept in
    /// `buffer`: in float32 the weights themselves, where they are used often.
    #[inline(always)]
    pub fn multiply<S: Simd>(
        &self,
        simd: S,
        index: usize,
        x: &Activations,
        rows: Range<usize>,
        sums: &mut [f32],
        buffer: &mut Vec<f32>,
    ) {
        match x {
            Activations::Float(x) => {
                let x = &x[rows.start * self.depth..rows.end * self.depth];
                self.multiply_in_float32(simd, index, x, sums, buffer);
            }
            #[cfg(target_arch = "x86_64")]
            Activations::Digits(x) => x.multiply(self.block(index, 0, self.depth).words, rows, sums, buffer),
        }
    }

    /// Bytes of the weights.
    pub fn bytes(&self) -> usize {
        size_of_val(self.words.get())
    }

    /// Writes the weights of output `index` to `row`, as an embedding lookup wants them.
    pub fn gather(&self, index: usize, row: &mut [f32]) {
        let (bits, words) = (self.format.bits(), words(self.format));
        let panel = self.block(index / self.width, 0, self.depth).words;
        let blocks = panel.chunks_exact((words + FACTORS) * self.width);
        for (block, row) in blocks.zip(row.chunks_exact_mut(self.format.group())) {
            let word = |nth: usize| block[nth * self.width + index % self.width];
            let (scale, minimum) = (f32::from_bits(word(words)), f32::from_bits(word(words + 1)));
            for (input, weight) in row.iter_mut().enumerate() {
                let value = word(input * bits / 32) >> place(bits, input % (32 / bits)) & ((1 << bits) - 1);
                *weight = scale * (value as i32 - offset(bits)) as f32 + minimum;
            }
        }
    }
}

/// Writes the words and factors of a group.
fn pack_column<'a>(matrix: &StoredMatrix, group: usize, column: impl Iterator<Item = &'a mut u32>) {
    let (bits, len) = (matrix.format.bits(), matrix.format.group());
    let values = matrix.values[group * len..][..len].chunks_exact(32 / bits);
    let words = values.map(|values| {
        let at = |(nth, &value): (usize, &i8)| ((i32::from(value) + offset(bits)) as u32) << place(bits, nth);
        values.iter().enumerate().map(at).fold(0, |word, value| word | value)
    });
    let factors = [matrix.scales[group], matrix.minima[group]].map(f32::to_bits);
    column.zip(words.chain(factors)).for_each(|(to, word)| *to = word);
}
