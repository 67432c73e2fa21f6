//! Who may ask what: the API key of each request, checked before anything else of it is read.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, Method, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::Server;
use super::error::ApiError;
use super::keys::Key;
use super::middleware::Caller;

/// Probes ask these, have no key, and learn nothing but whether the server is up.
const OPEN: [&str; 2] = ["/health", "/ready"];
/// These speak of every caller, or change what they get.
const ADMIN: [&str; 4] = ["/metrics", "/admin", "/debug", "/v1/cache/save"];

/// Refuses who has no key, or none for this, and says in each answer what is left of the key's quotas.
pub(super) async fn authenticate(State(server): State<Arc<Server>>, mut request: Request, next: Next) -> Response {
    let Some(keys) = server.keys.as_ref().filter(|_| !OPEN.contains(&request.uri().path())) else {
        return next.run(request).await;
    };
    let known = bearer(request.headers()).and_then(|secret| {
        let unknown = "The API key is not known here. Check it, or ask the server's operator for one.";
        keys.find(secret).ok_or_else(|| ApiError::unauthorized(unknown))
    });
    let key = match known {
        Ok(key) => key,
        Err(refusal) => return refusal.into_response(),
    };
    if let Some(caller) = request.extensions().get::<Caller>() {
        // Nobody has said so before.
        let _ = caller.report.tenant.set(key.tenant.clone());
    }
    if let Err(refusal) = allowed(&key, request.uri().path()) {
        return refusal.into_response();
    }
    let mut response = match enter(&key, &mut request) {
        Ok(()) => next.run(request).await,
        Err(refusal) => refusal.into_response(),
    };
    key.show(response.headers_mut());
    response
}

/// The key of `Authorization: Bearer KEY`.
fn bearer(headers: &HeaderMap) -> Result<&str, ApiError> {
    let value = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let (scheme, secret) = value.and_then(|value| value.split_once(' ')).unwrap_or_default();
    if scheme.eq_ignore_ascii_case("bearer") && !secret.is_empty() {
        return Ok(secret.trim());
    }
    Err(ApiError::unauthorized(
        "This server needs an API key. Send it in the header `Authorization: Bearer KEY`.",
    ))
}

fn allowed(key: &Key, path: &str) -> Result<(), ApiError> {
    if key.disabled() {
        let message = "This API key is disabled. Ask the server's operator.";
        return Err(ApiError::forbidden("key_disabled", message));
    }
    let within = |root: &&str| {
        path.strip_prefix(*root)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    };
    if ADMIN.iter().any(within) && !key.admin() {
        let message = format!("{path} needs a key with `admin = true`.");
        return Err(ApiError::forbidden("not_admin", message));
    }
    Ok(())
}

/// Counts the request if it asks for work, and tells those behind whose it is.
fn enter(key: &Arc<Key>, request: &mut Request) -> Result<(), ApiError> {
    let place = match *request.method() {
        Method::POST => Some(Arc::new(key.admit()?)),
        _ => None,
    };
    if let Some(caller) = request.extensions_mut().get_mut::<Caller>() {
        caller.tenant = key.tenant.clone();
        caller.key = Some(key.clone());
        caller.place = place;
    }
    Ok(())
}
