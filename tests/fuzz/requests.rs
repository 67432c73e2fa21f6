//! Bodies and headers of requests, through every route that reads them: each gets an answer of its own or a refusal in
//! OpenAI's shape, and never a 500, which is what a panic becomes.

use std::path::Path;
use std::sync::{Arc, LazyLock};
use std::thread;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::http::{HeaderValue, Request};
use candle_core::Device;
use proptest::prelude::*;
use sconce::api::{ApiSettings, Keys, Model, ModelCommand, ModelState, NotChanged, Observer, Server, hash_key, router};
use sconce::batching::{Buckets, CacheScope, Config, Limits, Schedule, WindowPolicy};
use sconce::engine::{self, Engine, Handle, Weights};
use sconce::request::{Event, FinishReason, Request as Sequence, Token};
use sconce::telemetry::EngineMetrics;
use sconce::text::ChatTemplate;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tower::ServiceExt;

use super::{TOKENIZER, VOCABULARY, config, json, mutated, mutations, within_memory};

/// All routes; no engine stands behind it.
static ROUTER: LazyLock<Router> = LazyLock::new(|| serving(None, 64 << 10));
/// The same for bodies of the size that a server takes unless it is told otherwise.
static ROOMY: LazyLock<Router> = LazyLock::new(|| serving(None, LARGEST));
/// The routes that ask an engine, with one whose model is small and random.
static WITH_ENGINE: LazyLock<Router> = LazyLock::new(|| serving(Some(engine()), 64 << 10));

fn serving(engine: Option<Handle>, max_body_bytes: usize) -> Router {
    let observer = Observer::register(&prometheus::Registry::new()).expect("metrics");
    let settings = ApiSettings {
        max_body_bytes,
        pinning: true,
        max_choices: 16,
        request_timeout: None,
        read_timeout: Duration::from_secs(60),
    };
    let server = Server::new(settings, observer, String::new);
    let server = Arc::new(server.with_keys(Some(keys())));
    server.serve_model(Arc::new(Model {
        names: vec!["smol".into()],
        max_model_len: LONGEST,
        vocab_size: TOKENIZER.vocab_size(),
        tokenizer: TOKENIZER.clone(),
        template: ChatTemplate::open(Path::new(VOCABULARY))
            .expect("the fixture")
            .map(Arc::new),
        engine,
        submit: Box::new(|requests| {
            requests.into_iter().for_each(answer);
            Ok(())
        }),
    }));
    let (commands, models) = mpsc::channel(1);
    server.allow_admin(commands);
    thread::spawn(|| load_models(models));
    router(server)
}

/// The key of [`HEADERS`].
fn keys() -> Keys {
    let digest: String = hash_key("sk-fuzz").iter().map(|byte| format!("{byte:02x}")).collect();
    let file = tempfile::NamedTempFile::new().expect("a file");
    let text = format!("[[key]]\nname = \"fuzz\"\nsha256 = \"{digest}\"\nadmin = true\n");
    std::fs::write(file.path(), text).expect("writes");
    Keys::open(file.path().into()).expect("good keys")
}

fn engine() -> Handle {
    let folder = tempfile::tempdir().expect("a folder");
    let shape = json!({
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 32, "vocab_size": TOKENIZER.vocab_size(),
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
        "max_position_embeddings": LONGEST,
    });
    let path = folder.path().join("config.json");
    std::fs::write(&path, shape.to_string()).expect("writes");
    let settings = engine::Settings {
        path,
        device: Device::Cpu,
        dtype: None,
        batching: Config {
            schedule: Schedule::Continuous,
            window_policy: WindowPolicy::None,
            window: Duration::ZERO,
            max_batch: 8,
            step_tokens: 512,
            buckets: Buckets::default(),
            max_model_len: usize::MAX,
        },
        max_model_len: Some(LONGEST),
        dummy: true,
        quantized: false,
        kv_memory: Some(1 << 20),
        gpu_memory: 0.9,
        cuda_graphs: false,
        overlap: false,
        block_size: 4,
        prefix_cache: true,
        cache_file: None,
        cache_scope: CacheScope::Tenant,
        pin_share: 0.5,
        step_timeout: Duration::from_secs(60),
    };
    let metrics = Arc::new(EngineMetrics::new(&prometheus::Registry::new()).expect("metrics"));
    let weights = Weights::load(&settings).expect("random weights");
    let limits = Limits {
        requests: 100,
        tokens: None,
        in_flight: None,
        key_share: 1.0,
    };
    let engine = Engine::new(&weights, metrics).expect("an engine");
    engine.start(limits).expect("a thread").0
}

/// Knows one model.
fn load_models(mut commands: mpsc::Receiver<ModelCommand>) {
    let state = ModelState {
        model: Some("smol".into()),
        loading: None,
        retiring: 0,
    };
    while let Some(command) = commands.blocking_recv() {
        // Nobody need listen.
        match command {
            ModelCommand::Show(reply) => drop(reply.send(state.clone())),
            ModelCommand::Change { model, reply } => drop(reply.send(match model.as_str() {
                "smol" => Ok(state.clone()),
                _ => Err(NotChanged::Failed(format!("no model at {model}"))),
            })),
        }
    }
}

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

/// Bytes of the largest body.
const LARGEST: usize = 4 << 20;
/// Tokens of the longest sequence.
const LONGEST: usize = 512;

/// The route that needs an engine.
const PINS: &str = "/v1/cache/prompts";
const ROUTES: [&str; 7] = [
    "/v1/chat/completions",
    "/v1/completions",
    "/tokenize",
    "/detokenize",
    PINS,
    "/admin/batching",
    "/admin/model",
];

/// As a client of good will writes them.
const HEADERS: [(&str, &str); 6] = [
    ("authorization", "Bearer sk-fuzz"),
    ("x-request-timeout-ms", "60000"),
    ("x-request-id", "fuzz-1"),
    ("content-type", "application/json"),
    ("accept", "text/event-stream"),
    ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
];

const FIELDS: [&str; 49] = [
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
    "timeout_ms",
    "cache_salt",
    "ttl_seconds",
    "shared",
    "schedule",
    "window_policy",
    "batch_window_ms",
    "max_batch",
    "step_tokens",
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
        "model" | "cache_salt" => prop_oneof![Just(json!("smol")), text().prop_map(Value::from)].boxed(),
        "schedule" | "window_policy" => {
            let names = vec!["sequential", "dynamic", "continuous", "none", "adaptive", "fixed"];
            prop::sample::select(names).prop_map(Value::from).boxed()
        }
        "max_batch" | "step_tokens" => (0..10_000u32).prop_map(Value::from).boxed(),
        "timeout_ms" | "ttl_seconds" | "batch_window_ms" => prop_oneof![
            (0..100_000u32).prop_map(Value::from),
            any::<f64>().prop_map(|number| json!(number)),
        ]
        .boxed(),
        "stop" => prop::collection::vec(text(), 0..20).prop_map(Value::from).boxed(),
        "logit_bias" => prop::collection::vec((0..60_000u32, -200.0..200.0f64), 0..8)
            .prop_map(|biases| {
                biases
                    .into_iter()
                    .map(|(id, bias)| (id.to_string(), json!(bias)))
                    .collect()
            })
            .boxed(),
        "stream" | "echo" | "ignore_eos" | "add_special_tokens" | "shared" => {
            any::<bool>().prop_map(Value::from).boxed()
        }
        "stream_options" => any::<bool>().prop_map(|usage| json!({"include_usage": usage})).boxed(),
        _ => prop_oneof![(-3..200i64).prop_map(Value::from), (-3.0..3.0f64).prop_map(Value::from)].boxed(),
    };
    prop_oneof![4 => meant, 1 => json()].boxed()
}

/// A body with some of the fields; `messages` or `prompt` are mostly among them.
fn body() -> impl Strategy<Value = Value> {
    prop_oneof![
        5 => fields(vec!["messages", "prompt", "tokens"], FIELDS.to_vec()),
        // Those of the routes that take nothing else.
        1 => fields(vec!["model"], vec!["model"]),
        1 => fields(
            vec!["max_batch", "step_tokens"],
            vec!["schedule", "window_policy", "batch_window_ms", "max_batch", "step_tokens"],
        ),
        1 => fields(
            vec!["prompt", "messages"],
            vec!["cache_salt", "ttl_seconds", "shared", "add_generation_prompt"],
        ),
    ]
}

/// One of the first names and some of the others.
fn fields(first: Vec<&'static str>, names: Vec<&'static str>) -> impl Strategy<Value = Value> {
    let first = prop::sample::select(first);
    let most = names.len().min(7);
    (first, prop::sample::subsequence(names, 0..=most)).prop_flat_map(|(first, mut names)| {
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

/// Headers by name: mostly those of good will, some spoilt.
fn headers() -> impl Strategy<Value = Vec<(&'static str, Vec<u8>)>> {
    let spoilt = |value: &'static str| {
        prop_oneof![
            12 => Just(value.as_bytes().to_vec()),
            1 => prop::collection::vec(any::<u8>(), 0..40),
            1 => any::<i64>().prop_map(|number| number.to_string().into_bytes()),
            1 => mutations().prop_map(move |changes| mutated(value.as_bytes(), value.len(), &changes)),
        ]
    };
    let header = move |(name, value): (&'static str, &'static str)| (Just(name), spoilt(value));
    let needed: Vec<_> = HEADERS[..1].iter().copied().map(header).collect();
    let others = prop::sample::subsequence(HEADERS[1..].to_vec(), 0..HEADERS.len() - 1)
        .prop_flat_map(move |chosen| chosen.into_iter().map(header).collect::<Vec<_>>());
    (needed, others).prop_map(|(needed, others)| [needed, others].concat())
}

fn ask(router: &Router, route: &str, headers: Vec<(&'static str, Vec<u8>)>, body: Vec<u8>) -> (u16, Vec<u8>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let mut request = Request::post(route).body(Body::from(body)).expect("a request");
        for (name, value) in headers {
            // HTTP knows bytes that no header has.
            if let Ok(value) = HeaderValue::from_bytes(&value) {
                request.headers_mut().insert(name, value);
            }
        }
        let response = router.clone().oneshot(request).await.expect("an answer");
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
    fn every_request_is_answered_or_refused(
        route in prop::sample::select(ROUTES.to_vec()), headers in headers(), body in bytes()
    ) {
        let routers = [LazyLock::force(&ROUTER), LazyLock::force(&WITH_ENGINE)];
        let router = routers[usize::from(route == PINS)];
        let (status, answer) = within_memory(|| ask(router, route, headers, body));
        let expected = match route {
            // What is pinned may be too much already.
            PINS => matches!(status, 200 | 400 | 401 | 404 | 409 | 413),
            // Nothing is behind it that could change.
            "/admin/batching" => matches!(status, 400 | 401 | 413 | 503),
            _ => matches!(status, 200 | 400 | 401 | 404 | 413),
        };
        prop_assert!(expected, "{route} {status} {}", String::from_utf8_lossy(&answer));
        if status != 200 {
            let error: Value = serde_json::from_slice(&answer).expect("an error is JSON");
            prop_assert!(error["error"]["message"].is_string() && error["error"]["type"].is_string(), "{}", error);
        }
    }
}

/// The beginnings of bodies, what is repeated in them as often as there is room, and their ends.
const REPEATED: [(&str, &str, &str); 23] = [
    ("{\"messages\": [", "{},", "{}]}"),
    ("{\"messages\": [", "[],", "{}]}"),
    ("{\"messages\": [{\"role\": \"user\", \"content\": [", "{},", "{}]}]}"),
    (
        "{\"messages\": [{\"role\": \"user\", \"content\": [",
        "{\"type\":\"\"},",
        "{}]}]}",
    ),
    ("{\"messages\": [{\"role\": \"user\", \"content\": \"", "x", "\"}]}"),
    (
        "{\"messages\": [{\"role\": \"user\", \"content\": \"x\", \"tool_calls\": [",
        "[],",
        "[]]}]}",
    ),
    ("{\"messages\": [", "{\"role\":\"user\",\"content\":\"x\"},", "{}]}"),
    ("{\"prompt\": [", "1,", "1]}"),
    ("{\"echo\": true, \"prompt\": [", "1,", "1]}"),
    ("{\"prompt\": [", "\"\",", "\"\"]}"),
    ("{\"prompt\": [", "[1],", "[1]]}"),
    ("{\"prompt\": [[", "1,", "1]]}"),
    ("{\"prompt\": \"", "x ", "\"}"),
    ("{\"tokens\": [", "1,", "1]}"),
    ("{\"prompt\": \"x\", \"stop\": [", "\"\",", "\"\"]}"),
    ("{\"prompt\": \"x\", \"stop_token_ids\": [", "1,", "1]}"),
    ("{\"prompt\": \"x\", \"logit_bias\": {", "\"1\":0,", "\"1\":0}}"),
    ("{\"prompt\": \"x\", \"logprobs\": [", "[],", "[]]}"),
    ("{\"prompt\": \"x\", \"tools\": [", "{},", "{}]}"),
    ("{\"prompt\": \"x\", \"response_format\": {", "\"a\":[],", "\"a\":[]}}"),
    ("{\"prompt\": \"x\", \"unknown\": [", "[],", "[]]}"),
    ("{\"model\": \"", "x", "\"}"),
    ("", "[", ""),
];

/// As few cases as are quick: each is megabytes.
fn few() -> ProptestConfig {
    let config = config();
    let cases = (config.cases / 50).max(24);
    ProptestConfig { cases, ..config }
}

proptest! {
    #![proptest_config(few())]

    #[test]
    fn the_largest_bodies_take_little_more_memory_than_they_have_bytes(
        route in prop::sample::select(ROUTES.to_vec()), repeated in prop::sample::select(REPEATED.to_vec()),
        size in LARGEST - 1000..LARGEST
    ) {
        let router = LazyLock::force(&ROOMY);
        let (begin, piece, end) = repeated;
        let times = (size - begin.len() - end.len()) / piece.len();
        let body = [begin, &piece.repeat(times), end].concat().into_bytes();
        let headers = vec![(HEADERS[0].0, HEADERS[0].1.as_bytes().to_vec())];
        let (status, answer) = within_memory(|| ask(router, route, headers, body));
        prop_assert!(matches!(status, 200 | 400 | 404 | 503), "{route} {begin} {status} {}", String::from_utf8_lossy(&answer));
    }
}
