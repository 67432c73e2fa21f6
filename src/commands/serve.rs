//! `sconce serve`: the port first, then the model, then answers until it is told to end.

mod drain;
mod reload;

use std::{io, net::SocketAddr, path::Path, sync::Arc, time::Duration};

use prometheus::Registry;
use tokio::{
    net::TcpListener,
    sync::{mpsc, oneshot},
};

mod supervisor;

use super::{OutputError, device, model_files::PullError, say};
use crate::{
    api::{self, ApiSettings, listen},
    batching,
    config::{self, Serve, Setting},
    engine::{self, LoadError},
    telemetry::{self, EngineMetrics},
    text::TextError,
};
use supervisor::Supervisor;

/// Times `--write-timeout` for which an answer may wait for its client in all.
const ANSWER_WAITS: u32 = 10;
/// For clients to take the answers that tell them that the engine is lost.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// Why the server could not start, or ended.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error("cannot listen on {host} port {port}: {source}; choose another `--port` or `--host`")]
    Listen { host: String, port: u16, source: io::Error },
    #[error("--admin lets clients change settings, so it needs a loopback address; {0} is none")]
    AdminInPublic(SocketAddr),
    #[error(
        "{0} is no loopback address, so anyone who reaches it could use this server: give their keys with `--api-keys` \
         (`sconce key NAME` makes one), or answer everyone with `--allow-anonymous`"
    )]
    Anonymous(SocketAddr),
    #[error(transparent)]
    Keys(#[from] api::KeysError),
    #[error(transparent)]
    Pull(#[from] PullError),
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Text(#[from] TextError),
    #[error(transparent)]
    Device(#[from] device::DeviceError),
    #[error(transparent)]
    Output(#[from] OutputError),
    #[error(transparent)]
    NotPinned(#[from] api::NotPinned),
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

/// Runs the server until SIGTERM or Ctrl-C; what runs then is finished first.
/// `written` is where each setting's value came from.
pub fn run(settings: Serve, written: Vec<Setting>) -> Result<(), ServeError> {
    device::set_threads(settings.model.threads);
    // The engine and the kernels have the cores; these threads wait on sockets and cut text.
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let served = runtime.block_on(serve(settings, written));
    // A model that is still loading, or the engine, has nobody left to work for. A download cleans up behind itself.
    runtime.shutdown_timeout(Duration::from_secs(1));
    served
}

async fn serve(settings: Serve, written: Vec<Setting>) -> Result<(), ServeError> {
    let (signals, hangups) = (drain::Signals::catch()?, reload::hangups()?);
    let (host, port) = (settings.http.host.clone(), settings.http.port);
    let bound = TcpListener::bind((host.as_str(), port)).await;
    let listener = bound.map_err(|source| ServeError::Listen { host, port, source })?;
    let local = listener.local_addr()?;
    if settings.http.admin && !local.ip().is_loopback() {
        return Err(ServeError::AdminInPublic(local));
    }
    let keys = keys(&settings.http, local)?;
    let patience = patience(&settings.http);
    let (registry, metrics, observer) = metrics()?;
    let ordinal = match settings.model.device {
        config::Device::Cuda(ordinal) => Some(ordinal),
        config::Device::Auto => Some(0),
        config::Device::Cpu => None,
    };
    if let Some(bus_id) = ordinal.and_then(sconce_models::pci_bus_id) {
        telemetry::register_gpu(&registry, bus_id)?;
    }
    let server = api::Server::new(api_settings(&settings, local), observer, move || {
        telemetry::exposition(&registry)
    });
    let server = Arc::new(server.with_keys(keys));
    say(format_args!(
        "sconce listens on http://{local} and loads {}",
        settings.choice.model
    ))?;

    let (closing, closed) = oneshot::channel();
    let drained = drain::drained(server.clone(), signals, settings.life.drain_timeout, closing);
    let (losing, lost) = oneshot::channel::<()>();
    let ending = async {
        tokio::select! {
            () = drained => {}
            _ = lost => {}
        }
    };
    tokio::spawn(reload::on_hangup(
        hangups,
        server.clone(),
        written,
        settings.pins.clone(),
    ));
    let (commands, models) = mpsc::channel(1);
    if settings.http.admin {
        server.allow_admin(commands);
    }
    let supervisor = Supervisor::new(settings, metrics, server.clone());
    let mut engine = std::pin::pin!(supervisor.run(models, |name| print_example(local, name)));
    let mut listening = std::pin::pin!(listen::serve(listener, server.clone(), patience, ending));
    tokio::select! {
        () = &mut listening => {}
        () = drain::closed_late(closed) => {}
        ended = &mut engine => {
            server.stop_accepting();
            // Those of replaced models' engines, too.
            server.cut_off();
            // Whoever waits is told by the end of their events. Each connection is closed when its answer is out.
            drop(losing);
            let _ = tokio::time::timeout(LAST_WORDS, listening).await;
            return ended;
        }
    }
    if let Some(handle) = server.engine() {
        // An engine that hangs now never answers; its supervisor sees it.
        tokio::select! {
            () = drain::save(&handle) => {}
            ended = &mut engine => return ended,
        }
    }
    Ok(())
}

fn patience(http: &config::Http) -> listen::Patience {
    listen::Patience {
        connections: http.max_connections,
        head: http.read_timeout,
        stall: http.write_timeout,
        answer: ANSWER_WAITS * http.write_timeout,
    }
}

/// The API keys, followed as their file changes. Without any, only this machine's own clients are answered, unless all
/// are to be.
fn keys(settings: &config::Http, local: SocketAddr) -> Result<Option<api::Keys>, ServeError> {
    let Some(path) = &settings.api_keys else {
        let open = local.ip().is_loopback() || settings.allow_anonymous;
        return open.then_some(None).ok_or(ServeError::Anonymous(local));
    };
    let keys = api::Keys::open(path.clone())?;
    tracing::info!(path = %path.display(), keys = keys.count(), "API keys read");
    tokio::spawn(keys.clone().follow_file());
    Ok(Some(keys))
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

fn api_settings(settings: &Serve, local: SocketAddr) -> ApiSettings {
    ApiSettings {
        max_body_bytes: settings.http.max_body as usize,
        read_timeout: settings.http.read_timeout,
        request_timeout: Some(settings.http.request_timeout),
        max_choices: settings.batching.queue.min(api::MAX_CHOICES),
        pinning: local.ip().is_loopback() || settings.http.api_keys.is_some(),
    }
}

/// What the engine takes on.
fn limits(settings: &Serve) -> batching::Limits {
    let batching = &settings.batching;
    batching::Limits {
        requests: batching.queue,
        tokens: batching.queue_tokens,
        in_flight: batching.max_in_flight,
        key_share: batching.key_share,
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
        dummy: model.load_format == config::LoadFormat::Dummy,
        quantized: model.quantized,
        kv_memory: model.kv_memory,
        gpu_memory: model.gpu_memory,
        cuda_graphs: model.cuda_graphs,
        overlap: model.overlap,
        block_size: model.block_size,
        prefix_cache: !model.no_prefix_cache,
        cache_file: settings.life.cache_file.clone(),
        cache_scope: model.cache_scope,
        pin_share: model.pin_memory,
        step_timeout: model.step_timeout,
    })
}

fn print_example(address: SocketAddr, model: &str) {
    // A server that is ready serves, whoever hears of it.
    let _ = say(format_args!(
        "{model} is ready. Try:\n\n  curl http://{address}/v1/chat/completions -H 'content-type: application/json' \\\n    \
         -d '{{\"messages\": [{{\"role\": \"user\", \"content\": \"What is the capital of France?\"}}], \
         \"temperature\": 0}}'\n"
    ));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gate_has_the_limits_that_the_settings_name() {
        let words = "sconce serve --queue 11 --queue-tokens 22 --max-in-flight 33 --key-share 0.25";
        let parsed = config::parse(words.split(' ').map(std::ffi::OsString::from)).unwrap();
        let config::Command::Serve(settings) = parsed.command else {
            panic!()
        };
        let expected = batching::Limits {
            requests: 11,
            tokens: Some(22),
            in_flight: Some(33),
            key_share: 0.25,
        };
        assert_eq!(limits(&settings), expected);
    }

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
