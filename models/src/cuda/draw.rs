//! The words in which the device is told how rows' tokens are chosen, and what the rows' slots are set to.

use std::collections::HashSet;

use candle_core::{Result, bail};

use crate::{Draw, Slot};

/// Words that one row's draw takes.
pub const DRAW_WORDS: usize = 10;
/// Words that a slot's setting takes.
pub const SET_WORDS: usize = 7;
/// Words that a bias takes, and a count: a token and a number.
pub const PAIR_WORDS: usize = 2;
/// The slot of what has none: `kernels/common.cuh`.
pub const NO_SLOT: u32 = u32::MAX;
/// More slots than any batch has rows, so that a number that means nothing takes no memory.
const MOST_SLOTS: u32 = 1 << 16;
/// Set in the count of a token that stands in the prompt.
const IN_PROMPT: u32 = 1 << 31;

/// What `kernels/sample.cu` reads.
#[derive(Debug, Default)]
pub struct Packed {
    /// `DRAW_WORDS` a row.
    pub draws: Vec<u32>,
    /// `SET_WORDS` for each slot that is set.
    pub sets: Vec<u32>,
    /// The biases of all draws and the counts of all settings, `PAIR_WORDS` each.
    pub pairs: Vec<u32>,
}

/// How many slots must be there.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SlotRoom {
    pub slots: usize,
    /// How many of them, the first ones, with a count for each token.
    pub counted: usize,
}

impl SlotRoom {
    pub fn of(draws: &[Draw]) -> Self {
        let mut room = Self::default();
        for draw in draws {
            let wanted = draw.slot.as_ref().map_or(0, |slot| slot.number as usize + 1);
            room.slots = room.slots.max(wanted);
            if draw.penalises() {
                room.counted = room.counted.max(wanted);
            }
        }
        room
    }
}

/// Refuses draws that the kernels would read or write outside of their tables for, or that need a slot and have none.
pub fn check(draws: &[Draw], rows: usize, vocabulary: usize) -> Result<()> {
    if draws.len() != rows {
        bail!("step: {rows} rows want tokens, {} draws are given", draws.len())
    }
    let mut taken = HashSet::new();
    for draw in draws {
        let counts = draw.slot.iter().flat_map(|slot| &slot.set).flat_map(|set| &set.counts);
        let tokens = counts.map(|count| count.token);
        let mut tokens = tokens.chain(draw.biases.iter().map(|&(token, _)| token));
        if let Some(token) = tokens.find(|&token| token as usize >= vocabulary) {
            bail!("step: a draw names token {token}, outside the vocabulary of {vocabulary}")
        }
        match &draw.slot {
            None if draw.temperature != 0.0 || draw.penalises() => {
                bail!("step: a row has neither random numbers nor counts without a slot")
            }
            Some(slot) if slot.number >= MOST_SLOTS => bail!("step: there is no slot {}", slot.number),
            Some(slot) if !taken.insert(slot.number) => bail!("step: two rows have slot {}", slot.number),
            _ => {}
        }
    }
    Ok(())
}

/// The draws of `rows` rows, of which those behind the last draw are padding. The first pair will be the one with number
/// `first`, counted in pairs from wherever the kernels are told that they begin.
pub fn pack(draws: &[Draw], rows: usize, first: usize) -> Packed {
    let padding = Draw::greedy();
    let mut packed = Packed::default();
    for draw in (0..rows).map(|row| draws.get(row).unwrap_or(&padding)) {
        packed.draw(draw, first);
        if let Some(slot) = &draw.slot {
            packed.set(slot, draw.penalises(), first);
        }
    }
    packed
}

impl Packed {
    fn draw(&mut self, draw: &Draw, first: usize) {
        let biases = draw.biases.iter().map(|&(token, bias)| [token, bias.to_bits()]);
        let biases = self.list(biases, first);
        let slot = draw.slot.as_ref().map_or(NO_SLOT, |slot| slot.number);
        self.draws.extend([draw.temperature.to_bits(), draw.top_k]);
        self.draws.extend([draw.top_p, draw.min_p].map(f32::to_bits));
        self.draws.extend([slot, biases[0], biases[1]]);
        self.draws
            .extend([draw.repetition, draw.presence, draw.frequency].map(f32::to_bits));
    }

    fn set(&mut self, slot: &Slot, counted: bool, first: usize) {
        let Some(state) = &slot.set else { return };
        let counts = state.counts.iter().filter(|_| counted);
        let counts = counts.map(|count| {
            [
                count.token,
                count.generated | if count.in_prompt { IN_PROMPT } else { 0 },
            ]
        });
        let counts = self.list(counts, first);
        let (low, high) = (state.seed as u32, (state.seed >> 32) as u32);
        self.sets.extend([slot.number, low, high, state.generated]);
        self.sets.extend([counted.into(), counts[0], counts[1]]);
    }

    /// Lists pairs; gives where they begin and end.
    fn list(&mut self, pairs: impl Iterator<Item = [u32; PAIR_WORDS]>, first: usize) -> [u32; 2] {
        let begin = self.pairs.len();
        self.pairs.extend(pairs.flatten());
        [begin, self.pairs.len()].map(|words| (first + words / PAIR_WORDS) as u32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Count, State};

    fn with(number: u32, set: Option<State>) -> Draw {
        Draw {
            slot: Some(Slot { number, set }),
            ..Draw::greedy()
        }
    }

    fn state(token: u32) -> State {
        let count = Count {
            token,
            in_prompt: true,
            generated: 3,
        };
        State {
            seed: 0x1_0000_0002,
            generated: 5,
            counts: vec![count],
        }
    }

    #[test]
    fn draws_that_would_reach_outside_are_refused() {
        let said = |draws: &[Draw], rows| check(draws, rows, 10).map_err(|error| error.to_string());
        assert_eq!(
            said(&[with(0, None), with(7, Some(state(9))), Draw::greedy()], 3),
            Ok(())
        );
        for (draws, complaint) in [
            (vec![], "0 draws"),
            (vec![with(0, Some(state(10)))], "token 10"),
            (vec![with(NO_SLOT, None)], "there is no slot"),
        ] {
            let error = said(&draws, 1).unwrap_err();
            assert!(error.contains(complaint), "{error}");
        }
        assert!(said(&[with(3, None), with(3, None)], 2).unwrap_err().contains("slot 3"));
        let biased = Draw {
            biases: vec![(10, 1.0)],
            ..Draw::greedy()
        };
        assert!(said(&[biased], 1).unwrap_err().contains("token 10"));
        for (temperature, frequency) in [(1.0, 0.0), (0.0, 0.5)] {
            let homeless = Draw {
                temperature,
                frequency,
                ..Draw::greedy()
            };
            assert!(said(&[homeless], 1).unwrap_err().contains("without a slot"));
        }
    }

    #[test]
    fn a_slot_is_told_apart_from_padding_and_counts_are_sent_for_penalties_alone() {
        let plain = with(2, Some(state(4)));
        let penalised = Draw {
            presence: 0.5,
            biases: vec![(6, -1.0)],
            ..with(1, Some(state(4)))
        };
        let draws = [plain, penalised];
        let packed = pack(&draws, 3, 10);
        let slots: Vec<_> = packed.draws.chunks(DRAW_WORDS).map(|draw| draw[4]).collect();
        assert_eq!(slots, [2, 1, NO_SLOT]);
        assert_eq!(packed.draws[DRAW_WORDS + 5..][..2], [10, 11], "the bias");
        assert_eq!(packed.sets, [2, 2, 1, 5, 0, 10, 10, 1, 2, 1, 5, 1, 11, 12]);
        assert_eq!(packed.pairs, [6, (-1f32).to_bits(), 4, IN_PROMPT | 3]);
        let room = SlotRoom { slots: 3, counted: 2 };
        assert_eq!(SlotRoom::of(&draws), room);
    }
}
