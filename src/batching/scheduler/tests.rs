//! The scheduler's rules, and that they hold whatever arrives.

use std::{collections::HashSet, sync::Arc};

use proptest::prelude::*;

use super::*;
use crate::batching::{Buckets, Namespace, WindowPolicy};
use crate::request::Tenant;

pub(super) const BLOCK: usize = 4;

pub(super) fn config() -> Config {
    Config {
        schedule: Schedule::Continuous,
        window_policy: WindowPolicy::None,
        window: Duration::from_millis(20),
        max_batch: 4,
        step_tokens: 8,
        buckets: Buckets::new(vec![8, 16]).unwrap(),
        max_model_len: 40,
    }
}

pub(super) fn scheduler(config: Config, blocks: usize) -> Scheduler {
    Scheduler::new(config, BlockPool::new(blocks, BLOCK, true)).unwrap()
}

pub(super) fn anyone() -> Namespace {
    Namespace::Private {
        tenant: None,
        salt: None,
    }
}

pub(super) fn arrival(prompt: Vec<TokenId>, now: Instant) -> Arrival {
    Arrival {
        prompt,
        namespace: anyone(),
        max_tokens: 16,
        tenant: Arc::new(Tenant::anyone()),
        priority: 0,
        arrival: now,
        deadline: None,
    }
}

/// A prompt of `length` tokens that shares no block with another `first`.
pub(super) fn prompt(first: u32, length: usize) -> Vec<TokenId> {
    (0..length as u32).map(|index| first * 1000 + index).collect()
}

/// Runs a plan as an engine would: every sampled token is `token`.
pub(super) fn run(scheduler: &mut Scheduler, plan: &Plan, token: TokenId) {
    scheduler.commit(plan);
    for row in plan.rows.iter().filter(|row| row.samples) {
        scheduler.append(row.id, token);
    }
}

#[test]
fn refuses_settings_that_cannot_work() {
    let blocks = |count| BlockPool::new(count, BLOCK, true);
    let narrow = Config {
        step_tokens: 3,
        ..config()
    };
    assert!(matches!(
        Scheduler::new(narrow, blocks(10)),
        Err(ConfigError::StepBelowBatch { .. })
    ));
    assert!(matches!(
        Scheduler::new(config(), blocks(9)),
        Err(ConfigError::CacheBelowContext { capacity: 36, .. })
    ));
}

#[test]
fn a_smaller_batch_leaves_what_runs_and_admits_nobody() {
    let now = Instant::now();
    let mut scheduler = scheduler(
        Config {
            step_tokens: 12,
            ..config()
        },
        20,
    );
    for first in 1..=4 {
        scheduler.push(arrival(prompt(first, 3), now));
    }
    let plan = scheduler.plan(now);
    run(&mut scheduler, &plan, 7);
    let refused = scheduler.configure(&Change {
        step_tokens: Some(2),
        ..Change::default()
    });
    assert!(matches!(refused, Err(ConfigError::StepBelowBatch { .. })));
    scheduler
        .configure(&Change {
            max_batch: Some(2),
            step_tokens: Some(2),
            ..Change::default()
        })
        .unwrap();
    scheduler.push(arrival(prompt(5, 3), now));
    let plan = scheduler.plan(now);
    assert_eq!(plan.rows.iter().map(|row| row.id).collect::<Vec<_>>(), [0, 1]);
    assert_eq!((scheduler.running(), scheduler.waiting()), (4, 1));
}

#[test]
fn decodes_come_first_and_prefill_is_chunked() {
    let now = Instant::now();
    let mut scheduler = scheduler(config(), 20);
    let short = scheduler.push(arrival(prompt(1, 3), now));
    let plan = scheduler.plan(now);
    assert_eq!(
        plan.rows,
        [Row {
            id: short,
            start: 0,
            len: 3,
            samples: true
        }]
    );
    run(&mut scheduler, &plan, 7);

    let long = scheduler.push(arrival(prompt(2, 10), now));
    let plan = scheduler.plan(now);
    assert_eq!(
        plan.rows,
        [
            Row {
                id: short,
                start: 3,
                len: 1,
                samples: true
            },
            Row {
                id: long,
                start: 0,
                len: 4,
                samples: false
            }
        ]
    );
    run(&mut scheduler, &plan, 7);
    let plan = scheduler.plan(now);
    assert_eq!(
        plan.rows[1],
        Row {
            id: long,
            start: 4,
            len: 6,
            samples: true
        }
    );
}

#[test]
fn a_dynamic_batch_ends_before_the_next_begins() {
    let now = Instant::now();
    let mut scheduler = scheduler(
        Config {
            schedule: Schedule::Dynamic,
            ..config()
        },
        20,
    );
    let first = scheduler.push(arrival(prompt(1, 3), now));
    let plan = scheduler.plan(now);
    run(&mut scheduler, &plan, 7);
    let second = scheduler.push(arrival(prompt(2, 3), now));
    let plan = scheduler.plan(now);
    assert_eq!(plan.rows.iter().map(|row| row.id).collect::<Vec<_>>(), [first]);
    run(&mut scheduler, &plan, 7);
    scheduler.remove(first, now);
    assert_eq!(scheduler.plan(now).rows[0].id, second);
}

#[test]
fn sequential_runs_one_at_a_time() {
    let now = Instant::now();
    let mut scheduler = scheduler(
        Config {
            schedule: Schedule::Sequential,
            ..config()
        },
        20,
    );
    for first in 1..4 {
        scheduler.push(arrival(prompt(first, 3), now));
    }
    assert_eq!(scheduler.plan(now).rows.len(), 1);
}

#[test]
fn a_batch_is_one_bucket_and_its_padding_is_counted() {
    let now = Instant::now();
    let mut scheduler = scheduler(
        Config {
            schedule: Schedule::Dynamic,
            ..config()
        },
        20,
    );
    let ids: Vec<_> = [3, 12, 5]
        .iter()
        .zip(1..)
        .map(|(&len, first)| scheduler.push(arrival(prompt(first, len), now)))
        .collect();
    let plan = scheduler.plan(now);
    assert_eq!(
        plan.admitted.iter().map(|admission| admission.id).collect::<Vec<_>>(),
        [ids[0], ids[2]]
    );
    assert_eq!(
        plan.batches,
        [Batch {
            requests: 2,
            prompt_tokens: 8,
            padded_tokens: 10
        }]
    );
}

#[test]
fn the_window_is_told_apart_from_the_queue() {
    let now = Instant::now();
    let at = |ms| now + Duration::from_millis(ms);
    let mut scheduler = scheduler(
        Config {
            window_policy: WindowPolicy::Fixed,
            ..config()
        },
        20,
    );
    scheduler.push(arrival(prompt(1, 3), now));
    let plan = scheduler.plan(at(5));
    assert!(plan.rows.is_empty());
    assert_eq!(plan.wake, Some(at(20)));
    let plan = scheduler.plan(at(20));
    assert_eq!(plan.admitted[0].window, Duration::from_millis(15));
}

#[test]
fn a_cached_prefix_is_not_computed_again() {
    let now = Instant::now();
    let mut scheduler = scheduler(config(), 20);
    for cached in [0, 4] {
        let id = scheduler.push(arrival(prompt(1, 8), now));
        let plan = scheduler.plan(now);
        assert_eq!(plan.admitted[0].cached_tokens, cached);
        assert_eq!(
            plan.rows,
            [Row {
                id,
                start: cached,
                len: 8 - cached,
                samples: true
            }]
        );
        run(&mut scheduler, &plan, 7);
        scheduler.remove(id, now);
    }
}

#[test]
fn a_passed_deadline_ends_a_request_wherever_it_is() {
    let now = Instant::now();
    let mut scheduler = scheduler(
        Config {
            schedule: Schedule::Sequential,
            ..config()
        },
        20,
    );
    let deadline = Some(now + Duration::from_secs(1));
    let ids: Vec<_> = (1..3)
        .map(|first| {
            scheduler.push(Arrival {
                deadline,
                ..arrival(prompt(first, 3), now)
            })
        })
        .collect();
    let plan = scheduler.plan(now);
    run(&mut scheduler, &plan, 7);
    let plan = scheduler.plan(now + Duration::from_secs(1));
    assert_eq!(
        plan.expired.iter().copied().collect::<HashSet<_>>(),
        ids.into_iter().collect()
    );
    assert_eq!((scheduler.waiting(), scheduler.running()), (0, 0));
    assert_eq!(scheduler.block_counts().held, 0);
}

#[test]
fn the_youngest_stands_aside_when_blocks_run_out() {
    let now = Instant::now();
    let mut scheduler = scheduler(
        Config {
            step_tokens: 16,
            ..config()
        },
        10,
    );
    let ids: Vec<_> = (1..=2)
        .map(|first| scheduler.push(arrival(prompt(first, 16), now)))
        .collect();
    let mut preempted_at = None;
    for _ in 0..24 {
        let plan = scheduler.plan(now);
        run(&mut scheduler, &plan, 7);
        if scheduler.preemptions() > 0 && preempted_at.is_none() {
            preempted_at = scheduler.sequence(ids[0]).map(Sequence::generated);
            assert!(scheduler.sequence(ids[1]).is_none(), "the younger one lost its blocks");
        }
    }
    assert!(preempted_at.is_some());
    assert_eq!(scheduler.sequence(ids[0]).map(Sequence::generated), Some(24));
    scheduler.remove(ids[0], now);
    let plan = scheduler.plan(now);
    assert_eq!(plan.rows[0].id, ids[1], "it runs again");
    assert!(plan.admitted.is_empty(), "it is not admitted twice");
}

proptest! {
    /// Among requests that all wait from the start, nobody is overtaken by a whole batch of younger ones of its bucket.
    #[test]
    fn a_bucket_is_served_in_order(lengths in prop::collection::vec(1usize..30, 1..40)) {
        let now = Instant::now();
        let mut scheduler = scheduler(Config { schedule: Schedule::Dynamic, ..config() }, 60);
        for (&length, first) in lengths.iter().zip(1..) {
            scheduler.push(arrival(prompt(first, length), now));
        }
        let mut oldest = 0;
        let mut served = HashSet::new();
        while served.len() < lengths.len() {
            let plan = scheduler.plan(now);
            prop_assert!(plan.admitted.iter().any(|admission| admission.id == oldest), "the oldest was passed over");
            for admission in &plan.admitted {
                served.insert(admission.id);
                scheduler.remove(admission.id, now);
            }
            while served.contains(&oldest) {
                oldest += 1;
            }
        }
    }
}
