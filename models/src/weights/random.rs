//! Weights that mean nothing, for measuring a shape's speed.

use rayon::prelude::*;

use crate::random::splitmix64;

/// A tensor of random bfloat16 numbers, which most files have, scaled so that activations keep their size from layer to
/// layer; a norm's weights are ones and biases zeros. The same name and shape give the same numbers.
pub(crate) fn tensor(name: &str, shape: &[usize]) -> Vec<f32> {
    let len = shape.iter().product();
    match shape {
        [_] if name.ends_with("bias") => vec![0.0; len],
        [_] => vec![1.0; len],
        _ => numbers(seed(name), len, 1.0 / (shape[shape.len() - 1] as f32).sqrt()),
    }
}

fn seed(name: &str) -> u64 {
    name.bytes().fold(0xCBF2_9CE4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3)
    })
}

/// Evenly spread numbers of variance `scale`².
fn numbers(seed: u64, len: usize, scale: f32) -> Vec<f32> {
    const CHUNK: usize = 1 << 14;
    // An even spread over -1 to 1 has a variance of a third.
    let scale = scale * 3f32.sqrt() / (1u32 << 31) as f32;
    let mut numbers = vec![0.0; len];
    numbers.par_chunks_mut(CHUNK).enumerate().for_each(|(chunk, numbers)| {
        for (place, number) in (chunk * CHUNK..).zip(numbers) {
            let wide = (splitmix64(seed, place as u64) >> 32) as i32 as f32 * scale;
            *number = f32::from_bits(wide.to_bits() & 0xFFFF_0000);
        }
    });
    numbers
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_the_asked_variance_and_depend_on_the_name() {
        let matrix = tensor("a", &[300, 200]);
        let mean = matrix.iter().sum::<f32>() / 6e4;
        let variance = matrix.iter().map(|v| v * v).sum::<f32>() / 6e4;
        assert!(
            mean.abs() < 2e-3 && (variance * 200.0 - 1.0).abs() < 0.02,
            "{mean} {variance}"
        );
        assert_eq!(matrix, tensor("a", &[300, 200]));
        assert_ne!(matrix, tensor("b", &[300, 200]));
    }
}
