//! What every station knows of a request: its tokens, its sampling, its deadline, and where its events go.

use std::{
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use tokio::sync::mpsc;

/// A token's index in the model's vocabulary.
pub type TokenId = u32;

/// One sequence to generate, as the queue, the scheduler and the engine see it. A client's request with `n` choices
/// or several prompts becomes several of these.
#[derive(Debug)]
pub struct Request {
    /// Shown in logs and in the response; the same for every choice of one client request.
    pub id: String,
    pub tenant: Arc<Tenant>,
    /// Smaller goes first among the tenant's own; 0 is usual.
    pub priority: i32,
    /// The prompt's tokens, at least one.
    pub prompt: Vec<TokenId>,
    /// Requests with different salts do not find each other's prefixes.
    pub cache_salt: Option<String>,
    pub sampling: Sampling,
    /// When the server had read the request.
    pub arrival: Instant,
    /// When the client stops caring; a request that runs then is cut ([`FinishReason::Deadline`]), one without a token
    /// fails with [`Failure::DeadlinePassed`].
    pub deadline: Option<Instant>,
    /// The client request's span: what is logged of this sequence belongs to it.
    pub span: tracing::Span,
    /// Where the events go. Dropping the receiver ends the request. At most `max_tokens + 3` events are ever sent,
    /// so the channel is bounded by what the request asked for, however slowly it is read.
    pub events: mpsc::UnboundedSender<Event>,
    /// How the answer ended, where its reader knows that first: set before the receiver is dropped. A request whose
    /// receiver is dropped without it is cancelled.
    pub ended: Arc<OnceLock<FinishReason>>,
}

/// Whose requests these are: those of one API key, or everyone's where there are no keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tenant {
    /// The key's name, never the key.
    pub name: String,
    /// Its share of a busy server, beside the other tenants' weights.
    pub weight: u32,
}

impl Tenant {
    /// Whoever calls a server without API keys.
    pub fn anyone() -> Self {
        Self {
            name: "anyone".into(),
            weight: 1,
        }
    }
}

/// How the next token is chosen. A value that switches its rule off is given with each field.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// 0 is greedy: the largest logit wins, the lower token id on a tie.
    pub temperature: f32,
    /// Keep the `top_k` likeliest tokens; 0 is off.
    pub top_k: usize,
    /// Keep the smallest set of likeliest tokens whose probabilities reach `top_p`; 1 is off.
    pub top_p: f32,
    /// Keep tokens at least `min_p` times as likely as the likeliest; 0 is off.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens in the prompt or the output (Keskar et al. 2019,
    /// section 4.1); 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted once from the logit of each token in the output; 0 is off.
    pub presence_penalty: f32,
    /// Subtracted from a token's logit for each time it stands in the output; 0 is off.
    pub frequency_penalty: f32,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(TokenId, f32)>,
    /// Seeds this sequence's own random numbers: the same seed gives the same tokens in any batch.
    pub seed: u64,
    /// Tokens that end the sequence: the model's end tokens and the request's own. They count in the usage and are
    /// sent as the last token.
    pub stop_token_ids: Vec<TokenId>,
    /// The most tokens to generate, at least 1.
    pub max_tokens: usize,
    /// Go on past `stop_token_ids`.
    pub ignore_eos: bool,
    /// `Some(k)`: send each token's log-probability and those of the `k` likeliest tokens.
    pub logprobs: Option<usize>,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
            stop_token_ids: Vec::new(),
            max_tokens: 16,
            ignore_eos: false,
            logprobs: None,
        }
    }
}

/// What the engine tells a waiting client: at most one `Admitted`, at most one `Prefilled`, then `Token`s, then exactly
/// one `Finished` or `Failed`. (A preempted sequence is not admitted twice as far as its client can see.)
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The request left the queue with a closing batch.
    Admitted {
        at: Instant,
        /// How much of the wait was the batch window gathering company, the rest being the queue.
        window: Duration,
        /// Prompt tokens found in the prefix cache so far.
        cached_tokens: usize,
    },
    /// The prompt is done, and the first token follows.
    Prefilled {
        /// Prompt tokens found in the prefix cache; the others were computed.
        cached_tokens: usize,
    },
    Token(Token),
    Finished(FinishReason),
    Failed(Failure),
}

/// One generated token.
#[derive(Debug, Clone, PartialEq)]
pub struct Token {
    pub id: TokenId,
    /// When the step that made it ended.
    pub at: Instant,
    pub logprobs: Option<Logprobs>,
}

/// Natural logarithms of probabilities under the model's own distribution, before penalties and temperature.
#[derive(Debug, Clone, PartialEq)]
pub struct Logprobs {
    pub chosen: f32,
    /// The likeliest tokens, likeliest first.
    pub top: Vec<(TokenId, f32)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop token was generated, or a stop string.
    Stop,
    /// `max_tokens` or the context length was reached.
    Length,
    /// The deadline passed; the tokens so far stand.
    Deadline,
}

/// Why a request ended without an answer.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Failure {
    #[error("the request's deadline passed before it was finished; send it again when the server is less busy")]
    DeadlinePassed,
    #[error(
        "the server has become too busy to finish the request by its deadline; try again in {} s",
        .retry_after.as_secs()
    )]
    TooBusy { retry_after: Duration },
    #[error("the model gave a value that is not a number for this request; try another prompt or `--dtype f32`")]
    NotANumber,
    #[error("the server ended before the request was finished; send it to another one")]
    ShuttingDown,
    #[error("the step that ran this request failed: {0}")]
    Step(String),
    #[error("choosing this request's next token failed; please report it with its x-request-id")]
    Sampler,
    #[error("making text of this request's tokens failed; please report it with its x-request-id")]
    Text,
    #[error("the engine was lost while it ran this request: {0}; send it again in a moment")]
    EngineLost(String),
}
