//! The outlook: when what runs and what waits will have ended, if nothing else came.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, VecDeque},
    sync::Arc,
    time::Instant,
};

use super::{
    Schedule, SequenceId,
    predict::StepCost,
    queue::{Turns, fair_order},
};
use crate::request::Tenant;

/// What a sequence still needs, in tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Work {
    pub id: SequenceId,
    /// Tokens it has: its prompt and what was generated.
    pub length: usize,
    /// Tokens to compute before its next token; 1 while it decodes.
    pub prefill: usize,
    /// Tokens that it is expected to generate yet, at least 1.
    pub decode: usize,
    /// Tokens that few in its place would generate more of, at least `decode`.
    pub long: usize,
    pub deadline: Option<Instant>,
}

/// A tenant's waiting requests in its own order.
#[derive(Debug, Clone)]
pub struct Line {
    pub tenant: Arc<Tenant>,
    /// Its virtual counter.
    pub served: f64,
    /// With their priorities.
    pub waiting: Vec<(i32, Work)>,
}

/// What the scheduler has before it.
#[derive(Debug, Clone)]
pub struct Outlook {
    pub schedule: Schedule,
    pub max_batch: usize,
    pub step_tokens: usize,
    /// Tokens that the KV cache holds.
    pub capacity: usize,
    /// Oldest first, with their tenants.
    pub running: Vec<(Arc<Tenant>, Work)>,
    pub lines: Vec<Line>,
}

impl Outlook {
    pub fn is_idle(&self) -> bool {
        self.running.is_empty() && self.lines.iter().all(|line| line.waiting.is_empty())
    }

    /// The waiting requests in the order in which they will run.
    pub fn fair_order(&self) -> Vec<Work> {
        let turns = self.lines.iter().map(|line| Turns {
            served: line.served,
            weight: f64::from(line.tenant.weight.max(1)),
            upcoming: line
                .waiting
                .iter()
                .map(|(_, work)| (work.length as f64, *work))
                .peekable(),
        });
        fair_order(turns.collect()).collect()
    }

    /// When each running sequence and then each of `waiting`, admitted in its order, ends: in seconds from now.
    pub fn ends(&self, cost: &StepCost, waiting: &[Work]) -> Vec<f64> {
        let mut device = Device::new(self, cost, waiting.len());
        for (index, (_, work)) in self.running.iter().enumerate() {
            device.join(index, work);
        }
        let mut next = 0;
        loop {
            while next < waiting.len() && device.has_room_for(&waiting[next]) {
                device.join(self.running.len() + next, &waiting[next]);
                next += 1;
            }
            if device.running == 0 {
                return device.ends;
            }
            device.advance();
        }
    }
}

/// A device that runs the outlook step by step, taking steps that are alike at once.
struct Device<'a> {
    outlook: &'a Outlook,
    cost: &'a StepCost,
    seconds: f64,
    step: u64,
    running: usize,
    /// Tokens in the KV cache.
    held: usize,
    /// Index, tokens to prefill, tokens to generate, tokens it had.
    prefilling: VecDeque<(usize, usize, usize, usize)>,
    /// The step after which each decoding sequence ends, its index, and the tokens it then holds.
    decoding: BinaryHeap<Reverse<(u64, usize, usize)>>,
    ends: Vec<f64>,
}

impl<'a> Device<'a> {
    fn new(outlook: &'a Outlook, cost: &'a StepCost, waiting: usize) -> Self {
        Self {
            outlook,
            cost,
            seconds: 0.0,
            step: 0,
            running: 0,
            held: 0,
            prefilling: VecDeque::new(),
            decoding: BinaryHeap::new(),
            ends: vec![0.0; outlook.running.len() + waiting],
        }
    }

    fn has_room_for(&self, work: &Work) -> bool {
        let seat = match self.outlook.schedule {
            Schedule::Continuous | Schedule::Dynamic => self.running < self.outlook.max_batch,
            Schedule::Sequential => self.running == 0,
        };
        // A closed dynamic batch takes nobody in once it has begun to run.
        let joins = self.outlook.schedule != Schedule::Dynamic || self.running == self.prefilling.len();
        self.running == 0 || (seat && joins && self.held + work.length <= self.outlook.capacity)
    }

    fn join(&mut self, index: usize, work: &Work) {
        self.running += 1;
        self.held += work.length;
        if work.prefill > 1 {
            self.prefilling
                .push_back((index, work.prefill, work.decode, work.length));
        } else {
            self.decode(index, work.decode, work.length);
        }
    }

    fn decode(&mut self, index: usize, tokens: usize, length: usize) {
        let end = self.step + tokens as u64;
        self.decoding.push(Reverse((end, index, length + tokens)));
    }

    /// To the next end, or by one step where a step has prefill.
    fn advance(&mut self) {
        let decodes = self.decoding.len();
        let steps = match self.decoding.peek() {
            Some(Reverse((end, ..))) if self.prefilling.is_empty() => end - self.step,
            _ => 1,
        };
        self.step += steps;
        let prefilled = self.prefill(self.outlook.step_tokens.saturating_sub(decodes).max(1));
        self.seconds += steps as f64 * self.cost.predict(prefilled, decodes);
        self.held += steps as usize * decodes;
        while let Some(&Reverse((end, index, length))) = self.decoding.peek()
            && end <= self.step
        {
            self.decoding.pop();
            self.running -= 1;
            self.held = self.held.saturating_sub(length);
            self.ends[index] = self.seconds;
        }
    }

    /// Prefill chunks in what decodes leave of the budget; whose prompt is done has its first token.
    fn prefill(&mut self, budget: usize) -> usize {
        let mut left = budget;
        while let Some(front) = self.prefilling.front_mut()
            && left > 0
        {
            let chunk = front.1.min(left);
            front.1 -= chunk;
            left -= chunk;
            if front.1 > 0 {
                break;
            }
            if let Some((index, _, decode, length)) = self.prefilling.pop_front() {
                self.decode(index, decode.saturating_sub(1), length);
            }
        }
        budget - left
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Steps of 10 ms, 1 ms a prefill token, 1 ms a decode row.
    fn cost() -> StepCost {
        let mut cost = StepCost::default();
        for step in 0..4000usize {
            let (prefill, decodes) = (step % 5 * 7, step % 11);
            cost.observe(prefill, decodes, 0.01 + 0.001 * (prefill + decodes) as f64);
        }
        cost
    }

    fn work(prefill: usize, decode: usize) -> Work {
        Work {
            id: 0,
            length: prefill,
            prefill,
            decode,
            long: decode,
            deadline: None,
        }
    }

    fn outlook(schedule: Schedule, running: &[Work]) -> Outlook {
        let tenant = Arc::new(Tenant::anyone());
        Outlook {
            schedule,
            max_batch: 2,
            step_tokens: 10,
            capacity: 1000,
            running: running.iter().map(|&work| (tenant.clone(), work)).collect(),
            lines: Vec::new(),
        }
    }

    fn milliseconds(outlook: &Outlook, waiting: &[Work]) -> Vec<u64> {
        let ends = outlook.ends(&cost(), waiting);
        ends.into_iter().map(|seconds| (seconds * 1e3).round() as u64).collect()
    }

    #[test]
    fn one_alone_takes_its_prefill_and_its_decodes() {
        // Two chunks of 10 and 5 tokens, the second giving the first token, then three steps of one row.
        let ends = milliseconds(&outlook(Schedule::Continuous, &[]), &[work(15, 4)]);
        assert_eq!(ends, [20 + 15 + 3 * 11]);
    }

    #[test]
    fn a_third_waits_for_a_seat_and_slows_the_others() {
        let running = [
            Work {
                length: 30,
                ..work(1, 2)
            },
            Work {
                length: 30,
                ..work(1, 9)
            },
        ];
        let ends = milliseconds(&outlook(Schedule::Continuous, &running), &[work(8, 2)]);
        // Two steps of two rows; a step of one row and 8 tokens; one of two rows; five of one row.
        assert_eq!(ends, [24, 24 + 19 + 12 + 5 * 11, 24 + 19 + 12]);
    }

    #[test]
    fn schedules_let_in_as_the_scheduler_does() {
        let waiting = [work(5, 1), work(5, 1), work(5, 1)];
        let ends = |schedule| milliseconds(&outlook(schedule, &[]), &waiting);
        assert_eq!(ends(Schedule::Sequential), [15, 30, 45]);
        assert_eq!(ends(Schedule::Dynamic), [20, 20, 35]);
        let busy = outlook(
            Schedule::Dynamic,
            &[Work {
                length: 9,
                ..work(1, 3)
            }],
        );
        assert_eq!(milliseconds(&busy, &waiting[..1]), [33, 48]);
    }

    #[test]
    fn the_kv_cache_bounds_what_runs() {
        let mut outlook = outlook(Schedule::Continuous, &[]);
        outlook.capacity = 9;
        assert_eq!(milliseconds(&outlook, &[work(5, 1), work(5, 1)]), [15, 30]);
    }
}
