//! `sconce serve`: the port first, then the model, then answers until it is told to end.

use std::{
    io,
    net::SocketAddr,
    panic::resume_unwind,
    path::Path,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use axum::serve::ListenerExt;
use prometheus::Registry;
use tokio::{net::TcpListener, signal};

use super::{device, model_files, model_files::PullError};
use crate::{
    api::{self, ApiSettings},
    batching,
    config::{self, LoadFormat, Serve},
    engine::{self, Engine, LoadError},
    telemetry::{self, EngineMetrics},
    text::{ChatTemplate, TextError, Tokenizer, stand_in},
};

/// Why the server could not start, or ended.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error("cannot listen on {host} port {port}: {source}; choose another `--port` or `--host`")]
    Listen { host: String, port: u16, source: io::Error },
    #[error("--admin lets clients change settings, so it needs a loopback address; {0} is none")]
    AdminInPublic(SocketAddr),
    #[error(transparent)]
    Pull(#[from] PullError),
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Text(#[from] TextError),
    #[error(transparent)]
    Device(#[from] device::DeviceError),
    #[error("the model could not be loaded: its file made the loader panic; fetch it again")]
    LoadPanicked,
    #[error("the engine ended by a panic; every waiting client was told; start the server again")]
    EngineLost,
    #[error("cannot start: {0}")]
    Start(#[from] io::Error),
    #[error("cannot register metrics: {0}")]
    Metrics(#[from] prometheus::Error),
}

/// Runs the server until SIGTERM or Ctrl-C.
pub fn run(settings: Serve) -> Result<(), ServeError> {
    device::set_threads(settings.model.threads);
    // The engine and the kernels have the cores; these threads wait on sockets and cut text.
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let served = runtime.block_on(serve(settings));
    // A model that is still loading, or the engine, has nobody left to work for. A download cleans up behind itself.
    runtime.shutdown_timeout(Duration::from_secs(1));
    served
}

async fn serve(settings: Serve) -> Result<(), ServeError> {
    let (host, port) = (settings.http.host.clone(), settings.http.port);
    let bound = TcpListener::bind((host.as_str(), port)).await;
    let listener = bound.map_err(|source| ServeError::Listen { host, port, source })?;
    let local = listener.local_addr()?;
    if settings.http.admin && !local.ip().is_loopback() {
        return Err(ServeError::AdminInPublic(local));
    }
    let (registry, metrics, observer) = metrics()?;
    if let config::Device::Cuda(ordinal) = settings.model.device {
        telemetry::register_gpu(&registry, ordinal)?;
    } else if settings.model.device == config::Device::Auto {
        telemetry::register_gpu(&registry, 0)?;
    }
    let server = Arc::new(api::Server::new(api_settings(&settings), observer, move || {
        telemetry::exposition(&registry)
    }));
    println!("sconce listens on http://{local} and loads {}", settings.choice.model);

    let loading = server.clone();
    let engine = tokio::task::spawn_blocking(move || run_engine(&settings, metrics, &loading, local));
    // Tokens go out as they come, however small their packets.
    let listener = listener.tap_io(|stream| drop(stream.set_nodelay(true)));
    let ending = told_to_end(server.clone());
    let serving = axum::serve(listener, api::router(server.clone())).with_graceful_shutdown(ending);
    tokio::select! {
        served = serving.into_future() => Ok(served?),
        ended = engine => {
            server.stop_accepting();
            // Whoever waits is told by the end of their events; the answers need a moment to go out.
            tokio::time::sleep(Duration::from_millis(300)).await;
            ended.unwrap_or(Err(ServeError::LoadPanicked))
        }
    }
}

/// Loads the model, lets clients in, and returns when there is no engine any more, or never was.
fn run_engine(
    settings: &Serve,
    metrics: Arc<EngineMetrics>,
    server: &api::Server,
    address: SocketAddr,
) -> Result<(), ServeError> {
    let (model, engine, thread) = load(settings, metrics)?;
    if settings.http.admin {
        server.allow_admin(engine);
    }
    let name = model.names[0].clone();
    server.serve_model(model);
    print_example(address, &name);
    thread.join().map_err(|_| ServeError::EngineLost)
}

/// Everything that `/metrics` shows.
fn metrics() -> Result<(Registry, Arc<EngineMetrics>, api::Observer), prometheus::Error> {
    let registry = Registry::new();
    // The process's own CPU time and memory, under Prometheus' usual names; the library reads them on Linux only.
    #[cfg(target_os = "linux")]
    registry.register(Box::new(prometheus::process_collector::ProcessCollector::for_self()))?;
    let metrics = Arc::new(EngineMetrics::new(&registry)?);
    let observer = api::Observer::register(&registry)?;
    Ok((registry, metrics, observer))
}

/// Ends at SIGTERM or Ctrl-C; what runs is then finished. A second signal ends the process at once.
async fn told_to_end(server: Arc<api::Server>) {
    signalled().await;
    server.stop_accepting();
    tracing::info!("ending once the requests that run are answered; signal again to end at once");
    tokio::spawn(async {
        signalled().await;
        std::process::exit(130);
    });
}

async fn signalled() {
    let terminated = async {
        match signal::unix::signal(signal::unix::SignalKind::terminate()) {
            Ok(mut signals) => drop(signals.recv().await),
            Err(_) => std::future::pending().await,
        }
    };
    tokio::select! {
        () = terminated => {}
        _ = signal::ctrl_c() => {}
    }
}

fn api_settings(settings: &Serve) -> ApiSettings {
    ApiSettings {
        max_body_bytes: settings.http.max_body as usize,
        request_timeout: Some(settings.http.request_timeout),
        max_choices: settings.batching.queue.min(api::MAX_CHOICES),
    }
}

/// A model for the HTTP side, the way into its engine, and the engine's thread.
type Loaded = (api::Model, engine::Handle, thread::JoinHandle<()>);

/// Fetches the model if need be, loads it, and starts the engine.
fn load(settings: &Serve, metrics: Arc<EngineMetrics>) -> Result<Loaded, ServeError> {
    let dummy = settings.model.load_format == LoadFormat::Dummy;
    let find = if dummy {
        model_files::shape
    } else {
        model_files::resolve
    };
    let path = find(&settings.choice.model)?;
    let started = Instant::now();
    // The vocabulary takes a moment of its own, on one core.
    let (engine, tokenizer, template) = thread::scope(|scope| {
        let text = scope.spawn(|| text(&path, dummy));
        let engine = Engine::load(&engine_settings(settings, &path)?, metrics)?;
        let (tokenizer, template) = text.join().unwrap_or_else(|panic| resume_unwind(panic))?;
        Ok::<_, ServeError>((engine, tokenizer, template))
    })?;
    let (max_model_len, vocab_size, kv_tokens) = (engine.max_model_len(), engine.vocab_size(), engine.kv_tokens());
    let (handle, thread) = engine.start(settings.batching.queue)?;
    tracing::info!(
        path = %path.display(), seconds = started.elapsed().as_secs_f64(), max_model_len, kv_tokens, "model loaded"
    );
    let name = settings.http.served_model_name.clone();
    let queue = handle.clone();
    let model = api::Model {
        names: vec![name.unwrap_or_else(|| settings.choice.model.clone())],
        max_model_len,
        vocab_size,
        tokenizer,
        template,
        submit: Box::new(move |requests| queue.submit(requests)),
    };
    Ok((model, handle, thread))
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

/// The engine's part of the settings.
pub fn engine_settings(settings: &Serve, path: &Path) -> Result<engine::Settings, device::DeviceError> {
    let (model, batching) = (&settings.model, &settings.batching);
    Ok(engine::Settings {
        path: path.into(),
        device: device::open(model.device)?,
        dtype: device::dtype(model.dtype),
        batching: batching::Config {
            schedule: batching.schedule,
            window_policy: batching.window_policy,
            window: batching.batch_window,
            max_batch: batching.max_batch,
            step_tokens: batching.step_tokens,
            buckets: batching.buckets.clone(),
            max_model_len: usize::MAX,
        },
        max_model_len: model.max_model_len,
        dummy: model.load_format == LoadFormat::Dummy,
        kv_memory: model.kv_memory,
        gpu_memory: model.gpu_memory,
        cuda_graphs: model.cuda_graphs,
        block_size: model.block_size,
        prefix_cache: !model.no_prefix_cache,
    })
}

fn print_example(address: SocketAddr, model: &str) {
    println!(
        "{model} is ready. Try:\n\n  curl http://{address}/v1/chat/completions -H 'content-type: application/json' \\\n    \
         -d '{{\"messages\": [{{\"role\": \"user\", \"content\": \"What is the capital of France?\"}}]}}'\n"
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_page_is_up_to_date() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/metrics.md");
        let page = telemetry::page(&metrics().unwrap().0);
        if std::env::var_os("UPDATE_DOCS").is_some() {
            std::fs::write(path, &page).unwrap();
        }
        let written = std::fs::read_to_string(path).unwrap();
        assert!(
            written == page,
            "docs/metrics.md is old: run UPDATE_DOCS=1 cargo test metrics_page"
        );
    }
}
