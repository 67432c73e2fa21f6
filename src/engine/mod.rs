//! The one thread that owns the device: takes a plan, runs the model, samples, sends events.

mod admission;
mod model;
mod run;
mod sampler;

use std::{
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use tokio::sync::{mpsc, oneshot};

use admission::{Place, SharedGate};

pub use model::{DEFAULT_KV_MEMORY, LoadError, Settings, default_dtype};

use crate::{
    batching::{Change, Config, ConfigError, Estimates, Gate, Limits, Refusal},
    request::Request,
    telemetry::EngineMetrics,
};

/// The way into the engine, for the HTTP side. Cheap to clone; the engine ends when the last one is dropped and all
/// requests have ended.
#[derive(Debug, Clone)]
pub struct Handle {
    /// Bounded by the gate and not by itself, because a request keeps its place until a batch takes it, wherever it
    /// stands until then.
    queue: mpsc::UnboundedSender<Message>,
    gate: SharedGate,
    metrics: Arc<EngineMetrics>,
}

/// What reaches the engine thread.
#[derive(Debug)]
enum Message {
    Request(Queued),
    Configure(Change, oneshot::Sender<Result<Config, ConfigError>>),
}

/// A request, its place before the scheduler has it, and how long it was expected to take when it came.
#[derive(Debug)]
struct Queued {
    request: Request,
    place: Place,
    predicted: Option<Duration>,
}

/// Why the engine did not take a request. Nothing of it was queued.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Refused {
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error("the server is shutting down")]
    ShuttingDown,
}

/// Why settings did not change.
#[derive(Debug, thiserror::Error)]
pub enum ConfigureError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("the server is shutting down")]
    ShuttingDown,
}

impl Handle {
    /// Queues all of `requests` (the choices and prompts of one client request), or none of them. Decides without
    /// waiting for the engine.
    pub fn submit(&self, requests: Vec<Request>) -> Result<(), Refused> {
        let accepted = self.gate.ask(&requests, Instant::now()).inspect_err(|refusal| {
            self.metrics.refusals.with_label_values(&[refusal.cause.label()]).inc();
        })?;
        for (request, place) in requests.into_iter().zip(accepted.places) {
            let predicted = accepted.predicted;
            let message = Message::Request(Queued {
                request,
                place,
                predicted,
            });
            self.queue.send(message).map_err(|_| Refused::ShuttingDown)?;
        }
        Ok(())
    }

    /// Changes batching settings while the engine runs, and gives those now in force.
    pub async fn configure(&self, change: Change) -> Result<Config, ConfigureError> {
        let (reply, replied) = oneshot::channel();
        let message = Message::Configure(change, reply);
        self.queue.send(message).map_err(|_| ConfigureError::ShuttingDown)?;
        Ok(replied.await.map_err(|_| ConfigureError::ShuttingDown)??)
    }
}

/// A loaded model with its engine not yet running.
pub struct Engine {
    model: model::Model,
    metrics: Arc<EngineMetrics>,
}

impl Engine {
    /// Loads the model and makes the KV cache. Takes as long as reading the weights does.
    pub fn load(settings: &Settings, metrics: Arc<EngineMetrics>) -> Result<Self, LoadError> {
        Ok(Self {
            model: model::Model::load(settings)?,
            metrics,
        })
    }

    /// The longest sequence that this engine takes, prompt and output together, in tokens.
    pub fn max_model_len(&self) -> usize {
        self.model.scheduler.config().max_model_len
    }

    /// How many tokens the model knows.
    pub fn vocab_size(&self) -> usize {
        self.model.vocab_size()
    }

    /// How many tokens the KV cache holds.
    pub fn kv_tokens(&self) -> usize {
        self.model.kv_tokens
    }

    /// Starts the engine thread behind a gate with these limits. The thread ends once every [`Handle`] is dropped and
    /// what was queued has ended.
    pub fn start(self, limits: Limits) -> std::io::Result<(Handle, thread::JoinHandle<()>)> {
        let (sender, inbox) = mpsc::unbounded_channel();
        let outlook = self.model.scheduler.outlook(&Estimates::default(), Instant::now());
        let gate = SharedGate::new(Gate::new(limits, outlook));
        let handle = Handle {
            queue: sender,
            gate: gate.clone(),
            metrics: self.metrics.clone(),
        };
        let timer = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
        let runner = run::Runner::new(self.model, inbox, timer, self.metrics, gate);
        let thread = thread::Builder::new()
            .name("engine".into())
            .spawn(move || runner.run())?;
        Ok((handle, thread))
    }
}

#[cfg(test)]
mod tests;
