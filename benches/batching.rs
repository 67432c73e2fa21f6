//! What deciding costs: planning a step with a full batch, and finding and keeping a long prompt's blocks in a large
//! pool. `cargo bench --bench batching`

use std::{
    hint::black_box,
    sync::Arc,
    time::{Duration, Instant},
};

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use sconce::{
    batching::{Arrival, BlockPool, Buckets, Config, Namespace, Schedule, Scheduler, WindowPolicy},
    request::Tenant,
};

const BLOCK: usize = 16;

fn namespace() -> Namespace {
    Namespace::Private {
        tenant: None,
        salt: None,
    }
}

/// A scheduler that decodes a hundred sequences, with more waiting.
fn busy_scheduler(now: Instant) -> Scheduler {
    let config = Config {
        schedule: Schedule::Continuous,
        window_policy: WindowPolicy::Adaptive,
        window: Duration::from_millis(20),
        max_batch: 100,
        step_tokens: 20_000,
        buckets: Buckets::default(),
        max_model_len: 4096,
    };
    let pool = BlockPool::new(10_000, BLOCK, true);
    let mut scheduler = Scheduler::new(config, pool).expect("settings that fit together");
    let tenant = Arc::new(Tenant::anyone());
    for first in 0..150 {
        scheduler.push(Arrival {
            prompt: (first..first + 160).collect(),
            namespace: namespace(),
            max_tokens: 64,
            tenant: tenant.clone(),
            priority: 0,
            arrival: now,
            deadline: None,
        });
    }
    let plan = scheduler.plan(now);
    scheduler.commit(&plan);
    for row in &plan.rows {
        scheduler.append(row.id, 7);
    }
    scheduler
}

fn plan(criterion: &mut Criterion) {
    let now = Instant::now();
    criterion.bench_function("plan and commit a step of 100 decodes", |bench| {
        bench.iter_batched_ref(|| busy_scheduler(now), step, BatchSize::LargeInput);
    });
}

fn step(scheduler: &mut Scheduler) {
    let plan = scheduler.plan(Instant::now());
    scheduler.commit(&plan);
    for row in &plan.rows {
        scheduler.append(row.id, 7);
    }
    black_box(plan.rows.len());
}

/// A pool of 100,000 blocks filled with cached prompts of 8,000 tokens, and those prompts.
fn full_pool() -> (BlockPool, Vec<Vec<u32>>) {
    let mut pool = BlockPool::new(100_000, BLOCK, true);
    let prompt = |number: u32| (number * 8000..(number + 1) * 8000).collect();
    let prompts: Vec<Vec<u32>> = (0..200).map(prompt).collect();
    for prompt in &prompts {
        let table = insert(&mut pool, prompt);
        pool.release(&table);
    }
    (pool, prompts)
}

fn insert(pool: &mut BlockPool, prompt: &[u32]) -> Vec<u32> {
    let (namespace, now) = (namespace(), Instant::now());
    let mut table: Vec<u32> = Vec::with_capacity(prompt.len() / BLOCK);
    for tokens in prompt.chunks_exact(BLOCK) {
        let block = pool.allocate().expect("cached blocks can be evicted");
        table.push(pool.keep(&namespace, now, table.last().copied(), tokens, block));
    }
    table
}

fn prefix(criterion: &mut Criterion) {
    let (mut pool, prompts) = full_pool();
    let namespace = namespace();
    // Another prompt each time, so that the processor's caches hold as little of the tree as they would in a server.
    let mut next = (0..prompts.len()).cycle();
    criterion.bench_function("find a prompt of 8,000 tokens among 100,000 blocks", |bench| {
        bench.iter(|| {
            let prompt = &prompts[next.next().unwrap_or_default()];
            let table = pool.take(&namespace, Instant::now(), None, black_box(prompt));
            assert_eq!(table.len(), prompt.len() / BLOCK);
            pool.release(&table);
        });
    });
    let mut fresh = (10_000_000..).step_by(8000);
    criterion.bench_function("keep a prompt of 8,000 tokens, evicting as many", |bench| {
        bench.iter_batched(
            || {
                fresh
                    .next()
                    .map(|start| (start..start + 8000).collect::<Vec<u32>>())
                    .unwrap_or_default()
            },
            |prompt| {
                let table = insert(&mut pool, &prompt);
                pool.release(&table);
            },
            BatchSize::SmallInput,
        );
    });
}

criterion_group!(benches, plan, prefix);
criterion_main!(benches);
