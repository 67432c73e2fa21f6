//! `/admin/batching` and `/admin/model`: the batching settings and the model in force, changed while the server runs.
//! There only if the server was asked for it.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};

use super::error::ApiError;
use super::{Server, body};
use crate::batching::{Change, Config, MAX_BATCH, MAX_STEP_TOKENS, Schedule, WindowPolicy};
use crate::engine::ConfigureError;

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
    configure(&server, "GET", Change::default()).await
}

pub(super) async fn change(State(server): State<Arc<Server>>, bytes: Bytes) -> Result<Json<InForce>, ApiError> {
    allowed(&server, "POST", BATCHING)?;
    let change = body::read(bytes, |bytes| checked(body::parse(bytes)?)).await?;
    configure(&server, "POST", change).await
}

const BATCHING: &str = "/admin/batching";
const MODEL: &str = "/admin/model";

/// Without the server's leave the path is as unknown as any other.
fn allowed<'a>(server: &'a Server, method: &str, path: &str) -> Result<&'a mpsc::Sender<ModelCommand>, ApiError> {
    server.admin.get().ok_or_else(|| ApiError::unknown_path(method, path))
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

async fn configure(server: &Arc<Server>, method: &str, change: Change) -> Result<Json<InForce>, ApiError> {
    allowed(server, method, BATCHING)?;
    let model = server.model()?;
    let Some(engine) = &model.engine else {
        return Err(ApiError::loading());
    };
    match server.configure(engine, change).await {
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
        Err(error @ ConfigureError::EngineLost) => Err(ApiError::engine_lost(&error.to_string())),
    }
}

/// What clients ask of whoever loads models.
#[derive(Debug)]
pub enum ModelCommand {
    Show(oneshot::Sender<ModelState>),
    /// Load the model beside the one that serves, then let it serve in its place.
    Change {
        model: String,
        reply: oneshot::Sender<Result<ModelState, NotChanged>>,
    },
}

/// Which model serves, and what is in the making.
#[derive(Debug, Clone, Serialize)]
pub struct ModelState {
    /// As `--model` would name it; none before the first is loaded.
    pub model: Option<String>,
    /// The model that is being loaded.
    pub loading: Option<String>,
    /// Models that were replaced and still finish requests.
    pub retiring: usize,
}

/// Why the model that serves was not replaced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NotChanged {
    /// Another model is being loaded.
    Busy { loading: String },
    /// The model could not be loaded, for this reason.
    Failed(String),
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ModelBody {
    model: String,
}

/// `GET /admin/model`
pub(super) async fn show_model(State(server): State<Arc<Server>>) -> Result<Json<ModelState>, ApiError> {
    let models = allowed(&server, "GET", MODEL)?;
    let (reply, replied) = oneshot::channel();
    // Whoever loads models ends only with the server.
    let sent = models.send(ModelCommand::Show(reply)).await;
    sent.map_err(|_| ApiError::shutting_down())?;
    replied.await.map(Json).map_err(|_| ApiError::shutting_down())
}

/// `POST /admin/model`: answers once the model serves, or the one before it still does.
pub(super) async fn change_model(
    State(server): State<Arc<Server>>,
    bytes: Bytes,
) -> Result<Json<ModelState>, ApiError> {
    let models = allowed(&server, "POST", MODEL)?;
    let ModelBody { model } = body::read(bytes, body::parse).await?;
    let (reply, replied) = oneshot::channel();
    let sent = models.send(ModelCommand::Change { model, reply }).await;
    sent.map_err(|_| ApiError::shutting_down())?;
    match replied.await.map_err(|_| ApiError::shutting_down())? {
        Ok(state) => Ok(Json(state)),
        Err(NotChanged::Busy { loading }) => Err(ApiError::conflict(format!(
            "{loading} is being loaded; send the change again once it serves."
        ))),
        Err(NotChanged::Failed(reason)) => Err(ApiError::invalid(
            "model",
            format!("The model was not loaded, and the one before it still serves: {reason}."),
        )),
    }
}

#[cfg(test)]
mod tests {
    use std::future::{Future, poll_fn};
    use std::task::Poll;

    use serde_json::json;

    use super::super::testing;
    use super::*;
    use crate::engine::{self, Engine, Weights};

    #[tokio::test]
    async fn is_unknown_unless_asked_for() {
        let server = testing::server(|_| Ok(()));
        let (status, _) = testing::post(&server, "/admin/batching", json!({"max_batch": 3})).await;
        assert_eq!(status, 404);
        let (status, _) = testing::post(&server, "/admin/model", json!({"model": "other"})).await;
        assert_eq!(status, 404);
    }

    /// The engine changes whether or not its answer is heard, so those after it have to change as well.
    #[tokio::test]
    async fn a_change_is_kept_though_whoever_asked_has_left() {
        let weights = Weights::load(&engine::tests::settings()).unwrap();
        let start = || {
            let engine = Engine::new(&weights, engine::tests::metrics()).unwrap();
            engine.start(engine::tests::places(4)).unwrap()
        };
        let ((first, _guard), (second, _other)) = (start(), start());
        let server = testing::impatient(Duration::from_secs(1));
        let change = Change {
            max_batch: Some(3),
            ..Change::default()
        };
        // Polled once, it is asked for, and cannot have been answered: this thread has not run anything else.
        let mut asked = Box::pin(server.configure(&first, change));
        assert!(poll_fn(|context| Poll::Ready(asked.as_mut().poll(context).is_pending())).await);
        drop(asked);
        let caught_up = async {
            loop {
                server.catch_up(&second).await.unwrap();
                if second.configure(Change::default()).await.unwrap().max_batch == 3 {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), caught_up).await.unwrap();
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
