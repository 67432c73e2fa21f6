//! The kernels for x86 processors with AVX2.
//!
//! `vpmaddubsw` multiplies unsigned bytes by signed ones and adds neighbouring products in 16 bits. Of four-bit weights the
//! sums of a whole block fit there (8 times 2 times 15 times 127 is 30,480); those of eight bits are widened at once.

use std::arch::x86_64::*;

use super::activations::{Group, Tile};
use super::panels::{EightBits, FourBits, LANES, STEP};
use super::{BLOCK, WIDTH};

/// Rows of a tile: so many sums of 16 outputs fit into the registers beside their factors.
const ROWS: usize = 4;

/// Calls `$tile` with `$rows` rows at a time, and with those that are left one by one.
macro_rules! for_tiles {
    ($rows:ident, $sums:expr, $groups:expr, $tile:ident($($argument:expr),*)) => {{
        let ((tiles, rest), (groups, last)) = ($sums.as_chunks_mut::<$rows>(), $groups.as_chunks::<$rows>());
        for (sums, groups) in tiles.iter_mut().zip(groups) {
            $tile($($argument,)* sums, groups);
        }
        for (sums, group) in rest.iter_mut().zip(last) {
            $tile($($argument,)* std::array::from_mut(sums), std::array::from_ref(group));
        }
    }};
}

/// A panel's weights in one block: what they are multiplied by, and added to.
struct Scales {
    scales: [__m256; 2],
    minima: Option<[__m256; 2]>,
}

/// Whether this processor runs them.
pub fn is_there() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
}

/// As [`super::portable::multiply`].
#[target_feature(enable = "avx2,fma,f16c")]
pub fn four_bits(panel: &[FourBits], x: Tile, sums: &mut [[f32; WIDTH]]) {
    let low = _mm256_set1_epi8(15);
    for (block, groups) in panel.iter().zip(x.groups.chunks_exact(x.rows)) {
        let mut weights = [[low; 2]; 8];
        for (i, halves) in block.nibbles.iter().enumerate() {
            for (half, vector) in halves.iter().enumerate() {
                let nibbles = load(vector);
                weights[i][half] = _mm256_and_si256(nibbles, low);
                weights[i + 4][half] = _mm256_and_si256(_mm256_srli_epi16::<4>(nibbles), low);
            }
        }
        let scales = Scales {
            scales: [widen(&block.scales[0]), widen(&block.scales[1])],
            minima: Some([widen(&block.minima[0]), widen(&block.minima[1])]),
        };
        for_tiles!(ROWS, sums, groups, four_bit_tile(&weights, &scales));
    }
}

/// As [`super::portable::multiply`].
#[target_feature(enable = "avx2,fma,f16c")]
pub fn eight_bits(panel: &[EightBits], x: Tile, sums: &mut [[f32; WIDTH]]) {
    for (block, groups) in panel.iter().zip(x.groups.chunks_exact(x.rows)) {
        let scales = Scales {
            scales: [widen(&block.scales[0]), widen(&block.scales[1])],
            minima: None,
        };
        for_tiles!(ROWS, sums, groups, eight_bit_tile(block, &scales));
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn four_bit_tile<const M: usize>(
    weights: &[[__m256i; 2]; 8],
    scales: &Scales,
    sums: &mut [[f32; WIDTH]; M],
    groups: &[Group; M],
) {
    let mut wholes = [[_mm256_setzero_si256(); 2]; M];
    for (i, weights) in weights.iter().enumerate() {
        for (wholes, group) in wholes.iter_mut().zip(groups) {
            let x = inputs(group, i);
            for (whole, &weight) in wholes.iter_mut().zip(weights) {
                *whole = _mm256_add_epi16(*whole, _mm256_maddubs_epi16(weight, x));
            }
        }
    }
    for wholes in wholes.as_flattened_mut() {
        *wholes = _mm256_madd_epi16(*wholes, _mm256_set1_epi16(1));
    }
    finish(&wholes, scales, sums, groups);
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn eight_bit_tile<const M: usize>(
    block: &EightBits,
    scales: &Scales,
    sums: &mut [[f32; WIDTH]; M],
    groups: &[Group; M],
) {
    let mut wholes = [[_mm256_setzero_si256(); 2]; M];
    for i in 0..8 {
        let weights = [load_signed(&block.values[i][0]), load_signed(&block.values[i][1])];
        let magnitudes = [_mm256_abs_epi8(weights[0]), _mm256_abs_epi8(weights[1])];
        for (wholes, group) in wholes.iter_mut().zip(groups) {
            let x = inputs(group, i);
            for half in 0..2 {
                // The weights' signs go to the activations, as one factor is taken to be unsigned.
                let signed = _mm256_sign_epi8(x, weights[half]);
                let pairs = _mm256_maddubs_epi16(magnitudes[half], signed);
                wholes[half] = _mm256_add_epi32(wholes[half], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
            }
        }
    }
    finish(&wholes, scales, sums, groups);
}

/// Adds a block's whole sums to `sums`, as what they stand for.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn finish<const M: usize>(
    wholes: &[[__m256i; 2]; M],
    scales: &Scales,
    sums: &mut [[f32; WIDTH]; M],
    groups: &[Group; M],
) {
    for ((wholes, sums), group) in wholes.iter().zip(sums).zip(groups) {
        let (halves, _) = sums.as_chunks_mut::<LANES>();
        for (half, sums) in halves.iter_mut().enumerate() {
            let scale = _mm256_mul_ps(scales.scales[half], _mm256_set1_ps(group.scale));
            // SAFETY: the array is as long as the vector; the read needs no alignment.
            let mut sum = unsafe { _mm256_loadu_ps(sums.as_ptr()) };
            sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(wholes[half]), scale, sum);
            if let Some(minima) = &scales.minima {
                sum = _mm256_fmadd_ps(minima[half], _mm256_set1_ps(group.sum), sum);
            }
            // SAFETY: as above, of the write.
            unsafe { _mm256_storeu_ps(sums.as_mut_ptr(), sum) };
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn load(vector: &[u8; BLOCK]) -> __m256i {
    // SAFETY: the array is as long as the vector; the read needs no alignment.
    unsafe { _mm256_loadu_si256(vector.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn load_signed(vector: &[i8; BLOCK]) -> __m256i {
    // SAFETY: the array is as long as the vector; the read needs no alignment.
    unsafe { _mm256_loadu_si256(vector.as_ptr().cast()) }
}

/// Four neighbouring inputs, in every lane.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn inputs(group: &Group, index: usize) -> __m256i {
    let (steps, _) = group.values.as_chunks::<STEP>();
    _mm256_set1_epi32(i32::from_le_bytes(steps[index].map(|value| value as u8)))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn widen(numbers: &[half::f16; LANES]) -> __m256 {
    // SAFETY: the array is as long as the vector, and of numbers of that format; the read needs no alignment.
    _mm256_cvtph_ps(unsafe { _mm_loadu_si128(numbers.as_ptr().cast()) })
}
