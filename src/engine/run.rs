//! The engine thread's loop: arrivals in, a plan, a step, tokens out.

use std::{
    collections::HashMap,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::{Duration, Instant},
};

use rayon::prelude::*;
use sconce_models::Draw;
use tokio::{
    runtime::Runtime,
    sync::{OwnedSemaphorePermit, mpsc},
};

use super::{
    Message, Queued,
    model::Model,
    sampler::{NotANumber, Sample, Sampler},
};
use crate::{
    batching::{Arrival, Plan, Sequence, SequenceId},
    request::{Event, Failure, FinishReason, Token, TokenId},
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

/// What a step gave.
enum Answer {
    /// Of the rows that sample, `[rows × vocabulary]`.
    Logits(Vec<f32>),
    /// One for each row that samples; `None` where a logit was no number.
    Tokens(Vec<Option<TokenId>>),
}

pub struct Runner {
    model: Model,
    inbox: mpsc::UnboundedReceiver<Message>,
    /// Gives the wait for an arrival its timeout.
    timer: Runtime,
    /// Whether anyone can still send requests.
    open: bool,
    clients: HashMap<SequenceId, Client>,
    metrics: Arc<EngineMetrics>,
    preemptions: u64,
}

impl Runner {
    pub fn new(
        model: Model,
        inbox: mpsc::UnboundedReceiver<Message>,
        timer: Runtime,
        metrics: Arc<EngineMetrics>,
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
        }
    }

    /// Runs until nobody can send requests any more and all have ended.
    pub fn run(mut self) {
        while self.open || !self.clients.is_empty() {
            self.receive();
            self.drop_cancelled();
            let now = Instant::now();
            let plan = self.model.scheduler.plan(now);
            self.announce(&plan, now);
            if plan.rows.is_empty() {
                self.observe();
                self.wait(plan.wake);
            } else {
                self.step(&plan);
                self.observe();
            }
        }
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

    fn step(&mut self, plan: &Plan) {
        let started = Instant::now();
        let generated = |id| self.model.scheduler.sequence(id).map_or(0, Sequence::generated);
        let decodes = plan
            .rows
            .iter()
            .filter(|row| row.len == 1 && generated(row.id) > 0)
            .count();
        let ran = match self.draws(plan) {
            Some(draws) => self.model.sample(plan, &draws).map(Answer::Tokens),
            None => self.model.forward(plan).map(Answer::Logits),
        };
        match ran {
            Ok(answer) => {
                self.model.scheduler.commit(plan);
                match answer {
                    Answer::Logits(logits) => self.sample(plan, logits),
                    Answer::Tokens(tokens) => self.take_tokens(plan, tokens),
                }
            }
            Err(error) => {
                let error = sconce_models::without_backtrace(error);
                tracing::error!(%error, sequences = plan.rows.len(), "a step failed");
                for row in &plan.rows {
                    self.end(row.id, "failed", Some(Event::Failed(Failure::Step(error.to_string()))));
                }
            }
        }
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
    }

    /// How the device is to choose each row's token; `None` where the host chooses, from logits.
    fn draws(&mut self, plan: &Plan) -> Option<Vec<Draw>> {
        if !self.model.samples() {
            return None;
        }
        let vocabulary = self.model.vocab_size();
        let sampling = || plan.rows.iter().filter(|row| row.samples).map(|row| row.id);
        // Asked of all before any gives away a random number.
        let wants_logits =
            |id| (self.clients.get(&id)).is_none_or(|client: &Client| client.sampler.sampling().logprobs.is_some());
        if sampling().any(wants_logits) {
            return None;
        }
        let draw = |id| self.clients.get_mut(&id)?.sampler.next_draw(vocabulary);
        sampling().map(draw).collect()
    }

    /// Sends the tokens that the device chose.
    fn take_tokens(&mut self, plan: &Plan, tokens: Vec<Option<TokenId>>) {
        let at = Instant::now();
        let sampling = plan.rows.iter().filter(|row| row.samples);
        for (row, token) in sampling.zip(tokens) {
            let Some(client) = self.clients.get_mut(&row.id) else {
                continue;
            };
            let sample = token.ok_or(Failure::NotANumber).map(|token| {
                client.sampler.chose(token);
                Sample { token, logprobs: None }
            });
            self.deliver(row.id, sample, at);
        }
    }

    /// Chooses a token for each row that reached its sequence's end.
    fn sample(&mut self, plan: &Plan, mut logits: Vec<f32>) {
        let sampling = plan.rows.iter().filter(|row| row.samples);
        let mut clients: Vec<_> = sampling.map(|row| (row.id, self.clients.remove(&row.id))).collect();
        let vocabulary = self.model.vocab_size();
        let samples: Vec<_> = clients
            .par_iter_mut()
            .zip(logits.par_chunks_mut(vocabulary))
            .map(|((_, client), logits)| client.as_mut().map(|client| sample_one(&mut client.sampler, logits)))
            .collect();
        let at = Instant::now();
        for ((id, client), sample) in clients.into_iter().zip(samples) {
            if let (Some(client), Some(sample)) = (client, sample) {
                self.clients.insert(id, client);
                self.deliver(id, sample, at);
            }
        }
    }

    /// Sends a sampled token and goes on with its sequence or ends it.
    fn deliver(&mut self, id: SequenceId, sample: Result<Sample, Failure>, at: Instant) {
        let (Some(client), Some(sequence)) = (self.clients.get(&id), self.model.scheduler.sequence(id)) else {
            return;
        };
        let Sample { token, logprobs } = match sample {
            Ok(sample) => sample,
            Err(failure) => return self.end(id, "failed", Some(Event::Failed(failure))),
        };
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
    fn end(&mut self, id: SequenceId, outcome: &str, event: Option<Event>) {
        if let (Some(client), Some(event)) = (self.clients.remove(&id), event) {
            let _ = client.events.send(event);
        }
        self.model.scheduler.remove(id, Instant::now());
        self.metrics.sequences.with_label_values(&[outcome]).inc();
    }

    /// Publishes the scheduler's present state.
    fn observe(&mut self) {
        let scheduler = &self.model.scheduler;
        self.metrics.waiting.set(scheduler.waiting() as f64);
        self.metrics.running.set(scheduler.running() as f64);
        let counts = scheduler.block_counts();
        for (state, blocks) in [("free", counts.free), ("held", counts.held), ("cached", counts.cached)] {
            self.metrics.kv_blocks.with_label_values(&[state]).set(blocks as f64);
        }
        self.metrics
            .preemptions
            .inc_by(scheduler.preemptions() - self.preemptions);
        self.preemptions = scheduler.preemptions();
    }
}

/// Samples one sequence; whatever goes wrong is that sequence's alone.
fn sample_one(sampler: &mut Sampler, logits: &mut [f32]) -> Result<Sample, Failure> {
    // A sampler that panicked is not used again: its sequence ends with this failure.
    match catch_unwind(AssertUnwindSafe(|| sampler.sample(logits))) {
        Ok(sample) => sample.map_err(|NotANumber| Failure::NotANumber),
        Err(_) => Err(Failure::Step("choosing a token failed".into())),
    }
}
