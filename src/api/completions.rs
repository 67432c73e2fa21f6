//! `POST /v1/completions`

use std::sync::Arc;
use std::time::Instant;

use axum::Extension;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::Response;
use serde_json::Value;

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

/// One prompt as it was sent.
#[derive(Debug, PartialEq)]
pub(super) enum Given {
    Text(String),
    Tokens(Vec<TokenId>),
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
                let echo = if echo {
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
pub(super) fn only_prompt(model: &Model, prompt: Value) -> Result<Prompt, ApiError> {
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

/// A string, a list of strings, a list of token ids, or a list of those.
fn split(prompt: Value) -> Result<Vec<Given>, ApiError> {
    let wrong = || {
        let message = "`prompt` must be a string, a list of strings, a list of token ids, or a list of those lists.";
        ApiError::invalid("prompt", message)
    };
    let items = match prompt {
        Value::String(text) => return Ok(vec![Given::Text(text)]),
        Value::Array(items) => items,
        Value::Null => return Err(ApiError::invalid("prompt", "`prompt` is missing.")),
        _ => return Err(wrong()),
    };
    match items.first() {
        Some(Value::Number(_)) => Ok(vec![Given::Tokens(tokens(&items).ok_or_else(wrong)?)]),
        Some(_) => items.into_iter().map(|item| one(item).ok_or_else(wrong)).collect(),
        None => Err(ApiError::invalid(
            "prompt",
            "`prompt` is an empty list; send at least one prompt.",
        )),
    }
}

fn one(item: Value) -> Option<Given> {
    match item {
        Value::String(text) => Some(Given::Text(text)),
        Value::Array(ids) => tokens(&ids).map(Given::Tokens),
        _ => None,
    }
}

fn tokens(ids: &[Value]) -> Option<Vec<TokenId>> {
    ids.iter()
        .map(|id| id.as_u64().and_then(|id| TokenId::try_from(id).ok()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::testing::model;
    use super::*;
    use serde_json::json;

    #[test]
    fn a_prompt_is_given_in_four_ways() {
        let text = |text: &str| Given::Text(text.to_string());
        assert_eq!(split(json!("a")), Ok(vec![text("a")]));
        assert_eq!(split(json!(["a", "b"])), Ok(vec![text("a"), text("b")]));
        assert_eq!(split(json!([1, 2])), Ok(vec![Given::Tokens(vec![1, 2])]));
        assert_eq!(
            split(json!([[1], [2, 3]])),
            Ok(vec![Given::Tokens(vec![1]), Given::Tokens(vec![2, 3])])
        );
        for wrong in [
            json!(null),
            json!([]),
            json!(7),
            json!([1, "a"]),
            json!([1, -1]),
            json!([{}]),
            json!([["a"]]),
        ] {
            assert!(split(wrong.clone()).is_err(), "{wrong}");
        }
    }

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
        assert_eq!(plan(json!([vec![5; 8191]])), Ok(1));
    }
}
