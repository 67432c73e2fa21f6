//! Keys from outside: who is let in, what their limits cost them, and what a changed file changes.

use std::io::Write;
use std::sync::Arc;

use axum::body::Body;
use axum::http::{HeaderMap, Request as HttpRequest, Response};
use serde_json::{Value, json};

use super::super::testing::{answer, saying_with, send};
use super::super::{Server, testing};
use super::*;

const CHAT: &str = "/v1/chat/completions";

fn lines(name: &str, secret: &str, rest: &str) -> String {
    let digest: String = hash(secret).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("[[key]]\nname = \"{name}\"\nsha256 = \"{digest}\"\n{rest}\n")
}

struct Fixture {
    file: tempfile::NamedTempFile,
    keys: Keys,
    server: Arc<Server>,
}

/// A server that answers "Hi there!" to whoever has one of these keys.
fn fixture(text: &str) -> Fixture {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    let keys = Keys::open(file.path().into()).unwrap();
    let (server, _) = saying_with("Hi there!", Some(keys.clone()));
    Fixture { file, keys, server }
}

async fn ask(server: &Arc<Server>, secret: &str, method: &str, path: &str, body: Value) -> Response<Body> {
    let request = HttpRequest::builder()
        .method(method)
        .uri(path)
        .header("authorization", format!("Bearer {secret}"));
    send(server, request.body(Body::from(body.to_string())).unwrap()).await
}

async fn chat(server: &Arc<Server>, secret: &str, max_tokens: usize) -> Response<Body> {
    let body = json!({"messages": [{"role": "user", "content": "Hello"}], "max_tokens": max_tokens});
    ask(server, secret, "POST", CHAT, body).await
}

fn header(headers: &HeaderMap, name: &str) -> String {
    headers[name].to_str().unwrap().to_owned()
}

async fn refusal(response: Response<Body>) -> (u16, String) {
    let (status, body) = answer(response).await;
    assert!(
        body["error"]["message"].is_string() && body["error"]["type"].is_string(),
        "{body}"
    );
    (status, body["error"]["code"].as_str().unwrap().to_owned())
}

#[tokio::test]
async fn only_who_has_a_key_is_answered() {
    let Fixture { server, .. } = fixture(&lines("ann", "sk-ann", ""));
    assert_eq!(chat(&server, "sk-ann", 4).await.status(), 200);
    let unknown = chat(&server, "sk-bob", 4).await;
    assert_eq!(header(unknown.headers(), "www-authenticate"), "Bearer");
    assert_eq!(refusal(unknown).await, (401, "invalid_api_key".into()));
    for value in ["", "sk-ann", "Basic sk-ann", "Bearer", "Bearer "] {
        let request = HttpRequest::get("/v1/models")
            .header("authorization", value)
            .body(Body::empty());
        assert_eq!(send(&server, request.unwrap()).await.status(), 401, "{value:?}");
    }
    for path in ["/v1/models", "/metrics", "/nowhere", "/admin/batching"] {
        assert_eq!(testing::get(&server, path).await.0, 401, "{path}");
    }
    for path in ["/health", "/ready"] {
        assert_eq!(testing::get(&server, path).await.0, 200, "{path}");
    }
}

#[tokio::test]
async fn a_key_may_be_known_and_not_allowed() {
    let text = lines("old", "sk-old", "disabled = true")
        + &lines("ann", "sk-ann", "")
        + &lines("ops", "sk-ops", "admin = true");
    let Fixture { server, .. } = fixture(&text);
    assert_eq!(
        refusal(chat(&server, "sk-old", 4).await).await,
        (403, "key_disabled".into())
    );
    for path in ["/metrics", "/admin/batching", "/debug/trace"] {
        let response = ask(&server, "sk-ann", "GET", path, json!(null)).await;
        assert_eq!(refusal(response).await, (403, "not_admin".into()), "{path}");
    }
    let response = ask(&server, "sk-ops", "GET", "/metrics", json!(null)).await;
    assert_eq!(response.status(), 200);
    let metrics = testing::text(response).await;
    assert!(
        metrics.contains("sconce_refusals_total{cause=\"not_admin\"} 3"),
        "{metrics}"
    );
}

#[tokio::test]
async fn requests_are_counted_and_the_headers_say_what_is_left() {
    let Fixture { server, .. } = fixture(&lines("ann", "sk-ann", "requests-per-minute = 2"));
    let first = chat(&server, "sk-ann", 4).await;
    assert_eq!(header(first.headers(), "x-ratelimit-limit-requests"), "2");
    assert_eq!(header(first.headers(), "x-ratelimit-remaining-requests"), "1");
    assert!(!first.headers().contains_key("x-ratelimit-limit-tokens"));
    // What asks for no work costs nothing.
    assert_eq!(
        ask(&server, "sk-ann", "GET", "/v1/models", json!(null)).await.status(),
        200
    );
    assert_eq!(chat(&server, "sk-ann", 4).await.status(), 200);
    let refused = chat(&server, "sk-ann", 4).await;
    assert_eq!(header(refused.headers(), "x-ratelimit-remaining-requests"), "0");
    let seconds: u64 = header(refused.headers(), "retry-after").parse().unwrap();
    assert!((1..=30).contains(&seconds), "{seconds}");
    assert_eq!(refusal(refused).await, (429, "rate_limit_exceeded".into()));
}

#[tokio::test]
async fn tokens_are_reserved_and_what_was_not_used_comes_back() {
    let Fixture { server, .. } = fixture(&lines("ann", "sk-ann", "tokens-per-minute = 6000"));
    let response = chat(&server, "sk-ann", 5000).await;
    // The answer has been generated but not read: its tokens are settled already. The 5000 would take most of a minute
    // to be earned.
    let remaining: u64 = header(response.headers(), "x-ratelimit-remaining-tokens")
        .parse()
        .unwrap();
    let used = answer(response).await.1["usage"]["total_tokens"].as_u64().unwrap();
    assert!(remaining >= 6000 - used, "{remaining}, {used} used");
}

#[tokio::test]
async fn a_minute_of_tokens_is_no_more() {
    let Fixture { server, .. } = fixture(&lines("ann", "sk-ann", "tokens-per-minute = 60"));
    // Far more than a minute gives, so it needs a whole one, which is there.
    let first = chat(&server, "sk-ann", 5000).await;
    assert_eq!(first.status(), 200);
    let second = chat(&server, "sk-ann", 5000).await;
    assert!(second.headers().contains_key("retry-after"));
    let (status, body) = answer(second).await;
    assert_eq!((status, &body["error"]["type"]), (429, &json!("tokens")));
    let long = json!({"prompt": "word ".repeat(100), "max_tokens": 1});
    let never = ask(&server, "sk-ann", "POST", "/v1/completions", long).await;
    assert!(!never.headers().contains_key("retry-after"));
    assert_eq!(refusal(never).await, (429, "rate_limit_exceeded".into()));
}

#[tokio::test]
async fn a_place_is_free_again_when_its_answer_has_been_read() {
    let Fixture { server, .. } = fixture(&lines("ann", "sk-ann", "max-in-flight = 1"));
    let stream = json!({"messages": [{"role": "user", "content": "Hello"}], "stream": true});
    let first = ask(&server, "sk-ann", "POST", CHAT, stream.clone()).await;
    assert_eq!(refusal(chat(&server, "sk-ann", 4).await).await.0, 429);
    testing::text(first).await;
    assert_eq!(chat(&server, "sk-ann", 4).await.status(), 200);
    drop(ask(&server, "sk-ann", "POST", CHAT, stream).await);
    assert_eq!(chat(&server, "sk-ann", 4).await.status(), 200);
}

#[tokio::test]
async fn what_runs_counts_whatever_the_limit_becomes() {
    let Fixture { file, keys, server } = fixture(&lines("ann", "sk-ann", ""));
    let stream = json!({"messages": [{"role": "user", "content": "Hello"}], "stream": true});
    let mut running = vec![ask(&server, "sk-ann", "POST", CHAT, stream).await];
    for (limit, status) in [("max-in-flight = 1", 429), ("max-in-flight = 2", 200), ("", 200)] {
        std::fs::write(file.path(), lines("ann", "sk-ann", limit)).unwrap();
        keys.reload().unwrap();
        assert_eq!(chat(&server, "sk-ann", 4).await.status(), status, "{limit}");
    }
    running.clear();
    std::fs::write(file.path(), lines("ann", "sk-ann", "max-in-flight = 1")).unwrap();
    keys.reload().unwrap();
    assert_eq!(chat(&server, "sk-ann", 4).await.status(), 200);
}

#[tokio::test]
async fn a_changed_file_takes_effect_and_a_broken_one_none() {
    let Fixture { file, keys, server } = fixture(&lines("ann", "sk-ann", "requests-per-minute = 1"));
    assert_eq!(chat(&server, "sk-ann", 4).await.status(), 200);
    std::fs::write(file.path(), "[[key]]\nname = ").unwrap();
    assert!(matches!(keys.reload(), Err(KeysError::Syntax { .. })));
    assert_eq!(chat(&server, "sk-ann", 4).await.status(), 429);
    // What has been spent stays spent, under the new secret too.
    std::fs::write(
        file.path(),
        lines("ann", "sk-new", "requests-per-minute = 1") + &lines("bob", "sk-bob", ""),
    )
    .unwrap();
    keys.reload().unwrap();
    assert_eq!(chat(&server, "sk-ann", 4).await.status(), 401);
    assert_eq!(chat(&server, "sk-new", 4).await.status(), 429);
    assert_eq!(chat(&server, "sk-bob", 4).await.status(), 200);
    std::fs::write(file.path(), lines("ann", "sk-new", "requests-per-minute = 5")).unwrap();
    keys.reload().unwrap();
    assert_eq!(chat(&server, "sk-new", 4).await.status(), 200);
    assert_eq!(chat(&server, "sk-bob", 4).await.status(), 401);
}

#[tokio::test]
async fn the_file_is_followed() {
    let Fixture { file, keys, .. } = fixture("");
    let following = tokio::spawn(keys.clone().follow_file());
    std::fs::write(file.path(), lines("ann", "sk-ann", "")).unwrap();
    let found = async {
        while keys.find("sk-ann").is_none() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let limit = Duration::from_secs(60);
    tokio::time::timeout(limit, found)
        .await
        .expect("the file is read again");
    following.abort();
}

#[test]
fn durations_are_written_as_openai_does() {
    let written = |ms| super::written(Duration::from_millis(ms));
    assert_eq!(
        [0, 20, 1000, 1500, 60_000, 365_000].map(written),
        ["0ms", "20ms", "1s", "1.5s", "1m0s", "6m5s"]
    );
}
