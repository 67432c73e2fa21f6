//! `POST /v1/completions`

use std::sync::Arc;
use std::time::Instant;

use axum::Extension;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::Response;

use super::bounded::{Given, Prompts};
use super::deadline;
use super::error::ApiError;
use super::generation::{Plan, Prompt};
use super::messages::check_length;
use super::middleware::Caller;
use super::params::{Params, completion_logprobs};
use super::respond::respond;
use super::shape::Shape;
use super::types::Body;
use super::{Model, Server, body};
use crate::request::TokenId;

pub(super) async fn completions(
    State(server): State<Arc<Server>>,
    Extension(caller): Extension<Caller>,
    headers: HeaderMap,
    bytes: Bytes,
) -> Result<Response, ApiError> {
    let arrival = Instant::now();
    let timeout = deadline::of_header(&headers)?;
    let shared = server.clone();
    let plan = body::read(bytes, move |bytes| {
        plan(&shared.model()?, body::parse(bytes)?, shared.settings.max_choices)
    });
    let mut plan = plan.await?;
    plan.params.timeout = deadline::shortest(&[plan.params.timeout, timeout]);
    respond(server, plan, &caller, arrival).await
}

fn plan(model: &Arc<Model>, mut body: Body, max_choices: usize) -> Result<Plan, ApiError> {
    let name = model.served_name(body.model.as_deref())?;
    if body.messages.is_some() {
        return Err(ApiError::unsupported(
            "messages",
            "`messages` belongs to /v1/chat/completions.",
        ));
    }
    let logprobs = completion_logprobs(&body)?;
    let params = Params::new(&mut body, &model.tokenizer, logprobs)?;
    let echo = body.echo.unwrap_or(false);
    if echo && logprobs.is_some() {
        return Err(ApiError::unsupported(
            "echo",
            "`echo` together with `logprobs` is not supported.",
        ));
    }
    let prompts = split(body.prompt)?;
    if prompts.len() > max_choices {
        return Err(ApiError::invalid(
            "prompt",
            format!("`prompt` has more than {max_choices} prompts."),
        ));
    }
    let several = prompts.len() > 1;
    let at = |i: usize| {
        if several {
            format!("prompt[{i}]")
        } else {
            "prompt".to_string()
        }
    };
    let prompts = prompts
        .into_iter()
        .enumerate()
        .map(|(i, prompt)| prompt.check(model, &at(i), echo));
    Ok(Plan {
        shape: Shape::Completion,
        served: model.clone(),
        model: name,
        prompts: prompts.collect::<Result<_, _>>()?,
        params,
    })
}

impl Given {
    fn check(self, model: &Model, param: &str, echo: bool) -> Result<Prompt, ApiError> {
        match self {
            Self::Text(text) => {
                check_length(model, param, text.len())?;
                let tokens = model.tokenizer.encode(&text, true)?;
                Prompt::new(model, param, tokens, if echo { text } else { String::new() })
            }
            Self::Tokens(tokens) => {
                check_tokens(model, param, &tokens)?;
                // What does not fit is refused below, and not made into text before.
                let echo = if echo && tokens.len() < model.max_model_len {
                    model.tokenizer.decode(&tokens, true)
                } else {
                    String::new()
                };
                Prompt::new(model, param, tokens, echo)
            }
        }
    }
}

/// A prompt that is a string or a list of token ids, and not several.
pub(super) fn only_prompt(model: &Model, prompt: Prompts) -> Result<Prompt, ApiError> {
    match <[Given; 1]>::try_from(split(prompt)?) {
        Ok([given]) => given.check(model, "prompt", false),
        Err(_) => Err(ApiError::invalid("prompt", "Send one prompt at a time.")),
    }
}

/// Refuses ids outside the vocabulary.
pub(super) fn check_tokens(model: &Model, param: &str, tokens: &[TokenId]) -> Result<(), ApiError> {
    match tokens.iter().find(|id| **id as usize >= model.tokenizer.vocab_size()) {
        Some(id) => Err(ApiError::invalid(param, format!("{id} is no token of the model."))),
        None => Ok(()),
    }
}

/// The prompts, of which there is at least one.
fn split(prompts: Prompts) -> Result<Vec<Given>, ApiError> {
    match prompts {
        Prompts::One(prompt) => Ok(vec![prompt]),
        Prompts::Missing => Err(ApiError::invalid("prompt", "`prompt` is missing.")),
        Prompts::Many(prompts) if prompts.is_empty() => Err(ApiError::invalid(
            "prompt",
            "`prompt` is an empty list; send at least one prompt.",
        )),
        Prompts::Many(prompts) => Ok(prompts),
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::model;
    use super::*;
    use serde_json::{Value, json};

    #[test]
    fn a_prompt_must_be_the_models_and_fit() {
        let plan = |prompt: Value| {
            let body = serde_json::from_value(json!({"prompt": prompt})).unwrap();
            plan(&Arc::new(model()), body, 4)
                .map(|plan| plan.prompts.len())
                .map_err(|e| e.body()["error"].take())
        };
        assert_eq!(plan(json!(["a", "b"])), Ok(2));
        assert_eq!(plan(json!(["a", ""])).unwrap_err()["param"], "prompt[1]");
        assert_eq!(plan(json!([49152])).unwrap_err()["param"], "prompt");
        assert_eq!(
            plan(json!([vec![5; 8192]])).unwrap_err()["code"],
            "context_length_exceeded"
        );
        assert_eq!(plan(json!(vec!["a"; 5])).unwrap_err()["param"], "prompt");
        for none in [json!(null), json!([])] {
            assert_eq!(plan(none).unwrap_err()["param"], "prompt");
        }
        assert_eq!(plan(json!([vec![5; 8191]])), Ok(1));
    }
}
