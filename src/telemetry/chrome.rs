//! A [`Recording`] in the Trace Event Format, which Perfetto and `chrome://tracing` open.
//!
//! Source: "Trace Event Format" (the Chromium project). Steps are complete events (`X`) on the engine's thread;
//! batches and requests overlap, so they are nestable async events (`b`, `e`) with an id each, and a request's phases
//! lie within it under the same id; counts are counter events (`C`). Times are microseconds.

use std::time::Instant;

use serde_json::{Value, json};

use super::trace::{Batch, Life, Recording, State, Step};

const PROCESS: u64 = 1;
const ENGINE: u64 = 1;

/// The recording as JSON.
pub fn chrome_trace(recording: &Recording) -> String {
    let mut page = Page {
        origin: origin(recording),
        text: String::from("{\"displayTimeUnit\":\"ms\",\"traceEvents\":["),
    };
    page.put(json!({"ph": "M", "name": "process_name", "pid": PROCESS, "tid": 0, "args": {"name": "sconce"}}));
    page.put(
        json!({"ph": "M", "name": "thread_name", "pid": PROCESS, "tid": ENGINE, "args": {"name": "engine steps"}}),
    );
    recording.steps.iter().for_each(|step| page.step(step));
    recording.states.iter().for_each(|state| page.state(state));
    for (index, batch) in recording.batches.iter().enumerate() {
        page.batch(&format!("{index:#x}"), batch);
    }
    for (index, life) in recording.lives.iter().enumerate() {
        page.life(&format!("{index:#x}"), life, recording.ended);
    }
    let other = json!({
        "recorded_from_us": page.micros(recording.began),
        "recorded_until_us": page.micros(recording.ended),
        "lost_notes": recording.lost,
    });
    page.text + "],\"otherData\":" + &other.to_string() + "}"
}

/// The earliest time of the recording: a request may have come before it.
fn origin(recording: &Recording) -> Instant {
    let lives = recording.lives.iter().map(|life| life.arrival);
    let batches = recording.batches.iter().map(|batch| batch.opened);
    let steps = recording.steps.iter().map(|step| step.began);
    lives.chain(batches).chain(steps).fold(recording.began, Instant::min)
}

struct Page {
    origin: Instant,
    /// The document up to here.
    text: String,
}

impl Page {
    fn put(&mut self, event: Value) {
        if !self.text.ends_with('[') {
            self.text.push_str(",\n");
        }
        self.text += &event.to_string();
    }

    fn micros(&self, at: Instant) -> f64 {
        at.saturating_duration_since(self.origin).as_nanos() as f64 / 1e3
    }

    fn step(&mut self, step: &Step) {
        let (began, ended) = (self.micros(step.began), self.micros(step.ended));
        let occupancy = step.rows as f64 / step.max_batch as f64;
        self.put(json!({
            "ph": "X", "name": "step", "cat": "step", "pid": PROCESS, "tid": ENGINE, "ts": began, "dur": ended - began,
            "args": {
                "rows": step.rows, "prefill_tokens": step.prefill_tokens, "decode_tokens": step.decode_tokens,
                "occupancy": occupancy,
            },
        }));
    }

    fn state(&mut self, state: &State) {
        let blocks = json!({
            "held": state.held_blocks, "cached": state.cached_blocks, "free": state.free_blocks,
        });
        let counters = [
            ("waiting", json!({"requests": state.waiting})),
            ("running", json!({"sequences": state.running})),
            ("KV blocks", blocks),
        ];
        let ts = self.micros(state.at);
        for (name, args) in counters {
            self.put(json!({"ph": "C", "name": name, "pid": PROCESS, "tid": 0, "ts": ts, "args": args}));
        }
    }

    fn batch(&mut self, id: &str, batch: &Batch) {
        let args = json!({"requests": batch.requests, "prompt_tokens": batch.prompt_tokens});
        self.slice("batch", id, "batch window", [batch.opened, batch.closed], args, |_| ());
    }

    fn life(&mut self, id: &str, life: &Life, recorded_until: Instant) {
        let (end, outcome) = life.ended.unwrap_or((recorded_until, "running"));
        let args = json!({
            "request_id": life.request, "sequence": life.sequence, "tenant": life.tenant.name, "outcome": outcome,
            "prompt_tokens": life.prompt_tokens, "cached_tokens": life.cached_tokens,
            "completion_tokens": life.generated,
        });
        self.slice("request", id, "request", [life.arrival, end], args, |page| {
            for (name, times) in phases(life, end) {
                page.slice("request", id, name, times, json!({}), |_| ());
            }
        });
    }

    /// A nestable async event from begin to end, with what lies `within`.
    fn slice(
        &mut self,
        category: &str,
        id: &str,
        name: &str,
        [began, ended]: [Instant; 2],
        args: Value,
        within: impl FnOnce(&mut Self),
    ) {
        let edge = |phase: &str, ts: f64| json!({"ph": phase, "cat": category, "id": id, "name": name, "pid": PROCESS, "tid": ENGINE, "ts": ts});
        let mut begin = edge("b", self.micros(began));
        begin["args"] = args;
        self.put(begin);
        within(self);
        self.put(edge("e", self.micros(ended)));
    }
}

/// A sequence's phases in order, the last one open until `end`.
fn phases(life: &Life, end: Instant) -> Vec<(&'static str, [Instant; 2])> {
    let Some((admitted, window)) = life.admitted else {
        return vec![("queue", [life.arrival, end])];
    };
    // A clock's subtraction that cannot fail: the window lies within the wait.
    let closed = admitted.checked_sub(window).unwrap_or(life.arrival).max(life.arrival);
    let first = life.first_token.unwrap_or(end);
    let mut phases = vec![
        ("queue", [life.arrival, closed]),
        ("window", [closed, admitted]),
        ("prefill", [admitted, first]),
    ];
    if let Some(last) = life.last_token {
        let until = if life.ended.is_some() { last } else { end };
        phases.push(("decode", [first, until]));
    }
    phases
}
