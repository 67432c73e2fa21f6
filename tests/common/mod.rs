//! A running server and what the tests ask of it. Everything goes through the program and its socket.
#![allow(dead_code)] // each test program uses its own part

pub mod tiny;

use std::{
    io::{BufRead, BufReader, Write},
    net::TcpStream,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use reqwest::blocking::{Client, Response};
use serde_json::{Value, json};

/// Where the tests' servers run, as variables for `sconce`: on the CPU, or where `SCONCE_TEST_DEVICE` says. Arguments
/// outrank them. A GPU computes in float32 then, as the answers that are expected were, and the servers that run beside
/// each other take as much of its memory as they would of the machine's.
pub fn device() -> Vec<(&'static str, String)> {
    let device = std::env::var("SCONCE_TEST_DEVICE").unwrap_or("cpu".to_owned());
    let mut variables = Vec::new();
    if device != "cpu" {
        variables.push(("SCONCE_DTYPE", "f32".to_owned()));
        variables.push(("SCONCE_KV_MEMORY", "640MiB".to_owned()));
    }
    variables.push(("SCONCE_DEVICE", device));
    variables
}

/// A server process on a free port, with the default model unless the arguments say otherwise. Killed when dropped.
pub struct Server {
    child: Child,
    base: String,
    client: Client,
}

impl Server {
    /// Starts `sconce serve --port 0` with more arguments and waits until the model answers.
    pub fn start(arguments: &[&str]) -> Self {
        Self::start_logging_to(Stdio::inherit(), arguments)
    }

    /// The same without what it says on standard error, for tests in which much goes wrong.
    pub fn start_quietly(arguments: &[&str]) -> Self {
        Self::start_logging_to(Stdio::null(), arguments)
    }

    /// The same with its log lines going elsewhere than to the test's own standard error.
    pub fn start_logging_to(log: impl Into<Stdio>, arguments: &[&str]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_sconce"))
            .args(["serve", "--port", "0"])
            .args(arguments)
            .stdout(Stdio::piped())
            .stderr(log)
            .env("RUST_BACKTRACE", "0")
            .envs(device())
            .spawn()
            .expect("the program starts");
        let mut lines = BufReader::new(child.stdout.take().expect("stdout is a pipe")).lines();
        let base = loop {
            let line = lines.next().expect("the server prints its address").expect("as text");
            if let Some(start) = line.find("http://") {
                break line[start..].split_whitespace().next().unwrap_or_default().to_owned();
            }
        };
        // Whatever else it prints must not fill the pipe.
        thread::spawn(move || lines.for_each(drop));
        sconce_loadtest::tls::prepare();
        let client = Client::builder()
            .timeout(Duration::from_secs(240))
            .build()
            .expect("a client");
        let mut server = Self { child, base, client };
        let start = Instant::now();
        while server.try_get("/ready").is_none_or(|response| response.status() != 200) {
            let ended = server.child.try_wait().expect("a child can be asked");
            assert_eq!(ended, None, "the server ended while it loaded its model");
            assert!(
                start.elapsed() < Duration::from_secs(300),
                "the model loads for too long"
            );
            thread::sleep(Duration::from_millis(20));
        }
        server
    }

    /// The process's id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    pub fn url(&self, path: &str) -> String {
        format!("{}{path}", self.base)
    }

    /// `host:port`, for a raw socket.
    pub fn address(&self) -> &str {
        self.base.trim_start_matches("http://")
    }

    /// `None` where nobody answers.
    pub fn try_get(&self, path: &str) -> Option<Response> {
        self.client.get(self.url(path)).send().ok()
    }

    pub fn get(&self, path: &str) -> Response {
        self.try_get(path).expect("the server answers")
    }

    /// `None` where nobody answers.
    pub fn try_post(&self, path: &str, body: &Value) -> Option<Response> {
        self.client.post(self.url(path)).json(body).send().ok()
    }

    pub fn post(&self, path: &str, body: &Value) -> Response {
        self.try_post(path, body).expect("the server answers")
    }

    pub fn post_raw(&self, path: &str, body: impl Into<reqwest::blocking::Body>) -> Response {
        let request = self
            .client
            .post(self.url(path))
            .header("content-type", "application/json");
        request.body(body).send().expect("the server answers")
    }

    /// Posts and expects success.
    pub fn ask(&self, path: &str, body: &Value) -> Value {
        let response = self.post(path, body);
        let status = response.status();
        let value: Value = response.json().expect("a JSON body");
        assert_eq!(status, 200, "{value}");
        value
    }

    /// Posts with `"stream": true` and gives the events' data, `[DONE]` left out.
    pub fn stream(&self, path: &str, body: &Value) -> Vec<Value> {
        let mut body = body.clone();
        body["stream"] = json!(true);
        let response = self.post(path, &body);
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        let text = response.text().expect("the stream ends well");
        let mut events: Vec<_> = text.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
        assert_eq!(events.pop(), Some("[DONE]"));
        events
            .iter()
            .map(|event| serde_json::from_str(event).expect("JSON events"))
            .collect()
    }

    /// A metric's value, its labels written as Prometheus does: `name{label="value"}`.
    pub fn metric(&self, name: &str) -> f64 {
        let text = self.get("/metrics").text().expect("text");
        let line = text
            .lines()
            .find(|line| line.rsplit_once(' ').is_some_and(|(found, _)| found == name));
        let value = line
            .unwrap_or_else(|| panic!("no metric {name} in:\n{text}"))
            .rsplit_once(' ')
            .expect("a value")
            .1;
        value.parse().expect("a number")
    }

    pub fn wait_until(&self, what: &str, limit: Duration, condition: impl Fn() -> bool) {
        let start = Instant::now();
        while !condition() {
            assert!(start.elapsed() < limit, "waited too long until {what}");
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Sends the process a signal, such as `-TERM`.
    pub fn signal(&self, signal: &str) {
        let id = self.child.id().to_string();
        assert!(
            Command::new("kill")
                .args([signal, &id])
                .status()
                .expect("kill runs")
                .success()
        );
    }

    /// Waits for the process to end by itself.
    pub fn wait(mut self) -> std::process::ExitStatus {
        self.child.wait().expect("the server ends")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Posts by hand: the connection, the request being sent whole, to read from or to drop.
pub fn send_by_hand(server: &Server, path: &str, id: &str, body: &Value) -> TcpStream {
    let body = body.to_string();
    let mut socket = TcpStream::connect(server.address()).expect("connects");
    write!(
        socket,
        "POST {path} HTTP/1.1\r\nhost: x\r\nx-request-id: {id}\r\ncontent-type: application/json\r\n\
         content-length: {}\r\nconnection: close\r\n\r\n{body}",
        body.len()
    )
    .expect("sends");
    socket
}

/// A greedy chat request with one user message.
pub fn chat(content: &str, max_tokens: usize) -> Value {
    json!({"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": max_tokens})
}

/// A completion request on token ids.
pub fn completion(prompt: &[u64], max_tokens: usize) -> Value {
    json!({"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true})
}

/// The first choice's text, of a chat or a completion.
pub fn text(answer: &Value) -> String {
    let choice = &answer["choices"][0];
    choice["message"]["content"]
        .as_str()
        .or(choice["text"].as_str())
        .expect("a text")
        .to_owned()
}

/// Runs all of the work at once, each in a thread of its own, and gives the results in order.
pub fn all_at_once<T: Send>(work: Vec<impl FnOnce() -> T + Send>) -> Vec<T> {
    thread::scope(|scope| {
        let threads: Vec<_> = work.into_iter().map(|work| scope.spawn(work)).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().expect("no panic"))
            .collect()
    })
}
