//! One run, open loop: every session begins at its time, whatever the server does.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicI64, AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use tokio::{
    sync::watch,
    task::{AbortHandle, JoinSet},
    time::MissedTickBehavior,
};

use crate::{
    arrivals::{Arrivals, derived_seed},
    client::{Api, Form, Prompt, Target},
    live::Live,
    pacer::pace,
    recorder::Recorder,
    slo::Slo,
    trace::Message,
    utilisation::{Observer, Utilisation},
    workload::{Content, Session, Sessions, Vocabulary, Workload},
};

/// How often the state of the run and of the server is sampled.
const SAMPLING: Duration = Duration::from_millis(500);
/// The time from now to the first request of a run.
const LEAD: Duration = Duration::from_millis(20);

/// How much is sent.
#[derive(Debug, Clone, PartialEq)]
pub struct Load {
    pub arrivals: Arrivals,
    /// Requests to send; `None`: as many as the duration holds.
    pub requests: Option<u64>,
    /// For how long to send; `None`: until the number is reached or the arrivals end.
    pub duration: Option<Duration>,
    /// For how long requests at the same rate go before those that are measured.
    pub warmup: Duration,
    /// Of arrivals, lengths and pauses, and with `part` of the prompts' words.
    pub seed: u64,
    /// Loads that differ in this alone ask for the same lengths at the same times in other words, so that none finds what
    /// another left in the server's prefix cache.
    pub part: u64,
}

impl Load {
    /// The share, 0 to 1, that is behind `seconds` into the measured part and with so many requests of it sent; `None`
    /// where no end is known. Whatever comes first is the end: the time, the number, or the last arrival.
    pub fn done(&self, seconds: f64, sent: u64) -> Option<f64> {
        let last = match &self.arrivals {
            Arrivals::Steps(steps) => Some(steps.iter().map(|step| step.length).sum()),
            Arrivals::Trace(times) => times.last().copied(),
            _ => None,
        };
        let times = [self.duration, last].into_iter().flatten();
        let by_time = times.map(|length| seconds / length.as_secs_f64().max(1e-9));
        let by_number = self.requests.map(|requests| sent as f64 / requests.max(1) as f64);
        by_time
            .chain(by_number)
            .reduce(f64::max)
            .map(|done| done.clamp(0.0, 1.0))
    }
}

/// Who is asked, and for what.
#[derive(Clone)]
pub struct Asked {
    pub target: Target,
    pub form: Form,
    pub workload: Arc<Workload>,
    pub vocabulary: Arc<Vocabulary>,
}

/// The state of a run at an instant.
#[derive(Debug, Clone, Copy, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Sample {
    /// Seconds from the start of the measured part; below 0 in the warm-up.
    pub seconds: f64,
    /// This and the two below count the requests of the warm-up too.
    pub in_flight: i64,
    pub sent: u64,
    pub ended: u64,
    /// From the server's metrics, where it has them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub waiting: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub running: Option<f64>,
    /// Sequences that ran over the most that may.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub occupancy: Option<f64>,
}

/// What a run gave.
#[derive(Debug)]
pub struct Measured {
    pub recorder: Recorder,
    pub samples: Vec<Sample>,
    pub utilisation: Utilisation,
    pub began: SystemTime,
    /// From the start of the measured part to the end of its last request.
    pub length: Duration,
    /// The run was ended by the user.
    pub interrupted: bool,
    /// The run was ended early because it could no longer keep the SLO.
    pub gave_up: bool,
}

struct Shared {
    asked: Asked,
    start: Instant,
    /// A lock, because every request notes its own end.
    recorder: Mutex<Recorder>,
    in_flight: AtomicI64,
    sent: AtomicU64,
    ended: AtomicU64,
}

impl Shared {
    /// A recorder is whole between any two of its calls, so a panic elsewhere leaves it usable.
    fn recorder(&self) -> MutexGuard<'_, Recorder> {
        self.recorder.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Arrival {
    intended: Instant,
    warm: bool,
    session: Session,
}

/// Runs a load to its end, or until `stop` turns true. `hopeless` ends it as soon as so many requests broke the SLO
/// that it cannot be kept any more.
pub async fn run(
    asked: &Asked,
    load: &Load,
    live: &mut Live,
    stop: &mut watch::Receiver<bool>,
    hopeless: Option<&Slo>,
) -> Measured {
    let start = Instant::now() + LEAD + load.warmup;
    let shared = Arc::new(Shared {
        asked: asked.clone(),
        start,
        recorder: Mutex::new(Recorder::beginning(start)),
        in_flight: AtomicI64::new(0),
        sent: AtomicU64::new(0),
        ended: AtomicU64::new(0),
    });
    let mut observer = Observer::new(asked.target.clone()).await;
    let mut arrivals = pace(schedule(asked, load, start));
    let mut tasks = JoinSet::new();
    let mut samples = Vec::new();
    let mut ticks = tokio::time::interval(SAMPLING);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let (mut all_sent, mut interrupted, mut gave_up) = (false, false, false);
    // The counters of the measured part are taken from where it begins.
    let begin = tokio::time::sleep_until(start.into());
    tokio::pin!(begin);
    let mut begun = false;
    while !(all_sent && tasks.is_empty()) {
        tokio::select! {
            biased;
            arrival = arrivals.recv(), if !all_sent => match arrival {
                Some(arrival) => drop::<AbortHandle>(tasks.spawn(session(shared.clone(), arrival))),
                None => all_sent = true,
            },
            Some(_) = tasks.join_next() => {}
            () = &mut begin, if !begun => {
                begun = true;
                observer.begin();
            }
            _ = ticks.tick() => {
                let sample = sample(&shared, &mut observer);
                let mut recorder = shared.recorder();
                live.show(&sample, load.done(sample.seconds, recorder.sent), &mut recorder);
                drop(recorder);
                samples.push(sample);
                gave_up = hopeless.is_some_and(|slo| is_hopeless(slo, load, &shared.recorder()));
                if gave_up {
                    break;
                }
            }
            _ = stop.changed() => {
                interrupted = true;
                break;
            }
        }
    }
    tasks.shutdown().await;
    let mut recorder = std::mem::replace(&mut *shared.recorder(), Recorder::beginning(start));
    let answered = recorder.records.len() as u64 + recorder.failed();
    recorder.unfinished = recorder.sent.saturating_sub(answered);
    let end = match recorder.last_end {
        Some(end) if !interrupted && !gave_up => end,
        _ => Instant::now(),
    };
    Measured {
        samples,
        utilisation: observer.end().await,
        began: SystemTime::now() - start.elapsed(),
        length: end.saturating_duration_since(start),
        recorder,
        interrupted,
        gave_up,
    }
}

/// The arrivals with their sessions, made as they are asked for.
fn schedule(asked: &Asked, load: &Load, start: Instant) -> impl Iterator<Item = (Instant, Arrival)> + Send + 'static {
    // A session brings several requests, so sessions come at a lower rate.
    let process = match load.arrivals.rate() {
        Some(rate) if !matches!(load.arrivals, Arrivals::Trace(_)) => {
            load.arrivals.at_rate(rate / asked.workload.mean_turns())
        }
        _ => load.arrivals.clone(),
    };
    let (warmup, duration) = (load.warmup, load.duration.unwrap_or(Duration::MAX));
    let warm = process.times(derived_seed(load.seed, 1));
    let warm = warm
        .take_while(move |&time| time < warmup)
        .map(move |time| (start - warmup + time, true));
    let measured = process.times(derived_seed(load.seed, 2));
    let measured = measured
        .take_while(move |&time| time < duration)
        .map(move |time| (start + time, false));
    let mut left = load.requests.unwrap_or(u64::MAX);
    let warm: Vec<_> = if warmup.is_zero() { Vec::new() } else { warm.collect() };
    let mut times = warm.into_iter().chain(measured);
    let mut sessions = Sessions::new(
        asked.workload.clone(),
        asked.vocabulary.clone(),
        derived_seed(load.seed, 3),
        derived_seed(derived_seed(load.seed, 4), load.part),
    );
    std::iter::from_fn(move || {
        if left == 0 {
            return None;
        }
        let (intended, warm) = times.next()?;
        let mut session = sessions.make();
        if !warm {
            session.turns.truncate(left as usize);
            left -= session.turns.len() as u64;
        }
        Some((
            intended,
            Arrival {
                intended,
                warm,
                session,
            },
        ))
    })
}

async fn session(shared: Arc<Shared>, arrival: Arrival) {
    let asked = &shared.asked;
    let mut history = arrival.session.before;
    let mut intended = arrival.intended;
    for (turn, number) in arrival.session.turns.into_iter().zip(1..) {
        if !turn.pause.is_zero() {
            intended = Instant::now() + turn.pause;
            tokio::time::sleep_until(intended.into()).await;
        }
        let prompt = prompt(asked.workload.api, &mut history, turn.content);
        let body = asked.form.body(&prompt, turn.max_tokens);
        shared.in_flight.fetch_add(1, Ordering::Relaxed);
        shared.sent.fetch_add(1, Ordering::Relaxed);
        if !arrival.warm {
            shared.recorder().sent(intended.elapsed());
        }
        let outcome = asked.target.ask(asked.workload.api, body, asked.form.stream).await;
        shared.in_flight.fetch_sub(1, Ordering::Relaxed);
        shared.ended.fetch_add(1, Ordering::Relaxed);
        if !arrival.warm {
            shared.recorder().ended(shared.start, intended, number, &outcome);
        }
        // A session that lost an answer has no history to go on with.
        let Ok(answer) = outcome else { return };
        history.push(Message {
            role: "assistant".to_owned(),
            content: answer.text,
        });
        intended = answer.end;
    }
}

/// Adds the turn to the history and gives what is to be sent.
fn prompt(api: Api, history: &mut Vec<Message>, content: Content) -> Prompt {
    let text = match content {
        Content::Tokens(tokens) => return Prompt::Tokens(tokens),
        Content::Text(text) => text,
    };
    history.push(Message {
        role: "user".to_owned(),
        content: text,
    });
    match api {
        Api::Chat => Prompt::Messages(history.clone()),
        Api::Completions => Prompt::Text(history.iter().map(|message| message.content.as_str()).collect()),
    }
}

fn sample(shared: &Shared, observer: &mut Observer) -> Sample {
    let now = Instant::now();
    let seconds = match now.checked_duration_since(shared.start) {
        Some(after) => after.as_secs_f64(),
        None => -(shared.start - now).as_secs_f64(),
    };
    let gauges = observer.sample();
    Sample {
        seconds,
        in_flight: shared.in_flight.load(Ordering::Relaxed),
        sent: shared.sent.load(Ordering::Relaxed),
        ended: shared.ended.load(Ordering::Relaxed),
        waiting: gauges.waiting,
        running: gauges.running,
        occupancy: gauges.occupancy,
    }
}

/// Have more requests broken a promise than a run of this length may have?
fn is_hopeless(slo: &Slo, load: &Load, recorder: &Recorder) -> bool {
    let planned = match (load.requests, load.duration, load.arrivals.rate()) {
        (Some(requests), _, _) => requests as f64,
        // Twice the mean, as the number of arrivals is random.
        (None, Some(duration), Some(rate)) => 20.0 + 2.0 * rate * duration.as_secs_f64(),
        _ => return false,
    };
    slo.0.iter().any(|target| {
        let broken = recorder.records.iter().filter(|record| !target.kept_by(record)).count() as f64;
        broken + recorder.failed() as f64 > planned * (1.0 - target.percentile / 100.0)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arrivals::Step;

    #[test]
    fn the_end_that_comes_first_says_how_far_a_run_is() {
        let load = |arrivals, requests, seconds: Option<u64>| Load {
            arrivals,
            requests,
            duration: seconds.map(Duration::from_secs),
            warmup: Duration::ZERO,
            seed: 1,
            part: 0,
        };
        let poisson = || Arrivals::Poisson { rate: 1.0 };
        assert_eq!(load(poisson(), None, Some(20)).done(5.0, 3), Some(0.25));
        assert_eq!(load(poisson(), Some(6), Some(20)).done(5.0, 3), Some(0.5));
        assert_eq!(load(poisson(), Some(6), None).done(5.0, 3), Some(0.5));
        assert_eq!(load(poisson(), None, None).done(5.0, 3), None);
        assert_eq!(
            load(poisson(), None, Some(20)).done(-2.0, 0),
            Some(0.0),
            "in the warm-up"
        );
        assert_eq!(
            load(poisson(), None, Some(20)).done(25.0, 0),
            Some(1.0),
            "the last answers"
        );
        let step = |seconds| Step {
            rate: 1.0,
            length: Duration::from_secs(seconds),
        };
        let steps = Arrivals::Steps(vec![step(10), step(30)]);
        assert_eq!(load(steps, None, None).done(10.0, 3), Some(0.25));
        let trace = Arrivals::Trace(vec![Duration::ZERO, Duration::from_secs(8)]);
        assert_eq!(load(trace, None, None).done(2.0, 3), Some(0.25));
    }
}
