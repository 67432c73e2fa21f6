//! HTTP: routes, OpenAI types, server-sent events, errors, limits. Knows no tensor.
//!
//! A request goes through `params` and `messages` (what may be asked), becomes engine requests in `generation`,
//! and comes back through `choice` (tokens to text) and `shape` (text to JSON) as one body or, in `stream`, as
//! server-sent events.

mod admin;
mod body;
mod chat;
mod choice;
mod completions;
mod deadline;
mod error;
mod generation;
mod messages;
mod middleware;
mod observe;
mod params;
mod respond;
mod service;
mod shape;
mod stream;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod tokenize;
mod types;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::routing::{get, post};
use tower_http::catch_panic::CatchPanicLayer;

use crate::engine::{Handle, Refused};
use crate::request::{Request, Tenant};
use crate::text::{ChatTemplate, Tokenizer};
use error::ApiError;
pub use observe::Observer;

/// Limits of the HTTP side.
#[derive(Debug, Clone)]
pub struct ApiSettings {
    /// A larger body is refused with 413.
    pub max_body_bytes: usize,
    /// After so long a request is cut off, wherever it is; a client may ask for less.
    pub request_timeout: Option<Duration>,
    /// The most sequences one request may ask for: its prompts times `n`.
    pub max_choices: usize,
}

/// [`ApiSettings::max_choices`] where the queue has room for more.
pub const MAX_CHOICES: usize = 128;

/// Queues all requests of one client, or none: [`crate::engine::Handle::submit`].
pub type Submit = Box<dyn Fn(Vec<Request>) -> Result<(), Refused> + Send + Sync>;

/// What the HTTP side needs of a loaded model.
pub struct Model {
    /// The names it answers to; responses without a `model` in their request show the first. At least one.
    pub names: Vec<String>,
    /// The most tokens of a prompt and its answer together.
    pub max_model_len: usize,
    /// Tokens that the model knows; a tokenizer may have more.
    pub vocab_size: usize,
    pub tokenizer: Tokenizer,
    /// Base models have none; they take no chat requests.
    pub template: Option<ChatTemplate>,
    pub submit: Submit,
}

/// All that the handlers share. It exists before the model is loaded, so that `/health` answers meanwhile.
pub struct Server {
    model: OnceLock<Model>,
    /// Set where `/admin` is allowed.
    admin: OnceLock<Handle>,
    stopping: AtomicBool,
    settings: ApiSettings,
    observer: Observer,
    metrics_text: Box<dyn Fn() -> String + Send + Sync>,
    /// When the server started, in seconds since 1970: the models' `created`.
    created: u64,
    /// Whose requests they all are.
    anyone: Arc<Tenant>,
}

impl Server {
    /// `metrics_text` gives what `/metrics` answers, in Prometheus' text format.
    pub fn new(
        settings: ApiSettings,
        observer: Observer,
        metrics_text: impl Fn() -> String + Send + Sync + 'static,
    ) -> Self {
        Self {
            model: OnceLock::new(),
            admin: OnceLock::new(),
            stopping: AtomicBool::new(false),
            settings,
            observer,
            metrics_text: Box::new(metrics_text),
            created: unix_seconds(),
            anyone: Arc::new(Tenant::anyone()),
        }
    }

    /// The model is loaded: `/ready` says so from now on. Only the first call counts.
    pub fn serve_model(&self, model: Model) {
        // A second model would have nowhere to go; the first stays.
        let _ = self.model.set(model);
    }

    /// Lets clients change this engine's settings under `/admin`, which is otherwise unknown.
    pub fn allow_admin(&self, engine: Handle) {
        let _ = self.admin.set(engine);
    }

    /// From now on `/ready` answers 503 and new requests are refused; running ones go on.
    pub fn stop_accepting(&self) {
        self.stopping.store(true, Ordering::Relaxed);
    }

    /// The model, if it is loaded and the server is not shutting down.
    fn model(&self) -> Result<&Model, ApiError> {
        if self.stopping.load(Ordering::Relaxed) {
            return Err(ApiError::shutting_down());
        }
        self.model.get().ok_or_else(ApiError::loading)
    }
}

impl Model {
    /// Checks the name a request gives; none means this model.
    fn served_name(&self, asked: Option<&str>) -> Result<String, ApiError> {
        match asked {
            None => Ok(self.names.first().cloned().unwrap_or_default()),
            Some(name) if self.names.iter().any(|served| served == name) => Ok(name.to_string()),
            Some(name) => Err(ApiError::unknown_model(name, &self.names)),
        }
    }
}

/// Every route the server answers.
pub fn router(server: Arc<Server>) -> Router {
    Router::new()
        .route("/v1/chat/completions", post(chat::chat_completions))
        .route("/v1/completions", post(completions::completions))
        .route("/v1/models", get(service::models))
        .route("/v1/models/{*id}", get(service::model))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/detokenize", post(tokenize::detokenize))
        .route("/health", get(service::health))
        .route("/ready", get(service::ready))
        .route("/metrics", get(service::metrics))
        .route("/admin/batching", get(admin::show).post(admin::change))
        .fallback(service::unknown_path)
        .method_not_allowed_fallback(service::wrong_method)
        .layer(DefaultBodyLimit::max(server.settings.max_body_bytes))
        .layer(CatchPanicLayer::custom(middleware::panicked))
        .layer(axum::middleware::from_fn_with_state(
            server.clone(),
            middleware::observe,
        ))
        .with_state(server)
}

fn unix_seconds() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}
