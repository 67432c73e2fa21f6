//! `sconce serve`: the port first, then the model, then answers until it is told to end.

use std::{io, net::SocketAddr, path::Path, sync::Arc, time::Duration};

use axum::serve::ListenerExt;
use prometheus::Registry;
use tokio::{net::TcpListener, signal, sync::mpsc};

mod supervisor;

use super::{device, model_files::PullError};
use crate::{
    api::{self, ApiSettings},
    batching,
    config::Serve,
    engine::{self, LoadError},
    telemetry::{self, EngineMetrics},
    text::TextError,
};
use supervisor::Supervisor;

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
    #[error("the engine failed too often; every waiting client was told; see the log for what failed")]
    EngineLost,
    #[error("the device was lost: {0}; every waiting client was told; reset the device and start the server again")]
    DeviceLost(String),
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
    let server = Arc::new(api::Server::new(api_settings(&settings), observer, move || {
        telemetry::exposition(&registry)
    }));
    println!("sconce listens on http://{local} and loads {}", settings.choice.model);

    let (commands, models) = mpsc::channel(1);
    if settings.http.admin {
        server.allow_admin(commands);
    }
    let supervisor = Supervisor::new(settings, metrics, server.clone());
    let engine = supervisor.run(models, |name| print_example(local, name));
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
            ended
        }
    }
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
        kv_memory: model.kv_memory,
        block_size: model.block_size,
        prefix_cache: !model.no_prefix_cache,
        step_timeout: model.step_timeout,
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
