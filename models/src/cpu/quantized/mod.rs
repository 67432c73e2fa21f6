//! Weights that are multiplied in whole numbers: matrices in blocks of 32 inputs, each with a scale of its own, by
//! activations that are rounded to eight bits, likewise in blocks.
//!
//! Four-bit weights are kept as GGUF's Q4_0, Q4_1 and Q4_K have them (of Q4_K, a block's scale and minimum are rounded),
//! eight-bit weights as Q5_0 and Q8_0 have them; of any other type, the numbers it stands for are rounded to eight bits. The
//! products of a block are summed exactly, and block by block in order, so a row's result depends neither on the rows
//! beside it nor on the kernel.

mod activations;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod panels;
mod portable;
mod rounding;

pub use activations::{Activations, Group, TILE};
pub use panels::QuantizedPanels;
pub use rounding::{alike, read};

/// Inputs that share a scale.
pub const BLOCK: usize = 32;
/// Columns of a panel: two vectors of eight, or one of sixteen.
pub const WIDTH: usize = 16;
