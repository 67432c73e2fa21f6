//! The kernels for x86 processors with AVX-512 and its dot products of bytes (VNNI).
//!
//! `vpdpbusd` multiplies unsigned bytes by signed ones and adds four neighbouring products to a sum in 32 bits. Weights of
//! eight bits are made unsigned by adding 128 to each, so 128 times the sum of the activations is taken off.

use std::arch::x86_64::*;
use std::ops::Range;

use super::panels::{EightBits, FourBits, STEP};
use super::{Activations, BLOCK, WIDTH, activations::Group, for_tiles};

/// Rows of a tile. A dot product takes four or five cycles and two can start in each: so many sums keep them busy.
const ROWS: usize = 8;

/// Dot products of a block: four inputs each.
const STEPS: usize = BLOCK / STEP;

/// A panel's weights in one block: what they are multiplied by, and added to.
struct Scales {
    scales: __m512,
    minima: Option<__m512>,
}

/// Whether this processor runs them.
pub fn is_there() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vnni")
}

/// As [`super::portable::multiply`].
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub fn four_bits(panel: &[FourBits], x: &Activations, rows: Range<usize>, sums: &mut [[f32; WIDTH]]) {
    let low = _mm512_set1_epi8(15);
    for (index, block) in panel.iter().enumerate() {
        let mut weights = [low; STEPS];
        for (i, nibbles) in block.nibbles.iter().enumerate() {
            let nibbles = load(nibbles);
            weights[i] = _mm512_and_si512(nibbles, low);
            weights[i + 4] = _mm512_and_si512(_mm512_srli_epi16::<4>(nibbles), low);
        }
        let scales = Scales {
            scales: widen(&block.scales),
            minima: Some(widen(&block.minima)),
        };
        let groups = x.block(index, rows.clone());
        for_tiles!(ROWS, sums, groups, tile(&weights, 0, &scales));
    }
}

/// As [`super::portable::multiply`].
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub fn eight_bits(panel: &[EightBits], x: &Activations, rows: Range<usize>, sums: &mut [[f32; WIDTH]]) {
    // Turning the highest bit over adds 128.
    let highest = _mm512_set1_epi8(i8::MIN);
    for (index, block) in panel.iter().enumerate() {
        let mut weights = [highest; STEPS];
        for (weights, values) in weights.iter_mut().zip(&block.values) {
            *weights = _mm512_xor_si512(*weights, load(values));
        }
        let scales = Scales {
            scales: widen(&block.scales),
            minima: None,
        };
        let groups = x.block(index, rows.clone());
        for_tiles!(ROWS, sums, groups, tile(&weights, 128, &scales));
    }
}

/// Adds to `sums` the products of one block, whose weights are `above` too large.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn tile<const M: usize>(
    weights: &[__m512i; STEPS],
    above: i32,
    scales: &Scales,
    sums: &mut [[f32; WIDTH]; M],
    groups: &[Group; M],
) {
    let mut wholes = [_mm512_setzero_si512(); M];
    for (whole, group) in wholes.iter_mut().zip(groups) {
        *whole = _mm512_set1_epi32(-above * group.whole);
    }
    for (i, &weights) in weights.iter().enumerate() {
        for (whole, group) in wholes.iter_mut().zip(groups) {
            *whole = _mm512_dpbusd_epi32(*whole, weights, inputs(group, i));
        }
    }
    for ((&whole, sums), group) in wholes.iter().zip(sums).zip(groups) {
        let scale = _mm512_mul_ps(scales.scales, _mm512_set1_ps(group.scale));
        // SAFETY: the array is as long as the vector; the read needs no alignment.
        let mut sum = unsafe { _mm512_loadu_ps(sums.as_ptr()) };
        sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole), scale, sum);
        if let Some(minima) = scales.minima {
            sum = _mm512_fmadd_ps(minima, _mm512_set1_ps(group.sum), sum);
        }
        // SAFETY: as above, of the write.
        unsafe { _mm512_storeu_ps(sums.as_mut_ptr(), sum) };
    }
}

/// The bytes of both halves.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn load<T: Copy>(halves: &[[T; BLOCK]; 2]) -> __m512i {
    const { assert!(size_of::<T>() == 1) };
    // SAFETY: the array is as long as the vector; the read needs no alignment.
    unsafe { _mm512_loadu_si512(halves.as_ptr().cast()) }
}

/// Four neighbouring inputs, in every lane.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn inputs(group: &Group, index: usize) -> __m512i {
    let (steps, _) = group.values.as_chunks::<STEP>();
    _mm512_set1_epi32(i32::from_le_bytes(steps[index].map(|value| value as u8)))
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn widen(numbers: &[[half::f16; WIDTH / 2]; 2]) -> __m512 {
    // SAFETY: the array is as long as the vector, and of numbers of that format; the read needs no alignment.
    _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(numbers.as_ptr().cast()) })
}
