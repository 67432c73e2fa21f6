//! Keeps web pages from the routes that change the server. A browser on the server's own machine reaches its loopback
//! address, and sends what any page asks it to send there: `Sec-Fetch-Site` and the page's `Origin` give that away, and
//! where the page had its own name point to this machine (DNS rebinding), the `Host` does.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::Server;
use super::error::ApiError;

/// Refuses requests that a page of another site made, or may have made.
pub(super) async fn refuse_pages(State(server): State<Arc<Server>>, request: Request, next: Next) -> Response {
    // Where there are keys, no page has one. Where these routes are not allowed, they are as unknown as any.
    let open = server.keys.is_none() && server.admin.get().is_some();
    match check(request.headers()) {
        Err(refusal) if open => refusal.into_response(),
        _ => next.run(request).await,
    }
}

fn check(headers: &HeaderMap) -> Result<(), ApiError> {
    let hosts = || headers.get_all(header::HOST).iter();
    // A browser always sends one.
    if !hosts().all(is_loopback) {
        let message = "These routes are served under a loopback address alone; use `127.0.0.1` or `localhost`.";
        return Err(ApiError::forbidden("foreign_host", message));
    }
    // These routes need a loopback address to listen on, so a page of the server's own host has this origin.
    let own = |origin: &HeaderValue| {
        let origin = origin.to_str().ok().and_then(|origin| origin.split_once("://"));
        origin.is_some_and(|(_, host)| hosts().any(|own| own.as_bytes().eq_ignore_ascii_case(host.as_bytes())))
    };
    // A picture's address, say, is asked for without an origin. `none` is what the user typed.
    let fetched = headers.get_all("sec-fetch-site").iter();
    let mut fetched = fetched.filter(|site| !matches!(site.as_bytes(), b"none" | b"same-origin"));
    if !headers.get_all(header::ORIGIN).iter().all(own) || fetched.next().is_some() {
        let message = "These routes take no requests from pages of other sites.";
        return Err(ApiError::forbidden("foreign_origin", message));
    }
    Ok(())
}

/// Whether a `Host` names this machine: `localhost` or a loopback address, with or without a port.
fn is_loopback(host: &HeaderValue) -> bool {
    let Ok(host) = host.to_str() else { return false };
    if let Ok(address) = host.parse::<SocketAddr>() {
        return address.ip().is_loopback();
    }
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    };
    let address = name.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    name.eq_ignore_ascii_case("localhost") || address.is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use axum::http::{Request as HttpRequest, StatusCode};
    use serde_json::json;
    use tokio::sync::mpsc;

    use super::super::testing;
    use super::*;

    #[test]
    fn only_loopback_names_are_this_machines() {
        for own in [
            "localhost",
            "LOCALHOST:8080",
            "127.0.0.1",
            "127.1.2.3:80",
            "[::1]",
            "[::1]:8080",
        ] {
            assert!(is_loopback(&HeaderValue::from_static(own)), "{own}");
        }
        for other in [
            "",
            "evil.example",
            "evil.example:8080",
            "localhost.evil.example",
            "127.0.0.1.evil.example:8080",
            "192.168.0.1:8080",
            "0.0.0.0:8080",
            "localhost:8080:x",
        ] {
            assert!(!is_loopback(&HeaderValue::from_static(other)), "{other}");
        }
    }

    #[tokio::test]
    async fn pages_reach_no_route_that_changes_the_server() {
        let server = testing::server(|_| Ok(()));
        let (models, _kept) = mpsc::channel(1);
        server.allow_admin(models);
        let ask = async |method: &str, path: &str, host: &str, origin: Option<&str>| {
            let mut request = HttpRequest::builder().method(method).uri(path).header("host", host);
            if let Some(origin) = origin {
                request = request.header("origin", origin);
            }
            testing::send(&server, request.body(Body::empty()).unwrap()).await
        };
        let own = "127.0.0.1:8080";
        for (method, path) in [
            ("GET", "/admin/batching"),
            ("POST", "/admin/batching"),
            ("POST", "/admin/model"),
            ("POST", "/v1/cache/save"),
            ("GET", "/debug/trace"),
        ] {
            for (host, origin, code) in [
                (own, Some("https://evil.example"), "foreign_origin"),
                (own, Some("null"), "foreign_origin"),
                (own, Some("http://127.0.0.1:3000"), "foreign_origin"),
                ("evil.example:8080", Some("http://evil.example:8080"), "foreign_host"),
                ("evil.example:8080", None, "foreign_host"),
            ] {
                let (status, body) = testing::answer(ask(method, path, host, origin).await).await;
                assert_eq!(
                    (status, &body["error"]["code"]),
                    (403, &json!(code)),
                    "{path} {host} {origin:?}"
                );
                assert_eq!(body["error"]["type"], "permission_error");
            }
            for (site, refused) in [
                ("cross-site", true),
                ("same-site", true),
                ("same-origin", false),
                ("none", false),
            ] {
                let request = HttpRequest::builder().method(method).uri(path).header("host", own);
                let request = request.header("sec-fetch-site", site).body(Body::empty()).unwrap();
                let status = testing::send(&server, request).await.status();
                assert_eq!(status == StatusCode::FORBIDDEN, refused, "{path} {site}");
            }
            for origin in [None, Some("http://127.0.0.1:8080")] {
                let response = ask(method, path, own, origin).await;
                assert_ne!(response.status(), StatusCode::FORBIDDEN, "{path} {origin:?}");
            }
        }
        let probe = ask("GET", "/health", "evil.example", Some("http://evil.example")).await;
        assert_eq!(probe.status(), StatusCode::OK);
    }

    #[tokio::test]
    async fn routes_that_are_not_allowed_are_unknown_to_pages_too() {
        let server = testing::server(|_| Ok(()));
        let request = HttpRequest::post("/admin/model").header("origin", "https://evil.example");
        let response = testing::send(&server, request.body(Body::from("{}")).unwrap()).await;
        assert_eq!(response.status(), StatusCode::NOT_FOUND);
    }
}
