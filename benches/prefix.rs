//! What the prefix cache is worth to whoever waits for a first token, and what it tells a stranger. Servers with the
//! cache and without it run side by side and are asked the same, one request after the other, so that no queue hides
//! the difference. `cargo bench --bench prefix`, or `-- 20` for 20 requests in place of 100.

#[path = "../tests/common/mod.rs"]
mod common;

use std::{
    io::{BufRead, BufReader},
    time::{Duration, Instant},
};

use common::Server;
use serde_json::{Value, json};

const TURNS: usize = 10;
/// Probes of each kind.
const PROBES: usize = 8;

/// Words that are one token each.
fn words(count: usize, seed: usize) -> String {
    let words = [
        "time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school",
    ];
    let mut state = seed * 2 + 1;
    let mut word = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        words[(state >> 33) % words.len()]
    };
    (0..count).map(|_| word()).collect::<Vec<_>>().join(" ")
}

/// An answer as its client saw it.
struct Seen {
    first_token: Duration,
    prompt_tokens: u64,
    cached_tokens: u64,
    text: String,
}

/// Streams a chat answer.
fn ask(server: &Server, messages: &Value, salt: &str, max_tokens: usize) -> Seen {
    let body = json!({
        "messages": messages, "temperature": 0, "max_tokens": max_tokens, "ignore_eos": true, "cache_salt": salt,
        "stream": true, "stream_options": {"include_usage": true},
    });
    let sent = Instant::now();
    let response = server.post("/v1/chat/completions", &body);
    let (mut first_token, mut text, mut usage) = (None, String::new(), Value::Null);
    for line in BufReader::new(response).lines() {
        let line = line.expect("the stream goes on");
        let Some(event) = line.strip_prefix("data: ").filter(|event| *event != "[DONE]") else {
            continue;
        };
        let mut event: Value = serde_json::from_str(event).expect("JSON events");
        if let Some(piece) = event["choices"][0]["delta"]["content"]
            .as_str()
            .filter(|piece| !piece.is_empty())
        {
            first_token.get_or_insert_with(|| sent.elapsed());
            text += piece;
        }
        usage = event["usage"].take();
    }
    let count = |path: &str| usage.pointer(path).and_then(Value::as_u64).expect("a count");
    Seen {
        // Special tokens have no text: an answer of nothing else has its first token at its end.
        first_token: first_token.unwrap_or_else(|| sent.elapsed()),
        prompt_tokens: count("/prompt_tokens"),
        cached_tokens: count("/prompt_tokens_details/cached_tokens"),
        text,
    }
}

fn message(role: &str, content: &str) -> Value {
    json!({"role": role, "content": content})
}

fn milliseconds(mut times: Vec<Duration>) -> (f64, f64, f64) {
    times.sort();
    let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize].as_secs_f64() * 1e3;
    (at(0.0), at(0.5), at(1.0))
}

/// A system prompt of 1,000 tokens that all requests share.
fn shared_system_prompt(servers: &[(&str, &Server)], requests: usize) {
    println!("\n{requests} requests sharing a system prompt of 1,000 tokens, TTFT in ms:");
    let system = words(1000, 1);
    let mut medians = Vec::new();
    for (name, server) in servers {
        let seen: Vec<_> = (0..requests)
            .map(|number| {
                let user = words(20, 100 + number);
                ask(
                    server,
                    &json!([message("system", &system), message("user", &user)]),
                    "system",
                    2,
                )
            })
            .collect();
        let computed: u64 = seen.iter().map(|seen| seen.prompt_tokens - seen.cached_tokens).sum();
        let (least, median, most) = milliseconds(seen.iter().map(|seen| seen.first_token).collect());
        println!(
            "  {name:<14} median {median:8.1}   least {least:8.1}   most {most:8.1}   prompt tokens computed {computed}"
        );
        medians.push(median);
    }
    println!(
        "  the median is {:.1} times lower with the cache",
        medians[1] / medians[0]
    );
}

/// A chat that sends its whole history at every turn.
fn conversation(servers: &[(&str, &Server)]) {
    println!("\nA conversation of {TURNS} turns, 60 words asked and 40 tokens answered:");
    for (name, server) in servers {
        let mut messages = vec![message("system", &words(48, 2))];
        let mut turns = Vec::new();
        for turn in 0..TURNS {
            messages.push(message("user", &words(60, 200 + turn)));
            let seen = ask(server, &json!(messages), "chat", 40);
            messages.push(message("assistant", &seen.text));
            turns.push(seen);
        }
        let times: Vec<_> = turns.iter().map(|seen| seen.first_token.as_secs_f64() * 1e3).collect();
        let computed: u64 = turns.iter().map(|seen| seen.prompt_tokens - seen.cached_tokens).sum();
        let shown: Vec<_> = times.iter().map(|ms| format!("{ms:.0}")).collect();
        println!("  {name:<14} TTFT by turn in ms: {}", shown.join(" "));
        println!(
            "  {:<14} tenth over second {:.2}, {computed} prompt tokens computed, the last prompt has {}",
            "",
            times[TURNS - 1] / times[1],
            turns[TURNS - 1].prompt_tokens
        );
    }
}

/// Whether the time to a first token tells that somebody else sent the same prompt.
fn probes(server: &Server) {
    println!("\nProbing for prompts of 400 tokens that another salt has sent, TTFT in ms:");
    let chat = |number: usize| json!([message("user", &words(400, 300 + number))]);
    let mut times = [Vec::new(), Vec::new(), Vec::new()];
    for number in 0..PROBES {
        // Nobody sent it; another salt sent it; the same salt sent it.
        times[0].push(ask(server, &chat(number), "victim", 1).first_token);
        times[1].push(ask(server, &chat(number), "stranger", 1).first_token);
        times[2].push(ask(server, &chat(number), "victim", 1).first_token);
    }
    for (name, times) in ["cold", "another salt's", "its own"].iter().zip(times) {
        let (least, median, most) = milliseconds(times);
        println!("  {name:<14} median {median:8.1}   least {least:8.1}   most {most:8.1}");
    }
}

fn main() {
    let requests = std::env::args()
        .filter_map(|word| word.parse().ok())
        .next()
        .unwrap_or(100);
    let quiet = ["--log-level", "warn"];
    let cached = Server::start(&quiet);
    let uncached = Server::start(&[&quiet[..], &["--no-prefix-cache"]].concat());
    let servers = [("with cache", &cached), ("without", &uncached)];
    for (_, server) in servers {
        ask(server, &json!([message("user", "Hello")]), "warm", 2);
    }
    shared_system_prompt(&servers, requests);
    conversation(&servers);
    probes(&cached);
}
