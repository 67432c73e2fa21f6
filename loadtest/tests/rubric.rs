//! The rubric's loads and its search, and how the user ends them.

mod mock;

use std::time::Duration;

use mock::{Mock, Reply};
use sconce_loadtest::{
    Live,
    arrivals::Arrivals,
    report::{Report, table},
    rubric::{Loads, Plan, execute},
    run::Load,
    utilisation::settle,
};
use tokio::{runtime::Runtime, sync::watch};

/// Where nothing is to time out.
const PATIENCE: Duration = Duration::from_secs(60);

fn plan(server: &Mock, loads: Loads) -> Plan {
    Plan {
        asked: server.asked(PATIENCE),
        load: Load {
            arrivals: Arrivals::Constant { rate: 50.0 },
            requests: Some(4),
            duration: None,
            warmup: Duration::ZERO,
            seed: 11,
            part: 0,
        },
        slo: Some("e2e.p99=30s".parse().unwrap()),
        loads,
        token_counts: String::new(),
    }
}

/// The report of a plan that the user ends this long after the server has got so many requests.
fn ended_at(server: &Mock, loads: Loads, requests: usize, later: Duration) -> Report {
    let plan = plan(server, loads);
    let (sender, mut stop) = watch::channel(false);
    let runtime = Runtime::new().unwrap();
    let executed = runtime.spawn(async move { execute(&plan, &mut Live::new(), &mut stop).await });
    runtime.block_on(async {
        while server.bodies.lock().unwrap().len() < requests {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        tokio::time::sleep(later).await;
        sender.send_replace(true);
        // Far less than the minute that a server has to settle.
        tokio::time::timeout(PATIENCE / 2, executed)
            .await
            .expect("it ends")
            .unwrap()
    })
}

#[test]
fn a_search_that_is_ended_keeps_the_load_that_it_ended_in() {
    // The first load's four requests are answered, the second's never.
    let server = Mock::start(|index| match index {
        0..4 => Reply::after(Duration::ZERO),
        _ => Reply::after(PATIENCE),
    });
    let report = ended_at(&server, Loads::Highest, 8, Duration::ZERO);
    assert!(report.interrupted && report.search_unfinished);
    assert_eq!(
        (report.target_rate, report.search.len(), report.runs.len()),
        (None, 1, 1)
    );
    let ended = &report.runs[0];
    assert_eq!(
        (ended.label.as_str(), ended.requests.unfinished),
        ("search at 100.00/s", 4)
    );
    assert_eq!((ended.interrupted, ended.slo_kept), (true, None));
    let text = table::text(&report);
    assert!(
        text.contains("unfinished: 50.0 requests/s kept the SLO so far"),
        "{text}"
    );
    assert!(text.contains("| search at 100.00/s"), "{text}");
}

#[test]
fn a_server_that_does_not_settle_is_waited_for_until_the_user_ends_it() {
    let server = Mock::start_never_idle();
    let asked = server.asked(PATIENCE);
    let runtime = Runtime::new().unwrap();
    runtime.block_on(async {
        let (sender, mut stop) = watch::channel(false);
        assert!(!settle(&asked.target, Duration::from_millis(1), &mut stop).await);
        sender.send_replace(true);
        assert!(settle(&asked.target, PATIENCE, &mut stop).await);
    });
    // By then the first load has been answered, unless this machine does not let it.
    let report = ended_at(&server, Loads::Target(50.0), 4, Duration::from_secs(1));
    assert!(report.interrupted);
    assert_eq!(report.runs.len(), 1);
}
