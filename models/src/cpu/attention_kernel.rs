//! Attention of one tile: some consecutive queries of one sequence, in the query heads that share one KV head.

use std::ops::Range;

use half::{bf16, f16};
use pulp::{Simd, WithSimd};

use super::attention::{Attention, Queries};
#[cfg(target_arch = "x86_64")]
use super::attention_bfloat16;
#[cfg(target_arch = "x86_64")]
use super::bfloat16::Pair;
use super::prefetch::prefetch;
use super::tile::{for_row_tiles, multiply, tile_rows};
use super::{Stripes, math};

/// Scores of a row are summed in this many interleaved sums, by position.
const LANES: usize = 16;

/// What a KV cache may hold.
pub trait Element: Copy + Send + Sync + candle_core::WithDType {
    fn widen(self) -> f32;

    /// The elements themselves, where they are float32 already.
    fn float32(data: &[Self]) -> Option<&[f32]>;

    /// The elements themselves, where they are bfloat16.
    #[cfg(target_arch = "x86_64")]
    fn bfloat16(_: &[Self]) -> Option<&[bf16]> {
        None
    }
}

impl Element for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    fn float32(data: &[Self]) -> Option<&[f32]> {
        Some(data)
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits((self.to_bits() as u32) << 16)
    }

    fn float32(_: &[Self]) -> Option<&[f32]> {
        None
    }

    #[cfg(target_arch = "x86_64")]
    fn bfloat16(data: &[Self]) -> Option<&[bf16]> {
        Some(data)
    }
}

impl Element for f16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self.to_f32()
    }

    fn float32(_: &[Self]) -> Option<&[f32]> {
        None
    }
}

/// Buffers that a thread uses again for its next tile.
#[derive(Default)]
pub struct Scratch {
    /// `[queries * group, stride]`: scores, then probabilities.
    scores: Vec<f32>,
    /// 1 / sum of each row.
    scales: Vec<f32>,
    keys: Blocks,
    values: Blocks,
    /// Where the blocks begin in pools of bfloat16 numbers that are read as they are.
    #[cfg(target_arch = "x86_64")]
    starts: Vec<usize>,
    /// Where those of the next tile begin.
    next: Vec<usize>,
    /// Queries, then probabilities, in pairs.
    #[cfg(target_arch = "x86_64")]
    pairs: Vec<Pair>,
    /// What the latter give: `[rows, head_dim]`.
    #[cfg(target_arch = "x86_64")]
    sums: Vec<f32>,
}

/// Floats of a copy of blocks that are kept for later: 16 MiB, the keys of 65,536 positions in heads of 64 dimensions.
const KEPT: usize = 4 << 20;

impl Scratch {
    /// Gives back copies of long contexts, which else would stay with the thread for good.
    pub fn shrink(&mut self) {
        for Blocks { copy, .. } in [&mut self.keys, &mut self.values] {
            if copy.capacity() > KEPT {
                *copy = Vec::new();
            }
        }
    }
}

/// Most blocks that are fetched at once where the next tile reads more of them than this one.
const MORE: usize = 32;
/// Dimensions of keys that are fetched for the next tile, and then multiplied in this one, at a time: only few lines can be
/// on their way at once, and products would wait behind those of a whole block.
const DIMENSIONS: usize = 8;
/// The same for values, in positions.
const POSITIONS: usize = 4;

/// The blocks in a pool that the next tile reads. They are fetched while this one computes: what of a head lies together is
/// too short for the processor to guess where it goes on.
#[derive(Clone, Copy)]
pub struct Next<'a, T> {
    pool: &'a [T],
    /// Where each begins.
    starts: &'a [usize],
    /// Blocks of this tile.
    now: usize,
}

impl<T> Next<'_, T> {
    /// Fetches these elements of each block of the next tile in whose place this tile has one of `blocks`, and with this
    /// tile's last block of up to [`MORE`] blocks behind it.
    #[inline(always)]
    pub fn fetch(&self, blocks: Range<usize>, elements: Range<usize>) {
        let more = if blocks.end < self.now { 0 } else { MORE };
        let count = if blocks.is_empty() { 0 } else { blocks.len() + more };
        for &start in self.starts.iter().skip(blocks.start).take(count) {
            prefetch(self.pool[start + elements.start..].as_ptr(), elements.len());
        }
    }
}

/// One head's part of the blocks that a tile reads, in rows of whole vectors.
#[derive(Default)]
struct Blocks {
    /// Where each block begins, in the pool or in `copy`.
    starts: Vec<usize>,
    /// Filled where the pool's own rows are of another type or no whole vectors.
    copy: Vec<f32>,
    /// Floats from one row to the next.
    stride: usize,
    copied: bool,
}

impl Blocks {
    /// Finds blocks of `rows` rows of `width` in the pool, `indices` counting such blocks.
    #[inline(always)]
    fn find<T: Element>(
        &mut self,
        pool: &[T],
        indices: impl Iterator<Item = usize>,
        [rows, width]: [usize; 2],
        lanes: usize,
    ) {
        self.starts.clear();
        self.copy.clear();
        self.copied = T::float32(pool).is_none() || width % lanes != 0;
        self.stride = width.next_multiple_of(lanes);
        for index in indices {
            let block = &pool[index * rows * width..][..rows * width];
            if !self.copied {
                self.starts.push(index * rows * width);
                continue;
            }
            let start = self.copy.len();
            self.starts.push(start);
            self.copy.resize(start + rows * self.stride, 0.0);
            for (to, from) in self.copy[start..]
                .chunks_exact_mut(self.stride)
                .zip(block.chunks_exact(width))
            {
                to.iter_mut().zip(from).for_each(|(to, from)| *to = from.widen());
            }
        }
    }

    fn data<'a, T: Element>(&'a self, pool: &'a [T]) -> &'a [f32] {
        match T::float32(pool) {
            Some(pool) if !self.copied => pool,
            _ => &self.copy,
        }
    }
}

/// A half of the KV cache as a tile reads it in float32.
#[derive(Clone, Copy)]
struct Read<'a, T> {
    blocks: &'a Blocks,
    data: &'a [f32],
    next: Next<'a, T>,
}

/// One tile's task.
pub struct Tile<'a, T> {
    pub attention: &'a Attention<'a>,
    pub queries: Queries<'a>,
    /// The KV head.
    pub head: usize,
    /// The queries and the KV head of the next tile.
    pub then: Option<&'a (Queries<'a>, usize)>,
    pub qkv: &'a [f32],
    pub width: usize,
    pub keys: &'a [T],
    pub values: &'a [T],
    pub block_size: usize,
    pub out: Stripes,
    pub scratch: &'a mut Scratch,
}

/// The positions that a tile attends to, and the columns that their scores take.
#[derive(Clone, Copy)]
struct Positions {
    /// First position of the first block that is read.
    block: usize,
    /// Position of column 0: a multiple of `LANES`.
    origin: usize,
    /// One past the last position.
    end: usize,
    /// Columns of a row of scores, its slack included.
    stride: usize,
}

impl<T: Element> WithSimd for Tile<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let mut scratch = std::mem::take(self.scratch);
        scratch.next.clear();
        if let Some((queries, head)) = self.then {
            let block = self.block_size * self.attention.head_dim;
            let read = self.blocks(queries, *head, self.positions(queries, 0));
            scratch.next.extend(read.map(|index| index * block));
        }
        #[cfg(target_arch = "x86_64")]
        let done = self.attend_in_bfloat16(&mut scratch);
        #[cfg(not(target_arch = "x86_64"))]
        let done = false;
        if !done {
            self.attend(simd, &mut scratch);
        }
        *self.scratch = scratch;
    }
}

impl<T: Element> Tile<'_, T> {
    /// In float32, to which keys and values of other types are widened.
    #[inline(always)]
    fn attend<S: Simd>(&self, simd: S, scratch: &mut Scratch) {
        let (size, dim, lanes) = (self.block_size, self.attention.head_dim, S::F32_LANES);
        let positions = self.positions(&self.queries, lanes);
        let Scratch {
            scores,
            scales,
            keys,
            values,
            next,
            ..
        } = scratch;
        scores.resize(self.rows() * positions.stride, 0.0);
        keys.find(
            self.keys,
            self.blocks(&self.queries, self.head, positions),
            [dim, size],
            lanes,
        );
        values.find(
            self.values,
            self.blocks(&self.queries, self.head, positions),
            [size, dim],
            lanes,
        );
        let keys = self.read(self.keys, keys, next);
        self.score(simd, keys, positions, scores);
        self.softmax(positions, scores, scales);
        let pairs = values.stride % (2 * lanes) == 0;
        let values = self.read(self.values, values, next);
        if pairs {
            self.weigh::<S, 2>(simd, values, positions, scores, scales);
        } else {
            self.weigh::<S, 1>(simd, values, positions, scores, scales);
        }
    }

    /// With queries and probabilities in bfloat16, if keys and values are and the processor multiplies such; answers whether.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn attend_in_bfloat16(&self, scratch: &mut Scratch) -> bool {
        let (size, head_dim) = (self.block_size, self.attention.head_dim);
        let (Some(keys), Some(values)) = (T::bfloat16(self.keys), T::bfloat16(self.values)) else {
            return false;
        };
        if !attention_bfloat16::fits(head_dim, size) {
            return false;
        }
        let positions = self.positions(&self.queries, 0);
        let Scratch {
            scores,
            scales,
            starts,
            next,
            pairs,
            sums,
            ..
        } = scratch;
        starts.clear();
        starts.extend(
            self.blocks(&self.queries, self.head, positions)
                .map(|index| index * size * head_dim),
        );
        let blocks = |pool| attention_bfloat16::Blocks {
            pool,
            starts,
            next: Next {
                pool,
                starts: next,
                now: starts.len(),
            },
            size,
            head_dim,
        };
        let columns = attention_bfloat16::Columns {
            end: positions.end - positions.origin,
            stride: positions.stride,
        };
        pairs.clear();
        for row in 0..self.rows() {
            attention_bfloat16::round(&self.qkv[self.place(row).0..][..head_dim], pairs);
        }
        scores.resize(self.rows() * positions.stride, 0.0);
        attention_bfloat16::score(&blocks(keys), pairs, columns, scores);
        self.softmax(positions, scores, scales);
        pairs.clear();
        for scores in scores.chunks_exact(positions.stride) {
            attention_bfloat16::split(scores, pairs);
        }
        sums.resize(self.rows() * head_dim, 0.0);
        attention_bfloat16::weigh(&blocks(values), pairs, columns, sums);
        for (row, (sums, scale)) in sums.chunks_exact(head_dim).zip(&*scales).enumerate() {
            // SAFETY: each tile has its own rows and heads, so its own places in the result.
            let out = unsafe { self.out.part(self.place(row).1, head_dim) };
            for (to, sum) in out.iter_mut().zip(sums) {
                *to = sum * scale;
            }
        }
        true
    }

    /// A head's blocks that are read, counted over all heads.
    #[inline(always)]
    fn blocks(&self, queries: &Queries, head: usize, positions: Positions) -> impl Iterator<Item = usize> {
        let range = positions.block / self.block_size..positions.end.div_ceil(self.block_size);
        let table = queries.block_table[range].iter();
        table.map(move |&block| block as usize * self.attention.kv_heads + head)
    }

    fn read<'b>(&self, pool: &'b [T], blocks: &'b Blocks, next: &'b [usize]) -> Read<'b, T> {
        Read {
            blocks,
            data: blocks.data(pool),
            next: Next {
                pool,
                starts: next,
                now: blocks.starts.len(),
            },
        }
    }

    fn rows(&self) -> usize {
        self.queries.len * self.group()
    }

    fn group(&self) -> usize {
        self.attention.heads / self.attention.kv_heads
    }

    /// First position that the query at `position` attends to.
    fn window_start(&self, position: usize) -> usize {
        self.attention
            .window
            .map_or(0, |window| (position + 1).saturating_sub(window))
    }

    fn positions(&self, queries: &Queries, slack: usize) -> Positions {
        let start = self.window_start(queries.start);
        let block = start - start % self.block_size;
        let origin = block - block % LANES;
        let end = queries.start + queries.len;
        // The last block is written whole, and to whole vectors.
        let columns = end.next_multiple_of(self.block_size) - origin + slack;
        Positions {
            block,
            origin,
            end,
            stride: columns.next_multiple_of(LANES),
        }
    }

    /// Where row `row` of the tile (query by query, the group's heads of each) has its query, and its result.
    fn place(&self, row: usize) -> (usize, usize) {
        let (query, head) = (
            self.queries.row + row / self.group(),
            self.head * self.group() + row % self.group(),
        );
        let Attention { heads, head_dim, .. } = *self.attention;
        (query * self.width + head * head_dim, (query * heads + head) * head_dim)
    }

    /// `scores[row][position - origin] = query . key`, two vectors of keys at a time, be they of one block or of two.
    #[inline(always)]
    fn score<S: Simd>(&self, simd: S, keys: Read<T>, positions: Positions, scores: &mut [f32]) {
        let vectors = keys.blocks.starts.len() * (keys.blocks.stride / S::F32_LANES);
        for first in (0..vectors).step_by(2) {
            if first + 1 < vectors {
                self.score_vectors::<S, 2>(simd, keys, first, positions, scores);
            } else {
                self.score_vectors::<S, 1>(simd, keys, first, positions, scores);
            }
        }
    }

    /// As [`Self::score`], for `NV` vectors of keys from `vector` on, counted over all blocks.
    #[inline(always)]
    fn score_vectors<S: Simd, const NV: usize>(
        &self,
        simd: S,
        keys: Read<T>,
        vector: usize,
        positions: Positions,
        scores: &mut [f32],
    ) {
        let Read {
            blocks: keys,
            data,
            next,
        } = keys;
        let (rows, dim) = (self.rows(), self.attention.head_dim);
        let (lanes, per_block) = (S::F32_LANES, keys.stride / S::F32_LANES);
        let places: [_; NV] = std::array::from_fn(|v| ((vector + v) / per_block, (vector + v) % per_block * lanes));
        let fetched = vector.div_ceil(per_block)..(vector + NV).div_ceil(per_block);
        let panels = places.map(|(block, within)| {
            let panel = &data[keys.starts[block] + within..][..(dim - 1) * keys.stride + lanes];
            panel.as_ptr()
        });
        let columns =
            places.map(|(block, within)| positions.block + block * self.block_size + within - positions.origin);
        for_row_tiles!(tile_rows::<S>(), rows, |first, MR| {
            let a: [_; MR] = std::array::from_fn(|m| self.qkv[self.place(first + m).0..][..dim].as_ptr());
            let mut acc = [[simd.splat_f32s(0.0); NV]; MR];
            for k in (0..dim).step_by(DIMENSIONS) {
                let count = DIMENSIONS.min(dim - k);
                if first == 0 {
                    next.fetch(fetched.clone(), k * self.block_size..(k + count) * self.block_size);
                }
                let a = a.map(|a| a.wrapping_add(k));
                let panels = panels.map(|panel| panel.wrapping_add(k * keys.stride));
                // SAFETY: every query has `dim` floats, `count` of them from `k` on; each panel reaches to its last row's
                // vector.
                unsafe { multiply(simd, count, &a, &panels, keys.stride, &mut acc) };
            }
            for (m, acc) in acc.iter().enumerate() {
                let row = &mut scores[(first + m) * positions.stride..][..positions.stride];
                // In order: where a block is no whole vector, the next one's scores overwrite what was too much.
                for (&column, &scores) in columns.iter().zip(acc) {
                    S::as_mut_simd_f32s(&mut row[column..][..lanes]).0[0] = scores;
                }
            }
        });
    }

    /// Turns each row of scores into `e^(score - maximum)`, 0 where the query may not look, and sets its scale: 1 / their sum.
    #[inline(always)]
    fn softmax(&self, positions: Positions, scores: &mut [f32], scales: &mut Vec<f32>) {
        scales.clear();
        // Loops, not closures: a closure need not be compiled for the vector instructions chosen here.
        for (row, scores) in scores.chunks_exact_mut(positions.stride).enumerate() {
            scales.push(self.softmax_row(row, positions, scores));
        }
    }

    #[inline(always)]
    fn softmax_row(&self, row: usize, positions: Positions, scores: &mut [f32]) -> f32 {
        let position = self.queries.start + row / self.group();
        let seen = self.window_start(position) - positions.origin..position + 1 - positions.origin;
        let scores = &mut scores[..(positions.end - positions.origin).next_multiple_of(LANES)];
        scores[..seen.start].fill(f32::NEG_INFINITY);
        scores[seen.end..].fill(f32::NEG_INFINITY);
        let (chunks, _) = scores.as_chunks_mut::<LANES>();
        let mut maxima = [f32::NEG_INFINITY; LANES];
        for chunk in chunks.iter() {
            for (max, score) in maxima.iter_mut().zip(chunk) {
                *max = if *score > *max { *score } else { *max };
            }
        }
        // In halves: one after the other, each would wait for the one before.
        const { assert!(LANES == 16) };
        for half in [8, 4, 2, 1] {
            let (low, high) = maxima.split_at_mut(half);
            for (max, other) in low.iter_mut().zip(high) {
                *max = if *other > *max { *other } else { *max };
            }
        }
        let max = maxima[0];
        let scale = 1.0 / (self.attention.head_dim as f32).sqrt();
        let mut sums = [0f32; LANES];
        for chunk in chunks {
            for (sum, score) in sums.iter_mut().zip(chunk) {
                *score = math::exp((*score - max) * scale);
                *sum += *score;
            }
        }
        1.0 / sums.iter().sum::<f32>()
    }

    /// `out[row] = scale[row] * sum over positions of probability * value`, by `NV` vectors at a time.
    #[inline(always)]
    fn weigh<S: Simd, const NV: usize>(
        &self,
        simd: S,
        values: Read<T>,
        positions: Positions,
        probabilities: &[f32],
        scales: &[f32],
    ) {
        let Read {
            blocks: values,
            data,
            next,
        } = values;
        let (dim, lanes) = (self.attention.head_dim, S::F32_LANES);
        for column in (0..dim).step_by(NV * lanes) {
            for_row_tiles!(tile_rows::<S>(), scales.len(), |first, MR| {
                let mut acc = [[simd.splat_f32s(0.0); NV]; MR];
                for (index, start) in values.starts.iter().enumerate() {
                    let position = positions.block + index * self.block_size;
                    let depth = self.block_size.min(positions.end - position);
                    let panel = &data[start + column..][..(depth - 1) * values.stride + NV * lanes];
                    let vectors: [_; NV] = std::array::from_fn(|v| panel[v * lanes..].as_ptr());
                    let a: [_; MR] = std::array::from_fn(|m| {
                        let at = (first + m) * positions.stride + position - positions.origin;
                        probabilities[at..][..depth].as_ptr()
                    });
                    for k in (0..depth).step_by(POSITIONS) {
                        let count = POSITIONS.min(depth - k);
                        if first == 0 && column == 0 {
                            let end = if k + count < depth { k + count } else { self.block_size };
                            next.fetch(index..index + 1, k * dim..end * dim);
                        }
                        let a = a.map(|a| a.wrapping_add(k));
                        let vectors = vectors.map(|vector| vector.wrapping_add(k * values.stride));
                        // SAFETY: each row has `depth` probabilities, `count` of them from `k` on; `panel` reaches to its
                        // last row's last vector.
                        unsafe { multiply(simd, count, &a, &vectors, values.stride, &mut acc) };
                    }
                }
                for (m, acc) in acc.iter().enumerate() {
                    let scale = simd.splat_f32s(scales[first + m]);
                    let acc = acc.map(|sum| simd.mul_f32s(sum, scale));
                    let len = (NV * lanes).min(dim - column);
                    // SAFETY: each tile has its own rows and heads, so its own places in the result.
                    let out = unsafe { self.out.part(self.place(first + m).1 + column, len) };
                    match S::as_mut_simd_f32s(out) {
                        // Whole vectors, without a call.
                        (vectors, []) => {
                            for (to, sum) in vectors.iter_mut().zip(acc) {
                                *to = sum;
                            }
                        }
                        _ => out.copy_from_slice(&pulp::bytemuck::cast_slice::<S::f32s, f32>(&acc)[..len]),
                    }
                }
            });
        }
    }
}
