//! Products of bfloat16 numbers, for processors that have an instruction for them (AVX512_BF16).
//!
//! Weights and activations lie in pairs of neighbouring inputs. `vdpbf16ps` multiplies the pairs of 16 outputs at once and
//! adds both products to float32 sums; every sum is a chain of these in the order of the pairs, so a row's result does
//! not depend on the rows beside it.

use std::ops::Range;

use half::bf16;
use rayon::prelude::*;

use super::panels::{Aligned, in_turn};
use super::room;

/// Columns of a panel: three vectors of 16 sums, which eight rows keep in 24 of the 32 registers.
pub const WIDTH: usize = 48;
/// Most pairs of inputs that are multiplied before the next rows' turn: 192 KiB of a panel, which stay in the second-level
/// cache. Few enough for the first-level one would mean to load and store sums more often, which takes longer.
const DEPTH_BLOCK: usize = 1024;
/// Rows below which waking other threads costs more than it saves.
const ROWS_A_THREAD: usize = 16;

/// Two neighbours that are multiplied at once.
pub type Pair = [bf16; 2];

/// A packed matrix. The last panel is filled up with zeros, and so is an odd depth.
pub struct Bfloat16Panels {
    /// `[panels, pairs, WIDTH]`
    data: Aligned<Pair>,
    /// Inputs.
    pub depth: usize,
    /// Outputs: columns over all panels, without the filling.
    pub outputs: usize,
}

impl Bfloat16Panels {
    /// Whether this processor has the instruction.
    pub fn are_fast() -> bool {
        #[cfg(target_arch = "x86_64")]
        return avx512::is_there();
        #[cfg(not(target_arch = "x86_64"))]
        false
    }

    /// Packs rows of `depth` inputs, one an output.
    pub fn pack(rows: &[f32], depth: usize) -> Self {
        let outputs = rows.len() / depth;
        Self::build(outputs.div_ceil(WIDTH), outputs, depth, |panel| (rows, panel))
    }

    /// Packs two matrices of equal shape, a panel of `first` and the same panel of `second` in turn.
    pub fn pack_pairs(first: &[f32], second: &[f32], depth: usize) -> Self {
        let outputs = first.len() / depth;
        Self::build(2 * outputs.div_ceil(WIDTH), outputs, depth, in_turn(first, second))
    }

    /// `source` tells of each panel which matrix it is cut from, and the how-manieth of that matrix it is.
    fn build<'a>(
        count: usize,
        outputs: usize,
        depth: usize,
        source: impl Fn(usize) -> (&'a [f32], usize) + Sync,
    ) -> Self {
        let size = depth.div_ceil(2) * WIDTH;
        let mut data = Aligned::<Pair>::zeros(count * size);
        let panels = data.get_mut().par_chunks_exact_mut(size);
        panels.enumerate().for_each(|(index, panel)| {
            let (rows, nth) = source(index);
            for (column, row) in rows.chunks_exact(depth).skip(nth * WIDTH).take(WIDTH).enumerate() {
                for (input, &weight) in row.iter().enumerate() {
                    panel[input / 2 * WIDTH + column][input % 2] = bf16::from_f32(weight);
                }
            }
        });
        Self { data, depth, outputs }
    }

    /// Bytes of the weights.
    pub fn bytes(&self) -> usize {
        size_of_val(self.data.get())
    }

    /// Writes the weights of output `index` to `row`, as an embedding lookup wants them.
    pub fn gather(&self, index: usize, row: &mut [f32]) {
        let panel = self.panel(index / WIDTH);
        for (input, weight) in row.iter_mut().enumerate() {
            *weight = panel[input / 2][index % WIDTH][input % 2].to_f32();
        }
    }

    /// Panel `index` times some rows: `sums` becomes `[rows, WIDTH]`.
    pub fn multiply(&self, index: usize, x: &Activations, rows: Range<usize>, sums: &mut [f32]) {
        self.multiply_by(Self::are_fast(), index, x, rows, sums);
    }

    /// As [`Self::multiply`], by the instruction if `fast`, which has to be there.
    fn multiply_by(&self, fast: bool, index: usize, x: &Activations, rows: Range<usize>, sums: &mut [f32]) {
        assert!(!fast || Self::are_fast());
        let panel = self.panel(index);
        let pairs = panel.len();
        let x = &x.pairs[rows.start * pairs..rows.end * pairs];
        let (sums, _) = sums.as_chunks_mut::<WIDTH>();
        assert_eq!(x.len(), sums.len() * pairs);
        // Blocks of nearly equal depth, so that none is hardly worth its overhead.
        let block = pairs.div_ceil(pairs.div_ceil(DEPTH_BLOCK));
        for first in (0..pairs).step_by(block) {
            let weights = &panel[first..(first + block).min(pairs)];
            #[cfg(target_arch = "x86_64")]
            if fast {
                // SAFETY: the processor has what the function needs, by the assertion.
                unsafe { avx512::accumulate(weights, x, pairs, first, sums) };
                continue;
            }
            accumulate(weights, x, pairs, first, sums);
        }
    }

    fn panel(&self, index: usize) -> &[[Pair; WIDTH]] {
        let pairs = self.depth.div_ceil(2);
        let (panel, _) = self.data.get()[index * pairs * WIDTH..][..pairs * WIDTH].as_chunks();
        panel
    }
}

/// Rows of activations rounded to bfloat16.
pub struct Activations<'a> {
    /// `[rows, pairs]`
    pairs: &'a [Pair],
}

impl<'a> Activations<'a> {
    /// Rounds `x` (`[rows, depth]`) to the nearest, halves to even, in `buffer`.
    pub fn round(x: &[f32], depth: usize, buffer: &'a mut Vec<Pair>) -> Self {
        let per_row = depth.div_ceil(2);
        let pairs = room(buffer, x.len() / depth * per_row, [bf16::ZERO; 2]);
        pairs
            .par_chunks_exact_mut(per_row)
            .with_min_len(ROWS_A_THREAD)
            .zip(x.par_chunks_exact(depth))
            .for_each(|(pairs, x)| {
                // What an odd depth leaves over is multiplied by a zero: what stood here before might not be a number.
                pairs[per_row - 1][1] = bf16::ZERO;
                let numbers = &mut pairs.as_flattened_mut()[..depth];
                #[cfg(target_arch = "x86_64")]
                if avx512::is_there() {
                    // SAFETY: the processor has what the function needs.
                    return unsafe { avx512::round(x, numbers) };
                }
                round(x, numbers);
            });
        Self { pairs }
    }
}

fn round(x: &[f32], numbers: &mut [bf16]) {
    for (number, &x) in numbers.iter_mut().zip(x) {
        *number = bf16::from_f32(x);
    }
}

/// `sums[row] (+)= x[row][first..] * weights`, from zero where `first` is 0: `x` is `[rows, pairs]`. What the instruction
/// computes, for processors without it; those multiply in float32 faster, so only tests come here.
fn accumulate(weights: &[[Pair; WIDTH]], x: &[Pair], pairs: usize, first: usize, sums: &mut [[f32; WIDTH]]) {
    for (sums, x) in sums.iter_mut().zip(x.chunks_exact(pairs)) {
        if first == 0 {
            sums.fill(0.0);
        }
        for (weights, x) in weights.iter().zip(&x[first..]) {
            for (sum, weight) in sums.iter_mut().zip(weights) {
                // The instruction takes the second of a pair first. In float32 the products themselves are exact.
                *sum += x[1].to_f32() * weight[1].to_f32();
                *sum += x[0].to_f32() * weight[0].to_f32();
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub mod avx512 {
    use std::arch::x86_64::*;

    use half::bf16;

    use super::super::prefetch::prefetch_line;
    use super::super::tile::for_row_tiles;
    use super::{Pair, WIDTH};

    const LANES: usize = 16;
    const VECTORS: usize = WIDTH / LANES;
    const ROWS: usize = 8;

    /// Whether this processor runs it.
    pub fn is_there() -> bool {
        is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512bf16")
    }

    /// As the one for any processor, but that numbers below the normal ones become zero.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub fn round(x: &[f32], numbers: &mut [bf16]) {
        let ((x, last), (numbers, rest)) = (x.as_chunks::<LANES>(), numbers.as_chunks_mut::<LANES>());
        for (x, numbers) in x.iter().zip(numbers) {
            // SAFETY: the arrays are as long as the vectors; read and write need no alignment.
            unsafe {
                let rounded: __m256i = std::mem::transmute(_mm512_cvtneps_pbh(_mm512_loadu_ps(x.as_ptr())));
                _mm256_storeu_si256(numbers.as_mut_ptr().cast(), rounded);
            }
        }
        super::round(last, rest);
    }

    /// As the one for any processor, but that numbers below the normal ones count as zero.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub fn accumulate(weights: &[[Pair; WIDTH]], x: &[Pair], pairs: usize, first: usize, sums: &mut [[f32; WIDTH]]) {
        // What lies behind these weights is most often multiplied next. Each of the first tiles fetches one vector of every
        // pair's, or more where there are fewer tiles than vectors.
        let next = weights.as_ptr_range().end.cast::<[Pair; LANES]>();
        let (mut fetched, mut tiles) = (0, sums.len().div_ceil(ROWS));
        for_row_tiles!(ROWS, sums.len(), |row, MR| {
            let mut here: [&[Pair]; MR] = [&[]; MR];
            for (here, x) in here.iter_mut().zip(x[row * pairs..].chunks_exact(pairs)) {
                *here = &x[first..][..weights.len()];
            }
            let (sums, _) = sums[row..].as_chunks_mut::<MR>();
            let next = (fetched < VECTORS).then(|| next.wrapping_add(fetched * weights.len()));
            let fetch = (VECTORS - fetched).div_ceil(tiles);
            match fetch {
                VECTORS => tile::<MR, VECTORS>(weights, &here, &mut sums[0], first > 0, next),
                2 => tile::<MR, 2>(weights, &here, &mut sums[0], first > 0, next),
                _ => tile::<MR, 1>(weights, &here, &mut sums[0], first > 0, next),
            }
            (fetched, tiles) = (fetched + fetch, tiles - 1);
        });
    }

    /// `sums[row] (+)= x[row] * weights`, from zero unless it `goes_on`. For each pair `FETCH` vectors are fetched, from
    /// `next` on. The loop has hardly anything but products: processors that take two a cycle would wait for the rest.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    fn tile<const MR: usize, const FETCH: usize>(
        weights: &[[Pair; WIDTH]],
        x: &[&[Pair]; MR],
        sums: &mut [[f32; WIDTH]; MR],
        goes_on: bool,
        next: Option<*const [Pair; LANES]>,
    ) {
        assert!(x.iter().all(|x| x.len() == weights.len()));
        // Fetching one line again and again costs less than asking each time whether to.
        let (next, stride) = next.map_or((weights.as_ptr().cast(), 0), |next| (next, FETCH));
        let x = x.map(|x| x.as_ptr());
        let mut acc = [[_mm512_setzero_ps(); VECTORS]; MR];
        if goes_on {
            for (acc, sums) in acc.iter_mut().zip(&*sums) {
                for (acc, sums) in acc.iter_mut().zip(sums.as_chunks::<LANES>().0) {
                    // SAFETY: the array is as long as the vector; the read needs no alignment.
                    *acc = unsafe { _mm512_loadu_ps(sums.as_ptr()) };
                }
            }
        }
        for (k, weights) in weights.iter().enumerate() {
            for line in 0..FETCH {
                prefetch_line(next.wrapping_add(k * stride + line));
            }
            let (columns, _) = weights.as_chunks::<LANES>();
            // SAFETY: the array is as long as the vector; the read needs no alignment.
            let load = |v: usize| as_pairs(unsafe { _mm512_loadu_si512(columns[v].as_ptr().cast()) });
            let columns: [_; VECTORS] = [load(0), load(1), load(2)];
            for (acc, x) in acc.iter_mut().zip(x) {
                // SAFETY: each row is as long as the weights, by the assertion.
                let pair = broadcast(unsafe { *x.add(k) });
                for (acc, &column) in acc.iter_mut().zip(&columns) {
                    *acc = _mm512_dpbf16_ps(*acc, pair, column);
                }
            }
        }
        for (acc, sums) in acc.iter().zip(sums) {
            for (&acc, sums) in acc.iter().zip(sums.as_chunks_mut::<LANES>().0) {
                // SAFETY: as above, of the write.
                unsafe { _mm512_storeu_ps(sums.as_mut_ptr(), acc) };
            }
        }
    }

    /// The pair in every lane.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub fn broadcast(pair: Pair) -> __m512bh {
        let [low, high] = pair.map(|number| u32::from(number.to_bits()));
        as_pairs(_mm512_set1_epi32((high << 16 | low) as i32))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub fn as_pairs(bits: __m512i) -> __m512bh {
        // SAFETY: both are 512 bits of anything.
        unsafe { std::mem::transmute(bits) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::numbers;
    use super::*;

    #[test]
    fn every_output_is_found_again() {
        for (outputs, depth) in [(1, 1), (47, 3), (48, 5), (49, 2), (101, 7)] {
            let rows = numbers(outputs * depth, 31);
            let panels = Bfloat16Panels::pack(&rows, depth);
            for (output, exact) in rows.chunks_exact(depth).enumerate() {
                let mut row = vec![0.0; depth];
                panels.gather(output, &mut row);
                let exact: Vec<f32> = exact.iter().map(|&x| bf16::from_f32(x).to_f32()).collect();
                assert_eq!(row, exact, "output {output} of {outputs}");
            }
        }
    }

    /// Each product is what the same numbers give in float64, but for rounding to float32 along the way.
    #[test]
    fn products_of_rounded_numbers_are_exact_to_rounding() {
        for (outputs, depth, count) in [
            (1, 1, 1),
            (48, 16, 2),
            (49, 17, 5),
            (97, 600, 25),
            (16, 257, 8),
            (49, 2051, 9),
        ] {
            let (weights, x) = (numbers(outputs * depth, 32), numbers(count * depth, 33));
            let panels = Bfloat16Panels::pack(&weights, depth);
            // Of an earlier product that was no number.
            let mut buffer = vec![[bf16::NAN; 2]; count * depth];
            let rounded = Activations::round(&x, depth, &mut buffer);
            let exact = |row: usize, output: usize| {
                let pairs = x[row * depth..][..depth].iter().zip(&weights[output * depth..]);
                let products = pairs.map(|(&x, &w)| bf16::from_f32(x).to_f64() * bf16::from_f32(w).to_f64());
                products.sum::<f64>()
            };
            let ways = [false, true]
                .into_iter()
                .filter(|&fast| !fast || Bfloat16Panels::are_fast());
            for (panel, fast) in ways.flat_map(|fast| (0..outputs.div_ceil(WIDTH)).map(move |panel| (panel, fast))) {
                let mut sums = vec![f32::NAN; count * WIDTH];
                panels.multiply_by(fast, panel, &rounded, 0..count, &mut sums);
                for (at, &sum) in sums.iter().enumerate() {
                    let (row, output) = (at / WIDTH, panel * WIDTH + at % WIDTH);
                    let exact = if output < outputs { exact(row, output) } else { 0.0 };
                    assert!(
                        (f64::from(sum) - exact).abs() <= 1e-6 * depth as f64,
                        "row {row}, output {output} of {outputs} x {depth}, fast {fast}: {sum} is not {exact}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_row_is_the_same_in_any_batch() {
        let (depth, count) = (2500, 33);
        let panels = Bfloat16Panels::pack(&numbers(WIDTH * depth, 34), depth);
        let mut buffer = Vec::new();
        let x = Activations::round(&numbers(count * depth, 35), depth, &mut buffer);
        let product = |rows: Range<usize>| {
            let mut sums = vec![0.0; rows.len() * WIDTH];
            panels.multiply(0, &x, rows, &mut sums);
            sums
        };
        let all = product(0..count);
        for first in 0..count {
            assert!(product(first..count) == all[first * WIDTH..], "from row {first} on");
        }
    }

    #[test]
    fn what_is_not_finite_stays_in_its_row() {
        for bad in [f32::NAN, f32::INFINITY] {
            let mut x = numbers(3 * 8, 36);
            x[9] = bad;
            let panels = Bfloat16Panels::pack(&numbers(WIDTH * 8, 37), 8);
            let mut sums = vec![0.0; 3 * WIDTH];
            panels.multiply(0, &Activations::round(&x, 8, &mut Vec::new()), 0..3, &mut sums);
            for (row, sums) in sums.chunks_exact(WIDTH).enumerate() {
                assert!(sums.iter().all(|sum| sum.is_finite() == (row != 1)), "{bad}, row {row}");
            }
        }
    }
}
