//! The kernels for any processor, and what they compute.

use std::ops::Range;

use super::panels::{EightBits, FourBits, LANES};
use super::{Activations, BLOCK, WIDTH, activations::Group};

/// `sums += x W`: one panel's weights, `[depth / BLOCK]`, by some rows of `x`.
pub fn four_bits(panel: &[FourBits], x: &Activations, rows: Range<usize>, sums: &mut [[f32; WIDTH]]) {
    for (index, block) in panel.iter().enumerate() {
        for (sums, group) in sums.iter_mut().zip(x.block(index, rows.clone())) {
            for (column, sum) in sums.iter_mut().enumerate() {
                let (half, lane) = (column / LANES, column % LANES);
                let whole = whole(group, |input| block.value(half, lane, input));
                *sum = whole.mul_add(block.scales[half][lane].to_f32() * group.scale, *sum);
                *sum = block.minima[half][lane].to_f32().mul_add(group.sum, *sum);
            }
        }
    }
}

/// As [`four_bits`].
pub fn eight_bits(panel: &[EightBits], x: &Activations, rows: Range<usize>, sums: &mut [[f32; WIDTH]]) {
    for (index, block) in panel.iter().enumerate() {
        for (sums, group) in sums.iter_mut().zip(x.block(index, rows.clone())) {
            for (column, sum) in sums.iter_mut().enumerate() {
                let (half, lane) = (column / LANES, column % LANES);
                let whole = whole(group, |input| block.value(half, lane, input));
                *sum = whole.mul_add(block.scales[half][lane].to_f32() * group.scale, *sum);
            }
        }
    }
}

/// The products of a block, summed.
#[inline(always)]
fn whole(group: &Group, weight: impl Fn(usize) -> i32) -> f32 {
    let products = (0..BLOCK).map(|input| weight(input) * i32::from(group.values[input]));
    products.sum::<i32>() as f32
}
