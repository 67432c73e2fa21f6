//! `POST /tokenize` and `POST /detokenize`, in vLLM's shapes.

use std::sync::Arc;

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use serde::{Deserialize, Serialize};

use super::completions::check_tokens;
use super::error::ApiError;
use super::types::Messages;
use super::{Model, Server, body, messages};
use crate::request::TokenId;

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct TokenizeBody {
    model: Option<String>,
    prompt: Option<String>,
    messages: Option<Messages>,
    /// Whether the tokens a raw prompt begins with are added: for a prompt unless refused, for messages if asked.
    add_special_tokens: Option<bool>,
    add_generation_prompt: Option<bool>,
}

#[derive(Debug, Serialize)]
pub(super) struct Tokenized {
    count: usize,
    max_model_len: usize,
    tokens: Vec<TokenId>,
}

#[derive(Debug, Deserialize)]
struct DetokenizeBody {
    model: Option<String>,
    tokens: Vec<TokenId>,
}

#[derive(Debug, Serialize)]
pub(super) struct Detokenized {
    prompt: String,
}

pub(super) async fn tokenize(State(server): State<Arc<Server>>, bytes: Bytes) -> Result<Json<Tokenized>, ApiError> {
    let shared = server.clone();
    body::read(bytes, move |bytes| encode(&*shared.model()?, body::parse(bytes)?))
        .await
        .map(Json)
}

pub(super) async fn detokenize(State(server): State<Arc<Server>>, bytes: Bytes) -> Result<Json<Detokenized>, ApiError> {
    let shared = server.clone();
    body::read(bytes, move |bytes| decode(&*shared.model()?, body::parse(bytes)?))
        .await
        .map(Json)
}

fn encode(model: &Model, body: TokenizeBody) -> Result<Tokenized, ApiError> {
    model.served_name(body.model.as_deref())?;
    let tokens = match (body.prompt, body.messages) {
        (Some(prompt), None) => {
            messages::check_length(model, "prompt", prompt.len())?;
            let add_special_tokens = body.add_special_tokens.unwrap_or(true);
            model.tokenizer.encode(&prompt, add_special_tokens)?
        }
        (None, Some(messages)) => {
            let text = messages::render(model, Some(messages), body.add_generation_prompt.unwrap_or(true))?;
            model
                .tokenizer
                .encode_chat(&text, body.add_special_tokens.unwrap_or(false))?
        }
        _ => return Err(ApiError::invalid("prompt", "Send either `prompt` or `messages`.")),
    };
    Ok(Tokenized {
        count: tokens.len(),
        max_model_len: model.max_model_len,
        tokens,
    })
}

fn decode(model: &Model, body: DetokenizeBody) -> Result<Detokenized, ApiError> {
    model.served_name(body.model.as_deref())?;
    if body.tokens.len() > model.max_model_len {
        let message = format!(
            "`tokens` has more tokens than the model's context of {}.",
            model.max_model_len
        );
        return Err(ApiError::invalid("tokens", message));
    }
    check_tokens(model, "tokens", &body.tokens)?;
    Ok(Detokenized {
        prompt: model.tokenizer.decode(&body.tokens, true),
    })
}
