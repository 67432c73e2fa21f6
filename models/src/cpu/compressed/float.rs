//! Products in float32, for processors without dot products of bytes.

use pulp::Simd;

use super::{AHEAD, Compressed, CompressedPanels, FACTORS, offset, place, words};
use crate::cpu::linear::{accumulate, depth_block};
use crate::cpu::prefetch::prefetch;
use crate::cpu::stored::Format;
use crate::cpu::tile::for_row_tiles;

/// Rows of a tile with many registers, and with few.
const MANY: usize = 8;
const FEW: usize = 3;

/// Rows of a tile for which weights are unpacked: their sums fit into the registers beside what that takes.
const fn tile_rows<S: Simd>() -> usize {
    if S::REGISTER_COUNT >= 32 { MANY } else { FEW }
}

impl CompressedPanels {
    /// Panel `index` times `x`, whose first rows are multiplied while the weights are unpacked, and the others by what that
    /// leaves in `buffer`.
    #[inline(always)]
    pub(super) fn multiply_in_float32<S: Simd>(
        &self,
        simd: S,
        index: usize,
        x: &[f32],
        sums: &mut [f32],
        buffer: &mut Vec<f32>,
    ) {
        let (depth, tile) = (self.depth, tile_rows::<S>());
        let depth_block = depth_block(depth);
        for k in (0..depth).step_by(depth_block) {
            let weights = self.block(index, k, depth_block.min(depth - k));
            match sums.split_at_mut_checked(tile * self.width) {
                Some((sums, more)) if !more.is_empty() => {
                    let weights = weights.accumulate_and_widen(simd, x, depth, k, sums, buffer);
                    accumulate(simd, &x[tile * depth..], depth, k, weights, more);
                }
                _ => weights.accumulate(simd, x, depth, k, sums),
            }
        }
    }
}

impl Compressed<'_> {
    /// `sums[row] (+)= x[row][k..] * weights`, from zero where `k` is 0: `sums` `[rows, width]`, `x` `[rows, depth]`; at most
    /// [`tile_rows`].
    #[inline(always)]
    fn accumulate<S: Simd>(&self, simd: S, x: &[f32], depth: usize, k: usize, sums: &mut [f32]) {
        let columns = columns::<S>(sums);
        for_row_tiles!(tile_rows::<S>(), columns.len(), |first, MR| {
            let rows = Tile::<MR>::new(&x[first * depth..], depth, k);
            self.multiply::<S, MR, false>(simd, &rows, &mut columns[first..], &mut []);
        });
    }

    /// As [`Self::accumulate`], of exactly [`tile_rows`]; meanwhile the weights are written to `buffer` for more rows, as
    /// `[depth, width]` in float32.
    #[inline(always)]
    fn accumulate_and_widen<'a, S: Simd>(
        &self,
        simd: S,
        x: &[f32],
        depth: usize,
        k: usize,
        sums: &mut [f32],
        buffer: &'a mut Vec<f32>,
    ) -> &'a [f32] {
        buffer.resize(
            self.words.len() / (words(self.format) + FACTORS) * self.format.group(),
            0.0,
        );
        let (sums, wide) = (columns::<S>(sums), columns::<S>(buffer));
        match tile_rows::<S>() {
            MANY => self.multiply::<S, MANY, true>(simd, &Tile::new(x, depth, k), sums, wide),
            _ => self.multiply::<S, FEW, true>(simd, &Tile::new(x, depth, k), sums, wide),
        }
        buffer
    }

    /// If `WIDEN`, the weights are written to `wide`.
    #[inline(always)]
    fn multiply<S: Simd, const MR: usize, const WIDEN: bool>(
        &self,
        simd: S,
        rows: &Tile<MR>,
        sums: &mut [[S::f32s; 2]],
        wide: &mut [[S::f32s; 2]],
    ) {
        match self.format {
            Format::FourBy32 => multiply::<S, 4, 4, 32, MR, WIDEN>(simd, self.words, rows, sums, wide),
            Format::EightBy32 => multiply::<S, 8, 8, 32, MR, WIDEN>(simd, self.words, rows, sums, wide),
            Format::EightBy16 => multiply::<S, 8, 4, 16, MR, WIDEN>(simd, self.words, rows, sums, wide),
        }
    }
}

/// Some rows of activations, from an input on.
struct Tile<'a, const MR: usize> {
    rows: [&'a [f32]; MR],
    /// Whether sums begin here.
    first: bool,
}

impl<'a, const MR: usize> Tile<'a, MR> {
    /// `x` is `[rows, depth]`.
    #[inline(always)]
    fn new(x: &'a [f32], depth: usize, k: usize) -> Self {
        Self {
            rows: std::array::from_fn(|m| &x[m * depth..][k..depth]),
            first: k == 0,
        }
    }
}

/// Values have so many bits, a column's block so many words, and so many inputs share a scale.
#[inline(always)]
fn multiply<S: Simd, const BITS: usize, const WORDS: usize, const GROUP: usize, const MR: usize, const WIDEN: bool>(
    simd: S,
    words: &[u32],
    rows: &Tile<MR>,
    sums: &mut [[S::f32s; 2]],
    wide: &mut [[S::f32s; 2]],
) {
    let blocks = S::as_simd_u32s(words)
        .0
        .as_chunks::<2>()
        .0
        .chunks_exact(WORDS + FACTORS);
    let x: [&[[f32; GROUP]]; MR] = std::array::from_fn(|m| &rows.rows[m].as_chunks().0[..blocks.len()]);
    let mut wide = wide.chunks_exact_mut(32 / BITS);
    let mut acc = [[simd.splat_f32s(0.0); 2]; MR];
    if !rows.first {
        acc.copy_from_slice(&sums[..MR]);
    }
    for (index, block) in blocks.enumerate() {
        prefetch(block.as_ptr().wrapping_add(AHEAD * block.len()), block.len());
        let [scales, minima] = [block[WORDS], block[WORDS + 1]];
        let x: [&[f32; GROUP]; MR] = std::array::from_fn(|m| &x[m][index]);
        for (word, words) in block[..WORDS].iter().enumerate() {
            let mut wide = if WIDEN { wide.next() } else { None };
            for nth in 0..32 / BITS {
                let low = weight::<S, BITS>(simd, words[0], nth, scales[0], minima[0]);
                let high = weight::<S, BITS>(simd, words[1], nth, scales[1], minima[1]);
                if let Some(wide) = &mut wide {
                    wide[nth] = [low, high];
                }
                for (acc, x) in acc.iter_mut().zip(&x) {
                    let factor = simd.splat_f32s(x[32 / BITS * word + nth]);
                    acc[0] = simd.mul_add_f32s(factor, low, acc[0]);
                    acc[1] = simd.mul_add_f32s(factor, high, acc[1]);
                }
            }
        }
    }
    sums[..MR].copy_from_slice(&acc);
}

/// Rows of two vectors.
#[inline(always)]
fn columns<S: Simd>(rows: &mut [f32]) -> &mut [[S::f32s; 2]] {
    S::as_mut_simd_f32s(rows).0.as_chunks_mut().0
}

/// The weights of the `nth` input that `words` have.
#[inline(always)]
fn weight<S: Simd, const BITS: usize>(
    simd: S,
    words: S::u32s,
    nth: usize,
    scales: S::u32s,
    minima: S::u32s,
) -> S::f32s {
    // In the low bits of 2^23 as a float32 number, a whole number is added to it.
    const WHOLE: f32 = 8_388_608.0;
    let values = simd.wrapping_dyn_shr_u32s(words, simd.splat_u32s(place(BITS, nth) as u32));
    let values = simd.and_u32s(values, simd.splat_u32s((1 << BITS) - 1));
    let values = simd.transmute_f32s_u32s(simd.or_u32s(values, simd.splat_u32s(WHOLE.to_bits())));
    let values = simd.sub_f32s(values, simd.splat_f32s(WHOLE + offset(BITS) as f32));
    // The product has no more digits than float32, so that this is rounded once, as by a product and a sum.
    simd.mul_add_f32s(
        simd.transmute_f32s_u32s(scales),
        values,
        simd.transmute_f32s_u32s(minima),
    )
}

#[cfg(test)]
mod tests {
    use half::f16;
    use pulp::{Arch, Scalar, WithSimd};

    use super::*;
    use crate::cpu::numbers;
    use crate::cpu::stored::StoredMatrix;

    /// Products of a panel of each format, by as many rows as each way through takes.
    struct EveryFormat;

    impl WithSimd for EveryFormat {
        type Output = ();

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            for format in [Format::FourBy32, Format::EightBy32, Format::EightBy16] {
                for rows in 1..=tile_rows::<S>() {
                    Panel::new(format, 2 * S::F32_LANES).is_multiplied_as_it_stands(simd, rows);
                }
            }
        }
    }

    /// The second half of the inputs of the second of two panels, which lacks its last column.
    struct Panel {
        matrix: StoredMatrix,
        width: usize,
    }

    const DEPTH: usize = 128;
    const FROM: usize = DEPTH / 2;

    impl Panel {
        fn new(format: Format, width: usize) -> Self {
            let (outputs, group) = (2 * width - 1, format.group());
            let mut matrix = StoredMatrix::with_room(format, DEPTH, outputs * DEPTH);
            let lowest = if format.bits() == 4 { 0 } else { -128 };
            let mut values = (0i32..).map(|index| (lowest + index * 37 % (1 << format.bits())) as i8);
            for factors in numbers(2 * outputs * DEPTH / group, 41).chunks_exact(2) {
                // No more digits than a file's factors have.
                let factor = |number| f16::from_f32(number).to_f32();
                matrix.push(factor(factors[0]), factor(factors[1]), values.by_ref().take(group));
            }
            Self { matrix, width }
        }

        fn is_multiplied_as_it_stands<S: Simd>(&self, simd: S, rows: usize) {
            let panels = CompressedPanels::build(&self.matrix, 2, self.width, |panel| (&self.matrix, panel));
            let (x, before) = (numbers(rows * DEPTH, 42), numbers(rows * self.width, 43));
            let weights = panels.block(1, FROM, DEPTH - FROM);
            let mut sums = before.clone();
            weights.accumulate(simd, &x, DEPTH, FROM, &mut sums);
            assert_eq!(sums, self.sums(&x, &before), "{rows} rows in {:?}", self.matrix.format);
            if rows == tile_rows::<S>() {
                let (mut sums, mut buffer) = (before.clone(), vec![f32::NAN; 7]);
                let wide = weights.accumulate_and_widen(simd, &x, DEPTH, FROM, &mut sums, &mut buffer);
                assert_eq!(sums, self.sums(&x, &before), "{:?}", self.matrix.format);
                let expected: Vec<f32> = (FROM..DEPTH).flat_map(|k| self.column(k)).collect();
                assert_eq!(wide, expected, "{:?}", self.matrix.format);
            }
        }

        /// An input's weights.
        fn column(&self, k: usize) -> Vec<f32> {
            let weights = self.matrix.weights();
            let weight = |column| weights.get((self.width + column) * DEPTH + k).copied().unwrap_or(0.0);
            (0..self.width).map(weight).collect()
        }

        fn sums(&self, x: &[f32], before: &[f32]) -> Vec<f32> {
            let mut sums = before.to_vec();
            for (x, sums) in x.chunks_exact(DEPTH).zip(sums.chunks_exact_mut(self.width)) {
                for (k, x) in x.iter().enumerate().skip(FROM) {
                    for (sum, weight) in sums.iter_mut().zip(self.column(k)) {
                        *sum = x.mul_add(weight, *sum);
                    }
                }
            }
            sums
        }
    }

    /// With vectors of every length that this processor has.
    #[test]
    fn weights_are_multiplied_and_widened_as_they_stand() {
        Arch::new().dispatch(EveryFormat);
        Scalar.vectorize(EveryFormat);
        #[cfg(target_arch = "x86_64")]
        if let Some(simd) = pulp::x86::V3::try_new() {
            Simd::vectorize(simd, EveryFormat);
        }
    }
}
