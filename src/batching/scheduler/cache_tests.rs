//! What sequences find in the prefix cache, and the prompts that are pinned in it.

use super::{
    tests::{BLOCK, anyone, arrival, config, prompt, run, scheduler},
    *,
};
use crate::batching::Namespace;

fn salted(prompt: Vec<TokenId>, salt: &str, now: Instant) -> Arrival {
    Arrival {
        namespace: Namespace::Private {
            tenant: None,
            salt: Some(salt.into()),
        },
        ..arrival(prompt, now)
    }
}

fn rows(plan: &Plan) -> Vec<(SequenceId, usize, usize)> {
    plan.rows.iter().map(|row| (row.id, row.start, row.len)).collect()
}

/// Plans and runs one step.
fn step(scheduler: &mut Scheduler, now: Instant) -> Vec<(SequenceId, usize, usize)> {
    let plan = scheduler.plan(now);
    run(scheduler, &plan, 7);
    rows(&plan)
}

#[test]
fn what_a_running_sequence_has_computed_is_found_while_it_prefills() {
    let now = Instant::now();
    let mut scheduler = scheduler(config(), 30);
    let long = scheduler.push(arrival(prompt(1, 24), now));
    assert_eq!(step(&mut scheduler, now), [(long, 0, 8)]);
    // It begins as the other does and differs from its 17th token on.
    let mut same = prompt(1, 20);
    same[16..].fill(9);
    let late = scheduler.push(arrival(same, now));
    let free = scheduler.block_counts().free;
    let plan = scheduler.plan(now);
    assert_eq!(plan.admitted[0].cached_tokens, 8);
    assert_eq!(
        rows(&plan),
        [(long, 8, 8)],
        "the other waits for the blocks that this one computes"
    );
    run(&mut scheduler, &plan, 7);
    assert_eq!(scheduler.block_counts().free, free - 3);
    let plan = scheduler.plan(now);
    assert_eq!(plan.cached_tokens, 8);
    assert_eq!(
        scheduler.block_counts().free,
        free - 1,
        "its own empty blocks are given back"
    );
    assert_eq!(rows(&plan), [(long, 16, 8)]);
    run(&mut scheduler, &plan, 7);
    assert_eq!(step(&mut scheduler, now), [(long, 24, 1), (late, 16, 4)]);
    assert_eq!(scheduler.sequence(late).map(Sequence::cached_tokens), Some(16));
}

#[test]
fn two_that_arrive_together_compute_their_prefix_once() {
    let now = Instant::now();
    let mut scheduler = scheduler(
        Config {
            step_tokens: 64,
            ..config()
        },
        30,
    );
    let ids = [0, 1].map(|_| scheduler.push(arrival(prompt(1, 16), now)));
    assert_eq!(step(&mut scheduler, now), [(ids[0], 0, 16)]);
    // The last token is always computed, with the block it lies in.
    assert_eq!(step(&mut scheduler, now), [(ids[0], 16, 1), (ids[1], 12, 4)]);
    assert_eq!(scheduler.sequence(ids[1]).map(Sequence::cached_tokens), Some(12));
    let blocks = |id| scheduler.sequence(id).expect("runs").blocks()[..4].to_vec();
    assert_eq!(blocks(ids[0]), blocks(ids[1]));
}

#[test]
fn another_salt_is_neither_waited_for_nor_found() {
    let now = Instant::now();
    let mut scheduler = scheduler(
        Config {
            step_tokens: 64,
            ..config()
        },
        30,
    );
    let first = scheduler.push(salted(prompt(1, 16), "a", now));
    let other = scheduler.push(salted(prompt(1, 16), "b", now));
    assert_eq!(step(&mut scheduler, now), [(first, 0, 16), (other, 0, 16)]);
    scheduler.remove(first, now);
    scheduler.remove(other, now);
    // A probe computes what a cold request does, whoever sent the prompt before it.
    let probe = scheduler.push(salted(prompt(1, 16), "c", now));
    let plan = scheduler.plan(now);
    assert_eq!((plan.cached_tokens, rows(&plan)), (0, vec![(probe, 0, 16)]));
    run(&mut scheduler, &plan, 7);
    let again = scheduler.push(salted(prompt(1, 16), "a", now));
    assert_eq!(step(&mut scheduler, now), [(probe, 16, 1), (again, 12, 4)]);
}

#[test]
fn whoever_waits_for_a_block_computes_it_when_the_other_leaves() {
    let now = Instant::now();
    let mut scheduler = scheduler(config(), 30);
    let first = scheduler.push(arrival(prompt(1, 20), now));
    let second = scheduler.push(arrival(prompt(1, 20), now));
    assert_eq!(step(&mut scheduler, now), [(first, 0, 8)]);
    scheduler.remove(first, now);
    assert_eq!(step(&mut scheduler, now), [(second, 8, 8)]);
    assert_eq!(scheduler.sequence(second).map(Sequence::cached_tokens), Some(8));
}

#[test]
fn a_preemption_changes_no_count_of_what_was_found() {
    let now = Instant::now();
    let mut scheduler = scheduler(
        Config {
            step_tokens: 16,
            ..config()
        },
        10,
    );
    for first in 1..=2 {
        scheduler.push(arrival(prompt(first, 16), now));
    }
    let (mut computed, mut cached) = (Computed::default(), 0);
    for _ in 0..40 {
        let plan = scheduler.plan(now);
        cached += plan.cached_tokens;
        computed += scheduler.commit(&plan);
        for row in plan.rows.iter().filter(|row| row.samples) {
            let sequence = scheduler.sequence(row.id).expect("runs");
            if sequence.generated() == 20 {
                scheduler.remove(row.id, now);
            } else {
                scheduler.append(row.id, 7);
            }
        }
    }
    assert_eq!(scheduler.running(), 0);
    assert!(scheduler.preemptions() > 0);
    assert_eq!((computed.prefill, computed.decode, cached), (32, 40, 0));
    assert!(computed.recomputed > 0, "some of its blocks were needed by the other");
}

/// Runs a prompt through and pins it.
fn pin(
    scheduler: &mut Scheduler,
    prompt: Vec<TokenId>,
    expires: Option<Instant>,
    now: Instant,
) -> Result<usize, PinError> {
    let mut prompt = prompt;
    prompt.truncate(scheduler.check_pin(&anyone(), &prompt)?);
    let id = scheduler.push(arrival(prompt, now));
    while scheduler
        .sequence(id)
        .is_none_or(|sequence| sequence.computed < sequence.tokens.len())
    {
        let plan = scheduler.plan(now);
        scheduler.commit(&plan);
    }
    let pinned = scheduler.pin(id, format!("pin-{id}"), None, expires)?;
    Ok(pinned.tokens)
}

fn with_pins(blocks: usize, budget: usize) -> Scheduler {
    Scheduler::new(config(), BlockPool::new(blocks, BLOCK, true).with_pin_budget(budget)).unwrap()
}

#[test]
fn a_pinned_prompt_stays_when_everything_else_is_evicted() {
    let now = Instant::now();
    let mut scheduler = with_pins(20, 6);
    assert_eq!(
        pin(&mut scheduler, prompt(1, 18), None, now),
        Ok(16),
        "full blocks are pinned"
    );
    assert_eq!(scheduler.block_counts().pinned, 4);
    for other in 2..12 {
        let id = scheduler.push(arrival(prompt(other, 30), now));
        while scheduler.sequence(id).is_none_or(|sequence| sequence.generated() == 0) {
            step(&mut scheduler, now);
        }
        scheduler.remove(id, now);
    }
    assert!(scheduler.pin_counts().evictions > 0);
    let id = scheduler.push(arrival(prompt(1, 20), now));
    assert_eq!(step(&mut scheduler, now), [(id, 16, 4)]);
    scheduler.remove(id, now);
    assert_eq!(scheduler.unpin(|pin| pin.id == "pin-0"), 1);
    assert_eq!((scheduler.block_counts().pinned, scheduler.pins().len()), (0, 0));
}

#[test]
fn a_pin_beyond_the_budget_is_refused() {
    let now = Instant::now();
    let mut scheduler = with_pins(20, 6);
    assert_eq!(pin(&mut scheduler, prompt(1, 16), None, now), Ok(16));
    let refused = PinError::OverBudget {
        wanted: 3,
        pinned: 4,
        budget: 6,
    };
    assert_eq!(pin(&mut scheduler, prompt(2, 12), None, now), Err(refused));
    // What is pinned already costs nothing more.
    assert_eq!(pin(&mut scheduler, prompt(1, 20), None, now), Ok(20));
    assert_eq!(scheduler.pin_counts().asked, 5);
    let short = PinError::BelowBlock {
        tokens: 3,
        block_size: BLOCK,
    };
    assert_eq!(pin(&mut scheduler, prompt(3, 3), None, now), Err(short));
    let mut uncached = Scheduler::new(config(), BlockPool::new(20, BLOCK, false)).unwrap();
    assert_eq!(
        pin(&mut uncached, prompt(1, 16), None, now),
        Err(PinError::NoPrefixCache)
    );
}

#[test]
fn pinned_prompts_leave_room_for_the_longest_sequence() {
    // Ten blocks of the twelve are what one sequence may need.
    let scheduler = with_pins(12, 8);
    assert_eq!(scheduler.pin_counts().budget, 2);
}

#[test]
fn a_pin_ends_with_its_time() {
    let now = Instant::now();
    let mut scheduler = with_pins(20, 6);
    let expires = now + Duration::from_secs(5);
    assert_eq!(pin(&mut scheduler, prompt(1, 16), Some(expires), now), Ok(16));
    assert_eq!(scheduler.plan(now).wake, Some(expires));
    assert_eq!(scheduler.block_counts().pinned, 4);
    assert_eq!(scheduler.plan(expires).wake, None);
    assert_eq!(
        (scheduler.block_counts().pinned, scheduler.block_counts().cached),
        (0, 4)
    );
}

#[test]
fn what_is_pinned_for_everyone_is_found_with_any_salt() {
    let now = Instant::now();
    let mut scheduler = with_pins(20, 6);
    let shared = Arrival {
        namespace: Namespace::Shared,
        ..arrival(prompt(1, 8), now)
    };
    let id = scheduler.push(shared);
    let plan = scheduler.plan(now);
    scheduler.commit(&plan);
    scheduler.pin(id, "shared".into(), None, None).unwrap();
    let id = scheduler.push(salted(prompt(1, 12), "a", now));
    assert_eq!(step(&mut scheduler, now), [(id, 8, 4)]);
}
