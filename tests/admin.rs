//! What an operator changes while the server runs: batching settings, and the model.

mod common;

use std::{fs, time::Duration};

use common::{Server, chat, completion, text, tiny};
use serde_json::{Value, json};
use tempfile::NamedTempFile;

fn error(response: reqwest::blocking::Response) -> (u16, Value) {
    let status = response.status().as_u16();
    (status, response.json::<Value>().expect("JSON")["error"].take())
}

#[test]
fn batching_settings_change_under_a_running_engine() {
    let server = Server::start(&["--admin", "--max-batch", "4", "--device", "cpu"]);
    let shown: Value = server.get("/admin/batching").json().expect("JSON");
    assert_eq!((&shown["max_batch"], &shown["step_tokens"]), (&json!(4), &json!(512)));
    let changed = server.ask(
        "/admin/batching",
        &json!({"max_batch": 2, "batch_window_ms": 1.5, "schedule": "dynamic"}),
    );
    assert_eq!(
        changed,
        json!({"schedule": "dynamic", "window_policy": "adaptive", "batch_window_ms": 1.5, "max_batch": 2, "step_tokens": 512})
    );
    assert_eq!(server.metric("sconce_max_batch"), 2.0);
    // What cannot work together changes nothing.
    let (status, refused) = error(server.post("/admin/batching", &json!({"step_tokens": 1})));
    assert_eq!(status, 400);
    assert!(refused["message"].as_str().expect("a message").contains("max-batch"));
    let shown: Value = server.get("/admin/batching").json().expect("JSON");
    assert_eq!(shown, changed);
    // They outlast the engine that they were changed under.
    let folder = tiny::model();
    server.ask("/admin/model", &json!({"model": tiny::path(&folder)}));
    let shown: Value = server.get("/admin/batching").json().expect("JSON");
    assert_eq!(shown, changed);
}

#[test]
fn a_model_is_swapped_while_the_one_before_it_finishes_and_back_again() {
    let folder = tiny::model();
    // The small model's heads are too narrow for a GPU.
    let server = Server::start(&["--admin", "--device", "cpu"]);
    let question = chat("What is the capital of France?", 16);
    let expected = text(&server.ask("/v1/chat/completions", &question));
    let mut long = completion(&[300, 301, 302], 100);
    let alone = server.stream("/v1/completions", &long);

    fails_to_load(&server, "/nowhere/model.gguf");
    fails_to_load(
        &server,
        tempfile::tempdir().expect("a folder").path().to_str().expect("a path"),
    );
    assert_eq!(text(&server.ask("/v1/chat/completions", &question)), expected);

    long["stream"] = json!(true);
    let (finished, swapped) = std::thread::scope(|scope| {
        let decoded = server.metric("sconce_decode_tokens_total");
        let finishing = scope.spawn(|| server.stream("/v1/completions", &long));
        server.wait_until("it runs", Duration::from_secs(30), || {
            server.metric("sconce_decode_tokens_total") > decoded
        });
        let swapped = server.ask("/admin/model", &json!({"model": tiny::path(&folder)}));
        let small = server.ask("/v1/completions", &completion(&[5, 6, 7], 4));
        assert_eq!(small["model"], tiny::path(&folder));
        (finishing.join().expect("the stream ends with [DONE]"), swapped)
    });
    assert_eq!(swapped["model"], tiny::path(&folder));
    assert_eq!(pieces(&finished), pieces(&alone));
    let state = || server.get("/admin/model").json::<Value>().expect("JSON");
    server.wait_until("the model before is freed", Duration::from_secs(30), || {
        state()["retiring"] == 0
    });
    odd_model(&server);

    let back = server.ask("/admin/model", &json!({"model": "smollm2-135m-instruct"}));
    assert_eq!(back["model"], "smollm2-135m-instruct");
    assert_eq!(text(&server.ask("/v1/chat/completions", &question)), expected);
    assert_eq!(server.metric("sconce_model_changes_total{outcome=\"swapped\"}"), 2.0);
    assert_eq!(server.metric("sconce_model_changes_total{outcome=\"failed\"}"), 2.0);
}

#[test]
fn a_model_that_prepares_itself_holds_nothing_up_and_is_not_shown() {
    let settings = NamedTempFile::new().expect("a file");
    // Takes some hundred steps, and is more than the small model can hold.
    let pin = format!("[[pin]]\nprompt = '{}'\n", "word ".repeat(1500));
    fs::write(settings.path(), pin).expect("writes");
    let path = settings.path().to_str().expect("a path");
    let small_steps = ["--max-batch", "2", "--step-tokens", "4"];
    // The model's longest sequence fits, so that another model may have one of another length.
    let room = ["--kv-memory", "640MiB"];
    let server = Server::start(
        &[
            ["--admin", "--device", "cpu", "--config", path].as_slice(),
            &small_steps,
            &room,
        ]
        .concat(),
    );
    let state = || server.get("/admin/model").json::<Value>().expect("JSON");
    let prefilled = server.metric("sconce_prefill_tokens_total");
    let model = state()["model"].clone();
    let again = json!({"model": model});
    std::thread::scope(|scope| {
        let swapping = scope.spawn(|| server.ask("/admin/model", &again));
        server.wait_until("it computes the pinned prompt", Duration::from_secs(60), || {
            server.metric("sconce_prefill_tokens_total") > prefilled
        });
        assert_eq!(state()["loading"], model);
        assert_eq!(swapping.join().expect("it is swapped in")["loading"], Value::Null);
    });

    server.ask("/admin/batching", &json!({"max_batch": 3}));
    let folder = tiny::model();
    let (status, refused) = error(server.post("/admin/model", &json!({"model": tiny::path(&folder)})));
    assert_eq!(status, 400, "{refused}");
    // By then its engine ran.
    assert!(
        refused["message"].as_str().expect("a message").contains("[[pin]]"),
        "{refused}"
    );
    assert_eq!(server.metric("sconce_max_batch"), 3.0);
    let pinned = server.metric("sconce_kv_blocks{state=\"pinned\"}");
    assert!(pinned > 0.0, "the state shown is that of the model that serves");
}

fn pieces(events: &[Value]) -> Vec<&Value> {
    events.iter().map(|event| &event["choices"][0]["text"]).collect()
}

fn fails_to_load(server: &Server, model: &str) {
    let (status, error) = error(server.post("/admin/model", &json!({"model": model})));
    assert_eq!((status, &error["param"]), (400, &json!("model")), "{error}");
    assert!(error["message"].as_str().expect("a message").contains(model), "{error}");
    assert_eq!(server.get("/ready").status(), 200);
}

/// A tokenizer with more tokens than the model, and a template that refuses.
fn odd_model(server: &Server) {
    for prompt in [
        json!([tiny::VOCABULARY]),
        json!("d"),
        json!([1, 2, tiny::VOCABULARY + 1]),
    ] {
        let (status, error) = error(server.post("/v1/completions", &json!({"prompt": prompt, "max_tokens": 1})));
        assert_eq!((status, &error["param"]), (400, &json!("prompt")), "{error}");
        assert_eq!(error["type"], "invalid_request_error");
    }
    server.ask("/v1/completions", &json!({"prompt": "c", "max_tokens": 1}));
    let (status, error) = error(server.post("/v1/chat/completions", &chat("NO", 1)));
    assert_eq!((status, &error["param"]), (400, &json!("messages")));
    assert_eq!(error["type"], "invalid_request_error");
    let message = error["message"].as_str().expect("a message");
    assert!(message.contains("this model does not hear NO"), "{message}");
    server.ask("/v1/chat/completions", &chat("ABC", 1));
}
