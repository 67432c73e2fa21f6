//! OpenAI's API over a real socket: whole and streamed answers, every field that changes them, clear errors.

mod common;

use std::{
    io::{Read, Write},
    net::TcpStream,
    time::Duration,
};

use common::{Server, all_at_once, chat, completion, text};
use serde_json::{Value, json};

/// What is waited for comes long before.
const LIMIT: Duration = Duration::from_secs(60);

#[test]
fn answers_whole_and_streamed_alike() {
    let server = Server::start(&["--served-model-name", "smol"]);
    let mut body = chat("What is the capital of France?", 32);
    let whole = server.ask("/v1/chat/completions", &body);
    assert!(text(&whole).contains("Paris"), "{whole}");
    assert_eq!(whole["object"], "chat.completion");
    assert_eq!(whole["model"], "smol");
    assert_eq!(whole["choices"][0]["finish_reason"], "stop");
    assert_eq!(whole["choices"][0]["message"]["role"], "assistant");

    body["stream_options"] = json!({"include_usage": true});
    let events = server.stream("/v1/chat/completions", &body);
    assert_eq!(events[0]["object"], "chat.completion.chunk");
    assert_eq!(events[0]["choices"][0]["delta"]["role"], "assistant");
    let streamed: String = events
        .iter()
        .filter_map(|event| event["choices"][0]["delta"]["content"].as_str())
        .collect();
    assert_eq!(streamed, text(&whole));
    let last = events.last().expect("events");
    assert_eq!(last["choices"], json!([]));
    for field in ["prompt_tokens", "completion_tokens", "total_tokens"] {
        assert_eq!(last["usage"][field], whole["usage"][field], "{field}");
    }
    let cost = &last["sconce"];
    assert!(
        ["queue_ms", "window_ms", "prefill_ms", "decode_ms"]
            .iter()
            .all(|part| cost[part].is_number()),
        "{last}"
    );
    completions(&server);
    choices(&server);
    logprobs(&server);
    stops(&server);
    seeds_and_penalties(&server);
    costs_and_lists(&server);
    tokens(&server);
}

fn completions(server: &Server) {
    let whole = server.ask(
        "/v1/completions",
        &json!({"prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}),
    );
    assert_eq!(whole["object"], "text_completion");
    assert_eq!(whole["choices"][0]["finish_reason"], "length");
    assert_eq!(whole["usage"]["completion_tokens"], 8);
    let body = json!({"prompt": ["Once upon a time", "The sea"], "max_tokens": 8, "temperature": 0});
    let both = server.ask("/v1/completions", &body);
    assert_eq!(both["choices"][0]["text"], whole["choices"][0]["text"]);
    assert_eq!(both["choices"][1]["index"], 1);
    assert_eq!(both["usage"]["completion_tokens"], 16);
    let events = server.stream("/v1/completions", &body);
    for index in [0, 1] {
        let parts = events.iter().filter_map(|event| event["choices"].as_array()?.first());
        let parts = parts.filter(|choice| choice["index"] == index);
        let streamed: String = parts.filter_map(|choice| choice["text"].as_str()).collect();
        assert_eq!(streamed, both["choices"][index]["text"].as_str().expect("text"));
    }
}

fn choices(server: &Server) {
    let mut body = chat("Name an animal.", 12);
    body["n"] = json!(3);
    body["temperature"] = json!(1.0);
    body["seed"] = json!(5);
    let several = server.ask("/v1/chat/completions", &body);
    assert_eq!(several["choices"].as_array().map(Vec::len), Some(3));
    let contents: Vec<_> = (0..3)
        .map(|index| &several["choices"][index]["message"]["content"])
        .collect();
    assert!(
        contents[0] != contents[1] || contents[1] != contents[2],
        "each choice has its own seed: {several}"
    );
}

fn logprobs(server: &Server) {
    let mut body = chat("What is the capital of France?", 4);
    body["logprobs"] = json!(true);
    body["top_logprobs"] = json!(3);
    let answer = server.ask("/v1/chat/completions", &body);
    let content = answer["choices"][0]["logprobs"]["content"]
        .as_array()
        .expect("logprobs")
        .clone();
    assert_eq!(content.len(), 4);
    for token in &content {
        let top = token["top_logprobs"].as_array().expect("top");
        assert_eq!(top.len(), 3);
        assert_eq!(top[0]["token"], token["token"], "greedy takes the likeliest");
        assert!(token["logprob"].as_f64().expect("a number") <= 0.0);
    }
    let joined: String = content.iter().filter_map(|token| token["token"].as_str()).collect();
    assert_eq!(joined, text(&answer));
}

fn stops(server: &Server) {
    let body = chat("What is the capital of France?", 32);
    let full = text(&server.ask("/v1/chat/completions", &body));
    let mut stopped = body.clone();
    stopped["stop"] = json!(["is Par", "never"]);
    let answer = server.ask("/v1/chat/completions", &stopped);
    let before = full.split("is Par").next().expect("a part");
    assert_eq!(text(&answer), before);
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    let events = server.stream("/v1/chat/completions", &stopped);
    let streamed: String = events
        .iter()
        .filter_map(|event| event["choices"][0]["delta"]["content"].as_str())
        .collect();
    assert_eq!(streamed, before);
    server.wait_until("nothing runs", LIMIT, || server.metric("sconce_running") == 0.0);
    assert_eq!(server.metric("sconce_sequences_total{outcome=\"cancelled\"}"), 0.0);
}

fn seeds_and_penalties(server: &Server) {
    let mut body = chat("Write a short poem about the sea.", 24);
    body["temperature"] = json!(1.0);
    body["seed"] = json!(42);
    let first = text(&server.ask("/v1/chat/completions", &body));
    assert_eq!(text(&server.ask("/v1/chat/completions", &body)), first);
    body["seed"] = json!(43);
    assert_ne!(text(&server.ask("/v1/chat/completions", &body)), first);
    let mut biased = chat("Hello", 3);
    biased["logit_bias"] = json!({"4649": 100});
    let answer = server.ask("/v1/chat/completions", &biased);
    let wanted = server.ask("/detokenize", &json!({"tokens": [4649, 4649, 4649]}));
    assert_eq!(text(&answer), wanted["prompt"].as_str().expect("text"));
}

fn costs_and_lists(server: &Server) {
    let response = server.post("/v1/chat/completions", &chat("Hi", 2));
    for header in [
        "x-sconce-queue-ms",
        "x-sconce-window-ms",
        "x-sconce-prefill-ms",
        "x-sconce-decode-ms",
    ] {
        let value = response.headers()[header].to_str().expect("text").parse::<f64>();
        assert!(value.is_ok_and(|ms| ms >= 0.0), "{header}");
    }
    assert!(response.headers().contains_key("x-request-id"));
    let models: Value = server.get("/v1/models").json().expect("JSON");
    assert_eq!(models["data"][0]["id"], "smol");
    assert_eq!(server.get("/health").status(), 200);
    assert!(server.metric("sconce_decode_tokens_total") > 0.0);
    assert!(server.metric("sconce_busy_seconds_total") > 0.0);
}

fn tokens(server: &Server) {
    let text = "naïve café, 東京 🙂";
    let tokens = server.ask("/tokenize", &json!({"prompt": text}));
    assert_eq!(tokens["count"], tokens["tokens"].as_array().map_or(0, Vec::len));
    let back = server.ask("/detokenize", &json!({"tokens": tokens["tokens"]}));
    assert_eq!(back["prompt"], text);
}

/// Status, error type and a part of the message for a bad request.
fn refused(server: &Server, path: &str, body: &Value, status: u16, part: &str) {
    let response = server.post(path, body);
    let got = response.status();
    let error: Value = response.json().expect("a JSON error");
    assert_eq!(got, status, "{body} -> {error}");
    let message = error["error"]["message"].as_str().expect("a message");
    assert!(message.to_lowercase().contains(part), "{body} -> {message}");
    assert!(error["error"]["type"].is_string(), "{error}");
}

#[test]
fn bad_input_gets_a_clear_error_and_costs_nobody_else_anything() {
    let server = Server::start(&["--max-model-len", "512", "--max-body", "64KiB"]);
    let chats = "/v1/chat/completions";
    let message = |role: &str, content: Value| json!({"messages": [{"role": role, "content": content}]});
    let with = |field: &str, value: Value| {
        let mut body = chat("Hi", 4);
        body[field] = value;
        body
    };
    let good = {
        let server = &server;
        move || text(&server.ask(chats, &chat("What is the capital of France?", 16)))
    };
    let expected = good();
    let bad = || {
        refused(&server, chats, &json!({"messages": []}), 400, "messages");
        refused(&server, chats, &json!({}), 400, "messages");
        refused(&server, chats, &message("king", json!("Hi")), 400, "role");
        refused(
            &server,
            chats,
            &message("user", json!([{"type": "image_url", "image_url": {"url": "x"}}])),
            400,
            "image_url",
        );
        refused(&server, chats, &with("model", json!("gpt-9")), 404, "gpt-9");
        refused(&server, chats, &with("temperature", json!(-1)), 400, "temperature");
        refused(&server, chats, &with("temperature", json!("hot")), 400, "temperature");
        refused(&server, chats, &with("top_p", json!(0)), 400, "top_p");
        refused(&server, chats, &with("n", json!(0)), 400, "n");
        refused(&server, chats, &with("max_tokens", json!(0)), 400, "max_tokens");
        refused(
            &server,
            chats,
            &with("presence_penalty", json!(9)),
            400,
            "presence_penalty",
        );
        refused(&server, chats, &with("logit_bias", json!({"x": 1})), 400, "logit_bias");
        let biases: serde_json::Map<_, _> = (0..1025).map(|id| (id.to_string(), json!(1))).collect();
        refused(
            &server,
            chats,
            &with("logit_bias", json!(biases)),
            400,
            "the most is 1024",
        );
        let stops: Vec<u32> = (0..129).collect();
        refused(
            &server,
            chats,
            &with("stop_token_ids", json!(stops)),
            400,
            "the most is 128",
        );
        refused(&server, chats, &with("top_logprobs", json!(3)), 400, "logprobs");
        refused(&server, chats, &chat(&"word ".repeat(600), 4), 400, "512");
        refused(
            &server,
            "/v1/completions",
            &json!({"prompt": [99_999_999], "max_tokens": 1}),
            400,
            "99999999",
        );
        refused(
            &server,
            "/v1/completions",
            &json!({"prompt": "", "max_tokens": 1}),
            400,
            "prompt",
        );
        refused(&server, chats, &chat(&"x".repeat(70_000), 4), 413, "body");
        refused(&server, "/v1/nothing", &json!({}), 404, "/v1/nothing");
        assert_eq!(server.post_raw(chats, "{\"messages\": [").status(), 400);
        assert_eq!(
            server
                .post_raw(chats, b"{\"messages\": \"\xff\xfe\"}".to_vec())
                .status(),
            400
        );
        let wrong_method = server.get(chats);
        assert_eq!(wrong_method.status(), 405);
        assert!(wrong_method.json::<Value>().expect("JSON")["error"]["message"].is_string());
    };
    let answers = std::thread::scope(|scope| {
        let errors = scope.spawn(bad);
        let answers: Vec<_> = (0..4).map(|_| good()).collect();
        errors.join().expect("every error is as expected");
        answers
    });
    assert!(answers.iter().all(|answer| *answer == expected));
}

#[test]
fn a_client_that_leaves_frees_its_blocks() {
    let server = Server::start(&[]);
    for (stream, gone) in [(true, 1.0), (false, 2.0)] {
        let mut body = chat("Count to a thousand.", 7000);
        body["stream"] = json!(stream);
        body["ignore_eos"] = json!(true);
        let body = body.to_string();
        let mut socket = TcpStream::connect(server.address()).expect("connects");
        write!(
            socket,
            "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n\
             content-length: {}\r\n\r\n{body}",
            body.len()
        )
        .expect("sends");
        if stream {
            socket.read_exact(&mut [0; 64]).expect("the answer begins");
        } else {
            server.wait_until("it runs", LIMIT, || server.metric("sconce_running") == 1.0);
        }
        drop(socket);
        // The gauges may not have shown yet that it came.
        server.wait_until("it is cancelled", LIMIT, || {
            server.metric("sconce_sequences_total{outcome=\"cancelled\"}") == gone
        });
        server.wait_until("it is gone", LIMIT, || server.metric("sconce_running") == 0.0);
        server.wait_until("its blocks are free", LIMIT, || {
            server.metric("sconce_kv_blocks{state=\"held\"}") == 0.0
        });
    }
}

#[test]
fn a_full_queue_refuses_at_once() {
    let server = Server::start(&["--queue", "2", "--schedule", "sequential"]);
    let prompt: Vec<u64> = (100..140).collect();
    let statuses = all_at_once(
        (0..8)
            .map(|_| {
                let (server, prompt) = (&server, &prompt);
                move || {
                    let response = server.post("/v1/completions", &completion(prompt, 100));
                    (
                        response.status().as_u16(),
                        response.headers().contains_key("retry-after"),
                    )
                }
            })
            .collect(),
    );
    assert!(
        statuses.iter().all(|status| matches!(status, (200, _) | (429, true))),
        "{statuses:?}"
    );
    assert!(statuses.iter().any(|status| status.0 == 200) && statuses.iter().any(|status| status.0 == 429));
}

#[test]
fn ends_on_request_with_what_runs_finished() {
    let server = Server::start(&["--drain-timeout", "10m"]);
    let mut body = chat("Count to a hundred.", 120);
    body["ignore_eos"] = json!(true);
    let (stream, refused) = std::thread::scope(|scope| {
        let streaming = scope.spawn(|| server.stream("/v1/chat/completions", &body));
        server.wait_until("it has begun", LIMIT, || {
            server.metric("sconce_decode_tokens_total") > 0.0
        });
        server.signal("-TERM");
        server.wait_until("nobody is let in", LIMIT, || {
            server.try_get("/ready").is_none_or(|response| response.status() == 503)
        });
        let refused = server
            .try_post("/v1/chat/completions", &chat("Hi", 1))
            .is_none_or(|response| response.status() == 503);
        (streaming.join().expect("the stream ends with [DONE]"), refused)
    });
    assert!(refused);
    assert_eq!(stream.last().expect("events")["choices"][0]["finish_reason"], "length");
    assert!(server.wait().success());
}

#[test]
fn a_request_past_its_time_is_ended() {
    // Each time a first token has to come, and how long that takes depends on the machine.
    for seconds in [3, 12, 48] {
        let server = Server::start(&["--request-timeout", &format!("{seconds}s")]);
        if cut_by_its_time(&server, seconds * 1000) {
            return;
        }
    }
    panic!("no token came in 24 seconds");
}

/// `false` where a first token did not come in time.
fn cut_by_its_time(server: &Server, timeout_ms: u64) -> bool {
    const CHAT: &str = "/v1/chat/completions";
    const TOKENS: u64 = 7000;
    let ended = |outcome| server.metric(&format!("sconce_sequences_total{{outcome=\"{outcome}\"}}"));
    let mut body = chat("Count to a thousand.", TOKENS as usize);
    body["ignore_eos"] = json!(true);
    let response = server.post(CHAT, &body);
    if response.status() == 504 {
        return false;
    }
    let cut: Value = response.json().expect("JSON");
    assert_eq!(cut["choices"][0]["finish_reason"], "length", "{cut}");
    assert_eq!(cut["choices"][0]["stop_reason"], "deadline");
    let tokens = cut["usage"]["completion_tokens"].as_u64().expect("a count");
    assert!((1..TOKENS).contains(&tokens), "{cut}");
    assert!(!text(&cut).is_empty());
    // The client's own time is shorter still.
    (body["timeout_ms"], body["stream"]) = (json!(timeout_ms / 2), json!(true));
    let response = server.post(CHAT, &body);
    if response.status() == 504 {
        return false;
    }
    let stream = response.text().expect("the stream ends well");
    let last = stream
        .lines()
        .filter_map(|line| line.strip_prefix("data: {"))
        .next_back();
    let last = last.expect("events");
    assert!(stream.contains("[DONE]"), "{stream}");
    assert!(
        last.contains("\"finish_reason\":\"length\"") && last.contains("\"stop_reason\":\"deadline\""),
        "{last}"
    );
    // Where a step is long, an answer does not wait for its end.
    server.wait_until("both are counted", LIMIT, || ended("cut") == 2.0);
    assert_eq!(ended("expired"), 0.0);
    // The server is idle as soon as the last answer has ended, and then lets even this one in. A first step may have
    // given it a token, for which the answer did not wait if that step was long.
    (body["timeout_ms"], body["stream"]) = (json!(1), json!(false));
    let status = server.post(CHAT, &body).status();
    server.wait_until("it is counted", LIMIT, || ended("cut") + ended("expired") == 3.0);
    match status.as_u16() {
        // With or without a token in time.
        504 => {}
        status => assert_eq!((status, ended("cut")), (200, 3.0)),
    }
    server.wait_until("their blocks are free", LIMIT, || {
        server.metric("sconce_kv_blocks{state=\"held\"}") == 0.0
    });
    true
}

#[test]
fn who_cannot_be_answered_in_time_hears_it_at_once() {
    let server = Server::start(&["--max-batch", "2"]);
    let prompt: Vec<u64> = (100..140).collect();
    // Teaches the server what its steps take.
    server.ask("/v1/completions", &completion(&prompt, 40));
    // Lasts longer than the refusal takes on any machine.
    let mut long = completion(&prompt, 200);
    long["timeout_ms"] = json!(600_000);
    let (refusals, answers) = std::thread::scope(|scope| {
        let busy = scope.spawn(|| {
            all_at_once(
                (0..4)
                    .map(|_| || server.post("/v1/completions", &long).status().as_u16())
                    .collect::<Vec<_>>(),
            )
        });
        server.wait_until("it is busy", LIMIT, || server.metric("sconce_running") == 2.0);
        // By its field or by the header.
        let plain = completion(&prompt, 40);
        let mut hasty = plain.clone();
        hasty["timeout_ms"] = json!(5);
        let client = reqwest::blocking::Client::new();
        let in_header = client
            .post(server.url("/v1/completions"))
            .header("x-request-timeout-ms", "5");
        let refusals = [
            server.post("/v1/completions", &hasty),
            in_header.json(&plain).send().expect("the server answers"),
        ];
        (refusals, busy.join().expect("no panic"))
    });
    for refusal in refusals {
        assert_eq!(refusal.status(), 429);
        let seconds = refusal.headers()["retry-after"].to_str().expect("text").parse::<u64>();
        assert!(seconds.is_ok_and(|seconds| seconds >= 1));
        assert_eq!(refusal.json::<Value>().expect("JSON")["error"]["code"], "deadline");
    }
    assert!(
        answers.iter().all(|&status| status == 200),
        "those accepted before are answered"
    );
    assert_eq!(server.metric("sconce_refusals_total{cause=\"deadline\"}"), 2.0);
    assert!(server.metric("sconce_prediction_error_ratio_count") >= 4.0);
}
