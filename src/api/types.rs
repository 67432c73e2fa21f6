//! OpenAI's shapes: the bodies that clients send and the bodies they get.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{Deserializer, Error, Visitor};
use serde::{Deserialize, Serialize};

use super::bounded::{Asked, AtMost, Numbers, Prompts, TextOr};
use crate::request::TokenId;

/// More turns than any conversation that fits a context has.
pub(super) const MAX_MESSAGES: usize = 4096;
/// Text parts of one message.
pub(super) const MAX_PARTS: usize = 256;
pub(super) const MAX_STOPS: usize = 16;
pub(super) const MAX_STOP_TOKENS: usize = 128;
pub(super) const MAX_BIASES: usize = 1024;

/// Bounded while they are read, so that no body becomes much larger in memory than it was.
pub(super) type Messages = AtMost<MessageBody, MAX_MESSAGES>;
pub(super) type Stop = TextOr<String, MAX_STOPS>;

/// A request to `/v1/chat/completions` or `/v1/completions`. `null` is the same as absent; fields not listed are
/// ignored. The fields at the end are read only to refuse them when they ask for something.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Body {
    pub model: Option<String>,
    pub messages: Option<Messages>,
    pub prompt: Prompts,
    pub stream: Option<bool>,
    pub stream_options: Option<StreamOptions>,
    pub max_tokens: Option<usize>,
    pub max_completion_tokens: Option<usize>,
    pub temperature: Option<f32>,
    pub top_p: Option<f32>,
    pub top_k: Option<i64>,
    pub min_p: Option<f32>,
    pub repetition_penalty: Option<f32>,
    pub presence_penalty: Option<f32>,
    pub frequency_penalty: Option<f32>,
    pub logit_bias: Option<Numbers<MAX_BIASES>>,
    pub seed: Option<i64>,
    pub stop: Option<Stop>,
    pub stop_token_ids: Option<AtMost<TokenId, MAX_STOP_TOKENS>>,
    pub ignore_eos: Option<bool>,
    pub n: Option<usize>,
    pub logprobs: Option<LogprobsBody>,
    pub top_logprobs: Option<usize>,
    pub echo: Option<bool>,
    pub cache_salt: Option<String>,
    pub timeout_ms: Option<u64>,
    pub priority: Option<i32>,

    pub suffix: Asked,
    pub best_of: Asked,
    pub min_tokens: Asked,
    pub prompt_logprobs: Asked,
    pub use_beam_search: Asked,
    pub tools: Asked,
    pub tool_choice: Asked,
    pub functions: Asked,
    pub function_call: Asked,
    pub response_format: Asked,
    pub structured_outputs: Asked,
    pub guided_json: Asked,
    pub guided_regex: Asked,
    pub guided_choice: Asked,
    pub guided_grammar: Asked,
    pub modalities: Asked,
    pub audio: Asked,
    pub prediction: Asked,
    pub web_search_options: Asked,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub(super) struct MessageBody {
    pub role: Option<String>,
    pub content: Option<TextOr<PartBody, MAX_PARTS>>,
    pub name: Option<String>,
    pub tool_call_id: Option<String>,
    pub tool_calls: Asked,
    pub function_call: Asked,
}

/// A part of a message's content. Its other fields mean nothing for text, and other types are refused.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub(super) struct PartBody {
    #[serde(rename = "type")]
    pub kind: String,
    pub text: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct StreamOptions {
    pub include_usage: Option<bool>,
}

#[derive(Debug, Clone, Copy)]
pub(super) enum LogprobsBody {
    Asked(bool),
    Top(usize),
}

struct LogprobsVisitor;

// By hand, because serde's untagged enums copy what they read before they look at it, however large it is.
impl<'de> Deserialize<'de> for LogprobsBody {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(LogprobsVisitor)
    }
}

impl Visitor<'_> for LogprobsVisitor {
    type Value = LogprobsBody;

    fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str("a boolean (chat) or a whole number (completions)")
    }

    fn visit_bool<E: Error>(self, asked: bool) -> Result<LogprobsBody, E> {
        Ok(LogprobsBody::Asked(asked))
    }

    fn visit_u64<E: Error>(self, top: u64) -> Result<LogprobsBody, E> {
        Ok(LogprobsBody::Top(usize::try_from(top).unwrap_or(usize::MAX)))
    }
}

/// Tokens used, counted exactly.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Usage {
    pub prompt_tokens: usize,
    pub completion_tokens: usize,
    pub total_tokens: usize,
    pub prompt_tokens_details: PromptDetails,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct PromptDetails {
    /// Found in the prefix cache.
    pub cached_tokens: usize,
}

/// What batching cost the request, in milliseconds: of several choices, the longest each.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub(super) struct Timing {
    /// In the queue, but for the window.
    pub queue_ms: f64,
    /// In the batch window, waiting for company.
    pub window_ms: f64,
    /// From leaving the queue to the first token.
    pub prefill_ms: f64,
    /// From the first token to the last.
    pub decode_ms: f64,
}

/// A whole response, or one chunk of a stream.
#[derive(Debug, Serialize)]
pub(super) struct Envelope<'a, C> {
    pub id: &'a str,
    pub object: &'static str,
    pub created: u64,
    pub model: &'a str,
    pub choices: &'a [C],
    /// `Some(None)` is `null`, as in the chunks before the one with the usage.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Option<Usage>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sconce: Option<Timing>,
}

/// A choice of a whole chat response.
#[derive(Debug, Serialize)]
pub(super) struct ChatChoice {
    pub index: usize,
    pub message: AssistantMessage,
    pub logprobs: Option<ChatLogprobs>,
    pub finish_reason: &'static str,
    /// What OpenAI's reasons have no word for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop_reason: Option<&'static str>,
}

#[derive(Debug, Serialize)]
pub(super) struct AssistantMessage {
    pub role: &'static str,
    pub content: String,
    /// Always `null`; clients expect the field.
    pub refusal: Option<String>,
}

/// A choice of a chat chunk.
#[derive(Debug, Serialize)]
pub(super) struct ChatDelta {
    pub index: usize,
    pub delta: DeltaBody,
    pub logprobs: Option<ChatLogprobs>,
    pub finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop_reason: Option<&'static str>,
}

#[derive(Debug, Serialize)]
pub(super) struct DeltaBody {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
}

/// A choice of a completion, whole or streamed.
#[derive(Debug, Serialize)]
pub(super) struct TextChoice {
    pub index: usize,
    pub text: String,
    pub logprobs: Option<TextLogprobs>,
    pub finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop_reason: Option<&'static str>,
}

#[derive(Debug, Serialize)]
pub(super) struct ChatLogprobs {
    pub content: Vec<ChatTokenLogprob>,
}

#[derive(Debug, Serialize)]
pub(super) struct ChatTokenLogprob {
    #[serde(flatten)]
    pub token: TokenLogprob,
    pub top_logprobs: Vec<TokenLogprob>,
}

#[derive(Debug, Serialize)]
pub(super) struct TokenLogprob {
    pub token: String,
    pub logprob: f32,
    /// The token's own bytes, where `token` cannot show half a character.
    pub bytes: Vec<u8>,
}

/// The older shape of `/v1/completions`: lists side by side.
#[derive(Debug, Default, Serialize)]
pub(super) struct TextLogprobs {
    pub tokens: Vec<String>,
    pub token_logprobs: Vec<f32>,
    pub top_logprobs: Vec<BTreeMap<String, f32>>,
    /// Where each token begins, in characters of the choice's text.
    pub text_offset: Vec<usize>,
}
