//! Rounding matrices to what the kernels multiply: groups of 32 weights of four bits, or of eight without a minimum, both
//! with factors in float16.

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Result};
use half::f16;
use rayon::prelude::*;

use super::BLOCK;
use crate::cpu::stored::{Format, StoredMatrix, shape};

/// A file's matrix on the CPU: Q4_0, Q4_1, Q4_K, Q5_0 and Q8_0 as they are, but for Q4_K's factors, which are rounded when
/// they are packed; others rounded to eight bits.
///
/// # Errors
/// The tensor is no matrix, or its rows are no whole number of blocks.
pub fn read(tensor: &QTensor) -> Result<StoredMatrix> {
    use GgmlDType::{Q4_0, Q4_1, Q4K, Q5_0, Q8_0};
    if matches!(tensor.dtype(), Q4_0 | Q4_1 | Q4K | Q5_0 | Q8_0) {
        return StoredMatrix::read(tensor);
    }
    let (_, depth) = shape(tensor)?;
    Ok(round(
        &tensor.dequantize(&Device::Cpu)?.flatten_all()?.to_vec1()?,
        depth,
    ))
}

/// Rounds weights to eight bits; `depth` is a whole number of blocks.
fn round(weights: &[f32], depth: usize) -> StoredMatrix {
    let blocks: Vec<(f32, [i8; BLOCK])> = weights
        .par_chunks_exact(BLOCK)
        .map(|block| {
            // By their bits, what is not a number is above all others, and stays so.
            let largest = block.iter().fold(0, |most: u32, w| most.max(w.to_bits() & 0x7FFF_FFFF));
            let largest = f32::from_bits(largest);
            let scale = f16::from_f32(largest / 127.0).to_f32();
            let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
            // The cast saturates, where the scale was rounded down.
            let value = |index: usize| ((block[index] * inverse).round() as i8).max(-127);
            (scale, std::array::from_fn(value))
        })
        .collect();
    let mut matrix = StoredMatrix::with_room(Format::EightBy32, depth, weights.len());
    for (scale, values) in blocks {
        matrix.push(scale, 0.0, values.into_iter());
    }
    matrix
}

/// Matrices that were read, all in eight bits if one of them is.
pub fn alike(parts: Vec<StoredMatrix>) -> Vec<StoredMatrix> {
    let eight = parts.iter().any(|part| part.format != Format::FourBy32);
    let widen = |part: StoredMatrix| match eight && part.format == Format::FourBy32 {
        true => round(&part.weights(), part.depth),
        false => part,
    };
    parts.into_iter().map(widen).collect()
}

#[cfg(test)]
mod tests {
    use super::super::super::quantized_numbers;
    use super::*;

    fn stored(outputs: usize, depth: usize, dtype: GgmlDType, seed: u32) -> (StoredMatrix, Vec<f32>) {
        let (stored, stands_for) = quantized_numbers(outputs, depth, dtype, seed);
        (read(&stored).unwrap(), stands_for)
    }

    #[test]
    fn what_is_not_multiplied_as_it_is_is_rounded_to_eight_bits() {
        for (dtype, format, within) in [
            (GgmlDType::Q4_0, Format::FourBy32, 0.0),
            (GgmlDType::Q4_1, Format::FourBy32, 0.0),
            (GgmlDType::Q4K, Format::FourBy32, 0.0),
            (GgmlDType::Q5_0, Format::EightBy32, 0.0),
            (GgmlDType::Q8_0, Format::EightBy32, 0.0),
            (GgmlDType::Q3K, Format::EightBy32, 4.5e-3),
            (GgmlDType::Q5_1, Format::EightBy32, 4.5e-3),
            (GgmlDType::Q6K, Format::EightBy32, 4.5e-3),
        ] {
            let (matrix, stands_for) = stored(6, 256, dtype, 3);
            assert_eq!(matrix.format, format, "{dtype:?}");
            for (found, exact) in matrix.weights().iter().zip(&stands_for) {
                assert!((found - exact).abs() <= within, "{dtype:?}: {found} is not {exact}");
            }
        }
    }

    #[test]
    fn matrices_side_by_side_take_the_wider_type() {
        let (four, exact_four) = stored(4, 64, GgmlDType::Q4_1, 5);
        let (eight, exact_eight) = stored(2, 64, GgmlDType::Q8_0, 6);
        let exact = [exact_four, exact_eight].concat();
        let both = StoredMatrix::concat(alike(vec![four, eight])).unwrap();
        assert_eq!((both.format, both.values.len()), (Format::EightBy32, 6 * 64));
        for (found, exact) in both.weights().iter().zip(&exact) {
            assert!((found - exact).abs() < 4.5e-3, "{found} is not {exact}");
        }
    }

    #[test]
    fn blocks_of_zeros_and_of_one_outlier_are_rounded() {
        let mut weights = vec![0.0; 64];
        weights[40] = -1000.0;
        weights[41] = 5.0;
        let matrix = round(&weights, 64);
        assert_eq!(matrix.weights()[..32], [0.0; 32]);
        assert_eq!(matrix.values[40], -127);
        assert!((matrix.weights()[40] + 1000.0).abs() < 1.0 && (matrix.weights()[41] - 5.0).abs() < 4.0);
        weights[3] = f32::NAN;
        let matrix = round(&weights, 64);
        assert!(matrix.weights()[..32].iter().all(|weight| weight.is_nan()) && matrix.weights()[40] < -999.0);
    }
}
