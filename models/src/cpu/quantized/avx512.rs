//! The kernels for x86 processors with AVX-512 and its dot products of bytes (VNNI).
//!
//! `vpdpbusd` multiplies unsigned bytes by signed ones and adds four neighbouring products to a sum in 32 bits. Weights of
//! eight bits are made unsigned by adding 128 to each, so 128 times the sum of the activations is taken off.

use std::arch::x86_64::*;

use super::activations::{Group, Tile};
use super::panels::{EightBits, FourBits, STEP};
use super::{BLOCK, WIDTH};
use crate::cpu::prefetch::prefetch;
use crate::cpu::tile::for_row_tiles;

/// Rows whose sums of a block are in registers at once. A dot product takes four or five cycles and one or two can start in
/// each: so many keep them busy.
const ROWS: usize = 8;

/// How many blocks before its turn a block is fetched, whatever panel it belongs to.
const AHEAD: usize = 16;

/// Dot products of a block: four inputs each.
const STEPS: usize = BLOCK / STEP;

/// A panel's weights in one block, as unsigned bytes.
struct Weights {
    values: [__m512i; STEPS],
    scales: __m512,
    /// With four bits.
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
pub fn four_bits(panel: &[FourBits], x: Tile, sums: &mut [[f32; WIDTH]]) {
    for_row_tiles!(ROWS, x.rows, |first, MR| {
        tile::<_, MR>(panel, x, first, sums, |block| unpack(block));
    });
}

/// As [`super::portable::multiply`].
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub fn eight_bits(panel: &[EightBits], x: Tile, sums: &mut [[f32; WIDTH]]) {
    for_row_tiles!(ROWS, x.rows, |first, MR| {
        tile::<_, MR>(panel, x, first, sums, |block| shift(block));
    });
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn unpack(block: &FourBits) -> Weights {
    let low = _mm512_set1_epi8(15);
    let mut values = [low; STEPS];
    for (i, nibbles) in block.nibbles.iter().enumerate() {
        let nibbles = load(nibbles);
        values[i] = _mm512_and_si512(nibbles, low);
        values[i + 4] = _mm512_and_si512(_mm512_srli_epi16::<4>(nibbles), low);
    }
    Weights {
        values,
        scales: widen(&block.scales),
        minima: Some(widen(&block.minima)),
    }
}

/// Weights that are 128 too large.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn shift(block: &EightBits) -> Weights {
    // Turning the highest bit over adds 128.
    let mut values = [_mm512_set1_epi8(i8::MIN); STEPS];
    for (values, signed) in values.iter_mut().zip(&block.values) {
        *values = _mm512_xor_si512(*values, load(signed));
    }
    Weights {
        values,
        scales: widen(&block.scales),
        minima: None,
    }
}

/// Adds to the sums of `M` rows from `first` on.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn tile<B, const M: usize>(
    panel: &[B],
    x: Tile,
    first: usize,
    sums: &mut [[f32; WIDTH]],
    weights: impl Fn(&B) -> Weights,
) {
    let sums = &mut sums[first..][..M];
    let mut acc = [_mm512_setzero_ps(); M];
    for (acc, sums) in acc.iter_mut().zip(&*sums) {
        // SAFETY: the array is as long as the vector; the read needs no alignment.
        *acc = unsafe { _mm512_loadu_ps(sums.as_ptr()) };
    }
    for (block, groups) in panel.iter().zip(x.groups.chunks_exact(x.rows)) {
        // For few rows this costs more than it saves.
        if first == 0 && M == ROWS {
            prefetch(std::ptr::from_ref(block).wrapping_add(AHEAD), 1);
        }
        let weights = weights(block);
        let groups = &groups[first..][..M];
        let mut wholes = [_mm512_setzero_si512(); M];
        if weights.minima.is_none() {
            for (whole, group) in wholes.iter_mut().zip(groups) {
                let above = _mm512_slli_epi32::<7>(_mm512_set1_epi32(group.whole));
                *whole = _mm512_sub_epi32(*whole, above);
            }
        }
        for (i, &values) in weights.values.iter().enumerate() {
            for (whole, group) in wholes.iter_mut().zip(groups) {
                *whole = _mm512_dpbusd_epi32(*whole, values, inputs(group, i));
            }
        }
        for ((&whole, acc), group) in wholes.iter().zip(&mut acc).zip(groups) {
            let scale = _mm512_mul_ps(weights.scales, _mm512_set1_ps(group.scale));
            *acc = _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole), scale, *acc);
            if let Some(minima) = weights.minima {
                *acc = _mm512_fmadd_ps(minima, _mm512_set1_ps(group.sum), *acc);
            }
        }
    }
    for (acc, sums) in acc.iter().zip(sums) {
        // SAFETY: as above, of the write.
        unsafe { _mm512_storeu_ps(sums.as_mut_ptr(), *acc) };
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
