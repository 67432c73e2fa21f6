//! Panels of whole numbers times activations in digits, for x86 processors with AVX-512 and its dot products of bytes (VNNI).
//!
//! `vpdpbusd` multiplies unsigned bytes, the weights, by signed ones, the digits, and adds four neighbouring products to a sum
//! in 32 bits.

use std::arch::x86_64::*;

use super::digits::{DIGITS, Group, LANES, Tile, WIDTH, above};
use super::{AHEAD, FACTORS, TILE, pairs};
use crate::cpu::prefetch::prefetch;
use crate::cpu::tile::for_row_tiles;

/// Rows whose sums are in registers at once. A dot product takes four or five cycles and one can start in each: so many
/// keep them busy.
const ROWS: usize = 8;

/// Words or factors of a panel's columns.
type Line = [[u32; LANES]; 2];

/// `sums` becomes `x` times the panel, whose values have so many bits; four times `STEPS` inputs share a scale.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub fn multiply<const BITS: usize, const STEPS: usize, const LEN: usize, const PAIRS: bool>(
    panel: &[u32],
    x: &[Tile<LEN>],
    sums: &mut [[f32; WIDTH]],
    buffer: &mut Vec<f32>,
) {
    const { assert!(LEN == 4 * STEPS) };
    let lines: &[Line] = panel.as_chunks().0.as_chunks().0;
    if PAIRS {
        buffer.resize(lines.len() / (STEPS / 2 + FACTORS) * WIDTH, 0.0);
    }
    let (of_zeros, _) = buffer.as_chunks_mut();
    for (index, (x, sums)) in x.iter().zip(sums.chunks_mut(TILE)).enumerate() {
        assert!(sums.len() <= x.scales.len());
        for_row_tiles!(ROWS, sums.len(), |first, MR| {
            for half in 0..2 {
                let begins = (index, first) == (0, 0);
                tile::<BITS, STEPS, LEN, PAIRS, MR>(lines, half, begins, x, first, sums, of_zeros);
            }
        });
    }
}

/// The products of one half of the columns and `M` rows from `first` on. If the panel `begins`, it is fetched on the way, and
/// what pairs need of each block is written to `of_zeros`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn tile<const BITS: usize, const STEPS: usize, const LEN: usize, const PAIRS: bool, const M: usize>(
    panel: &[Line],
    half: usize,
    begins: bool,
    x: &Tile<LEN>,
    first: usize,
    sums: &mut [[f32; WIDTH]],
    of_zeros: &mut [[f32; WIDTH]],
) {
    let words = BITS * LEN / 32;
    let mut acc = [_mm512_setzero_ps(); M];
    let groups = x.groups.chunks_exact(x.scales.len());
    for (index, (block, groups)) in panel.chunks_exact(words + FACTORS).zip(groups).enumerate() {
        if begins && half == 0 {
            prefetch(block.as_ptr().wrapping_add(AHEAD * block.len()), block.len());
        }
        let groups = &groups[first..][..M];
        let weights = unpack::<BITS, STEPS>(block, half);
        let [scales, minima] = [words, words + 1].map(|factors| _mm512_castsi512_ps(load(&block[factors][half])));
        if PAIRS {
            let of_zeros = &mut of_zeros[index].as_chunks_mut().0[half];
            if begins {
                pairs::multiply_zeros(&weights, of_zeros);
            }
            let wholes: [_; M] = pairs::products(&weights, groups, of_zeros);
            add(&wholes, groups, 1, scales, &mut acc);
        } else {
            add_digits::<BITS, STEPS, LEN, M>(&weights, groups, scales, &mut acc);
        }
        let minima = match BITS {
            4 => _mm512_fmadd_ps(scales, _mm512_set1_ps(above(BITS) as f32), minima),
            _ => minima,
        };
        for (acc, group) in acc.iter_mut().zip(groups) {
            *acc = _mm512_fmadd_ps(minima, _mm512_set1_ps(group.sum), *acc);
        }
    }
    for ((acc, sums), &scale) in acc.iter().zip(&mut sums[first..]).zip(&x.scales[first..]) {
        let sums = &mut sums.as_chunks_mut::<LANES>().0[half];
        // SAFETY: the array is as long as the vector; the write needs no alignment.
        unsafe { _mm512_storeu_ps(sums.as_mut_ptr(), _mm512_mul_ps(*acc, _mm512_set1_ps(scale))) };
    }
}

/// Adds a block's products, digit by digit.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn add_digits<const BITS: usize, const STEPS: usize, const LEN: usize, const M: usize>(
    weights: &[__m512i; STEPS],
    groups: &[Group<LEN>],
    scales: __m512,
    acc: &mut [__m512; M],
) {
    let mut wholes = [_mm512_setzero_si512(); M];
    for digit in 0..DIGITS {
        if BITS == 8 && digit == DIGITS - 1 {
            // With all three digits, sums of products with eight bits would not fit.
            add(&wholes, groups, 0, _mm512_mul_ps(scales, _mm512_set1_ps(256.0)), acc);
            wholes = [_mm512_setzero_si512(); M];
        } else if digit > 0 {
            for whole in &mut wholes {
                *whole = _mm512_slli_epi32::<8>(*whole);
            }
        }
        for (step, &weights) in weights.iter().enumerate() {
            for (whole, group) in wholes.iter_mut().zip(groups) {
                *whole = _mm512_dpbusd_epi32(*whole, weights, group.step(digit, step));
            }
        }
    }
    add(&wholes, groups, 1, scales, acc);
}

/// Adds whole sums, once they are lowered, as what they stand for.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn add<const LEN: usize, const M: usize>(
    wholes: &[__m512i; M],
    groups: &[Group<LEN>],
    which: usize,
    scales: __m512,
    acc: &mut [__m512; M],
) {
    for ((acc, &whole), group) in acc.iter_mut().zip(wholes).zip(groups) {
        let whole = _mm512_sub_epi32(whole, _mm512_set1_epi32(group.lower[which]));
        *acc = _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole), scales, *acc);
    }
}

/// A block's values as bytes, of four inputs each.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn unpack<const BITS: usize, const STEPS: usize>(block: &[Line], half: usize) -> [__m512i; STEPS] {
    let low = _mm512_set1_epi8(15);
    let mut weights = [low; STEPS];
    for (step, weights) in weights.iter_mut().enumerate() {
        *weights = match BITS {
            8 => load(&block[step][half]),
            _ if step % 2 == 0 => _mm512_and_si512(load(&block[step / 2][half]), low),
            _ => _mm512_and_si512(_mm512_srli_epi16::<4>(load(&block[step / 2][half])), low),
        };
    }
    weights
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn load(words: &[u32; LANES]) -> __m512i {
    // SAFETY: the array is as long as the vector; the read needs no alignment.
    unsafe { _mm512_loadu_si512(words.as_ptr().cast()) }
}
