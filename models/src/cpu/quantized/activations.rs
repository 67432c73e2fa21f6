//! Activations in eight bits.

use std::ops::Range;

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::BLOCK;

/// Rows below which waking other threads costs more than it saves.
const ROWS_A_THREAD: usize = 16;

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

/// Rows of activations, block by block: `[blocks, rows]`.
pub struct Activations {
    groups: Vec<Group>,
    rows: usize,
}

impl Activations {
    /// Rounds `x` (`[rows, depth]`).
    pub fn round(x: &[f32], depth: usize) -> Self {
        let (rows, blocks) = (x.len() / depth, depth / BLOCK);
        let empty = Group {
            values: [0; BLOCK],
            scale: 0.0,
            sum: 0.0,
            whole: 0,
        };
        let mut groups = vec![empty; rows * blocks];
        let at_least = (ROWS_A_THREAD * blocks).div_ceil(rows.max(1));
        groups
            .par_chunks_mut(rows.max(1))
            .with_min_len(at_least)
            .enumerate()
            .for_each(|(block, groups)| {
                let x = &x[block * BLOCK..];
                Arch::new().dispatch(Round { x, depth, groups });
            });
        Self { groups, rows }
    }

    /// Some rows' parts of block `index`.
    pub fn block(&self, index: usize, rows: Range<usize>) -> &[Group] {
        &self.groups[index * self.rows..][rows]
    }
}

/// One block of all rows.
struct Round<'a> {
    /// From the block's first activation on.
    x: &'a [f32],
    depth: usize,
    groups: &'a mut [Group],
}

impl WithSimd for Round<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for (row, group) in self.groups.iter_mut().enumerate() {
            if let Some(x) = self.x[row * self.depth..].first_chunk() {
                round(x, group);
            }
        }
    }
}

#[inline(always)]
fn round(x: &[f32; BLOCK], group: &mut Group) {
    // Adding 1.5 * 2^23 rounds to a whole number, and leaves it in the low bits of the sum.
    const ROUND: f32 = 12_582_912.0;
    // As whole numbers, magnitudes are in the same order, and what is not a number is above them all.
    let largest = x.iter().fold(0, |most: u32, x| most.max(x.to_bits() & 0x7FFF_FFFF));
    let largest = f32::from_bits(largest);
    let inverse = if largest > 0.0 { 127.0 / largest } else { 0.0 };
    group.whole = 0;
    for (value, x) in group.values.iter_mut().zip(x) {
        let whole = x.mul_add(inverse, ROUND).to_bits() as i32 - ROUND.to_bits() as i32;
        *value = whole as i8;
        group.whole += i32::from(*value);
    }
    group.scale = largest / 127.0;
    group.sum = group.scale * group.whole as f32;
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
            let rounded = Activations::round(&x, 96);
            for row in 0..rows {
                for block in 0..3 {
                    let group = rounded.block(block, row..row + 1)[0];
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
    fn what_is_not_finite_stays_so() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -f32::NAN] {
            let mut x = numbers(3 * 32, 12);
            x[40] = bad;
            let rounded = Activations::round(&x, 32);
            let groups = rounded.block(0, 0..3);
            let product = |group: &Group| group.scale * 0.0 + group.sum;
            assert!(!product(&groups[1]).is_finite(), "{bad}");
            assert!(product(&groups[0]).is_finite() && product(&groups[2]).is_finite());
        }
    }
}
