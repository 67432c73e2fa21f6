//! Edits and draws, against the rules as they read: penalise; sort, cut, draw.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::cuda::{draw::pack, metadata::CARRIED};
use crate::{Draw, Edit};

const VOCABULARY: usize = 3001;

/// A row's last token, as the kernels are told of it.
#[derive(Debug, Clone, Copy)]
enum Last {
    Known,
    /// The step before chose it.
    Carried(u32),
}

/// The logits `[rows, vocabulary]` after their edits.
fn edited(logits: &[f32], draws: &[Draw], last: &[Last]) -> Vec<f32> {
    let (packed, edits) = pack(draws, 0);
    let (mut tokens, mut rows, mut sampled) = (Vec::new(), Vec::new(), Vec::new());
    for last in last {
        // Behind a token that is not the row's last, and from a row with another number.
        tokens.push(CARRIED);
        sampled.push(0);
        rows.push(tokens.len() as u32);
        match *last {
            Last::Known => tokens.push(0),
            Last::Carried(token) => {
                tokens.push(CARRIED | sampled.len() as u32);
                sampled.push(token);
            }
        }
    }
    let launch = Launch {
        kernel: "edit_logits",
        grid: [draws.len() as u32, 1, 1],
        block: 128,
        shared: 0,
    };
    let found = launch.run(&[
        store::<f32>(logits),
        words(&packed),
        words(&edits),
        words(&tokens),
        words(&rows),
        words(&sampled),
        int(logits.len() / draws.len()),
    ]);
    load::<f32>(&found[0])
}

fn run(logits: &[f32], draws: &[Draw]) -> Vec<u32> {
    let logits = edited(logits, draws, &vec![Last::Known; draws.len()]);
    let launch = Launch {
        kernel: "sample",
        grid: [draws.len() as u32, 1, 1],
        block: 1024,
        shared: 0,
    };
    let nothing = words(&vec![0; draws.len()]);
    let found = launch.run(&[
        store::<f32>(&logits),
        words(&pack(draws, 0).0),
        nothing,
        int(VOCABULARY),
    ]);
    load_words(&found[2])
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

/// Fails unless the token is the one at the draw's point, or a neighbour where the point is within a hair of the edge.
fn assert_drawn(token: u32, logits: &[f32], draw: &Draw) {
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
    let point = f64::from(draw.point) * total;
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

#[test]
fn edits_move_logits() {
    let mut logits = vec![0.0; VOCABULARY];
    (logits[5], logits[6], logits[7]) = (4.0, 3.0, -1.0);
    let edit = |token, in_prompt, generated, bias| Edit {
        token,
        in_prompt,
        generated,
        bias,
    };
    let with = |repetition, frequency, edits| Draw {
        repetition,
        frequency,
        edits,
        ..Draw::greedy()
    };
    let draws = [
        with(2.0, 0.0, vec![edit(5, true, 0, 0.0)]),
        with(2.0, 0.5, vec![edit(5, false, 3, 0.0), edit(7, true, 0, 5.5)]),
        with(1.0, 0.0, vec![edit(7, false, 0, 5.5)]),
    ];
    assert_eq!(run(&logits.repeat(3), &draws), [6, 7, 7]);
}

/// A row whose tokens are penalised. Those of the prompt are below 40, so that some of the others are in it too.
#[derive(Debug, Clone)]
struct Penalised {
    logits: Vec<f32>,
    rules: Draw,
    prompt: Vec<u32>,
    generated: Vec<u32>,
    bias: BTreeMap<u32, f32>,
    /// Whether the last token that was generated is not among the edits, but carried.
    ahead: bool,
}

impl Penalised {
    const VOCABULARY: u32 = 50;

    fn count(generated: &[u32], token: u32) -> u32 {
        generated.iter().filter(|&&t| t == token).count() as u32
    }

    /// What is listed, and how the last token is told of.
    fn told(&self) -> (Draw, Last) {
        let (known, last) = match self.generated.split_last() {
            Some((&last, known)) if self.ahead => (known, Last::Carried(last)),
            _ => (&self.generated[..], Last::Known),
        };
        let edits = (0..Self::VOCABULARY).map(|token| Edit {
            token,
            in_prompt: self.prompt.contains(&token),
            generated: Self::count(known, token),
            bias: self.bias.get(&token).copied().unwrap_or(0.0),
        });
        let edits = edits.filter(|edit| edit.in_prompt || edit.generated > 0 || edit.bias != 0.0);
        let draw = Draw {
            edits: edits.collect(),
            ..self.rules.clone()
        };
        (draw, last)
    }

    /// The rules as they read, with every token known.
    fn expected(&self) -> Vec<f32> {
        let Draw {
            repetition,
            presence,
            frequency,
            ..
        } = self.rules;
        let penalised = (0..).zip(&self.logits).map(|(token, &logit)| {
            let count = Self::count(&self.generated, token);
            let mut logit = logit;
            if count > 0 || self.prompt.contains(&token) {
                logit = if logit > 0.0 {
                    logit / repetition
                } else {
                    logit * repetition
                };
            }
            if count > 0 {
                logit -= presence + frequency * count as f32;
            }
            logit + self.bias.get(&token).unwrap_or(&0.0)
        });
        penalised.collect()
    }
}

fn penalised() -> impl Strategy<Value = Penalised> {
    let token = 0..Penalised::VOCABULARY;
    let penalty = || prop_oneof![Just(0f32), -2f32..2.0];
    let rules = (prop_oneof![Just(1f32), 0.3f32..3.0], penalty(), penalty());
    let bias = prop::collection::btree_map(token.clone(), -3f32..3.0, 0..5);
    let logits = prop::collection::vec(-9f32..9.0, Penalised::VOCABULARY as usize);
    let tokens = (
        prop::collection::vec(0u32..40, 0..30),
        prop::collection::vec(token, 0..30),
    );
    (logits, rules, tokens, bias, any::<bool>()).prop_map(
        |(logits, (repetition, presence, frequency), (prompt, generated), bias, ahead)| Penalised {
            logits,
            rules: Draw {
                repetition,
                presence,
                frequency,
                ..Draw::greedy()
            },
            prompt,
            generated,
            bias,
            ahead,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// To the last bit.
    #[test]
    fn a_carried_token_counts_as_if_it_had_been_known(rows in prop::collection::vec(penalised(), 1..12)) {
        let logits: Vec<f32> = rows.iter().flat_map(|row| row.logits.clone()).collect();
        let (draws, last): (Vec<_>, Vec<_>) = rows.iter().map(Penalised::told).unzip();
        let expected: Vec<f32> = rows.iter().flat_map(Penalised::expected).collect();
        prop_assert_eq!(edited(&logits, &draws, &last), expected);
    }
}

#[test]
fn a_token_that_could_not_be_chosen_counts_as_none() {
    let logits = numbers(VOCABULARY, 3);
    let penalised = Draw {
        frequency: 1.0,
        ..Draw::greedy()
    };
    assert_eq!(edited(&logits, &[penalised], &[Last::Carried(u32::MAX)]), logits);
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
    let mut draws = Vec::new();
    for temperature in [0.3, 2.0] {
        for (top_k, top_p, min_p) in rules {
            draws.extend(points.map(|point| Draw {
                temperature,
                top_k,
                top_p,
                min_p,
                point,
                ..Draw::greedy()
            }));
        }
    }
    let tokens = run(&logits.repeat(draws.len()), &draws);
    for (token, draw) in tokens.into_iter().zip(&draws) {
        assert_drawn(token, &logits, draw);
    }
}
