//! A connection's socket: whose turn it is, how long the client keeps its answer waiting, and whether it has left.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::{Instant, Sleep, sleep_until};

use super::Patience;

/// What HTTP is spoken on. A write fails as timed out where its client takes nothing of it for too long, or has made the
/// answer wait for too long in all.
pub struct Socket {
    read: Arc<OwnedReadHalf>,
    write: OwnedWriteHalf,
    clients_turn: Arc<AtomicBool>,
    waits: Waits,
    /// Wakes a write that waits for too long.
    timer: Pin<Box<Sleep>>,
}

/// The other end of a [`Socket`].
pub struct Client {
    read: Arc<OwnedReadHalf>,
    turn: Arc<AtomicBool>,
}

impl Socket {
    pub fn new(stream: TcpStream, patience: &Patience) -> (Self, Client) {
        let (read, write) = stream.into_split();
        let client = Client {
            read: Arc::new(read),
            turn: Arc::default(),
        };
        let socket = Self {
            read: client.read.clone(),
            write,
            clients_turn: client.turn.clone(),
            waits: Waits::new(patience.stall, patience.answer),
            timer: Box::pin(sleep_until(Instant::now())),
        };
        (socket, client)
    }

    fn wrote(&mut self, context: &mut Context, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if written.is_pending() {
            let waited_before = self.waits.since.is_some();
            let end = self.waits.wait(Instant::now());
            if !waited_before {
                self.timer.as_mut().reset(end);
            }
            return self
                .timer
                .as_mut()
                .poll(context)
                .map(|()| Err(io::ErrorKind::TimedOut.into()));
        }
        if self.waits.since.is_some() {
            self.waits.taken(Instant::now());
        }
        if let Poll::Ready(Ok(1..)) = written {
            self.clients_turn.store(false, Ordering::Relaxed);
        }
        written
    }
}

impl Client {
    /// Whether it has begun to say what it has not been answered to: the last bytes on the connection are its own.
    pub fn has_begun(&self) -> bool {
        self.turn.load(Ordering::Relaxed)
    }

    /// Completes when the client has closed its side, even if something that it sent before is still unread: HTTP does
    /// not look behind that, and would answer a client that has left.
    pub async fn gone(&self) {
        // Waits for the end, and for urgent data, which nobody sends; but not, as the others do, for data to read.
        #[cfg(target_os = "linux")]
        if let Ok(ready) = self.read.ready(tokio::io::Interest::PRIORITY).await
            && ready.is_read_closed()
        {
            return;
        }
        std::future::pending().await
    }
}

/// How long an answer has waited for its client.
#[derive(Debug)]
struct Waits {
    /// The most at a time, and for an answer.
    once: Duration,
    answer: Duration,
    /// For this answer, until the client took something last.
    waited: Duration,
    /// When it took nothing for the first time since.
    since: Option<Instant>,
}

impl Waits {
    fn new(once: Duration, answer: Duration) -> Self {
        let waited = Duration::ZERO;
        Self {
            once,
            answer,
            waited,
            since: None,
        }
    }

    /// The client takes nothing now; says until when it may go on so.
    fn wait(&mut self, now: Instant) -> Instant {
        let left = self.answer.saturating_sub(self.waited);
        *self.since.get_or_insert(now) + self.once.min(left)
    }

    /// The client took something.
    fn taken(&mut self, now: Instant) {
        let since = self.since.take().unwrap_or(now);
        self.waited += now.saturating_duration_since(since);
    }

    /// The client asks for more.
    fn next_answer(&mut self) {
        self.waited = Duration::ZERO;
    }
}

impl AsyncRead for Socket {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context, buffer: &mut ReadBuf) -> Poll<io::Result<()>> {
        loop {
            let stream: &TcpStream = (*self.read).as_ref();
            ready!(stream.poll_read_ready(context))?;
            match stream.try_read_buf(buffer) {
                Ok(count) => {
                    if count > 0 {
                        self.clients_turn.store(true, Ordering::Relaxed);
                        self.waits.next_answer();
                    }
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.write).poll_write(context, bytes);
        self.wrote(context, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context,
        parts: &[IoSlice],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.write).poll_write_vectored(context, parts);
        self.wrote(context, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.write.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context) -> Poll<io::Result<()>> {
        Pin::new(&mut self.write).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context) -> Poll<io::Result<()>> {
        Pin::new(&mut self.write).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_waits_for_so_long_at_a_time_and_for_so_long_in_all() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut waits = Waits::new(Duration::from_secs(30), Duration::from_secs(100));
        assert_eq!(waits.wait(at(0)), at(30));
        assert_eq!(waits.wait(at(20)), at(30), "it is still the same wait");
        // Something every 25 seconds, as one does who wants to keep its place.
        for taken in [25, 50, 75] {
            waits.taken(at(taken));
            assert_eq!(waits.wait(at(taken)), at(taken + 30).min(at(100)));
        }
        // What is not waited for does not count.
        waits.taken(at(90));
        assert_eq!(waits.wait(at(1000)), at(1010));
        waits.taken(at(1010));
        waits.next_answer();
        assert_eq!(waits.wait(at(2000)), at(2030));
    }
}
