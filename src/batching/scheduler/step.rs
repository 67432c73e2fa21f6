//! The rows of a step: decodes first, then prefill chunks in what they leave of the budget.

use super::{Plan, Row, Scheduler, Sequence, SequenceId};

impl Scheduler {
    /// One token for every running sequence whose prompt is done, oldest first.
    pub(super) fn plan_decodes(&mut self, plan: &mut Plan) {
        let decoding = |sequence: &Sequence| sequence.computed > 0 && sequence.computed + 1 == sequence.tokens.len();
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
                    start: sequence.computed,
                    len: 1,
                    samples: true,
                });
            }
        }
    }

    /// Makes sure that a sequence's next token has a slot, preempting the youngest until it does. False: the sequence
    /// was itself the youngest, or has been preempted before its turn came.
    fn has_block_for_next(&mut self, id: SequenceId) -> bool {
        loop {
            let Some(sequence) = self.running.get_mut(&id) else {
                return false;
            };
            if sequence.blocks.len() * self.blocks.block_size() > sequence.computed {
                return true;
            }
            if let Some(block) = self.blocks.allocate() {
                sequence.blocks.push(block);
                return true;
            }
            self.preempt_youngest();
        }
    }

    fn preempt_youngest(&mut self) {
        if let Some((id, mut sequence)) = self.running.pop_last() {
            self.blocks.release(&sequence.blocks);
            sequence.blocks.clear();
            (sequence.computed, sequence.kept) = (0, 0);
            self.preempted.insert(id, sequence);
            self.preemptions += 1;
        }
    }

    /// Prefill chunks, oldest first, in what the decodes left of the budget.
    pub(super) fn plan_prefills(&self, plan: &mut Plan) {
        let mut budget = self.config.step_tokens - plan.rows.len();
        let decodes = plan.rows.len();
        for (&id, sequence) in &self.running {
            let remaining = sequence.tokens.len() - sequence.computed;
            if budget == 0 {
                break;
            }
            if plan.rows[..decodes].binary_search_by_key(&id, |row| row.id).is_ok() {
                continue;
            }
            let len = remaining.min(budget);
            budget -= len;
            plan.rows.push(Row {
                id,
                start: sequence.computed,
                len,
                samples: len == remaining,
            });
        }
    }
}
