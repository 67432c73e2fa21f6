//! The routes about the server itself: models, health, readiness, metrics, and what there is no route for.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::{Method, Uri, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::Server;
use super::error::ApiError;

/// `GET /v1/models`
pub(super) async fn models(State(server): State<Arc<Server>>) -> Result<Json<Value>, ApiError> {
    let model = server.model()?;
    let data: Vec<Value> = model
        .names
        .iter()
        .map(|name| describe(&server, name, model.max_model_len))
        .collect();
    Ok(Json(json!({"object": "list", "data": data})))
}

/// `GET /v1/models/{id}`; an id may contain slashes.
pub(super) async fn model(State(server): State<Arc<Server>>, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    let model = server.model()?;
    let name = model.served_name(Some(&id))?;
    Ok(Json(describe(&server, &name, model.max_model_len)))
}

fn describe(server: &Server, name: &str, max_model_len: usize) -> Value {
    json!({
        "id": name, "object": "model", "created": server.created, "owned_by": "sconce",
        "max_model_len": max_model_len,
    })
}

/// `GET /health`: the process answers.
pub(super) async fn health() -> Json<Value> {
    Json(json!({"status": "ok"}))
}

/// `GET /ready`: the model is loaded and requests are accepted.
pub(super) async fn ready(State(server): State<Arc<Server>>) -> Result<Json<Value>, ApiError> {
    server.model().map(|_| Json(json!({"status": "ready"})))
}

/// `GET /metrics`
pub(super) async fn metrics(State(server): State<Arc<Server>>) -> Response {
    let kind = "text/plain; version=0.0.4; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], (server.metrics_text)()).into_response()
}

pub(super) async fn unknown_path(method: Method, uri: Uri) -> ApiError {
    ApiError::unknown_path(method.as_str(), uri.path())
}

pub(super) async fn wrong_method(method: Method, uri: Uri) -> ApiError {
    ApiError::wrong_method(method.as_str(), uri.path())
}

#[cfg(test)]
mod tests {
    use super::super::testing::{get, model, post, saying};
    use super::*;
    use crate::engine::Handle;

    async fn refuses(server: &Arc<Server>) {
        for (status, answer) in [
            get(server, "/ready").await,
            post(server, "/v1/completions", json!({"prompt": "x"})).await,
        ] {
            assert_eq!((status, &answer["error"]["code"]), (503, &json!("engine_lost")));
        }
        assert_eq!(get(server, "/health").await.0, 200);
    }

    #[tokio::test]
    async fn a_server_whose_engine_is_lost_is_not_ready_until_there_is_another() {
        let (server, _) = saying("Hi");
        server.restarting();
        refuses(&server).await;
        let mut lost = model();
        lost.engine = Some(Handle::lost());
        server.serve_model(Arc::new(lost));
        // Nobody has noted it yet.
        refuses(&server).await;
        server.serve_model(Arc::new(model()));
        assert_eq!(get(&server, "/ready").await.0, 200);
    }
}
