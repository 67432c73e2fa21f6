//! Activations in digits, by which products are computed in whole numbers with float32's accuracy (`digit_kernel`).
//!
//! The activations of a row become whole numbers of 24 bits, 23 for weights of four bits, with one scale, and these are cut
//! into three digits of a byte. Weights are small whole numbers as they are, so each digit's products with a block of them
//! are summed exactly, as they are or in pairs (`pairs`). Only these sums are rounded to float32, and then added up, block
//! by block in order: a row's result does not depend on the rows beside it. An activation is off by about 3 * 2^-24 of its
//! row's largest at most, by 4 * 2^-24 for weights of four bits, so a product is nearer to the exact one than a chain of
//! multiply-adds in float32 where a row's activations are of like size, and further from it where some are much larger than
//! the others. Cutting factors into such digits is known as the Ozaki scheme (Ootomo, Ozaki and Yokota, "DGEMM on Integer
//! Matrix Multiplication Unit", 2024, section 3).

use std::arch::x86_64::*;
use std::ops::Range;

use rayon::prelude::*;

use super::digit_kernel::multiply;
use super::{Memory, TILE, pairs};
use crate::cpu::stored::Format;

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
    pub groups: Vec<Group<LEN>>,
    /// Of each row, what its values are multiplied by. Not finite if any activation is not, so that no product is.
    pub scales: Vec<f32>,
}

/// A row's values in a group.
#[repr(align(16))]
pub struct Group<const LEN: usize> {
    /// The highest of all values first. For pairs these are bytes to which something was added, some of them unsigned.
    digits: [[i8; LEN]; DIGITS],
    /// The sum of the values, by which the weights' minimum is multiplied.
    pub sum: f32,
    /// What sums of products are too large by, as the weights are too large as they are multiplied: with eight bits those of
    /// the first two digits and of the last, with four bits those of all three; in pairs by the products of the row's own
    /// digits as well, less those of a row of zeros.
    pub lower: [i32; 2],
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
pub const fn above(bits: usize) -> i32 {
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

#[cfg(test)]
#[path = "digits_tests.rs"]
mod tests;
