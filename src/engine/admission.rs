//! The gate as the HTTP side and the engine thread share it, and what the engine thread teaches it.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use super::run::Client;
use crate::{
    batching::{Ask, Estimates, Gate, Plan, Refusal, Scheduler, SequenceId},
    request::Request,
    telemetry::EngineMetrics,
};

/// How often the queue is looked through for requests that can no longer make their deadlines.
const REVIEW: Duration = Duration::from_millis(10);

/// A gate behind a lock and not behind a channel: a refusal must not wait for the step that the engine thread is in, and
/// checking and letting in must be one act, or a crowd would pass the same check. Each side holds it for microseconds.
#[derive(Debug, Clone)]
pub struct SharedGate(Arc<Mutex<Gate>>);

/// What [`SharedGate::ask`] let in.
pub struct Accepted {
    /// One a request, in order.
    pub places: Vec<Place>,
    pub predicted: Option<Duration>,
}

/// Keeps a request counted until the scheduler has it: the outlook after this was dropped counts it, or it is gone.
#[derive(Debug)]
pub struct Place {
    id: SequenceId,
    gate: SharedGate,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.gate.lock().seen(self.id);
    }
}

impl SharedGate {
    pub fn new(gate: Gate) -> Self {
        Self(Arc::new(Mutex::new(gate)))
    }

    /// A gate is whole between any two of its calls, so a panic elsewhere leaves it usable.
    fn lock(&self) -> MutexGuard<'_, Gate> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets all of `requests` in or none.
    pub fn ask(&self, requests: &[Request], now: Instant) -> Result<Accepted, Refusal> {
        let ask = |request: &Request| Ask {
            tenant: request.tenant.clone(),
            priority: request.priority,
            prompt: request.prompt.len(),
            max_tokens: request.sampling.max_tokens,
            deadline: request.deadline,
        };
        let asks: Vec<Ask> = requests.iter().map(ask).collect();
        let accepted = self.lock().ask(&asks, now)?;
        let place = |id| Place { id, gate: self.clone() };
        Ok(Accepted {
            places: accepted.ids.into_iter().map(place).collect(),
            predicted: accepted.predicted,
        })
    }
}

/// The engine thread's side of the gate.
pub struct Teacher {
    gate: SharedGate,
    estimates: Estimates,
    reviewed: Option<Instant>,
}

impl Teacher {
    pub fn new(gate: SharedGate) -> Self {
        Self {
            gate,
            estimates: Estimates::default(),
            reviewed: None,
        }
    }

    /// Tells the gate what is before the scheduler, and gives a waiting request that can no longer make its deadline.
    pub fn publish(&mut self, scheduler: &Scheduler, now: Instant) -> Option<(SequenceId, Refusal)> {
        let outlook = scheduler.outlook(&self.estimates, now);
        let mut gate = self.gate.lock();
        gate.update(outlook, &self.estimates);
        if self
            .reviewed
            .is_some_and(|reviewed| now.saturating_duration_since(reviewed) < REVIEW)
        {
            return None;
        }
        self.reviewed = Some(now);
        gate.hopeless(now)
    }

    /// A plan was made, run and sampled in `took`.
    pub fn stepped(&mut self, plan: &Plan, took: Duration) {
        let decodes = plan.rows.iter().filter(|row| row.len == 1 && row.start > 0).count();
        self.estimates
            .step
            .observe(plan.tokens() - decodes, decodes, took.as_secs_f64());
    }

    /// A sequence left the scheduler.
    pub fn left(&self, id: SequenceId) {
        self.gate.lock().ended(id);
    }

    /// A request came to its end by itself, or at its deadline.
    pub fn ended(&mut self, client: &Client, late: bool, metrics: &EngineMetrics, now: Instant) {
        let took = now.saturating_duration_since(client.life.arrival).as_secs_f64();
        let Some(predicted) = client.predicted else {
            if !late {
                self.estimates
                    .lengths
                    .observe(client.max_tokens(), client.life.generated);
            }
            return;
        };
        // One that was let in although it could not make it, on an idle server, says nothing of the prediction.
        if client
            .deadline
            .is_none_or(|deadline| client.life.arrival + predicted <= deadline)
        {
            self.estimates.ended(late, client.life.arrival, now);
        }
        if !late {
            self.estimates
                .lengths
                .observe(client.max_tokens(), client.life.generated);
            metrics
                .prediction_error
                .observe(predicted.as_secs_f64() / took.max(1e-6) - 1.0);
        }
        metrics.prediction_margin.set(self.estimates.margin());
    }
}
