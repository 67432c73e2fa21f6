//! The kernel for any processor, and what every kernel computes.

use super::activations::Tile;
use super::panels::{Block, LANES};
use super::{BLOCK, WIDTH};

/// `sums += x W`: one panel's weights, `[depth / BLOCK]`, by a tile of rows.
pub fn multiply<B: Block>(panel: &[B], x: Tile, sums: &mut [[f32; WIDTH]]) {
    for (block, groups) in panel.iter().zip(x.groups.chunks_exact(x.rows)) {
        // Unpacked once for all rows.
        let weights: [[i8; BLOCK]; WIDTH] = std::array::from_fn(|column| {
            std::array::from_fn(|input| block.value(column / LANES, column % LANES, input))
        });
        let scales: [_; WIDTH] = std::array::from_fn(|column| block.scale(column / LANES, column % LANES));
        for (sums, group) in sums.iter_mut().zip(groups) {
            for ((sum, weights), (scale, minimum)) in sums.iter_mut().zip(&weights).zip(scales) {
                let products = weights.iter().zip(&group.values);
                let whole: i32 = products.map(|(&w, &x)| i32::from(w) * i32::from(x)).sum();
                *sum = (whole as f32).mul_add(scale * group.scale, *sum);
                *sum = minimum.mul_add(group.sum, *sum);
            }
        }
    }
}
