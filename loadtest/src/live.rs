//! The view while a run goes on: one line on standard error, written anew at each sample.

use std::{
    io::{self, IsTerminal, Write},
    time::{Duration, Instant},
};

use crate::{recorder::Recorder, run::Sample};

/// How often a line is written where nobody sees it change.
const LOG_EVERY: Duration = Duration::from_secs(10);

/// The live view of one run after another.
#[derive(Debug)]
pub struct Live {
    label: String,
    terminal: bool,
    last: Option<(f64, u64)>,
    logged: Instant,
}

impl Live {
    pub fn new() -> Self {
        Self {
            label: String::new(),
            terminal: io::stderr().is_terminal(),
            last: None,
            logged: Instant::now(),
        }
    }

    /// Names the run that follows.
    pub fn begin(&mut self, label: &str) {
        self.label = label.to_owned();
        self.last = None;
        self.logged = Instant::now();
    }

    /// Shows the state of the run, of which the share `done` (0 to 1) is behind, where that can be told.
    pub fn show(&mut self, sample: &Sample, done: Option<f64>, recorder: &mut Recorder) {
        let rate = self
            .last
            .replace((sample.seconds, sample.ended))
            .map(|(seconds, ended)| {
                let passed = sample.seconds - seconds;
                if passed > 0.0 {
                    (sample.ended - ended) as f64 / passed
                } else {
                    0.0
                }
            });
        if !self.terminal && self.logged.elapsed() < LOG_EVERY {
            return;
        }
        self.logged = Instant::now();
        let p99 = recorder
            .rolling_p99()
            .map_or("-".to_owned(), |p99| format!("{:.2} s", p99.as_secs_f64()));
        let done = done.map_or(String::new(), |done| format!("{:.0} %, ", 100.0 * done));
        let mut line = format!(
            "{}: {done}{:.0} s, {} sent, {} in flight, {:.1}/s answered, P99 E2E of the last 10 s {p99}, {} failed",
            self.label,
            sample.seconds,
            sample.sent,
            sample.in_flight,
            rate.unwrap_or(0.0),
            recorder.failed(),
        );
        if let Some(waiting) = sample.waiting {
            line += &format!(", {waiting:.0} queued");
        }
        let mut stderr = io::stderr().lock();
        // A closed standard error must not end the run.
        let _ = if self.terminal {
            write!(stderr, "\r\x1b[K{line}").and_then(|()| stderr.flush())
        } else {
            writeln!(stderr, "{line}")
        };
    }

    /// Clears the line.
    pub fn end(&mut self) {
        if self.terminal {
            let _ = write!(io::stderr(), "\r\x1b[K");
        }
    }
}

impl Default for Live {
    fn default() -> Self {
        Self::new()
    }
}
