//! HTTP: routes, OpenAI types, server-sent events, errors, limits. Knows no tensor.
//!
//! A request goes through `params` and `messages` (what may be asked), becomes engine requests in `generation`,
//! and comes back through `choice` (tokens to text) and `shape` (text to JSON) as one body or, in `stream`, as
//! server-sent events.

mod access;
mod admin;
mod auth;
mod body;
mod bounded;
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
mod origin;
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
use tokio::sync::{Mutex, Semaphore, mpsc, watch};
use tower_http::catch_panic::CatchPanicLayer;

use crate::batching::{Change, Config};
use crate::engine::{ConfigureError, Handle, Refused};
use crate::request::{Request, Tenant};
use crate::text::{ChatTemplate, Tokenizer};
pub use admin::{ModelCommand, ModelState, NotChanged};
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
    /// Whether clients may pin prompts in the cache.
    pub pinning: bool,
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
    pub template: Option<Arc<ChatTemplate>>,
    pub submit: Submit,
    /// The way to the engine's settings and its cache.
    pub engine: Option<Handle>,
}

/// What stands behind the API now.
#[derive(Clone)]
enum Stage {
    Loading,
    /// Requests that were begun with this model end with it, whatever comes after it.
    Serving(Arc<Model>),
    Restarting,
}

/// All that the handlers share. It exists before the model is loaded, so that `/health` answers meanwhile.
pub struct Server {
    stage: watch::Sender<Stage>,
    /// Set where `/admin` is allowed: the way to whoever loads models.
    admin: OnceLock<mpsc::Sender<ModelCommand>>,
    ending: Ending,
    settings: ApiSettings,
    /// What of the settings changes while the server runs, seldom; each request reads it once.
    request_timeout: RwLock<Option<Duration>>,
    /// What was changed of the batching settings since the start: engines that come later are told. Locked while an engine
    /// is asked, so that what is known here is what the engine took last.
    changed: Mutex<Change>,
    observer: Observer,
    quota: access::Quota,
    room_for_bodies: Arc<Semaphore>,
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
            stage: watch::Sender::new(Stage::Loading),
            admin: OnceLock::new(),
            request_timeout: RwLock::new(settings.request_timeout),
            changed: Mutex::default(),
            ending: Ending::new(),
            room_for_bodies: limits::room_for_bodies(settings.max_body_bytes),
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

    /// New requests go to this model from now on, and `/ready` says that they may; those that run end with the model
    /// that they began with.
    pub fn serve_model(&self, model: Arc<Model>) {
        self.stage.send_replace(Stage::Serving(model));
    }

    /// The model's engine is lost: `/ready` answers 503 and new requests are refused until there is a model again.
    pub fn restarting(&self) {
        self.stage.send_replace(Stage::Restarting);
    }

    /// The way to the engine that serves, while there is one.
    pub fn engine(&self) -> Option<Handle> {
        match &*self.stage.borrow() {
            Stage::Serving(model) => model.engine.clone(),
            Stage::Loading | Stage::Restarting => None,
        }
    }

    /// The engine, for clients that may change its settings; without the server's leave `path` is as unknown as any.
    fn admin_engine(&self, method: &str, path: &str) -> Result<Handle, ApiError> {
        if self.admin.get().is_none() {
            return Err(ApiError::unknown_path(method, path));
        }
        self.engine().ok_or_else(ApiError::loading)
    }

    /// Lets clients change settings and models under `/admin`, which is otherwise unknown.
    pub fn allow_admin(&self, models: mpsc::Sender<ModelCommand>) {
        // There is one loader of models, and it asks once.
        let _ = self.admin.set(models);
    }

    /// Requests that come from now on fail after so long.
    pub fn set_request_timeout(&self, timeout: Option<Duration>) {
        // Nothing that holds the lock can panic.
        *self.request_timeout.write().unwrap_or_else(PoisonError::into_inner) = timeout;
    }

    /// Changes batching settings of this engine, and of those that may come after it.
    pub async fn configure(self: &Arc<Self>, engine: &Handle, change: Change) -> Result<Config, ConfigureError> {
        let (server, engine) = (self.clone(), engine.clone());
        // A task of its own: a change that the engine made is kept, even if whoever asked for it leaves meanwhile.
        let done = tokio::spawn(async move {
            let mut changed = server.changed.lock().await;
            let config = engine.configure(change.clone()).await?;
            *changed = changed.then(&change);
            Ok(config)
        });
        done.await.unwrap_or(Err(ConfigureError::EngineLost))
    }

    /// Changes an engine's batching settings as those of the engines before it were.
    pub async fn catch_up(&self, engine: &Handle) -> Result<(), ConfigureError> {
        let changed = self.changed.lock().await;
        if *changed != Change::default() {
            engine.configure(changed.clone()).await?;
        }
        Ok(())
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

    /// The model, if there is one now and the server is not shutting down.
    fn model(&self) -> Result<Arc<Model>, ApiError> {
        if self.ending.stopping() {
            return Err(ApiError::shutting_down());
        }
        match &*self.stage.borrow() {
            Stage::Loading => Err(ApiError::loading()),
            // The next engine is on its way, whether or not this has been noted yet.
            Stage::Serving(model) if model.engine.as_ref().is_some_and(Handle::is_lost) => {
                Err(Refused::EngineLost.into())
            }
            Stage::Serving(model) => Ok(model.clone()),
            Stage::Restarting => Err(Refused::EngineLost.into()),
        }
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
    let counting = server.clone();
    let operators = Router::new()
        .route("/v1/cache/save", post(cache_save::save))
        .route("/admin/batching", get(admin::show).post(admin::change))
        .route("/admin/model", get(admin::show_model).post(admin::change_model))
        .route("/debug/trace", get(debug::trace))
        .route_layer(axum::middleware::from_fn_with_state(
            server.clone(),
            origin::refuse_pages,
        ));
    Router::new()
        .merge(operators)
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
        .fallback(service::unknown_path)
        .method_not_allowed_fallback(service::wrong_method)
        // Bodies are bounded by the next layer, before the handlers take them.
        .layer(DefaultBodyLimit::disable())
        .layer(axum::middleware::from_fn_with_state(server.clone(), limits::bound))
        .layer(axum::middleware::from_fn_with_state(server.clone(), auth::authenticate))
        .layer(CatchPanicLayer::custom(move |_| middleware::panicked(&counting)))
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
