//! What happens around every request: its id, its count, and a panic that stays its own.

use std::sync::Arc;

use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderValue, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use tracing::{Instrument, Span};

use super::Server;
use super::access::{Exchange, Report};
use super::error::ApiError;
use super::keys::{InFlight, Key, Reservation};
use super::observe::Place;
use crate::request::Tenant;

const HEADER: &str = "x-request-id";

/// Who sent a request, and what the request is called in logs and in the response.
#[derive(Debug, Clone)]
pub(super) struct Caller {
    /// The client's own id where it is short and plain, else a random one.
    pub id: String,
    pub tenant: Arc<Tenant>,
    /// The request's span; whatever is logged of it on its way carries its id.
    pub span: Span,
    /// Where its handler says whose it is and how it ended.
    pub report: Arc<Report>,
    /// Their key, where there are keys.
    pub key: Option<Arc<Key>>,
    /// The key's place that this request takes until its answer has ended.
    pub place: Option<Arc<InFlight>>,
}

impl Caller {
    /// Charges the caller's key for a prompt and an answer of up to so many tokens.
    pub fn reserve(&self, prompt: usize, answer: usize) -> Result<Option<Reservation>, ApiError> {
        self.key.as_ref().map_or(Ok(None), |key| key.reserve(prompt, answer))
    }

    fn id(request: &Request) -> String {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.:".contains(&byte);
        let given = request.headers().get(HEADER).and_then(|value| value.to_str().ok());
        match given.filter(|id| (1..=128).contains(&id.len()) && id.bytes().all(plain)) {
            Some(id) => id.to_string(),
            None => format!("{:032x}", rand::random::<u128>()),
        }
    }
}

/// Gives the request its id and its span, the response the same id, and counts and logs both.
pub(super) async fn observe(State(server): State<Arc<Server>>, mut request: Request, next: Next) -> Response {
    let id = Caller::id(&request);
    let header = HeaderValue::from_str(&id);
    let route = request.extensions().get::<MatchedPath>().cloned();
    let route = route.as_ref().map_or("other", |path| path.as_str());
    // At the highest level, so that whichever lines are wanted carry the id.
    let kind = tracing::field::Empty;
    let span = tracing::error_span!("request", request_id = id, method = %request.method(), route, otel.kind = kind);
    #[cfg(feature = "otlp")]
    crate::telemetry::otlp::continue_trace(&span, request.headers());
    let caller = Caller {
        id,
        tenant: server.anyone.clone(),
        span: span.clone(),
        report: Arc::default(),
        key: None,
        place: None,
    };
    let exchange = Exchange::begin(server.clone(), caller.clone(), route);
    request.extensions_mut().insert(caller);
    let mut response = next.run(request).instrument(span).await;
    if let Ok(header) = header {
        response.headers_mut().insert(HEADER, header);
    }
    if server.ending.stopping() {
        // Clients that keep their connections are to find another server.
        let close = HeaderValue::from_static("close");
        response.headers_mut().insert(header::CONNECTION, close);
    }
    server.observer.answered(route, response.status().as_u16());
    exchange.answered(response)
}

/// The answer of a handler that panicked. What it panicked with is logged by the panic hook, and not for the client.
pub(super) fn panicked(server: &Server) -> Response {
    server.observer.panicked(Place::Handler);
    ApiError::internal("The server failed on this request. Please report it with its x-request-id.").into_response()
}
