//! From a checked request to engine requests, and from their events to the choices of one response.

use std::future::poll_fn;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::choice::{Choice, Delta};
use super::error::ApiError;
use super::middleware::Caller;
use super::observe::Place;
use super::params::Params;
use super::shape::Shape;
use super::types::{PromptDetails, Timing, Usage};
use super::{Model, Server};
#[cfg(any(test, feature = "fault-injection"))]
use crate::fault_injection::Fault;
use crate::request::{Event, Failure, Request, Sampling, TokenId};
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
    tokens: Vec<TokenId>,
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

/// The sequences of one client request, running. Dropping it cancels those that have not ended.
pub(super) struct Generation {
    server: Arc<Server>,
    #[cfg(any(test, feature = "fault-injection"))]
    id: String,
    choices: Vec<Choice>,
    /// The choices that have not ended, by index.
    live: Vec<(usize, UnboundedReceiver<Event>)>,
    /// Which of `live` is asked first next time, so that none waits for another.
    turn: usize,
    /// Choices a prompt.
    n: usize,
    prompt_tokens: usize,
    arrival: Instant,
}

impl Generation {
    /// Hands all sequences of `plan` to the engine, or none.
    pub fn start(server: Arc<Server>, plan: Plan, caller: &Caller, arrival: Instant) -> Result<Self, ApiError> {
        let model = &*plan.served;
        let n = plan.params.n;
        let most = server.settings.max_choices;
        if plan.prompts.len().saturating_mul(n) > most {
            return Err(ApiError::invalid(
                "n",
                format!("The prompts times `n` are more than {most} choices."),
            ));
        }
        let prompt_tokens = plan.prompts.iter().map(|prompt| prompt.tokens.len()).sum();
        let deadline = server.settings.request_timeout.map(|timeout| arrival + timeout);
        let (mut choices, mut live, mut requests) = (Vec::new(), Vec::new(), Vec::new());
        for prompt in plan.prompts {
            for i in 0..n {
                let (events, receiver) = unbounded_channel();
                let sampling = sampling(&plan.params, plan.shape, model.max_model_len - prompt.tokens.len(), i);
                live.push((choices.len(), receiver));
                choices.push(choice(model, &plan.params, plan.shape, &sampling, prompt.echo.clone()));
                requests.push(Request {
                    id: caller.id.clone(),
                    tenant: caller.tenant.clone(),
                    prompt: prompt.tokens.clone(),
                    sampling,
                    arrival,
                    deadline,
                    events,
                });
            }
        }
        tracing::debug!(id = caller.id, prompt_tokens, choices = choices.len(), "submitting");
        (model.submit)(requests)?;
        server.observer.accepted(prompt_tokens);
        Ok(Self {
            server,
            #[cfg(any(test, feature = "fault-injection"))]
            id: caller.id.clone(),
            choices,
            live,
            turn: 0,
            n,
            prompt_tokens,
            arrival,
        })
    }

    /// Choices of the response.
    pub fn count(&self) -> usize {
        self.choices.len()
    }

    /// The next addition to a choice, with the choice's index; `None` when all have ended. After a failure the
    /// response is over: the other choices are cancelled when this is dropped.
    pub async fn next(&mut self) -> Option<Result<(usize, Delta), Failure>> {
        while !self.live.is_empty() {
            let (slot, event) = poll_fn(|context| self.poll_event(context)).await;
            // A panic here would end the connection without a word.
            let taken = catch_unwind(AssertUnwindSafe(|| self.take(slot, event)));
            let taken = taken.unwrap_or_else(|_| {
                self.server.observer.panicked(Place::Text);
                Err(Failure::Text)
            });
            match taken {
                Ok(Some(delta)) => return Some(Ok(delta)),
                Ok(None) => {}
                Err(failure) => return Some(Err(failure)),
            }
        }
        None
    }

    fn poll_event(&mut self, context: &mut Context<'_>) -> Poll<(usize, Option<Event>)> {
        for step in 0..self.live.len() {
            let slot = (self.turn + step) % self.live.len();
            if let Poll::Ready(event) = self.live[slot].1.poll_recv(context) {
                self.turn = slot + 1;
                return Poll::Ready((slot, event));
            }
        }
        Poll::Pending
    }

    fn take(&mut self, slot: usize, event: Option<Event>) -> Result<Option<(usize, Delta)>, Failure> {
        let index = self.live[slot].0;
        let choice = &mut self.choices[index];
        let delta = match event {
            Some(Event::Admitted {
                at,
                window,
                cached_tokens,
            }) => {
                choice.admitted = Some((at, window));
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
            Some(Event::Finished(reason)) => choice.finish(reason),
            Some(Event::Failed(failure)) => return Err(failure),
            None => return Err(Failure::EngineLost("it ended without a word".to_string())),
        };
        if delta.finish.is_some() {
            // Dropping the receiver tells the engine that a stop string was found.
            self.live.swap_remove(slot);
            self.server
                .observer
                .choice_finished(self.choices[index].tokens, decode_time(&self.choices[index]));
            if self.live.is_empty() {
                self.server.observer.request_finished(self.arrival.elapsed());
            }
        }
        let shows = !delta.text.is_empty() || delta.finish.is_some();
        Ok(shows.then_some((index, delta)))
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
fn milliseconds(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}
