//! Slots, penalties and draws over several steps, against the rules as they read: count; penalise; sort, cut, draw.

use proptest::prelude::*;

use super::*;
use crate::cuda::draw::{Packed, pack};
use crate::random::{point, tests::seed_of};
use crate::{Count, Draw, Slot, State};

const VOCABULARY: usize = 3001;
/// In memory that nobody has written.
const UNWRITTEN: u32 = 0xdead_beef;

/// What lies on the device from step to step.
#[derive(Clone, PartialEq)]
struct Table {
    vocabulary: usize,
    /// Four words each.
    slots: Vec<u32>,
    counts: Vec<u32>,
}

impl Table {
    fn new(slots: usize, counted: usize, vocabulary: usize) -> Self {
        Self {
            vocabulary,
            slots: vec![UNWRITTEN; 4 * slots],
            counts: vec![UNWRITTEN; counted * vocabulary],
        }
    }

    /// Seed and number of generated tokens.
    fn slot(&self, number: u32) -> (u64, u64) {
        let wide = |words: &[u32]| u64::from(words[1]) << 32 | u64::from(words[0]);
        let words = &self.slots[4 * number as usize..][..4];
        (wide(&words[..2]), wide(&words[2..]))
    }

    fn counts(&self, number: u32) -> &[u32] {
        &self.counts[number as usize * self.vocabulary..][..self.vocabulary]
    }

    /// Runs a step of `[rows, vocabulary]` logits, of which those behind the last draw are padding; gives the logits as they
    /// were edited, and the tokens.
    fn step(&mut self, logits: &[f32], draws: &[Draw]) -> (Vec<f32>, Vec<u32>) {
        let rows = logits.len() / self.vocabulary;
        let packed = pack(draws, rows, 0);
        self.set(&packed);
        let grid = [rows as u32, 1, 1];
        let launch = Launch {
            kernel: "edit_logits",
            grid: [rows as u32, self.vocabulary.div_ceil(8192) as u32, 1],
            block: 256,
            shared: 0,
        };
        let found = launch.run(&[
            store::<f32>(logits),
            words(&packed.draws),
            words(&packed.pairs),
            words(&self.counts),
            int(self.vocabulary),
        ]);
        let edited = load::<f32>(&found[0]);
        let launch = Launch {
            kernel: "sample",
            grid,
            block: 1024,
            shared: 0,
        };
        let found = launch.run(&[
            store::<f32>(&edited),
            words(&packed.draws),
            words(&self.slots),
            words(&self.counts),
            words(&vec![0; rows]),
            int(self.vocabulary),
        ]);
        (self.slots, self.counts) = (load_words(&found[2]), load_words(&found[3]));
        (edited, load_words(&found[4]))
    }

    fn set(&mut self, packed: &Packed) {
        // A grid of nothing is no launch.
        if packed.sets.is_empty() {
            return;
        }
        let launch = Launch {
            kernel: "set_slots",
            grid: [(packed.sets.len() / 7) as u32, 1, 1],
            block: 1024,
            shared: 0,
        };
        let found = launch.run(&[
            words(&packed.sets),
            words(&packed.pairs),
            words(&self.slots),
            words(&self.counts),
            int(self.vocabulary),
        ]);
        (self.slots, self.counts) = (load_words(&found[2]), load_words(&found[3]));
    }
}

/// Tokens of rows that have no slots.
fn run(logits: &[f32], draws: &[Draw]) -> Vec<u32> {
    Table::new(0, 0, VOCABULARY).step(logits, draws).1
}

/// Tokens that may be drawn with their shares of the probability, in the order in which a draw goes over them.
fn shares(logits: &[f32], draw: &Draw) -> Vec<(usize, f64)> {
    let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weight = |logit: f32| f64::from((logit - highest) / draw.temperature).exp();
    let mut all: Vec<_> = logits.iter().map(|&logit| weight(logit)).enumerate().collect();
    if draw.top_k > 0 || draw.top_p < 1.0 || draw.min_p > 0.0 {
        all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        all.truncate(if draw.top_k > 0 {
            draw.top_k as usize
        } else {
            usize::MAX
        });
        let total: f64 = all.iter().map(|(_, share)| share).sum();
        let mut mass = 0.0;
        all.retain(|(_, share)| {
            let keep = mass < f64::from(draw.top_p) * total && *share >= f64::from(draw.min_p);
            mass += share;
            keep
        });
    }
    all
}

/// Fails unless the token is the one at the point, or a neighbour where the point is within a hair of the edge.
fn assert_drawn(token: u32, logits: &[f32], draw: &Draw, point: f32) {
    let shares = shares(logits, draw);
    let total: f64 = shares.iter().map(|(_, share)| share).sum();
    let before: f64 = shares
        .iter()
        .take_while(|(t, _)| *t != token as usize)
        .map(|(_, share)| share)
        .sum();
    let own = shares
        .iter()
        .find(|(t, _)| *t == token as usize)
        .map(|(_, share)| *share);
    let own = own.unwrap_or_else(|| panic!("{token} was cut by {draw:?}"));
    let point = f64::from(point) * total;
    let hair = 1e-6 * total;
    assert!(
        before - hair <= point && point <= before + own + hair,
        "{token} does not lie at {draw:?}"
    );
}

#[test]
fn the_largest_logit_wins_and_the_lower_token_on_a_tie() {
    let mut logits = numbers(3 * VOCABULARY, 1);
    logits[2000] = 3.0;
    logits[2500] = 3.0;
    logits[VOCABULARY + 17] = f32::NAN;
    logits[2 * VOCABULARY..].fill(-2.0);
    assert_eq!(
        run(&logits, &[Draw::greedy(), Draw::greedy(), Draw::greedy()]),
        [2000, u32::MAX, 0]
    );
}

/// A sequence as the host knows it.
#[derive(Debug, Clone)]
struct Sequence {
    rules: Draw,
    seed: u64,
    prompt: Vec<u32>,
    generated: Vec<u32>,
}

impl Sequence {
    fn new(rules: Draw, prompt: &[u32], generated: &[u32]) -> Self {
        Self {
            rules,
            seed: 5,
            prompt: prompt.to_vec(),
            generated: generated.to_vec(),
        }
    }

    fn count(&self, token: u32) -> Count {
        Count {
            token,
            in_prompt: self.prompt.contains(&token),
            generated: self.generated.iter().filter(|&&t| t == token).count() as u32,
        }
    }

    /// Its draw, which sets the slot to what is known, if that is to be.
    fn draw(&self, number: u32, set: bool) -> Draw {
        let mut tokens = [&self.prompt[..], &self.generated[..]].concat();
        tokens.sort();
        tokens.dedup();
        let state = State {
            seed: self.seed,
            generated: self.generated.len() as u32,
            counts: tokens.into_iter().map(|token| self.count(token)).collect(),
        };
        Draw {
            slot: Some(Slot {
                number,
                set: set.then_some(state),
            }),
            ..self.rules.clone()
        }
    }

    /// The rules as they read.
    fn expected(&self, logits: &[f32]) -> Vec<f32> {
        let Draw {
            repetition,
            presence,
            frequency,
            ..
        } = self.rules;
        let mut expected = logits.to_vec();
        for token in [&self.prompt[..], &self.generated[..]].concat() {
            let Count {
                generated, in_prompt, ..
            } = self.count(token);
            let mut logit = logits[token as usize];
            if in_prompt || generated > 0 {
                logit = if logit > 0.0 {
                    logit / repetition
                } else {
                    logit * repetition
                };
            }
            if generated > 0 {
                logit -= presence + frequency * generated as f32;
            }
            expected[token as usize] = logit;
        }
        for &(token, bias) in &self.rules.biases {
            expected[token as usize] += bias;
        }
        expected
    }

    /// Takes a token that must be the one that the rules choose.
    fn take(&mut self, token: u32, edited: &[f32]) {
        let point = point(self.seed, self.generated.len() as u64);
        if self.rules.temperature > 0.0 {
            assert_drawn(token, edited, &self.rules, point);
        } else {
            let highest = edited.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            assert_eq!(edited.iter().position(|&v| v == highest), Some(token as usize));
        }
        self.generated.push(token);
    }
}

#[test]
fn penalties_and_biases_move_logits() {
    let mut logits = vec![0.0; VOCABULARY];
    (logits[5], logits[6], logits[7]) = (4.0, 3.0, -1.0);
    let with = |repetition, frequency, biases| Draw {
        repetition,
        frequency,
        biases,
        ..Draw::greedy()
    };
    let draws = [
        Sequence::new(with(2.0, 0.0, vec![]), &[5], &[]).draw(1, true),
        Sequence::new(with(2.0, 0.5, vec![(7, 5.5)]), &[7], &[5; 3]).draw(0, true),
        with(1.0, 0.0, vec![(7, 5.5)]),
    ];
    let mut table = Table::new(2, 2, VOCABULARY);
    assert_eq!(table.step(&logits.repeat(3), &draws).1, [6, 7, 7]);
}

/// Tokens at the edges of what a block edits, in a vocabulary of several blocks.
#[test]
fn every_part_of_a_large_vocabulary_is_counted() {
    let vocabulary = 2 * 8192 + 37;
    let edges = [0, 8191, 8192, 16383, 16384, vocabulary as u32 - 1];
    let logits: Vec<f32> = numbers(2 * vocabulary, 8).iter().map(|v| v * 3.0).collect();
    let rules = Draw {
        repetition: 1.7,
        presence: 0.3,
        frequency: 0.9,
        biases: vec![(8192, 2.0), (vocabulary as u32 - 1, 40.0)],
        ..Draw::greedy()
    };
    let mut sequences = [
        Sequence::new(rules.clone(), &edges[1..], &edges[..3]),
        Sequence::new(rules, &[], &edges.repeat(2)),
    ];
    let mut table = Table::new(2, 2, vocabulary);
    for set in [true, false, false] {
        let draws = [0, 1].map(|row| sequences[row].draw(row as u32, set));
        let (edited, tokens) = table.step(&logits, &draws);
        for (row, sequence) in sequences.iter_mut().enumerate() {
            let range = row * vocabulary..(row + 1) * vocabulary;
            assert!(edited[range.clone()] == sequence.expected(&logits[range.clone()]));
            sequence.take(tokens[row], &edited[range]);
        }
    }
}

/// A row whose logits are no numbers counts no token; one without a slot, as padding has none, changes nothing.
#[test]
fn what_is_not_chosen_is_not_counted() {
    let mut logits = vec![0.0; 3 * VOCABULARY];
    (logits[40], logits[VOCABULARY + 3]) = (1.0, f32::INFINITY);
    let penalised = Draw {
        frequency: 1.0,
        ..Draw::greedy()
    };
    let plain = Sequence::new(Draw::greedy(), &[9], &[9]);
    let bad = Sequence::new(penalised, &[], &[4, 4]);
    // Slot 3 is nobody's, and there are no counts of those from 2 on.
    let mut table = Table::new(4, 2, VOCABULARY);
    let (_, tokens) = table.step(&logits, &[plain.draw(2, true), bad.draw(1, true)]);
    assert_eq!(tokens, [40, u32::MAX, 0]);
    assert_eq!((table.slot(2), table.slot(1)), ((5, 2), (5, 3)));
    let counted = |&count: &u32| count > 0;
    assert_eq!(table.counts(1).iter().position(&counted), Some(4));
    assert_eq!(table.counts(1).iter().filter(|count| counted(count)).sum::<u32>(), 2);
    let unwritten = |words: &[u32]| words.iter().all(|&word| word == UNWRITTEN);
    assert!(unwritten(table.counts(0)) && unwritten(&table.slots[..4]) && unwritten(&table.slots[12..]));
}

/// What becomes of a slot's sequence in a step.
#[derive(Debug, Clone)]
enum Act {
    Absent,
    GoesOn,
    /// What the device has of it is not to be relied upon.
    SetAgain,
    /// Another has the slot from now on.
    Replaced(Box<Sequence>),
}

const SMALL: usize = 51;
const SLOTS: usize = 4;

/// Penalties, each with and without effect, and prompts below 40, so that some of the generated tokens are in them too.
fn sequence() -> impl Strategy<Value = Sequence> {
    let penalty = || prop_oneof![Just(0f32), -2f32..2.0];
    let penalties = (prop_oneof![Just(1f32), 0.3f32..3.0], penalty(), penalty());
    let draws = (prop_oneof![Just(0f32), 0.3f32..2.0], prop_oneof![Just(0u32), 1u32..9]);
    let biases = prop::collection::btree_map(0..SMALL as u32, -3f32..3.0, 0..5);
    let tokens = (
        prop::collection::vec(0u32..40, 0..30),
        prop::collection::vec(0..SMALL as u32, 0..30),
    );
    (penalties, draws, biases, tokens, any::<u64>()).prop_map(
        |((repetition, presence, frequency), (temperature, top_k), biases, (prompt, generated), seed)| Sequence {
            rules: Draw {
                temperature,
                top_k,
                repetition,
                presence,
                frequency,
                biases: biases.into_iter().collect(),
                ..Draw::greedy()
            },
            seed,
            prompt,
            generated,
        },
    )
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        2 => Just(Act::Absent),
        6 => Just(Act::GoesOn),
        1 => Just(Act::SetAgain),
        1 => sequence().prop_map(|sequence| Act::Replaced(Box::new(sequence))),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    /// Logits to the last bit, whichever rows share a step, and with padding behind them.
    #[test]
    fn slots_go_on_as_if_they_had_been_set(
        begin in prop::collection::vec(sequence(), SLOTS),
        steps in prop::collection::vec((prop::collection::vec(act(), SLOTS), 0usize..3), 1..6),
    ) {
        let mut table = Table::new(SLOTS, SLOTS, SMALL);
        let mut sequences = begin;
        let mut known = [false; SLOTS];
        for (number, (acts, padding)) in steps.into_iter().enumerate() {
            let mut rows = Vec::new();
            for (slot, act) in acts.into_iter().enumerate() {
                known[slot] &= !matches!(act, Act::SetAgain | Act::Replaced(_));
                let absent = matches!(act, Act::Absent);
                if let Act::Replaced(other) = act {
                    sequences[slot] = *other;
                }
                if !absent {
                    rows.push(slot);
                }
            }
            let by = number % rows.len().max(1);
            rows.rotate_left(by);
            let draws: Vec<_> = rows.iter().map(|&slot| sequences[slot].draw(slot as u32, !known[slot])).collect();
            let logits: Vec<f32> = numbers((rows.len() + padding) * SMALL, number as u32).iter().map(|v| v * 4.0).collect();
            if logits.is_empty() {
                continue;
            }
            let (edited, tokens) = table.step(&logits, &draws);
            for (row, &slot) in rows.iter().enumerate() {
                let range = row * SMALL..(row + 1) * SMALL;
                prop_assert_eq!(&edited[range.clone()], sequences[slot].expected(&logits[range.clone()]));
                sequences[slot].take(tokens[row], &edited[range]);
                known[slot] = true;
            }
            prop_assert_eq!(&edited[rows.len() * SMALL..], &logits[rows.len() * SMALL..]);
            for (slot, sequence) in sequences.iter().enumerate().filter(|(slot, _)| known[*slot]) {
                prop_assert_eq!(table.slot(slot as u32), (sequence.seed, sequence.generated.len() as u64));
            }
        }
    }
}

#[test]
fn draws_follow_the_rules() {
    let mut logits: Vec<f32> = numbers(VOCABULARY, 9).iter().map(|v| v * 6.0).collect();
    // Ties at the top and at a cut.
    (logits[40], logits[41], logits[2900]) = (6.5, 6.5, 6.5);
    let rules = [
        (0, 1.0, 0.0),
        (3, 1.0, 0.0),
        (2, 1.0, 0.0),
        (0, 0.6, 0.0),
        (50, 0.9, 0.0),
        (0, 1.0, 0.2),
        (700, 0.99, 0.01),
    ];
    let points = [0.0, 0.6, 0.999_999_9];
    let mut sequences = Vec::new();
    for temperature in [0.3, 2.0] {
        for (top_k, top_p, min_p) in rules {
            sequences.extend(points.map(|point| Sequence {
                rules: Draw {
                    temperature,
                    top_k,
                    top_p,
                    min_p,
                    ..Draw::greedy()
                },
                seed: seed_of(point, 2),
                prompt: Vec::new(),
                generated: vec![0; 2],
            }));
        }
    }
    let mut table = Table::new(sequences.len(), 0, VOCABULARY);
    let draws: Vec<_> = (0..)
        .zip(&sequences)
        .map(|(slot, sequence)| sequence.draw(slot, true))
        .collect();
    let (_, tokens) = table.step(&logits.repeat(draws.len()), &draws);
    for (token, sequence) in tokens.into_iter().zip(&mut sequences) {
        sequence.take(token, &logits);
    }
}
