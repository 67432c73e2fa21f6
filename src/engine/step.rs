//! A step when all is well, and when it is not: who is at fault ends, the others get the tokens they would have had.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    time::{Duration, Instant},
};

use super::{
    budget::tokens,
    choose::Answer,
    fault::{StepError, panic_message},
    run::Runner,
    watch::End,
};
use crate::{
    batching::{Plan, Row},
    request::{Event, Failure},
};

impl Runner {
    /// Runs a plan's rows in as few passes as memory and faults allow. A pass that failed has changed nothing that
    /// counts, since a row's keys and values count only once it is committed: so its rows run again, in halves, until
    /// those that fail stand alone. An error means that the engine cannot go on.
    pub(super) fn run_plan(&mut self, plan: &Plan) -> Result<(), End> {
        let mut passes = self.budget.passes(&plan.rows);
        passes.reverse();
        while let Some(mut rows) = passes.pop() {
            // An earlier pass may have ended sequences.
            rows.retain(|row| self.model.scheduler.sequence(row.id).is_some());
            if rows.is_empty() {
                continue;
            }
            let pass = Plan {
                rows,
                ..Plan::default()
            };
            self.watch.pulse.beat();
            let began = Instant::now();
            let answer = self.forward(&pass);
            if self.watch.pulse.abandoned() {
                return Err(End::Hung);
            }
            match answer {
                Ok(answer) => {
                    self.budget.ran(self.model.scheduler.config().step_tokens);
                    self.sample(&pass, answer, began.elapsed());
                }
                Err(error) => passes.extend(self.failed(pass.rows, error)?.into_iter().rev()),
            }
        }
        Ok(())
    }

    /// Counts a failed pass; gives what to run instead.
    fn failed(&mut self, rows: Vec<Row>, error: StepError) -> Result<Vec<Vec<Row>>, End> {
        let cause = match &error {
            StepError::OutOfMemory(_) => "out_of_memory",
            StepError::DeviceLost(_) => "device_lost",
            StepError::CacheLost(_) | StepError::Panicked(_) => "step_panicked",
            StepError::Failed(_) => "step_failed",
        };
        self.metrics.faults.with_label_values(&[cause]).inc();
        tracing::error!(%error, sequences = rows.len(), tokens = tokens(&rows), "a step failed");
        match error {
            StepError::DeviceLost(reason) => return Err(End::DeviceLost(reason)),
            StepError::CacheLost(reason) => return Err(End::Panicked(reason)),
            StepError::OutOfMemory(_) => {
                if let Some(smaller) = self.budget.shrink(&rows) {
                    return Ok(smaller);
                }
            }
            StepError::Panicked(_) | StepError::Failed(_) => {}
        }
        if let [row] = rows[..] {
            let failure = Failure::Step(error.to_string());
            self.end(row.id, "failed", Some(Event::Failed(failure)));
            return Ok(Vec::new());
        }
        let (first, second) = rows.split_at(rows.len() / 2);
        Ok(vec![first.to_vec(), second.to_vec()])
    }

    /// One forward pass; a panic in it is an error like others, as long as it left the cache whole.
    fn forward(&mut self, pass: &Plan) -> Result<Answer, StepError> {
        #[cfg(any(test, feature = "fault-injection"))]
        self.faults.crash(pass, &self.model.scheduler);
        let draws = self.draws(pass);
        let run = || {
            #[cfg(any(test, feature = "fault-injection"))]
            self.faults.before(pass, &self.model.scheduler, &self.watch.pulse)?;
            #[cfg_attr(not(any(test, feature = "fault-injection")), allow(unused_mut))]
            let mut answer = match &draws {
                Some(draws) => Answer::Tokens(self.model.sample(pass, draws)?),
                None => Answer::Logits(self.model.forward(pass)?),
            };
            #[cfg(any(test, feature = "fault-injection"))]
            if let Answer::Logits(logits) = &mut answer {
                self.faults.spoil(pass, &self.model.scheduler, logits);
            }
            Ok(answer)
        };
        catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|panic| {
            let message = panic_message(&*panic);
            Err(if self.model.cache_is_whole() {
                StepError::Panicked(message)
            } else {
                StepError::CacheLost(message)
            })
        })
    }

    /// Chooses a token for each row that reached its sequence's end. What a sequence without numbers computed, in this
    /// step or in earlier ones, is not kept for others.
    fn sample(&mut self, pass: &Plan, answer: Answer, took: Duration) {
        let samples = match answer {
            Answer::Logits(logits) => self.choose(pass, logits),
            Answer::Tokens(tokens) => self.chosen(pass, tokens),
        };
        let at = Instant::now();
        let mut chosen = Vec::new();
        for (id, sample) in samples {
            match sample {
                Ok(sample) => chosen.push((id, sample)),
                Err(failure) => {
                    let cause = match failure {
                        Failure::Sampler => "sampler_panicked",
                        _ => {
                            self.model.scheduler.distrust(id);
                            "not_a_number"
                        }
                    };
                    self.metrics.faults.with_label_values(&[cause]).inc();
                    self.end(id, "failed", Some(Event::Failed(failure)));
                }
            }
        }
        let computed = self.model.scheduler.commit(pass);
        self.savings.computed(computed, took, &self.metrics);
        for (id, sample) in chosen {
            self.deliver(id, sample, at);
        }
    }
}
