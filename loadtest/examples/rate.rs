//! Sends 2,000 requests a second to a trivial server in this process and shows how late the generator was:
//! `taskset -c 0 cargo run --release -p sconce-loadtest --example rate -- 2000 10`

#[path = "../tests/mock/mod.rs"]
mod mock;

use std::time::Duration;

use mock::{Mock, Reply, drive};
use sconce_loadtest::{arrivals::Arrivals, report::Run};

fn main() {
    let mut numbers = std::env::args()
        .skip(1)
        .map(|text| text.parse::<f64>().expect("a number"));
    let (rate, seconds) = (numbers.next().unwrap_or(2000.0), numbers.next().unwrap_or(10.0));
    let server = Mock::start(|_| Reply::after(Duration::ZERO));
    let asked = server.asked(Duration::from_secs(5));
    let measured = drive(&asked, Arrivals::Poisson { rate }, (rate * seconds) as u64);
    let run = Run::of("rate", Some(rate), measured, None);
    println!("{:.0} requests/s achieved, {:?}", run.achieved_rate, run.requests);
    println!("lateness in ms: {:?}", run.lateness_ms);
    println!("latencies in ms: {:?}", run.latency_ms);
}
