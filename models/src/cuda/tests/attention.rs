//! Paged attention for decodes and for chunks of a prompt, against its definition in float64.

use half::{bf16, f16};

use super::*;

/// Sequences, each with the position of its first query and the number of queries.
struct Case {
    heads: usize,
    kv_heads: usize,
    dim: usize,
    block_size: usize,
    window: usize,
    spans: Vec<(usize, usize)>,
}

/// A case's data: packed rows of queries, keys and values (of which only the queries are read), the two pools, and
/// each sequence's blocks.
struct Data {
    rows: Vec<f32>,
    keys: Vec<f32>,
    values: Vec<f32>,
    tables: Vec<Vec<u32>>,
}

impl Case {
    fn stride(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.dim
    }

    /// Blocks are handed out from the last to the first, so that no table lies in order. A slot that no sequence has
    /// holds what would be seen in any answer.
    fn data<T: Element>(&self) -> Data {
        let needed = |&(start, len): &(usize, usize)| usize::div_ceil(start + len, self.block_size);
        let blocks: usize = self.spans.iter().map(needed).sum();
        let mut next = blocks as u32;
        let tables: Vec<Vec<u32>> = self
            .spans
            .iter()
            .map(|span| {
                next -= needed(span) as u32;
                (next..next + needed(span) as u32).rev().collect()
            })
            .collect();
        let pool = blocks * self.block_size * self.kv_heads * self.dim;
        let tokens: usize = self.spans.iter().map(|span| span.1).sum();
        let (mut keys, mut values) = (rounded::<T>(&numbers(pool, 2)), rounded::<T>(&numbers(pool, 3)));
        for (&(start, len), table) in self.spans.iter().zip(&tables) {
            for position in start + len..table.len() * self.block_size {
                let at = self.at(table, position, 0);
                keys[at..at + self.kv_heads * self.dim].fill(1e4);
                values[at..at + self.kv_heads * self.dim].fill(1e4);
            }
        }
        let rows = numbers(tokens * self.stride(), 1)
            .iter()
            .map(|v| v * 2.0)
            .collect::<Vec<_>>();
        Data {
            rows: rounded::<T>(&rows),
            keys,
            values,
            tables,
        }
    }

    /// Where a position's key or value of a KV head begins in its pool.
    fn at(&self, table: &[u32], position: usize, kv_head: usize) -> usize {
        let slot = table[position / self.block_size] as usize * self.block_size + position % self.block_size;
        (slot * self.kv_heads + kv_head) * self.dim
    }

    /// `[tokens, heads, dim]`
    fn expected(&self, data: &Data) -> Vec<f32> {
        let mut out = Vec::new();
        let mut row = 0;
        for (&(start, len), table) in self.spans.iter().zip(&data.tables) {
            for position in start..start + len {
                for head in 0..self.heads {
                    let kv_head = head / (self.heads / self.kv_heads);
                    let query = &data.rows[row * self.stride() + head * self.dim..][..self.dim];
                    let first = if self.window > 0 {
                        (position + 1).saturating_sub(self.window)
                    } else {
                        0
                    };
                    out.extend(self.attend(data, query, kv_head, table, first..position + 1));
                }
                row += 1;
            }
        }
        out
    }

    fn attend(
        &self,
        data: &Data,
        query: &[f32],
        kv_head: usize,
        table: &[u32],
        seen: std::ops::Range<usize>,
    ) -> Vec<f32> {
        let mut total = 0.0;
        let mut sum = vec![0.0; self.dim];
        for position in seen {
            let at = self.at(table, position, kv_head);
            let products = query
                .iter()
                .zip(&data.keys[at..])
                .map(|(q, k)| f64::from(*q) * f64::from(*k));
            let weight = (products.sum::<f64>() / (self.dim as f64).sqrt()).exp();
            total += weight;
            sum.iter_mut()
                .zip(&data.values[at..])
                .for_each(|(s, v)| *s += weight * f64::from(*v));
        }
        sum.iter().map(|s| (s / total) as f32).collect()
    }

    fn shape(&self) -> [Argument; 5] {
        [
            int(self.heads),
            int(self.kv_heads),
            int(self.block_size.trailing_zeros() as usize),
            int(self.window),
            Argument::Float(1.0 / (self.dim as f32).sqrt()),
        ]
    }
}

/// Every span has one query; a last item is padding.
fn decode<T: Element>(case: &Case, splits: usize) {
    let data = case.data::<T>();
    let items = case.spans.len() + 1;
    let mut rows: Vec<u32> = (0..items as u32).collect();
    let mut lengths: Vec<u32> = case.spans.iter().map(|span| span.0 as u32 + 1).collect();
    let mut blocks = 0;
    let begin = |table: &Vec<u32>| {
        blocks += table.len() as u32;
        blocks - table.len() as u32
    };
    let mut starts: Vec<u32> = data.tables.iter().map(begin).collect();
    // The items need not be in the rows' order.
    rows.swap(0, case.spans.len() - 1);
    lengths.swap(0, case.spans.len() - 1);
    starts.swap(0, case.spans.len() - 1);
    lengths.push(0);
    starts.push(0);
    let mut queries = data.rows.clone();
    queries.extend(vec![0.0; case.stride()]);

    let pieces = (case.heads / case.kv_heads).div_ceil(4);
    let launch = Launch {
        kernel: &format!("attention_decode_{}_{}", T::NAME, case.dim),
        grid: [items as u32, (case.kv_heads * pieces) as u32, splits as u32],
        block: 128,
        shared: 0,
    };
    let parts = items * case.heads * splits;
    let mut arguments = vec![
        store::<T>(&queries),
        int(case.stride()),
        store::<T>(&data.keys),
        store::<T>(&data.values),
        words(&rows),
        words(&lengths),
        words(&starts),
        words(&data.tables.concat()),
        store::<T>(&vec![7.0; items * case.heads * case.dim]),
        store::<f32>(&vec![f32::NAN; if splits > 1 { parts * case.dim } else { 0 }]),
        store::<f32>(&vec![f32::NAN; if splits > 1 { parts * 2 } else { 0 }]),
    ];
    arguments.extend(case.shape());
    let mut found = launch.run(&arguments);
    let (totals, sums, mut out) = (found.pop().unwrap(), found.pop().unwrap(), found.pop().unwrap());
    if splits > 1 {
        let merge = Launch {
            kernel: &format!("attention_merge_{}_{}", T::NAME, case.dim),
            grid: [items as u32, case.heads as u32, 1],
            block: 128,
            shared: 0,
        };
        let found = merge.run(&[
            Argument::Buffer(sums),
            Argument::Buffer(totals),
            words(&rows),
            words(&lengths),
            Argument::Buffer(out),
            int(splits),
            int(case.window),
        ]);
        out = found.last().unwrap().clone();
    }
    let mut expected = case.expected(&data);
    expected.extend(vec![0.0; case.heads * case.dim]);
    assert_close(&load::<T>(&out), &expected, T::EPSILON + 1e-5);
}

#[test]
fn decodes_attend_to_their_own_blocks() {
    let case = Case {
        heads: 9,
        kv_heads: 3,
        dim: 64,
        block_size: 16,
        window: 0,
        spans: vec![(36, 1), (0, 1), (300, 1)],
    };
    decode::<f32>(&case, 1);
    decode::<bf16>(&case, 1);
    decode::<bf16>(&case, 3);
    decode::<f16>(&case, 8);
}

#[test]
fn decodes_of_every_head_size_and_of_large_groups() {
    let sizes = [
        (80, 4, 2),
        (96, 6, 1),
        (112, 3, 1),
        (128, 8, 2),
        (160, 4, 4),
        (192, 2, 2),
        (224, 2, 1),
        (256, 5, 1),
    ];
    for (dim, heads, kv_heads) in sizes {
        let spans = vec![(29, 1), (140, 1)];
        let case = Case {
            heads,
            kv_heads,
            dim,
            block_size: 8,
            window: 0,
            spans,
        };
        decode::<f32>(&case, 2);
        decode::<bf16>(&case, 1);
    }
}

#[test]
fn a_window_hides_what_is_before_it() {
    for (window, splits) in [(1, 1), (33, 1), (200, 2), (1000, 2)] {
        let case = Case {
            heads: 4,
            kv_heads: 2,
            dim: 64,
            block_size: 4,
            window,
            spans: vec![(3, 1), (270, 1)],
        };
        decode::<bf16>(&case, splits);
    }
}

fn prefill<T: Element>(case: &Case) {
    const ROWS: usize = 64;
    let data = case.data::<T>();
    let group = case.heads / case.kv_heads;
    let mut tiles: [Vec<u32>; 5] = Default::default();
    let (mut first, mut start) = (0, 0);
    for (&(position, len), table) in case.spans.iter().zip(&data.tables) {
        for offset in (0..len * group).step_by(ROWS) {
            let tile = [first, position, len, start, offset];
            tiles
                .iter_mut()
                .zip(tile)
                .for_each(|(list, value)| list.push(value as u32));
        }
        first += len;
        start += table.len();
    }
    let keys = if case.dim <= 128 { 64 } else { 32 };
    let launch = Launch {
        kernel: &format!("attention_prefill_{}_{}", T::NAME, case.dim),
        grid: [tiles[0].len() as u32, case.kv_heads as u32, 1],
        block: 128,
        shared: 2 * ((ROWS + 4 * keys) * (case.dim + 8)) as u32,
    };
    let mut arguments = vec![
        store::<T>(&data.rows),
        int(case.stride()),
        store::<T>(&data.keys),
        store::<T>(&data.values),
    ];
    arguments.extend(tiles.iter().map(|list| words(list)));
    arguments.push(words(&data.tables.concat()));
    arguments.push(store::<T>(&vec![7.0; first * case.heads * case.dim]));
    arguments.extend(case.shape());
    let found = launch.run(&arguments);
    // The weights are rounded to T before they meet the values.
    assert_close(
        &load::<T>(found.last().unwrap()),
        &case.expected(&data),
        2.0 * T::EPSILON,
    );
}

#[test]
fn chunks_attend_causally() {
    let mut case = Case {
        heads: 6,
        kv_heads: 2,
        dim: 64,
        block_size: 16,
        window: 0,
        spans: vec![(0, 25), (71, 2), (10, 60)],
    };
    prefill::<bf16>(&case);
    prefill::<f16>(&case);
    case.window = 9;
    prefill::<bf16>(&case);
    case.window = 70;
    prefill::<f16>(&case);
}

#[test]
fn chunks_of_every_head_size() {
    let sizes = [
        (80, 2, 1),
        (96, 1, 1),
        (112, 3, 1),
        (128, 4, 1),
        (160, 2, 2),
        (192, 2, 2),
        (224, 4, 2),
        (256, 3, 3),
    ];
    for (dim, heads, kv_heads) in sizes {
        // More keys than a tile has.
        let spans = vec![(90, 17), (0, 3)];
        let case = Case {
            heads,
            kv_heads,
            dim,
            block_size: 8,
            window: 0,
            spans,
        };
        prefill::<bf16>(&case);
        prefill::<f16>(&case);
    }
}
