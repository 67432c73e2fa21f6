//! `POST /v1/cache/save`: writes the cache file while requests go on. There only where `/admin` is and the server has a
//! cache file.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};

use super::Server;
use super::error::ApiError;
use crate::engine::{SaveError, Saved};

pub(super) async fn save(State(server): State<Arc<Server>>) -> Result<Json<Value>, ApiError> {
    const PATH: &str = "/v1/cache/save";
    let engine = server.admin_engine("POST", PATH)?;
    match engine.save_cache().await {
        Ok(Saved { blocks, bytes, seconds }) => Ok(Json(json!({"blocks": blocks, "bytes": bytes, "seconds": seconds}))),
        Err(SaveError::NoCacheFile) => Err(ApiError::unknown_path("POST", PATH)),
        Err(error @ SaveError::EngineLost) => Err(ApiError::engine_lost(&error.to_string())),
        Err(error @ (SaveError::Write { .. } | SaveError::Copy(_))) => {
            tracing::error!(%error, "the cache file was not written");
            Err(ApiError::internal(error.to_string()))
        }
    }
}
