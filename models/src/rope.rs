//! Rotary position embedding (Su et al., "RoFormer", 2021): inverse frequencies of a model, with its scaling, and
//! the cosines and sines of a step's positions.

use std::f64::consts::PI;

use crate::{Rope, RopeScaling};

/// Inverse frequency of every pair of dimensions: `[head_dim / 2]`.
pub(crate) fn inverse_frequencies(rope: &Rope, head_dim: usize) -> Vec<f32> {
    let plain = (0..head_dim / 2).map(|i| 1.0 / rope.theta.powf(2.0 * i as f64 / head_dim as f64));
    match &rope.scaling {
        RopeScaling::None => plain.map(|f| f as f32).collect(),
        RopeScaling::Linear { factor } => plain.map(|f| (f / factor) as f32).collect(),
        RopeScaling::Divisors(divisors) => plain.zip(divisors).map(|(f, &d)| (f / d as f64) as f32).collect(),
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        } => {
            let original = *original_max_position_embeddings as f64;
            plain
                .map(|f| llama3(f, *factor, *low_freq_factor, *high_freq_factor, original) as f32)
                .collect()
        }
    }
}

/// Llama 3.1's scaling: long wavelengths are stretched by `factor`, short ones kept, those between blended.
fn llama3(frequency: f64, factor: f64, low: f64, high: f64, original: f64) -> f64 {
    let turns = original * frequency / (2.0 * PI);
    let keep = ((turns - low) / (high - low)).clamp(0.0, 1.0);
    frequency * (keep + (1.0 - keep) / factor)
}

/// Cosines and sines of every position's angles, each `[positions, head_dim / 2]`. Computed for each step, so no
/// table as long as the context is kept; the angle is a float32 product, as in PyTorch.
pub(crate) fn cos_sin(inverse: &[f32], positions: &[usize]) -> (Vec<f32>, Vec<f32>) {
    let angles = positions
        .iter()
        .flat_map(|&pos| inverse.iter().map(move |f| pos as f32 * f));
    angles.map(|angle| (angle.cos(), angle.sin())).unzip()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llama3_keeps_short_waves_and_stretches_long_ones() {
        let scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192,
        };
        let scaled = inverse_frequencies(
            &Rope {
                theta: 500000.0,
                scaling,
            },
            128,
        );
        let plain = inverse_frequencies(
            &Rope {
                theta: 500000.0,
                scaling: RopeScaling::None,
            },
            128,
        );
        assert_eq!(scaled[0], plain[0]);
        assert_eq!(scaled[63], plain[63] / 8.0);
        assert!(scaled.iter().zip(&plain).all(|(s, p)| *s <= *p && *s >= p / 8.0));
    }

    #[test]
    fn first_position_is_not_rotated() {
        let (cos, sin) = cos_sin(&[1.0, 0.5], &[0, 2]);
        assert_eq!(&cos[..2], &[1.0, 1.0]);
        assert_eq!(&sin[..2], &[0.0, 0.0]);
        assert_eq!(cos[3], 1f32.cos());
    }
}
