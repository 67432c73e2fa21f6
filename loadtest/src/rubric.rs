//! Which loads are run: one, or the rubric's shares of a rate that is given or searched for.

use std::time::{Duration, SystemTime};

use tokio::sync::watch;

use crate::{
    Live,
    report::{Probe, Report, Run, SCHEMA, unix_seconds},
    run::{Asked, Load, run},
    slo::Slo,
    utilisation,
};

/// The rubric's loads, as shares of a target rate.
const OF_TARGET: [f64; 3] = [0.5, 0.8, 1.0];
/// The same where the target is the highest rate that the server holds: one more beyond it.
const OF_HIGHEST: [f64; 4] = [0.5, 0.8, 1.0, 1.2];
/// The highest rate is known when the lowest that broke the SLO is at most this much higher.
const CLOSE: f64 = 1.05;
/// No rate below this is tried.
const LOWEST: f64 = 0.01;
/// How long a server is given to end what is left of a load before the next.
const SETTLING: Duration = Duration::from_secs(60);

/// What is to be measured.
pub struct Plan {
    pub asked: Asked,
    /// In a rubric, its arrivals' rate is where the search begins.
    pub load: Load,
    pub slo: Option<Slo>,
    pub loads: Loads,
    /// How prompt lengths were made.
    pub token_counts: String,
}

/// The loads of a plan.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Loads {
    One,
    /// Shares of this rate.
    Target(f64),
    /// Shares of the highest rate that keeps the SLO.
    Highest,
}

/// Runs a plan; when `stop` turns true, what was measured so far is reported.
pub async fn execute(plan: &Plan, live: &mut Live, stop: &mut watch::Receiver<bool>) -> Report {
    let began = SystemTime::now();
    let mut search = Search::from(plan.load.arrivals.rate().unwrap_or(1.0));
    let mut runs = Vec::new();
    let mut search_unfinished = false;
    let target_rate = match plan.loads {
        Loads::One => {
            let rate = plan.load.arrivals.rate();
            let label = rate.map_or("burst".to_owned(), |rate| format!("{}/s", (rate * 1e3).round() / 1e3));
            runs.extend(measure(plan, &plan.load, &label, None, live, stop).await);
            None
        }
        Loads::Target(rate) => Some(rate),
        Loads::Highest => {
            runs.extend(highest(plan, &mut search, live, stop).await);
            search_unfinished = search.next().is_some();
            search.kept.filter(|_| !search_unfinished)
        }
    };
    let shares: &[f64] = match plan.loads {
        Loads::One => &[],
        Loads::Target(_) => &OF_TARGET,
        Loads::Highest => &OF_HIGHEST,
    };
    for (share, rate) in shares.iter().filter_map(|share| Some((share, target_rate? * share))) {
        let load = part(&plan.load, rate, search.tried.len() + runs.len());
        let label = format!("{:.0} %", share * 100.0);
        let Some(run) = measure(plan, &load, &label, None, live, stop).await else {
            break;
        };
        runs.push(run);
    }
    live.end();
    Report {
        schema: SCHEMA,
        generator: concat!("sconce-loadtest ", env!("CARGO_PKG_VERSION")).to_owned(),
        began: unix_seconds(began),
        url: plan.asked.target.url().to_owned(),
        model: plan.asked.form.model.clone(),
        workload: plan.asked.workload.describe(),
        token_counts: plan.token_counts.clone(),
        arrivals: plan.load.arrivals.describe(),
        stream: plan.asked.form.stream,
        seed: plan.load.seed,
        slo: plan.slo.as_ref().map(Slo::to_string),
        target_rate,
        search: search.tried,
        search_unfinished,
        interrupted: *stop.borrow(),
        runs,
        name: String::new(),
    }
}

/// Runs one load once the server has ended those before it, which `hopeless` may end early; `None` where the user ended it
/// all before it began.
async fn measure(
    plan: &Plan,
    load: &Load,
    label: &str,
    hopeless: Option<&Slo>,
    live: &mut Live,
    stop: &mut watch::Receiver<bool>,
) -> Option<Run> {
    let is_first = load.part == 0;
    let settled = is_first || utilisation::settle(&plan.asked.target, SETTLING, stop).await;
    if *stop.borrow() {
        return None;
    }
    live.begin(label);
    let measured = run(&plan.asked, load, live, stop, hopeless).await;
    Some(Run {
        unsettled: !settled,
        ..Run::of(label, load.arrivals.rate(), measured, plan.slo.as_ref())
    })
}

/// Searches the highest rate that keeps the SLO; gives the run in which the user ended it, if so.
async fn highest(plan: &Plan, search: &mut Search, live: &mut Live, stop: &mut watch::Receiver<bool>) -> Option<Run> {
    while let Some(rate) = search.next() {
        let load = part(&plan.load, rate, search.tried.len());
        let label = format!("search at {rate:.2}/s");
        let run = measure(plan, &load, &label, plan.slo.as_ref(), live, stop).await?;
        if run.interrupted {
            return Some(run);
        }
        search.tell(Probe {
            rate,
            slo_kept: run.slo_kept == Some(true),
            late: run.late,
            failed: run.requests.failed,
            unsettled: run.unsettled,
        });
    }
    None
}

/// The load at another rate, in words that no other part of the plan uses.
fn part(load: &Load, rate: f64, index: usize) -> Load {
    Load {
        arrivals: load.arrivals.at_rate(rate),
        part: index as u64,
        ..load.clone()
    }
}

/// Looks for the highest rate that keeps the SLO: doubles (or halves) until one rate keeps it and another does not, then
/// halves the ratio between the two.
#[derive(Debug)]
struct Search {
    first: f64,
    kept: Option<f64>,
    broken: Option<f64>,
    tried: Vec<Probe>,
}

impl Search {
    fn from(first: f64) -> Self {
        Self {
            first,
            kept: None,
            broken: None,
            tried: Vec::new(),
        }
    }

    /// The rate to try next; `None` when the answer is known.
    fn next(&self) -> Option<f64> {
        match (self.kept, self.broken) {
            (None, None) => Some(self.first),
            (Some(kept), None) => Some(kept * 2.0),
            (None, Some(broken)) => Some(broken / 2.0).filter(|&rate| rate >= LOWEST),
            (Some(kept), Some(broken)) => (broken > kept * CLOSE).then(|| (kept * broken).sqrt()),
        }
    }

    fn tell(&mut self, probe: Probe) {
        self.tried.push(probe);
        *(if probe.slo_kept {
            &mut self.kept
        } else {
            &mut self.broken
        }) = Some(probe.rate);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(first: f64, holds: impl Fn(f64) -> bool) -> (Option<f64>, usize) {
        let mut search = Search::from(first);
        while let Some(rate) = search.next() {
            search.tell(Probe {
                rate,
                slo_kept: holds(rate),
                late: false,
                failed: 0,
                unsettled: false,
            });
        }
        (search.kept, search.tried.len())
    }

    #[test]
    fn the_highest_rate_is_found_within_five_per_cent() {
        for capacity in [0.03, 0.9, 1.0, 7.3, 1234.0] {
            for first in [0.5, 1.0, 40.0] {
                let (found, tried) = find(first, |rate| rate <= capacity);
                let found = found.unwrap();
                assert!(found <= capacity && capacity < found * CLOSE, "{capacity} {found}");
                assert!(tried <= 25, "{tried}");
            }
        }
    }

    #[test]
    fn a_server_that_never_keeps_it_ends_the_search() {
        assert_eq!(find(4.0, |_| false), (None, 9));
    }
}
