//! Attention's two products with keys and values in bfloat16, read where they lie in the pools, for processors that have
//! an instruction for pairs of such numbers (AVX512_BF16). Queries are rounded to bfloat16 for it, and probabilities become
//! sums of two such numbers each: with one alone, as on GPUs, the default model's perplexity on text of its own is 1.012
//! times float32's, not 1.007.
//!
//! Pairs are neighbouring dimensions of a query and a key, and neighbouring positions, even ones first, of probabilities
//! and values. A row's result is a chain of these in their order, whatever rows are beside it.

use std::arch::x86_64::*;

use half::bf16;

use super::attention_kernel::Next;
use super::bfloat16::Pair;
use super::bfloat16::avx512::{self, as_pairs, broadcast, is_there};
use super::tile::for_row_tiles;

const LANES: usize = 16;
/// Rows of a tile: of two vectors each they take 24 of the 32 registers.
const ROWS: usize = 12;

/// Whether the processor runs it, and rows and blocks are whole vectors.
pub fn fits(head_dim: usize, block_size: usize) -> bool {
    is_there() && head_dim.is_multiple_of(2 * LANES) && block_size.is_multiple_of(LANES)
}

/// One head's keys or values: blocks that lie anywhere in a pool.
pub struct Blocks<'a> {
    pub pool: &'a [bf16],
    /// Where each begins.
    pub starts: &'a [usize],
    /// What is read next: it is fetched meanwhile.
    pub next: Next<'a, bf16>,
    /// Positions of a block.
    pub size: usize,
    pub head_dim: usize,
}

/// Which columns of a row of scores belong to the positions of the blocks.
#[derive(Clone, Copy)]
pub struct Columns {
    /// One past the last; the first is 0.
    pub end: usize,
    /// From one row to the next; whole vectors.
    pub stride: usize,
}

/// Appends a row of an even number of columns to `pairs`: `[columns / 2]`.
pub fn round(row: &[f32], pairs: &mut Vec<Pair>) {
    assert!(is_there());
    let before = pairs.len();
    pairs.resize(before + row.len() / 2, [bf16::ZERO; 2]);
    // SAFETY: the processor has what the function needs, by the assertion; so below.
    unsafe { avx512::round(row, pairs[before..].as_flattened_mut()) };
}

/// Appends a row of whole vectors to `pairs`, as sums: `[2, columns / 2]`.
pub fn split(row: &[f32], pairs: &mut Vec<Pair>) {
    assert!(is_there());
    let before = pairs.len();
    pairs.resize(before + row.len(), [bf16::ZERO; 2]);
    // SAFETY: as above.
    unsafe { split_row(row, pairs[before..].as_flattened_mut()) };
}

/// `scores[row][column] = query . key`: queries are `[rows, head_dim / 2]`, keys `[head_dim, size]` a block. The last block's
/// scores go on behind the last column.
pub fn score(keys: &Blocks, queries: &[Pair], columns: Columns, scores: &mut [f32]) {
    assert!(is_there());
    // SAFETY: as above.
    unsafe { score_blocks(keys, queries, columns, scores) }
}

/// `sums[row] = sum over columns of probability * value`: probabilities are `[rows, 2, stride / 2]`, values `[size, head_dim]`
/// a block, sums `[rows, head_dim]`.
pub fn weigh(values: &Blocks, probabilities: &[Pair], columns: Columns, sums: &mut [f32]) {
    assert!(is_there());
    // SAFETY: as above.
    unsafe { weigh_blocks(values, probabilities, columns, sums) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn split_row(row: &[f32], numbers: &mut [bf16]) {
    let (high, low) = numbers.split_at_mut(row.len());
    let (high, low) = (high.as_chunks_mut::<LANES>().0, low.as_chunks_mut::<LANES>().0);
    for ((row, high), low) in row.as_chunks::<LANES>().0.iter().zip(high).zip(low) {
        avx512::round(row, high);
        let mut rest = *row;
        for (rest, high) in rest.iter_mut().zip(high) {
            *rest -= f32::from_bits(u32::from(high.to_bits()) << 16);
        }
        avx512::round(&rest, low);
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn score_blocks(keys: &Blocks, queries: &[Pair], columns: Columns, scores: &mut [f32]) {
    let vectors = keys.starts.len() * (keys.size / LANES);
    // Half as many rows leave registers for twice as many vectors.
    let few = queries.len() <= ROWS / 2 * (keys.head_dim / 2);
    let mut vector = 0;
    while few && vector + 4 <= vectors {
        score_vectors::<4>(keys, queries, vector, columns, scores);
        vector += 4;
    }
    while vector + 2 <= vectors {
        score_vectors::<2>(keys, queries, vector, columns, scores);
        vector += 2;
    }
    if vector < vectors {
        score_vectors::<1>(keys, queries, vector, columns, scores);
    }
}

/// As [`score_blocks`], for `NV` vectors of keys from `vector` on, counted over all blocks.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn score_vectors<const NV: usize>(
    keys: &Blocks,
    queries: &[Pair],
    vector: usize,
    columns: Columns,
    scores: &mut [f32],
) {
    let (pairs, per_block) = (keys.head_dim / 2, keys.size / LANES);
    keys.next.fetch(
        vector.div_ceil(per_block)..(vector + NV).div_ceil(per_block),
        0..keys.size * keys.head_dim,
    );
    let mut panels = [std::ptr::null(); NV];
    for (v, panel) in panels.iter_mut().enumerate() {
        let (block, within) = ((vector + v) / per_block, (vector + v) % per_block * LANES);
        let numbers = &keys.pool[keys.starts[block] + within..][..(keys.head_dim - 1) * keys.size + LANES];
        *panel = numbers.as_ptr();
    }
    let column = vector * LANES;
    for_row_tiles!(ROWS, queries.len() / pairs, |first, MR| {
        let queries = queries[first * pairs..][..MR * pairs].as_ptr();
        let mut acc = [[_mm512_setzero_ps(); NV]; MR];
        for k in 0..pairs {
            let mut keys_here = [as_pairs(_mm512_setzero_si512()); NV];
            for (key, panel) in keys_here.iter_mut().zip(panels) {
                // SAFETY: each panel reaches to the vector of its last dimension, which is `2 * pairs - 1`.
                *key = unsafe {
                    let low = panel.add(2 * k * keys.size);
                    side_by_side(low, low.add(keys.size))
                };
            }
            for (m, acc) in acc.iter_mut().enumerate() {
                // SAFETY: there are `MR` queries of `pairs` pairs.
                let query = broadcast(unsafe { *queries.add(m * pairs + k) });
                for (acc, key) in acc.iter_mut().zip(keys_here) {
                    *acc = _mm512_dpbf16_ps(*acc, query, key);
                }
            }
        }
        for (m, acc) in acc.iter().enumerate() {
            let (to, _) = scores[(first + m) * columns.stride + column..][..NV * LANES].as_chunks_mut::<LANES>();
            for (to, &acc) in to.iter_mut().zip(acc) {
                // SAFETY: the array is as long as the vector; the write needs no alignment.
                unsafe { _mm512_storeu_ps(to.as_mut_ptr(), acc) };
            }
        }
    });
}

#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn weigh_blocks(values: &Blocks, probabilities: &[Pair], columns: Columns, sums: &mut [f32]) {
    let dim = values.head_dim;
    // As above; a row of values then is read once.
    let few = sums.len() <= ROWS / 2 * dim;
    let mut dimension = 0;
    while few && dimension + 4 * LANES <= dim {
        weigh_dimensions::<2>(values, probabilities, dimension, columns, sums);
        dimension += 4 * LANES;
    }
    while dimension < dim {
        weigh_dimensions::<1>(values, probabilities, dimension, columns, sums);
        dimension += 2 * LANES;
    }
}

/// As [`weigh_blocks`], for `DOUBLES` double vectors of dimensions from `dimension` on.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn weigh_dimensions<const DOUBLES: usize>(
    values: &Blocks,
    probabilities: &[Pair],
    dimension: usize,
    columns: Columns,
    sums: &mut [f32],
) {
    let (dim, stride) = (values.head_dim, columns.stride / 2);
    for_row_tiles!(ROWS, sums.len() / dim, |first, MR| {
        let weights = &probabilities[2 * first * stride..][..2 * MR * stride];
        let mut acc = [[[_mm512_setzero_ps(); 2]; DOUBLES]; MR];
        for (index, start) in values.starts.iter().enumerate() {
            if first == 0 && dimension == 0 {
                values.next.fetch(index..index + 1, 0..values.size * dim);
            }
            let column = index * values.size;
            let depth = values.size.min(columns.end - column);
            let block = &values.pool[start + dimension..][..(depth - 1) * dim + DOUBLES * 2 * LANES];
            assert!(column / 2 + depth.div_ceil(2) <= stride);
            for k in 0..depth.div_ceil(2) {
                let mut here = [[as_pairs(_mm512_setzero_si512()); 2]; DOUBLES];
                for (two, here) in here.iter_mut().enumerate() {
                    // SAFETY: `block` reaches to the last vector of its row `depth - 1`; a row behind it is not read.
                    *here = unsafe {
                        let low = block.as_ptr().add(2 * k * dim + two * 2 * LANES);
                        one_above_the_other(low, (2 * k + 1 < depth).then(|| low.add(dim)))
                    };
                }
                for (m, acc) in acc.iter_mut().enumerate() {
                    // SAFETY: there are `MR` rows of twice `stride` pairs, and by the assertion pair `k` is among them.
                    let (high, low) = unsafe {
                        let high = weights.as_ptr().add(2 * m * stride + column / 2 + k);
                        (broadcast(*high), broadcast(*high.add(stride)))
                    };
                    for (acc, &value) in acc.as_flattened_mut().iter_mut().zip(here.as_flattened()) {
                        *acc = _mm512_dpbf16_ps(_mm512_dpbf16_ps(*acc, high, value), low, value);
                    }
                }
            }
        }
        for (m, acc) in acc.iter().enumerate() {
            let to = &mut sums[(first + m) * dim + dimension..][..DOUBLES * 2 * LANES];
            for (to, &acc) in to.as_chunks_mut::<LANES>().0.iter_mut().zip(acc.as_flattened()) {
                // SAFETY: as in `score_vectors`.
                unsafe { _mm512_storeu_ps(to.as_mut_ptr(), acc) };
            }
        }
    });
}

/// Pairs of a number of `low` and the one of `high` in the same place.
///
/// # Safety
/// Both must be readable for a vector's `LANES` numbers; they need not be aligned.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn side_by_side(low: *const bf16, high: *const bf16) -> __m512bh {
    const ORDER: [u16; 2 * LANES] = alternating(0, 16);
    // SAFETY: in bounds by this function's contract; the order's array is as long as the vector.
    let (low, high, order) = unsafe {
        (
            _mm256_loadu_si256(low.cast()),
            _mm256_loadu_si256(high.cast()),
            _mm512_loadu_si512(ORDER.as_ptr().cast()),
        )
    };
    let both = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high);
    as_pairs(_mm512_permutexvar_epi16(order, both))
}

/// As [`side_by_side`], of two vectors in each row. What is not there counts as zeros.
///
/// # Safety
/// Both must be readable for `2 * LANES` numbers; they need not be aligned.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn one_above_the_other(low: *const bf16, high: Option<*const bf16>) -> [__m512bh; 2] {
    const ORDERS: [[u16; 2 * LANES]; 2] = [alternating(0, 32), alternating(16, 48)];
    // SAFETY: in bounds by this function's contract.
    let low = unsafe { _mm512_loadu_si512(low.cast()) };
    let high = match high {
        // SAFETY: as above.
        Some(high) => unsafe { _mm512_loadu_si512(high.cast()) },
        None => _mm512_setzero_si512(),
    };
    ORDERS.map(|order| {
        // SAFETY: the array is as long as the vector; the read needs no alignment.
        let order = unsafe { _mm512_loadu_si512(order.as_ptr().cast()) };
        as_pairs(_mm512_permutex2var_epi16(low, order, high))
    })
}

/// The numbers from `even` on and those from `odd` on, in turn.
const fn alternating(even: u16, odd: u16) -> [u16; 2 * LANES] {
    let mut order = [0; 2 * LANES];
    let mut lane = 0;
    while lane < LANES {
        order[2 * lane] = even + lane as u16;
        order[2 * lane + 1] = odd + lane as u16;
        lane += 1;
    }
    order
}
