//! Scalar functions written so that loops over them vectorise.

/// `e^x` to a relative error of about 1e-7; 0 below -87.3, where float32 leaves its normal range, infinity above 88.7.
///
/// `x = n ln 2 + r` with `n` whole and `|r| <= ln 2 / 2` (ln 2 in two parts, Cody and Waite 1980), `e^r` by its Taylor
/// polynomial of degree 7, and `2^n` put into the exponent in two halves, so that n = 128 does not overflow early.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Adding and subtracting 1.5 * 2^23 rounds to a whole number, and leaves it in the low bits of the sum.
    const ROUND: f32 = 12_582_912.0;
    const COEFFICIENTS: [f32; 6] = [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0];
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-LN2_LOW, n.mul_add(-LN2_HIGH, x));
    let mut p = 1.0 / 5040.0;
    for c in COEFFICIENTS {
        p = r.mul_add(p, c);
    }
    p = r.mul_add(p, 1.0);
    // Far outside of the range it may wrap; what becomes of it is replaced below.
    let whole = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    let (half, rest) = (whole >> 1, whole - (whole >> 1));
    let power = |n: i32| f32::from_bits(((n + 127) << 23) as u32);
    let y = p * power(half) * power(rest);
    let y = if x < -87.3 { 0.0 } else { y };
    if x > 88.72 { f32::INFINITY } else { y }
}

/// `x / (1 + e^-x)`, the activation between the halves of the MLP.
#[inline(always)]
pub fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_a_millionth() {
        for i in -87_000..88_700 {
            let x = i as f32 / 1000.0;
            let exact = (x as f64).exp();
            assert!(
                ((exp(x) as f64 - exact) / exact).abs() < 3e-7,
                "exp({x}) = {} not {exact}",
                exp(x)
            );
        }
    }

    #[test]
    fn exp_at_the_ends() {
        assert_eq!(exp(0.0), 1.0);
        for far in [-1e30, -1.7e7, -1e7, -8.8e6, -1e4] {
            assert_eq!((exp(far), exp(-far)), (0.0, f32::INFINITY), "{far}");
        }
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn silu_has_its_limits() {
        assert_eq!(silu(0.0), 0.0);
        assert_eq!(silu(100.0), 100.0);
        assert_eq!(silu(-200.0), 0.0);
        assert!((silu(1.0) - 0.731_058_6).abs() < 1e-6);
    }
}
