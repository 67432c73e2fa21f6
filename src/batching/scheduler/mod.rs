//! The scheduler: one plan a step.
//!
//! Sequences wait until a batch closes, run until they end, and stand aside when the KV blocks run out. A step decodes
//! one token for every running sequence that can, and fills the rest of its token budget with prefill chunks, so that a
//! long prompt does not stall the others (Agrawal et al. 2024, Sarathi-Serve, section 4). Whoever is next in the queue's
//! fair order goes first; the youngest is preempted first, so the oldest always ends.

mod config;
mod outlook;
mod pins;
mod plan;
mod sequence;
mod step;

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use super::queue::{Entry, FairQueue, OUTPUT_COST};
use super::{
    BlockCounts, BlockPool, CachedPrefix, PinCounts, Schedule,
    window::{self, Waiting},
};
use crate::request::TokenId;
pub use config::{Change, Config, ConfigError};
pub use pins::{Pin, PinError};
pub use plan::{Admission, Batch, Plan, Row};
pub use sequence::{Arrival, Computed, Sequence, SequenceId};

/// Owns every sequence and every KV block. Give it the arrivals, ask for a [`Plan`], run it, [`Scheduler::commit`] it,
/// and say what was sampled ([`Scheduler::append`], [`Scheduler::remove`]).
///
/// The next plan may be asked for while one is under way, if it runs after that one: it takes for granted that every
/// sequence goes on whose end cannot be known yet. Of a sequence that is not among the running ones when a plan is
/// committed, whatever the plan computed is void. Its blocks may have other holders by then; what those write comes later.
#[derive(Debug)]
pub struct Scheduler {
    config: Config,
    blocks: BlockPool,
    waiting: FairQueue<Sequence>,
    running: BTreeMap<SequenceId, Sequence>,
    /// Lost their blocks and go before whoever waits.
    preempted: BTreeMap<SequenceId, Sequence>,
    pins: Vec<Pin>,
    next_id: SequenceId,
    /// Since when an open window has held up requests that could run.
    window_open: Option<Instant>,
    /// Moving average of the time from admission to the end.
    service: Duration,
    preemptions: u64,
}

impl Scheduler {
    pub fn new(config: Config, mut blocks: BlockPool) -> Result<Self, ConfigError> {
        config.check(&blocks)?;
        blocks.leave_room_for(config.max_model_len);
        Ok(Self {
            config,
            blocks,
            waiting: FairQueue::default(),
            running: BTreeMap::new(),
            preempted: BTreeMap::new(),
            pins: Vec::new(),
            next_id: 0,
            window_open: None,
            service: Duration::ZERO,
            preemptions: 0,
        })
    }

    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Changes settings from the next plan on. Sequences that run go on, even where there are now more of them than a
    /// batch may have.
    pub fn configure(&mut self, change: &Change) -> Result<&Config, ConfigError> {
        let config = self.config.with(change);
        config.check(&self.blocks)?;
        self.config = config;
        Ok(&self.config)
    }

    /// Sequences that wait for a batch.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Sequences that were admitted and have not ended.
    pub fn running(&self) -> usize {
        self.running.len() + self.preempted.len()
    }

    pub fn blocks(&self) -> &BlockPool {
        &self.blocks
    }

    /// For blocks that come from elsewhere, before any sequence runs.
    pub fn blocks_mut(&mut self) -> &mut BlockPool {
        &mut self.blocks
    }

    pub fn block_counts(&self) -> BlockCounts {
        self.blocks.counts()
    }

    /// Slots in a block.
    pub fn block_size(&self) -> usize {
        self.blocks.block_size()
    }

    /// The cached prefixes that a tenant may be told of, in no order. Looks at every block.
    pub fn prefixes(&self, reader: &str) -> Vec<CachedPrefix> {
        self.blocks.prefixes(reader)
    }

    pub fn pin_counts(&self) -> PinCounts {
        self.blocks.pins()
    }

    /// How often a sequence lost its blocks, since the start.
    pub fn preemptions(&self) -> u64 {
        self.preemptions
    }

    /// A running sequence.
    pub fn sequence(&self, id: SequenceId) -> Option<&Sequence> {
        self.running.get(&id)
    }

    /// Queues a request.
    pub fn push(&mut self, arrival: Arrival) -> SequenceId {
        let id = self.next_id;
        self.next_id += 1;
        let entry = Entry {
            tenant: arrival.tenant.clone(),
            priority: arrival.priority,
            arrival: arrival.arrival,
            item: Sequence::new(arrival),
        };
        self.waiting.push(id, entry);
        id
    }

    /// What the next step runs, after the one under way, if there is one. Admits, expires and preempts as needed.
    pub fn plan(&mut self, now: Instant) -> Plan {
        let mut plan = Plan {
            expired: self.expire(now),
            ..Plan::default()
        };
        let unpinned_at = self.expire_pins(now);
        self.resume(&mut plan);
        let closes_at = self.close_batches(&mut plan, now);
        self.plan_decodes(&mut plan);
        self.plan_prefills(&mut plan);
        for row in &plan.rows {
            if let Some(sequence) = self.running.get_mut(&row.id) {
                sequence.planned = row.start + row.len;
                sequence.awaited += usize::from(row.samples);
            }
        }
        if plan.rows.is_empty() {
            let deadlines = self.waiting.iter().filter_map(|(_, entry)| entry.item.deadline);
            plan.wake = deadlines.chain(closes_at).chain(unpinned_at).min();
        }
        plan
    }

    /// The plan's rows have run: their keys and values are in the cache.
    pub fn commit(&mut self, plan: &Plan) -> Computed {
        let mut computed = Computed::default();
        for row in &plan.rows {
            if let Some(sequence) = self.running.get_mut(&row.id) {
                computed += sequence.compute(row.start + row.len, &mut self.blocks);
            }
        }
        computed
    }

    /// A sampled token that does not end its sequence.
    pub fn append(&mut self, id: SequenceId, token: TokenId) {
        if let Some(sequence) = self.running.get_mut(&id) {
            sequence.tokens.push(token);
            sequence.awaited = sequence.awaited.saturating_sub(1);
            self.waiting.charge(&sequence.tenant, OUTPUT_COST);
        }
    }

    /// The sequence ended, failed, or has nobody left who waits for it: its blocks are let go.
    pub fn remove(&mut self, id: SequenceId, now: Instant) {
        if let Some(sequence) = self.running.remove(&id).or_else(|| self.preempted.remove(&id)) {
            self.blocks.release(&sequence.blocks);
            if let Some(admitted) = sequence.admitted {
                let took = now.saturating_duration_since(admitted);
                self.service = if self.service.is_zero() {
                    took
                } else {
                    (self.service * 7 + took) / 8
                };
            }
        } else {
            self.waiting.remove(id);
        }
    }

    fn expire(&mut self, now: Instant) -> Vec<SequenceId> {
        let late = |sequence: &Sequence| sequence.deadline.is_some_and(|deadline| deadline <= now);
        let waiting = self.waiting.iter().map(|(id, entry)| (id, &entry.item));
        let admitted = self
            .running
            .iter()
            .chain(&self.preempted)
            .map(|(&id, sequence)| (id, sequence));
        let all = waiting.chain(admitted);
        let expired: Vec<_> = all.filter(|(_, sequence)| late(sequence)).map(|(id, _)| id).collect();
        for &id in &expired {
            self.remove(id, now);
        }
        expired
    }

    /// Takes preempted sequences up again, oldest first, while their blocks are to be had.
    fn resume(&mut self, plan: &mut Plan) {
        while let Some((&id, _)) = self.preempted.first_key_value() {
            let Some((_, mut sequence)) = self.preempted.pop_first() else {
                return;
            };
            let Some(cached) = self.give_blocks(&mut sequence) else {
                self.preempted.insert(id, sequence);
                return;
            };
            plan.cached_tokens += cached;
            self.running.insert(id, sequence);
        }
    }

    /// Admits batches as they close; gives the time at which the next one does.
    fn close_batches(&mut self, plan: &mut Plan, now: Instant) -> Option<Instant> {
        while let Some(oldest_arrival) = self.waiting.oldest_arrival() {
            let room = self.room();
            if room == 0 {
                self.window_open = None;
                return None;
            }
            let Config {
                window_policy,
                window,
                max_batch,
                ..
            } = self.config;
            let waiting = Waiting {
                count: self.waiting.len(),
                oldest_arrival,
                deadline: self.waiting.iter().filter_map(|(_, entry)| entry.item.deadline).min(),
                device_idle: self.running.is_empty(),
            };
            let closes_at = window::closes_at(window_policy, window, max_batch, waiting, self.service, now);
            if closes_at > now {
                self.window_open.get_or_insert(now);
                return Some(closes_at);
            }
            if !self.admit_batch(room, plan, now) {
                return None;
            }
        }
        self.window_open = None;
        None
    }

    /// How many sequences may still join.
    fn room(&self) -> usize {
        if !self.preempted.is_empty() {
            return 0;
        }
        match self.config.schedule {
            Schedule::Continuous => self.config.max_batch.saturating_sub(self.running.len()),
            Schedule::Dynamic if self.running.is_empty() => self.config.max_batch,
            Schedule::Sequential if self.running.is_empty() => 1,
            Schedule::Dynamic | Schedule::Sequential => 0,
        }
    }

    /// Moves the bucket of the request that is next in fair order from waiting to running, as far as blocks reach.
    /// False: not even that request.
    fn admit_batch(&mut self, room: usize, plan: &mut Plan, now: Instant) -> bool {
        let order = self.waiting.order(now, |sequence| sequence.tokens.len() as f64);
        let (ids, lengths): (Vec<_>, Vec<_>) = order.map(|(id, entry)| (id, entry.item.tokens.len())).unzip();
        let chosen = self.config.buckets.select(lengths.into_iter(), room);
        let mut batch = Batch {
            requests: 0,
            prompt_tokens: 0,
            padded_tokens: 0,
        };
        let mut longest = 0;
        for index in chosen {
            let id = ids[index];
            let Some(mut entry) = self.waiting.remove(id) else {
                break;
            };
            let Some(cached_tokens) = self.give_blocks(&mut entry.item) else {
                self.waiting.insert(id, entry);
                break;
            };
            plan.cached_tokens += cached_tokens;
            let mut sequence = entry.item;
            self.waiting.charge(&entry.tenant, sequence.tokens.len() as f64);
            sequence.admitted = Some(now);
            batch.requests += 1;
            batch.prompt_tokens += sequence.tokens.len();
            longest = longest.max(sequence.tokens.len());
            let held_up_since = self.window_open.map(|opened| opened.max(sequence.arrival));
            let window = held_up_since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
            plan.admitted.push(Admission {
                id,
                window,
                cached_tokens,
            });
            self.running.insert(id, sequence);
        }
        if batch.requests > 0 {
            batch.padded_tokens = longest * batch.requests;
            plan.batches.push(batch);
        }
        batch.requests > 0
    }

    /// Gives a sequence without blocks all that its tokens so far need, the cached prefix first. Leaves one block for
    /// each running sequence, so that an admission does not preempt at once. Gives the prompt tokens that it saves, or
    /// `None` where blocks do not reach.
    fn give_blocks(&mut self, sequence: &mut Sequence) -> Option<usize> {
        // Held before anything is allocated, so that nothing of it is evicted.
        let cached = sequence.take_cached(&mut self.blocks);
        let wanted = self.blocks.blocks_for(sequence.tokens.len()) - cached.len();
        let reserve = self.running.len();
        if self.blocks.available() < wanted + reserve {
            self.blocks.release(&cached);
            return None;
        }
        let saved = sequence.accept(cached, &mut self.blocks);
        sequence
            .blocks
            .extend((0..wanted).map_while(|_| self.blocks.allocate()));
        Some(saved)
    }
}

#[cfg(test)]
mod cache_tests;
#[cfg(test)]
mod property_tests;
#[cfg(test)]
mod tests;
