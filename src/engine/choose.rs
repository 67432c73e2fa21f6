//! How a step's rows get their tokens: chosen by the device itself where it can, else here from their logits.

use std::panic::{AssertUnwindSafe, catch_unwind};

use rayon::prelude::*;
use sconce_models::{Draw, Slot};

use super::{
    run::Runner,
    sampler::{NotANumber, Sample},
};
use crate::{
    batching::{Plan, Row, SequenceId},
    request::{Failure, TokenId},
};

/// What a step gave.
pub(super) enum Answer {
    /// Of the rows that sample, `[rows × vocabulary]`.
    Logits(Vec<f32>),
    /// One for each row that samples; `None` where a logit was no number.
    Tokens(Vec<Option<TokenId>>),
}

impl Runner {
    /// How the device is to choose each row's token, behind the step under way, in a step that is enqueued now. `None` where
    /// that cannot be: where the host chooses, from logits.
    pub(super) fn draws(&mut self, plan: &Plan) -> Option<Vec<Draw>> {
        if !self.model.samples() {
            return None;
        }
        let sampling = || plan.rows.iter().filter(|row| row.samples);
        let rules: Vec<_> = sampling().map(|row| self.rules(row)).collect::<Option<_>>()?;
        let vocabulary = self.model.vocab_size();
        let place = |(row, (mut draw, n)): (&Row, (Draw, usize))| {
            let place = self.slots.enqueue(row.id, n, draw.penalises());
            // The rules are the client's, so it is there.
            let state = || Some(self.clients.get(&row.id)?.sampler.state(vocabulary));
            draw.slot = Some(Slot {
                number: place.number,
                set: place.set.then(state).flatten(),
            });
            draw
        };
        Some(sampling().zip(rules).map(place).collect())
    }

    /// The rules for a row's token, and which of its sequence's tokens it is, from 0.
    fn rules(&self, row: &Row) -> Option<(Draw, usize)> {
        let sampler = &self.clients.get(&row.id)?.sampler;
        let draw = sampler.rules(self.model.vocab_size())?;
        let known = self.model.scheduler.sequence(row.id)?.tokens().len();
        // With those that the step under way chooses, of which nobody but the device can know.
        let ahead = (row.start + row.len).saturating_sub(known);
        let n = sampler.count() + ahead;
        (ahead == 0 || self.slots.goes_on(row.id, n)).then_some((draw, n))
    }

    /// The tokens that the device chose, by sequence; what it chose for one that has ended since, or lost its blocks, is
    /// void.
    pub(super) fn chosen(
        &mut self,
        plan: &Plan,
        tokens: Vec<Option<TokenId>>,
    ) -> Vec<(SequenceId, Result<Sample, Failure>)> {
        let sampling = plan.rows.iter().filter(|row| row.samples);
        let mut samples = Vec::with_capacity(tokens.len());
        for (row, token) in sampling.zip(tokens) {
            let runs = self.model.scheduler.sequence(row.id).is_some();
            let Some(client) = self.clients.get_mut(&row.id).filter(|_| runs) else {
                self.slots.forget(row.id);
                continue;
            };
            let sample = token.ok_or(Failure::NotANumber).map(|token| {
                client.sampler.chose(token);
                Sample { token, logprobs: None }
            });
            samples.push((row.id, sample));
        }
        samples
    }

    /// Chooses a token for each row that reached its sequence's end.
    pub(super) fn choose(&mut self, plan: &Plan, mut logits: Vec<f32>) -> Vec<(SequenceId, Result<Sample, Failure>)> {
        let sampling = plan.rows.iter().filter(|row| row.samples);
        let vocabulary = self.model.vocab_size();
        let mut clients: Vec<_> = sampling
            .zip(logits.chunks_mut(vocabulary))
            .filter_map(|(row, logits)| Some((row.id, self.clients.remove(&row.id)?, logits)))
            .collect();
        let samples: Vec<_> = clients
            .par_iter_mut()
            .map(|(id, client, logits)| {
                let choose = || {
                    #[cfg(any(test, feature = "fault-injection"))]
                    self.faults.sampler(*id, &self.model.scheduler);
                    client.sampler.sample(logits)
                };
                (*id, guarded(choose))
            })
            .collect();
        self.clients
            .extend(clients.into_iter().map(|(id, client, _)| (id, client)));
        self.model.keep(logits);
        // The device has not counted them.
        samples.iter().for_each(|(id, _)| self.slots.forget(*id));
        samples
    }
}

/// Samples one sequence; whatever goes wrong is that sequence's alone.
fn guarded(choose: impl FnOnce() -> Result<Sample, NotANumber>) -> Result<Sample, Failure> {
    // A sampler that panicked is not used again: its sequence ends with this failure.
    match catch_unwind(AssertUnwindSafe(choose)) {
        Ok(sample) => sample.map_err(|NotANumber| Failure::NotANumber),
        Err(_) => Err(Failure::Sampler),
    }
}
