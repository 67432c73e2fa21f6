//! The kernel for any processor, and what every kernel computes.

use std::ops::Range;

use super::panels::{Block, LANES};
use super::{Activations, BLOCK, WIDTH};

/// `sums += x W`: one panel's weights, `[depth / BLOCK]`, by some rows of `x`.
pub fn multiply<B: Block>(panel: &[B], x: &Activations, rows: Range<usize>, sums: &mut [[f32; WIDTH]]) {
    for (index, block) in panel.iter().enumerate() {
        // Unpacked once for all rows.
        let weights: [[i8; BLOCK]; WIDTH] = std::array::from_fn(|column| {
            std::array::from_fn(|input| block.value(column / LANES, column % LANES, input))
        });
        let scales: [_; WIDTH] = std::array::from_fn(|column| block.scale(column / LANES, column % LANES));
        for (sums, group) in sums.iter_mut().zip(x.block(index, rows.clone())) {
            for ((sum, weights), (scale, minimum)) in sums.iter_mut().zip(&weights).zip(scales) {
                let products = weights.iter().zip(&group.values);
                let whole: i32 = products.map(|(&w, &x)| i32::from(w) * i32::from(x)).sum();
                *sum = (whole as f32).mul_add(scale * group.scale, *sum);
                *sum = minimum.mul_add(group.sum, *sum);
            }
        }
    }
}
