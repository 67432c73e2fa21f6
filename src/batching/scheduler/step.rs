//! The rows of a step: decodes first, then prefill chunks in what they leave of the budget.

use std::collections::HashSet;

use super::{Plan, Row, Scheduler, Sequence, SequenceId};

impl Scheduler {
    /// One token for every running sequence whose prompt is done, oldest first.
    pub(super) fn plan_decodes(&mut self, plan: &mut Plan) {
        let most = self.config.max_model_len;
        let decoding = |sequence: &Sequence| sequence.decodes() && !sequence.ends_under_way(most);
        let ids: Vec<_> = self
            .running
            .iter()
            .filter(|(_, sequence)| decoding(sequence))
            .map(|(&id, _)| id)
            .collect();
        for id in ids.into_iter().take(self.config.step_tokens) {
            if self.has_block_for_next(id) {
                let Some(sequence) = self.running.get(&id) else {
                    continue;
                };
                plan.rows.push(Row {
                    id,
                    start: sequence.planned,
                    len: 1,
                    samples: true,
                });
            }
        }
    }

    /// Makes sure that a sequence's next token has a slot, preempting the youngest until it does. False: the sequence
    /// was itself the youngest, has been preempted before its turn came, or is to wait for one that ends.
    fn has_block_for_next(&mut self, id: SequenceId) -> bool {
        loop {
            let Some(sequence) = self.running.get_mut(&id) else {
                return false;
            };
            if sequence.blocks.len() * self.blocks.block_size() > sequence.planned {
                return true;
            }
            if let Some(block) = self.blocks.allocate() {
                sequence.blocks.push(block);
                return true;
            }
            let most = self.config.max_model_len;
            if self
                .running
                .values()
                .next_back()
                .is_some_and(|youngest| youngest.ends_under_way(most))
            {
                // Its blocks are free once the step under way has landed.
                return false;
            }
            self.preempt_youngest();
        }
    }

    fn preempt_youngest(&mut self) {
        if let Some((id, mut sequence)) = self.running.pop_last() {
            self.blocks.release(&sequence.blocks);
            sequence.start_over();
            self.preempted.insert(id, sequence);
            self.preemptions += 1;
        }
    }

    /// Prefill chunks, oldest first, in what the decodes left of the budget. What the cache has by now is not computed,
    /// and what an earlier row of this step computes, or the step under way, is left to it: the cache has it afterwards.
    pub(super) fn plan_prefills(&mut self, plan: &mut Plan) {
        let decodes = plan.rows.len();
        let size = self.blocks.block_size();
        let decoding = |id, rows: &[Row]| rows[..decodes].binary_search_by_key(&id, |row| row.id).is_ok();
        for (&id, sequence) in &mut self.running {
            if !sequence.is_under_way() && !decoding(id, &plan.rows) {
                let cached = sequence.take_cached(&mut self.blocks);
                plan.cached_tokens += sequence.accept(cached, &mut self.blocks);
            }
        }
        let mut budget = self.config.step_tokens - decodes;
        let under_way = self.running.values().filter(|sequence| sequence.is_under_way());
        let mut computing: HashSet<_> = under_way.filter_map(|sequence| sequence.next_block(size)).collect();
        for (&id, sequence) in &self.running {
            // Whoever awaits a token decodes it, or ends with it.
            if budget == 0 || sequence.awaited > 0 || decoding(id, &plan.rows) {
                continue;
            }
            let next = sequence.next_block(size).filter(|_| !sequence.is_under_way());
            if next.is_some_and(|next| computing.contains(&next)) {
                continue;
            }
            let remaining = sequence.tokens.len() - sequence.planned;
            let first = plan.rows.len() == decodes;
            let len = chunk(sequence.planned, remaining, budget, size, first);
            if len == 0 {
                continue;
            }
            computing.extend(next);
            budget -= len;
            plan.rows.push(Row {
                id,
                start: sequence.planned,
                len,
                samples: len == remaining,
            });
        }
    }
}

/// How many of a sequence's `remaining` tokens from `start` on a step runs: up to a block's end where it cannot run them
/// all, so that others can share the block. The first prefill of a step goes on even if its block does not get full.
fn chunk(start: usize, remaining: usize, budget: usize, block_size: usize, first: bool) -> usize {
    if remaining <= budget {
        return remaining;
    }
    let full_blocks = (start + budget) / block_size * block_size;
    match full_blocks.checked_sub(start) {
        Some(len) if len > 0 => len,
        _ if first => budget,
        _ => 0,
    }
}
