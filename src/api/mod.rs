//! HTTP: routes, OpenAI types, server-sent events, errors, limits. Knows no tensor.
//!
//! A request goes through `params` and `messages` (what may be asked), becomes engine requests in `generation`,
//! and comes back through `choice` (tokens to text) and `shape` (text to JSON) as one body or, in `stream`, as
//! server-sent events.

mod access;
mod admin;
mod auth;
mod body;
mod cache;
mod cache_save;
mod chat;
mod choice;
mod completions;
mod deadline;
mod debug;
mod ending;
mod error;
mod generation;
mod keys;
mod limits;
pub mod listen;
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

use std::sync::{Arc, OnceLock, PoisonError, RwLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::routing::{delete, get, post};
use tower_http::catch_panic::CatchPanicLayer;

use crate::engine::{Handle, Refused};
use crate::request::{Request, Tenant};
use crate::text::{ChatTemplate, Tokenizer};
pub use cache::{ConfiguredPrompt, NotPinned, pin_configured};
use ending::Ending;
use error::ApiError;
pub use keys::{Keys, KeysError, check as check_keys, hash as hash_key};
pub use observe::Observer;

/// Limits of the HTTP side.
#[derive(Debug, Clone)]
pub struct ApiSettings {
    /// A larger body is refused with 413.
    pub max_body_bytes: usize,
    /// After so long a request is cut off, wherever it is; a client may ask for less.
    pub request_timeout: Option<Duration>,
    /// A request whose body has not come after so long is refused with 408.
    pub read_timeout: Duration,
    /// The most sequences one request may ask for: its prompts times `n`.
    pub max_choices: usize,
    /// Lets clients change the engine's settings under `/admin`, which is otherwise unknown.
    pub admin: bool,
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
    /// The way to the engine's settings and its cache.
    pub engine: Option<Handle>,
}

/// All that the handlers share. It exists before the model is loaded, so that `/health` answers meanwhile.
pub struct Server {
    model: OnceLock<Model>,
    cache: OnceLock<cache::Cache>,
    /// Whether `/admin` is allowed.
    admin: bool,
    ending: Ending,
    settings: ApiSettings,
    /// What of the settings changes while the server runs, seldom; each request reads it once.
    request_timeout: RwLock<Option<Duration>>,
    observer: Observer,
    quota: access::Quota,
    metrics_text: Box<dyn Fn() -> String + Send + Sync>,
    /// When the server started, in seconds since 1970: the models' `created`.
    created: u64,
    /// Whose requests they all are where there are no keys.
    anyone: Arc<Tenant>,
    /// Who may ask; `None` is everyone.
    keys: Option<Keys>,
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
            cache: OnceLock::new(),
            admin: settings.admin,
            request_timeout: RwLock::new(settings.request_timeout),
            ending: Ending::new(),
            settings,
            observer,
            quota: access::Quota::default(),
            metrics_text: Box::new(metrics_text),
            created: unix_seconds(),
            anyone: Arc::new(Tenant::anyone()),
            keys: None,
        }
    }

    /// Answers only callers with one of these keys.
    pub fn with_keys(mut self, keys: Option<Keys>) -> Self {
        self.keys = keys;
        self
    }

    /// The model is loaded: `/ready` says so from now on. Only the first call counts.
    pub fn serve_model(&self, model: Model) {
        // A second model would have nowhere to go; the first stays.
        let _ = self.model.set(model);
    }

    /// The way to the engine, once there is one.
    pub fn engine(&self) -> Option<&Handle> {
        self.model.get()?.engine.as_ref()
    }

    /// The engine, for clients that may change its settings; without the server's leave `path` is as unknown as any.
    fn admin_engine(&self, method: &str, path: &str) -> Result<&Handle, ApiError> {
        if !self.admin {
            return Err(ApiError::unknown_path(method, path));
        }
        self.engine().ok_or_else(ApiError::loading)
    }

    /// Requests that come from now on fail after so long.
    pub fn set_request_timeout(&self, timeout: Option<Duration>) {
        // Nothing that holds the lock can panic.
        *self.request_timeout.write().unwrap_or_else(PoisonError::into_inner) = timeout;
    }

    fn request_timeout(&self) -> Option<Duration> {
        *self.request_timeout.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on `/ready` answers 503 and new requests are refused; running ones go on.
    pub fn stop_accepting(&self) {
        self.ending.stop();
    }

    /// Completes when nothing generates.
    pub async fn idle(&self) {
        self.ending.idle().await;
    }

    /// Ends every request that still generates with an error; gives how many.
    pub fn cut_off(&self) -> usize {
        self.ending.cut()
    }

    /// The model, if it is loaded and the server is not shutting down.
    fn model(&self) -> Result<&Model, ApiError> {
        if self.ending.stopping() {
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
        .route("/v1/cache", get(cache::show))
        .route("/v1/cache/prompts", get(cache::list).post(cache::pin))
        .route("/v1/cache/prompts/{id}", delete(cache::unpin))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/detokenize", post(tokenize::detokenize))
        .route("/health", get(service::health))
        .route("/ready", get(service::ready))
        .route("/metrics", get(service::metrics))
        .route("/v1/cache/save", post(cache_save::save))
        .route("/admin/batching", get(admin::show).post(admin::change))
        .route("/debug/trace", get(debug::trace))
        .fallback(service::unknown_path)
        .method_not_allowed_fallback(service::wrong_method)
        // Bodies are bounded by the next layer, before the handlers take them.
        .layer(DefaultBodyLimit::disable())
        .layer(axum::middleware::from_fn_with_state(server.clone(), limits::bound))
        .layer(axum::middleware::from_fn_with_state(server.clone(), auth::authenticate))
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
