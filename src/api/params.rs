//! The fields that chat and completions share, checked: sampling, stopping, number of choices.

use std::ops::RangeInclusive;
use std::time::Duration;

use super::bounded::{Asked, TextOr};
use super::deadline;
use super::error::ApiError;
use super::types::{Body, LogprobsBody, Stop};
use crate::request::{Sampling, TokenId};
use crate::text::Tokenizer;

/// Below this a temperature is greedy: dividing by it would overflow.
const GREEDY: f32 = 1e-5;
const MAX_STOP_BYTES: usize = 256;
const MAX_LOGPROBS: usize = 20;
const MAX_SALT_BYTES: usize = 256;

/// What a request asks of each of its choices.
#[derive(Debug)]
pub(super) struct Params {
    /// Complete but for `max_tokens`, which depends on the prompt; the seed is the first choice's.
    pub sampling: Sampling,
    /// As asked; `None` leaves it to the route.
    pub max_tokens: Option<usize>,
    pub stops: Vec<String>,
    /// Choices a prompt.
    pub n: usize,
    pub stream: bool,
    pub include_usage: bool,
    pub cache_salt: Option<String>,
    /// How long the client waits, if it says so.
    pub timeout: Option<Duration>,
    /// Smaller goes first among the tenant's own.
    pub priority: i32,
}

impl Params {
    /// Takes the shared fields out of the body. `logprobs` is what the route makes of its own two fields.
    pub fn new(body: &mut Body, tokenizer: &Tokenizer, logprobs: Option<usize>) -> Result<Self, ApiError> {
        refuse_unsupported(body)?;
        let max_tokens = body.max_completion_tokens.or(body.max_tokens);
        if max_tokens == Some(0) {
            return Err(ApiError::invalid(
                "max_tokens",
                "`max_tokens` is 0; ask for at least 1.",
            ));
        }
        let n = body.n.unwrap_or(1);
        if n == 0 {
            return Err(ApiError::invalid("n", "`n` is 0; ask for at least 1."));
        }
        Ok(Self {
            sampling: sampling(body, tokenizer, logprobs)?,
            max_tokens,
            stops: stops(body.stop.take())?,
            n,
            cache_salt: cache_salt(body.cache_salt.take())?,
            stream: body.stream.unwrap_or(false),
            include_usage: body
                .stream_options
                .as_ref()
                .and_then(|o| o.include_usage)
                .unwrap_or(false),
            timeout: deadline::of_body(body.timeout_ms)?,
            priority: body.priority.unwrap_or(0),
        })
    }
}

/// Chat's two fields: `logprobs` says whether, `top_logprobs` how many others.
pub(super) fn chat_logprobs(body: &Body) -> Result<Option<usize>, ApiError> {
    match (body.logprobs, body.top_logprobs) {
        (Some(LogprobsBody::Top(_)), _) => Err(ApiError::invalid("logprobs", "`logprobs` is a boolean in chat.")),
        (Some(LogprobsBody::Asked(true)), top) => count("top_logprobs", top.unwrap_or(0)).map(Some),
        (_, Some(1..)) => Err(ApiError::invalid(
            "top_logprobs",
            "`top_logprobs` needs `logprobs` to be true.",
        )),
        _ => Ok(None),
    }
}

/// The completions' one field: how many others.
pub(super) fn completion_logprobs(body: &Body) -> Result<Option<usize>, ApiError> {
    match body.logprobs {
        None | Some(LogprobsBody::Asked(false)) => Ok(None),
        Some(LogprobsBody::Asked(true)) => Err(ApiError::invalid("logprobs", "`logprobs` is a number in completions.")),
        Some(LogprobsBody::Top(top)) => count("logprobs", top).map(Some),
    }
}

fn count(name: &str, top: usize) -> Result<usize, ApiError> {
    if top > MAX_LOGPROBS {
        return Err(ApiError::invalid(
            name,
            format!("`{name}` is {top}; the most is {MAX_LOGPROBS}."),
        ));
    }
    Ok(top)
}

fn sampling(body: &Body, tokenizer: &Tokenizer, logprobs: Option<usize>) -> Result<Sampling, ApiError> {
    let temperature = in_range("temperature", body.temperature, 1.0, 0.0..=2.0)?;
    let own_stops = stop_tokens(
        body.stop_token_ids.as_ref().map_or(&[][..], |ids| ids.0.as_slice()),
        tokenizer,
    )?;
    let ignore_eos = body.ignore_eos.unwrap_or(false);
    let end_tokens = if ignore_eos { &[] } else { tokenizer.end_tokens() };
    let stop_token_ids: Vec<TokenId> = end_tokens.iter().chain(own_stops).copied().collect();
    Ok(Sampling {
        temperature: if temperature < GREEDY { 0.0 } else { temperature },
        top_k: top_k(body.top_k)?,
        top_p: in_range("top_p", body.top_p, 1.0, f32::MIN_POSITIVE..=1.0)?,
        min_p: in_range("min_p", body.min_p, 0.0, 0.0..=1.0)?,
        repetition_penalty: in_range("repetition_penalty", body.repetition_penalty, 1.0, 0.01..=100.0)?,
        presence_penalty: in_range("presence_penalty", body.presence_penalty, 0.0, -2.0..=2.0)?,
        frequency_penalty: in_range("frequency_penalty", body.frequency_penalty, 0.0, -2.0..=2.0)?,
        logit_bias: logit_bias(body, tokenizer)?,
        seed: body.seed.map_or_else(rand::random, |seed| seed as u64),
        // With its own stop tokens a request stops at those, whatever it does at the model's.
        ignore_eos: ignore_eos && stop_token_ids.is_empty(),
        stop_token_ids,
        logprobs,
        max_tokens: 1,
    })
}

/// Separates the request's prefixes from those of other salts.
pub(super) fn cache_salt(salt: Option<String>) -> Result<Option<String>, ApiError> {
    match salt {
        Some(salt) if !(1..=MAX_SALT_BYTES).contains(&salt.len()) => Err(ApiError::invalid(
            "cache_salt",
            format!("`cache_salt` must have 1 to {MAX_SALT_BYTES} bytes."),
        )),
        salt => Ok(salt),
    }
}

fn in_range(name: &str, value: Option<f32>, default: f32, range: RangeInclusive<f32>) -> Result<f32, ApiError> {
    let value = value.unwrap_or(default);
    if range.contains(&value) {
        return Ok(value);
    }
    // The smallest positive number stands for "more than 0".
    let from = match *range.start() {
        start if start == f32::MIN_POSITIVE => "more than 0".to_string(),
        start => format!("at least {start}"),
    };
    let message = format!("`{name}` is {value}; it must be {from} and at most {}.", range.end());
    Err(ApiError::invalid(name, message))
}

fn top_k(value: Option<i64>) -> Result<usize, ApiError> {
    // Some clients switch it off with -1.
    let value = value.filter(|value| *value != -1).unwrap_or(0);
    usize::try_from(value).map_err(|_| ApiError::invalid("top_k", "`top_k` is negative; 0 or -1 switch it off."))
}

fn logit_bias(body: &Body, tokenizer: &Tokenizer) -> Result<Vec<(TokenId, f32)>, ApiError> {
    let Some(biases) = &body.logit_bias else {
        return Ok(Vec::new());
    };
    let entry = |(token, bias): (&String, &f32)| {
        let token = token
            .parse()
            .ok()
            .filter(|id| (*id as usize) < tokenizer.vocab_size())
            .ok_or_else(|| {
                ApiError::invalid(
                    "logit_bias",
                    format!("`logit_bias` names `{token}`, which is no token of the model."),
                )
            })?;
        Ok((token, in_range("logit_bias", Some(*bias), 0.0, -100.0..=100.0)?))
    };
    biases.0.iter().map(entry).collect()
}

fn stop_tokens<'a>(ids: &'a [TokenId], tokenizer: &Tokenizer) -> Result<&'a [TokenId], ApiError> {
    match ids.iter().find(|id| **id as usize >= tokenizer.vocab_size()) {
        Some(id) => Err(ApiError::invalid(
            "stop_token_ids",
            format!("{id} is no token of the model."),
        )),
        None => Ok(ids),
    }
}

fn stops(stop: Option<Stop>) -> Result<Vec<String>, ApiError> {
    let stops = match stop {
        None => Vec::new(),
        Some(TextOr::Text(stop)) => vec![stop],
        Some(TextOr::List(stops)) => stops,
    };
    if stops.iter().any(String::is_empty) {
        return Err(ApiError::invalid("stop", "`stop` has an empty string; leave it out."));
    }
    if stops.iter().any(|stop| stop.len() > MAX_STOP_BYTES) {
        return Err(ApiError::invalid(
            "stop",
            format!("`stop` has a string of more than {MAX_STOP_BYTES} bytes."),
        ));
    }
    Ok(stops)
}

/// What would change the answer and is not done here is refused, not ignored.
fn refuse_unsupported(body: &Body) -> Result<(), ApiError> {
    let fields = [
        ("suffix", &body.suffix),
        ("best_of", &body.best_of),
        ("min_tokens", &body.min_tokens),
        ("prompt_logprobs", &body.prompt_logprobs),
        ("use_beam_search", &body.use_beam_search),
        ("tools", &body.tools),
        ("tool_choice", &body.tool_choice),
        ("functions", &body.functions),
        ("function_call", &body.function_call),
        ("response_format", &body.response_format),
        ("structured_outputs", &body.structured_outputs),
        ("guided_json", &body.guided_json),
        ("guided_regex", &body.guided_regex),
        ("guided_choice", &body.guided_choice),
        ("guided_grammar", &body.guided_grammar),
        ("modalities", &body.modalities),
        ("audio", &body.audio),
        ("prediction", &body.prediction),
        ("web_search_options", &body.web_search_options),
    ];
    for (name, asked) in fields {
        let harmless = match name {
            "best_of" => *asked == Asked::One,
            "tool_choice" | "function_call" => matches!(asked, Asked::Word(word) if word == "auto" || word == "none"),
            "response_format" => matches!(asked, Asked::Typed(kind) if kind == "text"),
            "modalities" => matches!(asked, Asked::Only(word) if word == "text"),
            _ => false,
        };
        if !harmless && *asked != Asked::Nothing {
            return Err(ApiError::unsupported(
                name,
                format!("`{name}` is not supported by this server; leave it out."),
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::body::parse;
    use super::super::testing::tokenizer;
    use super::*;
    use serde_json::{Value, json};

    fn params(body: Value) -> Result<Params, Value> {
        let params =
            parse::<Body>(body.to_string().as_bytes()).and_then(|mut body| Params::new(&mut body, &tokenizer(), None));
        params.map_err(|e| e.body()["error"].take())
    }

    #[test]
    fn what_is_absent_or_null_has_openais_default() {
        let params = params(json!({"temperature": null, "stop": null, "n": null})).unwrap();
        let sampling = Sampling {
            seed: params.sampling.seed,
            stop_token_ids: vec![2],
            ..Sampling::default()
        };
        assert_eq!(
            params.sampling,
            Sampling {
                max_tokens: 1,
                ..sampling
            }
        );
        assert_eq!((params.n, params.stream, params.max_tokens), (1, false, None));
    }

    #[test]
    fn every_field_reaches_the_sampler() {
        let params = params(json!({
            "temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "repetition_penalty": 1.1,
            "presence_penalty": -0.5, "frequency_penalty": 0.5, "logit_bias": {"17": -100, "5": 2.5}, "seed": -3,
            "stop": ["a", "b"], "stop_token_ids": [9], "max_tokens": 5, "max_completion_tokens": 6, "n": 3,
            "stream": true, "stream_options": {"include_usage": true},
        }))
        .unwrap();
        let expected = Sampling {
            temperature: 0.7,
            top_p: 0.9,
            top_k: 40,
            min_p: 0.05,
            repetition_penalty: 1.1,
            presence_penalty: -0.5,
            frequency_penalty: 0.5,
            logit_bias: vec![(17, -100.0), (5, 2.5)],
            seed: -3i64 as u64,
            stop_token_ids: vec![2, 9],
            max_tokens: 1,
            ..Sampling::default()
        };
        assert_eq!(params.sampling, expected);
        assert_eq!((params.max_tokens, params.n), (Some(6), 3));
        assert_eq!(params.stops, ["a", "b"]);
        assert!(params.stream && params.include_usage);
    }

    fn biases(count: usize) -> Value {
        (0..count).map(|id| (id.to_string(), json!(0))).collect()
    }

    #[test]
    fn out_of_range_names_the_parameter() {
        for (body, param) in [
            (json!({"temperature": 2.1}), "temperature"),
            (json!({"temperature": -0.1}), "temperature"),
            (json!({"top_p": 0}), "top_p"),
            (json!({"top_k": -2}), "top_k"),
            (json!({"min_p": 1.5}), "min_p"),
            (json!({"repetition_penalty": 0}), "repetition_penalty"),
            (json!({"presence_penalty": 3}), "presence_penalty"),
            (json!({"frequency_penalty": -3}), "frequency_penalty"),
            (json!({"max_tokens": 0}), "max_tokens"),
            (json!({"n": 0}), "n"),
            (json!({"stop": vec!["x"; 17]}), "stop"),
            (json!({"stop": ""}), "stop"),
            (json!({"stop": "x".repeat(257)}), "stop"),
            (json!({"stop_token_ids": [49152]}), "stop_token_ids"),
            (json!({"stop_token_ids": vec![5; 129]}), "stop_token_ids"),
            (json!({"logit_bias": biases(1025)}), "logit_bias"),
            (json!({"logit_bias": {"x": 1}}), "logit_bias"),
            (json!({"logit_bias": {"49152": 1}}), "logit_bias"),
            (json!({"logit_bias": {"1": 101}}), "logit_bias"),
        ] {
            assert_eq!(params(body.clone()).unwrap_err()["param"], param, "{body}");
        }
        assert_eq!(
            params(json!({"top_k": -1, "temperature": 1e-6}))
                .unwrap()
                .sampling
                .temperature,
            0.0
        );
    }

    #[test]
    fn end_tokens_are_ignored_only_when_asked_and_own_stop_tokens_never() {
        let of = |body| params(body).unwrap().sampling;
        assert_eq!(of(json!({"ignore_eos": true})).stop_token_ids, Vec::<TokenId>::new());
        assert!(of(json!({"ignore_eos": true})).ignore_eos);
        let own = of(json!({"ignore_eos": true, "stop_token_ids": [7]}));
        assert_eq!((own.stop_token_ids, own.ignore_eos), (vec![7], false));
    }

    #[test]
    fn what_is_not_done_is_refused_unless_it_asks_for_nothing() {
        for body in [
            json!({"tools": [{"type": "function"}]}),
            json!({"response_format": {"type": "json_object"}}),
            json!({"best_of": 2}),
            json!({"suffix": "end"}),
            json!({"tool_choice": "required"}),
            json!({"min_tokens": 5}),
        ] {
            let error = params(body.clone()).unwrap_err();
            assert_eq!(error["code"], "unsupported_value", "{body}");
        }
        let harmless = json!({
            "tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "best_of": 1, "suffix": null,
            "user": "me", "some_new_field": {"x": 1}, "modalities": ["text"],
        });
        assert!(params(harmless).is_ok());
    }

    #[test]
    fn logprobs_are_asked_for_in_each_routes_way() {
        let body = |value| serde_json::from_value::<Body>(value).unwrap();
        assert_eq!(chat_logprobs(&body(json!({}))), Ok(None));
        assert_eq!(chat_logprobs(&body(json!({"logprobs": true}))), Ok(Some(0)));
        assert_eq!(
            chat_logprobs(&body(json!({"logprobs": true, "top_logprobs": 5}))),
            Ok(Some(5))
        );
        assert!(chat_logprobs(&body(json!({"top_logprobs": 5}))).is_err());
        assert!(chat_logprobs(&body(json!({"logprobs": true, "top_logprobs": 21}))).is_err());
        assert!(chat_logprobs(&body(json!({"logprobs": 1}))).is_err());
        assert_eq!(completion_logprobs(&body(json!({"logprobs": 3}))), Ok(Some(3)));
        assert_eq!(completion_logprobs(&body(json!({}))), Ok(None));
        assert!(completion_logprobs(&body(json!({"logprobs": true}))).is_err());
    }
}
