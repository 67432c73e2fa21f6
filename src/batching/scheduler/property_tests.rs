//! What holds of every plan, whatever arrives and whoever leaves.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use proptest::prelude::*;

use super::{
    tests::{BLOCK, config},
    *,
};
use crate::{
    batching::{BlockId, Namespace, WindowPolicy},
    request::Tenant,
};

const STEP: Duration = Duration::from_millis(3);

#[derive(Debug, Clone)]
struct Client {
    salt: usize,
    prompt: Vec<TokenId>,
    output: usize,
    /// The number of tokens after which a stop token ends it, which nobody can know before.
    stops: usize,
    arrives: u64,
    /// The step at which the client leaves, if it does.
    leaves: Option<u64>,
    /// Steps from its arrival.
    deadline: Option<u32>,
}

/// Prompts begin alike, to different lengths, and go on with few distinct tokens, so that they meet often.
fn client() -> impl Strategy<Value = Client> {
    let tail = prop::collection::vec(0u32..2, 1..14);
    let prompt = (0usize..15, tail).prop_map(|(shared, tail)| (0..shared as u32).chain(tail).collect());
    let leaves = prop::option::weighted(0.1, 0u64..60);
    let deadline = prop::option::weighted(0.1, 5u32..60);
    let output = (1usize..12, prop_oneof![Just(usize::MAX), 1usize..12]);
    (0usize..2, prompt, output, 0u64..40, leaves, deadline).prop_map(
        |(salt, prompt, (output, stops), arrives, leaves, deadline)| Client {
            salt,
            prompt,
            output,
            stops,
            arrives,
            leaves,
            deadline,
        },
    )
}

impl Client {
    /// How many tokens its answer has.
    fn answer(&self) -> usize {
        self.output.min(self.stops)
    }

    /// The first so many tokens of its prompt and its answer.
    fn tokens(&self, count: usize) -> Vec<TokenId> {
        let generated = (1..).map(|number| number % 2);
        self.prompt.iter().copied().chain(generated).take(count).collect()
    }
}

fn change() -> impl Strategy<Value = (u64, Change)> {
    let schedule = prop::option::of(prop::sample::select(SCHEDULES.to_vec()));
    let size = prop::option::of(1usize..6);
    (0u64..60, schedule, size, prop::option::of(4usize..20)).prop_map(|(step, schedule, max_batch, step_tokens)| {
        let change = Change {
            schedule,
            max_batch,
            step_tokens,
            ..Change::default()
        };
        (step, change)
    })
}

const SCHEDULES: [Schedule; 3] = [Schedule::Continuous, Schedule::Dynamic, Schedule::Sequential];

fn namespace(salt: usize) -> Namespace {
    Namespace::Private {
        tenant: None,
        salt: (salt > 0).then(|| "salt".into()),
    }
}

/// A scheduler under load, and what its plans have written where.
struct Drive<'a> {
    scheduler: Scheduler,
    clients: &'a [Client],
    ids: HashMap<SequenceId, usize>,
    outputs: Vec<usize>,
    /// By block: the salt, and the tokens from the prompt's start through the last slot written.
    contents: HashMap<BlockId, (usize, Vec<TokenId>)>,
    computed: Computed,
    cached: usize,
    /// The highest limit so far: what runs goes on when it is lowered.
    max_batch: usize,
    /// Whether a plan is committed only when the next one is made.
    overlap: bool,
    under_way: Plan,
}

impl<'a> Drive<'a> {
    fn new(scheduler: Scheduler, clients: &'a [Client], overlap: bool) -> Self {
        Self {
            max_batch: scheduler.config().max_batch,
            scheduler,
            clients,
            ids: HashMap::new(),
            outputs: vec![0; clients.len()],
            contents: HashMap::new(),
            computed: Computed::default(),
            cached: 0,
            overlap,
            under_way: Plan::default(),
        }
    }

    /// Runs until every client has its output, has left, or is past its deadline.
    fn finish(&mut self, changes: &[(u64, Change)]) -> Result<(), TestCaseError> {
        let start = Instant::now();
        for step in 0..4000 {
            let now = start + STEP * step as u32;
            for (_, change) in changes.iter().filter(|(at, _)| *at == step) {
                // Some do not fit together with what is set; then nothing changes.
                let _ = self.scheduler.configure(change);
                self.max_batch = self.max_batch.max(self.scheduler.config().max_batch);
            }
            self.come_and_go(step, now);
            let plan = self.scheduler.plan(now);
            self.check(&plan)?;
            if self.overlap {
                let before = std::mem::replace(&mut self.under_way, plan);
                self.run(&before, now);
            } else {
                self.run(&plan, now);
            }
            if self.ids.is_empty() && self.clients.iter().all(|client| client.arrives <= step) {
                prop_assert_eq!(self.scheduler.block_counts().held, 0);
                return Ok(());
            }
        }
        Err(TestCaseError::fail("not every request ended"))
    }

    fn come_and_go(&mut self, step: u64, now: Instant) {
        for (index, client) in self
            .clients
            .iter()
            .enumerate()
            .filter(|(_, client)| client.arrives == step)
        {
            let id = self.scheduler.push(Arrival {
                prompt: client.prompt.clone(),
                namespace: namespace(client.salt),
                max_tokens: client.output,
                tenant: Arc::new(Tenant::anyone()),
                priority: 0,
                arrival: now,
                deadline: client.deadline.map(|steps| now + STEP * steps),
            });
            self.ids.insert(id, index);
        }
        for (&id, &index) in &self.ids {
            if self.clients[index].leaves == Some(step) {
                self.scheduler.remove(id, now);
            }
        }
        self.ids.retain(|_, index| self.clients[*index].leaves != Some(step));
    }

    /// Runs a plan as an engine would. What it computes for sequences that have ended or lost their blocks is void.
    fn run(&mut self, plan: &Plan, now: Instant) {
        self.computed += self.scheduler.commit(plan);
        for row in plan.rows.iter().filter(|row| row.samples) {
            if self.scheduler.sequence(row.id).is_none() {
                continue;
            }
            let index = self.ids[&row.id];
            self.outputs[index] += 1;
            if self.outputs[index] == self.clients[index].answer() {
                self.scheduler.remove(row.id, now);
                self.ids.remove(&row.id);
            } else {
                self.scheduler.append(row.id, self.outputs[index] as TokenId % 2);
            }
        }
    }

    fn check(&mut self, plan: &Plan) -> Result<(), TestCaseError> {
        self.cached += plan.cached_tokens;
        for id in &plan.expired {
            self.ids.remove(id);
        }
        let config = self.scheduler.config();
        prop_assert!(plan.rows.iter().map(|row| row.len).sum::<usize>() <= config.step_tokens);
        prop_assert!(self.scheduler.running.len() <= self.max_batch);
        prop_assert!(plan.admitted.is_empty() || self.scheduler.running.len() <= config.max_batch);
        let mut planned = HashSet::new();
        for row in &plan.rows {
            prop_assert!(planned.insert(row.id), "a sequence is planned twice");
            let sequence = self.sequence(row.id)?;
            let end = row.start + row.len;
            prop_assert!(row.len > 0);
            let before = self.under_way.rows.iter().find(|before| before.id == row.id);
            let length = sequence.tokens().len() + usize::from(before.is_some_and(|before| before.samples));
            prop_assert_eq!(
                row.start,
                before.map_or(sequence.computed, |before| before.start + before.len)
            );
            prop_assert_eq!(row.samples, end == length);
            prop_assert!(sequence.blocks().len() * BLOCK >= end);
            let client = &self.clients[self.ids[&row.id]];
            prop_assert!(end < client.prompt.len() + client.output, "its last token is computed");
        }
        self.write(plan)?;
        self.read(plan)?;
        self.no_block_is_computed_twice(plan)
    }

    fn sequence(&self, id: SequenceId) -> Result<&Sequence, TestCaseError> {
        self.scheduler
            .sequence(id)
            .ok_or_else(|| TestCaseError::fail("a row without a sequence"))
    }

    /// Notes what the plan's rows write; no two of them may write into one block.
    fn write(&mut self, plan: &Plan) -> Result<(), TestCaseError> {
        let mut written = HashSet::new();
        for row in &plan.rows {
            let sequence = self
                .scheduler
                .sequence(row.id)
                .ok_or_else(|| TestCaseError::fail("a row without a sequence"))?;
            let client = &self.clients[self.ids[&row.id]];
            let (salt, end) = (client.salt, row.start + row.len);
            for index in row.start / BLOCK..end.div_ceil(BLOCK) {
                let block = sequence.blocks()[index];
                prop_assert!(written.insert(block), "two sequences write into one block");
                let through = end.min((index + 1) * BLOCK);
                self.contents.insert(block, (salt, client.tokens(through)));
            }
        }
        Ok(())
    }

    /// Whatever a sequence counts as computed must lie in its blocks: its own salt's, with its own tokens before it, and
    /// not overwritten by anybody.
    fn read(&self, plan: &Plan) -> Result<(), TestCaseError> {
        for (id, sequence) in &self.scheduler.running {
            let mut rows = plan.rows.iter().chain(&self.under_way.rows);
            let own = rows.find(|row| row.id == *id);
            let computed = own.map_or(sequence.computed, |row| row.start + row.len);
            let client = &self.clients[self.ids[id]];
            for (index, block) in sequence.blocks().iter().enumerate().take(computed.div_ceil(BLOCK)) {
                let (owner, held) = &self.contents[block];
                let through = computed.min((index + 1) * BLOCK);
                prop_assert_eq!(*owner, client.salt, "another salt's block");
                prop_assert!(held.len() >= through, "overwritten");
                prop_assert_eq!(&held[..through], &client.tokens(through));
            }
        }
        Ok(())
    }

    /// With the prefix cache, sequences that need the same next block leave it to the first of them; chunks end with
    /// their blocks.
    fn no_block_is_computed_twice(&self, plan: &Plan) -> Result<(), TestCaseError> {
        let prefills = |plan: &Plan| {
            let rows = plan.rows.clone().into_iter();
            rows.filter(|row| row.len > 1 || !row.samples).enumerate()
        };
        let mut begun = HashMap::new();
        let before = prefills(&self.under_way).map(|row| (true, row));
        for (under_way, (number, row)) in before.chain(prefills(plan).map(|row| (false, row))) {
            let Some(sequence) = self
                .scheduler
                .sequence(row.id)
                .filter(|_| self.ids.contains_key(&row.id))
            else {
                continue;
            };
            let end = row.start + row.len;
            prop_assert!(
                under_way || row.samples || end % BLOCK == 0 || number == 0,
                "a chunk ends within a block"
            );
            let block_end = (row.start / BLOCK + 1) * BLOCK;
            if self.scheduler.blocks.has_prefix_cache() && block_end < sequence.tokens().len() {
                let salt = self.clients[self.ids[&row.id]].salt;
                let by = begun.insert((salt, &sequence.tokens()[..block_end]), row.id);
                prop_assert!(by.is_none_or(|id| id == row.id), "computed twice");
            }
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Every request ends with the output it asked for, under every schedule, with settings that change, with a pool so
    /// small that sequences are preempted, and with clients that leave or run out of time, whether plans are run one by
    /// one or each is made while the one before is under way. No plan breaks a budget, and
    /// every block a sequence reads holds its tokens. Each prompt token is computed or found once, and what a preemption
    /// costs is counted apart.
    #[test]
    fn every_request_ends(
        clients in prop::collection::vec(client(), 1..24),
        changes in prop::collection::vec(change(), 0..4),
        schedule in prop::sample::select(SCHEDULES.to_vec()),
        window_policy in prop::sample::select(vec![WindowPolicy::Adaptive, WindowPolicy::Fixed, WindowPolicy::None]),
        blocks in 10usize..24,
        prefix_cache in any::<bool>(),
        overlap in any::<bool>(),
    ) {
        let config = Config { schedule, window_policy, ..config() };
        let scheduler = Scheduler::new(config, BlockPool::new(blocks, BLOCK, prefix_cache)).unwrap();
        let mut drive = Drive::new(scheduler, &clients, overlap);
        drive.finish(&changes)?;
        let complete = |client: &Client| client.leaves.is_none() && client.deadline.is_none();
        for (client, output) in clients.iter().zip(&drive.outputs) {
            prop_assert!(*output == client.answer() || !complete(client));
        }
        if clients.iter().all(complete) {
            let sum = |count: fn(&Client) -> usize| clients.iter().map(count).sum::<usize>();
            prop_assert_eq!(drive.computed.prefill + drive.cached, sum(|client| client.prompt.len()));
            // The last token of an answer is not computed.
            prop_assert_eq!(drive.computed.decode, sum(|client| client.answer() - 1));
        }
        if !prefix_cache {
            prop_assert_eq!(drive.cached, 0);
        }
        if drive.scheduler.preemptions() == 0 {
            prop_assert_eq!(drive.computed.recomputed, 0);
        }
    }

    /// Where no two prompts begin alike, every step is the one it would be without the prefix cache, however full the
    /// pool is of what was kept: until a sequence is preempted, and then finds some of its own tokens again.
    #[test]
    fn without_spare_memory_it_is_as_if_there_were_no_cache(
        lengths in prop::collection::vec((1usize..26, 1usize..14, 0u64..60), 2..24), blocks in 10usize..16,
    ) {
        let scheduler = |cache| {
            let config = Config { step_tokens: 24, ..config() };
            Scheduler::new(config, BlockPool::new(blocks, BLOCK, cache).with_pin_budget(4)).unwrap()
        };
        let clients: Vec<_> = lengths.iter().enumerate().map(|(number, &(prompt, output, arrives))| Client {
            salt: 0,
            prompt: (0..prompt as u32).map(|index| index * 100 + number as u32).collect(),
            output, stops: usize::MAX, arrives, leaves: None, deadline: None,
        }).collect();
        let drive = |cache| Drive::new(scheduler(cache), &clients, false);
        let (mut with, mut without) = (drive(true), drive(false));
        let start = Instant::now();
        for step in 0..400 {
            let now = start + STEP * step as u32;
            let [one, other] = [&mut with, &mut without].map(|drive| {
                drive.come_and_go(step, now);
                let plan = drive.scheduler.plan(now);
                drive.run(&plan, now);
                plan
            });
            prop_assert_eq!(one.rows, other.rows, "step {}", step);
            prop_assert_eq!(one.admitted, other.admitted);
            prop_assert_eq!(with.scheduler.preemptions(), without.scheduler.preemptions());
            if without.scheduler.preemptions() > 0 {
                break;
            }
        }
    }
}
