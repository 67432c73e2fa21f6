//! What one forward pass runs: tokens packed end to end, and for each sequence where they lie and where its
//! keys and values are kept.

use std::ops::Range;

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

    /// The step cut into `parts` steps, all of nearly as many tokens: in whole eights but for the last, if there are so many.
    pub(crate) fn split(&self, parts: usize) -> Vec<Self> {
        let tokens = self.tokens.len();
        let cut = |part: usize| (part * tokens / parts).next_multiple_of(8).min(tokens);
        let rows = (0..parts).map(|part| cut(part)..cut(part + 1));
        rows.filter(|rows| !rows.is_empty())
            .map(|rows| Self {
                tokens: self.tokens[rows.clone()].to_vec(),
                sequences: self.spans(rows),
            })
            .collect()
    }

    /// What of the sequences lies in some rows.
    fn spans(&self, rows: Range<usize>) -> Vec<Span> {
        let mut end = 0;
        let within = self.sequences.iter().filter_map(|span| {
            let first = end;
            end += span.len;
            let (from, to) = (rows.start.max(first), rows.end.min(end));
            (from < to).then(|| Span {
                start: span.start + from - first,
                len: to - from,
                block_table: span.block_table.clone(),
                logits: span.logits && to == end,
            })
        });
        within.collect()
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn parts_are_the_step_in_order(
            spans in proptest::collection::vec((0usize..40, 1usize..50, any::<bool>()), 0..8),
            parts in 1usize..20,
        ) {
            let mut block = 0;
            let sequences = spans.iter().map(|&(start, len, logits)| {
                let first = block;
                block += usize::div_ceil(start + len, 16) as u32;
                Span { start, len, block_table: (first..block).rev().collect(), logits }
            });
            let sequences: Vec<Span> = sequences.collect();
            let whole = sequences.iter().map(|span| span.len).sum::<usize>();
            let step = Step { tokens: (0..whole as u32).collect(), sequences };
            let (asked, parts) = (parts, step.split(parts));
            let all = |of: fn(&Step) -> Vec<usize>| parts.iter().flat_map(of).collect::<Vec<_>>();
            let mut first = 0;
            let logit_rows = parts.iter().flat_map(|part| {
                first += part.tokens.len() as u32;
                part.logit_rows().into_iter().map(move |row| row + first - part.tokens.len() as u32)
            });
            prop_assert_eq!(logit_rows.collect::<Vec<_>>(), step.logit_rows());
            prop_assert!(parts.iter().all(|part| part.tokens.len() <= whole.div_ceil(asked) + 7));
            prop_assert!(parts.iter().rev().skip(1).all(|part| part.tokens.len().is_multiple_of(8)));
            prop_assert!(parts.len() == asked || whole < 8 * asked);
            prop_assert_eq!(parts.iter().flat_map(|part| part.tokens.clone()).collect::<Vec<_>>(), step.tokens.clone());
            prop_assert_eq!(all(Step::positions), step.positions());
            prop_assert_eq!(all(|part| part.slots(16)), step.slots(16));
        }
    }
}
