//! What choosing a token needs of a row of logits: the largest, and every token's share.

use pulp::{Arch, Simd, WithSimd};

use super::math;

/// Numbers that are compared, or summed, side by side: lane by lane, whatever the processor, so that results do not
/// depend on it.
const LANES: usize = 16;
/// Logits that have a sum of their own.
pub const CHUNK: usize = 512;

/// The largest logit; `None` unless all are finite numbers.
pub fn highest(logits: &[f32]) -> Option<f32> {
    let (highest, finite) = Arch::new().dispatch(Highest(logits));
    finite.then_some(highest)
}

/// Turns each logit into `e^((logit - highest) / temperature)`, and answers the sum of every [`CHUNK`] of them.
pub fn weigh(logits: &mut [f32], highest: f32, temperature: f32) -> Vec<f32> {
    Arch::new().dispatch(Weigh {
        logits,
        highest,
        temperature,
    })
}

struct Highest<'a>(&'a [f32]);

impl WithSimd for Highest<'_> {
    type Output = (f32, bool);

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> (f32, bool) {
        let mut maxima = [f32::NEG_INFINITY; LANES];
        // Zero times a finite number is zero, and times another is none.
        let mut zeros = [0f32; LANES];
        let (chunks, rest) = self.0.as_chunks::<LANES>();
        for chunk in chunks {
            for ((max, zero), &logit) in maxima.iter_mut().zip(&mut zeros).zip(chunk) {
                *max = if logit > *max { logit } else { *max };
                *zero += logit * 0.0;
            }
        }
        let last = rest.iter().copied().chain(maxima);
        let highest = last.fold(f32::NEG_INFINITY, |a, b| if b > a { b } else { a });
        let finite = rest.iter().all(|logit| logit.is_finite()) && zeros.iter().all(|&zero| zero == 0.0);
        (highest, finite)
    }
}

struct Weigh<'a> {
    logits: &'a mut [f32],
    highest: f32,
    temperature: f32,
}

impl WithSimd for Weigh<'_> {
    type Output = Vec<f32>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> Vec<f32> {
        let Self {
            logits,
            highest,
            temperature,
        } = self;
        let mut sums = Vec::with_capacity(logits.len().div_ceil(CHUNK));
        // Loops, not closures: a closure need not be compiled for the vector instructions chosen here.
        for chunk in logits.chunks_mut(CHUNK) {
            let mut lanes = [0f32; LANES];
            let (whole, rest) = chunk.as_chunks_mut::<LANES>();
            for logits in whole {
                for (sum, logit) in lanes.iter_mut().zip(logits) {
                    *logit = math::exp((*logit - highest) / temperature);
                    *sum += *logit;
                }
            }
            for (sum, logit) in lanes.iter_mut().zip(rest) {
                *logit = math::exp((*logit - highest) / temperature);
                *sum += *logit;
            }
            sums.push(lanes.iter().sum());
        }
        sums
    }
}

#[cfg(test)]
mod tests {
    use super::super::numbers;
    use super::*;

    #[test]
    fn the_largest_is_found_wherever_it_is() {
        for len in [1, 2, 15, 16, 17, 33, 100] {
            for at in 0..len {
                let mut logits = vec![-3.0; len];
                logits[at] = -1.5;
                assert_eq!(highest(&logits), Some(-1.5), "{at} of {len}");
            }
        }
    }

    #[test]
    fn none_is_the_largest_where_one_is_not_finite() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for at in 0..35 {
                let mut logits = vec![1.0; 35];
                logits[at] = bad;
                assert_eq!(highest(&logits), None, "{bad} at {at}");
            }
        }
        assert_eq!(highest(&[f32::MAX, f32::MIN]), Some(f32::MAX));
    }

    #[test]
    fn shares_and_their_sums_are_those_of_the_softmax() {
        for len in [1, 15, 17, CHUNK, CHUNK + 1, 3 * CHUNK + 37] {
            let logits = numbers(len, 41);
            for temperature in [0.25, 1.0, 2.0] {
                let mut weights = logits.clone();
                let sums = weigh(&mut weights, 1.0, temperature);
                let exact = |logit: f32| ((f64::from(logit) - 1.0) / f64::from(temperature)).exp();
                for (&logit, &weight) in logits.iter().zip(&weights) {
                    assert!(
                        (f64::from(weight) / exact(logit) - 1.0).abs() < 2e-6,
                        "{logit} has {weight}"
                    );
                }
                assert_eq!(sums.len(), len.div_ceil(CHUNK));
                for (logits, sum) in logits.chunks(CHUNK).zip(sums) {
                    let exact: f64 = logits.iter().map(|&logit| exact(logit)).sum();
                    assert!((f64::from(sum) / exact - 1.0).abs() < 2e-6, "{sum} is not {exact}");
                }
            }
        }
    }
}
