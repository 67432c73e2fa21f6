//! Everything at once: requests of random shapes, clients that leave, stall or send nonsense, and injected faults.
//! Every request has exactly one outcome, whoever was not touched gets the answer that it gets alone, and in the end
//! nothing is held. The model is tiny and random, so that thousands of requests take seconds.
//!
//! `SCONCE_CHAOS=10000 cargo test --features fault-injection --test chaos -- --nocapture` is the long run;
//! `SCONCE_CHAOS_SEED` chooses another course.

mod common;

use std::{
    collections::BTreeMap,
    fmt::Debug,
    fs,
    io::{Read, Write},
    net::TcpStream,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use common::{Server, tiny};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde_json::{Value, json};

const CLIENTS: u64 = 16;
const SHAPES: usize = 48;
const LIMIT: Duration = Duration::from_secs(60);

/// How a request came out, as its client sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Outcome {
    Answered,
    /// The request's own fault, told to its client.
    Failed,
    Refused,
    /// The client did not wait.
    Left,
    /// The engine was started again meanwhile.
    EngineLost,
}

/// A request that can be sent again and again, and its answer when it is alone.
struct Shape {
    path: &'static str,
    body: Value,
    tokens: usize,
    answer: Value,
}

/// What the client does with a shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Manner {
    Plain,
    /// Sends and reads in small pieces, with pauses.
    Stalling,
    /// Leaves after so many bytes of the request.
    LeavesSending(usize),
    /// Leaves after so many bytes of the response.
    LeavesReading(usize),
    Malformed(usize),
    Fault(&'static str),
    /// Faults that take the whole engine.
    EngineFault(&'static str),
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |value| value.parse().expect("a number"))
}

#[test]
fn every_request_has_exactly_one_outcome_and_nothing_is_left_behind() {
    let (requests, seed) = (number("SCONCE_CHAOS", 400), number("SCONCE_CHAOS_SEED", 1));
    let folder = tiny::model();
    let arguments = [
        "--model",
        tiny::path(&folder),
        "--kv-memory",
        "1MiB",
        "--block-size",
        "4",
    ];
    let limits = [
        // On a GPU a hang would end the server.
        "--device",
        "cpu",
        "--max-batch",
        "12",
        "--step-tokens",
        "24",
        "--step-timeout",
        "10s",
        "--batch-window",
        "1ms",
    ];
    let server = Server::start_quietly(&[arguments.as_slice(), limits.as_slice()].concat());
    let mut random = StdRng::seed_from_u64(seed);
    let shapes: Vec<Shape> = (0..SHAPES).map(|_| shape(&server, &mut random)).collect();
    let (files, threads) = (open_files(&server), threads(&server));

    let before = Counters::of(&server);
    let (started, next) = (Instant::now(), AtomicU64::new(0));
    let outcomes = Mutex::new(BTreeMap::<Outcome, u64>::new());
    let told = Mutex::new(Told::default());
    thread::scope(|scope| {
        for _ in 0..CLIENTS {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    if index >= requests {
                        return;
                    }
                    let mut random = StdRng::seed_from_u64(seed.wrapping_mul(1 << 32).wrapping_add(index));
                    let manner = match index {
                        _ if index == requests / 3 => Manner::EngineFault("hang"),
                        _ if index == 2 * requests / 3 => Manner::EngineFault("engine"),
                        _ => manner(&mut random),
                    };
                    let shape = &shapes[random.random_range(0..SHAPES)];
                    let outcome = loop {
                        let outcome = run(&server, index, shape, manner, &mut random, &told);
                        if outcome == Outcome::EngineLost {
                            // As a client does that is told to try again.
                            server.wait_until("it is ready", LIMIT, || server.get("/ready").status() == 200);
                        }
                        // What else befell the engine may have kept it from this fault.
                        match manner {
                            Manner::EngineFault(name) if restarts(&server, name) == 0.0 => {}
                            _ => break outcome,
                        }
                    };
                    *outcomes.lock().expect("no client panicked").entry(outcome).or_default() += 1;
                }
            });
        }
    });
    let outcomes = outcomes.into_inner().expect("no client panicked");
    println!(
        "{requests} requests in {:.1} s: {outcomes:?}",
        started.elapsed().as_secs_f64()
    );

    assert_eq!(outcomes.values().sum::<u64>(), requests);
    for outcome in [Outcome::Answered, Outcome::Failed, Outcome::Refused, Outcome::Left] {
        assert!(outcomes.contains_key(&outcome), "{outcome:?} never happened");
    }
    // Those that were under way when the engine was lost, and those that came before it ran again.
    let lost = outcomes.get(&Outcome::EngineLost).copied().unwrap_or_default();
    assert!((2..=requests / 4).contains(&lost), "{lost} lost");
    for name in ["sconce_running", "sconce_waiting", "sconce_kv_blocks{state=\"held\"}"] {
        server.wait_until(name, LIMIT, || server.metric(name) == 0.0);
    }
    for fault in ["hang", "engine"] {
        assert_eq!(restarts(&server, fault), 1.0);
    }
    server.wait_until("connections are closed", LIMIT, || open_files(&server) <= files);
    // The pool for blocking work lets its threads go after ten idle seconds.
    server.wait_until("threads have ended", LIMIT, || self::threads(&server) <= threads);
    let told = told.into_inner().expect("no client panicked");
    reconcile(&told, &before, &Counters::of(&server));
    for shape in &shapes {
        assert_eq!(ask(&server, "after", shape), (200, shape.answer.clone()));
    }
}

/// How often the engine was started again for such a fault.
fn restarts(server: &Server, fault: &str) -> f64 {
    let cause = if fault == "hang" { "hung" } else { "panicked" };
    server.metric(&format!("sconce_engine_restarts_total{{cause=\"{cause}\"}}"))
}

fn open_files(server: &Server) -> usize {
    entries(server, "fd")
}

fn threads(server: &Server) -> usize {
    entries(server, "task")
}

fn entries(server: &Server, folder: &str) -> usize {
    let folder = format!("/proc/{}/{folder}", server.id());
    fs::read_dir(folder).expect("the server runs").count()
}

/// A random request, with the answer it gets alone.
fn shape(server: &Server, random: &mut StdRng) -> Shape {
    let tokens = random.random_range(1..=4);
    let mut body = json!({
        "max_tokens": tokens, "ignore_eos": true, "seed": random.random_range(0..1000),
        "temperature": if random.random() { 0.0 } else { 1.0 },
        "n": random.random_range(1..=2), "stream": random.random::<bool>(),
    });
    let length = random.random_range(1..=40u64);
    let path = if random.random() {
        let text: String = (0..length).map(|_| random.random_range('A'..='Z')).collect();
        body["messages"] = json!([{"role": "user", "content": text}]);
        "/v1/chat/completions"
    } else {
        // Many begin alike, so that they meet in the prefix cache.
        let token = |at| {
            if at < 20 {
                at
            } else {
                random.random_range(3..tiny::VOCABULARY)
            }
        };
        let prompt: Vec<u64> = (0..length).map(token).collect();
        body["prompt"] = json!(prompt);
        "/v1/completions"
    };
    let mut shape = Shape {
        path,
        body,
        tokens,
        answer: Value::Null,
    };
    let (status, answer) = ask(server, "alone", &shape);
    assert_eq!(status, 200, "{answer}");
    shape.answer = answer;
    shape
}

fn manner(random: &mut StdRng) -> Manner {
    const FAULTS: [&str; 9] = [
        "nan",
        "infinity",
        "sampler",
        "step",
        "step-panic",
        "out-of-memory",
        "out-of-memory",
        "detokenizer",
        "handler",
    ];
    match random.random_range(0..100) {
        0..55 => Manner::Plain,
        55..62 => Manner::Stalling,
        62..70 => Manner::LeavesSending(random.random_range(0..400)),
        70..80 => Manner::LeavesReading(random.random_range(0..600)),
        80..90 => Manner::Malformed(random.random_range(0..6)),
        _ => Manner::Fault(FAULTS[random.random_range(0..FAULTS.len())]),
    }
}

/// What the clients were told, and how many did not wait for it.
#[derive(Debug, Default)]
struct Told {
    statuses: BTreeMap<u16, u64>,
    /// Of refusals and failures, by what the server counts them under.
    causes: BTreeMap<String, u64>,
    left: u64,
}

impl Told {
    fn note(&mut self, status: u16, answer: &Value) {
        *self.statuses.entry(status).or_default() += 1;
        let error = &answer["error"];
        if !error.is_null() {
            let unnamed = if status == 400 { "invalid_request" } else { "internal" };
            let cause = error["code"].as_str().unwrap_or(unnamed);
            *self.causes.entry(cause.to_owned()).or_default() += 1;
        }
    }
}

/// What the server counted of these routes, and of all.
struct Counters {
    statuses: BTreeMap<u16, u64>,
    causes: BTreeMap<String, u64>,
    panics: u64,
}

impl Counters {
    fn of(server: &Server) -> Self {
        let text = server.get("/metrics").text().expect("text");
        let (mut statuses, mut causes, mut panics) = (BTreeMap::new(), BTreeMap::new(), 0);
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let (series, value) = line.rsplit_once(' ').expect("a value");
            let count = value.parse::<f64>().expect("a number") as u64;
            let (name, labels) = series.split_once('{').unwrap_or((series, ""));
            let label = |name: &str| {
                let rest = labels.split_once(&format!("{name}=\"")).expect("the label").1;
                rest.split('"').next().expect("a value")
            };
            match name {
                "sconce_http_requests_total" if label("route").ends_with("/completions") => {
                    let status = label("status").parse::<u16>().expect("a status");
                    *statuses.entry(status).or_default() += count;
                }
                "sconce_refusals_total" | "sconce_cuts_total" => {
                    *causes.entry(label("cause").to_owned()).or_default() += count;
                }
                "sconce_request_panics_total" => panics += count,
                _ => {}
            }
        }
        Self {
            statuses,
            causes,
            panics,
        }
    }
}

/// The server counted each thing that it told, and besides at most what it had to say to clients that did not listen.
fn reconcile(told: &Told, before: &Counters, after: &Counters) {
    /// How many more were counted than told.
    fn unheard<K: Ord + Debug>(told: &BTreeMap<K, u64>, before: &BTreeMap<K, u64>, after: &BTreeMap<K, u64>) -> u64 {
        let count = |counts: &BTreeMap<K, u64>, key: &K| counts.get(key).copied().unwrap_or_default();
        for (key, told) in told {
            let counted = count(after, key) - count(before, key);
            assert!(counted >= *told, "{key:?}: {told} were told, and {counted} counted");
        }
        let counted: u64 = after.keys().map(|key| count(after, key) - count(before, key)).sum();
        counted - told.values().sum::<u64>()
    }
    let answers = unheard(&told.statuses, &before.statuses, &after.statuses);
    let causes = unheard(&told.causes, &before.causes, &after.causes);
    assert!(
        answers.max(causes) <= told.left,
        "{answers} and {causes} more than {told:?}"
    );
    let panics = ["internal", "text_failed"].map(|cause| told.causes.get(cause).copied().unwrap_or_default());
    assert_eq!(after.panics - before.panics, panics.iter().sum::<u64>(), "{told:?}");
}

fn run(server: &Server, index: u64, shape: &Shape, manner: Manner, random: &mut StdRng, told: &Mutex<Told>) -> Outcome {
    let outcome = send(server, index, shape, manner, random, told);
    if outcome == Outcome::Left {
        told.lock().expect("no client panicked").left += 1;
    }
    outcome
}

fn send(
    server: &Server,
    index: u64,
    shape: &Shape,
    manner: Manner,
    random: &mut StdRng,
    told: &Mutex<Told>,
) -> Outcome {
    let after = random.random_range(0..shape.tokens);
    let (id, body) = match manner {
        Manner::Fault("handler") => ("fault.handler.0".into(), shape.body.to_string().into_bytes()),
        Manner::Fault(name) | Manner::EngineFault(name) => {
            (format!("fault.{name}.{after}"), shape.body.to_string().into_bytes())
        }
        Manner::Malformed(kind) => (format!("malformed-{index}"), malformed(shape, kind)),
        _ => (format!("plain-{index}"), shape.body.to_string().into_bytes()),
    };
    let request = message(shape.path, &id, &body);
    let mut socket = TcpStream::connect(server.address()).expect("connects");
    socket.set_read_timeout(Some(LIMIT)).expect("sets");
    match manner {
        Manner::LeavesSending(bytes) => {
            socket.write_all(&request[..bytes.min(request.len())]).expect("sends");
            return Outcome::Left;
        }
        Manner::Stalling => {
            for piece in request.chunks(request.len().div_ceil(4)) {
                socket.write_all(piece).expect("sends");
                thread::sleep(Duration::from_millis(random.random_range(0..10)));
            }
        }
        _ => socket.write_all(&request).expect("sends"),
    }
    if let Manner::LeavesReading(bytes) = manner {
        let mut begun = vec![0; bytes];
        // An answer may be shorter than that.
        let _ = (bytes > 0).then(|| socket.read(&mut begun));
        return Outcome::Left;
    }
    let mut response = Vec::new();
    let pause = Duration::from_millis(if manner == Manner::Stalling { 2 } else { 0 });
    read(&mut socket, &mut response, pause);
    let (status, answer) = parse(&response);
    told.lock().expect("no client panicked").note(status, &answer);
    judge(shape, manner, status, &answer)
}

fn judge(shape: &Shape, manner: Manner, status: u16, answer: &Value) -> Outcome {
    if answer["error"]["code"] == "engine_lost" {
        return Outcome::EngineLost;
    }
    match manner {
        Manner::Malformed(_) => {
            assert!((400..500).contains(&status), "{status} {answer}");
            Outcome::Refused
        }
        Manner::Fault(name) if name != "out-of-memory" => {
            assert_eq!(answer["error"]["type"], "server_error", "{name}: {status} {answer}");
            Outcome::Failed
        }
        Manner::EngineFault(name) => panic!("{name} went unnoticed: {status} {answer}"),
        _ => {
            assert_eq!((status, answer), (200, &shape.answer), "{manner:?} {}", shape.body);
            Outcome::Answered
        }
    }
}

fn malformed(shape: &Shape, kind: usize) -> Vec<u8> {
    let whole = shape.body.to_string().into_bytes();
    let with = |field: &str, value: Value| {
        let mut body = shape.body.clone();
        body[field] = value;
        body.to_string().into_bytes()
    };
    match kind {
        0 => whole[..whole.len() / 2].to_vec(),
        1 => [&whole[..whole.len() / 2], b"\xff\xfe"].concat(),
        2 => with("temperature", json!("hot")),
        3 => with("max_tokens", json!(-1)),
        4 => with("n", json!(1000)),
        _ => with("logit_bias", json!({"900": 1})),
    }
}

fn message(path: &str, id: &str, body: &[u8]) -> Vec<u8> {
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: x\r\nx-request-id: {id}\r\ncontent-type: application/json\r\n\
         content-length: {}\r\nconnection: close\r\n\r\n",
        body.len()
    );
    [head.as_bytes(), body].concat()
}

/// Reads to the end, pausing between pieces.
fn read(socket: &mut TcpStream, response: &mut Vec<u8>, pause: Duration) {
    let mut piece = [0; 256];
    loop {
        match socket.read(&mut piece).expect("the answer ends in time") {
            0 => return,
            count => response.extend(&piece[..count]),
        }
        thread::sleep(pause);
    }
}

fn ask(server: &Server, id: &str, shape: &Shape) -> (u16, Value) {
    let mut socket = TcpStream::connect(server.address()).expect("connects");
    socket.set_read_timeout(Some(LIMIT)).expect("sets");
    let body = shape.body.to_string();
    socket
        .write_all(&message(shape.path, id, body.as_bytes()))
        .expect("sends");
    let mut response = Vec::new();
    read(&mut socket, &mut response, Duration::ZERO);
    parse(&response)
}

/// The status, and of an answer what does not change from time to time: each choice's text and end, and the usage; or
/// else the error. Panics where a response says neither or both.
fn parse(response: &[u8]) -> (u16, Value) {
    let text = String::from_utf8_lossy(response);
    let (head, body) = text
        .split_once("\r\n\r\n")
        .unwrap_or_else(|| panic!("no answer: {text:?}"));
    let status = head.split(' ').nth(1).expect("a status").parse().expect("a number");
    if head.to_lowercase().contains("content-type: text/event-stream") {
        return (status, streamed(body));
    }
    let body: Value = serde_json::from_str(body).unwrap_or_else(|error| panic!("{error}: {text}"));
    if !body["error"].is_null() {
        return (status, json!({"error": body["error"]}));
    }
    let choices = body["choices"].as_array().expect("choices");
    let choices = choices.iter().map(|choice| {
        let text = choice["text"].as_str().or(choice["message"]["content"].as_str());
        (
            choice["index"].as_u64().expect("an index"),
            (text.expect("a text").to_owned(), choice["finish_reason"].clone()),
        )
    });
    (status, json!(choices.collect::<BTreeMap<_, _>>()))
}

/// The same of a stream's events, whatever chunks they came in.
fn streamed(body: &str) -> Value {
    let events: Vec<_> = body.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
    let (last, events) = events.split_last().expect("events");
    let mut choices = BTreeMap::<u64, (String, Value)>::new();
    for event in events {
        let event: Value = serde_json::from_str(event).expect("JSON events");
        assert!(event["error"].is_null(), "something followed {event}");
        for choice in event["choices"].as_array().expect("choices") {
            let (text, finish) = choices.entry(choice["index"].as_u64().expect("an index")).or_default();
            *text += choice["text"]
                .as_str()
                .or(choice["delta"]["content"].as_str())
                .unwrap_or_default();
            if !choice["finish_reason"].is_null() {
                assert!(finish.is_null(), "a choice ended twice");
                *finish = choice["finish_reason"].clone();
            }
        }
    }
    if *last == "[DONE]" {
        assert!(choices.values().all(|(_, finish)| !finish.is_null()), "{choices:?}");
        return json!(choices);
    }
    let error: Value = serde_json::from_str(last).expect("the last event is [DONE] or an error");
    assert!(!error["error"].is_null(), "{error}");
    json!({"error": error["error"]})
}
