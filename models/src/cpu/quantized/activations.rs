//! Activations in eight bits.

use std::ops::Range;

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::super::room;
use super::BLOCK;

/// Rows that lie together.
pub const TILE: usize = 16;

/// A row's part of a block: each activation is nearly `scale * value`.
#[derive(Debug, Clone, Copy)]
pub struct Group {
    /// -127 to 127.
    pub values: [i8; BLOCK],
    /// Not finite if any activation is not, so that what is multiplied by it, or by the sum, is not either.
    pub scale: f32,
    /// The sum of the values times the scale, by which a block's minimum is multiplied.
    pub sum: f32,
    /// The sum of the values.
    pub whole: i32,
}

impl Group {
    /// Of values with that sum, which stand for activations of that largest magnitude.
    #[inline(always)]
    fn new(values: [i8; BLOCK], whole: i32, largest: f32) -> Self {
        let scale = largest / 127.0;
        Self {
            values,
            scale,
            sum: scale * whole as f32,
            whole,
        }
    }
}

/// Rows of activations, in tiles of [`TILE`] of which the last may have fewer.
pub struct Activations<'a> {
    /// Of each tile `[blocks, rows]`.
    groups: &'a [Group],
    rows: usize,
    blocks: usize,
}

impl<'a> Activations<'a> {
    /// Rounds `x` (`[rows, depth]`), in `buffer`.
    pub fn round(x: &[f32], depth: usize, buffer: &'a mut Vec<Group>) -> Self {
        let (rows, blocks) = (x.len() / depth, depth / BLOCK);
        let empty = Group {
            values: [0; BLOCK],
            scale: 0.0,
            sum: 0.0,
            whole: 0,
        };
        let groups = room(buffer, rows * blocks, empty);
        let tiles = groups.par_chunks_mut(TILE * blocks).zip(x.par_chunks(TILE * depth));
        tiles.for_each(|(groups, x)| {
            let tile = Round { x, depth, groups };
            #[cfg(target_arch = "x86_64")]
            if avx512::is_there() {
                // SAFETY: the processor has what the function needs.
                return unsafe { avx512::round(tile) };
            }
            Arch::new().dispatch(tile);
        });
        Self { groups, rows, blocks }
    }

    /// One row's part of a block.
    #[cfg(test)]
    pub fn group(&self, row: usize, block: usize) -> Group {
        let first = row - row % TILE;
        let tile = self.tiles(first..self.rows).next().unwrap();
        tile.groups[block * tile.rows + row % TILE]
    }

    /// The tiles of some rows, which begin where a tile does, and end there as well or with the last row.
    pub fn tiles(&self, rows: Range<usize>) -> impl Iterator<Item = Tile<'_>> {
        assert!(rows.start.is_multiple_of(TILE) && (rows.end.is_multiple_of(TILE) || rows.end == self.rows));
        let groups = &self.groups[rows.start * self.blocks..rows.end * self.blocks];
        groups.chunks(TILE * self.blocks).map(|groups| Tile {
            groups,
            rows: groups.len() / self.blocks,
        })
    }
}

/// Up to [`TILE`] rows of activations.
#[derive(Clone, Copy)]
pub struct Tile<'a> {
    /// `[blocks, rows]`
    pub groups: &'a [Group],
    pub rows: usize,
}

/// One tile.
struct Round<'a> {
    /// `[rows, depth]`
    x: &'a [f32],
    depth: usize,
    groups: &'a mut [Group],
}

impl WithSimd for Round<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let rows = self.x.len() / self.depth;
        for (row, x) in self.x.chunks_exact(self.depth).enumerate() {
            let (blocks, _) = x.as_chunks();
            for (x, group) in blocks.iter().zip(self.groups[row..].iter_mut().step_by(rows)) {
                *group = round(x);
            }
        }
    }
}

/// Adding this, 1.5 * 2^23, rounds to a whole number and leaves it in the low bits of the sum.
const ROUND: f32 = 12_582_912.0;

#[inline(always)]
fn round(x: &[f32; BLOCK]) -> Group {
    // As whole numbers, magnitudes are in the same order, and what is not a number is above them all.
    let largest = x.iter().fold(0, |most: u32, x| most.max(x.to_bits() & 0x7FFF_FFFF));
    let largest = f32::from_bits(largest);
    let inverse = if largest > 0.0 { 127.0 / largest } else { 0.0 };
    let (mut values, mut whole) = ([0; BLOCK], 0);
    for (value, x) in values.iter_mut().zip(x) {
        *value = (x.mul_add(inverse, ROUND).to_bits() as i32 - ROUND.to_bits() as i32) as i8;
    }
    for &value in &values {
        whole += i32::from(value);
    }
    Group::new(values, whole, largest)
}

/// The same for processors with AVX-512 and its dot products of bytes, which the compiler would not use.
#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::*;

    pub use super::super::avx512::is_there;
    use super::{BLOCK, Group, ROUND, Round};

    const LANES: usize = 16;

    /// One tile. A loop of its own, as what rounds a block has to be compiled for the same processor as the loop.
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    pub fn round(tile: Round) {
        let rows = tile.x.len() / tile.depth;
        for (row, x) in tile.x.chunks_exact(tile.depth).enumerate() {
            let groups = tile.groups[row..].iter_mut().step_by(rows);
            for (x, to) in x.as_chunks().0.iter().zip(groups) {
                *to = group(x);
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    fn group(x: &[f32; BLOCK]) -> Group {
        let (x, _) = x.as_chunks::<LANES>();
        // SAFETY: the arrays are as long as the vectors; reads need no alignment.
        let x = [0, 1].map(|half| unsafe { _mm512_loadu_ps(x[half].as_ptr()) });
        let magnitudes = x.map(|x| _mm512_castps_si512(_mm512_abs_ps(x)));
        let largest = _mm512_reduce_max_epu32(_mm512_max_epu32(magnitudes[0], magnitudes[1]));
        let largest = f32::from_bits(largest);
        let inverse = _mm512_set1_ps(if largest > 0.0 { 127.0 / largest } else { 0.0 });
        // The lowest byte of a sum's bits is the number.
        let bytes = x.map(|x| {
            let sums = _mm512_fmadd_ps(x, inverse, _mm512_set1_ps(ROUND));
            _mm512_cvtepi32_epi8(_mm512_castps_si512(sums))
        });
        let bytes = _mm256_set_m128i(bytes[1], bytes[0]);
        let sums = _mm512_dpbusd_epi32(
            _mm512_setzero_si512(),
            _mm512_set1_epi8(1),
            _mm512_zextsi256_si512(bytes),
        );
        let whole = _mm512_reduce_add_epi32(sums);
        let mut values = [0; BLOCK];
        // SAFETY: the array is as long as the vector; the write needs no alignment.
        unsafe { _mm256_storeu_si256(values.as_mut_ptr().cast(), bytes) };
        Group::new(values, whole, largest)
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::numbers;
    use super::*;

    #[test]
    fn activations_are_near_and_sums_are_theirs() {
        for rows in [1, 3, 40] {
            let mut x = numbers(rows * 96, 11);
            x[32..64].fill(0.0);
            x[7] = -300.0;
            let mut buffer = Vec::new();
            let rounded = Activations::round(&x, 96, &mut buffer);
            for row in 0..rows {
                for block in 0..3 {
                    let group = rounded.group(row, block);
                    let exact = &x[row * 96 + block * BLOCK..][..BLOCK];
                    let values = group.values.map(|value| f32::from(value) * group.scale);
                    for (value, exact) in values.iter().zip(exact) {
                        assert!((value - exact).abs() <= group.scale * 0.501, "{value} is not {exact}");
                    }
                    assert!((values.iter().sum::<f32>() - group.sum).abs() < 1e-3);
                }
            }
        }
    }

    #[test]
    fn every_processor_rounds_alike() {
        let bytes = |scale: f32| {
            let mut x = numbers(37 * 64, 13).iter().map(|x| x * scale).collect::<Vec<_>>();
            // The first block's scale is twice `scale`: halves are rounded to even numbers.
            x[..32].iter_mut().for_each(|x| *x = 0.0);
            for (x, value) in x.iter_mut().zip([254.0, 1.0, 3.0, -5.0, -254.0]) {
                *x = value * scale;
            }
            let mut buffer = Vec::new();
            let rounded = Activations::round(&x, 64, &mut buffer);
            let mut by_vectors = vec![rounded.groups[0]; rounded.groups.len()];
            let tiles = by_vectors.chunks_mut(TILE * 2).zip(x.chunks(TILE * 64));
            tiles.for_each(|(groups, x)| Arch::new().dispatch(Round { x, depth: 64, groups }));
            for (index, (found, vectors)) in rounded.groups.iter().zip(&by_vectors).enumerate() {
                assert_eq!(found.values, vectors.values, "group {index} at {scale}");
                let numbers = |group: &Group| (group.scale, group.sum, group.whole);
                assert_eq!(numbers(found), numbers(vectors), "group {index} at {scale}");
            }
            for (index, x) in x.as_chunks().0.iter().enumerate() {
                assert_eq!(rounded.group(index / 2, index % 2).values, round(x).values, "{index}");
            }
            rounded.group(0, 0).values
        };
        for scale in [0.5, 1.0, 1024.0] {
            assert_eq!(bytes(scale)[..5], [127, 0, 2, -2, -127]);
        }
        // So large or small that their inverses are no normal numbers, and nothing but zeros.
        for scale in [1e36, 1e-38, 1e-44, 0.0] {
            bytes(scale);
        }
    }

    #[test]
    fn what_is_not_finite_stays_so() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -f32::NAN] {
            let mut x = numbers(3 * 32, 12);
            x[40] = bad;
            let mut buffer = Vec::new();
            let rounded = Activations::round(&x, 32, &mut buffer);
            let product = |row| rounded.group(row, 0).scale * 0.0 + rounded.group(row, 0).sum;
            assert!(!product(1).is_finite(), "{bad}");
            assert!(product(0).is_finite() && product(2).is_finite());
        }
    }
}
