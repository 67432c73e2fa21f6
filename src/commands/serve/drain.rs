//! How the server ends: nothing new, what runs to its end or its time, connections closed, the cache file written.

use std::{io, sync::Arc, time::Duration};

use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::oneshot,
    time::{Instant, sleep_until, timeout_at},
};

use crate::{
    api,
    commands::signals::SIGNALLED_TWICE,
    engine::{Handle, SaveError},
};

/// Time for the last bytes to reach clients that were cut off.
const LAST_BYTES: Duration = Duration::from_secs(1);

/// The signals that end the server; caught from when this is made, none is lost between two waits.
pub struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    pub fn catch() -> io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
        })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

/// Completes when connections may be closed: the server was told to end, and what ran has ended or was cut off after
/// `timeout`. Until then new requests are answered with 503. `closing` hears until when clients may still read. A second
/// signal ends the process at once.
pub async fn drained(
    server: Arc<api::Server>,
    mut signals: Signals,
    timeout: Duration,
    closing: oneshot::Sender<Instant>,
) {
    signals.next().await;
    server.stop_accepting();
    tracing::info!(
        ?timeout,
        "ending once the requests that run are answered; signal again to end at once"
    );
    tokio::spawn(async move {
        signals.next().await;
        std::process::exit(SIGNALLED_TWICE);
    });
    let end = Instant::now() + timeout;
    if timeout_at(end, server.idle()).await.is_err() {
        let cut = server.cut_off();
        tracing::warn!(
            requests = cut,
            "drain-timeout has passed; what still runs ends with an error"
        );
    }
    // Whoever waited for this is gone only if nothing is left to close.
    let _ = closing.send(end);
}

/// Completes when the connections that are still open have had their time.
pub async fn closed_late(closing: oneshot::Receiver<Instant>) {
    match closing.await {
        Ok(end) => sleep_until(end.max(Instant::now()) + LAST_BYTES).await,
        Err(_) => std::future::pending().await,
    }
    tracing::info!("closing connections whose clients do not read");
}

/// Writes the cache file, if there is one.
pub async fn save(engine: &Handle) {
    match engine.save_cache().await {
        Ok(_) | Err(SaveError::NoCacheFile) => {}
        Err(error) => tracing::error!(%error, "the cache file was not written"),
    }
}
