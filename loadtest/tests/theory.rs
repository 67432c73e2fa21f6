//! Arrivals against the exponential, latencies of a single-server queue against queueing theory, and a freeze against
//! arithmetic.

mod mock;

use std::{
    ops::Range,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use mock::{Mock, Queue, Reply, drive};
use rand::{SeedableRng, rngs::Xoshiro256PlusPlus};
use rand_distr::{Distribution, Exp};
use sconce_loadtest::{
    arrivals::Arrivals,
    report::{Run, Summary},
    slo::Metric,
};

/// Mean service time of the queues in milliseconds, and their load.
const SERVICE: f64 = 4.0;
const LOAD: f64 = 0.5;
/// A millisecond.
const RATE: f64 = LOAD / SERVICE;
const REQUESTS: u64 = 1500;
/// What HTTP and threads add to a latency on a machine that does nothing else, in milliseconds.
const OVERHEAD: f64 = 1.5;
/// Nothing else holds a request up for as long on such a machine, in milliseconds.
const HELD_UP: f64 = 3.0;
/// How often a run is made that the machine holds up.
const TRIES: usize = 3;

/// A figure in milliseconds, and where it is to lie.
struct Expected {
    what: &'static str,
    found: f64,
    range: Range<f64>,
}

/// What theory says, as far as the sample tells and HTTP lets it.
fn near(what: &'static str, found: f64, theory: f64, sampling_error: f64) -> Expected {
    let range = theory - sampling_error..theory + sampling_error + OVERHEAD;
    Expected { what, found, range }
}

/// The tests of this file would hold each other's threads up, and each counts milliseconds.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Holds the E2E of `requests` requests against what is expected of it. Nothing makes a request faster than it is to
/// be, so the lower bounds hold in every run. A machine that is busy with other things makes requests slower: a run
/// whose own sender was held up is made again. Where every run was, as a thread beside the sender must have seen too,
/// each request may be later by what its sender, its server and its reader were held up at most.
fn judge(arrivals: &Arrivals, requests: u64, server: impl Fn() -> Mock, expected: impl Fn(&Summary) -> Vec<Expected>) {
    let _alone = alone();
    let mut busy = 0.0;
    for _ in 0..TRIES {
        let (measured, held_up) =
            watched(|| drive(&server().asked(Duration::from_secs(60)), arrivals.clone(), requests));
        busy = held_up.max(busy);
        let run = Run::of("theory", None, measured, None);
        assert_eq!((run.requests.answered, run.requests.failed), (requests, 0));
        let latest = run.lateness_ms.as_ref().unwrap().max;
        let later = if latest > HELD_UP {
            latest + 2.0 * held_up.max(latest)
        } else {
            0.0
        };
        let mut slow = false;
        for Expected { what, found, range } in expected(&run.latency_ms[&Metric::E2e]) {
            assert!(found >= range.start, "{what}: {found} is not in {range:?}");
            assert!(
                found < range.end + later,
                "{what}: {found} is not in {range:?}; requests went out {latest} ms late at most, and a thread beside \
                 them was held up for {held_up} ms"
            );
            slow |= found >= range.end;
        }
        if !slow {
            return;
        }
    }
    assert!(
        busy > HELD_UP,
        "every run was slow, and nothing but the sender held it up"
    );
    println!("the machine held every run up");
}

/// What a run gives, and for how many milliseconds at most a thread beside it was held up.
fn watched<T>(run: impl FnOnce() -> T) -> (T, f64) {
    let ended = AtomicBool::new(false);
    thread::scope(|scope| {
        let watch = scope.spawn(|| {
            let mut longest = Duration::ZERO;
            while !ended.load(Ordering::Relaxed) {
                let asleep = Instant::now();
                thread::sleep(Duration::from_millis(1));
                longest = longest.max(asleep.elapsed());
            }
            longest.as_secs_f64() * 1e3 - 1.0
        });
        let given = run();
        ended.store(true, Ordering::Relaxed);
        (given, watch.join().unwrap())
    })
}

fn judge_queue(queue: impl Fn() -> Queue, expected: impl Fn(&Summary) -> Vec<Expected>) {
    let server = || {
        let queue = queue();
        Mock::start(move |index| queue.reply(index))
    };
    let rate = RATE * 1e3;
    judge(&Arrivals::Poisson { rate }, REQUESTS, server, expected);
}

fn milliseconds(ms: f64) -> Duration {
    Duration::from_secs_f64(ms / 1e3)
}

/// The Kolmogorov–Smirnov statistic of the gaps between `times` (seconds): the largest distance between their
/// distribution and the exponential one of this rate, in units of the value that one sample in a hundred exceeds (1.63 by
/// the root of its size; Massey 1951).
fn distance_from_exponential(times: &[f64], rate: f64) -> f64 {
    let mut gaps: Vec<f64> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
    gaps.sort_by(f64::total_cmp);
    let count = gaps.len() as f64;
    let distances = gaps.iter().enumerate().map(|(index, gap)| {
        let theory = 1.0 - (-rate * gap).exp();
        let (before, after) = (index as f64 / count, (index + 1) as f64 / count);
        (theory - before).abs().max((theory - after).abs())
    });
    distances.fold(0.0, f64::max) * count.sqrt() / 1.63
}

#[test]
fn gaps_of_a_poisson_process_are_exponential() {
    let rate = 50.0;
    let distance = |arrivals: Arrivals| {
        let times = arrivals.times(7).take(20_001).map(|time| time.as_secs_f64());
        distance_from_exponential(&times.collect::<Vec<_>>(), rate)
    };
    assert!(distance(Arrivals::Poisson { rate }) < 1.0);
    assert!(distance(Arrivals::Gamma { rate, burstiness: 1.0 }) < 1.0);
    // The test has power: equal gaps and slightly burstier ones do not pass.
    assert!(distance(Arrivals::Constant { rate }) > 1.0);
    assert!(distance(Arrivals::Gamma { rate, burstiness: 0.8 }) > 1.0);
}

// A thread that is held up sends several requests at once, which is no gap of theirs: then once more.
#[test]
fn requests_reach_the_server_with_exponential_gaps() {
    let _alone = alone();
    let rate = 100.0;
    let distance = || {
        let times = Arc::new(Mutex::new(Vec::new()));
        let (seen, began) = (times.clone(), Instant::now());
        let server = Mock::start(move |_| {
            seen.lock().unwrap().push(began.elapsed().as_secs_f64());
            Reply::after(Duration::ZERO)
        });
        drive(&server.asked(Duration::from_secs(60)), Arrivals::Poisson { rate }, 800);
        let mut times = times.lock().unwrap().clone();
        times.sort_by(f64::total_cmp);
        distance_from_exponential(&times, rate)
    };
    let tries = (0..TRIES).map(|_| watched(distance));
    let tries: Vec<(f64, f64)> = tries.take_while(|&(distance, _)| distance >= 1.0).collect();
    assert!(
        tries.len() < TRIES || tries.iter().all(|&(_, held_up)| held_up > HELD_UP),
        "{tries:?}: times the critical value, and for how many milliseconds a thread was held up"
    );
}

// M/M/1: the time in the system is exponential with rate (1 - load) / service. The variance of the mean over n requests
// is load (2 + 5 load - 4 load^2 + load^3) / (1 - load)^4 / n service times squared for the wait (Whitt 1989), and the
// service adds a little. A 99th percentile of correlated values varies about four times as much as the mean.
#[test]
fn exponential_service_gives_what_theory_says_of_m_m_1() {
    let queue = || {
        let random = Mutex::new(Xoshiro256PlusPlus::seed_from_u64(5));
        let times = Exp::new(1.0 / SERVICE).unwrap();
        Queue::new(move |_| milliseconds(times.sample(&mut *random.lock().unwrap())))
    };
    let theory = SERVICE / (1.0 - LOAD);
    let wait = LOAD * (2.0 + 5.0 * LOAD - 4.0 * LOAD.powi(2) + LOAD.powi(3)) / (1.0 - LOAD).powi(4);
    let deviation = SERVICE * ((wait + 1.0) / REQUESTS as f64).sqrt();
    judge_queue(queue, |e2e| {
        vec![
            near("mean", e2e.mean, theory, 3.0 * deviation),
            near("P99", e2e.p99, theory * 100f64.ln(), 3.0 * 4.0 * deviation),
        ]
    });
}

// M/D/1: the mean wait is load / (2 (1 - load)) service times (Pollaczek and Khinchine); the distribution of the wait is
// Erlang's series.
#[test]
fn constant_service_gives_what_theory_says_of_m_d_1() {
    let theory = SERVICE * (1.0 + LOAD / (2.0 * (1.0 - LOAD)));
    // The wait of M/D/1 varies less than half as much as that of M/M/1.
    let deviation = SERVICE * (15.0 / REQUESTS as f64).sqrt();
    let quantile = (0..10_000)
        .map(|step| f64::from(step) * SERVICE / 1000.0)
        .find(|&wait| waits_at_most(wait) >= 0.99)
        .unwrap();
    judge_queue(
        || Queue::new(|_| milliseconds(SERVICE)),
        |e2e| {
            vec![
                near("mean", e2e.mean, theory, 3.0 * deviation),
                near("P99", e2e.p99, quantile + SERVICE, 3.0 * 3.0 * deviation),
            ]
        },
    );
}

/// The share of requests of M/D/1 that wait at most this long (Erlang 1909).
fn waits_at_most(wait: f64) -> f64 {
    let mut sum = 0.0;
    let mut factorial = 1.0;
    for k in 0..=(wait / SERVICE) as i32 {
        factorial *= f64::from(k.max(1));
        let x = RATE * (f64::from(k) * SERVICE - wait);
        sum += x.powi(k) / factorial * (-x).exp();
    }
    (1.0 - LOAD) * sum
}

// A generator that waited for answers would send one request into the freeze and show a P99 of a millisecond. Here the
// 150 requests of the frozen second wait for what is left of it: of 600, the worst 1 % wait for over 0.96 s.
#[test]
fn a_freeze_shows_in_the_latencies_of_all_who_came_meanwhile() {
    let server = || {
        let begin = Mutex::new(None::<Instant>);
        Mock::start(move |_| {
            let began = *begin.lock().unwrap().get_or_insert_with(Instant::now);
            let at = began.elapsed();
            let frozen = Duration::from_secs(1)..Duration::from_secs(2);
            Reply::after(if frozen.contains(&at) {
                frozen.end - at
            } else {
                Duration::ZERO
            })
        })
    };
    let expected = |what, found, range| Expected { what, found, range };
    judge(&Arrivals::Constant { rate: 150.0 }, 600, server, |e2e| {
        vec![
            expected("P99", e2e.p99, 950.0..1100.0),
            expected("P90", e2e.p90, 560.0..720.0),
            expected("P50", e2e.p50, 0.0..50.0),
        ]
    });
}
