//! Paged attention: which query tiles there are, and their way over the threads.
//!
//! Causal, with the sequence's earlier positions in the KV cache, grouped-query (the query heads of a group share one
//! reading of their keys and values) and, where the model has one, with a sliding window. For one query the scores
//! over all its keys are computed, their maximum, the exponentials, their sum and the weighted values, each in an
//! order that the keys' absolute positions alone decide: a query's result is the same to the last bit however its
//! prompt was cut into chunks, whatever else is in the step, and on any number of threads.

use std::cell::Cell;

use candle_core::{CpuStorage, Result, Storage, Tensor, bail};
use half::{bf16, f16};
use pulp::Arch;
use rayon::prelude::*;

use super::attention_kernel::{Element, Scratch, Tile};
use super::{Stripes, lend, slice};

/// Scores, in floats, that a tile may hold: half of a usual second-level cache, and all of it with their bfloat16 parts.
const SCORES: usize = 64 * 1024;
/// Most queries in a tile.
const QUERIES: usize = 32;

thread_local! {
    /// Used again from tile to tile.
    static SCRATCH: Cell<Scratch> = Cell::default();
}

/// Consecutive queries of one sequence.
#[derive(Clone, Copy)]
pub struct Queries<'a> {
    /// Row of the first.
    pub row: usize,
    /// Position of the first in its sequence.
    pub start: usize,
    pub len: usize,
    /// The sequence's blocks, covering `start + len` positions.
    pub block_table: &'a [u32],
}

/// Attention of a step's queries to the keys and values in one layer's pools.
pub struct Attention<'a> {
    pub queries: &'a [Queries<'a>],
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub window: Option<usize>,
}

impl Attention<'_> {
    /// `qkv` is `[rows, width]`, of which the first `heads * head_dim` columns are the queries; `keys` is
    /// `[blocks, kv_heads, head_dim, block_size]`, `values` `[blocks, kv_heads, block_size, head_dim]`. `out` becomes
    /// `[rows, heads * head_dim]`; rows that no query names hold anything. An error if shapes do not fit, if a query names a row
    /// or a block that is not there, or if the pools are no contiguous floats on the CPU.
    pub fn forward(&self, qkv: &[f32], width: usize, keys: &Tensor, values: &Tensor, out: &mut Vec<f32>) -> Result<()> {
        let rows = qkv.len() / width;
        let (blocks, heads, dim, size) = keys.dims4()?;
        let fits = (heads, dim) == (self.kv_heads, self.head_dim)
            && width >= self.heads * self.head_dim
            && values.dims() == [blocks, heads, size, dim];
        let named = self.queries.iter().all(|q| {
            q.row + q.len <= rows
                && q.block_table.len() * size >= q.start + q.len
                && q.block_table.iter().all(|&block| (block as usize) < blocks)
        });
        if !fits || !named {
            bail!(
                "attention: queries [{rows}, {width}] do not fit keys {:?}",
                keys.shape()
            )
        }
        out.resize(rows * self.heads * self.head_dim, 0.0);
        // Nobody may write these pools meanwhile: a thread that waits in here can take up another part's attention, and would
        // wait for a writer that waits for it. All parts of a step store before any attends.
        let ((keys, keys_layout), (values, values_layout)) = (keys.storage_and_layout(), values.storage_and_layout());
        let (Storage::Cpu(keys), Storage::Cpu(values)) = (&*keys, &*values) else {
            bail!("attention: the KV cache is not on the CPU")
        };
        match keys {
            CpuStorage::F32(_) => {
                let (keys, values) = (slice::<f32>(keys, keys_layout)?, slice(values, values_layout)?);
                self.run(qkv, width, keys, values, size, out);
            }
            CpuStorage::BF16(_) => {
                let (keys, values) = (slice::<bf16>(keys, keys_layout)?, slice(values, values_layout)?);
                self.run(qkv, width, keys, values, size, out);
            }
            CpuStorage::F16(_) => {
                let (keys, values) = (slice::<f16>(keys, keys_layout)?, slice(values, values_layout)?);
                self.run(qkv, width, keys, values, size, out);
            }
            _ => bail!("attention: the KV cache holds neither f32, bf16 nor f16"),
        }
        Ok(())
    }

    fn run<T: Element>(&self, qkv: &[f32], width: usize, keys: &[T], values: &[T], block_size: usize, out: &mut [f32]) {
        let stripes = Stripes::new(out);
        let group = self.heads / self.kv_heads;
        let mut tiles = Vec::new();
        for queries in self.queries {
            let per_tile = (SCORES / (group * (queries.start + queries.len))).clamp(1, QUERIES);
            for first in (0..queries.len).step_by(per_tile) {
                let queries = Queries {
                    row: queries.row + first,
                    start: queries.start + first,
                    len: per_tile.min(queries.len - first),
                    ..*queries
                };
                tiles.extend((0..self.kv_heads).map(|head| (queries, head)));
            }
        }
        let arch = Arch::new();
        tiles.par_iter().enumerate().for_each(|(index, &(queries, head))| {
            lend(&SCRATCH, |scratch| {
                arch.dispatch(Tile {
                    attention: self,
                    queries,
                    head,
                    then: tiles.get(index + 1),
                    qkv,
                    width,
                    keys,
                    values,
                    block_size,
                    out: stripes,
                    scratch,
                });
                scratch.shrink();
            });
        });
    }
}
