//! What the scheduler has before it, for predictions.

use std::time::Instant;

use super::{Scheduler, Sequence, SequenceId};
use crate::batching::{Estimates, Line, Outlook, Work};

impl Scheduler {
    /// What runs and what waits, with the answers' lengths as `estimates` expects them.
    pub fn outlook(&self, estimates: &Estimates, now: Instant) -> Outlook {
        let work = |id: SequenceId, sequence: &Sequence| Work {
            id,
            length: sequence.tokens.len(),
            prefill: sequence.tokens.len() - sequence.computed,
            decode: estimates.lengths.left(sequence.max_tokens, sequence.generated()),
            long: estimates.lengths.long_left(sequence.max_tokens, sequence.generated()),
            deadline: sequence.deadline,
        };
        let admitted = self.running.iter().chain(&self.preempted);
        let lines = self.waiting.tenants(now).filter_map(|(served, entries)| {
            let tenant = entries.first()?.1.tenant.clone();
            let waiting = entries
                .iter()
                .map(|(id, entry)| (entry.priority, work(*id, &entry.item)));
            Some(Line {
                tenant,
                served,
                waiting: waiting.collect(),
            })
        });
        Outlook {
            schedule: self.config.schedule,
            max_batch: self.config.max_batch,
            step_tokens: self.config.step_tokens,
            capacity: self.blocks.capacity(),
            running: admitted
                .map(|(&id, sequence)| (sequence.tenant.clone(), work(id, sequence)))
                .collect(),
            lines: lines.collect(),
        }
    }
}
