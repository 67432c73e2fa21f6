//! Latencies of a single-server queue against queueing theory, and a freeze against arithmetic.

mod mock;

use std::{
    sync::Mutex,
    time::{Duration, Instant},
};

use mock::{Mock, Queue, Reply, drive};
use rand::{SeedableRng, rngs::Xoshiro256PlusPlus};
use rand_distr::{Distribution, Exp};
use sconce_loadtest::{arrivals::Arrivals, report::Run};

/// Mean service time in seconds and load of the queues.
const SERVICE: f64 = 0.006;
const LOAD: f64 = 0.5;
const RATE: f64 = LOAD / SERVICE;
const REQUESTS: u64 = 1500;
/// What HTTP, threads and a busy machine add to a latency, in seconds.
const OVERHEAD: f64 = 0.0015;

/// Mean and 99th percentile of E2E in seconds.
fn measure(queue: Queue) -> (f64, f64) {
    let server = Mock::start(move |index| queue.reply(index));
    let measured = drive(
        &server.asked(Duration::from_secs(10)),
        Arrivals::Poisson { rate: RATE },
        REQUESTS,
    );
    let run = Run::of("queue", Some(RATE), measured, None);
    assert_eq!((run.requests.answered, run.requests.failed), (REQUESTS, 0));
    let e2e = &run.latency_ms[&sconce_loadtest::slo::Metric::E2e];
    (e2e.mean / 1e3, e2e.p99 / 1e3)
}

fn near(what: &str, found: f64, theory: f64, sampling_error: f64) {
    let (low, high) = (theory - sampling_error, theory + sampling_error + OVERHEAD);
    assert!((low..high).contains(&found), "{what}: {found} is not in {low}..{high}");
}

// M/M/1: the time in the system is exponential with rate (1 - load) / service. The variance of the mean over n requests
// is load (2 + 5 load - 4 load^2 + load^3) / (1 - load)^4 / n service times squared for the wait (Whitt 1989), and the
// service adds a little. A 99th percentile of correlated values varies about four times as much as the mean.
#[test]
fn exponential_service_gives_what_theory_says_of_m_m_1() {
    let random = Mutex::new(Xoshiro256PlusPlus::seed_from_u64(5));
    let times = Exp::new(1.0 / SERVICE).unwrap();
    let queue = Queue::new(move |_| Duration::from_secs_f64(times.sample(&mut *random.lock().unwrap())));
    let (mean, p99) = measure(queue);
    let theory = SERVICE / (1.0 - LOAD);
    let wait = LOAD * (2.0 + 5.0 * LOAD - 4.0 * LOAD.powi(2) + LOAD.powi(3)) / (1.0 - LOAD).powi(4);
    let deviation = SERVICE * ((wait + 1.0) / REQUESTS as f64).sqrt();
    near("mean", mean, theory, 3.0 * deviation);
    near("P99", p99, theory * 100f64.ln(), 3.0 * 4.0 * deviation);
}

// M/D/1: the mean wait is load / (2 (1 - load)) service times (Pollaczek and Khinchine); the distribution of the wait is
// Erlang's series.
#[test]
fn constant_service_gives_what_theory_says_of_m_d_1() {
    let (mean, p99) = measure(Queue::new(|_| Duration::from_secs_f64(SERVICE)));
    let theory = SERVICE * (1.0 + LOAD / (2.0 * (1.0 - LOAD)));
    // The wait of M/D/1 varies less than half as much as that of M/M/1.
    let deviation = SERVICE * (15.0 / REQUESTS as f64).sqrt();
    near("mean", mean, theory, 3.0 * deviation);
    let quantile = (0..10_000)
        .map(|step| f64::from(step) * SERVICE / 1000.0)
        .find(|&wait| waits_at_most(wait) >= 0.99)
        .unwrap();
    near("P99", p99, quantile + SERVICE, 3.0 * 3.0 * deviation);
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
    let begin = Mutex::new(None::<Instant>);
    let server = Mock::start(move |_| {
        let began = *begin.lock().unwrap().get_or_insert_with(Instant::now);
        let at = began.elapsed();
        let frozen = Duration::from_secs(1)..Duration::from_secs(2);
        Reply::after(if frozen.contains(&at) {
            frozen.end - at
        } else {
            Duration::ZERO
        })
    });
    let arrivals = Arrivals::Constant { rate: 150.0 };
    let run = Run::of(
        "freeze",
        None,
        drive(&server.asked(Duration::from_secs(10)), arrivals, 600),
        None,
    );
    let e2e = &run.latency_ms[&sconce_loadtest::slo::Metric::E2e];
    assert!((950.0..1100.0).contains(&e2e.p99), "{e2e:?}");
    assert!((560.0..720.0).contains(&e2e.p90), "{e2e:?}");
    assert!(e2e.p50 < 50.0, "{e2e:?}");
}
