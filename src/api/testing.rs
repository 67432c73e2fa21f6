//! What the tests of this folder share: the default model's text side, and engines that say what a test wants.

use std::path::Path;
use std::sync::{Arc, LazyLock, Mutex};
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::http::{Request as HttpRequest, Response};
use serde_json::Value;
use tower::ServiceExt;

use super::{ApiSettings, Keys, Model, Observer, Server, Submit, router};
use crate::engine::Refused;
use crate::request::{Event, FinishReason, Logprobs, Request, Token, TokenId};
use crate::text::{ChatTemplate, Tokenizer};

const VOCABULARY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/smollm2-vocabulary.gguf");
static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| Tokenizer::open(Path::new(VOCABULARY)).unwrap());

pub(super) fn tokenizer() -> Tokenizer {
    TOKENIZER.clone()
}

/// A generated token with log-probabilities.
pub(super) fn token(id: TokenId) -> Token {
    Token {
        id,
        at: Instant::now(),
        logprobs: Some(Logprobs {
            chosen: -0.25,
            top: vec![(id, -0.25), (5, -2.0)],
        }),
    }
}

/// The default model with an engine that takes nothing.
pub(super) fn model() -> Model {
    model_with(Box::new(|_| Err(Refused::EngineLost)))
}

fn model_with(submit: Submit) -> Model {
    let template = ChatTemplate::open(Path::new(VOCABULARY)).unwrap();
    Model {
        names: vec!["smol".into(), "org/smol".into()],
        max_model_len: 8192,
        vocab_size: 49_152,
        tokenizer: tokenizer(),
        template: template.map(Arc::new),
        submit,
        engine: None,
    }
}

/// A server whose model is not loaded.
pub(super) fn unloaded(settings: ApiSettings) -> Arc<Server> {
    Arc::new(fresh(settings))
}

fn fresh(settings: ApiSettings) -> Server {
    let registry = prometheus::Registry::new();
    let observer = Observer::register(&registry).unwrap();
    let text = move || {
        prometheus::TextEncoder::new()
            .encode_to_string(&registry.gather())
            .unwrap()
    };
    Server::new(settings, observer, text)
}

/// A server that waits only so long for a request's body.
pub(super) fn impatient(read_timeout: Duration) -> Arc<Server> {
    unloaded(ApiSettings {
        max_body_bytes: 1 << 20,
        max_choices: 8,
        request_timeout: None,
        pinning: true,
        read_timeout,
    })
}

/// A server in front of an engine that does as `submit` says.
pub(super) fn server(submit: impl Fn(Vec<Request>) -> Result<(), Refused> + Send + Sync + 'static) -> Arc<Server> {
    server_with(submit, None)
}

fn server_with(
    submit: impl Fn(Vec<Request>) -> Result<(), Refused> + Send + Sync + 'static,
    keys: Option<Keys>,
) -> Arc<Server> {
    let server = fresh(ApiSettings {
        max_body_bytes: 1 << 20,
        max_choices: 8,
        request_timeout: None,
        pinning: true,
        read_timeout: Duration::from_secs(60),
    });
    let server = Arc::new(server.with_keys(keys));
    server.serve_model(Arc::new(model_with(Box::new(submit))));
    server
}

/// A server whose engine answers every request with the same text and then its end token.
pub(super) fn saying(text: &str) -> (Arc<Server>, Arc<Mutex<Vec<Submitted>>>) {
    saying_with(text, None)
}

/// The same, to whoever has one of these keys.
pub(super) fn saying_with(text: &str, keys: Option<Keys>) -> (Arc<Server>, Arc<Mutex<Vec<Submitted>>>) {
    let tokens = tokenizer().encode(text, false).unwrap();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let log = seen.clone();
    let submit = move |requests: Vec<Request>| {
        for request in requests {
            log.lock().unwrap().push(Submitted::of(&request));
            say(request, &tokens);
        }
        Ok(())
    };
    let server = server_with(submit, keys);
    (server, seen)
}

/// What a test wants to know of a request the engine got.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Submitted {
    pub id: String,
    pub prompt: Vec<TokenId>,
    pub seed: u64,
    pub max_tokens: usize,
}

impl Submitted {
    fn of(request: &Request) -> Self {
        let sampling = &request.sampling;
        let (seed, max_tokens) = (sampling.seed, sampling.max_tokens);
        Self {
            id: request.id.clone(),
            prompt: request.prompt.clone(),
            seed,
            max_tokens,
        }
    }
}

fn say(request: Request, tokens: &[TokenId]) {
    let start = request.arrival;
    let at = |ms| start + Duration::from_millis(ms);
    let mut events = vec![
        Event::Admitted {
            at: at(30),
            window: Duration::from_millis(20),
            cached_tokens: 0,
        },
        Event::Prefilled { cached_tokens: 16 },
    ];
    let most = request.sampling.max_tokens;
    let ids = tokens.iter().copied().chain([2]).take(most);
    for (i, id) in ids.enumerate() {
        let logprobs = request.sampling.logprobs.and_then(|_| token(id).logprobs);
        events.push(Event::Token(Token {
            id,
            at: at(40 + 2 * i as u64),
            logprobs,
        }));
    }
    let reason = if most > tokens.len() {
        FinishReason::Stop
    } else {
        FinishReason::Length
    };
    events.push(Event::Finished(reason));
    for event in events {
        // A client that has gone hears no more.
        let _ = request.events.send(event);
    }
}

pub(super) async fn send(server: &Arc<Server>, request: HttpRequest<Body>) -> Response<Body> {
    router(server.clone()).oneshot(request).await.unwrap()
}

pub(super) async fn get(server: &Arc<Server>, path: &str) -> (u16, Value) {
    answer(send(server, HttpRequest::get(path).body(Body::empty()).unwrap()).await).await
}

pub(super) async fn post(server: &Arc<Server>, path: &str, body: Value) -> (u16, Value) {
    answer(
        send(
            server,
            HttpRequest::post(path).body(Body::from(body.to_string())).unwrap(),
        )
        .await,
    )
    .await
}

pub(super) async fn answer(response: Response<Body>) -> (u16, Value) {
    let status = response.status().as_u16();
    (status, serde_json::from_str(&text(response).await).unwrap())
}

pub(super) async fn text(response: Response<Body>) -> String {
    let bytes = axum::body::to_bytes(response.into_body(), usize::MAX).await.unwrap();
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// The data of each server-sent event.
pub(super) async fn events(server: &Arc<Server>, path: &str, body: Value) -> Vec<String> {
    let response = send(
        server,
        HttpRequest::post(path).body(Body::from(body.to_string())).unwrap(),
    )
    .await;
    assert_eq!(response.headers()["content-type"], "text/event-stream");
    text(response)
        .await
        .lines()
        .filter_map(|line| line.strip_prefix("data: "))
        .map(str::to_string)
        .collect()
}
