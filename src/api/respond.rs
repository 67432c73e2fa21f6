//! Answers a request that has been checked, whole or as a stream.

use std::sync::Arc;
use std::time::Instant;

use axum::http::{HeaderMap, HeaderName, HeaderValue, header};
use axum::response::{IntoResponse, Response};

use super::choice::Delta;
use super::error::ApiError;
use super::generation::{Generation, Plan};
use super::middleware::Caller;
use super::shape::{Head, Shape};
use super::types::Timing;
use super::{Server, stream, unix_seconds};

/// Generates what `plan` says; `arrival` is when the request had been read.
pub(super) async fn respond(
    server: Arc<Server>,
    plan: Plan,
    caller: &Caller,
    arrival: Instant,
) -> Result<Response, ApiError> {
    #[cfg(any(test, feature = "fault-injection"))]
    {
        use crate::fault_injection::Fault;
        Fault::Handler.panic_if_asked(&caller.id, 0);
        let text = || plan.served.tokenizer.decode(&plan.prompts[0].tokens, true);
        Fault::quote_if_asked(&caller.id, text);
    }
    let prefix = match plan.shape {
        Shape::Chat => "chatcmpl",
        Shape::Completion => "cmpl",
    };
    let head = Head {
        shape: plan.shape,
        id: format!("{prefix}-{}", caller.id),
        created: unix_seconds(),
        model: plan.model.clone(),
        logprobs: plan.params.sampling.logprobs.is_some(),
        tokenizer: plan.served.tokenizer.clone(),
    };
    let (stream, include_usage) = (plan.params.stream, plan.params.include_usage);
    let generation = Generation::start(server, plan, caller, arrival)?;
    if stream {
        stream::respond(generation, head, include_usage).await
    } else {
        whole(generation, head).await
    }
}

async fn whole(mut generation: Generation, head: Head) -> Result<Response, ApiError> {
    let mut choices = vec![Delta::default(); generation.count()];
    while let Some(addition) = generation.next().await {
        let (index, delta) = addition?;
        let choice = &mut choices[index];
        choice.text += &delta.text;
        choice.logprobs.extend(delta.logprobs);
        choice.finish = choice.finish.or(delta.finish);
    }
    let body = head
        .whole(choices, generation.usage())
        .map_err(|e| ApiError::internal(e.to_string()))?;
    let kind = [(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))];
    Ok((kind, timing_headers(generation.timing()), body).into_response())
}

fn timing_headers(timing: Timing) -> HeaderMap {
    let headers = [
        ("x-sconce-queue-ms", timing.queue_ms),
        ("x-sconce-window-ms", timing.window_ms),
        ("x-sconce-prefill-ms", timing.prefill_ms),
        ("x-sconce-decode-ms", timing.decode_ms),
    ];
    let value = |ms: f64| HeaderValue::from_str(&format!("{ms:.3}")).ok();
    headers
        .into_iter()
        .filter_map(|(name, ms)| Some((HeaderName::from_static(name), value(ms)?)))
        .collect()
}
