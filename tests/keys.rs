//! Clients with keys over a real socket: whose request goes next.

mod common;

use std::{fs, io::Write, net::TcpStream, sync::Mutex, thread, time::Duration};

use common::{Server, completion};
use reqwest::blocking::Client;
use serde_json::{Value, json};
use tempfile::NamedTempFile;

/// Many wait behind many others.
const LIMIT: Duration = Duration::from_secs(240);

/// One that is behind many others is not refused for it.
const PATIENT: [&str; 2] = ["--request-timeout", "24h"];

/// A server and clients whose keys are their names.
struct Keyed {
    server: Server,
    client: Client,
    _keys: NamedTempFile,
}

impl Keyed {
    /// A server that runs one request at a time, for callers of these names and weights.
    fn start(callers: &[(&str, u32)]) -> Self {
        let entries = callers
            .iter()
            .map(|(name, weight)| entry(name, &format!("weight = {weight}")));
        Self::with(
            &entries.collect::<String>(),
            &[["--max-batch", "1"].as_slice(), &PATIENT].concat(),
        )
    }

    fn with(entries: &str, arguments: &[&str]) -> Self {
        let keys = NamedTempFile::new().expect("a file");
        fs::write(keys.path(), entries).expect("writes");
        let path = keys.path().to_str().expect("text");
        let server = Server::start(&[["--api-keys", path].as_slice(), arguments].concat());
        let client = Client::builder().timeout(LIMIT).build().expect("a client");
        Self {
            server,
            client,
            _keys: keys,
        }
    }

    fn post(&self, caller: &str, body: &Value) -> reqwest::Result<reqwest::blocking::Response> {
        let request = self.client.post(self.server.url("/v1/completions")).bearer_auth(caller);
        request.json(body).send()
    }

    fn metric(&self, name: &str) -> f64 {
        let request = self.client.get(self.server.url("/metrics")).bearer_auth("hold");
        let text = request.send().expect("an answer").text().expect("text");
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value.expect("the metric").parse().expect("a number")
    }

    fn wait_until(&self, name: &str, value: f64) {
        self.server.wait_until(name, LIMIT, || self.metric(name) == value);
    }

    /// Sends what `ask` sends while another request runs, which then makes room for them. Gives their names in the order
    /// in which they were answered.
    fn order<'a>(&self, asked: &[(&'a str, &str, Value)]) -> Vec<&'a str> {
        let answered = Mutex::new(Vec::new());
        let mut holding = completion(&[300, 301], 8000);
        holding["stream"] = json!(true);
        let holding = self.post("hold", &holding).expect("the answer begins");
        thread::scope(|scope| {
            for (waiting, (name, caller, body)) in (1..).zip(asked) {
                let answered = &answered;
                scope.spawn(move || {
                    let response = self.post(caller, body).expect("an answer");
                    assert_eq!(response.status(), 200);
                    answered.lock().expect("nobody panicked").push(*name);
                });
                self.wait_until("sconce_waiting", f64::from(waiting));
            }
            drop(holding);
        });
        answered.into_inner().expect("nobody panicked")
    }
}

/// A key of this name with more lines.
fn entry(name: &str, lines: &str) -> String {
    let digest: String = sconce::api::hash_key(name)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    format!("[[key]]\nname = \"{name}\"\nsha256 = \"{digest}\"\nadmin = true\n{lines}\n")
}

fn short() -> Value {
    completion(&[300, 301, 302, 303], 4)
}

#[test]
fn a_flood_of_one_callers_requests_does_not_keep_another_callers_one_waiting() {
    let keyed = Keyed::start(&[("hold", 1), ("flood", 1), ("one", 1)]);
    let flood = (0..20).map(|_| ("flood", "flood", short()));
    let asked: Vec<_> = flood.chain([("one", "one", short())]).collect();
    let order = keyed.order(&asked);
    let place = order.iter().position(|name| *name == "one").expect("it is answered");
    // The first or the second; whoever notes it down may be late by some.
    assert!(place < 10, "{order:?}");
}

#[test]
fn a_caller_of_three_times_the_weight_is_served_three_times_as_much() {
    let keyed = Keyed::start(&[("hold", 1), ("light", 1), ("heavy", 3)]);
    let pair = |_| [("light", "light", short()), ("heavy", "heavy", short())];
    let asked: Vec<_> = (0..16).flat_map(pair).collect();
    let order = keyed.order(&asked);
    let heavy = order[..16].iter().filter(|name| **name == "heavy").count();
    // Twelve of sixteen, and eight if they were alike; whoever notes one down may be late by some.
    assert!((10..=14).contains(&heavy), "{order:?}");
}

#[test]
fn a_callers_urgent_request_goes_before_its_others() {
    let keyed = Keyed::start(&[("hold", 1), ("one", 1)]);
    let with = |priority: i32| {
        let mut body = short();
        body["priority"] = json!(priority);
        body
    };
    let patient = (0..8).map(|_| ("patient", "one", with(5)));
    let asked: Vec<_> = patient.chain([("urgent", "one", with(-5))]).collect();
    let order = keyed.order(&asked);
    let place = order.iter().position(|name| *name == "urgent").expect("it is answered");
    assert!(place < 5, "{order:?}");
}

#[test]
fn what_never_fits_is_refused_for_good_and_nobody_yields_to_it() {
    let limits = ["--queue-tokens", "100", "--max-in-flight", "8"];
    let keyed = Keyed::with(
        &(entry("hold", "") + &entry("large", "")),
        &[limits.as_slice(), &PATIENT].concat(),
    );
    let mut holding = completion(&[300, 301], 8000);
    holding["stream"] = json!(true);
    let _holding = keyed.post("hold", &holding).expect("the answer begins");
    let mut many = short();
    many["n"] = json!(9);
    for (body, setting) in [
        (completion(&[300; 101], 4), "--queue-tokens"),
        (many, "--max-in-flight"),
    ] {
        let refused = keyed.post("large", &body).expect("an answer");
        assert_eq!(refused.status(), 400);
        assert!(!refused.headers().contains_key("retry-after"));
        let answer: Value = refused.json().expect("JSON");
        assert_eq!(answer["error"]["code"], "request_too_large");
        let message = answer["error"]["message"].as_str().expect("a message");
        assert!(message.contains(setting), "{message}");
        // One that holds more would have to wait if it stood in the way of a refused one.
        assert_eq!(keyed.post("hold", &short()).expect("an answer").status(), 200);
    }
}

#[test]
fn a_prompt_to_pin_is_used_although_its_client_leaves() {
    const LIMIT_A_MINUTE: usize = 3000;
    let room = [
        "--max-model-len",
        "4096",
        "--kv-memory",
        "640MiB",
        "--pin-memory",
        "0.5",
    ];
    let slow = ["--max-batch", "1", "--step-tokens", "4"];
    let keyed = Keyed::with(
        &(entry("hold", "") + &entry("pins", &format!("tokens-per-minute = {LIMIT_A_MINUTE}"))),
        &[room.as_slice(), &slow, &PATIENT].concat(),
    );
    let body = json!({"prompt": vec![300; LIMIT_A_MINUTE]}).to_string();
    let mut socket = TcpStream::connect(keyed.server.address()).expect("connects");
    write!(
        socket,
        "POST /v1/cache/prompts HTTP/1.1\r\nhost: x\r\nauthorization: Bearer pins\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
    .expect("sends");
    keyed.wait_until("sconce_running", 1.0);
    drop(socket);
    keyed.wait_until("sconce_running", 0.0);
    let asked = keyed.client.get(keyed.server.url("/v1/models")).bearer_auth("pins");
    let answer = asked.send().expect("an answer");
    let left = answer.headers()["x-ratelimit-remaining-tokens"].to_str().expect("text");
    // Some of it has been earned back; all of it takes a minute.
    let left: usize = left.parse().expect("a number");
    assert!(left < LIMIT_A_MINUTE * 2 / 3, "{left}");
}
