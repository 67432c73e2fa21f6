//! The router from outside, with an engine that says what each test wants.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::http::Request as HttpRequest;
use serde_json::{Value, json};
use tokio::sync::mpsc::UnboundedSender;

use super::testing::*;
use super::{ApiSettings, Server};
use crate::batching::{Cause, Refusal};
use crate::engine::Refused;
use crate::request::{Event, Failure, FinishReason};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

fn hello(extra: Value) -> Value {
    let mut body = json!({"model": "smol", "messages": [{"role": "user", "content": "Hello"}]});
    for (key, value) in extra.as_object().unwrap() {
        body[key] = value.clone();
    }
    body
}

/// The JSON of each event but `[DONE]`, which must be the last.
async fn chunks(server: &Arc<Server>, path: &str, body: Value) -> Vec<Value> {
    let mut events = events(server, path, body).await;
    assert_eq!(events.pop().as_deref(), Some("[DONE]"));
    events
        .iter()
        .map(|event| serde_json::from_str(event).unwrap())
        .collect()
}

fn error(answer: &(u16, Value)) -> (u16, &str) {
    (answer.0, answer.1["error"]["code"].as_str().unwrap_or("-"))
}

#[tokio::test]
async fn a_whole_chat_answer_has_openais_shape_and_tells_what_batching_cost() {
    let (server, seen) = saying("Hi there!");
    let request = HttpRequest::post(CHAT)
        .header("x-request-id", "mine-1")
        .body(Body::from(hello(json!({})).to_string()));
    let response = send(&server, request.unwrap()).await;
    let header = |name: &str| response.headers()[name].to_str().unwrap().to_string();
    assert_eq!(header("x-request-id"), "mine-1");
    assert_eq!(header("content-type"), "application/json");
    let times = ["queue", "window", "prefill", "decode"].map(|name| header(&format!("x-sconce-{name}-ms")));
    assert_eq!(times, ["10.000", "20.000", "10.000", "6.000"]);
    let (status, mut body) = answer(response).await;
    let prompt = seen.lock().unwrap()[0].prompt.len();
    assert!(body["created"].take().as_u64().unwrap() > 1_700_000_000);
    assert_eq!(status, 200);
    assert_eq!(
        body,
        json!({
            "id": "chatcmpl-mine-1", "object": "chat.completion", "created": null, "model": "smol",
            "choices": [{
                "index": 0, "message": {"role": "assistant", "content": "Hi there!", "refusal": null},
                "logprobs": null, "finish_reason": "stop",
            }],
            "usage": {
                "prompt_tokens": prompt, "completion_tokens": 4, "total_tokens": prompt + 4,
                "prompt_tokens_details": {"cached_tokens": 16},
            },
        })
    );
}

#[tokio::test]
async fn a_streamed_chat_answer_comes_in_characters_and_ends_with_its_usage() {
    let (server, _) = saying("A 🦀!");
    let body = hello(json!({"stream": true, "stream_options": {"include_usage": true}}));
    let chunks = chunks(&server, CHAT, body).await;
    assert_eq!(
        chunks[0]["choices"][0]["delta"],
        json!({"role": "assistant", "content": ""})
    );
    assert_eq!(chunks[0]["object"], "chat.completion.chunk");
    assert!(chunks[0]["usage"].is_null() && chunks[0].as_object().unwrap().contains_key("usage"));
    let pieces: Vec<&str> = chunks
        .iter()
        .filter_map(|c| c["choices"][0]["delta"]["content"].as_str())
        .collect();
    assert_eq!(pieces.concat(), "A 🦀!");
    assert!(
        pieces[1..]
            .iter()
            .all(|piece| !piece.is_empty() && !piece.contains('\u{FFFD}'))
    );
    let [.., finish, usage] = chunks.as_slice() else {
        panic!()
    };
    assert_eq!(finish["choices"][0]["finish_reason"], "stop");
    assert_eq!(finish["choices"][0]["delta"], json!({}));
    assert_eq!(usage["choices"], json!([]));
    let tokens = tokenizer().encode("A 🦀!", false).unwrap().len() + 1;
    assert_eq!(usage["usage"]["completion_tokens"], tokens);
    assert_eq!(
        (&usage["sconce"]["queue_ms"], &usage["sconce"]["window_ms"]),
        (&json!(10.0), &json!(20.0))
    );
}

#[tokio::test]
async fn without_include_usage_no_chunk_speaks_of_it() {
    let (server, _) = saying("Hi");
    let chunks = chunks(&server, CHAT, hello(json!({"stream": true}))).await;
    assert!(
        chunks
            .iter()
            .all(|chunk| chunk.get("usage").is_none() && chunk.get("sconce").is_none())
    );
}

#[tokio::test]
async fn a_stop_string_ends_the_choice_exactly_whole_and_streamed() {
    let text = "One, two, three, four";
    let (server, _) = saying(text);
    let counted = tokenizer().encode("One, two, three", false).unwrap().len();
    let (_, whole) = post(&server, CHAT, hello(json!({"stop": [", three"]}))).await;
    assert_eq!(whole["choices"][0]["message"]["content"], "One, two");
    assert_eq!(whole["choices"][0]["finish_reason"], "stop");
    assert_eq!(whole["usage"]["completion_tokens"], counted);
    let body = hello(json!({"stop": ", three", "stream": true, "stream_options": {"include_usage": true}}));
    let chunks = chunks(&server, CHAT, body).await;
    let streamed: String = chunks
        .iter()
        .filter_map(|c| c["choices"][0]["delta"]["content"].as_str())
        .collect();
    assert_eq!(streamed, "One, two");
    assert_eq!(chunks.last().unwrap()["usage"]["completion_tokens"], counted);
}

#[tokio::test]
async fn max_tokens_ends_with_length_and_fills_the_context_when_absent() {
    let (server, seen) = saying("one two three four");
    let (_, body) = post(&server, CHAT, hello(json!({"max_tokens": 2}))).await;
    assert_eq!(body["choices"][0]["finish_reason"], "length");
    assert_eq!(body["choices"][0]["message"]["content"], "one two");
    post(&server, CHAT, hello(json!({}))).await;
    post(&server, COMPLETIONS, json!({"prompt": "x"})).await;
    post(
        &server,
        COMPLETIONS,
        json!({"prompt": [vec![5; 8190]], "max_tokens": 50}),
    )
    .await;
    let seen = seen.lock().unwrap();
    let asked: Vec<usize> = seen.iter().map(|request| request.max_tokens).collect();
    assert_eq!(asked, [2, 8192 - seen[1].prompt.len(), 16, 2]);
}

#[tokio::test]
async fn choices_have_their_own_seeds_and_share_the_prompt_count() {
    let (server, seen) = saying("Hi");
    let (_, body) = post(&server, CHAT, hello(json!({"n": 3, "seed": 40}))).await;
    let seen = seen.lock().unwrap();
    assert_eq!(
        seen.iter().map(|request| request.seed).collect::<Vec<_>>(),
        [40, 41, 42]
    );
    assert_eq!(body["usage"]["prompt_tokens"], seen[0].prompt.len());
    assert_eq!(
        (
            &body["usage"]["completion_tokens"],
            body["choices"].as_array().unwrap().len()
        ),
        (&json!(6), 3)
    );
    assert_eq!(body["choices"][2]["index"], 2);
    assert_eq!(body["usage"]["prompt_tokens_details"]["cached_tokens"], 16);
}

#[tokio::test]
async fn completions_take_several_prompts_and_echo() {
    let (server, _) = saying(" world");
    let body = json!({"prompt": ["Hello", [28, 198]], "n": 2, "seed": 1, "echo": true, "stop": "zzz"});
    let (status, body) = post(&server, COMPLETIONS, body).await;
    let texts: Vec<&str> = body["choices"]
        .as_array()
        .unwrap()
        .iter()
        .map(|c| c["text"].as_str().unwrap())
        .collect();
    assert_eq!((status, &body["object"]), (200, &json!("text_completion")));
    assert_eq!(texts, ["Hello world", "Hello world", ",\n world", ",\n world"]);
    let (status, _) = post(&server, COMPLETIONS, json!({"prompt": vec!["x"; 3], "n": 3})).await;
    assert_eq!(status, 400);
    let chunks = chunks(&server, COMPLETIONS, json!({"prompt": "Hello", "stream": true})).await;
    let streamed: String = chunks
        .iter()
        .map(|chunk| chunk["choices"][0]["text"].as_str().unwrap())
        .collect();
    assert_eq!(streamed, " world");
}

#[tokio::test]
async fn log_probabilities_come_for_every_token() {
    let (server, _) = saying("a🦀b");
    let (_, body) = post(&server, CHAT, hello(json!({"logprobs": true, "top_logprobs": 2}))).await;
    let tokens = body["choices"][0]["logprobs"]["content"].as_array().unwrap();
    assert_eq!(body["usage"]["completion_tokens"], tokens.len());
    let bytes: Vec<u8> = tokens[..tokens.len() - 1]
        .iter()
        .flat_map(|token| serde_json::from_value::<Vec<u8>>(token["bytes"].clone()).unwrap())
        .collect();
    assert_eq!(String::from_utf8(bytes).unwrap(), "a🦀b");
    assert_eq!(tokens[0]["top_logprobs"].as_array().unwrap().len(), 2);
    let (_, body) = post(&server, COMPLETIONS, json!({"prompt": "x", "logprobs": 1})).await;
    let offsets = &body["choices"][0]["logprobs"]["text_offset"];
    assert_eq!((&offsets[0], &offsets[1]), (&json!(0), &json!(1)));
}

#[tokio::test]
async fn bad_input_is_refused_before_the_engine_hears_of_it() {
    let (server, seen) = saying("Hi");
    let long = "word ".repeat(9000);
    for (body, status, code) in [
        (hello(json!({"model": "other"})), 404, "model_not_found"),
        (hello(json!({"messages": []})), 400, "-"),
        (hello(json!({"temperature": 9})), 400, "-"),
        (hello(json!({"tools": [{}]})), 400, "unsupported_value"),
        (hello(json!({"n": 9})), 400, "-"),
        (
            hello(json!({"messages": [{"role": "user", "content": long}]})),
            400,
            "context_length_exceeded",
        ),
    ] {
        assert_eq!(error(&post(&server, CHAT, body).await), (status, code));
    }
    let (status, body) = post(&server, CHAT, json!([1])).await;
    assert_eq!((status, &body["error"]["type"]), (400, &json!("invalid_request_error")));
    assert_eq!(post(&server, CHAT, json!({"x": "y".repeat(2 << 20)})).await.0, 413);
    assert!(seen.lock().unwrap().is_empty());
}

#[tokio::test]
async fn unknown_paths_and_methods_have_openais_error_shape() {
    let (server, _) = saying("Hi");
    assert_eq!(error(&get(&server, "/v2/chat").await), (404, "unknown_url"));
    assert_eq!(error(&get(&server, CHAT).await), (405, "method_not_allowed"));
    let response = send(
        &server,
        HttpRequest::get("/nowhere")
            .header("x-request-id", "a b")
            .body(Body::empty())
            .unwrap(),
    );
    assert_eq!(response.await.headers()["x-request-id"].len(), 32);
}

#[tokio::test]
async fn a_refusal_by_the_engine_has_its_status() {
    let refusal = Refusal {
        cause: Cause::Requests { limit: 3 },
        retry_after: Duration::from_secs(1),
    };
    let full = server(move |_| Err(Refused::Refused(refusal.clone())));
    let request = HttpRequest::post(CHAT)
        .body(Body::from(hello(json!({"stream": true})).to_string()))
        .unwrap();
    let response = send(&full, request).await;
    assert_eq!(
        (response.status().as_u16(), &response.headers()["retry-after"]),
        (429, &"1".parse().unwrap())
    );
    let lost = server(|_| Err(Refused::EngineLost));
    assert_eq!(error(&post(&lost, CHAT, hello(json!({}))).await), (503, "engine_lost"));
}

/// A server whose engine sends these events to every request, and then nothing more.
fn sending(events: Vec<Event>) -> Arc<Server> {
    server(move |requests| {
        for request in requests {
            for event in &events {
                let _ = request.events.send(event.clone());
            }
        }
        Ok(())
    })
}

#[tokio::test]
async fn a_failure_before_the_first_token_has_its_status_even_in_a_stream() {
    let server = sending(vec![Event::Failed(Failure::DeadlinePassed)]);
    for stream in [false, true] {
        let answer = post(&server, CHAT, hello(json!({"stream": stream}))).await;
        assert_eq!(error(&answer), (504, "deadline_passed"));
    }
    let silent = sending(vec![]);
    let answer = post(&silent, CHAT, hello(json!({}))).await;
    assert_eq!(error(&answer), (503, "engine_lost"));
}

#[tokio::test]
async fn a_failure_in_a_stream_is_its_last_event() {
    let hi = tokenizer().encode("Hi", false).unwrap()[0];
    let server = sending(vec![Event::Token(token(hi)), Event::Failed(Failure::NotANumber)]);
    let events = events(&server, CHAT, hello(json!({"stream": true}))).await;
    let last: Value = serde_json::from_str(events.last().unwrap()).unwrap();
    assert_eq!(last["error"]["type"], "server_error");
    assert!(!events.iter().any(|event| event == "[DONE]"));
}

type Channels = Arc<Mutex<Vec<UnboundedSender<Event>>>>;

/// A server whose engine hands its event channels to the test.
fn held() -> (Arc<Server>, Channels) {
    let channels = Arc::new(Mutex::new(Vec::new()));
    let log = channels.clone();
    let server = server(move |requests| {
        log.lock()
            .unwrap()
            .extend(requests.into_iter().map(|request| request.events));
        Ok(())
    });
    (server, channels)
}

#[tokio::test]
async fn a_stop_string_cancels_its_sequence_and_no_other() {
    let (server, channels) = held();
    let body = hello(json!({"n": 2, "stop": "Hi", "logprobs": false}));
    let request = tokio::spawn(async move { post(&server, CHAT, body).await });
    let channels = wait_for(|| Some(std::mem::take(&mut *channels.lock().unwrap())).filter(|c| !c.is_empty())).await;
    let hi = tokenizer().encode("Hi", false).unwrap()[0];
    channels[0].send(Event::Token(token(hi))).unwrap();
    channels[0].closed().await;
    assert!(!channels[1].is_closed());
    channels[1].send(Event::Token(token(2))).unwrap();
    channels[1].send(Event::Finished(FinishReason::Stop)).unwrap();
    let (status, body) = request.await.unwrap();
    assert_eq!((status, &body["usage"]["completion_tokens"]), (200, &json!(2)));
}

#[tokio::test]
async fn a_client_that_goes_away_cancels_all_its_sequences() {
    let (server, channels) = held();
    let request = tokio::spawn(async move { post(&server, CHAT, hello(json!({"n": 2, "stream": true}))).await });
    let channels = wait_for(|| Some(std::mem::take(&mut *channels.lock().unwrap())).filter(|c| !c.is_empty())).await;
    assert!(channels.iter().all(|channel| !channel.is_closed()));
    request.abort();
    for channel in &channels {
        channel.closed().await;
    }
}

#[tokio::test]
async fn a_client_that_leaves_in_the_middle_of_a_stream_cancels_its_sequence() {
    let (server, channels) = held();
    let request = HttpRequest::post(CHAT)
        .body(Body::from(hello(json!({"stream": true})).to_string()))
        .unwrap();
    let response = tokio::spawn(async move { send(&server, request).await });
    let channels = wait_for(|| Some(std::mem::take(&mut *channels.lock().unwrap())).filter(|c| !c.is_empty())).await;
    let hi = tokenizer().encode("Hi", false).unwrap()[0];
    channels[0].send(Event::Token(token(hi))).unwrap();
    let response = response.await.unwrap();
    assert!(!channels[0].is_closed());
    drop(response);
    channels[0].closed().await;
}

async fn wait_for<T>(mut ready: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = ready() {
            return value;
        }
        assert!(start.elapsed() < Duration::from_secs(30), "nothing happened");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test]
async fn the_server_is_alive_before_it_is_ready() {
    let loading = unloaded(ApiSettings {
        max_body_bytes: 1 << 20,
        max_choices: 8,
        request_timeout: None,
        pinning: true,
        read_timeout: Duration::from_secs(60),
    });
    assert_eq!(get(&loading, "/health").await.0, 200);
    assert_eq!(error(&get(&loading, "/ready").await), (503, "model_loading"));
    assert_eq!(
        error(&post(&loading, CHAT, hello(json!({}))).await),
        (503, "model_loading")
    );
    assert_eq!(error(&get(&loading, "/v1/models").await), (503, "model_loading"));
    let (server, _) = saying("Hi");
    assert_eq!(get(&server, "/ready").await, (200, json!({"status": "ready"})));
    server.stop_accepting();
    assert_eq!(error(&get(&server, "/ready").await), (503, "shutting_down"));
    assert_eq!(
        error(&post(&server, CHAT, hello(json!({}))).await),
        (503, "shutting_down")
    );
}

#[tokio::test]
async fn models_are_listed_and_found_by_any_of_their_names() {
    let (server, _) = saying("Hi");
    let (_, list) = get(&server, "/v1/models").await;
    assert_eq!(
        (&list["object"], &list["data"][1]["id"]),
        (&json!("list"), &json!("org/smol"))
    );
    assert_eq!(get(&server, "/v1/models/org/smol").await.1["max_model_len"], 8192);
    assert_eq!(error(&get(&server, "/v1/models/none").await), (404, "model_not_found"));
    let (status, body) = post(&server, CHAT, hello(json!({"model": "org/smol"}))).await;
    assert_eq!((status, &body["model"]), (200, &json!("org/smol")));
}

#[tokio::test]
async fn tokens_and_text_turn_into_each_other() {
    let (server, _) = saying("Hi");
    let (_, body) = post(&server, "/tokenize", json!({"model": "smol", "prompt": "Hello, world"})).await;
    let tokens = tokenizer().encode("Hello, world", false).unwrap();
    assert_eq!(
        body,
        json!({"count": tokens.len(), "max_model_len": 8192, "tokens": tokens})
    );
    let (_, body) = post(&server, "/detokenize", json!({"tokens": tokens})).await;
    assert_eq!(body, json!({"prompt": "Hello, world"}));
    let (_, body) = post(&server, "/tokenize", hello(json!({"add_generation_prompt": false}))).await;
    let (_, text) = post(&server, "/detokenize", json!({"tokens": body["tokens"]})).await;
    assert!(
        text["prompt"]
            .as_str()
            .unwrap()
            .ends_with("<|im_start|>user\nHello<|im_end|>\n")
    );
    assert_eq!(post(&server, "/detokenize", json!({"tokens": [49152]})).await.0, 400);
    assert_eq!(post(&server, "/detokenize", json!({})).await.0, 400);
    assert_eq!(post(&server, "/tokenize", json!({})).await.0, 400);
}

#[tokio::test]
async fn metrics_count_what_was_served() {
    let (server, seen) = saying("Hi there");
    post(&server, CHAT, hello(json!({}))).await;
    get(&server, "/nowhere").await;
    let response = send(&server, HttpRequest::get("/metrics").body(Body::empty()).unwrap()).await;
    let text = text(response).await;
    let prompt = format!("sconce_prompt_tokens_total {}", seen.lock().unwrap()[0].prompt.len());
    for line in [
        "sconce_http_requests_total{route=\"/v1/chat/completions\",status=\"200\"} 1",
        "sconce_http_requests_total{route=\"other\",status=\"404\"} 1",
        "sconce_completion_tokens_total 3",
        "sconce_time_to_first_token_seconds_count 1",
        "sconce_time_per_output_token_seconds_count 1",
        "sconce_request_seconds_count 1",
        &prompt,
    ] {
        assert!(text.contains(line), "{line} is missing in\n{text}");
    }
}

#[tokio::test]
async fn a_large_body_is_answered_as_a_small_one() {
    let (server, _) = saying("Hi");
    let body = hello(json!({"messages": [{"role": "user", "content": "word ".repeat(7500)}]}));
    assert_eq!(post(&server, CHAT, body).await.0, 200);
}

#[tokio::test]
async fn a_panic_is_one_requests_own() {
    let server = server(|_| panic!("a bug"));
    let (status, body) = post(&server, CHAT, hello(json!({}))).await;
    assert_eq!((status, &body["error"]["type"]), (500, &json!("server_error")));
    assert_eq!(get(&server, "/health").await.0, 200);
}
