//! Inner products by half as many multiplications, for weights of four bits on processors that add beside multiplying.
//!
//! Of activations `a` and `b` and weights `c` and `d`, `a c + b d` is `(a + d) (b + c) - a b - d c` (Winograd, "A New
//! Algorithm for Inner Product", 1968). What is taken off depends on the row alone or on the column alone, so that each is
//! computed once for all products. The sums have to fit into bytes, for which a weight of four bits leaves digits of 120 at
//! most. The highest and the lowest of an activation's three digits are multiplied so; the middle one is multiplied as it is
//! and takes all eight bits, whereby multiplications and additions are about as many as the processor does at a time.
//!
//! The two inputs of a pair are four apart: one's weight is in the low nibble of a byte and the other's in the high one.

use std::arch::x86_64::*;
use std::sync::LazyLock;

use super::digits::{DIGITS, Group, LANES, lowered};

/// The largest value, of digits of 120, 127 and 63, less what rounding may add.
pub const MOST: f32 = 3_948_400.0;
/// By how many bits a value's highest and middle digits stand above the lowest.
const HIGH: u32 = 15;
const MIDDLE: u32 = 7;
/// What is added to a digit by which a pair's first weight is multiplied, so that its sum with the second, 0 to 15, is from 0
/// to 255.
const FIRST: i32 = 120;
/// The same for the second weight: with the first, from -128 to 127.
const SECOND: i32 = -8;

/// Whether this processor has units for additions beside those for multiplications: AMD's have, Intel's use the same.
pub fn are_fast() -> bool {
    // Where the processor is shared, a host answers instead of it, which takes longer than some products.
    static IS_AMD: LazyLock<bool> = LazyLock::new(|| {
        #[allow(
            unused_unsafe,
            reason = "the function was unsafe in earlier versions of the compiler"
        )]
        // SAFETY: every processor of this kind has the instruction.
        let vendor = unsafe { __cpuid(0) };
        let name = [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes);
        name.as_flattened() == b"AuthenticAMD"
    });
    *IS_AMD
}

/// Rounds a row's activations in a group to whole numbers, `inverse` times as large, of at most [`MOST`]: the middle digit
/// stays as it is, and the others have what pairs need added.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub fn round_group<const LEN: usize>(x: &[f32; LEN], inverse: f32) -> Group<LEN> {
    assert_eq!(LEN, 2 * LANES);
    let x = x.as_chunks::<LANES>().0;
    // SAFETY: the arrays are as long as the vectors; reads need no alignment.
    let x = [0, 1].map(|half| unsafe { _mm512_loadu_ps(x[half].as_ptr()) });
    let inverse = _mm512_set1_ps(inverse);
    let values = [
        _mm512_cvtps_epi32(_mm512_mul_ps(x[0], inverse)),
        _mm512_cvtps_epi32(_mm512_mul_ps(x[1], inverse)),
    ];
    let [front, back] = [cut(values[0]), cut(values[1])];
    let outer = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29);
    let middle = _mm512_setr_epi32(2, 6, 10, 14, 18, 22, 26, 30, 2, 6, 10, 14, 18, 22, 26, 30);
    let outer = _mm512_permutex2var_epi32(front, outer, back);
    let middle = _mm512_permutex2var_epi32(front, middle, back);
    let mut digits = [[0; LEN]; DIGITS];
    for (digits, bytes) in digits.iter_mut().zip([
        _mm512_castsi512_si256(outer),
        _mm512_castsi512_si256(middle),
        _mm512_extracti64x4_epi64::<1>(outer),
    ]) {
        // SAFETY: the array is as long as the vector, by the assertion; the write needs no alignment.
        unsafe { _mm256_storeu_si256(digits.as_mut_ptr().cast(), bytes) };
    }
    // The first inputs of pairs are in the lower half of each quadword, and the second ones in the higher.
    let products = _mm512_dpbusd_epi32(
        _mm512_setzero_si512(),
        _mm512_maskz_mov_epi32(0x5555, outer),
        _mm512_srli_epi64::<32>(outer),
    );
    let products = _mm512_mask_slli_epi32::<HIGH>(products, 0x00FF, products);
    let [sum, products] = totals(_mm512_add_epi32(values[0], values[1]), products);
    // A row of zeros has these products as well, and they are taken off with the columns'.
    let of_zeros = ((1 << HIGH) + 1) * (FIRST * SECOND * LEN as i32 / 2);
    let lower = products.wrapping_sub(of_zeros).wrapping_add(lowered(sum));
    Group::new(digits, sum, [0, lower])
}

/// The digits of 16 values: of four at a time the highest, then the lowest, then the middle.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn cut(values: __m512i) -> __m512i {
    // 64 in the lowest digit and 128 in the middle one: by so much more, the bits of a value are those of digits that are so
    // much too large.
    let bits = _mm512_add_epi32(values, _mm512_set1_epi32((128 << MIDDLE) + 64));
    // The lowest digit fills seven bits of its byte; moved by one, the others fill theirs.
    let lowest = _mm512_and_si512(bits, _mm512_set1_epi32(127));
    let others = _mm512_andnot_si512(_mm512_set1_epi32(255), _mm512_slli_epi32::<1>(bits));
    let added = |added: i32| i32::from_le_bytes([added - 64, 128, added, 0].map(|byte| byte as u8));
    let added = _mm512_mask_blend_epi32(
        0xF0F0,
        _mm512_set1_epi32(added(FIRST)),
        _mm512_set1_epi32(added(SECOND)),
    );
    let digits = _mm512_add_epi8(_mm512_or_si512(lowest, others), added);
    let order = _mm_setr_epi8(2, 6, 10, 14, 0, 4, 8, 12, 1, 5, 9, 13, 3, 7, 11, 15);
    _mm512_shuffle_epi8(digits, _mm512_broadcast_i32x4(order))
}

/// The totals of the numbers in two vectors.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn totals(first: __m512i, second: __m512i) -> [i32; 2] {
    let both = _mm512_add_epi32(
        _mm512_unpacklo_epi32(first, second),
        _mm512_unpackhi_epi32(first, second),
    );
    let both = _mm256_add_epi32(_mm512_castsi512_si256(both), _mm512_extracti64x4_epi64::<1>(both));
    let both = _mm_add_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256::<1>(both));
    let both = _mm_add_epi32(both, _mm_unpackhi_epi64(both, both));
    [_mm_cvtsi128_si32(both), _mm_extract_epi32::<1>(both)]
}

/// What a row of zeros gives: 16 products of less than 2^15, so that as a number in float32 it is exact.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub fn multiply_zeros<const STEPS: usize>(weights: &[__m512i; STEPS], sums: &mut [f32; LANES]) {
    let mut of_zeros = _mm512_setzero_si512();
    for [first, second] in weights.as_chunks().0 {
        let unsigned = _mm512_add_epi8(*second, _mm512_set1_epi8(FIRST as i8));
        let signed = _mm512_add_epi8(*first, _mm512_set1_epi8(SECOND as i8));
        of_zeros = _mm512_dpbusd_epi32(of_zeros, unsigned, signed);
    }
    // SAFETY: the array is as long as the vector; the write needs no alignment.
    unsafe { _mm512_storeu_ps(sums.as_mut_ptr(), _mm512_cvtepi32_ps(of_zeros)) };
}

/// Sums of the products of a group of rows with a block's weights (0 to 15): too large by the rows' [`Group::lower`].
/// `of_zeros` has what [`multiply_zeros`] wrote.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub fn products<const STEPS: usize, const LEN: usize, const M: usize>(
    weights: &[__m512i; STEPS],
    groups: &[Group<LEN>],
    of_zeros: &[f32; LANES],
) -> [__m512i; M] {
    let mut wholes = [_mm512_setzero_si512(); M];
    // Half of the rows is a digit behind the others, so that some are multiplied as they are while others are added to.
    stage::<0, DIGITS, STEPS, LEN>(weights, groups, &mut wholes);
    stage::<1, 0, STEPS, LEN>(weights, groups, &mut wholes);
    stage::<2, 1, STEPS, LEN>(weights, groups, &mut wholes);
    stage::<DIGITS, 2, STEPS, LEN>(weights, groups, &mut wholes);
    // SAFETY: the array is as long as the vector; the read needs no alignment.
    let of_zeros = _mm512_cvtps_epi32(unsafe { _mm512_loadu_ps(of_zeros.as_ptr()) });
    let of_zeros = _mm512_add_epi32(of_zeros, _mm512_slli_epi32::<HIGH>(of_zeros));
    for whole in &mut wholes {
        *whole = _mm512_sub_epi32(*whole, of_zeros);
    }
    wholes
}

/// Adds the products with one digit of the first half of the rows and with another of the second half.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn stage<const OF_FIRST: usize, const OF_SECOND: usize, const STEPS: usize, const LEN: usize>(
    weights: &[__m512i; STEPS],
    groups: &[Group<LEN>],
    wholes: &mut [__m512i],
) {
    let half = wholes.len().div_ceil(2);
    let (first, second) = wholes.split_at_mut(half);
    for pair in 0..STEPS / 2 {
        for nth in 0..half {
            advance::<OF_FIRST, STEPS, LEN>(weights, &groups[..half], first, pair, nth);
            advance::<OF_SECOND, STEPS, LEN>(weights, &groups[half..], second, pair, nth);
        }
    }
}

/// Adds the `nth` part of the products with a digit and a pair of weights, of as many parts as there are rows.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn advance<const DIGIT: usize, const STEPS: usize, const LEN: usize>(
    weights: &[__m512i; STEPS],
    groups: &[Group<LEN>],
    wholes: &mut [__m512i],
    pair: usize,
    nth: usize,
) {
    let rows = wholes.len();
    if DIGIT == DIGITS || nth >= rows {
        return;
    }
    if (pair, nth) == (0, 0) {
        for whole in wholes.iter_mut() {
            *whole = match DIGIT {
                0 => *whole,
                1 => _mm512_slli_epi32::<{ HIGH - MIDDLE }>(*whole),
                _ => _mm512_slli_epi32::<MIDDLE>(*whole),
            };
        }
    }
    if DIGIT == 1 {
        for at in [2 * nth, 2 * nth + 1] {
            let (step, row) = (2 * pair + at / rows, at % rows);
            wholes[row] = _mm512_dpbusd_epi32(wholes[row], weights[step], groups[row].step(DIGIT, step));
        }
    } else {
        let [of_first, of_second] = [2 * pair, 2 * pair + 1].map(|step| groups[nth].step(DIGIT, step));
        // No byte's sum is above 255, so that nothing is carried to the next: this addition may be one of 32 bits, which
        // takes a factor from memory for all lanes by itself.
        let unsigned = _mm512_add_epi32(weights[2 * pair + 1], of_first);
        let signed = _mm512_add_epi8(weights[2 * pair], of_second);
        wholes[nth] = _mm512_dpbusd_epi32(wholes[nth], unsigned, signed);
    }
}
