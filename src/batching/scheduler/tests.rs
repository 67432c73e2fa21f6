//! The scheduler's rules, and that they hold whatever arrives.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use proptest::prelude::*;

use super::*;
use crate::batching::{Buckets, WindowPolicy};
use crate::request::Tenant;

const BLOCK: usize = 4;

fn config() -> Config {
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

fn scheduler(config: Config, blocks: usize) -> Scheduler {
    Scheduler::new(config, BlockPool::new(blocks, BLOCK, true)).unwrap()
}

fn arrival(prompt: Vec<TokenId>, now: Instant) -> Arrival {
    Arrival {
        prompt,
        max_tokens: 16,
        tenant: Arc::new(Tenant::anyone()),
        priority: 0,
        arrival: now,
        deadline: None,
    }
}

/// A prompt of `length` tokens that shares no block with another `first`.
fn prompt(first: u32, length: usize) -> Vec<TokenId> {
    (0..length as u32).map(|index| first * 1000 + index).collect()
}

/// Runs a plan as an engine would: every sampled token is `token`.
fn run(scheduler: &mut Scheduler, plan: &Plan, token: TokenId) {
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
                len: 7,
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
            start: 7,
            len: 3,
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

#[derive(Debug, Clone)]
struct Client {
    prompt: Vec<TokenId>,
    output: usize,
    arrives: u64,
    /// The step at which the client leaves, if it does.
    leaves: Option<u64>,
}

fn client() -> impl Strategy<Value = Client> {
    let prompt = prop::collection::vec(0u32..2, 1..28);
    (prompt, 1usize..12, 0u64..40, prop::option::weighted(0.1, 0u64..60)).prop_map(
        |(prompt, output, arrives, leaves)| Client {
            prompt,
            output,
            arrives,
            leaves,
        },
    )
}

/// Drives a scheduler through all clients, checking every plan, and gives each client's output length.
fn drive(mut scheduler: Scheduler, clients: &[Client]) -> Result<Vec<usize>, TestCaseError> {
    let config = scheduler.config().clone();
    let start = Instant::now();
    let mut ids: HashMap<SequenceId, usize> = HashMap::new();
    let mut outputs = vec![0; clients.len()];
    for step in 0..3000u64 {
        let now = start + Duration::from_millis(step * 3);
        for (index, client) in clients.iter().enumerate().filter(|(_, client)| client.arrives == step) {
            ids.insert(scheduler.push(arrival(client.prompt.clone(), now)), index);
        }
        let leaving: Vec<_> = ids
            .iter()
            .filter(|&(_, &index)| clients[index].leaves == Some(step))
            .collect();
        for (&id, _) in leaving {
            scheduler.remove(id, now);
        }
        ids.retain(|_, index| clients[*index].leaves != Some(step));
        let plan = scheduler.plan(now);
        check(&scheduler, &plan, &config)?;
        scheduler.commit(&plan);
        for row in plan.rows.iter().filter(|row| row.samples) {
            let index = ids[&row.id];
            outputs[index] += 1;
            if outputs[index] == clients[index].output {
                scheduler.remove(row.id, now);
                ids.remove(&row.id);
            } else {
                scheduler.append(row.id, outputs[index] as TokenId % 2);
            }
        }
        if ids.is_empty() && clients.iter().all(|client| client.arrives <= step) {
            prop_assert_eq!(scheduler.block_counts().held, 0);
            return Ok(outputs);
        }
    }
    Err(TestCaseError::fail("not every request ended"))
}

/// What must hold of any plan.
fn check(scheduler: &Scheduler, plan: &Plan, config: &Config) -> Result<(), TestCaseError> {
    prop_assert!(plan.rows.iter().map(|row| row.len).sum::<usize>() <= config.step_tokens);
    prop_assert!(scheduler.running.len() <= config.max_batch);
    let mut written = HashSet::new();
    let mut planned = HashSet::new();
    for row in &plan.rows {
        prop_assert!(planned.insert(row.id), "a sequence is planned twice");
        let sequence = scheduler
            .sequence(row.id)
            .ok_or_else(|| TestCaseError::fail("a row without a sequence"))?;
        let end = row.start + row.len;
        prop_assert_eq!(row.start, sequence.computed);
        prop_assert_eq!(row.samples, end == sequence.tokens().len());
        prop_assert!(sequence.blocks().len() * BLOCK >= end);
        for position in row.start..end {
            let slot = (sequence.blocks()[position / BLOCK], position % BLOCK);
            prop_assert!(written.insert(slot), "two tokens share a slot");
        }
    }
    // What a row writes, no other sequence may be reading.
    for (id, sequence) in &scheduler.running {
        let own = plan.rows.iter().find(|row| row.id == *id);
        for (index, block) in sequence
            .blocks()
            .iter()
            .enumerate()
            .take(sequence.computed.div_ceil(BLOCK))
        {
            for slot in 0..BLOCK.min(sequence.computed - index * BLOCK) {
                let position = index * BLOCK + slot;
                prop_assert!(own.is_some_and(|row| row.start <= position) || !written.contains(&(*block, slot)));
            }
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    /// Every request ends with the output it asked for, under every schedule, with a pool so small that sequences are
    /// preempted, and with clients that leave; no plan breaks a budget or a block's ownership.
    #[test]
    fn every_request_ends(
        clients in prop::collection::vec(client(), 1..24),
        schedule in prop::sample::select(vec![Schedule::Continuous, Schedule::Dynamic, Schedule::Sequential]),
        window_policy in prop::sample::select(vec![WindowPolicy::Adaptive, WindowPolicy::Fixed, WindowPolicy::None]),
        blocks in 10usize..24,
        prefix_cache in any::<bool>(),
    ) {
        let config = Config { schedule, window_policy, ..config() };
        let scheduler = Scheduler::new(config, BlockPool::new(blocks, BLOCK, prefix_cache)).unwrap();
        let outputs = drive(scheduler, &clients)?;
        for (client, output) in clients.iter().zip(outputs) {
            prop_assert!(output == client.output || client.leaves.is_some());
        }
    }

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
