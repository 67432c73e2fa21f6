//! The one thread that owns the device: takes a plan, runs the model, samples, sends events.

mod admission;
mod budget;
mod cache;
mod cache_file;
mod choose;
mod fault;
mod flight;
#[cfg(any(test, feature = "fault-injection"))]
mod inject;
mod kv_room;
#[cfg(test)]
mod late;
mod memory;
mod model;
mod run;
mod sampler;
mod slots;
mod step;
mod watch;

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use tokio::sync::{mpsc, oneshot};
use tracing::Span;

use admission::{Place, SharedGate};

pub use cache::{CacheReport, PinFailed, PinInfo, PinRequest};
pub use cache_file::{CacheFile, Identity, SaveError, Saved};
pub use memory::{Memory, readable};
pub use model::{LoadError, Settings, Weights, default_dtype};
pub use watch::{End, Guard};

use crate::{
    batching::{Change, Config, ConfigError, Estimates, Gate, Limits, Refusal, TooLarge},
    request::Request,
    telemetry::{
        EngineMetrics,
        trace::{Busy, Life, Recording, Timeline},
    },
};

/// How often whoever waits for a reply looks whether there is still an engine.
const LOOK: Duration = Duration::from_millis(50);

/// The way into the engine, for the HTTP side. Cheap to clone; the engine ends when the last one is dropped and all
/// requests have ended.
#[derive(Debug, Clone)]
pub struct Handle {
    /// Bounded by the gate and not by itself, because a request keeps its place until a batch takes it, wherever it
    /// stands until then.
    queue: mpsc::UnboundedSender<Message>,
    gate: SharedGate,
    timeline: Arc<Timeline>,
    watch: watch::Watch,
    metrics: Arc<EngineMetrics>,
    number: u64,
}

/// What reaches the engine thread.
#[derive(Debug)]
enum Message {
    /// All of one client request, so that they begin together.
    Requests(Vec<Queued>),
    Pin(Box<Queued>, cache::PinOrder),
    Cache(cache::Question),
    Configure(Change, oneshot::Sender<Result<Config, ConfigError>>),
    /// Its state is shown from now on.
    Shown,
    /// Asks for the sequences that have not ended.
    Live(oneshot::Sender<Vec<Life>>),
    Save(cache_file::Reply),
}

/// A request, its place before the scheduler has it, and how long it was expected to take when it came.
#[derive(Debug)]
struct Queued {
    request: Request,
    place: Place,
    predicted: Option<Duration>,
    /// The span of its time in the queue.
    phase: Span,
}

/// Why the engine did not take a request. Nothing of it was queued.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Refused {
    #[error(transparent)]
    TooLarge(#[from] TooLarge),
    #[error(transparent)]
    Refused(#[from] Refusal),
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
    /// Queues all of `requests` (the choices and prompts of one client request), or none of them. Decides without
    /// waiting for the engine.
    pub fn submit(&self, requests: Vec<Request>) -> Result<(), Refused> {
        let accepted = self.gate.ask(&requests, Instant::now())?;
        if !self.watch.waiters.enter(&requests) {
            return Err(Refused::EngineLost);
        }
        let queued = requests
            .into_iter()
            .zip(accepted.places)
            .map(|(request, place)| Queued {
                phase: tracing::debug_span!(parent: &request.span, "queue"),
                request,
                place,
                predicted: accepted.predicted,
            });
        let message = Message::Requests(queued.collect());
        self.queue.send(message).map_err(|_| Refused::EngineLost)
    }

    /// Whether the engine is lost: it takes no requests, and those it had were told, or are about to be.
    pub fn is_lost(&self) -> bool {
        self.watch.pulse.abandoned()
    }

    /// This engine among all that the process has started.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// This engine's state is what `/metrics` shows from now on, and no other's: neither that of one which finishes the
    /// requests of a replaced model, nor that of one which only prepares itself.
    pub fn show(&self) {
        self.metrics.shown.show(self.number);
        // It may be idle, and then shows nothing by itself. One that is lost has nothing to show.
        let _ = self.queue.send(Message::Shown);
    }

    /// The engine's reply, or `None` if it is lost: a thread that hangs keeps the question and never answers.
    async fn reply<T>(&self, mut replied: oneshot::Receiver<T>) -> Option<T> {
        let mut look = tokio::time::interval(LOOK);
        loop {
            tokio::select! {
                biased;
                reply = &mut replied => return reply.ok(),
                _ = look.tick() => if self.is_lost() { return None },
            }
        }
    }

    /// Changes batching settings while the engine runs, and gives those now in force.
    pub async fn configure(&self, change: Change) -> Result<Config, ConfigureError> {
        let (reply, replied) = oneshot::channel();
        let message = Message::Configure(change, reply);
        self.queue.send(message).map_err(|_| ConfigureError::EngineLost)?;
        Ok(self.reply(replied).await.ok_or(ConfigureError::EngineLost)??)
    }

    /// Records what the engine does from now on for this long.
    pub async fn record(&self, length: Duration) -> Result<Recording, Busy> {
        let mut session = self.timeline.begin()?;
        session.gather(length).await;
        let (reply, replied) = oneshot::channel();
        // An engine that is lost has no live sequences.
        let _ = self.queue.send(Message::Live(reply));
        Ok(session.finish(self.reply(replied).await.unwrap_or_default()))
    }

    /// Writes the cached blocks to the cache file while requests go on, and says what it wrote.
    pub async fn save_cache(&self) -> Result<Saved, SaveError> {
        let (reply, replied) = oneshot::channel();
        self.queue
            .send(Message::Save(reply))
            .map_err(|_| SaveError::EngineLost)?;
        self.reply(replied).await.ok_or(SaveError::EngineLost)?
    }
}

/// A loaded model with its engine not yet running.
pub struct Engine {
    model: model::Model,
    step_timeout: Duration,
    metrics: Arc<EngineMetrics>,
}

impl Engine {
    /// An engine for these weights, with a KV cache of its own: what the cache file has, or nothing.
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

    /// Starts the engine thread behind a gate with these limits. The thread ends once every [`Handle`] is dropped and
    /// what was queued has ended, or when it cannot go on; its [`Guard`] says which.
    pub fn start(self, limits: Limits) -> std::io::Result<(Handle, Guard)> {
        let (sender, inbox) = mpsc::unbounded_channel();
        let watch = watch::Watch::new();
        let outlook = self.model.scheduler.outlook(&Estimates::default(), Instant::now());
        let gate = SharedGate::new(Gate::new(limits, outlook));
        let handle = Handle {
            queue: sender,
            gate: gate.clone(),
            timeline: Arc::default(),
            watch: watch.clone(),
            number: self.metrics.shown.another(),
            metrics: self.metrics.clone(),
        };
        let timer = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
        let runner = run::Runner::new(self.model, inbox, timer, &handle);
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
mod flight_tests;
#[cfg(test)]
pub(crate) mod tests;
