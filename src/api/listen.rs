//! Connections: how many there may be, and how long each may keep the server waiting.
//!
//! HTTP/1.1 by hyper, which cuts who sends no head of a request in time; a socket that takes too little for too long, or
//! whose client has left, is cut here, and with it the response that was being written, whose request is thereby
//! cancelled. Bodies have their own limit, in `limits`.

mod socket;

use std::error::Error as _;
use std::future::poll_fn;
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use hyper_util::service::TowerToHyperService;
use tokio::io::AsyncWrite;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::Server;
use super::error::ApiError;
use super::limits::HEAD_BUFFER;
use socket::Socket;

/// What a connection may cost.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// Connections at a time; one more is told to come back and closed.
    pub connections: usize,
    /// For the head of a request to come, and for which a connection may stay idle between requests.
    pub head: Duration,
    /// For which a client may take nothing of what is ready for it.
    pub stall: Duration,
    /// For which an answer may wait for its client in all.
    pub answer: Duration,
}

/// After the system refused a connection, for lack of descriptors perhaps: accepting again at once would spin.
const PAUSE: Duration = Duration::from_millis(100);
/// For the answer to a connection too many, which fits every socket's buffer.
const GOODBYE: Duration = Duration::from_secs(1);

/// Serves `server` until `ending` is done, then closes the listener and returns once every request that runs is
/// answered. A drop ends the listening; connections that are open go on.
pub async fn serve(listener: TcpListener, server: Arc<Server>, patience: Patience, ending: impl Future<Output = ()>) {
    let router = super::router(server.clone());
    let places = Arc::new(Semaphore::new(patience.connections));
    let graceful = GracefulShutdown::new();
    let mut ending = pin!(ending);
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = &mut ending => break,
        };
        match accepted {
            Ok((stream, _)) => match places.clone().try_acquire_owned() {
                Ok(place) => drop(tokio::spawn(converse(
                    stream,
                    server.clone(),
                    router.clone(),
                    patience,
                    graceful.watcher(),
                    place,
                ))),
                Err(_) => {
                    server.observer.connection_cut("too_many");
                    tokio::spawn(send_away(stream));
                }
            },
            // The client was gone before it was accepted.
            Err(error) if is_the_clients(&error) => {}
            Err(error) => {
                tracing::warn!("cannot accept a connection: {error}; raise the limit of open files if it is that");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
    drop(listener);
    graceful.shutdown().await;
}

/// Answers one connection's requests until it is closed.
async fn converse(
    stream: TcpStream,
    server: Arc<Server>,
    router: Router,
    patience: Patience,
    watcher: Watcher,
    _place: OwnedSemaphorePermit,
) {
    // Tokens go out as they come, however small their packets. A socket that cannot do it is as good.
    let _ = stream.set_nodelay(true);
    let (socket, client) = Socket::new(stream, &patience);
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(patience.head)
        .max_buf_size(HEAD_BUFFER)
        .serve_connection(TokioIo::new(socket), TowerToHyperService::new(router));
    // Kept to the end of this function: a client that sees the close finds it counted.
    let mut connection = pin!(watcher.watch(connection));
    let ended = tokio::select! {
        // Where both know of the end, HTTP's word counts.
        biased;
        ended = &mut connection => ended,
        () = client.gone() => Ok(()),
    };
    if let Err(error) = ended {
        let observer = &server.observer;
        if is_stall(&error) {
            observer.connection_cut("stalled");
        } else if error.is_timeout() && client.has_begun() {
            // One that said nothing was idle, and is closed without being missed.
            observer.connection_cut("slow_head");
        } else if error.is_parse_too_large() {
            // Answered with a bare status, as are most of those below: there is no request to tell it to.
            observer.refused("headers_too_large");
        } else if error.is_parse() {
            observer.refused("malformed_head");
        }
        // Errors of a connection hold nothing of what was sent on it.
        tracing::debug!("a connection ended: {error}");
    }
}

/// Tells a connection too many to come back. No request of it is read.
async fn send_away(mut stream: TcpStream) {
    let body = ApiError::too_many_connections().body().to_string();
    let answer = format!(
        "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\nconnection: close\r\n\
         content-length: {}\r\n\r\n{body}",
        body.len()
    );
    // Whether it hears of it or not, it is closed.
    let _ = tokio::time::timeout(GOODBYE, async {
        stream.writable().await?;
        stream.try_write(answer.as_bytes())?;
        poll_fn(|context| Pin::new(&mut stream).poll_shutdown(context)).await?;
        // Closed with its request unread, the system would take the answer back.
        let mut unread = [0; 4096];
        loop {
            stream.readable().await?;
            match stream.try_read(&mut unread) {
                Ok(0) => return Ok(()),
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error),
                _ => {}
            }
        }
    })
    .await;
}

/// Whether the client kept its answer waiting for too long.
fn is_stall(error: &hyper::Error) -> bool {
    let cause = error.source().and_then(|cause| cause.downcast_ref::<io::Error>());
    cause.is_some_and(|cause| cause.kind() == io::ErrorKind::TimedOut)
}

fn is_the_clients(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

#[cfg(test)]
mod tests;
