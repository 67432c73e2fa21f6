//! The gate as the HTTP side and the engine thread share it, and what the engine thread teaches it.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use super::{Refused, run::Client};
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
    pub fn ask(&self, requests: &[Request], now: Instant) -> Result<Accepted, Refused> {
        let ask = |request: &Request| Ask {
            tenant: request.tenant.clone(),
            priority: request.priority,
            prompt: request.prompt.len(),
            max_tokens: request.sampling.max_tokens,
            deadline: request.deadline,
        };
        let asks: Vec<Ask> = requests.iter().map(ask).collect();
        let mut gate = self.lock();
        gate.check(&asks)?;
        let accepted = gate.ask(&asks, now)?;
        drop(gate);
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

    /// A request has ended, with its answer or without.
    pub fn ended(&mut self, client: &Client, ending: Ending, metrics: &EngineMetrics, now: Instant) {
        let (arrival, generated) = (client.life.arrival, client.life.generated);
        if ending == Ending::Answered {
            self.estimates.lengths.observe(client.max_tokens(), generated);
        }
        let Some(predicted) = client.predicted else { return };
        let given = client
            .deadline
            .map(|deadline| deadline.saturating_duration_since(arrival));
        // One that was let in although it could not make it, on an idle server, says nothing of the prediction; nor does
        // one that waited only because others rightly went before it.
        if ending != Ending::Overtaken && given.is_none_or(|given| predicted <= given) {
            self.estimates.ended(ending == Ending::Late, arrival, now);
        }
        let took = (ending == Ending::Answered).then(|| now.saturating_duration_since(arrival));
        if let Some(error) = error(predicted, took, given) {
            metrics.prediction_error.observe(error);
        }
        metrics.prediction_margin.set(self.estimates.margin());
    }
}

/// How a request ended, as far as predictions go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// By itself.
    Answered,
    /// At its deadline.
    Late,
    /// In the queue, where it could not make its deadline any more.
    Overtaken,
}

/// By how much a prediction was off. One without its answer would have taken longer than its deadline gave it, so it is
/// off by at least that much; nothing is known of one that was not expected to make it.
fn error(predicted: Duration, took: Option<Duration>, given: Option<Duration>) -> Option<f64> {
    let took = took.or(given.filter(|given| predicted <= *given))?;
    Some(predicted.as_secs_f64() / took.as_secs_f64().max(1e-6) - 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prediction_is_off_by_at_least_what_the_deadline_shows() {
        let seconds = |seconds: u64| Some(Duration::from_secs(seconds));
        let error = |took, given| error(Duration::from_secs(4), took, given);
        assert_eq!(error(seconds(2), seconds(60)), Some(1.0));
        assert_eq!(error(seconds(8), None), Some(-0.5));
        assert_eq!(error(None, seconds(16)), Some(-0.75));
        assert_eq!(error(None, seconds(3)), None, "it was not expected to be in time");
        assert_eq!(error(None, None), None);
    }
}
