//! A step when all is well, and when it is not: who is at fault ends, the others get the tokens they would have had.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    time::{Duration, Instant},
};

use sconce_models::Draw;

use super::{
    budget::tokens,
    choose::Answer,
    fault::{StepError, panic_message},
    model::Awaited,
    run::Runner,
    watch::End,
};
use crate::{
    batching::{Plan, Row},
    request::{Event, Failure, TokenId},
};

impl Runner {
    /// Runs rows pass by pass, to the end of each. A pass that failed has changed nothing that
    /// counts, since a row's keys and values count only once it is committed: so its rows run again, in halves, until
    /// those that fail stand alone. An error means that the engine cannot go on.
    pub(super) fn run_passes(&mut self, mut passes: Vec<Vec<Row>>) -> Result<(), End> {
        passes.reverse();
        while let Some(mut rows) = passes.pop() {
            self.drop_ended(&mut rows);
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

    /// Leaves out what is of no use any more: the rows of sequences that have ended or lost their blocks.
    pub(super) fn drop_ended(&self, rows: &mut Vec<Row>) {
        rows.retain(|row| self.model.scheduler.sequence(row.id).is_some());
    }

    /// Counts a failed pass; gives what to run instead.
    pub(super) fn failed(&mut self, mut rows: Vec<Row>, error: StepError) -> Result<Vec<Vec<Row>>, End> {
        let cause = match &error {
            StepError::OutOfMemory(_) => "out_of_memory",
            StepError::DeviceLost(_) => "device_lost",
            StepError::Panicked(_) => "step_panicked",
            StepError::Failed(_) => "step_failed",
        };
        self.metrics.faults.with_label_values(&[cause]).inc();
        tracing::error!(%error, sequences = rows.len(), tokens = tokens(&rows), "a step failed");
        self.drop_ended(&mut rows);
        match error {
            StepError::DeviceLost(reason) => return Err(End::DeviceLost(reason)),
            _ if rows.is_empty() => return Ok(Vec::new()),
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

    /// One forward pass, to its end.
    fn forward(&mut self, pass: &Plan) -> Result<Answer, StepError> {
        if let Some(draws) = self.draws(pass) {
            let awaited = self.launch(pass, &draws, None)?;
            return self.tokens(pass, awaited).map(Answer::Tokens);
        }
        #[cfg(any(test, feature = "fault-injection"))]
        self.faults.crash(pass, &self.model.scheduler);
        self.guarded(|runner| {
            #[cfg(any(test, feature = "fault-injection"))]
            (runner.faults).before(pass, &runner.model.scheduler, &runner.watch.pulse)?;
            #[cfg_attr(not(any(test, feature = "fault-injection")), allow(unused_mut))]
            let mut logits = runner.model.forward(pass)?;
            #[cfg(any(test, feature = "fault-injection"))]
            runner.faults.spoil(pass, &runner.model.scheduler, &mut logits);
            Ok(Answer::Logits(logits))
        })
    }

    /// Puts a pass on a device that samples, behind the step `before` and what it chooses. `draws` are this pass's:
    /// making them told `slots` that it will be enqueued, which an error takes back.
    pub(super) fn launch(
        &mut self,
        pass: &Plan,
        draws: &[Draw],
        before: Option<(&Plan, &Awaited)>,
    ) -> Result<Awaited, StepError> {
        #[cfg(any(test, feature = "fault-injection"))]
        self.faults.crash(pass, &self.model.scheduler);
        self.guarded(|runner| {
            #[cfg(any(test, feature = "fault-injection"))]
            (runner.faults).before(pass, &runner.model.scheduler, &runner.watch.pulse)?;
            Ok(runner.model.enqueue(pass, draws, before)?)
        })
    }

    /// Waits for the tokens of a pass.
    pub(super) fn tokens(&mut self, pass: &Plan, awaited: Awaited) -> Result<Vec<Option<TokenId>>, StepError> {
        #[cfg_attr(not(any(test, feature = "fault-injection")), allow(unused_mut))]
        let mut tokens = self.guarded(|runner| Ok(runner.model.wait(awaited)?))?;
        #[cfg(any(test, feature = "fault-injection"))]
        self.faults.spoil_tokens(pass, &self.model.scheduler, &mut tokens);
        #[cfg(not(any(test, feature = "fault-injection")))]
        let _ = pass;
        Ok(tokens)
    }

    /// A panic on the device's side is an error like others: what it wrote of keys and values lies behind what counts, and
    /// is written again. After an error, what the device has in its slots is told to it again.
    fn guarded<T>(&mut self, run: impl FnOnce(&mut Self) -> Result<T, StepError>) -> Result<T, StepError> {
        let result = catch_unwind(AssertUnwindSafe(|| run(self)))
            .unwrap_or_else(|panic| Err(StepError::Panicked(panic_message(&*panic))));
        result.inspect_err(|_| self.slots.forget_all())
    }

    /// Chooses a token for each row that reached its sequence's end. What a sequence without numbers computed, in this
    /// step or in earlier ones, is not kept for others.
    pub(super) fn sample(&mut self, pass: &Plan, answer: Answer, took: Duration) {
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
                            let unpinned = self.model.scheduler.distrust(id);
                            if !unpinned.is_empty() {
                                tracing::warn!(?unpinned, "pinned prompts gave no numbers; pin them again");
                            }
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
