//! What the server answers is what the model says: the reference's tokens, whoever shares the batch, however the prompt
//! is cut, before and after a preemption.

mod common;

use std::time::Duration;

use common::{Server, all_at_once, completion, text};
use serde_json::{Value, json};

/// Greedy answers made by PyTorch in float32 from the same weights.
fn reference() -> Vec<Value> {
    let file = include_str!("fixtures/smollm2-135m-instruct-q4_1.json");
    let mut file: Value = serde_json::from_str(file).expect("JSON");
    match file["prompts"].take() {
        Value::Array(prompts) => prompts,
        other => panic!("prompts are a list, not {other}"),
    }
}

/// How many tokens are certain: up to the first step at which the two best tokens nearly tie.
fn certain(prompt: &Value) -> usize {
    let gaps = prompt["gaps"].as_array().expect("gaps");
    gaps.iter()
        .position(|gap| gap.as_f64().expect("a number") < 1e-3)
        .unwrap_or(gaps.len())
}

#[test]
fn greedy_answers_equal_the_reference() {
    let server = Server::start(&[]);
    let prompts = reference();
    assert!(prompts.len() >= 10);
    let answers = all_at_once(
        prompts
            .iter()
            .map(|prompt| {
                let server = &server;
                move || {
                    let mut body = json!({"temperature": 0, "max_tokens": 64});
                    let path = if prompt["messages"].is_array() {
                        body["messages"] = prompt["messages"].clone();
                        "/v1/chat/completions"
                    } else {
                        body["prompt"] = prompt["prompt_tokens"].clone();
                        "/v1/completions"
                    };
                    server.ask(path, &body)
                }
            })
            .collect(),
    );
    for (prompt, answer) in prompts.iter().zip(answers) {
        let name = &prompt["name"];
        let tokens = prompt["tokens"].as_array().expect("tokens").len();
        assert_eq!(
            answer["usage"]["prompt_tokens"],
            prompt["prompt_tokens"].as_array().expect("tokens").len(),
            "{name}"
        );
        if certain(prompt) == tokens {
            assert_eq!(text(&answer), prompt["completion"].as_str().expect("text"), "{name}");
            assert_eq!(answer["usage"]["completion_tokens"], tokens, "{name}");
        }
    }
}

/// The same request, greedy and seeded, as the texts that a server gives it.
fn answers(server: &Server) -> Vec<String> {
    requests()
        .iter()
        .map(|request| text(&server.ask("/v1/completions", request)))
        .collect()
}

/// A short and a long prompt, each greedy and seeded.
fn requests() -> Vec<Value> {
    let mut requests = Vec::new();
    for length in [7, 150] {
        let prompt: Vec<u64> = (0..length).map(|index| 300 + index * 37 % 4000).collect();
        let greedy = completion(&prompt, 24);
        let mut seeded = greedy.clone();
        seeded["temperature"] = json!(1.0);
        seeded["top_p"] = json!(0.95);
        seeded["seed"] = json!(11);
        requests.extend([greedy, seeded]);
    }
    requests
}

/// Prompts of many lengths that share nothing with the requests.
fn company(count: u64) -> Vec<Value> {
    let prompt = |number: u64| {
        (0..5 + number * 7 % 90)
            .map(|index| 5000 + (number * 131 + index * 17) % 9000)
            .collect()
    };
    (0..count)
        .map(|number| completion(&Vec::<u64>::from_iter::<Vec<u64>>(prompt(number)), 12))
        .collect()
}

#[test]
fn a_request_gets_the_same_answer_alone_and_among_99() {
    let server = Server::start(&["--no-prefix-cache"]);
    let alone = answers(&server);
    for (request, alone) in requests().iter().zip(alone) {
        let mut all = company(99);
        all.insert(40, request.clone());
        let server = &server;
        let together = all_at_once(
            all.iter()
                .map(|body| move || text(&server.ask("/v1/completions", body)))
                .collect(),
        );
        assert_eq!(together[40], alone);
    }
    // The hundred did run together: many sequences a step, on the mean over all steps, alone ones included.
    let sequences = server.metric("sconce_occupancy_steps_total") * server.metric("sconce_max_batch");
    assert!(sequences / server.metric("sconce_step_seconds_count") > 5.0);
}

#[test]
fn chunks_prefix_cache_and_schedule_change_no_answer() {
    let expected = answers(&Server::start(&["--no-prefix-cache", "--step-tokens", "512"]));
    for arguments in [
        &["--no-prefix-cache", "--step-tokens", "16", "--max-batch", "8"][..],
        &["--block-size", "8", "--window-policy", "fixed"],
        &["--schedule", "dynamic", "--batch-window", "5ms"],
        &["--schedule", "sequential"],
    ] {
        let server = Server::start(arguments);
        assert_eq!(answers(&server), expected, "{arguments:?}");
        // The second time around the prompts are in the prefix cache, where there is one.
        assert_eq!(answers(&server), expected, "{arguments:?}, again");
    }
}

#[test]
fn a_preempted_request_gets_the_same_answer() {
    let long = |server: &Server, seed: u64| {
        let prompt: Vec<u64> = (0..100).map(|index| 1000 + seed * 100 + index).collect();
        let mut body = completion(&prompt, 90);
        if seed % 2 == 1 {
            body["temperature"] = json!(0.8);
            body["seed"] = json!(seed);
        }
        text(&server.ask("/v1/completions", &body))
    };
    let roomy = Server::start(&["--no-prefix-cache"]);
    let expected: Vec<_> = (0..6).map(|seed| long(&roomy, seed)).collect();
    drop(roomy);
    // About 500 tokens of cache for six sequences of 190.
    let tight = Server::start(&["--kv-memory", "23MiB", "--max-model-len", "256"]);
    let answers = all_at_once(
        (0..6)
            .map(|seed| {
                let tight = &tight;
                move || long(tight, seed)
            })
            .collect(),
    );
    assert!(
        tight.metric("sconce_preemptions_total") > 0.0,
        "the cache was too large to preempt anyone"
    );
    assert_eq!(answers, expected);
    tight.wait_until("every block is free", Duration::from_secs(20), || {
        tight.metric("sconce_kv_blocks{state=\"held\"}") == 0.0
    });
}
