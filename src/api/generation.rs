//! From a checked request to engine requests, and from their events to the choices of one response.

use std::future::{pending, poll_fn};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::time::Sleep;

use super::access::{CLIENT_GONE, End, Generated, Report};
use super::choice::{Choice, Delta};
use super::deadline;
use super::ending::Running;
use super::error::ApiError;
use super::keys::{InFlight, Reservation};
use super::middleware::Caller;
use super::observe::Place;
use super::params::Params;
use super::shape::{Shape, finish_reason};
use super::types::{PromptDetails, Timing, Usage};
use super::{Model, Server};
#[cfg(any(test, feature = "fault-injection"))]
use crate::fault_injection::Fault;
use crate::request::{Event, Failure, FinishReason, Request, Sampling, TokenId};
use crate::text::{Detokenizer, Start};

/// Tokens of a completion that does not say how many, as OpenAI has it. (A chat answer fills the context.)
const COMPLETION_TOKENS: usize = 16;

/// What to generate.
pub(super) struct Plan {
    pub shape: Shape,
    /// The model that the prompts were made for.
    pub served: Arc<Model>,
    /// The name the client called the model by.
    pub model: String,
    pub prompts: Vec<Prompt>,
    pub params: Params,
}

/// One prompt, known to fit the model's context.
#[derive(Debug)]
pub(super) struct Prompt {
    pub tokens: Vec<TokenId>,
    /// The prompt's text where it is to be echoed.
    echo: String,
}

impl Prompt {
    /// `param` names the field to blame.
    pub fn new(model: &Model, param: &str, tokens: Vec<TokenId>, echo: String) -> Result<Self, ApiError> {
        if tokens.is_empty() {
            return Err(ApiError::invalid(
                param,
                "The prompt is empty; send at least one token.",
            ));
        }
        if let Some(id) = tokens.iter().find(|id| **id as usize >= model.vocab_size) {
            return Err(ApiError::invalid(param, format!("{id} is no token of the model.")));
        }
        if tokens.len() >= model.max_model_len {
            return Err(ApiError::context_length(param, tokens.len(), model.max_model_len));
        }
        Ok(Self { tokens, echo })
    }
}

/// A choice that has not ended.
struct Live {
    index: usize,
    events: UnboundedReceiver<Event>,
    /// Where the engine learns that it has ended here.
    ended: Arc<OnceLock<FinishReason>>,
}

/// The sequences of one client request, running. Dropping it cancels those that have not ended.
pub(super) struct Generation {
    server: Arc<Server>,
    #[cfg(any(test, feature = "fault-injection"))]
    id: String,
    choices: Vec<Choice>,
    live: Vec<Live>,
    /// Which of `live` is asked first next time, so that none waits for another.
    turn: usize,
    /// What is left to say of choices that ended without a token: nothing, unless another one has some.
    empty: Vec<(usize, Delta)>,
    /// When an engine that does not say that the deadline has passed is no longer waited for.
    overdue: Option<Pin<Box<Sleep>>>,
    /// Choices a prompt.
    n: usize,
    prompt_tokens: usize,
    arrival: Instant,
    model: String,
    report: Arc<Report>,
    /// How it ends, as far as is known: for the longest choice's reason, or for what went wrong.
    end: Option<End>,
    running: Running,
    /// What the caller's key was charged.
    reservation: Option<Reservation>,
    /// Kept from others of the same key until this has ended.
    _place: Option<Arc<InFlight>>,
}

impl Generation {
    /// Hands all sequences of `plan` to the engine, or none.
    pub fn start(server: Arc<Server>, plan: Plan, caller: &Caller, arrival: Instant) -> Result<Self, ApiError> {
        // The first word stands; it is the same for all of a request.
        let _ = caller.report.tenant.set(caller.tenant.clone());
        let model = &*plan.served;
        let running = server.ending.begin().ok_or_else(ApiError::shutting_down)?;
        let n = plan.params.n;
        let most = server.settings.max_choices;
        if plan.prompts.len().saturating_mul(n) > most {
            return Err(ApiError::invalid(
                "n",
                format!("The prompts times `n` are more than {most} choices."),
            ));
        }
        let prompt_tokens = plan.prompts.iter().map(|prompt| prompt.tokens.len()).sum();
        let timeout = deadline::shortest(&[plan.params.timeout, server.request_timeout()]);
        let deadline = timeout.map(|timeout| arrival + timeout);
        let reservation = caller.reserve(prompt_tokens, answer_tokens(&plan, model))?;
        let (mut choices, mut live, mut requests) = (Vec::new(), Vec::new(), Vec::new());
        for prompt in plan.prompts {
            for i in 0..n {
                let (events, receiver) = unbounded_channel();
                let sampling = sampling(&plan.params, plan.shape, model.max_model_len - prompt.tokens.len(), i);
                let ended = Arc::<OnceLock<_>>::default();
                live.push(Live {
                    index: choices.len(),
                    events: receiver,
                    ended: ended.clone(),
                });
                choices.push(choice(model, &plan.params, plan.shape, &sampling, prompt.echo.clone()));
                requests.push(Request {
                    id: caller.id.clone(),
                    tenant: caller.tenant.clone(),
                    priority: plan.params.priority,
                    prompt: prompt.tokens.clone(),
                    cache_salt: plan.params.cache_salt.clone(),
                    sampling,
                    arrival,
                    deadline,
                    span: caller.span.clone(),
                    events,
                    ended,
                });
            }
        }
        tracing::debug!(parent: &caller.span, prompt_tokens, choices = choices.len(), "submitting");
        (model.submit)(requests)?;
        server.observer.accepted(prompt_tokens);
        Ok(Self {
            server,
            #[cfg(any(test, feature = "fault-injection"))]
            id: caller.id.clone(),
            choices,
            live,
            turn: 0,
            empty: Vec::new(),
            overdue: deadline.map(|deadline| Box::pin(deadline::overdue(deadline))),
            n,
            prompt_tokens,
            arrival,
            model: plan.model,
            report: caller.report.clone(),
            end: None,
            running,
            reservation,
            _place: caller.place.clone(),
        })
    }

    /// Choices of the response.
    pub fn count(&self) -> usize {
        self.choices.len()
    }

    /// The next addition to a choice, with the choice's index; `None` when all have ended. After a failure the
    /// response is over: the other choices are cancelled when this is dropped.
    pub async fn next(&mut self) -> Option<Result<(usize, Delta), Failure>> {
        loop {
            if let Some(told) = self.next_empty() {
                return Some(Ok(told));
            }
            if self.live.is_empty() {
                return None;
            }
            let (live, turn) = (&mut self.live, &mut self.turn);
            let (slot, event) = tokio::select! {
                biased;
                event = poll_fn(|context| poll_event(live, turn, context)) => event,
                () = self.running.cut() => {
                    self.end = Some(End::Cut("shutting_down"));
                    return Some(Err(Failure::ShuttingDown));
                }
                () = passed(&mut self.overdue) => (0, Some(Event::Finished(FinishReason::Deadline))),
            };
            // A panic here would end the connection without a word.
            let taken = catch_unwind(AssertUnwindSafe(|| self.take(slot, event)));
            let taken = taken.unwrap_or_else(|_| {
                self.server.observer.panicked(Place::Text);
                Err(Failure::Text)
            });
            match taken {
                Ok(Some(delta)) => return Some(Ok(delta)),
                Ok(None) => {}
                Err(failure) => {
                    self.end = Some(End::Cut(ApiError::from(failure.clone()).cause()));
                    return Some(Err(failure));
                }
            }
        }
    }

    fn take(&mut self, slot: usize, event: Option<Event>) -> Result<Option<(usize, Delta)>, Failure> {
        let index = self.live[slot].index;
        let choice = &mut self.choices[index];
        let delta = match event {
            Some(Event::Admitted { at, window, .. }) => {
                choice.admitted = Some((at, window));
                return Ok(None);
            }
            Some(Event::Prefilled { cached_tokens }) => {
                choice.cached_tokens = cached_tokens;
                return Ok(None);
            }
            Some(Event::Token(token)) => {
                #[cfg(any(test, feature = "fault-injection"))]
                Fault::Detokenizer.panic_if_asked(&self.id, choice.tokens);
                self.server.observer.token();
                if choice.first.is_none() {
                    self.server
                        .observer
                        .first_token(token.at.saturating_duration_since(self.arrival));
                }
                choice.push(token)
            }
            Some(Event::Finished(FinishReason::Deadline)) if choice.tokens == 0 => {
                return self.give_up(slot, Failure::DeadlinePassed);
            }
            Some(Event::Finished(reason)) => choice.finish(reason),
            Some(Event::Failed(failure @ (Failure::DeadlinePassed | Failure::TooBusy { .. }))) => {
                return self.give_up(slot, failure);
            }
            Some(Event::Failed(failure)) => return Err(failure),
            None => return Err(Failure::EngineLost("it ended without a word".to_string())),
        };
        if let Some(reason) = delta.finish {
            self.end = match (self.end, reason) {
                (Some(End::Cut(cause)), _) => Some(End::Cut(cause)),
                (_, FinishReason::Deadline) => Some(End::Cut("deadline_passed")),
                (None, _) | (_, FinishReason::Length) => Some(End::Finished(finish_reason(reason))),
                (end, _) => end,
            };
            self.ended(slot, reason);
        }
        let shows = !delta.text.is_empty() || delta.finish.is_some();
        Ok(shows.then_some((index, delta)))
    }

    /// A choice has no time left for a token. That is the request's failure where none of its choices has one; else this
    /// one is empty, as if it had been cut.
    fn give_up(&mut self, slot: usize, failure: Failure) -> Result<Option<(usize, Delta)>, Failure> {
        let index = self.live[slot].index;
        let delta = self.choices[index].finish(FinishReason::Deadline);
        self.ended(slot, FinishReason::Deadline);
        if self.live.is_empty() && !self.has_tokens() {
            return Err(failure);
        }
        if !matches!(self.end, Some(End::Cut(_))) {
            self.end = Some(End::Cut(ApiError::from(failure).cause()));
        }
        self.empty.push((index, delta));
        Ok(None)
    }

    /// What is left to say of a choice without tokens, once another one has some.
    fn next_empty(&mut self) -> Option<(usize, Delta)> {
        if self.empty.is_empty() || !self.has_tokens() {
            return None;
        }
        self.empty.pop()
    }

    fn has_tokens(&self) -> bool {
        self.choices.iter().any(|choice| choice.tokens > 0)
    }

    /// A choice has ended.
    fn ended(&mut self, slot: usize, reason: FinishReason) {
        let live = self.live.swap_remove(slot);
        // That a stop string was found, or the deadline has passed, may be news to the engine.
        let _ = live.ended.set(reason);
        let choice = &self.choices[live.index];
        self.server.observer.choice_finished(choice.tokens, decode_time(choice));
        if self.live.is_empty() && self.has_tokens() {
            self.server.observer.request_finished(self.arrival.elapsed());
        }
    }

    pub fn usage(&self) -> Usage {
        let completion_tokens = self.choices.iter().map(|choice| choice.tokens).sum();
        // A prompt counts once, as its first choice found it: the others find what that one left.
        let cached_tokens = self
            .choices
            .iter()
            .step_by(self.n)
            .map(|choice| choice.cached_tokens)
            .sum();
        Usage {
            prompt_tokens: self.prompt_tokens,
            completion_tokens,
            total_tokens: self.prompt_tokens + completion_tokens,
            prompt_tokens_details: PromptDetails { cached_tokens },
        }
    }

    pub fn timing(&self) -> Timing {
        let mut longest = Timing::default();
        for choice in &self.choices {
            let Some((admitted, window)) = choice.admitted else {
                continue;
            };
            let queue = admitted.saturating_duration_since(self.arrival).saturating_sub(window);
            let prefill = choice
                .first
                .map_or(Duration::ZERO, |first| first.saturating_duration_since(admitted));
            longest.queue_ms = longest.queue_ms.max(milliseconds(queue));
            longest.window_ms = longest.window_ms.max(milliseconds(window));
            longest.prefill_ms = longest.prefill_ms.max(milliseconds(prefill));
            longest.decode_ms = longest.decode_ms.max(milliseconds(decode_time(choice)));
        }
        longest
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        let end = match self.end {
            Some(End::Cut(cause)) => End::Cut(cause),
            _ if std::thread::panicking() => End::Cut("internal"),
            Some(end) if self.live.is_empty() => end,
            _ => End::Cut(CLIENT_GONE),
        };
        // A request that left the queue has used its prompt, and what was generated of its answer.
        let ran = self.choices.iter().any(|choice| choice.admitted.is_some());
        let tokens = self.usage().total_tokens;
        if let Some(reservation) = self.reservation.as_mut().filter(|_| ran) {
            reservation.used(tokens);
        }
        // The only generation of its request is the first to say so.
        let _ = self.report.generated.set(Generated {
            model: std::mem::take(&mut self.model),
            usage: self.usage(),
            timing: self.timing(),
            end,
        });
    }
}

/// The most tokens that all of a plan's answers may have.
fn answer_tokens(plan: &Plan, model: &Model) -> usize {
    let each = |prompt: &Prompt| {
        let room = model.max_model_len - prompt.tokens.len();
        sampling(&plan.params, plan.shape, room, 0).max_tokens
    };
    plan.prompts
        .iter()
        .map(each)
        .sum::<usize>()
        .saturating_mul(plan.params.n)
}

/// Completes when the time has come, if there is one.
async fn passed(timer: &mut Option<Pin<Box<Sleep>>>) {
    match timer {
        Some(timer) => timer.as_mut().await,
        None => pending().await,
    }
}

/// The next event of those that have not ended, and its place among them.
fn poll_event(live: &mut [Live], turn: &mut usize, context: &mut Context<'_>) -> Poll<(usize, Option<Event>)> {
    for step in 0..live.len() {
        let slot = (*turn + step) % live.len();
        if let Poll::Ready(event) = live[slot].events.poll_recv(context) {
            *turn = slot + 1;
            return Poll::Ready((slot, event));
        }
    }
    Poll::Pending
}

/// The sampling of a prompt's choice `i`, with as many tokens as there is room for.
fn sampling(params: &Params, shape: Shape, room: usize, i: usize) -> Sampling {
    let default = match shape {
        Shape::Chat => room,
        Shape::Completion => COMPLETION_TOKENS,
    };
    Sampling {
        seed: params.sampling.seed.wrapping_add(i as u64),
        max_tokens: params.max_tokens.unwrap_or(default).min(room),
        ..params.sampling.clone()
    }
}

fn choice(model: &Model, params: &Params, shape: Shape, sampling: &Sampling, echo: String) -> Choice {
    let start = match shape {
        Shape::Chat => Start::Text,
        Shape::Completion => Start::Continuation,
    };
    let detokenizer = Detokenizer::new(model.tokenizer.clone(), start);
    Choice::new(detokenizer, params.stops.clone(), sampling.stop_token_ids.clone(), echo)
}

fn decode_time(choice: &Choice) -> Duration {
    match (choice.first, choice.last) {
        (Some(first), Some(last)) => last.saturating_duration_since(first),
        _ => Duration::ZERO,
    }
}

/// Milliseconds to three places.
pub(super) fn milliseconds(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}

#[cfg(test)]
#[path = "generation_tests.rs"]
mod tests;
