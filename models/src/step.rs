//! What one forward pass runs: tokens packed end to end, and for each sequence where they lie and where its
//! keys and values are kept.

use candle_core::{Result, bail};

use crate::{Config, KvCache};

/// The tokens of one forward pass: prefill chunks and decodes in any mix, packed end to end.
#[derive(Debug, Clone, Default)]
pub struct Step {
    /// Token ids of all sequences, in the order of `sequences`.
    pub tokens: Vec<u32>,
    /// One entry for each sequence in the step.
    pub sequences: Vec<Span>,
}

/// One sequence's part of a step.
#[derive(Debug, Clone)]
pub struct Span {
    /// Position in its sequence of the span's first token: the number of tokens already in the KV cache.
    pub start: usize,
    /// Number of tokens that the span adds, at least 1.
    pub len: usize,
    /// The sequence's KV blocks, in order; they must cover `start + len` positions. Blocks that the step writes
    /// belong to this sequence alone.
    pub block_table: Vec<u32>,
    /// Whether the logits of the span's last token are wanted.
    pub logits: bool,
}

impl Step {
    /// Position of every token in its sequence: `[tokens]`.
    pub(crate) fn positions(&self) -> Vec<usize> {
        self.sequences
            .iter()
            .flat_map(|span| span.start..span.start + span.len)
            .collect()
    }

    /// KV slot (`block * block_size + offset`) of every token: `[tokens]`.
    pub(crate) fn slots(&self, block_size: usize) -> Vec<usize> {
        let slot =
            |span: &Span, pos: usize| span.block_table[pos / block_size] as usize * block_size + pos % block_size;
        self.sequences
            .iter()
            .flat_map(|span| (span.start..span.start + span.len).map(move |pos| slot(span, pos)))
            .collect()
    }

    /// Rows whose logits are wanted, in order.
    pub(crate) fn logit_rows(&self) -> Vec<u32> {
        let mut end = 0;
        let mut rows = Vec::new();
        for span in &self.sequences {
            end += span.len;
            if span.logits {
                rows.push(end as u32 - 1);
            }
        }
        rows
    }

    /// Refuses a step that would read or write outside the model's tables or the pool.
    pub(crate) fn check(&self, config: &Config, cache: &KvCache) -> Result<()> {
        let packed: usize = self.sequences.iter().map(|span| span.len).sum();
        if packed != self.tokens.len() {
            bail!("step: spans cover {packed} tokens, {} are given", self.tokens.len())
        }
        if let Some(token) = self.tokens.iter().find(|&&token| token as usize >= config.vocab_size) {
            bail!("step: token {token} is outside the vocabulary of {}", config.vocab_size)
        }
        for (index, span) in self.sequences.iter().enumerate() {
            let end = span.start + span.len;
            if span.len == 0 {
                bail!("step: sequence {index} adds no token")
            }
            if end > config.max_position_embeddings {
                bail!(
                    "step: sequence {index} reaches {end} positions, the model has {}",
                    config.max_position_embeddings
                )
            }
            if span.block_table.len() * cache.block_size() < end {
                bail!(
                    "step: sequence {index} has {} blocks, too few for {end} positions",
                    span.block_table.len()
                )
            }
            if let Some(block) = span.block_table.iter().find(|&&block| block as usize >= cache.blocks()) {
                bail!(
                    "step: sequence {index} names block {block}, the pool has {}",
                    cache.blocks()
                )
            }
        }
        Ok(())
    }
}
