//! Owns the models and their engines: the one that serves, one that may be loading, and those that were replaced and
//! still finish requests. Starts an engine again that failed, unless it fails too often.

use std::{
    collections::VecDeque,
    panic::resume_unwind,
    path::Path,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use tokio::{
    sync::{mpsc, oneshot},
    task::{JoinError, JoinHandle, JoinSet},
};

use super::{ServeError, engine_settings, limits};
use crate::{
    api::{self, ModelCommand, ModelState, NotChanged},
    commands::model_files,
    config::{LoadFormat, Serve},
    engine::{self, ConfigureError, End, Engine, LoadError, Weights},
    telemetry::EngineMetrics,
    text::{ChatTemplate, Tokenizer, stand_in},
};

/// An engine that fails more often than this...
const MOST_RESTARTS: usize = 3;
/// ... in this time is not started again.
const RESTARTS_WITHIN: Duration = Duration::from_secs(600);

/// A model that is in memory, with an engine that does not run yet.
struct Loaded {
    weights: Weights,
    engine: Engine,
    tokenizer: Tokenizer,
    template: Option<Arc<ChatTemplate>>,
}

/// A model whose engine runs and has computed the settings' prompts, or has told why not.
struct Prepared {
    name: String,
    engine: engine::Handle,
    guard: JoinHandle<End>,
    model: Arc<api::Model>,
    weights: Weights,
    pinned: Result<(), api::NotPinned>,
}

type Preparing = JoinSet<Result<Prepared, ServeError>>;

/// The model that serves.
struct Current {
    name: String,
    /// Which of the guards watches its engine.
    number: u64,
    model: Arc<api::Model>,
    weights: Weights,
}

type LoadReply = oneshot::Sender<Result<ModelState, NotChanged>>;

pub struct Supervisor {
    settings: Arc<Serve>,
    metrics: Arc<EngineMetrics>,
    server: Arc<api::Server>,
    current: Option<Current>,
    /// At most one model loads at a time.
    loads: Preparing,
    /// Its name, and who asked for it: nobody for the first one.
    loading: Option<(String, Option<LoadReply>)>,
    /// An engine that is started again on the weights in memory, unless another model is swapped in before.
    restart: Preparing,
    /// Its model's name.
    restarting: Option<String>,
    /// Whether the model that was installed last is on a GPU.
    on_gpu: bool,
    /// One for each engine, the serving one and those that were replaced.
    guards: JoinSet<(u64, End)>,
    /// When engines failed, of late.
    failures: VecDeque<Instant>,
}

impl Supervisor {
    pub fn new(settings: Serve, metrics: Arc<EngineMetrics>, server: Arc<api::Server>) -> Self {
        Self {
            settings: Arc::new(settings),
            metrics,
            server,
            current: None,
            loads: JoinSet::new(),
            loading: None,
            restart: JoinSet::new(),
            restarting: None,
            on_gpu: false,
            guards: JoinSet::new(),
            failures: VecDeque::new(),
        }
    }

    /// Loads the first model, then does what is asked and what failures demand. Returns when there is no model to serve
    /// any more, or never was one; whoever waited has been told by then. `ready` hears of the first model's name.
    pub async fn run(
        mut self,
        mut commands: mpsc::Receiver<ModelCommand>,
        ready: impl FnOnce(&str),
    ) -> Result<(), ServeError> {
        let mut ready = Some(ready);
        self.load(self.settings.choice.model.clone(), None);
        loop {
            tokio::select! {
                Some(loaded) = self.loads.join_next() => {
                    self.loaded(loaded).await?;
                    if let (Some(ready), Some(current)) = (ready.take(), &self.current) {
                        ready(&current.model.names[0]);
                    }
                }
                Some(again) = self.restart.join_next() => self.runs_again(again).await?,
                Some(Ok((number, end))) = self.guards.join_next() => self.ended(number, end)?,
                Some(command) = commands.recv() => self.obey(command),
            }
        }
    }

    fn obey(&mut self, command: ModelCommand) {
        // Whoever asked may have left.
        match command {
            ModelCommand::Show(reply) => drop(reply.send(self.state())),
            ModelCommand::Change { model, reply } => match &self.loading {
                Some((loading, _)) => {
                    let loading = loading.clone();
                    let _ = reply.send(Err(NotChanged::Busy { loading }));
                }
                None => self.load(model, Some(reply)),
            },
        }
    }

    fn state(&self) -> ModelState {
        let serving = self.current.as_ref().map(|current| &current.name);
        ModelState {
            model: serving.or(self.restarting.as_ref()).cloned(),
            loading: self.loading.as_ref().map(|(name, _)| name.clone()),
            retiring: self.guards.len().saturating_sub(usize::from(serving.is_some())),
        }
    }

    fn load(&mut self, name: String, reply: Option<LoadReply>) {
        let (settings, metrics) = (self.settings.clone(), self.metrics.clone());
        self.loading = Some((name.clone(), reply));
        let alone = self.current.is_none() && self.restarting.is_none();
        self.loads.spawn(async move {
            let (choice, read) = (settings.clone(), name.clone());
            let loaded = tokio::task::spawn_blocking(move || load(&choice, &read, metrics)).await;
            let loaded = loaded.map_err(|_| ServeError::LoadPanicked)??;
            let served = settings.http.served_model_name.clone();
            let names = vec![served.unwrap_or_else(|| name.clone())];
            prepare(&settings, name, names, loaded, alone).await
        });
    }

    /// A model is in memory, or it is not: then the one before it goes on, and without one there is nothing to do.
    async fn loaded(&mut self, loaded: Result<Result<Prepared, ServeError>, JoinError>) -> Result<(), ServeError> {
        let asked = self.loading.take().and_then(|(_, reply)| reply);
        let started = match loaded.unwrap_or(Err(ServeError::LoadPanicked)) {
            Ok(prepared) => self.install(prepared).await,
            Err(error) => Err(error),
        };
        let Some(reply) = asked else { return started };
        let outcome = if started.is_ok() { "swapped" } else { "failed" };
        self.metrics.model_changes.with_label_values(&[outcome]).inc();
        let answer = started.map(|()| self.state()).map_err(|error| {
            tracing::warn!(%error, "the model was not replaced");
            NotChanged::Failed(error.to_string())
        });
        // The change stands, whoever asked for it.
        let _ = reply.send(answer);
        Ok(())
    }

    /// New requests go to this model from now on. The one before it ends with its last request.
    async fn install(&mut self, prepared: Prepared) -> Result<(), ServeError> {
        let Prepared {
            name,
            engine,
            guard,
            model,
            weights,
            pinned,
        } = prepared;
        let number = engine.number();
        self.on_gpu = weights.on_gpu();
        self.guards.spawn(async move {
            let unwatched = |_| End::Panicked("what watched it panicked".into());
            (number, guard.await.unwrap_or_else(unwatched))
        });
        if let Err(error) = pinned {
            // The guard of a lost engine says how it ended, and then what is to be done is done. But a model that serves,
            // or is about to again, is not replaced by this one.
            if self.current.is_some() || self.restarting.is_some() || !engine.is_lost() {
                return Err(error.into());
            }
        }
        // What would start again is not needed any more; dropped, its engine ends.
        (self.restart, self.restarting) = (JoinSet::new(), None);
        engine.show();
        self.server.serve_model(model.clone());
        // An engine that is lost by now is its guard's to tell of.
        if let Err(ConfigureError::Config(error)) = self.server.catch_up(&engine).await {
            tracing::warn!(%error, "this model takes the batching settings that the server was started with");
        }
        self.current = Some(Current {
            name,
            number,
            model,
            weights,
        });
        Ok(())
    }

    /// An engine's thread has ended or hangs. One that was replaced is not missed; the serving one is started again.
    fn ended(&mut self, number: u64, end: End) -> Result<(), ServeError> {
        if end == End::Hung && self.on_gpu {
            // Whatever any engine asks of the device waits behind the step that hangs, even a replaced one's.
            return Err(ServeError::DeviceLost("a step did not end".into()));
        }
        let Some(current) = self.current.take_if(|current| current.number == number) else {
            self.retired(&end);
            return Ok(());
        };
        self.server.restarting();
        tracing::error!(?end, "the engine failed; everyone who waited for it was told");
        let cause = cause(&end);
        if let End::DeviceLost(reason) = end {
            return Err(ServeError::DeviceLost(reason));
        }
        if !self.may_restart(Instant::now()) {
            return Err(ServeError::EngineLost);
        }
        self.metrics.restarts.with_label_values(&[cause]).inc();
        let Current {
            name, model, weights, ..
        } = current;
        self.restarting = Some(name.clone());
        let (settings, metrics) = (self.settings.clone(), self.metrics.clone());
        self.restart.spawn(async move {
            let fresh = weights.clone();
            let engine = tokio::task::spawn_blocking(move || Engine::new(&fresh, metrics)).await;
            let loaded = Loaded {
                weights,
                engine: engine.map_err(|_| ServeError::EngineLost)??,
                tokenizer: model.tokenizer.clone(),
                template: model.template.clone(),
            };
            prepare(&settings, name, model.names.clone(), loaded, true).await
        });
        Ok(())
    }

    /// An engine that failed has been started again, unless it could not be.
    async fn runs_again(&mut self, again: Result<Result<Prepared, ServeError>, JoinError>) -> Result<(), ServeError> {
        self.restarting = None;
        self.install(again.unwrap_or(Err(ServeError::EngineLost))?).await?;
        tracing::warn!("the engine runs again");
        Ok(())
    }

    /// A replaced model's engine ended, as it should or not.
    fn retired(&self, end: &End) {
        if *end == End::Finished {
            tracing::info!("a replaced model's engine ended");
            return;
        }
        tracing::error!(
            ?end,
            "a replaced model's engine failed; everyone who waited for it was told"
        );
        self.metrics.retired_failures.with_label_values(&[cause(end)]).inc();
    }

    fn may_restart(&mut self, now: Instant) -> bool {
        self.failures
            .retain(|failure| now.saturating_duration_since(*failure) < RESTARTS_WITHIN);
        self.failures.push_back(now);
        self.failures.len() <= MOST_RESTARTS
    }
}

/// The metrics' word for how an engine failed.
fn cause(end: &End) -> &'static str {
    match end {
        End::DeviceLost(_) => "device_lost",
        End::Hung => "hung",
        // The serving one is not to finish.
        End::Panicked(_) | End::Finished => "panicked",
    }
}

/// Fetches the model if need be and reads it.
fn load(settings: &Serve, name: &str, metrics: Arc<EngineMetrics>) -> Result<Loaded, ServeError> {
    #[cfg(any(test, feature = "fault-injection"))]
    crate::fault_injection::Fault::Loader.panic_if_asked(name, 0);
    let dummy = settings.model.load_format == LoadFormat::Dummy;
    let find = if dummy {
        model_files::shape
    } else {
        model_files::resolve
    };
    let path = find(name)?;
    let started = Instant::now();
    // The vocabulary takes a moment of its own, on one core.
    let (weights, tokenizer, template) = thread::scope(|scope| {
        let text = scope.spawn(|| text(&path, dummy));
        let weights = Weights::load(&engine_settings(settings, &path)?)?;
        let (tokenizer, template) = text.join().unwrap_or_else(|panic| resume_unwind(panic))?;
        Ok::<_, ServeError>((weights, tokenizer, template.map(Arc::new)))
    })?;
    let engine = Engine::new(&weights, metrics)?;
    tracing::info!(
        path = %path.display(), seconds = started.elapsed().as_secs_f64(),
        max_model_len = engine.max_model_len(), kv_tokens = engine.kv_tokens(), "model loaded"
    );
    Ok(Loaded {
        weights,
        engine,
        tokenizer,
        template,
    })
}

/// Starts an engine and pins the settings' prompts in its cache. It may take long, so the supervisor does not wait for it.
/// One that is `alone`, with no other that serves, shows its state meanwhile.
async fn prepare(
    settings: &Serve,
    name: String,
    names: Vec<String>,
    loaded: Loaded,
    alone: bool,
) -> Result<Prepared, ServeError> {
    let Loaded {
        weights,
        engine,
        tokenizer,
        template,
    } = loaded;
    let (max_model_len, vocab_size) = (engine.max_model_len(), engine.vocab_size());
    let (engine, guard) = engine.start(limits(settings))?;
    let guard = tokio::spawn(guard.wait());
    if alone {
        engine.show();
    }
    let queue = engine.clone();
    let model = Arc::new(api::Model {
        names,
        max_model_len,
        vocab_size,
        tokenizer,
        template,
        submit: Box::new(move |requests| queue.submit(requests)),
        engine: Some(engine.clone()),
    });
    let pinned = api::pin_configured(&model, &engine, &settings.pins).await;
    Ok(Prepared {
        name,
        engine,
        guard,
        model,
        weights,
        pinned,
    })
}

/// The model's vocabulary and chat template.
fn text(path: &Path, dummy: bool) -> Result<(Tokenizer, Option<ChatTemplate>), ServeError> {
    if dummy {
        let config = sconce_models::Config::from_json(path).map_err(LoadError::Model)?;
        let (tokenizer, template) = stand_in(config.vocab_size)?;
        return Ok((tokenizer, Some(template)));
    }
    Ok((Tokenizer::open(path)?, ChatTemplate::open(path)?))
}
