//! `GET` and `POST /admin/batching`: the batching settings in force, changed while the server runs. There only if the
//! server was asked for it.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use serde::{Deserialize, Serialize};

use super::error::ApiError;
use super::{Server, body};
use crate::batching::{Change, Config, MAX_BATCH, MAX_STEP_TOKENS, Schedule, WindowPolicy};
use crate::engine::{ConfigureError, Handle};

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ChangeBody {
    schedule: Option<Schedule>,
    window_policy: Option<WindowPolicy>,
    batch_window_ms: Option<f64>,
    max_batch: Option<usize>,
    step_tokens: Option<usize>,
}

/// The settings in force.
#[derive(Debug, Serialize)]
pub(super) struct InForce {
    schedule: Schedule,
    window_policy: WindowPolicy,
    batch_window_ms: f64,
    max_batch: usize,
    step_tokens: usize,
}

pub(super) async fn show(State(server): State<Arc<Server>>) -> Result<Json<InForce>, ApiError> {
    configure(engine(&server, "GET")?, Change::default()).await
}

pub(super) async fn change(State(server): State<Arc<Server>>, bytes: Bytes) -> Result<Json<InForce>, ApiError> {
    let engine = engine(&server, "POST")?;
    let change = body::read(bytes, |bytes| checked(body::parse(bytes)?)).await?;
    configure(engine, change).await
}

fn engine<'a>(server: &'a Server, method: &str) -> Result<&'a Handle, ApiError> {
    server.admin_engine(method, "/admin/batching")
}

fn checked(body: ChangeBody) -> Result<Change, ApiError> {
    let window = body.batch_window_ms.map(|ms| match ms {
        0.0..=60_000.0 => Ok(Duration::from_secs_f64(ms / 1e3)),
        _ => Err(ApiError::invalid(
            "batch_window_ms",
            "`batch_window_ms` must be between 0 and 60000.",
        )),
    });
    for (name, value, most) in [
        ("max_batch", body.max_batch, MAX_BATCH),
        ("step_tokens", body.step_tokens, MAX_STEP_TOKENS),
    ] {
        if value.is_some_and(|value| !(1..=most).contains(&(value as u64))) {
            return Err(ApiError::invalid(
                name,
                format!("`{name}` must be between 1 and {most}."),
            ));
        }
    }
    let ChangeBody {
        schedule,
        window_policy,
        max_batch,
        step_tokens,
        ..
    } = body;
    Ok(Change {
        schedule,
        window_policy,
        window: window.transpose()?,
        max_batch,
        step_tokens,
    })
}

async fn configure(engine: &Handle, change: Change) -> Result<Json<InForce>, ApiError> {
    match engine.configure(change).await {
        Ok(Config {
            schedule,
            window_policy,
            window,
            max_batch,
            step_tokens,
            ..
        }) => {
            let batch_window_ms = window.as_secs_f64() * 1e3;
            Ok(Json(InForce {
                schedule,
                window_policy,
                batch_window_ms,
                max_batch,
                step_tokens,
            }))
        }
        Err(ConfigureError::Config(error)) => Err(ApiError::invalid("", error.to_string())),
        Err(ConfigureError::ShuttingDown) => Err(ApiError::shutting_down()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::testing;
    use super::*;

    #[tokio::test]
    async fn is_unknown_unless_asked_for() {
        let server = testing::server(|_| Ok(()));
        let (status, _) = testing::post(&server, "/admin/batching", json!({"max_batch": 3})).await;
        assert_eq!(status, 404);
    }

    #[test]
    fn a_change_is_checked() {
        let change = |value| checked(serde_json::from_value(value).unwrap());
        let good = change(json!({"batch_window_ms": 2.5, "schedule": "dynamic"})).unwrap();
        assert_eq!(
            (good.window, good.schedule),
            (Some(Duration::from_micros(2500)), Some(Schedule::Dynamic))
        );
        assert!(change(json!({"batch_window_ms": -1})).is_err());
        assert!(change(json!({"max_batch": 0})).is_err());
        assert!(change(json!({"max_batch": 5000})).is_err());
        assert!(serde_json::from_value::<ChangeBody>(json!({"window": 3})).is_err());
    }
}
