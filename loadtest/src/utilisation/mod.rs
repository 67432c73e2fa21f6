//! What the server did with its time during a run: from its `/metrics`, its process, and the GPU.
//!
//! A background task scrapes, so that a slow metrics page holds up nothing. What cannot be had is absent.

mod gpu;
mod process;
mod scrape;

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::{sync::watch, task::JoinHandle};

use crate::client::Target;
use gpu::Gpu;
use process::Process;
use scrape::Page;

/// How often the server is asked. Gauges are means over these samples.
const SCRAPING: Duration = Duration::from_millis(500);

/// Shares are from 0 to 1, times in milliseconds, memory in bytes; all over the measured part of a run.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Utilisation {
    /// Share of wall time in which the device ran a step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub busy: Option<f64>,
    /// Sequences in a step over the most allowed, mean over steps; over time where a server does not count steps.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub occupancy: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queue_depth_mean: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queue_depth_max: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub running_mean: Option<f64>,
    /// Prompt positions that would be padding in a padded layout.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub padding_waste: Option<f64>,
    /// Share of the KV blocks that sequences held, mean.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kv_use: Option<f64>,
    /// Share of prompt tokens found in the prefix cache.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prefix_hits: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub preemptions: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub window_wait_mean_ms: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queue_wait_mean_ms: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub step_mean_ms: Option<f64>,
    /// CPU seconds a second of the server's process and its children.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_cores: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_max_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gpu: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gpu_memory_max_bytes: Option<u64>,
}

/// Gauges at an instant.
#[derive(Debug, Clone, Copy, Default)]
pub struct Gauges {
    pub waiting: Option<f64>,
    pub running: Option<f64>,
    pub occupancy: Option<f64>,
    pub kv_use: Option<f64>,
}

/// What was seen since the measured part began.
#[derive(Debug, Default)]
struct Seen {
    /// The page and the processor time at the beginning, and now: of the moments at which a page came, where one did.
    first: Option<Moment>,
    last: Option<Moment>,
    gauges: Vec<Gauges>,
    memory: u64,
    gpu: Vec<(f64, u64)>,
}

#[derive(Debug, Clone)]
struct Moment {
    at: tokio::time::Instant,
    page: Page,
    cpu: Option<f64>,
}

/// Watches the server from a task of its own.
pub struct Observer {
    target: Target,
    process: Option<Process>,
    /// Opened once: that takes a while, and the measured part begins on time.
    gpu: Option<Arc<Gpu>>,
    /// A lock, because what the task saw is wanted when it is aborted.
    seen: Arc<Mutex<Seen>>,
    task: JoinHandle<()>,
}

impl Observer {
    /// Begins to watch.
    pub async fn new(target: Target) -> Self {
        let seen = Arc::new(Mutex::new(Seen::default()));
        let process = Process::of(target.url());
        let gpu = process.as_ref().and_then(|_| Gpu::open()).map(Arc::new);
        let task = tokio::spawn(watch(target.clone(), process.clone(), gpu.clone(), seen.clone()));
        Self {
            target,
            process,
            gpu,
            seen,
            task,
        }
    }

    /// The measured part begins now: what was seen before is dropped.
    pub fn begin(&mut self) {
        self.task.abort();
        // The task may be in the middle of a look, which it notes where nobody reads it.
        self.seen = Arc::default();
        let (target, process, gpu) = (self.target.clone(), self.process.clone(), self.gpu.clone());
        self.task = tokio::spawn(watch(target, process, gpu, self.seen.clone()));
    }

    /// The gauges as they were last read.
    pub fn sample(&mut self) -> Gauges {
        lock(&self.seen).gauges.last().copied().unwrap_or_default()
    }

    /// Looks a last time and sums up.
    pub async fn end(self) -> Utilisation {
        self.task.abort();
        let last = moment(&self.target, self.process.as_ref()).await;
        let mut seen = std::mem::take(&mut *lock(&self.seen));
        seen.look(last);
        seen.sum_up()
    }
}

fn lock(seen: &Mutex<Seen>) -> std::sync::MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn watch(target: Target, process: Option<Process>, gpu: Option<Arc<Gpu>>, seen: Arc<Mutex<Seen>>) {
    let mut ticks = tokio::time::interval(SCRAPING);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    loop {
        ticks.tick().await;
        let now = moment(&target, process.as_ref()).await;
        let memory = process
            .as_ref()
            .and_then(Process::memory)
            .or(now.page.memory())
            .unwrap_or(0);
        // A page that could not be had does not make it another server.
        let before = lock(&seen).first.as_ref().is_some_and(|first| first.page.is_sconces());
        let device = match before || now.page.is_sconces() {
            true => now.page.gpu(),
            false => gpu.as_ref().and_then(|gpu| gpu.read()),
        };
        let mut seen = lock(&seen);
        seen.gauges.push(now.page.gauges());
        seen.memory = seen.memory.max(memory);
        seen.gpu.extend(device);
        seen.look(now);
    }
}

/// A page; empty where there is none.
async fn text(target: &Target, path: &str) -> String {
    match target.get(path).await {
        Ok(response) if response.status().is_success() => response.text().await.unwrap_or_default(),
        _ => String::new(),
    }
}

async fn moment(target: &Target, process: Option<&Process>) -> Moment {
    let mut page = Page::read(&text(target, "/metrics").await);
    if page.is_empty() {
        page = Page::of_slots(&text(target, "/slots").await);
    }
    Moment {
        at: tokio::time::Instant::now(),
        cpu: process.and_then(Process::cpu_seconds).or(page.cpu_seconds()),
        page,
    }
}

impl Seen {
    /// A page that did not come tells nothing: counters have not been 0 for that.
    fn look(&mut self, now: Moment) {
        let silent = |moment: &Option<Moment>| moment.as_ref().is_none_or(|moment| moment.page.is_empty());
        if self.first.is_none() || (silent(&self.first) && !now.page.is_empty()) {
            self.first = Some(now.clone());
        }
        if silent(&self.last) || !now.page.is_empty() {
            self.last = Some(now);
        }
    }

    fn sum_up(self) -> Utilisation {
        let (Some(first), Some(last)) = (&self.first, &self.last) else {
            return Utilisation::default();
        };
        let seconds = (last.at - first.at).as_secs_f64();
        let mean = |pick: fn(&Gauges) -> Option<f64>| {
            let values: Vec<f64> = self.gauges.iter().filter_map(pick).collect();
            (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
        };
        let mut utilisation = Utilisation::default();
        // Of a single moment nothing can be said but how it was.
        if seconds > 0.0 {
            utilisation = scrape::between(&first.page, &last.page, seconds);
            utilisation.cpu_cores = last.cpu.zip(first.cpu).map(|(last, first)| (last - first) / seconds);
        }
        utilisation.queue_depth_mean = mean(|gauges| gauges.waiting);
        utilisation.queue_depth_max = self.gauges.iter().filter_map(|gauges| gauges.waiting).reduce(f64::max);
        utilisation.occupancy = utilisation.occupancy.or_else(|| mean(|gauges| gauges.occupancy));
        utilisation.running_mean = mean(|gauges| gauges.running);
        utilisation.kv_use = mean(|gauges| gauges.kv_use);
        utilisation.memory_max_bytes = (self.memory > 0).then_some(self.memory);
        utilisation.gpu = (!self.gpu.is_empty())
            .then(|| self.gpu.iter().map(|(share, _)| share).sum::<f64>() / self.gpu.len() as f64);
        utilisation.gpu_memory_max_bytes = self.gpu.iter().map(|&(_, memory)| memory).max();
        utilisation
    }
}

/// Waits until the server says that nothing waits or runs, at most so long, or until `stop` turns true; a moment where it
/// says nothing of it. False where something still does after that time.
pub async fn settle(target: &Target, most: Duration, stop: &mut watch::Receiver<bool>) -> bool {
    let deadline = tokio::time::Instant::now() + most;
    loop {
        tokio::select! {
            () = tokio::time::sleep(SCRAPING) => {}
            () = stopped(stop) => return true,
        }
        let gauges = moment(target, None).await.page.gauges();
        let left = gauges.waiting.unwrap_or(0.0) + gauges.running.unwrap_or(0.0);
        if left == 0.0 || tokio::time::Instant::now() > deadline {
            return left == 0.0;
        }
    }
}

/// Completes when `stop` turns true; never where nobody can turn it any more.
async fn stopped(stop: &mut watch::Receiver<bool>) {
    let nobody_left = stop.wait_for(|&stop| stop).await.is_err();
    if nobody_left {
        std::future::pending().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A page that came so many seconds after a beginning, and as many seconds of processor time.
    fn moment(begun: tokio::time::Instant, seconds: u64, text: &str) -> Moment {
        Moment {
            at: begun + Duration::from_secs(seconds),
            page: Page::read(text),
            cpu: Some(seconds as f64),
        }
    }

    #[test]
    fn a_page_that_did_not_come_is_not_one_of_zeros() {
        let begun = tokio::time::Instant::now();
        let sum_up = |pages: &[(u64, &str)]| {
            let mut seen = Seen::default();
            for &(seconds, text) in pages {
                seen.look(moment(begun, seconds, text));
            }
            seen.sum_up()
        };
        let busy = |pages: &[(u64, &str)]| sum_up(pages).busy;
        let (ninety, ninety_four) = ("sconce_busy_seconds_total 90", "sconce_busy_seconds_total 94");
        assert_eq!(busy(&[(0, ""), (1, ninety), (9, ninety_four)]), Some(0.5));
        assert_eq!(busy(&[(0, ninety), (8, ninety_four), (9, "")]), Some(0.5));
        assert_eq!(
            busy(&[(0, ""), (9, ninety)]),
            None,
            "one page has nothing between it and itself"
        );
        let silent = sum_up(&[(0, ""), (9, "")]);
        assert_eq!((silent.busy, silent.cpu_cores), (None, Some(1.0)));
    }

    #[test]
    fn what_a_gpu_does_not_tell_is_absent() {
        let begun = tokio::time::Instant::now();
        let page = |seconds| moment(begun, seconds, "sconce_running 1\n");
        let fields = |gpu| {
            let seen = Seen {
                first: Some(page(1)),
                last: Some(page(2)),
                gpu,
                ..Seen::default()
            };
            let report = serde_json::to_value(seen.sum_up()).unwrap();
            ["cpu_cores", "gpu", "gpu_memory_max_bytes"].map(|field| report.get(field).is_some())
        };
        assert_eq!(fields(vec![(0.5, 10), (1.0, 30)]), [true; 3]);
        assert_eq!(fields(Vec::new()), [true, false, false]);
    }
}
