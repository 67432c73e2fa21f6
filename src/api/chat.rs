//! `POST /v1/chat/completions`

use std::sync::Arc;
use std::time::Instant;

use axum::Extension;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::Response;

use super::deadline;
use super::error::ApiError;
use super::generation::Plan;
use super::middleware::Caller;
use super::params::{Params, chat_logprobs};
use super::respond::respond;
use super::shape::Shape;
use super::types::Body;
use super::{Model, Server, body, messages};

pub(super) async fn chat_completions(
    State(server): State<Arc<Server>>,
    Extension(caller): Extension<Caller>,
    headers: HeaderMap,
    bytes: Bytes,
) -> Result<Response, ApiError> {
    let arrival = Instant::now();
    let timeout = deadline::of_header(&headers)?;
    let shared = server.clone();
    let mut plan = body::read(bytes, move |bytes| plan(&shared.model()?, body::parse(bytes)?)).await?;
    plan.params.timeout = deadline::shortest(&[plan.params.timeout, timeout]);
    respond(server, plan, &caller, arrival).await
}

fn plan(model: &Arc<Model>, mut body: Body) -> Result<Plan, ApiError> {
    let name = model.served_name(body.model.as_deref())?;
    if body.echo == Some(true) || !body.prompt.is_empty() {
        let field = if body.echo == Some(true) { "echo" } else { "prompt" };
        return Err(ApiError::unsupported(
            field,
            format!("`{field}` belongs to /v1/completions."),
        ));
    }
    let logprobs = chat_logprobs(&body)?;
    let params = Params::new(&mut body, &model.tokenizer, logprobs)?;
    let prompt = messages::prompt(model, body.messages.take(), true)?;
    Ok(Plan {
        shape: Shape::Chat,
        served: model.clone(),
        model: name,
        prompts: vec![prompt],
        params,
    })
}
