//! Edits and draws, against the rules as they read: sort, cut, draw.

use super::*;
use crate::cuda::draw::pack;
use crate::{Draw, Edit};

const VOCABULARY: usize = 3001;

fn run(logits: &[f32], draws: &[Draw]) -> Vec<u32> {
    let (packed, edits) = pack(draws, 0);
    let rows = draws.len() as u32;
    let launch = Launch {
        kernel: "edit_logits",
        grid: [rows, 1, 1],
        block: 128,
        shared: 0,
    };
    let logits = launch.run(&[store::<f32>(logits), words(&packed), words(&edits), int(VOCABULARY)]);
    let launch = Launch {
        kernel: "sample",
        grid: [rows, 1, 1],
        block: 1024,
        shared: 0,
    };
    let nothing = words(&vec![0; draws.len()]);
    let found = launch.run(&[
        Argument::Buffer(logits[0].clone()),
        words(&packed),
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
    let edit = |token, repetition, subtract, add| Edit {
        token,
        repetition,
        subtract,
        add,
    };
    let with = |edits| Draw {
        edits,
        ..Draw::greedy()
    };
    let draws = [
        with(vec![edit(5, 2.0, 0.0, 0.0)]),
        with(vec![edit(5, 1.0, 1.5, 0.0), edit(7, 2.0, 0.0, 5.5)]),
        with(vec![edit(7, 1.0, 0.0, 5.5)]),
    ];
    assert_eq!(run(&logits.repeat(3), &draws), [6, 7, 7]);
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
                edits: Vec::new(),
            }));
        }
    }
    let tokens = run(&logits.repeat(draws.len()), &draws);
    for (token, draw) in tokens.into_iter().zip(&draws) {
        assert_drawn(token, &logits, draw);
    }
}
