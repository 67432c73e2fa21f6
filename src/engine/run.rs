//! The engine thread's loop: arrivals in, a plan, a step, tokens out.

use std::{
    collections::HashMap,
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use tokio::{runtime::Runtime, sync::mpsc};
use tracing::Span;

use super::{
    Handle, Message, Queued,
    admission::{Ending, Teacher},
    budget::Budget,
    cache::{PinOrder, Savings},
    cache_file::Saves,
    flight::Flight,
    model::Model,
    sampler::{Sample, Sampler},
    slots::Slots,
    watch::{End, Watch},
};
use crate::{
    batching::{Arrival, Namespace, Plan, SequenceId},
    request::{Event, Failure, FinishReason, Token},
    telemetry::{
        EngineMetrics,
        trace::{self, Life, Note, Timeline},
    },
};

/// Who waits for a sequence, and how its tokens are chosen.
pub(super) struct Client {
    pub(super) span: Span,
    /// The span of the phase that it is in.
    phase: Span,
    events: mpsc::UnboundedSender<Event>,
    /// [`crate::request::Request::ended`]
    ended: Arc<OnceLock<FinishReason>>,
    pub(super) sampler: Sampler,
    pub(super) life: Life,
    pub(super) deadline: Option<Instant>,
    /// How long it was expected to take when it came.
    pub(super) predicted: Option<Duration>,
    /// The prompt is to be pinned; no token is wanted.
    pub(super) pin: Option<PinOrder>,
}

impl Client {
    /// The most tokens that it asked for.
    pub(super) fn max_tokens(&self) -> usize {
        self.sampler.sampling().max_tokens
    }

    /// How it ended, once nobody listens to it.
    fn unheard(&self) -> &'static str {
        match self.ended.get() {
            None => "cancelled",
            Some(FinishReason::Deadline) if self.life.generated == 0 => "expired",
            Some(FinishReason::Deadline) => "cut",
            Some(FinishReason::Stop | FinishReason::Length) => "stop",
        }
    }

    /// It left the queue: its prefill begins.
    fn admitted(&mut self, at: Instant, window: Duration, cached_tokens: usize) {
        self.life.admitted = Some((at, window));
        self.life.cached_tokens = cached_tokens;
        let window_ms = window.as_secs_f64() * 1e3;
        tracing::debug!(parent: &self.span, sequence = self.life.sequence, window_ms, cached_tokens, "admitted");
        self.phase = tracing::debug_span!(parent: &self.span, "prefill");
    }

    /// It has one more token: from the first on it decodes.
    fn generated(&mut self, at: Instant) {
        if self.life.first_token.is_none() {
            self.life.first_token = Some(at);
            self.phase = tracing::debug_span!(parent: &self.span, "decode");
        }
        self.life.last_token = Some(at);
        self.life.generated += 1;
    }
}

pub struct Runner {
    /// The step that the device runs. Dropped before the model, as it waits for what reads the model's memory.
    pub(super) flight: Option<Flight>,
    pub(super) model: Model,
    inbox: mpsc::UnboundedReceiver<Message>,
    /// Gives the wait for an arrival its timeout.
    timer: Runtime,
    /// Whether anyone can still send requests.
    open: bool,
    pub(super) clients: HashMap<SequenceId, Client>,
    pub(super) metrics: Arc<EngineMetrics>,
    number: u64,
    /// What this engine has counted so far; the metrics count all engines of the process.
    preemptions: u64,
    evictions: u64,
    saves: Saves,
    pub(super) savings: Savings,
    pub(super) timeline: Arc<Timeline>,
    pub(super) admission: Teacher,
    pub(super) budget: Budget,
    /// Where a device that samples has the sequences' states.
    pub(super) slots: Slots,
    /// When the last step had ended.
    pub(super) landed: Instant,
    pub(super) watch: Watch,
    #[cfg(any(test, feature = "fault-injection"))]
    pub(super) faults: super::inject::Faults,
}

impl Runner {
    /// The engine behind `handle`.
    pub fn new(model: Model, inbox: mpsc::UnboundedReceiver<Message>, timer: Runtime, handle: &Handle) -> Self {
        Self {
            model,
            inbox,
            timer,
            open: true,
            clients: HashMap::new(),
            metrics: handle.metrics.clone(),
            number: handle.number,
            preemptions: 0,
            evictions: 0,
            saves: Saves::default(),
            savings: Savings::default(),
            timeline: handle.timeline.clone(),
            admission: Teacher::new(handle.gate.clone()),
            budget: Budget::default(),
            slots: Slots::default(),
            flight: None,
            landed: Instant::now(),
            watch: handle.watch.clone(),
            #[cfg(any(test, feature = "fault-injection"))]
            faults: super::inject::Faults::default(),
        }
    }

    /// Runs until nobody can send requests any more, all have ended, and what was to be saved is copied, or until it
    /// cannot go on.
    pub fn run(&mut self) -> End {
        while self.open || !self.clients.is_empty() || self.saves.wake(Instant::now()).is_some() {
            if self.watch.pulse.abandoned() {
                return End::Hung;
            }
            self.watch.pulse.beat();
            self.receive();
            let Model {
                scheduler,
                cache,
                cache_file,
                ..
            } = &self.model;
            self.saves.advance(cache_file.as_ref(), scheduler.blocks(), cache);
            self.drop_unheard();
            let now = Instant::now();
            let plan = self.model.scheduler.plan(now);
            self.announce(&plan, now);
            self.publish(now);
            if plan.rows.is_empty() && self.flight.is_none() {
                self.observe();
                self.watch.pulse.rest();
                self.wait(plan.wake.into_iter().chain(self.saves.wake(now)).min());
            } else {
                if let Err(end) = self.advance(plan, now) {
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
            Message::Requests(requests) => {
                for queued in requests {
                    let namespace = self.model.namespace(&queued.request);
                    self.enqueue(queued, namespace, None);
                }
            }
            Message::Pin(queued, order) => self.start_pin(*queued, order),
            Message::Cache(question) => self.answer(question),
            Message::Configure(change, reply) => {
                let config = self.model.scheduler.configure(&change).cloned();
                if config.is_ok() {
                    tracing::info!(?change, "settings changed");
                    self.observe();
                }
                // Whoever asked may have left; the change stands.
                let _ = reply.send(config);
            }
            Message::Shown => self.observe(),
            Message::Live(reply) => {
                let _ = reply.send(self.clients.values().map(|client| client.life.clone()).collect());
            }
            Message::Save(reply) => self.saves.ask(reply),
        }
    }

    /// Queues a request as a sequence.
    pub(super) fn enqueue(&mut self, queued: Queued, namespace: Namespace, pin: Option<PinOrder>) {
        let Queued {
            request,
            place,
            predicted,
            phase,
        } = queued;
        let prompt_tokens = request.prompt.len();
        let max_tokens = request.sampling.max_tokens;
        let sampler = Sampler::new(request.sampling, &request.prompt);
        let (arrival, span) = (request.arrival, request.span);
        let id = self.model.scheduler.push(Arrival {
            namespace,
            prompt: request.prompt,
            max_tokens,
            tenant: request.tenant.clone(),
            priority: request.priority,
            arrival,
            deadline: request.deadline,
        });
        drop(place);
        #[cfg(any(test, feature = "fault-injection"))]
        self.faults.note(id, &request.id);
        tracing::debug!(parent: &span, sequence = id, "queued");
        self.clients.insert(
            id,
            Client {
                span,
                phase,
                events: request.events,
                ended: request.ended,
                sampler,
                life: Life {
                    sequence: id,
                    request: request.id,
                    tenant: request.tenant,
                    prompt_tokens,
                    cached_tokens: 0,
                    generated: 0,
                    arrival,
                    admitted: None,
                    first_token: None,
                    last_token: None,
                    ended: None,
                },
                deadline: request.deadline,
                predicted,
                pin,
            },
        );
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
    fn drop_unheard(&mut self) {
        let gone: Vec<_> = self
            .clients
            .iter()
            .filter(|(_, client)| client.events.is_closed())
            .map(|(&id, client)| (id, client.unheard()))
            .collect();
        for (id, outcome) in gone {
            self.end(id, outcome, None);
        }
    }

    /// Tells the clients what planning decided.
    fn announce(&mut self, plan: &Plan, now: Instant) {
        for &id in &plan.expired {
            match self.clients.get(&id).is_some_and(|client| client.life.generated > 0) {
                true => self.end(id, "cut", Some(Event::Finished(FinishReason::Deadline))),
                false => self.end(id, "expired", Some(Event::Failed(Failure::DeadlinePassed))),
            }
        }
        for admission in &plan.admitted {
            let Some(client) = self.clients.get_mut(&admission.id) else {
                continue;
            };
            let waited = now.saturating_duration_since(client.life.arrival);
            self.metrics.window_seconds.observe(admission.window.as_secs_f64());
            self.metrics
                .queue_seconds
                .observe(waited.saturating_sub(admission.window).as_secs_f64());
            let (window, cached_tokens) = (admission.window, admission.cached_tokens);
            client.admitted(now, window, cached_tokens);
            // A client that has gone is seen at the next step.
            let _ = client.events.send(Event::Admitted {
                at: now,
                window,
                cached_tokens,
            });
        }
        self.savings.found(plan.cached_tokens, &self.metrics);
        let mut admitted = plan.admitted.iter();
        for batch in &plan.batches {
            let windows = admitted.by_ref().take(batch.requests).map(|admission| admission.window);
            let window = windows.max().unwrap_or_default();
            self.timeline.note(|| {
                Note::Batch(trace::Batch {
                    opened: now.checked_sub(window).unwrap_or(now),
                    closed: now,
                    requests: batch.requests,
                    prompt_tokens: batch.prompt_tokens,
                })
            });
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

    /// Lets the gate know what is ahead of whoever comes next, and refuses one that waits in vain.
    fn publish(&mut self, now: Instant) {
        if let Some((id, refusal)) = self.admission.publish(&self.model.scheduler, now) {
            let retry_after = refusal.retry_after;
            self.end(id, "refused", Some(Event::Failed(Failure::TooBusy { retry_after })));
        }
    }

    /// Sends a sampled token and goes on with its sequence or ends it.
    pub(super) fn deliver(&mut self, id: SequenceId, sample: Sample, at: Instant) {
        if self.finish_pin(id, at) {
            return;
        }
        let (Some(client), Some(sequence)) = (self.clients.get_mut(&id), self.model.scheduler.sequence(id)) else {
            return;
        };
        let Sample { token, logprobs } = sample;
        if sequence.generated() == 0 {
            let cached_tokens = sequence.cached_tokens();
            self.metrics.cache.request(cached_tokens);
            client.life.cached_tokens = cached_tokens;
            let _ = client.events.send(Event::Prefilled { cached_tokens });
        }
        client.generated(at);
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
    pub(super) fn end(&mut self, id: SequenceId, outcome: &'static str, event: Option<Event>) {
        let now = Instant::now();
        self.model.scheduler.remove(id, now);
        self.slots.release(id);
        // Counted before its client hears of it, who may look, or ask again.
        self.admission.left(id);
        self.metrics.sequences.with_label_values(&[outcome]).inc();
        if let Some(mut client) = self.clients.remove(&id) {
            client.life.ended = Some((now, outcome));
            match &event {
                Some(Event::Failed(failure)) if outcome == "failed" => {
                    tracing::warn!(parent: &client.span, sequence = id, %failure, "failed");
                }
                _ => tracing::debug!(parent: &client.span, sequence = id, outcome, "ended"),
            }
            let judged = match outcome {
                "stop" | "length" => Some(Ending::Answered),
                "cut" | "expired" => Some(Ending::Late),
                "refused" => Some(Ending::Overtaken),
                _ => None,
            };
            if let Some(ending) = judged {
                self.admission.ended(&client, ending, &self.metrics, now);
            }
            // The last phase ends within the request, whose own span the client's side ends when it hears of this.
            client.phase = Span::none();
            if let Some(event) = event {
                let _ = client.events.send(event);
            }
            self.timeline.note(|| Note::Ended(client.life));
        }
    }

    /// Publishes the scheduler's present state.
    pub(super) fn observe(&mut self) {
        let scheduler = &self.model.scheduler;
        self.metrics
            .preemptions
            .inc_by(scheduler.preemptions() - self.preemptions);
        self.preemptions = scheduler.preemptions();
        let evictions = scheduler.pin_counts().evictions;
        self.metrics.cache.evictions.inc_by(evictions - self.evictions);
        self.evictions = evictions;
        if !self.metrics.shown.is(self.number) || self.watch.pulse.abandoned() {
            return;
        }
        self.metrics.max_batch.set(scheduler.config().max_batch as f64);
        self.metrics.waiting.set(scheduler.waiting() as f64);
        self.metrics.running.set(scheduler.running() as f64);
        let counts = scheduler.block_counts();
        for (state, blocks) in [
            ("free", counts.free),
            ("held", counts.held),
            ("cached", counts.cached),
            ("pinned", counts.pinned),
        ] {
            self.metrics.kv_blocks.with_label_values(&[state]).set(blocks as f64);
        }
        self.metrics.cache.observe(scheduler.pin_counts());
        self.timeline.note(|| {
            Note::State(trace::State {
                at: Instant::now(),
                waiting: scheduler.waiting(),
                running: scheduler.running(),
                free_blocks: counts.free,
                held_blocks: counts.held,
                cached_blocks: counts.cached,
            })
        });
    }
}
