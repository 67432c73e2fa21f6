//! What the prefix cache saves, the prompts that are pinned in it, and what it tells of itself.

use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};

use super::{Handle, Message, Queued, Refused, run::Runner};
use crate::{
    batching::{BlockCounts, CachedPrefix, Computed, Namespace, Pin, PinCounts, PinError, SequenceId},
    request::{Event, Failure, Request},
    telemetry::EngineMetrics,
};

/// How a prompt is to be pinned.
#[derive(Debug)]
pub struct PinRequest {
    /// No other pinned prompt's.
    pub id: String,
    /// Who may list and unpin it; `None` leaves that to nobody.
    pub owner: Option<String>,
    /// For everyone, not for the request's tenant and salt alone.
    pub shared: bool,
    /// How long it stays, from when it is computed on; `None`: until it is unpinned.
    pub ttl: Option<Duration>,
}

/// A request to pin, and who waits for it.
#[derive(Debug)]
pub(super) struct PinOrder {
    pin: PinRequest,
    reply: oneshot::Sender<Result<PinInfo, PinError>>,
}

/// A pinned prompt, as far as others are told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PinInfo {
    pub id: String,
    /// In full blocks.
    pub tokens: usize,
    pub shared: bool,
    /// `None`: it stays until it is unpinned.
    pub expires_in: Option<Duration>,
}

/// Why a prompt was not pinned.
#[derive(Debug, thiserror::Error)]
pub enum PinFailed {
    #[error(transparent)]
    Refused(#[from] Refused),
    #[error(transparent)]
    Pin(#[from] PinError),
    #[error(transparent)]
    Failed(#[from] Failure),
}

/// What is asked of the cache while it is used.
#[derive(Debug)]
pub(super) enum Question {
    Report {
        reader: String,
        reply: oneshot::Sender<CacheReport>,
    },
    Unpin {
        id: String,
        owner: String,
        reply: oneshot::Sender<bool>,
    },
}

/// The cache as one tenant may see it: everyone's totals, its own prompts and prefixes and the shared ones.
#[derive(Debug)]
pub struct CacheReport {
    /// Tokens in a block.
    pub block_size: usize,
    pub blocks: BlockCounts,
    pub pins: PinCounts,
    pub prompts: Vec<PinInfo>,
    /// In no order.
    pub prefixes: Vec<CachedPrefix>,
    /// Sequences whose prompt was found in part, and not at all.
    pub hits: u64,
    pub misses: u64,
    pub cached_tokens: u64,
    pub prefill_tokens: u64,
    pub saved_seconds: f64,
}

impl Handle {
    /// Computes a request's prompt and pins its full blocks; what the request says of sampling does not matter, nor
    /// does where its events go. Takes a place in the queue until a batch takes it, which `admitted` hears of: from then
    /// on the prompt costs time, whatever comes of it.
    pub async fn pin(
        &self,
        mut request: Request,
        pin: PinRequest,
        mut admitted: impl FnMut(),
    ) -> Result<PinInfo, PinFailed> {
        let (events, mut ended) = mpsc::unbounded_channel();
        request.events = events;
        let mut accepted = self.gate.ask(std::slice::from_ref(&request), Instant::now())?;
        let Some(place) = accepted.places.pop() else {
            return Err(Refused::EngineLost.into());
        };
        if !self.watch.waiters.enter(std::slice::from_ref(&request)) {
            return Err(Refused::EngineLost.into());
        }
        let (reply, replied) = oneshot::channel();
        let phase = tracing::debug_span!(parent: &request.span, "queue");
        let queued = Box::new(Queued {
            request,
            place,
            predicted: None,
            phase,
        });
        let message = Message::Pin(queued, PinOrder { pin, reply });
        self.queue.send(message).map_err(|_| Refused::EngineLost)?;
        let mut reply = std::pin::pin!(self.reply(replied));
        let pinned = loop {
            tokio::select! {
                biased;
                Some(event) = ended.recv() => match event {
                    Event::Admitted { .. } => admitted(),
                    Event::Failed(failure) => return Err(failure.into()),
                    _ => {}
                },
                pinned = &mut reply => break pinned,
            }
        };
        if let Some(pinned) = pinned {
            return Ok(pinned?);
        }
        // Whoever gave the engine up says so to all who wait.
        while let Some(event) = ended.recv().await {
            if let Event::Failed(failure) = event {
                return Err(failure.into());
            }
        }
        Err(Refused::EngineLost.into())
    }

    /// Lets go of one of an owner's pinned prompts. False: it has none of this id.
    pub async fn unpin(&self, id: String, owner: String) -> Result<bool, Refused> {
        self.ask(|reply| Question::Unpin { id, owner, reply }).await
    }

    /// What `reader` may know of the cache.
    pub async fn cache_report(&self, reader: String) -> Result<CacheReport, Refused> {
        self.ask(|reply| Question::Report { reader, reply }).await
    }

    async fn ask<T>(&self, question: impl FnOnce(oneshot::Sender<T>) -> Question) -> Result<T, Refused> {
        let (reply, replied) = oneshot::channel();
        let message = Message::Cache(question(reply));
        self.queue.send(message).map_err(|_| Refused::EngineLost)?;
        self.reply(replied).await.ok_or(Refused::EngineLost)
    }
}

impl Runner {
    /// Queues a prompt that is to be pinned, if there is a chance that it can be.
    pub(super) fn start_pin(&mut self, mut queued: Queued, order: PinOrder) {
        let namespace = if order.pin.shared {
            Namespace::Shared
        } else {
            self.model.namespace(&queued.request)
        };
        let scheduler = &mut self.model.scheduler;
        scheduler.expire_pins(Instant::now());
        match scheduler.check_pin(&namespace, &queued.request.prompt) {
            Ok(tokens) => {
                queued.request.prompt.truncate(tokens);
                // It ends once its prompt is computed, and no later step may add to its blocks.
                queued.request.sampling.max_tokens = 1;
                self.enqueue(queued, namespace, Some(order));
            }
            // Whoever asked may have left; so may those below.
            Err(error) => drop(order.reply.send(Err(error))),
        }
    }

    /// Pins the blocks of a sequence that ran for that. False: it runs for its tokens.
    pub(super) fn finish_pin(&mut self, id: SequenceId, now: Instant) -> bool {
        let Some(PinOrder { pin, reply }) = self.clients.get_mut(&id).and_then(|client| client.pin.take()) else {
            return false;
        };
        let expires = pin.ttl.and_then(|ttl| now.checked_add(ttl));
        let pinned = self.model.scheduler.pin(id, pin.id, pin.owner, expires);
        if let Ok(pin) = &pinned {
            tracing::info!(id = pin.id, tokens = pin.tokens, "prompt pinned");
        }
        let pinned = pinned.map(|pin| info(pin, now));
        self.end(id, if pinned.is_ok() { "pinned" } else { "failed" }, None);
        // The figures are right by the time anybody can ask for them.
        self.observe();
        let _ = reply.send(pinned);
        true
    }

    pub(super) fn answer(&mut self, question: Question) {
        let now = Instant::now();
        self.model.scheduler.expire_pins(now);
        match question {
            Question::Report { reader, reply } => {
                let _ = reply.send(self.report(&reader, now));
            }
            Question::Unpin { id, owner, reply } => {
                let scheduler = &mut self.model.scheduler;
                let left = scheduler.unpin(|pin| pin.id == id && pin.owner.as_ref() == Some(&owner));
                self.observe();
                let _ = reply.send(left > 0);
            }
        }
    }

    fn report(&self, reader: &str, now: Instant) -> CacheReport {
        let (scheduler, metrics) = (&self.model.scheduler, &self.metrics);
        let requests = |outcome| metrics.cache.requests.with_label_values(&[outcome]).get();
        let told = |pin: &&Pin| pin.namespace.is_open_to(reader) || pin.owner.as_deref() == Some(reader);
        CacheReport {
            block_size: scheduler.block_size(),
            blocks: scheduler.block_counts(),
            pins: scheduler.pin_counts(),
            prompts: scheduler.pins().iter().filter(told).map(|pin| info(pin, now)).collect(),
            prefixes: scheduler.prefixes(reader),
            hits: requests("hit"),
            misses: requests("miss"),
            cached_tokens: metrics.cache.tokens.get(),
            prefill_tokens: metrics.prefill_tokens.get(),
            saved_seconds: metrics.cache.saved_seconds.get(),
        }
    }
}

fn info(pin: &Pin, now: Instant) -> PinInfo {
    PinInfo {
        id: pin.id.clone(),
        tokens: pin.tokens,
        shared: pin.namespace == Namespace::Shared,
        expires_in: pin.expires.map(|expires| expires.saturating_duration_since(now)),
    }
}

/// Prices what was found in the cache at what computing a token has cost.
#[derive(Debug, Default)]
pub struct Savings {
    prefill_tokens: f64,
    /// In steps, as far as their tokens were prefill.
    prefill_seconds: f64,
    /// Found, and not yet priced: nothing was computed until now.
    unpriced: usize,
}

impl Savings {
    /// Prompt tokens were found that need not be computed.
    pub fn found(&mut self, tokens: usize, metrics: &EngineMetrics) {
        metrics.cache.tokens.inc_by(tokens as u64);
        self.unpriced += tokens;
    }

    /// A forward pass has computed these.
    pub fn computed(&mut self, computed: Computed, took: Duration, metrics: &EngineMetrics) {
        let Computed {
            prefill,
            decode,
            recomputed,
        } = computed;
        metrics.prefill_tokens.inc_by(prefill as u64);
        metrics.decode_tokens.inc_by(decode as u64);
        metrics.recomputed_tokens.inc_by(recomputed as u64);
        let tokens = prefill + decode + recomputed;
        if prefill > 0 {
            self.prefill_tokens += prefill as f64;
            self.prefill_seconds += took.as_secs_f64() * prefill as f64 / tokens as f64;
        }
        if self.prefill_tokens > 0.0 {
            let price = self.prefill_seconds / self.prefill_tokens;
            metrics.cache.saved_seconds.inc_by(self.unpriced as f64 * price);
            self.unpriced = 0;
        }
    }
}
