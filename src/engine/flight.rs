//! The step that the device runs while the host plans and enqueues the next one.
//!
//! The host learns a step's tokens when that step lands, and by then the next one is enqueued: its plan took for granted
//! that every sequence goes on whose end cannot be known before, and where it goes on from an unknown token, the device
//! takes that from the step before. It counts what it chooses by itself, for penalties and random numbers
//! ([`super::slots`]). What it computes for a sequence that has ended meanwhile, or that was preempted, is void. Such a
//! sequence's blocks are given to others at once: the device runs all steps in the order in which they were enqueued, so
//! whoever gets a block writes into it after the last step that knew it as the other's. A block that is kept for its tokens is
//! full and written by nobody, so it may be shared and copied meanwhile; it is kept when its step has landed.
//!
//! Where someone wants log-probabilities, for which logits come to the host, or where the device's memory for a step is
//! short, a step runs to its end before the next one is enqueued, as every step does on a device that leaves sampling to the
//! host.

use std::time::Instant;

use tracing::Span;

use super::{choose::Answer, fault::StepError, model::Awaited, run::Runner, watch::End};
use crate::{
    batching::{Plan, Row},
    telemetry::trace::{self, Note},
};

/// A step that was planned.
pub(super) struct Planned {
    plan: Plan,
    at: Instant,
    /// Rows that run a generated token.
    decodes: usize,
    span: Span,
}

/// A step that the device runs, or has run without the host having looked.
pub(super) struct Flight {
    step: Planned,
    awaited: Awaited,
}

impl Runner {
    /// Sees to what a plan made at `now` says: enqueues its rows behind the step under way, if they can be, and lands that
    /// one. An error means that the engine cannot go on.
    pub(super) fn advance(&mut self, mut plan: Plan, now: Instant) -> Result<(), End> {
        let before = self.flight.take();
        self.drop_ended(&mut plan.rows);
        if plan.rows.is_empty() {
            return self.land(before);
        }
        let step = self.planned(plan, now);
        let whole = self.budget.passes(&step.plan.rows).len() == 1;
        let ahead = self.model.overlap && whole;
        let Some(draws) = ahead.then(|| self.draws(&step.plan)).flatten() else {
            self.land(before)?;
            return self.run_step(step);
        };
        self.watch.pulse.beat();
        let behind = before.as_ref().map(|flight| (&flight.step.plan, &flight.awaited));
        let enqueued = self.launch(&step.plan, &draws, behind);
        if self.watch.pulse.abandoned() {
            return Err(End::Hung);
        }
        match enqueued {
            Ok(awaited) => {
                self.flight = Some(Flight { step, awaited });
                self.land(before)
            }
            Err(error) => {
                self.land(before)?;
                let passes = self.failed(step.plan.rows.clone(), error)?;
                self.run_in(step, passes)
            }
        }
    }

    fn planned(&self, plan: Plan, at: Instant) -> Planned {
        let decodes = self.decodes(&plan.rows);
        let (rows, prefill_tokens) = (plan.rows.len(), plan.tokens() - decodes);
        let span = tracing::debug_span!("step", rows, prefill_tokens, decode_tokens = decodes);
        let admitted = plan.admitted.iter();
        for client in admitted.filter_map(|admission| self.clients.get(&admission.id)) {
            span.follows_from(&client.span);
        }
        Planned {
            plan,
            at,
            decodes,
            span,
        }
    }

    /// How many of these rows take a generated token.
    fn decodes(&self, rows: &[Row]) -> usize {
        let generated = |row: &&Row| {
            let sequence = self.model.scheduler.sequence(row.id);
            row.len == 1 && sequence.is_some_and(|s| row.start + s.generated() >= s.tokens().len())
        };
        rows.iter().filter(generated).count()
    }

    /// Waits for a step under way, and delivers its tokens.
    fn land(&mut self, flight: Option<Flight>) -> Result<(), End> {
        let Some(Flight { step, awaited }) = flight else {
            return Ok(());
        };
        let _in_span = step.span.clone().entered();
        self.watch.pulse.beat();
        let tokens = self.tokens(&step.plan, awaited);
        if self.watch.pulse.abandoned() {
            return Err(End::Hung);
        }
        match tokens {
            Ok(tokens) => {
                // The device began with it when it had ended the one before.
                let (began, ended) = (step.at.max(self.landed), Instant::now());
                self.budget.ran(self.model.scheduler.config().step_tokens);
                self.sample(&step.plan, Answer::Tokens(tokens), ended - began);
                self.admission.stepped(&step.plan, ended - began);
                self.count(&step, began, ended);
                Ok(())
            }
            Err(error) => self.recover(step, error),
        }
    }

    /// A step under way failed. What was enqueued behind it went on from nothing, so both run again, one by one.
    fn recover(&mut self, step: Planned, error: StepError) -> Result<(), End> {
        let next = self.flight.take();
        let passes = self.failed(step.plan.rows.clone(), error)?;
        let next = next.map(|Flight { step, awaited }| {
            self.watch.pulse.beat();
            // Whatever came of it is void.
            let _ = self.tokens(&step.plan, awaited);
            step
        });
        if self.watch.pulse.abandoned() {
            return Err(End::Hung);
        }
        self.run_in(step, passes)?;
        next.map_or(Ok(()), |next| self.run_step(next))
    }

    /// Runs a step to its end, in as few passes as memory allows.
    fn run_step(&mut self, step: Planned) -> Result<(), End> {
        let passes = self.budget.passes(&step.plan.rows);
        self.run_in(step, passes)
    }

    fn run_in(&mut self, mut step: Planned, passes: Vec<Vec<Row>>) -> Result<(), End> {
        // The step before may have ended sequences: what does not run is not counted.
        self.drop_ended(&mut step.plan.rows);
        if step.plan.rows.is_empty() {
            return Ok(());
        }
        step.decodes = self.decodes(&step.plan.rows);
        let span = step.span.clone();
        let _in_span = span.enter();
        let (planned, began) = (step.at.max(self.landed), Instant::now());
        self.run_passes(passes)?;
        let ended = Instant::now();
        self.admission.stepped(&step.plan, ended - planned);
        self.count(&step, began, ended);
        Ok(())
    }

    /// Counts a step that the device ran from `began` to `ended`.
    fn count(&mut self, step: &Planned, began: Instant, ended: Instant) {
        let (rows, tokens) = (step.plan.rows.len(), step.plan.tokens());
        let seconds = (ended - began).as_secs_f64();
        let max_batch = self.model.scheduler.config().max_batch;
        self.metrics.busy_seconds.inc_by(seconds);
        self.metrics.step_seconds.observe(seconds);
        self.metrics.step_tokens.observe(tokens as f64);
        self.metrics.occupancy_steps.inc_by(rows as f64 / max_batch as f64);
        self.timeline.note(|| {
            Note::Step(trace::Step {
                began,
                ended,
                rows,
                prefill_tokens: tokens - step.decodes,
                decode_tokens: step.decodes,
                max_batch,
            })
        });
        tracing::trace!(seconds, "step ended");
        self.landed = ended;
    }
}
