//! The prefix cache from outside: what a request finds, what another may know of it, and prompts that are pinned.

mod common;

use std::time::Duration;

use common::{Server, all_at_once, completion, text};
use serde_json::{Value, json};

/// A prompt of `length` token ids that shares none of its blocks with another `number`.
fn prompt(number: u64, length: u64) -> Vec<u64> {
    (0..length).map(|index| 300 + number * 500 + index).collect()
}

fn salted(prompt: &[u64], salt: &str) -> Value {
    let mut body = completion(prompt, 2);
    body["cache_salt"] = json!(salt);
    body
}

fn cached(answer: &Value) -> u64 {
    let cached = &answer["usage"]["prompt_tokens_details"]["cached_tokens"];
    cached.as_u64().unwrap_or_else(|| panic!("no count in {answer}"))
}

#[test]
fn a_salt_separates_what_is_cached() {
    let server = Server::start(&[]);
    let prompt = prompt(1, 100);
    let ask = |body: &Value| {
        let before = server.metric("sconce_prefill_tokens_total");
        let found = cached(&server.ask("/v1/completions", body));
        (found, server.metric("sconce_prefill_tokens_total") - before)
    };
    let cold = (0, 100.0);
    assert_eq!(ask(&salted(&prompt, "mine")), cold);
    assert_eq!(ask(&salted(&prompt, "mine")), (96, 4.0));
    // Probes with another salt, or none, compute what a cold request does.
    assert_eq!(ask(&salted(&prompt, "guess")), cold);
    assert_eq!(ask(&completion(&prompt, 2)), cold);
    assert_eq!(server.metric("sconce_prefix_requests_total{outcome=\"hit\"}"), 1.0);
    assert_eq!(server.metric("sconce_prefix_requests_total{outcome=\"miss\"}"), 3.0);
    assert!(server.metric("sconce_saved_prefill_seconds_total") > 0.0);
    for salt in ["", &"x".repeat(257)] {
        assert_eq!(server.post("/v1/completions", &salted(&prompt, salt)).status(), 400);
    }
}

#[test]
fn requests_that_come_together_compute_their_prefix_once() {
    let server = Server::start(&["--window-policy", "fixed", "--batch-window", "300ms"]);
    let bodies: Vec<Value> = (0..6)
        .map(|own| completion(&[prompt(1, 160), prompt(10 + own, 10)].concat(), 2))
        .collect();
    let server = &server;
    let answers = all_at_once(
        bodies
            .iter()
            .map(|body| move || server.ask("/v1/completions", body))
            .collect(),
    );
    let found: u64 = answers.iter().map(cached).sum();
    assert_eq!(found, 5 * 160);
    assert_eq!(server.metric("sconce_prefill_tokens_total"), 160.0 + 6.0 * 10.0);
    assert_eq!(server.metric("sconce_cached_tokens_total"), 5.0 * 160.0);
}

#[test]
fn a_conversation_prefills_each_token_once() {
    const TURNS: u64 = 10;
    let server = Server::start(&[]);
    let mut messages = vec![json!({"role": "system", "content": "You are brief."})];
    let mut last = Value::Null;
    for turn in 0..TURNS {
        let question = format!("What comes after the number {turn}? ").repeat(5);
        messages.push(json!({"role": "user", "content": question}));
        let body = json!({"messages": messages, "temperature": 0, "max_tokens": 6});
        last = server.ask("/v1/chat/completions", &body);
        messages.push(json!({"role": "assistant", "content": text(&last)}));
    }
    let prompt = last["usage"]["prompt_tokens"].as_f64().expect("a count");
    let computed = server.metric("sconce_prefill_tokens_total");
    // Each turn computes at most one block of the history again.
    assert!(
        computed <= prompt + (16 * TURNS) as f64,
        "{computed} for a last prompt of {prompt}"
    );
    assert_eq!(server.metric("sconce_recomputed_tokens_total"), 0.0);
}

fn delete(server: &Server, id: &str) -> u16 {
    let url = server.url(&format!("/v1/cache/prompts/{id}"));
    let answer = reqwest::blocking::Client::new().delete(url).send();
    answer.expect("the server answers").status().as_u16()
}

#[test]
fn prompts_are_pinned_listed_and_unpinned() {
    let server = Server::start(&["--kv-memory", "23MiB", "--max-model-len", "256", "--pin-memory", "0.2"]);
    let system = "You are a patient teacher of geography who answers in one short sentence and names the capital.";
    let pinned = server.ask(
        "/v1/cache/prompts",
        &json!({"messages": [{"role": "system", "content": system}]}),
    );
    let tokens = pinned["tokens"].as_u64().expect("a count");
    assert!(tokens >= 16 && tokens.is_multiple_of(16), "{pinned}");
    assert_eq!(
        (&pinned["shared"], &pinned["expires_in_seconds"]),
        (&json!(false), &Value::Null)
    );
    let blocks = (tokens / 16) as f64;
    assert_eq!(server.metric("sconce_kv_blocks{state=\"pinned\"}"), blocks);
    assert_eq!(server.metric("sconce_pinned_blocks{kind=\"asked\"}"), blocks);
    // A flood that needs all of the memory does not wash it away.
    for number in 0..6 {
        server.ask("/v1/completions", &completion(&prompt(number, 200), 2));
    }
    assert!(server.metric("sconce_evictions_total") > 0.0);
    let question = json!({"temperature": 0, "max_tokens": 4, "messages": [
        {"role": "system", "content": system}, {"role": "user", "content": "France?"},
    ]});
    assert_eq!(cached(&server.ask("/v1/chat/completions", &question)), tokens);

    let refused = server.post("/v1/cache/prompts", &json!({"prompt": prompt(9, 200)}));
    assert_eq!(refused.status(), 409);
    let error: Value = refused.json().expect("JSON");
    let message = error["error"]["message"].as_str().expect("a message");
    assert!(message.contains("blocks for pinned prompts"), "{message}");
    for body in [
        json!({}),
        json!({"prompt": "short"}),
        json!({"prompt": prompt(9, 40), "ttl_seconds": 0}),
        json!({"prompt": prompt(9, 40), "shared": true, "cache_salt": "x"}),
        json!({"prompt": [prompt(9, 40), prompt(8, 40)]}),
    ] {
        assert_eq!(server.post("/v1/cache/prompts", &body).status(), 400, "{body}");
    }

    let brief = server.ask(
        "/v1/cache/prompts",
        &json!({"prompt": prompt(9, 16), "ttl_seconds": 0.2}),
    );
    assert!(brief["expires_in_seconds"].as_f64().expect("a time") <= 0.2);
    let list = || -> Value { server.get("/v1/cache/prompts").json().expect("JSON") };
    server.wait_until("its time is over", Duration::from_secs(20), || {
        list()["data"].as_array().map(Vec::len) == Some(1)
    });
    let id = pinned["id"].as_str().expect("an id");
    assert_eq!(list()["data"][0]["id"], id);
    assert_eq!(delete(&server, id), 200);
    assert_eq!(delete(&server, id), 404);
    assert_eq!(server.metric("sconce_kv_blocks{state=\"pinned\"}"), 0.0);
}

/// A prompt that was let in, and whose time is over before it is computed, was not refused.
#[test]
fn a_pin_that_was_let_in_and_failed_is_counted_as_cut() {
    let server = Server::start(&["--device", "cpu", "--threads", "1", "--request-timeout", "300ms"]);
    let answer = server.post("/v1/cache/prompts", &json!({"prompt": prompt(1, 2000)}));
    assert_eq!(answer.status(), 504);
    assert_eq!(server.metric("sconce_cuts_total{cause=\"deadline_passed\"}"), 1.0);
    let metrics = server.get("/metrics").text().expect("text");
    let refusal = "sconce_refusals_total{cause=\"deadline_passed\"} ";
    assert!(
        !metrics
            .lines()
            .any(|line| line.starts_with(refusal) && !line.ends_with(" 0")),
        "{metrics}"
    );
}

#[test]
fn the_settings_file_pins_prompts_before_the_first_request() {
    let file = tempfile::NamedTempFile::new().expect("a file");
    let system = "You are a patient teacher of geography who answers in one short sentence and names the capital.";
    let settings = format!("[[pin]]\nmessages = [{{role = 'system', content = '{system}'}}]\n");
    std::fs::write(file.path(), settings).expect("writes");
    let server = Server::start(&["--config", file.path().to_str().expect("a path")]);
    let mut question = json!({"temperature": 0, "max_tokens": 4, "cache_salt": "mine", "messages": [
        {"role": "system", "content": system}, {"role": "user", "content": "France?"},
    ]});
    let first = server.ask("/v1/chat/completions", &question);
    assert!(cached(&first) >= 16, "{first}");
    question["cache_salt"] = json!("another");
    let second = server.ask("/v1/chat/completions", &question);
    assert_eq!(
        cached(&second),
        cached(&first),
        "everyone's prompt, and nothing of another salt's"
    );
    assert_eq!(text(&second), text(&first));
    let list: Value = server.get("/v1/cache/prompts").json().expect("JSON");
    assert_eq!(list["data"][0]["shared"], true);
    assert_eq!(delete(&server, "configured-1"), 404, "what the file pins stays");
}

#[test]
fn the_cache_tells_of_itself_without_telling_what_is_in_it() {
    let server = Server::start(&[]);
    let secret = "The password of the third gate is marzipan, and the guard sleeps at noon on every second Sunday.";
    for _ in 0..3 {
        server.ask(
            "/v1/completions",
            &json!({"prompt": secret, "max_tokens": 1, "cache_salt": "marzipan"}),
        );
    }
    let report: Value = server.get("/v1/cache").json().expect("JSON");
    let number = |path: &str| {
        report
            .pointer(path)
            .and_then(Value::as_f64)
            .unwrap_or_else(|| panic!("{path}: {report}"))
    };
    let states = ["free", "held", "cached", "pinned"].map(|state| number(&format!("/blocks/{state}")));
    assert_eq!(states.iter().sum::<f64>(), number("/blocks/total"));
    assert_eq!(number("/requests/hit"), 2.0);
    assert_eq!(number("/prefixes/most_used/0/requests"), 3.0);
    assert_eq!(number("/prefixes/most_used/0/tokens"), 16.0);
    let rate = number("/prompt_tokens/cached") / (number("/prompt_tokens/cached") + number("/prompt_tokens/computed"));
    assert_eq!(number("/prompt_tokens/hit_rate"), rate);
    assert!(!report.to_string().contains("marzipan"), "{report}");
    let bare = Server::start(&["--no-prefix-cache"]);
    let report: Value = bare.get("/v1/cache").json().expect("JSON");
    assert_eq!(report["pins"]["budget_blocks"], 0);
    assert_eq!(bare.post("/v1/cache/prompts", &json!({"prompt": secret})).status(), 409);
}
