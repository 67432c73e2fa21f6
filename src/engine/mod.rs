//! The one thread that owns the device: takes a plan, runs the model, samples, sends events.

mod budget;
mod fault;
#[cfg(any(test, feature = "fault-injection"))]
mod inject;
mod model;
mod run;
mod sampler;
mod step;
mod watch;

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    thread,
    time::Duration,
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};

pub use model::{DEFAULT_KV_MEMORY, LoadError, Settings, Weights, default_dtype};
pub use watch::{End, Guard};

use crate::{
    batching::{Change, Config, ConfigError},
    request::Request,
    telemetry::EngineMetrics,
};

/// The way into the engine, for the HTTP side. Cheap to clone; the engine ends when the last one is dropped and all
/// requests have ended.
#[derive(Debug, Clone)]
pub struct Handle {
    queue: mpsc::UnboundedSender<Message>,
    /// One permit a place in the queue. The queue is bounded by these and not by its channel, because a request keeps
    /// its place until a batch takes it, wherever it stands until then.
    places: Arc<Semaphore>,
    limit: usize,
    watch: watch::Watch,
}

/// What reaches the engine thread.
#[derive(Debug)]
enum Message {
    Request(Queued),
    Configure(Change, oneshot::Sender<Result<Config, ConfigError>>),
}

/// A request and its place in the queue, which is free again when the place is dropped.
#[derive(Debug)]
struct Queued {
    request: Request,
    place: OwnedSemaphorePermit,
}

/// Why the engine did not take a request. Nothing of it was queued.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    #[error("the queue is full ({limit} requests wait); try again later")]
    QueueFull { limit: usize },
    #[error("the engine failed and is being started again; try again in a moment")]
    EngineLost,
}

/// Why settings did not change.
#[derive(Debug, thiserror::Error)]
pub enum ConfigureError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("the engine failed and is being started again; try again in a moment")]
    EngineLost,
}

impl Handle {
    /// Queues all of `requests` (the choices and prompts of one client request), or none of them.
    pub fn submit(&self, requests: Vec<Request>) -> Result<(), Refused> {
        let full = Refused::QueueFull { limit: self.limit };
        let wanted = u32::try_from(requests.len()).map_err(|_| full.clone())?;
        let mut places = self.places.clone().try_acquire_many_owned(wanted).map_err(|_| full)?;
        if !self.watch.waiters.enter(&requests) {
            return Err(Refused::EngineLost);
        }
        for request in requests {
            let Some(place) = places.split(1) else { break };
            let message = Message::Request(Queued { request, place });
            self.queue.send(message).map_err(|_| Refused::EngineLost)?;
        }
        Ok(())
    }

    /// Whether the engine is lost: it takes no requests, and those it had were told, or are about to be.
    pub fn is_lost(&self) -> bool {
        self.watch.pulse.abandoned()
    }

    /// Another engine takes the new requests: this one finishes its own, and `/metrics` shows the other's state.
    pub fn retire(&self) {
        self.watch.pulse.retire();
    }

    /// Changes batching settings while the engine runs, and gives those now in force.
    pub async fn configure(&self, change: Change) -> Result<Config, ConfigureError> {
        let (reply, replied) = oneshot::channel();
        let message = Message::Configure(change, reply);
        self.queue.send(message).map_err(|_| ConfigureError::EngineLost)?;
        Ok(replied.await.map_err(|_| ConfigureError::EngineLost)??)
    }
}

/// A loaded model with its engine not yet running.
pub struct Engine {
    model: model::Model,
    step_timeout: Duration,
    metrics: Arc<EngineMetrics>,
}

impl Engine {
    /// An engine for these weights, with an empty KV cache.
    pub fn new(weights: &Weights, metrics: Arc<EngineMetrics>) -> Result<Self, LoadError> {
        Ok(Self {
            model: model::Model::new(weights)?,
            step_timeout: weights.step_timeout(),
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

    /// Starts the engine thread; at most `queue` requests wait at a time. The thread ends once every [`Handle`] is
    /// dropped and what was queued has ended, or when it cannot go on; its [`Guard`] says which.
    pub fn start(self, queue: usize) -> std::io::Result<(Handle, Guard)> {
        let (sender, inbox) = mpsc::unbounded_channel();
        let watch = watch::Watch::new();
        let handle = Handle {
            queue: sender,
            places: Arc::new(Semaphore::new(queue)),
            limit: queue,
            watch: watch.clone(),
        };
        let timer = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
        let runner = run::Runner::new(self.model, inbox, timer, self.metrics, watch.clone());
        let (ending, ended) = oneshot::channel();
        let watched = watch.clone();
        thread::Builder::new().name("engine".into()).spawn(move || {
            let end = run_to_the_end(runner, &watched);
            // A guard that gave up does not listen any more.
            let _ = ending.send(end);
        })?;
        let step_timeout = self.step_timeout;
        Ok((
            handle,
            Guard {
                watch,
                ended,
                step_timeout,
            },
        ))
    }
}

/// Runs the engine; whoever still waits when it ends is told before the runner, with their channels, goes.
fn run_to_the_end(mut runner: run::Runner, watch: &watch::Watch) -> End {
    let end = catch_unwind(AssertUnwindSafe(|| runner.run()))
        .unwrap_or_else(|panic| End::Panicked(fault::panic_message(&*panic)));
    watch.tell(&end);
    end
}

#[cfg(test)]
mod tests;
