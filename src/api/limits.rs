//! Bounds of what a request may send before anything is made of it: the size of its head, and the size and the time of
//! its body, alone and beside all others. The bounds of what a body says stand with the fields that they bound.

use std::sync::Arc;

use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http_body_util::BodyExt;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::Server;
use super::error::ApiError;

/// Bytes of a request's path and headers together.
pub(super) const MAX_HEAD: usize = 32 << 10;
/// What a connection reads at most before it has a whole head: past this the answer is a bare 431. Larger than
/// [`MAX_HEAD`], so that whoever is over that one by little is told so.
pub(super) const HEAD_BUFFER: usize = 4 * MAX_HEAD;

/// Bytes that each body may have at any time: of these, connections bound the sum.
const SMALL_BODY: usize = 64 << 10;
/// Bytes that the bodies of all requests have at a time beyond those; more where the largest ones are larger.
const LARGE_BODIES: usize = 256 << 20;

/// The memory that large bodies share until they are parsed: a permit is a byte.
pub(super) fn room_for_bodies(max_body: usize) -> Arc<Semaphore> {
    Arc::new(Semaphore::new(LARGE_BODIES.max(4 * max_body)))
}

/// Refuses what is too large or too slow, and gives what follows a body that is read already.
pub(super) async fn bound(State(server): State<Arc<Server>>, request: Request, next: Next) -> Response {
    let (parts, body) = request.into_parts();
    let headers = parts
        .headers
        .iter()
        .map(|(name, value)| name.as_str().len() + value.len());
    let path = parts.uri.path_and_query().map_or(0, |path| path.as_str().len());
    if path + headers.sum::<usize>() > MAX_HEAD {
        return ApiError::head_too_large(MAX_HEAD).into_response();
    }
    let (most, time) = (server.settings.max_body_bytes, server.settings.read_timeout);
    let read = tokio::time::timeout(time, read(body, most, &server.room_for_bodies)).await;
    match read.unwrap_or_else(|_| Err(ApiError::body_too_slow(time))) {
        Ok(bytes) => next.run(Request::from_parts(parts, Body::from(bytes))).await,
        Err(refusal) => refusal.into_response(),
    }
}

/// A body, and the room that it takes until nobody reads it any more.
#[derive(Default)]
struct Held {
    bytes: Vec<u8>,
    room: Option<OwnedSemaphorePermit>,
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Held {
    /// Takes room for what has come, not for what was announced, so that nobody keeps room without sending anything.
    fn take(&mut self, room: &Arc<Semaphore>) -> Result<(), ApiError> {
        let taken = self.room.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
        let more = self.bytes.len().saturating_sub(SMALL_BODY + taken);
        if more == 0 {
            return Ok(());
        }
        let more = u32::try_from(more).map_err(|_| ApiError::too_many_bytes())?;
        // Those who wait for room would keep theirs from each other.
        let permit = room.clone().try_acquire_many_owned(more);
        let permit = permit.map_err(|_| ApiError::too_many_bytes())?;
        match &mut self.room {
            Some(room) => room.merge(permit),
            none => *none = Some(permit),
        }
        Ok(())
    }
}

async fn read(mut body: Body, most: usize, room: &Arc<Semaphore>) -> Result<Bytes, ApiError> {
    let mut held = Held::default();
    while let Some(frame) = body.frame().await {
        // Else it is a trailer, which nobody asks for.
        if let Ok(data) = frame.map_err(|_| ApiError::body_unread())?.into_data() {
            if held.bytes.len() + data.len() > most {
                return Err(ApiError::body_too_large(most));
            }
            held.bytes.extend_from_slice(&data);
            held.take(room)?;
        }
    }
    Ok(Bytes::from_owner(held))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn large_bodies_share_their_room_and_small_ones_need_none() {
        let room = Arc::new(Semaphore::new(100 << 10));
        let read = |size: usize| read(Body::from(vec![b'x'; size]), 1 << 20, &room);
        let large = read(SMALL_BODY + (80 << 10)).await.unwrap();
        assert_eq!(large.len(), SMALL_BODY + (80 << 10));
        let small = read(SMALL_BODY).await.unwrap();
        let refused = read(SMALL_BODY + (80 << 10)).await.unwrap_err();
        assert_eq!((refused.status.as_u16(), refused.cause()), (503, "too_many_bytes"));
        // What still reads a part of it keeps all of it.
        let part = large.slice(..10);
        drop(large);
        assert!(read(SMALL_BODY + (80 << 10)).await.is_err());
        drop((part, small));
        assert!(read(SMALL_BODY + (80 << 10)).await.is_ok());
        assert_eq!(read((1 << 20) + 1).await.unwrap_err().cause(), "body_too_large");
    }
}
