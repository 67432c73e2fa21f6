//! Attention as its definition reads, in float64 and without a thought for speed: what the kernel is tested against.

use proptest::prelude::*;

use candle_core::{DType, Device, Tensor};

use super::attention::{Attention, Queries};
use super::numbers;

/// A sequence and the blocks that its keys and values lie in.
#[derive(Debug, Clone)]
struct Sequence {
    start: usize,
    len: usize,
    block_table: Vec<u32>,
}

#[derive(Debug, Clone)]
struct Case {
    group: usize,
    kv_heads: usize,
    head_dim: usize,
    block_size: usize,
    window: Option<usize>,
    sequences: Vec<Sequence>,
}

impl Case {
    fn attention<'a>(&self, queries: &'a [Queries<'a>]) -> Attention<'a> {
        let Case {
            group,
            kv_heads,
            head_dim,
            window,
            ..
        } = *self;
        Attention {
            queries,
            heads: group * kv_heads,
            kv_heads,
            head_dim,
            window,
        }
    }

    /// What the kernel gives for some of the sequences' rows: `[rows, heads * head_dim]`.
    fn attend(&self, queries: &[Queries], qkv: &[f32], keys: &Tensor, values: &Tensor) -> Vec<f32> {
        // What is in the memory already is of no account.
        let mut out = vec![f32::NAN; 5];
        self.attention(queries)
            .forward(qkv, self.width(), keys, values, &mut out)
            .unwrap();
        out
    }

    /// Columns of queries, keys and values together.
    fn width(&self) -> usize {
        (self.group + 2) * self.kv_heads * self.head_dim
    }

    fn blocks(&self) -> usize {
        self.sequences.iter().map(|sequence| sequence.block_table.len()).sum()
    }

    fn rows(&self) -> usize {
        self.sequences.iter().map(|sequence| sequence.len).sum()
    }

    fn queries(&self) -> Vec<Queries<'_>> {
        let mut row = 0;
        let queries = self.sequences.iter().map(|sequence| {
            row += sequence.len;
            Queries {
                row: row - sequence.len,
                start: sequence.start,
                len: sequence.len,
                block_table: &sequence.block_table,
            }
        });
        queries.collect()
    }
}

/// Random queries (with some columns more, as keys and values would be), keys and values.
fn tensors(case: &Case) -> (Vec<f32>, [Tensor; 2]) {
    let Case {
        kv_heads,
        head_dim,
        block_size,
        ..
    } = *case;
    let tensor =
        |seed, shape: &[usize]| Tensor::from_vec(numbers(shape.iter().product(), seed), shape, &Device::Cpu).unwrap();
    let pools = [
        tensor(2, &[case.blocks(), kv_heads, head_dim, block_size]),
        tensor(3, &[case.blocks(), kv_heads, block_size, head_dim]),
    ];
    (numbers(case.rows() * case.width(), 1), pools)
}

fn flat(tensor: &Tensor) -> Vec<f32> {
    let numbers = tensor.to_dtype(DType::F32).unwrap();
    numbers.flatten_all().unwrap().to_vec1().unwrap()
}

/// `[rows, heads * head_dim]`
fn reference(case: &Case, qkv: &[f32], [keys, values]: [&Tensor; 2]) -> Vec<f64> {
    let mut queries = qkv.chunks_exact(case.width());
    let (keys, values) = (flat(keys), flat(values));
    let Case {
        group,
        kv_heads,
        head_dim,
        block_size,
        window,
        ..
    } = *case;
    let mut rows = Vec::new();
    for sequence in &case.sequences {
        for position in sequence.start..sequence.start + sequence.len {
            let query = queries.next().unwrap();
            for head in 0..group * kv_heads {
                let at = |position: usize, dim: usize| {
                    let head = sequence.block_table[position / block_size] as usize * kv_heads + head / group;
                    let within = position % block_size;
                    (
                        (head * head_dim + dim) * block_size + within,
                        (head * block_size + within) * head_dim + dim,
                    )
                };
                let first = window.map_or(0, |window| (position + 1).saturating_sub(window));
                let score = |key: usize| -> f64 {
                    let products = (0..head_dim).map(|d| query[head * head_dim + d] as f64 * keys[at(key, d).0] as f64);
                    products.sum::<f64>() / (head_dim as f64).sqrt()
                };
                let weights: Vec<f64> = (first..=position).map(|key| score(key).exp()).collect();
                let total: f64 = weights.iter().sum();
                rows.extend((0..head_dim).map(|d| {
                    let weighted = weights
                        .iter()
                        .zip(first..)
                        .map(|(weight, key)| weight * values[at(key, d).1] as f64);
                    weighted.sum::<f64>() / total
                }));
            }
        }
    }
    rows
}

fn cases() -> impl Strategy<Value = Case> {
    let head_dim =
        prop_oneof![1 => Just(2usize), 1 => Just(10), 1 => Just(16), 1 => Just(24), 3 => Just(64), 2 => Just(96)];
    let block_size = prop_oneof![1 => Just(1usize), 1 => Just(5), 1 => Just(8), 3 => Just(16), 2 => Just(32)];
    let window = prop_oneof![Just(None), (1usize..80).prop_map(Some)];
    let spans = proptest::collection::vec((0usize..150, 1usize..70), 1..4);
    (1usize..5, 1usize..4, head_dim, block_size, window, spans).prop_map(
        |(group, kv_heads, head_dim, block_size, window, spans)| {
            let needed = |&(start, len): &(usize, usize)| usize::div_ceil(start + len, block_size);
            let mut left: u32 = spans.iter().map(needed).sum::<usize>() as u32;
            // Blocks are handed out from the last to the first, so that no table lies in order.
            let sequences = spans.iter().map(|&(start, len)| {
                left -= needed(&(start, len)) as u32;
                Sequence {
                    start,
                    len,
                    block_table: (left..left + needed(&(start, len)) as u32).rev().collect(),
                }
            });
            Case {
                group,
                kv_heads,
                head_dim,
                block_size,
                window,
                sequences: sequences.collect(),
            }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn kernel_computes_attention(case in cases()) {
        let (qkv, [keys, values]) = tensors(&case);
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let (keys, values) = (keys.to_dtype(dtype).unwrap(), values.to_dtype(dtype).unwrap());
            // With bfloat16 keys, queries may be rounded to it as well: these need not be.
            let mut qkv = qkv.clone();
            if dtype == DType::BF16 {
                qkv.iter_mut().for_each(|x| *x = half::bf16::from_f32(*x).to_f32());
            }
            let found = case.attend(&case.queries(), &qkv, &keys, &values);
            let expected = reference(&case, &qkv, [&keys, &values]);
            prop_assert_eq!(found.len(), expected.len());
            for (found, expected) in found.into_iter().zip(expected) {
                prop_assert!((found as f64 - expected).abs() < 2e-5, "{found} is not {expected}");
            }
        }
    }

    #[test]
    fn a_query_is_the_same_alone(case in cases()) {
        let (qkv, [keys, values]) = tensors(&case);
        for dtype in [DType::F32, DType::BF16] {
            let (keys, values) = (keys.to_dtype(dtype).unwrap(), values.to_dtype(dtype).unwrap());
            let queries = case.queries();
            let together = case.attend(&queries, &qkv, &keys, &values);
            let (width, attended) = (case.width(), together.len() / case.rows());
            for query in &queries {
                for index in 0..query.len {
                    let row = query.row + index;
                    let alone =
                        [Queries { row: 0, start: query.start + index, len: 1, block_table: query.block_table }];
                    let alone = case.attend(&alone, &qkv[row * width..][..width], &keys, &values);
                    prop_assert!(alone == together[row * attended..][..attended], "row {row} of {dtype:?}");
                }
            }
        }
    }

    /// Blocks keep what earlier sequences left there, which may be no numbers.
    #[test]
    fn what_no_query_sees_is_of_no_account(case in cases()) {
        let (qkv, [keys, values]) = tensors(&case);
        let (mut poisoned_keys, mut poisoned_values) = (flat(&keys), flat(&values));
        let Case { kv_heads, head_dim, block_size, .. } = case;
        for sequence in &case.sequences {
            let end = sequence.start + sequence.len;
            // Whole blocks that the first query's window has left behind.
            let left = case.window.map_or(0, |window| (sequence.start + 1).saturating_sub(window) / block_size);
            for position in (0..left * block_size).chain(end..sequence.block_table.len() * block_size) {
                let block = sequence.block_table[position / block_size] as usize;
                for (head, dim) in (0..kv_heads).flat_map(|head| (0..head_dim).map(move |dim| (head, dim))) {
                    let (first, within) = ((block * kv_heads + head) * head_dim * block_size, position % block_size);
                    poisoned_keys[first + dim * block_size + within] = f32::NAN;
                    poisoned_values[first + within * head_dim + dim] = f32::NAN;
                }
            }
        }
        let poisoned = |data: Vec<f32>, like: &Tensor| Tensor::from_vec(data, like.shape(), &Device::Cpu).unwrap();
        let poisoned = [poisoned(poisoned_keys, &keys), poisoned(poisoned_values, &values)];
        for dtype in [DType::F32, DType::BF16] {
            let attend = |keys: &Tensor, values: &Tensor| {
                let (keys, values) = (keys.to_dtype(dtype).unwrap(), values.to_dtype(dtype).unwrap());
                case.attend(&case.queries(), &qkv, &keys, &values)
            };
            prop_assert!(attend(&keys, &values) == attend(&poisoned[0], &poisoned[1]), "{dtype:?}");
        }
    }
}
