//! Products in whole numbers, with float32's accuracy, for x86 processors with AVX-512 and its dot products of bytes (VNNI).
//!
//! The activations of a row become whole numbers of 24 bits, 23 for weights of four bits, with one scale, and these are cut
//! into three digits of a byte. Weights are small whole numbers as they are, so each digit's products with a block of them
//! are summed exactly, as they are or in pairs (`pairs`). Only these sums are rounded to float32, and then added up, block
//! by block in order: a row's result does not depend on the rows beside it. An activation is off by about 3 * 2^-24 of its
//! row's largest at most, by 4 * 2^-24 for weights of four bits, so a product is nearer to the exact one than a chain of
//! multiply-adds in float32 where a row's activations are of like size, and further from it where some are much larger than
//! the others. Cutting factors into such digits is known as the Ozaki scheme (Ootomo, Ozaki and Yokota, "DGEMM on Integer
//! Matrix Multiplication Unit", 2024, section 3).
//!
//! `vpdpbusd` multiplies unsigned bytes, the weights, by signed ones, the digits, and adds four neighbouring products to a sum
//! in 32 bits.

use std::arch::x86_64::*;
use std::ops::Range;

use rayon::prelude::*;

use super::{AHEAD, FACTORS, Memory, TILE, pairs};
use crate::cpu::prefetch::prefetch;
use crate::cpu::stored::Format;
use crate::cpu::tile::for_row_tiles;

/// Columns of a vector.
pub const LANES: usize = 16;
/// Columns of a panel.
pub const WIDTH: usize = 2 * LANES;
/// Digits of an activation.
pub const DIGITS: usize = 3;
/// Activations of a row that has none above this count as nothing.
const SMALLEST: f32 = 1e-30;
/// Rows from which on pairs are faster: for fewer, what is computed once for all rows is too much.
const PAIRS_FROM: usize = 4;
/// Rows whose sums are in registers at once. A dot product takes four or five cycles and one can start in each: so many
/// keep them busy.
const ROWS: usize = 8;

/// Words or factors of a panel's columns.
type Line = [[u32; LANES]; 2];

/// Activations in digits, in groups as long as those of the weights, and in tiles of [`TILE`] rows of which the last may have
/// fewer.
pub enum Digits<'a> {
    FourBy32(&'a [Tile<32>]),
    /// The same, to be multiplied in pairs.
    FourInPairs(&'a [Tile<32>]),
    EightBy32(&'a [Tile<32>]),
    EightBy16(&'a [Tile<16>]),
}

/// Up to [`TILE`] rows.
#[derive(Default)]
pub struct Tile<const LEN: usize> {
    /// `[groups, rows]`
    groups: Vec<Group<LEN>>,
    /// Of each row, what its values are multiplied by. Not finite if any activation is not, so that no product is.
    scales: Vec<f32>,
}

/// A row's values in a group.
#[repr(align(16))]
pub struct Group<const LEN: usize> {
    /// The highest of all values first. For pairs these are bytes to which something was added, some of them unsigned.
    digits: [[i8; LEN]; DIGITS],
    /// The sum of the values, by which the weights' minimum is multiplied.
    sum: f32,
    /// What sums of products are too large by, as the weights are too large as they are multiplied: with eight bits those of
    /// the first two digits and of the last, with four bits those of all three; in pairs by the products of the row's own
    /// digits as well, less those of a row of zeros.
    lower: [i32; 2],
}

impl<const LEN: usize> Group<LEN> {
    /// Of values with these digits and this sum; see the fields.
    pub fn new(digits: [[i8; LEN]; DIGITS], sum: i32, lower: [i32; 2]) -> Self {
        Self {
            digits,
            sum: sum as f32,
            lower,
        }
    }

    /// A digit of the four values that a dot product takes, in every lane.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    pub fn step(&self, digit: usize, step: usize) -> __m512i {
        let (steps, _) = self.digits[digit].as_chunks();
        _mm512_set1_epi32(i32::from_le_bytes(steps[step].map(|digit| digit as u8)))
    }
}

/// By how much values of so many bits are too large as they are multiplied: those of eight bits are made unsigned for that,
/// and those of four, which are unsigned, are taken to be -8 to 7, for which there is room for larger digits; their minimum
/// is raised instead.
const fn above(bits: usize) -> i32 {
    1 << (bits - 1)
}

/// What weights of four bits add to sums of products by being too large, for activations of that sum.
pub fn lowered(sum: i32) -> i32 {
    sum.wrapping_mul(above(4))
}

/// The largest value that weights of so many bits are multiplied by: three digits of 127, less what rounding may add, or what
/// can be multiplied in pairs, even where it is not. 32 products of such with -8 to 7 are less than 2^31.
const fn most(bits: usize) -> f32 {
    if bits == 8 { 8_355_700.0 } else { pairs::MOST }
}

/// Whether this processor has the instructions.
pub fn are_fast() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vnni")
}

impl<'a> Digits<'a> {
    /// Rounds `x` (`[rows, depth]`) for weights of a format.
    pub fn round(x: &[f32], depth: usize, format: Format, memory: &'a mut Memory) -> Self {
        let Memory { by_32, by_16 } = memory;
        match format {
            Format::FourBy32 if x.len() >= PAIRS_FROM * depth && pairs::are_fast() => {
                Self::FourInPairs(tiles::<4, 32, true>(x, depth, by_32))
            }
            Format::FourBy32 => Self::FourBy32(tiles::<4, 32, false>(x, depth, by_32)),
            Format::EightBy32 => Self::EightBy32(tiles::<8, 32, false>(x, depth, by_32)),
            Format::EightBy16 => Self::EightBy16(tiles::<8, 16, false>(x, depth, by_16)),
        }
    }

    /// A panel of that format times some rows, which begin where a tile does: `sums` becomes `[rows, WIDTH]`. In `buffer`
    /// the first rows leave what the others need of the weights.
    pub fn multiply(&self, panel: &[u32], rows: Range<usize>, sums: &mut [f32], buffer: &mut Vec<f32>) {
        assert!(are_fast() && rows.start.is_multiple_of(TILE));
        let (sums, _) = sums.as_chunks_mut();
        assert_eq!(sums.len(), rows.len());
        let tiles = rows.start / TILE..rows.end.div_ceil(TILE);
        match self {
            // SAFETY: the processor has what the function needs, by the assertion; so in the other cases.
            Self::FourBy32(x) => unsafe { multiply::<4, 8, 32, false>(panel, &x[tiles], sums, buffer) },
            // SAFETY: as above.
            Self::FourInPairs(x) => unsafe { multiply::<4, 8, 32, true>(panel, &x[tiles], sums, buffer) },
            // SAFETY: as above.
            Self::EightBy32(x) => unsafe { multiply::<8, 8, 32, false>(panel, &x[tiles], sums, buffer) },
            // SAFETY: as above.
            Self::EightBy16(x) => unsafe { multiply::<8, 4, 16, false>(panel, &x[tiles], sums, buffer) },
        }
    }
}

/// Rounds `x` (`[rows, depth]`), in `buffer`.
fn tiles<'a, const BITS: usize, const LEN: usize, const PAIRS: bool>(
    x: &[f32],
    depth: usize,
    buffer: &'a mut Vec<Tile<LEN>>,
) -> &'a [Tile<LEN>] {
    assert!(are_fast() && depth.is_multiple_of(LEN));
    let count = x.len().div_ceil(TILE * depth);
    if buffer.len() < count {
        buffer.resize_with(count, Tile::default);
    }
    let tiles = &mut buffer[..count];
    let rows = x.par_chunks(TILE * depth);
    // SAFETY: the processor has what the function needs, by the assertion.
    let round = |(tile, x): (&mut Tile<LEN>, _)| unsafe { round::<BITS, LEN, PAIRS>(x, depth, tile) };
    tiles.par_iter_mut().zip(rows).for_each(round);
    tiles
}

/// `tile` becomes `x` (`[rows, depth]`).
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn round<const BITS: usize, const LEN: usize, const PAIRS: bool>(x: &[f32], depth: usize, tile: &mut Tile<LEN>) {
    let Tile { groups, scales } = tile;
    scales.clear();
    groups.clear();
    let (most, mut inverses) = (most(BITS), [0.0; TILE]);
    for (x, inverse) in x.chunks_exact(depth).zip(&mut inverses) {
        // As whole numbers, magnitudes are in the same order, and what is not a number is above them all.
        let largest = x.iter().fold(0, |most: u32, x| most.max(x.to_bits() & 0x7FFF_FFFF));
        let largest = f32::from_bits(largest);
        // What is smaller counts as nothing: the inverse might be too large for a number.
        *inverse = if largest > SMALLEST { most / largest } else { 0.0 };
        scales.push(largest / most);
    }
    groups.reserve(x.len() / LEN);
    for index in 0..depth / LEN {
        for (x, &inverse) in x.chunks_exact(depth).zip(&inverses) {
            let x = &x.as_chunks().0[index];
            groups.push(match PAIRS {
                true => pairs::round_group(x, inverse),
                false => round_group::<BITS, LEN>(x, inverse),
            });
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn round_group<const BITS: usize, const LEN: usize>(x: &[f32; LEN], inverse: f32) -> Group<LEN> {
    // 128 in each digit: by so much more, a value has bytes for digits that are 128 too large, and turning the highest bit of
    // a byte over takes that off.
    let more = _mm512_set1_epi32(0x80_8080);
    let mut digits = [[0; LEN]; DIGITS];
    let (mut sums, mut last_sums) = (_mm512_setzero_si512(), _mm512_setzero_si512());
    for (index, x) in x.as_chunks::<LANES>().0.iter().enumerate() {
        // SAFETY: the array is as long as the vector; the read needs no alignment.
        let x = unsafe { _mm512_loadu_ps(x.as_ptr()) };
        let values = _mm512_cvtps_epi32(_mm512_mul_ps(x, _mm512_set1_ps(inverse)));
        let bytes = _mm512_xor_si512(_mm512_add_epi32(values, more), more);
        let of_digits = [
            _mm512_cvtepi32_epi8(_mm512_srli_epi32::<16>(bytes)),
            _mm512_cvtepi32_epi8(_mm512_srli_epi32::<8>(bytes)),
            _mm512_cvtepi32_epi8(bytes),
        ];
        for (digits, of_digit) in digits.iter_mut().zip(of_digits) {
            let digits = &mut digits.as_chunks_mut::<LANES>().0[index];
            // SAFETY: the array is as long as the vector; the write needs no alignment.
            unsafe { _mm_storeu_si128(digits.as_mut_ptr().cast(), of_digit) };
        }
        sums = _mm512_add_epi32(sums, values);
        last_sums = _mm512_add_epi32(last_sums, _mm512_cvtepi8_epi32(of_digits[DIGITS - 1]));
    }
    let sum = _mm512_reduce_add_epi32(sums);
    let lower = if BITS == 8 {
        let last = _mm512_reduce_add_epi32(last_sums);
        [sum.wrapping_sub(last) >> 8, last].map(|sum| sum.wrapping_mul(above(BITS)))
    } else {
        [0, lowered(sum)]
    };
    Group::new(digits, sum, lower)
}

/// `sums` becomes `x` times the panel, whose values have so many bits; four times `STEPS` inputs share a scale.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn multiply<const BITS: usize, const STEPS: usize, const LEN: usize, const PAIRS: bool>(
    panel: &[u32],
    x: &[Tile<LEN>],
    sums: &mut [[f32; WIDTH]],
    buffer: &mut Vec<f32>,
) {
    const { assert!(LEN == 4 * STEPS) };
    let lines: &[Line] = panel.as_chunks().0.as_chunks().0;
    if PAIRS {
        buffer.resize(lines.len() / (STEPS / 2 + FACTORS) * WIDTH, 0.0);
    }
    let (of_zeros, _) = buffer.as_chunks_mut();
    for (index, (x, sums)) in x.iter().zip(sums.chunks_mut(TILE)).enumerate() {
        assert!(sums.len() <= x.scales.len());
        for_row_tiles!(ROWS, sums.len(), |first, MR| {
            for half in 0..2 {
                let begins = (index, first) == (0, 0);
                tile::<BITS, STEPS, LEN, PAIRS, MR>(lines, half, begins, x, first, sums, of_zeros);
            }
        });
    }
}

/// The products of one half of the columns and `M` rows from `first` on. If the panel `begins`, it is fetched on the way, and
/// what pairs need of each block is written to `of_zeros`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn tile<const BITS: usize, const STEPS: usize, const LEN: usize, const PAIRS: bool, const M: usize>(
    panel: &[Line],
    half: usize,
    begins: bool,
    x: &Tile<LEN>,
    first: usize,
    sums: &mut [[f32; WIDTH]],
    of_zeros: &mut [[f32; WIDTH]],
) {
    let words = BITS * LEN / 32;
    let mut acc = [_mm512_setzero_ps(); M];
    let groups = x.groups.chunks_exact(x.scales.len());
    for (index, (block, groups)) in panel.chunks_exact(words + FACTORS).zip(groups).enumerate() {
        if begins && half == 0 {
            prefetch(block.as_ptr().wrapping_add(AHEAD * block.len()), block.len());
        }
        let groups = &groups[first..][..M];
        let weights = unpack::<BITS, STEPS>(block, half);
        let [scales, minima] = [words, words + 1].map(|factors| _mm512_castsi512_ps(load(&block[factors][half])));
        if PAIRS {
            let of_zeros = &mut of_zeros[index].as_chunks_mut().0[half];
            if begins {
                pairs::multiply_zeros(&weights, of_zeros);
            }
            let wholes: [_; M] = pairs::products(&weights, groups, of_zeros);
            add(&wholes, groups, 1, scales, &mut acc);
        } else {
            add_digits::<BITS, STEPS, LEN, M>(&weights, groups, scales, &mut acc);
        }
        let minima = match BITS {
            4 => _mm512_fmadd_ps(scales, _mm512_set1_ps(above(BITS) as f32), minima),
            _ => minima,
        };
        for (acc, group) in acc.iter_mut().zip(groups) {
            *acc = _mm512_fmadd_ps(minima, _mm512_set1_ps(group.sum), *acc);
        }
    }
    for ((acc, sums), &scale) in acc.iter().zip(&mut sums[first..]).zip(&x.scales[first..]) {
        let sums = &mut sums.as_chunks_mut::<LANES>().0[half];
        // SAFETY: the array is as long as the vector; the write needs no alignment.
        unsafe { _mm512_storeu_ps(sums.as_mut_ptr(), _mm512_mul_ps(*acc, _mm512_set1_ps(scale))) };
    }
}

/// Adds a block's products, digit by digit.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn add_digits<const BITS: usize, const STEPS: usize, const LEN: usize, const M: usize>(
    weights: &[__m512i; STEPS],
    groups: &[Group<LEN>],
    scales: __m512,
    acc: &mut [__m512; M],
) {
    let mut wholes = [_mm512_setzero_si512(); M];
    for digit in 0..DIGITS {
        if BITS == 8 && digit == DIGITS - 1 {
            // With all three digits, sums of products with eight bits would not fit.
            add(&wholes, groups, 0, _mm512_mul_ps(scales, _mm512_set1_ps(256.0)), acc);
            wholes = [_mm512_setzero_si512(); M];
        } else if digit > 0 {
            for whole in &mut wholes {
                *whole = _mm512_slli_epi32::<8>(*whole);
            }
        }
        for (step, &weights) in weights.iter().enumerate() {
            for (whole, group) in wholes.iter_mut().zip(groups) {
                *whole = _mm512_dpbusd_epi32(*whole, weights, group.step(digit, step));
            }
        }
    }
    add(&wholes, groups, 1, scales, acc);
}

/// Adds whole sums, once they are lowered, as what they stand for.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn add<const LEN: usize, const M: usize>(
    wholes: &[__m512i; M],
    groups: &[Group<LEN>],
    which: usize,
    scales: __m512,
    acc: &mut [__m512; M],
) {
    for ((acc, &whole), group) in acc.iter_mut().zip(wholes).zip(groups) {
        let whole = _mm512_sub_epi32(whole, _mm512_set1_epi32(group.lower[which]));
        *acc = _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole), scales, *acc);
    }
}

/// A block's values as bytes, of four inputs each.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn unpack<const BITS: usize, const STEPS: usize>(block: &[Line], half: usize) -> [__m512i; STEPS] {
    let low = _mm512_set1_epi8(15);
    let mut weights = [low; STEPS];
    for (step, weights) in weights.iter_mut().enumerate() {
        *weights = match BITS {
            8 => load(&block[step][half]),
            _ if step % 2 == 0 => _mm512_and_si512(load(&block[step / 2][half]), low),
            _ => _mm512_and_si512(_mm512_srli_epi16::<4>(load(&block[step / 2][half])), low),
        };
    }
    weights
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn load(words: &[u32; LANES]) -> __m512i {
    // SAFETY: the array is as long as the vector; the read needs no alignment.
    unsafe { _mm512_loadu_si512(words.as_ptr().cast()) }
}

#[cfg(test)]
mod tests {
    use super::super::CompressedPanels;
    use super::*;
    use crate::cpu::numbers;
    use crate::cpu::stored::StoredMatrix;

    const FORMATS: [Format; 3] = [Format::FourBy32, Format::EightBy32, Format::EightBy16];

    fn matrix(format: Format, outputs: usize, depth: usize) -> StoredMatrix {
        let mut matrix = StoredMatrix::with_room(format, depth, outputs * depth);
        let lowest = if format.bits() == 4 { 0 } else { -128 };
        let mut values = (0i32..).map(|index| (lowest + index * 37 % (1 << format.bits())) as i8);
        for factors in numbers(2 * outputs * depth / format.group(), 51).chunks_exact(2) {
            matrix.push(factors[0], factors[1], values.by_ref().take(format.group()));
        }
        matrix
    }

    /// All outputs of some rows, row by row, the same in whatever way they are multiplied, if this processor has the
    /// instructions: on others there is nothing to test.
    fn products(matrix: &StoredMatrix, x: &[f32]) -> Option<Vec<f32>> {
        if !are_fast() {
            return None;
        }
        let (panels, rows) = (CompressedPanels::pack(matrix), x.len() / matrix.depth);
        let (mut buffer, mut memory) = (vec![f32::NAN; 7], <[Memory; 3]>::default());
        // What was rounded before, of more rows, leaves nothing behind.
        for memory in &mut memory {
            Digits::round(
                &vec![f32::NAN; x.len() + 40 * matrix.depth],
                matrix.depth,
                matrix.format,
                memory,
            );
        }
        let mut found = ways(matrix, x, &mut memory)
            .into_iter()
            .map(|x| products_of(matrix, &panels, rows, &x, &mut buffer));
        let first = found.next()?;
        for (nth, others) in found.enumerate() {
            let differ = |(a, b): (&f32, &f32)| a.to_bits() != b.to_bits() && !(a.is_nan() && b.is_nan());
            let at = first.iter().zip(&others).position(differ);
            assert_eq!(at, None, "{:?}, way {nth}", matrix.format);
        }
        Some(first)
    }

    /// Activations as they would be rounded, and in every way that there is for weights of four bits.
    fn ways<'a>(matrix: &StoredMatrix, x: &[f32], memory: &'a mut [Memory; 3]) -> Vec<Digits<'a>> {
        let ([as_usual, plain, in_pairs], depth) = (memory, matrix.depth);
        let mut ways = vec![Digits::round(x, depth, matrix.format, as_usual)];
        if matrix.format == Format::FourBy32 {
            ways.push(Digits::FourBy32(tiles::<4, 32, false>(x, depth, &mut plain.by_32)));
            ways.push(Digits::FourInPairs(tiles::<4, 32, true>(x, depth, &mut in_pairs.by_32)));
        }
        ways
    }

    fn products_of(
        matrix: &StoredMatrix,
        panels: &CompressedPanels,
        rows: usize,
        x: &Digits,
        buffer: &mut Vec<f32>,
    ) -> Vec<f32> {
        let mut all = vec![f32::NAN; rows * matrix.outputs()];
        for panel in 0..matrix.outputs().div_ceil(WIDTH) {
            let mut sums = vec![f32::NAN; rows * WIDTH];
            let words = panels.block(panel, 0, matrix.depth).words;
            x.multiply(words, 0..rows, &mut sums, buffer);
            for (all, sums) in all.chunks_exact_mut(matrix.outputs()).zip(sums.chunks_exact(WIDTH)) {
                all.iter_mut()
                    .skip(panel * WIDTH)
                    .zip(sums)
                    .for_each(|(to, sum)| *to = *sum);
            }
        }
        all
    }

    /// One product, by the definition.
    fn defined(matrix: &StoredMatrix, x: &[f32], output: usize) -> f32 {
        let largest = x.iter().fold(0.0, |most: f32, x| most.max(x.abs()));
        let most = most(matrix.format.bits());
        let inverse = if largest > SMALLEST { most / largest } else { 0.0 };
        let group = matrix.format.group();
        let mut sum = 0.0;
        for (index, x) in x.chunks_exact(group).enumerate() {
            let at = output * matrix.depth / group + index;
            let (scale, minimum) = (matrix.scales[at], matrix.minima[at]);
            let weights = matrix.values[at * group..][..group]
                .iter()
                .map(|&value| i64::from(value));
            let values = || x.iter().map(|x| (x * inverse).round_ties_even() as i64);
            let whole = values().sum::<i64>() as f32;
            if matrix.format.bits() == 4 {
                let products: i64 = weights.zip(values()).map(|(weight, value)| (weight - 8) * value).sum();
                sum = (products as f32).mul_add(scale, sum);
                sum = scale.mul_add(8.0, minimum).mul_add(whole, sum);
            } else {
                let (mut high, mut low) = (0, 0);
                for (weight, value) in weights.zip(values()) {
                    let last = i64::from(value as i8);
                    high += weight * ((value - last) / 256);
                    low += weight * last;
                }
                sum = (high as f32).mul_add(256.0 * scale, sum);
                sum = (low as f32).mul_add(scale, sum);
                sum = minimum.mul_add(whole, sum);
            }
        }
        sum * (largest / most)
    }

    #[test]
    fn products_are_what_the_definition_says() {
        for format in FORMATS {
            let shapes = [(1, 32, 1), (31, 64, 2), (33, 96, 5), (64, 576, 16), (70, 1536, 41)];
            for (outputs, depth, rows) in shapes.into_iter().chain([3, 4, 6, 7, 8].map(|rows| (40, 160, rows))) {
                let (matrix, x) = (matrix(format, outputs, depth), numbers(rows * depth, 52));
                let Some(found) = products(&matrix, &x) else { return };
                for (at, found) in found.iter().enumerate() {
                    let exact = defined(&matrix, &x[at / outputs * depth..][..depth], at % outputs);
                    assert_eq!(
                        *found,
                        exact,
                        "row {}, output {} in {format:?}",
                        at / outputs,
                        at % outputs
                    );
                }
            }
        }
    }

    /// The largest numbers there are overflow nothing.
    #[test]
    fn extremes_are_summed_exactly() {
        for (format, weights) in [
            (Format::FourBy32, [15, 15]),
            (Format::FourBy32, [15, 0]),
            (Format::FourBy32, [0, 0]),
            (Format::EightBy32, [127, 127]),
            (Format::EightBy16, [127, -128]),
            (Format::EightBy32, [-128, -128]),
            (Format::EightBy16, [-128, -128]),
        ] {
            let mut matrix = StoredMatrix::with_room(format, 64, 64);
            for _ in 0..64 / format.group() {
                matrix.push(1.0, 0.0, weights.into_iter().cycle().take(format.group()));
            }
            for signs in [[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]] {
                let x: Vec<f32> = signs.into_iter().cycle().take(3 * 64).collect();
                let Some(found) = products(&matrix, &x) else { return };
                let exact = 32.0 * (signs[0] * f32::from(weights[0]) + signs[1] * f32::from(weights[1]));
                for product in found {
                    let off = (product - exact).abs();
                    assert!(off <= 1e-6 * exact.abs(), "{weights:?} {signs:?}: {product}");
                }
            }
        }
    }

    /// Against float64: better than a chain of fused multiply-adds in float32, and not much worse where one activation is far
    /// larger than the others.
    #[test]
    fn products_have_float32s_accuracy() {
        for format in FORMATS {
            for (depth, outlier, times) in [
                (576, 1.0, 1.0),
                (1536, 1.0, 1.0),
                (576, 1000.0, 10.0),
                (1536, 1000.0, 10.0),
            ] {
                let (outputs, rows) = (48, 24);
                let matrix = matrix(format, outputs, depth);
                let mut x = numbers(rows * depth, 53);
                x.iter_mut().skip(100).step_by(depth).for_each(|x| *x = outlier);
                let Some(found) = products(&matrix, &x) else { return };
                let weights = matrix.weights();
                let (mut off, mut off_in_float32, mut all) = (0.0, 0.0, 0.0);
                for (at, found) in found.iter().enumerate() {
                    let x = &x[at / outputs * depth..][..depth];
                    let factors = || x.iter().zip(&weights[at % outputs * depth..]);
                    let exact: f64 = factors().map(|(&x, &w)| f64::from(x) * f64::from(w)).sum();
                    let in_float32 = factors().fold(0.0, |sum, (x, w)| x.mul_add(*w, sum));
                    off += (f64::from(*found) - exact).powi(2);
                    off_in_float32 += (f64::from(in_float32) - exact).powi(2);
                    all += exact.powi(2);
                }
                let [off, off_in_float32] = [off, off_in_float32].map(|off| (off / all).sqrt());
                assert!(
                    off < 1e-5 && off < times * off_in_float32,
                    "{off:e}, in float32 {off_in_float32:e}: {format:?}, {depth} inputs, one of them {outlier}"
                );
            }
        }
    }

    #[test]
    fn what_is_not_finite_stays_so_and_what_is_nearly_nothing_is_small() {
        for format in FORMATS {
            let matrix = matrix(format, 40, 64);
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -f32::NAN] {
                let mut x = numbers(5 * 64, 54);
                (x[64 + 40], x[64 + 41]) = (bad, bad);
                x[2 * 64..3 * 64].fill(0.0);
                x[3 * 64..4 * 64].iter_mut().for_each(|x| *x *= 1e-33);
                x[4 * 64..].iter_mut().for_each(|x| *x *= 1e34);
                let Some(found) = products(&matrix, &x) else { return };
                let rows: Vec<&[f32]> = found.chunks_exact(40).collect();
                assert!(rows[1].iter().all(|product| !product.is_finite()), "{bad}");
                assert_eq!(rows[2], [0.0; 40]);
                assert!(rows[3].iter().all(|product| product.abs() < 1e-28), "{bad}");
                assert!(
                    rows[0].iter().chain(rows[4]).all(|product| product.is_finite()),
                    "{bad}"
                );
            }
        }
    }

    #[test]
    fn rows_from_a_later_tile_on_are_the_same() {
        let (matrix, x) = (matrix(Format::FourBy32, 32, 96), numbers(40 * 96, 55));
        let Some(all) = products(&matrix, &x) else { return };
        let panels = CompressedPanels::pack(&matrix);
        for x in ways(&matrix, &x, &mut Default::default()) {
            let mut some = vec![f32::NAN; 24 * WIDTH];
            x.multiply(panels.block(0, 0, 96).words, 16..40, &mut some, &mut Vec::new());
            assert_eq!(some, all[16 * WIDTH..]);
        }
    }
}
