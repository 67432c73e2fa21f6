//! The engine's recording: a Chrome trace that is well formed and tells the same as the answers it saw.

mod common;

use std::{collections::HashMap, thread, time::Duration};

use common::{Server, all_at_once, chat};
use serde_json::{Value, json};

/// What an answer's header says in milliseconds.
type Costs = HashMap<&'static str, f64>;

#[test]
fn a_recording_is_well_formed_and_agrees_with_the_answers() {
    let server = Server::start(&["--admin"]);
    let asked = |index: usize| {
        let mut body = chat("Write a poem about the sea.", 2 + index);
        body["ignore_eos"] = json!(true);
        let response = server.post("/v1/chat/completions", &body);
        let header = |name: &str| response.headers()[name].to_str().expect("text").to_owned();
        let costs = ["queue", "window", "prefill", "decode"].map(|phase| {
            (
                phase,
                header(&format!("x-sconce-{phase}-ms")).parse().expect("a number"),
            )
        });
        (header("x-request-id"), Costs::from(costs))
    };
    // How long six answers take depends on the machine.
    for seconds in [3, 12, 48] {
        let (recorded, answers) = std::thread::scope(|scope| {
            let recording = scope.spawn(|| record(&server, seconds));
            one_at_a_time(&server);
            let answers = all_at_once((0..6).map(|index| move || asked(index)).collect());
            (recording.join().expect("a trace"), answers)
        });
        if told_the_same(&recorded, answers) == 6 {
            return;
        }
    }
    panic!("six requests took more than 48 s");
}

/// A recording of so long. Another one that is under way comes first.
fn record(server: &Server, seconds: u64) -> String {
    loop {
        let response = server.get(&format!("/debug/trace?seconds={seconds}"));
        if response.status() != 409 {
            return response.text().expect("the trace");
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// Returns once another's recording is under way, which refuses this one.
fn one_at_a_time(server: &Server) {
    server.wait_until("it records", Duration::from_secs(60), || {
        // The other one may begin after this and wait for its end.
        thread::sleep(Duration::from_millis(100));
        server.get("/debug/trace?seconds=0.1").status() == 409
    });
}

/// That a recording is well formed and agrees with the answers of the requests that ended in it; gives how many did.
fn told_the_same(recorded: &str, answers: Vec<(String, Costs)>) -> usize {
    let trace: Value = serde_json::from_str(recorded).expect("JSON");
    assert_eq!(trace["otherData"]["lost_notes"], 0);
    assert!(!recorded.contains("poem"), "no text of a prompt");
    let events = trace["traceEvents"].as_array().expect("events");
    steps_follow_one_another(events);
    assert!(
        slices(events, "batch")
            .values()
            .all(|batch| batch.len() == 1 && batch[0].args["requests"].as_u64() > Some(0))
    );
    let requests = slices(events, "request");
    let mut ended = 0;
    for (id, costs) in answers {
        let request = requests
            .values()
            .find(|slices| slices[0].args["request_id"] == id.as_str());
        // A slow machine may not be done with all of them when the recording ends, or have begun with all.
        let Some(request) = request else { continue };
        if request[0].args["outcome"] != "running" {
            agrees(request, &costs);
            ended += 1;
        }
    }
    if ended == 6 {
        let steps = events.iter().filter(|event| event["ph"] == "X").count();
        assert!(steps >= 7, "{steps} steps");
        counters_count(events);
    }
    ended
}

/// A nestable slice, opened and closed.
#[derive(Debug)]
struct Slice {
    name: String,
    depth: usize,
    began: f64,
    ended: f64,
    args: Value,
}

/// The slices of each id, in the order in which they open. Each is closed by its own name, within what holds it.
fn slices<'a>(events: &'a [Value], category: &str) -> HashMap<&'a str, Vec<Slice>> {
    let mut all: HashMap<&str, Vec<Slice>> = HashMap::new();
    let mut open: HashMap<&str, Vec<usize>> = HashMap::new();
    let mut now: HashMap<&str, f64> = HashMap::new();
    for event in events.iter().filter(|event| event["cat"] == category) {
        let id = event["id"].as_str().expect("an id");
        let (ts, name) = (
            event["ts"].as_f64().expect("a time"),
            event["name"].as_str().expect("a name"),
        );
        let last = now.insert(id, ts).unwrap_or(0.0);
        assert!(ts >= last, "{event} lies before {last}");
        let (slices, open) = (all.entry(id).or_default(), open.entry(id).or_default());
        match event["ph"].as_str() {
            Some("b") => {
                open.push(slices.len());
                slices.push(Slice {
                    name: name.to_owned(),
                    depth: open.len(),
                    began: ts,
                    ended: f64::NAN,
                    args: event["args"].clone(),
                });
            }
            Some("e") => {
                let slice = &mut slices[open.pop().expect("something open")];
                assert_eq!(slice.name, name);
                slice.ended = ts;
            }
            phase => panic!("{phase:?} in {event}"),
        }
    }
    assert!(open.values().all(Vec::is_empty), "every begin has an end");
    all
}

fn steps_follow_one_another(events: &[Value]) {
    let steps: Vec<_> = events.iter().filter(|event| event["ph"] == "X").collect();
    let mut end = 0.0;
    for step in steps {
        let (ts, duration) = (
            step["ts"].as_f64().expect("a time"),
            step["dur"].as_f64().expect("a duration"),
        );
        assert!(ts >= end && duration > 0.0, "{step} begins before {end}");
        // A sum of two rounded numbers may exceed the next time by less than the clock shows.
        end = ts + duration - 0.001;
        let args = |name: &str| step["args"][name].as_f64().expect("a number");
        assert!(args("rows") >= 1.0 && args("prefill_tokens") + args("decode_tokens") >= args("rows"));
        assert!((args("occupancy") - args("rows") / 100.0).abs() < 1e-9);
    }
}

fn counters_count(events: &[Value]) {
    let of = |name: &str, arg: &str| -> Vec<f64> {
        let counters = events
            .iter()
            .filter(|event| event["ph"] == "C" && event["name"] == name);
        counters
            .map(|event| event["args"][arg].as_f64().expect("a number"))
            .collect()
    };
    let most = |values: Vec<f64>| values.into_iter().fold(0.0, f64::max);
    assert!((1.0..=6.0).contains(&most(of("running", "sequences"))));
    assert!(most(of("KV blocks", "held")) > 0.0);
    assert_eq!(of("waiting", "requests").len(), of("KV blocks", "free").len());
}

/// The phases fill the request one after the other and last as long as its answer says.
fn agrees(request: &[Slice], costs: &Costs) {
    let names: Vec<_> = request.iter().map(|slice| slice.name.as_str()).collect();
    assert_eq!(names, ["request", "queue", "window", "prefill", "decode"]);
    assert_eq!(request[0].args["outcome"], "length");
    assert!(request[1..].iter().all(|phase| phase.depth == 2));
    assert_eq!(request[0].began, request[1].began);
    for pair in request[1..].windows(2) {
        assert_eq!(pair[0].ended, pair[1].began, "{pair:?}");
    }
    assert!(request[4].ended <= request[0].ended);
    for phase in &request[1..] {
        let (told, traced) = (costs[phase.name.as_str()], (phase.ended - phase.began) / 1e3);
        assert!(
            (told - traced).abs() < 0.002,
            "{}: {told} ms in the answer, {traced} ms in the trace",
            phase.name
        );
    }
}
