//! The engine thread's loop: arrivals in, a plan, a step, tokens out.

use std::{
    collections::HashMap,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::{Duration, Instant},
};

use rayon::prelude::*;
use tokio::{
    runtime::Runtime,
    sync::{OwnedSemaphorePermit, mpsc},
};

use super::{
    Message, Queued,
    budget::Budget,
    model::Model,
    sampler::{NotANumber, Sample, Sampler},
    watch::{End, Watch},
};
use crate::{
    batching::{Arrival, Plan, Sequence, SequenceId},
    request::{Event, Failure, FinishReason, Token},
    telemetry::EngineMetrics,
};

/// Who waits for a sequence, and how its tokens are chosen.
struct Client {
    events: mpsc::UnboundedSender<Event>,
    sampler: Sampler,
    arrival: Instant,
    /// The place in the queue, until a batch takes the request.
    place: Option<OwnedSemaphorePermit>,
}

pub struct Runner {
    pub(super) model: Model,
    inbox: mpsc::UnboundedReceiver<Message>,
    /// Gives the wait for an arrival its timeout.
    timer: Runtime,
    /// Whether anyone can still send requests.
    open: bool,
    clients: HashMap<SequenceId, Client>,
    pub(super) metrics: Arc<EngineMetrics>,
    preemptions: u64,
    pub(super) budget: Budget,
    pub(super) watch: Watch,
    #[cfg(any(test, feature = "fault-injection"))]
    pub(super) faults: super::inject::Faults,
}

impl Runner {
    pub fn new(
        model: Model,
        inbox: mpsc::UnboundedReceiver<Message>,
        timer: Runtime,
        metrics: Arc<EngineMetrics>,
        watch: Watch,
    ) -> Self {
        metrics.max_batch.set(model.scheduler.config().max_batch as f64);
        Self {
            model,
            inbox,
            timer,
            open: true,
            clients: HashMap::new(),
            metrics,
            preemptions: 0,
            budget: Budget::default(),
            watch,
            #[cfg(any(test, feature = "fault-injection"))]
            faults: super::inject::Faults::default(),
        }
    }

    /// Runs until nobody can send requests any more and all have ended, or until it cannot go on.
    pub fn run(&mut self) -> End {
        while self.open || !self.clients.is_empty() {
            self.watch.pulse.beat();
            self.receive();
            self.drop_cancelled();
            let now = Instant::now();
            let plan = self.model.scheduler.plan(now);
            self.announce(&plan, now);
            if plan.rows.is_empty() {
                self.observe();
                self.watch.pulse.rest();
                self.wait(plan.wake);
            } else {
                if let Err(end) = self.step(&plan) {
                    return end;
                }
                self.observe();
            }
        }
        End::Finished
    }

    /// Takes in what has arrived.
    fn receive(&mut self) {
        loop {
            match self.inbox.try_recv() {
                Ok(message) => self.take(message),
                Err(mpsc::error::TryRecvError::Empty) => return,
                Err(mpsc::error::TryRecvError::Disconnected) => {
                    self.open = false;
                    return;
                }
            }
        }
    }

    fn take(&mut self, message: Message) {
        match message {
            Message::Request(queued) => self.enqueue(queued),
            Message::Configure(change, reply) => {
                let config = self.model.scheduler.configure(&change).cloned();
                if let Ok(config) = &config {
                    tracing::info!(?change, "settings changed");
                    self.metrics.max_batch.set(config.max_batch as f64);
                }
                // Whoever asked may have left; the change stands.
                let _ = reply.send(config);
            }
        }
    }

    fn enqueue(&mut self, Queued { request, place }: Queued) {
        let sampler = Sampler::new(request.sampling, &request.prompt);
        let arrival = request.arrival;
        let id = self.model.scheduler.push(Arrival {
            prompt: request.prompt,
            arrival,
            deadline: request.deadline,
        });
        self.clients.insert(
            id,
            Client {
                events: request.events,
                sampler,
                arrival,
                place: Some(place),
            },
        );
        #[cfg(any(test, feature = "fault-injection"))]
        self.faults.note(id, &request.id);
        tracing::debug!(request = request.id, sequence = id, "queued");
    }

    /// Sleeps until a request arrives or `wake`.
    fn wait(&mut self, wake: Option<Instant>) {
        let inbox = &mut self.inbox;
        let arrived = self.timer.block_on(async {
            match wake {
                // Without anybody who could send, only the time is left to wait for.
                Some(wake) if !self.open => {
                    tokio::time::sleep_until(wake.into()).await;
                    None
                }
                // A client that leaves meanwhile is seen before long.
                Some(wake) => {
                    let look = wake.min(Instant::now() + Duration::from_millis(50));
                    tokio::time::timeout_at(look.into(), inbox.recv()).await.ok()
                }
                None => Some(inbox.recv().await),
            }
        });
        match arrived {
            Some(Some(message)) => self.take(message),
            Some(None) => self.open = false,
            None => {}
        }
    }

    /// Frees what nobody waits for any more.
    fn drop_cancelled(&mut self) {
        let gone: Vec<_> = self
            .clients
            .iter()
            .filter(|(_, client)| client.events.is_closed())
            .map(|(&id, _)| id)
            .collect();
        for id in gone {
            self.end(id, "cancelled", None);
        }
    }

    /// Tells the clients what planning decided.
    fn announce(&mut self, plan: &Plan, now: Instant) {
        for &id in &plan.expired {
            self.end(id, "expired", Some(Event::Failed(Failure::DeadlinePassed)));
        }
        for admission in &plan.admitted {
            let Some(client) = self.clients.get_mut(&admission.id) else {
                continue;
            };
            client.place = None;
            let waited = now.saturating_duration_since(client.arrival);
            self.metrics.window_seconds.observe(admission.window.as_secs_f64());
            self.metrics
                .queue_seconds
                .observe(waited.saturating_sub(admission.window).as_secs_f64());
            self.metrics.cached_tokens.inc_by(admission.cached_tokens as u64);
            let (window, cached_tokens) = (admission.window, admission.cached_tokens);
            // A client that has gone is seen at the next step.
            let _ = client.events.send(Event::Admitted {
                at: now,
                window,
                cached_tokens,
            });
        }
        for batch in &plan.batches {
            self.metrics.batches.inc();
            self.metrics.batch_requests.observe(batch.requests as f64);
            let positions = &self.metrics.prefill_positions;
            positions
                .with_label_values(&["packed"])
                .inc_by(batch.prompt_tokens as u64);
            positions
                .with_label_values(&["padded"])
                .inc_by(batch.padded_tokens as u64);
        }
    }

    fn step(&mut self, plan: &Plan) -> Result<(), End> {
        let started = Instant::now();
        let generated = |id| self.model.scheduler.sequence(id).map_or(0, Sequence::generated);
        let decodes = plan
            .rows
            .iter()
            .filter(|row| row.len == 1 && generated(row.id) > 0)
            .count();
        self.run_plan(plan)?;
        let seconds = started.elapsed().as_secs_f64();
        let tokens: usize = plan.rows.iter().map(|row| row.len).sum();
        self.metrics.busy_seconds.inc_by(seconds);
        self.metrics.step_seconds.observe(seconds);
        self.metrics.step_tokens.observe(tokens as f64);
        self.metrics.decode_tokens.inc_by(decodes as u64);
        self.metrics.prefill_tokens.inc_by((tokens - decodes) as u64);
        self.metrics
            .occupancy_steps
            .inc_by(plan.rows.len() as f64 / self.model.scheduler.config().max_batch as f64);
        tracing::trace!(tokens, sequences = plan.rows.len(), seconds, "step");
        Ok(())
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

    /// Sends a sampled token and goes on with its sequence or ends it.
    pub(super) fn deliver(&mut self, id: SequenceId, sample: Sample, at: Instant) {
        let (Some(client), Some(sequence)) = (self.clients.get(&id), self.model.scheduler.sequence(id)) else {
            return;
        };
        let Sample { token, logprobs } = sample;
        let _ = client.events.send(Event::Token(Token {
            id: token,
            at,
            logprobs,
        }));
        let sampling = client.sampler.sampling();
        let stops = sampling.stop_token_ids.contains(&token) && !sampling.ignore_eos;
        let context_full = sequence.tokens().len() + 1 >= self.model.scheduler.config().max_model_len;
        let enough = context_full || sequence.generated() + 1 >= sampling.max_tokens;
        if stops {
            self.end(id, "stop", Some(Event::Finished(FinishReason::Stop)));
        } else if enough {
            self.end(id, "length", Some(Event::Finished(FinishReason::Length)));
        } else {
            self.model.scheduler.append(id, token);
        }
    }

    /// Ends a sequence: its last event, its blocks, its place.
    pub(super) fn end(&mut self, id: SequenceId, outcome: &str, event: Option<Event>) {
        self.model.scheduler.remove(id, Instant::now());
        // Counted before its client hears of it, who may look.
        self.metrics.sequences.with_label_values(&[outcome]).inc();
        if let (Some(client), Some(event)) = (self.clients.remove(&id), event) {
            let _ = client.events.send(event);
        }
    }

    /// Publishes the scheduler's present state.
    fn observe(&mut self) {
        let scheduler = &self.model.scheduler;
        self.metrics
            .preemptions
            .inc_by(scheduler.preemptions() - self.preemptions);
        self.preemptions = scheduler.preemptions();
        if !self.watch.pulse.shown() {
            return;
        }
        self.metrics.waiting.set(scheduler.waiting() as f64);
        self.metrics.running.set(scheduler.running() as f64);
        let counts = scheduler.block_counts();
        for (state, blocks) in [("free", counts.free), ("held", counts.held), ("cached", counts.cached)] {
            self.metrics.kv_blocks.with_label_values(&[state]).set(blocks as f64);
        }
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
