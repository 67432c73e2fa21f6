//! Random numbers that depend on a seed and a place alone, so that whoever draws the n-th of them, the host or a device, for
//! the first time or again, gets the same.

/// What the generator's state grows by: 2^64 divided by the golden ratio, made odd.
const GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

/// The number at place `n`, from 0, of the SplitMix64 generator seeded with `seed`: Steele, Lea and Flood, "Fast splittable
/// pseudorandom number generators", OOPSLA 2014. Its state is a counter, so that no number needs those before it.
/// `kernels/sample.cu` has the same.
pub(crate) fn splitmix64(seed: u64, n: u64) -> u64 {
    let mut z = seed.wrapping_add(n.wrapping_add(1).wrapping_mul(GAMMA));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Where in its probability a sequence's token number `n`, from 0, is drawn: 0 to below 1, in steps of 2^-24.
pub fn point(seed: u64, n: u64) -> f32 {
    (splitmix64(seed, n) >> 40) as f32 / (1u32 << 24) as f32
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// A seed whose number at place `n` has `point`.
    pub fn seed_of(point: f32, n: u64) -> u64 {
        let mut z = ((point * (1u32 << 24) as f32) as u64) << 40;
        z = (z ^ (z >> 31) ^ (z >> 62)).wrapping_mul(0x3196_42b2_d24d_8ec3);
        z = (z ^ (z >> 27) ^ (z >> 54)).wrapping_mul(0x96de_1b17_3f11_9089);
        z = z ^ (z >> 30) ^ (z >> 60);
        z.wrapping_sub(n.wrapping_add(1).wrapping_mul(GAMMA))
    }

    /// The first outputs of the generator's published reference implementation.
    #[test]
    fn numbers_are_the_published_ones() {
        let expected = [
            6457827717110365317,
            3203168211198807973,
            9817491932198370423,
            4593380528125082431,
            16408922859458223821,
        ];
        for (n, expected) in (0..).zip(expected) {
            assert_eq!(splitmix64(1234567, n), expected);
        }
    }

    #[test]
    fn points_lie_from_0_to_below_1() {
        for (wanted, n) in [(0.0, 0), (0.6, 3), (1.0 - f32::EPSILON / 2.0, 70)] {
            let found = point(seed_of(wanted, n), n);
            assert!(
                (0.0..1.0).contains(&found) && (found - wanted).abs() < 1e-6,
                "{found} for {wanted}"
            );
        }
        let mean = (0..10_000).map(|n| point(7, n)).sum::<f32>() / 1e4;
        assert!((mean - 0.5).abs() < 0.02, "{mean}");
    }
}
