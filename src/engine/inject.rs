//! Where the engine meets [injected faults](crate::fault_injection).

use std::{collections::HashMap, thread, time::Duration};

use super::{budget::tokens, fault::StepError, watch::Pulse};
use crate::{
    batching::{Plan, Scheduler, Sequence, SequenceId},
    fault_injection::Fault,
    request::TokenId,
};

#[derive(Debug, Default)]
pub struct Faults {
    /// Those to come, by the sequence that asked for them.
    asked: HashMap<SequenceId, (Fault, usize)>,
}

impl Faults {
    pub fn note(&mut self, id: SequenceId, request: &str) {
        if let Some(fault) = Fault::of(request) {
            self.asked.insert(id, fault);
        }
    }

    /// The faults whose time is this pass.
    fn due<'a>(&'a self, pass: &'a Plan, scheduler: &'a Scheduler) -> impl Iterator<Item = (SequenceId, Fault)> + 'a {
        pass.rows.iter().filter_map(|row| {
            let (fault, after) = *self.asked.get(&row.id)?;
            let sequence = scheduler.sequence(row.id)?;
            // With those that the step under way chooses.
            let generated = (row.start + row.len + sequence.generated()).checked_sub(sequence.tokens().len())?;
            (row.samples && generated >= after).then_some((row.id, fault))
        })
    }

    /// Outside of what a step's own faults are kept to.
    pub fn crash(&self, pass: &Plan, scheduler: &Scheduler) {
        if self.due(pass, scheduler).any(|(_, fault)| fault == Fault::Engine) {
            panic!("injected: the engine")
        }
    }

    pub fn before(&mut self, pass: &Plan, scheduler: &Scheduler, pulse: &Pulse) -> Result<(), StepError> {
        let due: Vec<_> = self.due(pass, scheduler).collect();
        for (id, fault) in due {
            match fault {
                Fault::Step => return Err(StepError::Failed("injected".into())),
                Fault::StepPanic => panic!("injected: a forward pass"),
                Fault::DeviceLost => return Err(StepError::DeviceLost("injected".into())),
                Fault::OutOfMemory if tokens(&pass.rows) > 1 => {
                    self.asked.remove(&id);
                    return Err(StepError::OutOfMemory("injected".into()));
                }
                Fault::Hang => {
                    while !pulse.abandoned() {
                        thread::sleep(Duration::from_millis(5));
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// `logits` are `[sampling rows × vocabulary]`.
    pub fn spoil(&self, pass: &Plan, scheduler: &Scheduler, logits: &mut [f32]) {
        let due: HashMap<_, _> = self.due(pass, scheduler).collect();
        let sampling: Vec<_> = pass.rows.iter().filter(|row| row.samples).collect();
        let width = logits.len() / sampling.len().max(1);
        for (row, logits) in sampling.iter().zip(logits.chunks_mut(width.max(1))) {
            match due.get(&row.id) {
                Some(Fault::NotANumber) => logits[width / 2] = f32::NAN,
                Some(Fault::Infinity) => logits[width / 2] = f32::INFINITY,
                _ => {}
            }
        }
    }

    /// `tokens` are one a sampling row.
    pub fn spoil_tokens(&self, pass: &Plan, scheduler: &Scheduler, tokens: &mut [Option<TokenId>]) {
        let due: HashMap<_, _> = self.due(pass, scheduler).collect();
        let sampling = pass.rows.iter().filter(|row| row.samples);
        for (row, token) in sampling.zip(tokens) {
            if let Some(Fault::NotANumber | Fault::Infinity) = due.get(&row.id) {
                *token = None;
            }
        }
    }

    pub fn sampler(&self, id: SequenceId, scheduler: &Scheduler) {
        let generated = scheduler.sequence(id).map_or(0, Sequence::generated);
        if self.asked.get(&id) == Some(&(Fault::Sampler, generated)) {
            panic!("injected: a sampler")
        }
    }
}
