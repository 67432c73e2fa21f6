//! Where a tuner looks next, what it found, and what it recommends. Pure: running an experiment is the caller's.
//!
//! The search begins with the schedules at four windows, then walks from setting to neighbouring setting, and from load
//! to neighbouring load, along the Pareto front of goodput against P99, and so spends its experiments where the front is.

mod page;
pub mod schedules;

pub use page::{figure, page, table};

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::report::{
    Run,
    remarks::of_run,
    table::{milliseconds, short},
};

const SCHEDULES: [&str; 3] = ["sequential", "dynamic", "continuous"];
const POLICIES: [&str; 3] = ["none", "adaptive", "fixed"];
const WINDOWS_MS: [f64; 5] = [0.0, 5.0, 20.0, 50.0, 100.0];
const MAX_BATCHES: [usize; 6] = [4, 8, 16, 32, 64, 100];
const STEP_TOKENS: [usize; 5] = [128, 256, 512, 1024, 2048];
/// Goodputs that differ by less than this share are alike, and the P99 decides.
const ALIKE: f64 = 0.03;

/// The settings that can change while the server runs, as its admin route writes them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Knobs {
    pub schedule: String,
    pub window_policy: String,
    pub batch_window_ms: f64,
    pub max_batch: usize,
    pub step_tokens: usize,
}

/// What one experiment tries: settings under a load.
#[derive(Debug, Clone, PartialEq)]
pub struct Trial {
    pub knobs: Knobs,
    /// Requests a second.
    pub rate: f64,
}

impl fmt::Display for Trial {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Trial { knobs, rate } = self;
        write!(f, "{} with window {} at {rate}/s", knobs.schedule, window(knobs))
    }
}

/// One experiment.
#[derive(Debug, Clone, PartialEq)]
pub struct Experiment {
    /// The settings as the server has them in force, and the load.
    pub trial: Trial,
    /// Requests a second that kept the SLO.
    pub goodput: f64,
    /// Of E2E; absent where nothing was answered.
    pub p99_ms: Option<f64>,
    pub run: Run,
}

impl Experiment {
    pub fn of(trial: Trial, run: Run) -> Self {
        Self {
            trial,
            goodput: run.goodput.unwrap_or(0.0),
            p99_ms: run.latency_ms.get(&crate::slo::Metric::E2e).map(|summary| summary.p99),
            run,
        }
    }

    fn p99(&self) -> f64 {
        self.p99_ms.unwrap_or(f64::INFINITY)
    }

    /// A lower P99 at a goodput that is alike, or a higher goodput at the same P99.
    fn dominates(&self, other: &Experiment) -> bool {
        let faster = self.p99() < other.p99() && self.goodput >= other.goodput * (1.0 - ALIKE);
        faster || (self.p99() == other.p99() && self.goodput > other.goodput)
    }
}

/// What a reader must know of the experiments, numbered in their order, before believing the figures.
pub fn remarks(experiments: &[Experiment]) -> Vec<String> {
    let of = |(number, one): (usize, &Experiment)| of_run(&format!("experiment {number}, {}", one.trial), &one.run);
    (1..).zip(experiments).flat_map(of).collect()
}

/// A search and what it has found so far.
#[derive(Debug)]
pub struct Search {
    start: Knobs,
    /// Ascending.
    rates: Vec<f64>,
    budget: usize,
    pub tried: Vec<Experiment>,
}

impl Search {
    /// A search from a server's settings, of at most `budget` experiments at some of these rates.
    pub fn new(start: Knobs, rates: &[f64], budget: usize) -> Self {
        let mut rates = rates.to_vec();
        rates.sort_by(f64::total_cmp);
        Self {
            start,
            rates,
            budget,
            tried: Vec::new(),
        }
    }

    /// What to try next; `None` when the budget is spent or the front has no untried neighbours.
    pub fn next(&self) -> Option<Trial> {
        if self.tried.len() >= self.budget {
            return None;
        }
        let opening = self.opening();
        let around = self
            .front()
            .into_iter()
            .flat_map(|experiment| self.neighbours(&experiment.trial));
        opening.into_iter().chain(around).find(|trial| !self.was_tried(trial))
    }

    pub fn tell(&mut self, experiment: Experiment) {
        self.tried.push(experiment);
    }

    fn was_tried(&self, trial: &Trial) -> bool {
        let as_tried = |tried: &Trial| tried.rate == trial.rate && same(&tried.knobs, &trial.knobs);
        self.tried.iter().any(|experiment| as_tried(&experiment.trial))
    }

    /// The server's settings as they are and the schedules with their windows, under the middle load.
    fn opening(&self) -> Vec<Trial> {
        let Some(&rate) = self.rates.get(self.rates.len() / 2) else {
            return Vec::new();
        };
        let knobs = std::iter::once(self.start.clone()).chain(schedules::settings(&self.start));
        knobs.map(|knobs| Trial { knobs, rate }).collect()
    }

    /// The same settings under the loads beside this one, then those beside these under the same load.
    fn neighbours(&self, trial: &Trial) -> Vec<Trial> {
        let rates = beside(&self.rates, trial.rate)
            .into_iter()
            .map(|rate| Trial { rate, ..trial.clone() });
        let knobs = neighbours(&trial.knobs)
            .into_iter()
            .map(|knobs| Trial { knobs, ..trial.clone() });
        rates.chain(knobs).collect()
    }

    /// The experiments that no other dominates, the highest goodput first.
    pub fn front(&self) -> Vec<&Experiment> {
        let undominated = |one: &&Experiment| !self.tried.iter().any(|other| other.dominates(one));
        let mut front: Vec<&Experiment> = self.tried.iter().filter(undominated).collect();
        front.sort_by(|a, b| b.goodput.total_cmp(&a.goodput));
        front
    }

    /// Of those on the front whose goodput is alike its highest, the one with the lowest P99.
    pub fn best(&self) -> Option<&Experiment> {
        let front = self.front();
        let highest = front.first()?.goodput;
        let good = front
            .into_iter()
            .filter(|experiment| experiment.goodput >= highest * (1.0 - ALIKE));
        good.min_by(|a, b| a.p99().total_cmp(&b.p99()))
    }

    /// What each other tried value of one setting alone, or another load, would have given; where none was tried alone,
    /// what those did that differ in the fewest.
    pub fn reasons(&self) -> Vec<String> {
        let Some(best) = self.best() else { return Vec::new() };
        let changed = self
            .tried
            .iter()
            .map(|other| (other, changes(&best.trial, &other.trial)));
        let changed: Vec<_> = changed.filter(|(_, changes)| !changes.is_empty()).collect();
        let fewest = changed.iter().map(|(_, changes)| changes.len()).min();
        let nearest = changed.into_iter().filter(|(_, changes)| Some(changes.len()) == fewest);
        let reason = |(other, changes): (&Experiment, Vec<String>)| {
            format!(
                "{} gave goodput {} instead of {}, P99 {} instead of {}",
                changes.join(", "),
                short(other.goodput),
                short(best.goodput),
                milliseconds(other.p99()),
                milliseconds(best.p99()),
            )
        };
        nearest.map(reason).collect()
    }
}

/// Settings that the server would not tell apart: without batches or with policy `none` there is no window.
fn same(a: &Knobs, b: &Knobs) -> bool {
    let plain = |knobs: &Knobs| {
        let mut knobs = knobs.clone();
        if knobs.schedule == "sequential" {
            knobs.max_batch = 1;
            knobs.window_policy = "none".to_owned();
        }
        if knobs.window_policy == "none" || knobs.batch_window_ms == 0.0 {
            knobs.window_policy = "none".to_owned();
            knobs.batch_window_ms = 0.0;
        }
        knobs
    };
    plain(a) == plain(b)
}

/// The settings one step away along one axis.
fn neighbours(knobs: &Knobs) -> Vec<Knobs> {
    let with = |change: &dyn Fn(&mut Knobs)| {
        let mut changed = knobs.clone();
        change(&mut changed);
        changed
    };
    let mut found = Vec::new();
    for value in beside(&MAX_BATCHES, knobs.max_batch) {
        found.push(with(&|knobs| knobs.max_batch = value));
    }
    for value in beside(&STEP_TOKENS, knobs.step_tokens) {
        found.push(with(&|knobs| knobs.step_tokens = value));
    }
    for value in beside(&WINDOWS_MS, knobs.batch_window_ms) {
        found.push(with(&|knobs| knobs.batch_window_ms = value));
    }
    for value in POLICIES {
        found.push(with(&|knobs| knobs.window_policy = value.to_owned()));
    }
    for value in SCHEDULES {
        found.push(with(&|knobs| knobs.schedule = value.to_owned()));
    }
    found.retain(|other| other != knobs);
    found
}

/// The values of an axis just below and above this one.
fn beside<T: PartialOrd + Copy>(axis: &[T], value: T) -> Vec<T> {
    let below = axis.iter().rev().find(|&&other| other < value);
    let above = axis.iter().find(|&&other| other > value);
    below.into_iter().chain(above).copied().collect()
}

/// How the second differs from the first.
fn changes(from: &Trial, to: &Trial) -> Vec<String> {
    let rates = [from.rate, to.rate].map(short);
    let (from, to) = (&from.knobs, &to.knobs);
    let mut changes = Vec::new();
    let mut change = |name: &str, from: String, to: String| {
        if from != to {
            changes.push(format!("{name} {to} instead of {from}"));
        }
    };
    let [from_rate, to_rate] = rates;
    change("a load of", from_rate, to_rate);
    change("schedule", from.schedule.clone(), to.schedule.clone());
    change("window-policy", from.window_policy.clone(), to.window_policy.clone());
    change("batch-window", window(from), window(to));
    change("max-batch", from.max_batch.to_string(), to.max_batch.to_string());
    change("step-tokens", from.step_tokens.to_string(), to.step_tokens.to_string());
    changes
}

fn window(knobs: &Knobs) -> String {
    format!("{}ms", knobs.batch_window_ms)
}

/// The settings as a file that `serve --config` takes.
pub fn toml(knobs: &Knobs) -> String {
    format!(
        "schedule = \"{}\"\nwindow-policy = \"{}\"\nbatch-window = \"{}\"\nmax-batch = {}\nstep-tokens = {}\n",
        knobs.schedule,
        knobs.window_policy,
        window(knobs),
        knobs.max_batch,
        knobs.step_tokens
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{Summary, tests::run};

    pub(super) fn start() -> Knobs {
        Knobs {
            schedule: "continuous".to_owned(),
            window_policy: "adaptive".to_owned(),
            batch_window_ms: 20.0,
            max_batch: 100,
            step_tokens: 512,
        }
    }

    pub(super) fn experiment(knobs: Knobs, goodput: f64, p99_ms: f64) -> Experiment {
        Experiment {
            trial: Trial { knobs, rate: 2.0 },
            goodput,
            p99_ms: Some(p99_ms),
            run: run("experiment", goodput),
        }
    }

    /// A made-up server: continuous is best, smaller windows and a step budget of 256 lower the P99.
    fn respond(Trial { knobs, rate }: &Trial) -> (f64, f64) {
        let most: f64 = match knobs.schedule.as_str() {
            "continuous" => 10.0,
            "dynamic" => 6.0,
            _ => 2.0,
        };
        let goodput = most.min(*rate);
        let window = if knobs.window_policy == "none" {
            0.0
        } else {
            knobs.batch_window_ms
        };
        let p99 =
            500.0 * rate + window + (knobs.step_tokens as f64 - 256.0).abs() + knobs.max_batch.abs_diff(32) as f64;
        (goodput, p99)
    }

    fn search(budget: usize) -> Search {
        let mut search = Search::new(start(), &[6.0, 12.0], budget);
        while let Some(trial) = search.next() {
            let (goodput, p99) = respond(&trial);
            let mut told = experiment(trial.knobs.clone(), goodput, p99);
            told.trial = trial;
            search.tell(told);
        }
        search
    }

    #[test]
    fn the_search_climbs_to_the_best_settings() {
        let search = search(40);
        let Trial { knobs: best, rate } = &search.best().unwrap().trial;
        assert_eq!(*rate, 12.0);
        assert_eq!(
            (best.schedule.as_str(), best.step_tokens, best.max_batch),
            ("continuous", 256, 32)
        );
        assert!(best.window_policy == "none" || best.batch_window_ms == 0.0, "{best:?}");
        assert!(search.tried.len() <= 40);
        let lower = |one: &&Experiment| one.trial.rate == 6.0;
        assert!(
            search.front().into_iter().any(|one| lower(&one)),
            "a lower load has a lower P99"
        );
        assert!(!search.reasons().is_empty());
    }

    #[test]
    fn the_opening_compares_schedules_and_windows() {
        let search = search(10);
        for schedule in ["dynamic", "continuous"] {
            let of = search
                .tried
                .iter()
                .filter(|one| one.trial.knobs.schedule == schedule && one.trial.knobs.window_policy == "fixed");
            let mut windows: Vec<f64> = of.map(|one| one.trial.knobs.batch_window_ms).collect();
            windows.sort_by(f64::total_cmp);
            assert_eq!(windows, schedules::WINDOWS_MS);
        }
        assert_eq!(
            search
                .tried
                .iter()
                .filter(|one| one.trial.knobs.schedule == "sequential")
                .count(),
            1
        );
    }

    #[test]
    fn nothing_is_tried_twice_and_the_front_is_undominated() {
        let search = search(60);
        for (index, one) in search.tried.iter().enumerate() {
            assert!(
                !search.tried[..index]
                    .iter()
                    .any(|other| one.trial.rate == other.trial.rate && same(&one.trial.knobs, &other.trial.knobs)),
                "{:?}",
                one.trial
            );
        }
        let front = search.front();
        assert!(
            !front
                .iter()
                .any(|one| search.tried.iter().any(|other| other.dominates(one)))
        );
        assert!(page(&search).contains("<svg"));
    }

    #[test]
    fn what_is_recommended_is_on_the_front_and_has_a_reason() {
        let mut search = Search::new(start(), &[2.0], 3);
        let knobs = |max_batch, step_tokens| Knobs {
            max_batch,
            step_tokens,
            ..start()
        };
        // Each is alike the one before it, the last is not alike the first.
        search.tell(experiment(start(), 1.0, 1000.0));
        search.tell(experiment(knobs(32, 256), 0.975, 900.0));
        search.tell(experiment(knobs(16, 128), 0.95, 800.0));
        let best = search.best().unwrap();
        assert!(
            search.front().iter().any(|one| std::ptr::eq(*one, best)),
            "{:?}",
            best.trial
        );
        assert_eq!(best.trial.knobs, knobs(16, 128));
        assert_eq!(
            search.reasons(),
            [
                "max-batch 100 instead of 16, step-tokens 512 instead of 128 gave goodput 1.00 instead of 0.95, \
                 P99 1.00 s instead of 800 ms",
                "max-batch 32 instead of 16, step-tokens 256 instead of 128 gave goodput 0.97 instead of 0.95, \
                 P99 900 ms instead of 800 ms",
            ]
        );
        // One that differs in one setting alone says more.
        search.tell(experiment(knobs(16, 256), 0.9, 850.0));
        let reasons = search.reasons();
        assert!(
            reasons.len() == 1 && reasons[0].starts_with("step-tokens 256 instead of 128 gave"),
            "{reasons:?}"
        );
    }

    #[test]
    fn a_late_generator_and_failures_are_told_of_each_experiment() {
        let mut search = Search::new(start(), &[2.0], 3);
        for _ in 0..3 {
            search.tell(experiment(start(), 1.0, 900.0));
        }
        search.tried[1].run.late = true;
        search.tried[1].run.lateness_ms = Some(Summary::default());
        search.tried[2].run.requests.errors = [("timed_out".to_owned(), 4)].into();
        let remarks = remarks(&search.tried);
        let [late, failed] = &remarks[..] else {
            panic!("{remarks:?}");
        };
        assert!(
            late.starts_with("experiment 2, continuous with window 20ms at 2/s: the generator"),
            "{late}"
        );
        assert!(
            failed.starts_with("experiment 3, ") && failed.ends_with("4 timed_out"),
            "{failed}"
        );
        for page in [page(&search), schedules::page(&search.tried)] {
            assert!(page.contains(failed), "{page}");
        }
    }

    #[test]
    fn failed_experiments_are_never_recommended() {
        let mut search = Search::new(start(), &[2.0], 2);
        search.tell(experiment(start(), 1.0, 900.0));
        let mut broken = experiment(
            Knobs {
                max_batch: 4,
                ..start()
            },
            0.0,
            0.0,
        );
        broken.p99_ms = None;
        search.tell(broken);
        assert_eq!(search.best().unwrap().trial.knobs, start());
        assert_eq!(search.front().len(), 1);
    }
}
