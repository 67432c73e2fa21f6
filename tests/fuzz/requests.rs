//! Bodies of requests, through every route that reads one: each gets an answer of its own or a refusal in OpenAI's
//! shape, and never a 500, which is what a panic becomes.

use std::path::Path;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::http::Request;
use proptest::prelude::*;
use sconce::api::{ApiSettings, Model, Observer, Server, router};
use sconce::request::{Event, FinishReason, Request as Sequence, Token};
use sconce::text::ChatTemplate;
use serde_json::{Value, json};
use tower::ServiceExt;

use super::{TOKENIZER, VOCABULARY, config, json, mutated, mutations, within_memory};

static ROUTER: LazyLock<Router> = LazyLock::new(|| {
    let observer = Observer::register(&prometheus::Registry::new()).expect("metrics");
    let settings = ApiSettings {
        max_body_bytes: 64 << 10,
        pinning: true,
        max_choices: 16,
        request_timeout: None,
        read_timeout: Duration::from_secs(60),
    };
    let server = Arc::new(Server::new(settings, observer, String::new));
    server.serve_model(Arc::new(Model {
        names: vec!["smol".into()],
        max_model_len: 512,
        vocab_size: TOKENIZER.vocab_size(),
        tokenizer: TOKENIZER.clone(),
        template: ChatTemplate::open(Path::new(VOCABULARY))
            .expect("the fixture")
            .map(Arc::new),
        engine: None,
        submit: Box::new(|requests| {
            requests.into_iter().for_each(answer);
            Ok(())
        }),
    }));
    router(server)
});

/// One token, and the end.
fn answer(request: Sequence) {
    let token = Token {
        id: 28,
        at: Instant::now(),
        logprobs: None,
    };
    for event in [Event::Token(token), Event::Finished(FinishReason::Length)] {
        // Nobody need listen.
        let _ = request.events.send(event);
    }
}

const ROUTES: [&str; 4] = ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"];

const FIELDS: [&str; 40] = [
    "model",
    "messages",
    "prompt",
    "stream",
    "stream_options",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "seed",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "n",
    "logprobs",
    "top_logprobs",
    "echo",
    "suffix",
    "best_of",
    "tools",
    "tool_choice",
    "response_format",
    "add_special_tokens",
    "add_generation_prompt",
    "tokens",
    "min_tokens",
    "role",
    "content",
    "name",
    "user",
    "priority",
    "metadata",
    "guided_regex",
    "modalities",
];

fn message() -> impl Strategy<Value = Value> {
    let role = prop_oneof![
        prop::sample::select(vec!["system", "developer", "user", "assistant", "tool"]).prop_map(Value::from),
        json(),
    ];
    let part = prop_oneof![
        "\\PC{0,20}".prop_map(|text| json!({"type": "text", "text": text})),
        json()
    ];
    let content = prop_oneof![
        text().prop_map(Value::from),
        prop::collection::vec(part, 0..4).prop_map(Value::from),
        json(),
    ];
    (role, content, json()).prop_map(|(role, content, name)| json!({"role": role, "content": content, "name": name}))
}

fn text() -> impl Strategy<Value = String> {
    prop_oneof![
        "\\PC{0,40}",
        "(<\\|im_start\\|>|<\\|im_end\\|>|<\\||system|\\n|\u{FDD0}| |x){0,12}"
    ]
}

/// What a client of good will could send, and what one of none could.
fn value(field: &str) -> BoxedStrategy<Value> {
    let meant: BoxedStrategy<Value> = match field {
        "messages" => prop::collection::vec(message(), 0..6).prop_map(Value::from).boxed(),
        "prompt" | "suffix" | "content" => prop_oneof![
            text().prop_map(Value::from),
            prop::collection::vec(0..60_000u32, 0..12).prop_map(Value::from),
            prop::collection::vec(text(), 0..4).prop_map(Value::from),
        ]
        .boxed(),
        "tokens" | "stop_token_ids" => prop::collection::vec(0..60_000u32, 0..20).prop_map(Value::from).boxed(),
        "model" => Just(json!("smol")).boxed(),
        "stop" => prop::collection::vec(text(), 0..20).prop_map(Value::from).boxed(),
        "logit_bias" => prop::collection::vec((0..60_000u32, -200.0..200.0f64), 0..8)
            .prop_map(|biases| {
                biases
                    .into_iter()
                    .map(|(id, bias)| (id.to_string(), json!(bias)))
                    .collect()
            })
            .boxed(),
        "stream" | "echo" | "ignore_eos" | "add_special_tokens" => any::<bool>().prop_map(Value::from).boxed(),
        "stream_options" => any::<bool>().prop_map(|usage| json!({"include_usage": usage})).boxed(),
        _ => prop_oneof![(-3..200i64).prop_map(Value::from), (-3.0..3.0f64).prop_map(Value::from)].boxed(),
    };
    prop_oneof![4 => meant, 1 => json()].boxed()
}

/// A body with some of the fields; `messages` or `prompt` are mostly among them.
fn body() -> impl Strategy<Value = Value> {
    let first = prop::sample::select(vec!["messages", "prompt", "tokens"]);
    (first, prop::sample::subsequence(FIELDS.to_vec(), 0..8)).prop_flat_map(|(first, mut names)| {
        names.retain(|name| *name != first);
        names.push(first);
        let fields: Vec<_> = names
            .into_iter()
            .map(|name| (Just(name.to_owned()), value(name)))
            .collect();
        fields.prop_map(|fields| fields.into_iter().collect())
    })
}

fn bytes() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        6 => body().prop_map(|body| body.to_string().into_bytes()),
        3 => (body(), mutations()).prop_map(|(body, changes)| {
            let body = body.to_string();
            mutated(body.as_bytes(), body.len(), &changes)
        }),
        1 => prop::collection::vec(any::<u8>(), 0..60),
        1 => (1..2000usize, prop::sample::select(vec!["[", "{\"prompt\":", "{\"messages\":[{\"content\":["]))
            .prop_map(|(depth, piece)| piece.repeat(depth).into_bytes()),
    ]
}

fn ask(route: &str, body: Vec<u8>) -> (u16, Vec<u8>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let request = Request::post(route).body(Body::from(body)).expect("a request");
        let response = ROUTER.clone().oneshot(request).await.expect("an answer");
        let status = response.status().as_u16();
        let bytes = to_bytes(response.into_body(), usize::MAX)
            .await
            .expect("the whole answer");
        (status, bytes.to_vec())
    })
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn every_body_is_answered_or_refused(route in prop::sample::select(ROUTES.to_vec()), body in bytes()) {
        LazyLock::force(&ROUTER);
        let (status, answer) = within_memory(|| ask(route, body));
        prop_assert!(matches!(status, 200 | 400 | 404 | 413), "{status} {}", String::from_utf8_lossy(&answer));
        if status != 200 {
            let error: Value = serde_json::from_slice(&answer).expect("an error is JSON");
            prop_assert!(error["error"]["message"].is_string() && error["error"]["type"].is_string(), "{}", error);
        }
    }
}
