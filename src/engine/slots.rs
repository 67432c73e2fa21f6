//! Which sequence has which of the device's slots, and what the device has of it there.
//!
//! A device that chooses tokens keeps what the next ones depend on, the sequence's random numbers and how often each token
//! was generated, and brings it up to date with each choice. That is right as long as every token that the device chose is
//! one that the sequence has. Where one is thrown away, or was chosen elsewhere, or a step failed, the slot is set again.

use std::collections::{BTreeSet, HashMap};

use crate::batching::SequenceId;

/// The slots that were handed out. There are never more than there were sequences at once.
#[derive(Debug, Default)]
pub struct Slots {
    held: HashMap<SequenceId, Held>,
    /// Numbers below `handed_out` that nobody has.
    free: BTreeSet<u32>,
    handed_out: u32,
}

#[derive(Debug, Clone, Copy)]
struct Held {
    number: u32,
    /// How many of the sequence's tokens the device will have counted when it has run what is enqueued. `None` where that
    /// is not known.
    counted: Option<usize>,
}

/// Where a sequence's state is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    pub number: u32,
    /// Whether the slot is to be set first.
    pub set: bool,
}

impl Slots {
    /// Whether the device, behind what is enqueued, goes on with a sequence's token number `n`, from 0, without being told
    /// of those before.
    pub fn goes_on(&self, id: SequenceId, n: usize) -> bool {
        self.held.get(&id).is_some_and(|held| held.counted == Some(n))
    }

    /// Where a step that is enqueued now has the sequence's state, whose token number `n` it chooses. The step must reach
    /// the device, or all be [forgotten](Self::forget_all). Those with penalties take the low numbers, because the device
    /// has counts for all up to the highest of theirs.
    pub fn enqueue(&mut self, id: SequenceId, n: usize, penalised: bool) -> Place {
        let set = !self.goes_on(id, n);
        let number = match self.held.get(&id) {
            Some(held) => held.number,
            None => self.take(penalised),
        };
        let counted = Some(n + 1);
        self.held.insert(id, Held { number, counted });
        Place { number, set }
    }

    fn take(&mut self, low: bool) -> u32 {
        let free = if low {
            self.free.pop_first()
        } else {
            self.free.pop_last()
        };
        free.unwrap_or_else(|| {
            self.handed_out += 1;
            self.handed_out - 1
        })
    }

    /// A token that the device chose is not the sequence's, or the other way round.
    pub fn forget(&mut self, id: SequenceId) {
        if let Some(held) = self.held.get_mut(&id) {
            held.counted = None;
        }
    }

    /// A step failed, and what it left on the device is not to be relied upon.
    pub fn forget_all(&mut self) {
        self.held.values_mut().for_each(|held| held.counted = None);
    }

    /// The sequence has ended. Steps under way may still write into its slot; whoever has it next sets it behind them.
    pub fn release(&mut self, id: SequenceId) {
        if let Some(held) = self.held.remove(&id) {
            self.free.insert(held.number);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, VecDeque};

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_slot_is_set_once_and_again_when_the_counts_differ() {
        let mut slots = Slots::default();
        let place = |number, set| Place { number, set };
        assert_eq!(slots.enqueue(7, 0, false), place(0, true));
        assert_eq!(slots.enqueue(7, 1, false), place(0, false));
        assert!(slots.goes_on(7, 2) && !slots.goes_on(7, 1) && !slots.goes_on(8, 2));
        assert_eq!(slots.enqueue(7, 1, false), place(0, true), "token 1 was thrown away");
        slots.forget(7);
        assert_eq!(slots.enqueue(7, 2, false), place(0, true));
        slots.forget_all();
        assert_eq!(slots.enqueue(7, 3, false), place(0, true));
        assert_eq!(slots.enqueue(7, 4, false), place(0, false));
    }

    #[test]
    fn penalised_sequences_have_the_low_numbers() {
        let mut slots = Slots::default();
        for id in 0..4 {
            assert_eq!(slots.enqueue(id, 0, false).number, id as u32);
        }
        for id in [0, 2, 3] {
            slots.release(id);
        }
        assert_eq!(slots.enqueue(9, 0, true).number, 0);
        assert_eq!(slots.enqueue(10, 0, false).number, 3);
        assert_eq!(slots.enqueue(11, 5, false), Place { number: 2, set: true });
    }

    /// What happens to an engine with overlap. Sequences are named by their place among those that live.
    #[derive(Debug, Clone)]
    enum Event {
        Arrive,
        /// A step is enqueued, for some of them, and the one before lands.
        Step(Vec<bool>),
        /// The step under way lands before anything else is enqueued.
        Land,
        /// The device fails a step, and with it the one under way.
        Fail,
        /// A step cannot be enqueued; the one under way lands.
        FailBehind,
        /// Loses the token under way.
        Preempt(usize),
        /// A token is chosen from logits, behind the step under way.
        OnHost(usize),
        /// Ends, whatever is under way for it.
        Finish(usize),
    }

    fn event() -> impl Strategy<Value = Event> {
        prop_oneof![
            2 => Just(Event::Arrive),
            9 => prop::collection::vec(prop::bool::weighted(0.8), 8).prop_map(Event::Step),
            1 => Just(Event::Land),
            1 => Just(Event::Fail),
            1 => Just(Event::FailBehind),
            1 => (0usize..8).prop_map(Event::Preempt),
            1 => (0usize..8).prop_map(Event::OnHost),
            1 => (0usize..8).prop_map(Event::Finish),
        ]
    }

    /// Tokens are all different, so that one that was thrown away is never taken for another.
    #[derive(Default)]
    struct World {
        slots: Slots,
        /// Sequences and their tokens.
        living: BTreeMap<SequenceId, Vec<u64>>,
        /// What the device has in each slot: the tokens counted there.
        device: HashMap<u32, Vec<u64>>,
        /// What the steps under way chose, and for whom.
        under_way: VecDeque<Vec<(SequenceId, u64)>>,
        next_id: SequenceId,
        next_token: u64,
        most: usize,
    }

    impl World {
        fn id(&self, index: usize) -> Option<SequenceId> {
            self.living.keys().copied().nth(index)
        }

        fn token(&mut self) -> u64 {
            self.next_token += 1;
            self.next_token
        }

        /// The token that a step under way is choosing for a sequence.
        fn awaited(&self, id: SequenceId) -> Option<u64> {
            let mut rows = self.under_way.iter().flatten();
            rows.find(|(row, _)| *row == id).map(|&(_, token)| token)
        }

        fn land(&mut self) {
            for (id, token) in self.under_way.pop_front().unwrap_or_default() {
                match self.living.get_mut(&id) {
                    Some(tokens) => tokens.push(token),
                    None => self.slots.forget(id),
                }
            }
        }

        fn step(&mut self, wanted: &[bool]) {
            let ids: Vec<_> = self.living.keys().copied().collect();
            let rows: Vec<_> = ids.into_iter().zip(wanted).filter(|(_, wanted)| **wanted).collect();
            let mut chosen = Vec::new();
            let mut taken = BTreeSet::new();
            for (id, _) in rows {
                let mut known = self.living[&id].clone();
                let awaited = self.awaited(id);
                let n = known.len() + usize::from(awaited.is_some());
                assert!(awaited.is_none() || self.slots.goes_on(id, n), "{id} cannot be set");
                let Place { number, set } = self.slots.enqueue(id, n, id % 2 == 0);
                assert!(taken.insert(number) && (number as usize) < self.most);
                if set {
                    self.device.insert(number, known.clone());
                }
                known.extend(awaited);
                assert_eq!(self.device[&number], known, "sequence {id}, set: {set}");
                let token = self.token();
                self.device.get_mut(&number).unwrap().push(token);
                chosen.push((id, token));
            }
            self.under_way.push_back(chosen);
            if self.under_way.len() > 1 {
                self.land();
            }
        }

        fn happen(&mut self, event: &Event) {
            match event {
                Event::Arrive if self.living.len() < 8 => {
                    self.living.insert(self.next_id, Vec::new());
                    self.next_id += 1;
                    self.most = self.most.max(self.living.len());
                }
                Event::Arrive => {}
                Event::Step(wanted) => self.step(wanted),
                Event::Land => self.land(),
                Event::Fail => {
                    self.under_way.clear();
                    self.slots.forget_all();
                    self.device.values_mut().for_each(|tokens| tokens.push(0));
                }
                Event::FailBehind => {
                    self.slots.forget_all();
                    self.land();
                }
                Event::Preempt(index) => {
                    let Some(id) = self.id(*index) else { return };
                    // The engine hears of the void token when the step lands, and the sequence comes back after that.
                    for (row, token) in self.under_way.iter_mut().flatten() {
                        if *row == id {
                            (*row, *token) = (SequenceId::MAX, 0);
                        }
                    }
                    if *index % 2 == 0 {
                        self.slots.forget(id);
                    }
                }
                Event::OnHost(index) => {
                    self.land();
                    let Some(id) = self.id(*index) else { return };
                    let token = self.token();
                    self.living.entry(id).or_default().push(token);
                    self.slots.forget(id);
                }
                Event::Finish(index) => {
                    let Some(id) = self.id(*index) else { return };
                    self.living.remove(&id);
                    self.slots.release(id);
                }
            }
        }
    }

    proptest! {
        /// At every choice the device has counted the sequence's own tokens, all of them and no others.
        #[test]
        fn the_devices_state_is_the_hosts(events in prop::collection::vec(event(), 1..80)) {
            let mut world = World::default();
            for event in &events {
                world.happen(event);
            }
        }
    }
}
