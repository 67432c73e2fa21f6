//! What happens around every request: its id, its count, and a panic that stays its own.

use std::sync::Arc;

use axum::extract::{MatchedPath, Request, State};
use axum::http::HeaderValue;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::Server;
use super::error::ApiError;
use super::observe::Place;
use crate::request::Tenant;

const HEADER: &str = "x-request-id";

/// Who sent a request, and what the request is called in logs and in the response.
#[derive(Debug, Clone)]
pub(super) struct Caller {
    /// The client's own id where it is short and plain, else a random one.
    pub id: String,
    pub tenant: Arc<Tenant>,
}

impl Caller {
    fn id(request: &Request) -> String {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.:".contains(&byte);
        let given = request.headers().get(HEADER).and_then(|value| value.to_str().ok());
        match given.filter(|id| (1..=128).contains(&id.len()) && id.bytes().all(plain)) {
            Some(id) => id.to_string(),
            None => format!("{:032x}", rand::random::<u128>()),
        }
    }
}

/// Gives the request its id, the response the same, and counts both.
pub(super) async fn observe(State(server): State<Arc<Server>>, mut request: Request, next: Next) -> Response {
    let id = Caller::id(&request);
    let header = HeaderValue::from_str(&id);
    let route = request.extensions().get::<MatchedPath>().cloned();
    request.extensions_mut().insert(Caller {
        id,
        tenant: server.anyone.clone(),
    });
    let mut response = next.run(request).await;
    if let Ok(header) = header {
        response.headers_mut().insert(HEADER, header);
    }
    let route = route.as_ref().map_or("other", |path| path.as_str());
    server.observer.answered(route, response.status().as_u16());
    response
}

/// The answer of a handler that panicked. What it panicked with is logged by the panic hook, and not for the client.
pub(super) fn panicked(server: &Server) -> Response {
    server.observer.panicked(Place::Handler);
    ApiError::internal("The server failed on this request. Please report it with its x-request-id.").into_response()
}
