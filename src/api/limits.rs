//! Bounds of what a request may send before anything is made of it: the size of its head, and the size and the time of
//! its body. The bounds of what a body says stand with the fields that they bound.

use std::error::Error as _;
use std::sync::Arc;

use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http_body_util::LengthLimitError;

use super::Server;
use super::error::ApiError;

/// Bytes of a request's path and headers together.
pub(super) const MAX_HEAD: usize = 32 << 10;
/// What a connection reads at most before it has a whole head: past this the answer is a bare 431. Larger than
/// [`MAX_HEAD`], so that whoever is over that one by little is told so.
pub(super) const HEAD_BUFFER: usize = 4 * MAX_HEAD;

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
    match tokio::time::timeout(time, to_bytes(body, most)).await {
        Ok(Ok(bytes)) => next.run(Request::from_parts(parts, Body::from(bytes))).await,
        Ok(Err(error)) if error.source().is_some_and(|cause| cause.is::<LengthLimitError>()) => {
            ApiError::body_too_large(most).into_response()
        }
        Ok(Err(_)) => ApiError::body_unread().into_response(),
        Err(_) => ApiError::body_too_slow(time).into_response(),
    }
}
