//! How a step's rows get their tokens: chosen by the device itself where it can, else here from their logits.

use std::panic::{AssertUnwindSafe, catch_unwind};

use rayon::prelude::*;
use sconce_models::Draw;

use super::{
    run::{Client, Runner},
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
    /// How the device is to choose each row's token; `None` where the host chooses, from logits.
    pub(super) fn draws(&mut self, plan: &Plan) -> Option<Vec<Draw>> {
        if !self.model.samples() {
            return None;
        }
        let vocabulary = self.model.vocab_size();
        let sampling = || plan.rows.iter().filter(|row| row.samples).map(|row| row.id);
        let wants_logits =
            |id| (self.clients.get(&id)).is_none_or(|client: &Client| client.sampler.sampling().logprobs.is_some());
        if sampling().any(wants_logits) {
            return None;
        }
        let scheduler = &self.model.scheduler;
        let draw = |row: &Row| {
            let known = scheduler.sequence(row.id)?.tokens().len();
            let ahead = (row.start + row.len).saturating_sub(known);
            self.clients.get_mut(&row.id)?.sampler.draw_for(ahead, vocabulary)
        };
        plan.rows.iter().filter(|row| row.samples).map(draw).collect()
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
        let mut clients: Vec<_> = sampling
            .filter_map(|row| Some((row.id, self.clients.remove(&row.id)?)))
            .collect();
        let vocabulary = self.model.vocab_size();
        let samples: Vec<_> = clients
            .par_iter_mut()
            .zip(logits.par_chunks_mut(vocabulary))
            .map(|((id, client), logits)| {
                let choose = || {
                    #[cfg(any(test, feature = "fault-injection"))]
                    self.faults.sampler(*id, &self.model.scheduler);
                    client.sampler.sample(logits)
                };
                (*id, guarded(choose))
            })
            .collect();
        self.clients.extend(clients);
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
