//! Sends 2,000 requests a second and shows how late the generator was. The server is a trivial one: in this process, or
//! in another on a core of its own.
//!
//! ```sh
//! taskset -c 0 cargo run --release -p sconce-loadtest --example rate -- 2000 10        # both on one core
//! taskset -c 1 cargo run --release -p sconce-loadtest --example rate -- serve          # prints its address
//! taskset -c 0 cargo run --release -p sconce-loadtest --example rate -- 2000 10 http://127.0.0.1:PORT
//! ```

#[path = "../tests/mock/mod.rs"]
mod mock;

use std::time::Duration;

use mock::{Mock, Reply, drive};
use sconce_loadtest::{arrivals::Arrivals, report::Run};

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |index: usize, default| match arguments.get(index) {
        Some(text) => text.parse::<f64>().expect("a number"),
        None => default,
    };
    let trivial = || Mock::start(|_| Reply::after(Duration::ZERO));
    if arguments.first().is_some_and(|first| first == "serve") {
        println!("{}", trivial().url);
        loop {
            std::thread::park();
        }
    }
    let (rate, seconds) = (number(0, 2000.0), number(1, 10.0));
    let server = match arguments.get(2) {
        Some(url) => Mock::at(url),
        None => trivial(),
    };
    let asked = server.asked(Duration::from_secs(5));
    let measured = drive(&asked, Arrivals::Poisson { rate }, (rate * seconds) as u64);
    let run = Run::of("rate", Some(rate), measured, None);
    println!("{:.0} requests/s achieved, {:?}", run.achieved_rate, run.requests);
    println!("lateness in ms: {:?}", run.lateness_ms);
    println!("latencies in ms: {:?}", run.latency_ms);
}
