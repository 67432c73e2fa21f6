//! From a row of logits to the next token.

use std::collections::{BTreeMap, HashMap};

use sconce_models::{Count, Draw, State, point, softmax};

use crate::request::{Logprobs, Sampling, TokenId};

/// One sequence's way of choosing tokens. Its token number `n` has the random number `n` of its own seed, and it counts its
/// own tokens, so that what it chooses does not depend on the batch, nor on a preemption, nor on how often it is tried.
#[derive(Debug)]
pub struct Sampler {
    sampling: Sampling,
    /// How many tokens were generated.
    count: usize,
    /// How often each token was generated.
    generated: HashMap<TokenId, u32>,
    /// The prompt's tokens, where a penalty asks for them.
    prompt: Vec<TokenId>,
}

/// The logits were not numbers.
#[derive(Debug, PartialEq, Eq)]
pub struct NotANumber;

/// What was chosen.
#[derive(Debug, PartialEq)]
pub struct Sample {
    pub token: TokenId,
    pub logprobs: Option<Logprobs>,
}

impl Sampler {
    pub fn new(sampling: Sampling, prompt: &[TokenId]) -> Self {
        let mut penalised = Vec::new();
        if sampling.repetition_penalty != 1.0 {
            penalised.extend_from_slice(prompt);
            penalised.sort_unstable();
            penalised.dedup();
        }
        Self {
            sampling,
            count: 0,
            generated: HashMap::new(),
            prompt: penalised,
        }
    }

    pub fn sampling(&self) -> &Sampling {
        &self.sampling
    }

    /// Chooses the next token from `logits` (one for each token of the vocabulary), which it changes.
    pub fn sample(&mut self, logits: &mut [f32]) -> Result<Sample, NotANumber> {
        let highest = softmax::highest(logits).ok_or(NotANumber)?;
        // Reported probabilities are the model's own.
        let normalizer = self.sampling.logprobs.map(|_| log_sum_exp(logits, highest));
        let top = self.sampling.logprobs.map(|count| likeliest(logits, count));
        let unchanged = normalizer.map(|_| logits.to_vec());
        self.penalise(logits);
        // Penalties can lead beyond what numbers there are.
        let highest = softmax::highest(logits).ok_or(NotANumber)?;
        let token = if self.sampling.temperature == 0.0 {
            greedy(logits, highest)
        } else {
            self.draw(logits, highest)
        };
        self.chose(token);
        let logprobs = match (normalizer, top, unchanged) {
            (Some(normalizer), Some(top), Some(unchanged)) => Some(Logprobs {
                chosen: unchanged[token as usize] - normalizer,
                top: top
                    .into_iter()
                    .map(|(token, logit)| (token, logit - normalizer))
                    .collect(),
            }),
            _ => None,
        };
        Ok(Sample { token, logprobs })
    }

    /// How many tokens were generated.
    pub fn count(&self) -> usize {
        self.count
    }

    /// The rules by which a device chooses tokens out of `vocabulary`, in no slot yet; [`Self::chose`] must then be told of
    /// each. `None` where log-probabilities are wanted, for which the logits must come to the host.
    pub fn rules(&self, vocabulary: usize) -> Option<Draw> {
        let Sampling {
            temperature,
            top_k,
            top_p,
            min_p,
            repetition_penalty,
            presence_penalty,
            frequency_penalty,
            logprobs: None,
            ref logit_bias,
            ..
        } = self.sampling
        else {
            return None;
        };
        let mut biases: BTreeMap<_, f32> = BTreeMap::new();
        for &(token, bias) in logit_bias.iter().filter(|(token, _)| (*token as usize) < vocabulary) {
            *biases.entry(token).or_default() += bias;
        }
        Some(Draw {
            temperature,
            top_k: u32::try_from(top_k).unwrap_or(u32::MAX),
            top_p,
            min_p,
            repetition: repetition_penalty,
            presence: presence_penalty,
            frequency: frequency_penalty,
            biases: biases.into_iter().collect(),
            slot: None,
        })
    }

    /// What a device's slot is set to for the next token, with the counts that penalties look at.
    pub fn state(&self, vocabulary: usize) -> State {
        let mut counts = BTreeMap::new();
        let none = |token| Count {
            token,
            in_prompt: false,
            generated: 0,
        };
        for &token in self.prompt.iter().filter(|&&token| (token as usize) < vocabulary) {
            counts.entry(token).or_insert_with(|| none(token)).in_prompt = true;
        }
        if self.penalises() {
            for (&token, &generated) in &self.generated {
                counts.entry(token).or_insert_with(|| none(token)).generated = generated;
            }
        }
        State {
            seed: self.sampling.seed,
            // A sequence is shorter than 2^32.
            generated: self.count as u32,
            counts: counts.into_values().collect(),
        }
    }

    /// Counts a token that was chosen.
    pub fn chose(&mut self, token: TokenId) {
        self.count += 1;
        *self.generated.entry(token).or_default() += 1;
    }

    fn penalises(&self) -> bool {
        let Sampling {
            repetition_penalty,
            presence_penalty,
            frequency_penalty,
            ..
        } = self.sampling;
        repetition_penalty != 1.0 || presence_penalty != 0.0 || frequency_penalty != 0.0
    }

    fn penalise(&self, logits: &mut [f32]) {
        let Sampling {
            repetition_penalty,
            presence_penalty,
            frequency_penalty,
            ..
        } = self.sampling;
        if repetition_penalty != 1.0 {
            let only_generated = self
                .generated
                .keys()
                .filter(|token| self.prompt.binary_search(token).is_err());
            for &token in self.prompt.iter().chain(only_generated) {
                if let Some(logit) = logits.get_mut(token as usize) {
                    *logit = if *logit > 0.0 {
                        *logit / repetition_penalty
                    } else {
                        *logit * repetition_penalty
                    };
                }
            }
        }
        if presence_penalty != 0.0 || frequency_penalty != 0.0 {
            for (&token, &count) in &self.generated {
                logits[token as usize] -= presence_penalty + frequency_penalty * count as f32;
            }
        }
        for &(token, bias) in &self.sampling.logit_bias {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit += bias;
            }
        }
    }

    /// Draws from the softmax of `logits / temperature`, cut by top-k, then top-p among those, then min-p.
    fn draw(&self, logits: &mut [f32], highest: f32) -> TokenId {
        let Sampling {
            temperature,
            top_k,
            top_p,
            min_p,
            ..
        } = self.sampling;
        let point = point(self.sampling.seed, self.count as u64);
        if top_k == 0 && top_p >= 1.0 && min_p <= 0.0 {
            return draw_from_all(logits, highest, temperature, point);
        }
        let weight = |logit: f32| ((logit - highest) / temperature).exp();
        // The mass of what top-k leaves is what top-p takes its share of.
        let (limit, total): (_, f32) = match top_k {
            0 => {
                let sums = softmax::weigh(&mut logits.to_vec(), highest, temperature);
                (logits.len(), sums.iter().sum())
            }
            k => {
                let kept = likeliest(logits, k);
                (kept.len(), kept.iter().map(|&(_, logit)| weight(logit)).sum())
            }
        };
        // Nearly all the mass is in few tokens, so a short list is tried before a longer one.
        let mut count = 64.min(limit);
        loop {
            let mut kept = Vec::new();
            let mut mass = 0.0;
            for (token, logit) in likeliest(logits, count) {
                let share = weight(logit);
                // The likeliest token has weight 1.
                if mass >= top_p * total || share < min_p {
                    break;
                }
                kept.push((token as usize, share));
                mass += share;
            }
            if kept.len() < count || count == limit {
                return pick(kept.into_iter(), point * mass);
            }
            count = (count * 8).min(limit);
        }
    }
}

/// The token of the largest logit, which is `highest`, the lower one on a tie.
pub(super) fn greedy(logits: &[f32], highest: f32) -> TokenId {
    logits.iter().position(|&logit| logit == highest).unwrap_or(0) as TokenId
}

/// Draws from the softmax of `logits / temperature` by the random number `point`; the largest logit is `highest`.
pub(super) fn draw_from_all(logits: &mut [f32], highest: f32, temperature: f32, point: f32) -> TokenId {
    let sums = softmax::weigh(logits, highest, temperature);
    // Summed more exactly than the shares are, so that what is left of the point fits the chunk in which it lies.
    let total: f64 = sums.iter().copied().map(f64::from).sum();
    let mut left = f64::from(point) * total;
    let mut last = 0;
    for (chunk, &sum) in sums.iter().enumerate().filter(|(_, sum)| **sum > 0.0) {
        last = chunk;
        if left < f64::from(sum) {
            break;
        }
        left -= f64::from(sum);
    }
    let first = last * softmax::CHUNK;
    let shares = logits[first..].iter().take(softmax::CHUNK).copied().enumerate();
    first as TokenId + pick(shares, left as f32)
}

/// The token in whose share of the running sum `point` lies; the last one if rounding puts it beyond.
pub(super) fn pick(shares: impl Iterator<Item = (usize, f32)>, point: f32) -> TokenId {
    let mut sum = 0.0;
    let mut last = 0;
    for (token, share) in shares {
        if share > 0.0 {
            sum += share;
            last = token;
            if sum > point {
                break;
            }
        }
    }
    last as TokenId
}

/// The `count` largest logits with their tokens, largest first, the lower token first on a tie.
fn likeliest(logits: &[f32], count: usize) -> Vec<(TokenId, f32)> {
    let mut all: Vec<_> = logits
        .iter()
        .enumerate()
        .map(|(token, &logit)| (token as TokenId, logit))
        .collect();
    let order = |a: &(TokenId, f32), b: &(TokenId, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    if count < all.len() {
        all.select_nth_unstable_by(count, order);
        all.truncate(count);
    }
    all.sort_unstable_by(order);
    all
}

/// The logarithm of what the probabilities' numerators sum to, of logits whose largest is `highest`.
fn log_sum_exp(logits: &[f32], highest: f32) -> f32 {
    let sums = softmax::weigh(&mut logits.to_vec(), highest, 1.0);
    let sum: f64 = sums.into_iter().map(f64::from).sum();
    highest + sum.ln() as f32
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;
    use crate::engine::late::Slot;

    fn sampler(sampling: Sampling) -> Sampler {
        Sampler::new(sampling, &[])
    }

    fn draws(sampling: Sampling, logits: &[f32], count: usize) -> Vec<TokenId> {
        let mut sampler = sampler(sampling);
        (0..count)
            .map(|_| sampler.sample(&mut logits.to_vec()).unwrap().token)
            .collect()
    }

    #[test]
    fn greedy_takes_the_lower_token_on_a_tie() {
        let sampling = Sampling {
            temperature: 0.0,
            ..Sampling::default()
        };
        assert_eq!(draws(sampling, &[1.0, 3.0, 3.0, 2.0], 2), [1, 1]);
    }

    #[test]
    fn frequencies_follow_the_softmax() {
        let logits = [0.0, 1.0f32.ln(), 2.0f32.ln(), 5.0f32.ln()]; // 1 : 1 : 2 : 5
        let draws = draws(
            Sampling {
                seed: 3,
                ..Sampling::default()
            },
            &logits,
            9000,
        );
        for (token, expected) in [1000.0, 1000.0, 2000.0, 5000.0].into_iter().enumerate() {
            let seen = draws.iter().filter(|&&drawn| drawn as usize == token).count() as f64;
            assert!(
                (seen - expected).abs() < 5.0 * f64::sqrt(expected),
                "token {token}: {seen} of 9000"
            );
        }
    }

    #[test]
    fn the_cuts_cut() {
        let logits: Vec<f32> = [8.0f32, 4.0, 2.0, 1.0, 1.0].iter().map(|share| share.ln()).collect();
        let seen = |sampling| draws(sampling, &logits, 500).into_iter().collect::<HashSet<_>>();
        assert_eq!(
            seen(Sampling {
                top_k: 2,
                ..Sampling::default()
            }),
            HashSet::from([0, 1])
        );
        assert_eq!(
            seen(Sampling {
                top_p: 0.7,
                ..Sampling::default()
            }),
            HashSet::from([0, 1])
        );
        // Of the three likeliest (8 : 4 : 2), the first two have 6/7 of the mass, of all only 3/4.
        assert_eq!(
            seen(Sampling {
                top_k: 3,
                top_p: 0.85,
                ..Sampling::default()
            }),
            HashSet::from([0, 1])
        );
        assert_eq!(
            seen(Sampling {
                min_p: 0.25,
                ..Sampling::default()
            }),
            HashSet::from([0, 1, 2])
        );
        assert_eq!(
            seen(Sampling {
                top_p: 0.01,
                ..Sampling::default()
            }),
            HashSet::from([0])
        );
    }

    #[test]
    fn top_p_reaches_beyond_the_short_list() {
        let draws = draws(
            Sampling {
                top_p: 0.9,
                ..Sampling::default()
            },
            &[0.0; 1000],
            5000,
        );
        let distinct: HashSet<_> = draws.iter().collect();
        assert!(
            distinct.len() > 850 && draws.iter().all(|&token| token < 900),
            "{} distinct",
            distinct.len()
        );
    }

    #[test]
    fn penalties_and_bias_move_logits() {
        let sampling = Sampling {
            temperature: 0.0,
            ..Sampling::default()
        };
        let presence = Sampling {
            presence_penalty: 1.5,
            ..sampling.clone()
        };
        assert_eq!(draws(presence, &[2.0, 1.0], 3), [0, 1, 0]);
        let frequency = Sampling {
            frequency_penalty: 0.6,
            ..sampling.clone()
        };
        assert_eq!(draws(frequency, &[2.0, 1.0], 4), [0, 0, 1, 0]);
        let bias = Sampling {
            logit_bias: vec![(1, 5.0), (99, 1.0)],
            ..sampling.clone()
        };
        assert_eq!(draws(bias, &[2.0, 1.0], 1), [1]);
        let repetition = Sampling {
            repetition_penalty: 4.0,
            ..sampling
        };
        let mut sampler = Sampler::new(repetition, &[0]);
        assert_eq!(
            sampler.sample(&mut [2.0, 1.0]).unwrap().token,
            1,
            "the prompt's token is penalised"
        );
        assert_eq!(sampler.sample(&mut [2.0, 1.0]).unwrap().token, 0, "both are");
    }

    #[test]
    fn reports_the_models_own_probabilities() {
        let sampling = Sampling {
            temperature: 0.0,
            logit_bias: vec![(0, -10.0)],
            logprobs: Some(2),
            ..Sampling::default()
        };
        let logits = [3.0f32.ln(), 1.0f32.ln()];
        let logprobs = sampler(sampling)
            .sample(&mut logits.to_vec())
            .unwrap()
            .logprobs
            .unwrap();
        assert!((logprobs.chosen - 0.25f32.ln()).abs() < 1e-6);
        assert_eq!(logprobs.top.iter().map(|top| top.0).collect::<Vec<_>>(), [0, 1]);
        assert!((logprobs.top[0].1 - 0.75f32.ln()).abs() < 1e-6);
    }

    #[test]
    fn refuses_what_is_not_a_number() {
        for bad in [f32::NAN, f32::INFINITY] {
            assert_eq!(sampler(Sampling::default()).sample(&mut [1.0, bad]), Err(NotANumber));
        }
    }

    #[test]
    fn no_device_draws_where_log_probabilities_are_wanted() {
        let wants_logprobs = sampler(Sampling {
            logprobs: Some(0),
            ..Sampling::default()
        });
        assert_eq!(wants_logprobs.rules(4), None);
    }

    /// Rules of every kind, each with and without effect.
    fn rules() -> impl Strategy<Value = Sampling> {
        let repetition = prop_oneof![Just(1.0f32), 0.5f32..3.0];
        let penalty = || prop_oneof![Just(0.0f32), -2f32..2.0];
        let bias = prop::collection::btree_map(0u32..20, -3f32..3.0, 0..4);
        (any::<bool>(), repetition, penalty(), penalty(), bias, any::<u64>()).prop_map(
            |(greedy, repetition_penalty, presence_penalty, frequency_penalty, bias, seed)| Sampling {
                temperature: if greedy { 0.0 } else { 1.0 },
                repetition_penalty,
                presence_penalty,
                frequency_penalty,
                logit_bias: bias.into_iter().collect(),
                seed,
                ..Sampling::default()
            },
        )
    }

    proptest! {
        #[test]
        fn the_same_seed_draws_the_same(seed in any::<u64>(), logits in prop::collection::vec(-5f32..5.0, 2..300)) {
            let sampling = Sampling { seed, top_p: 0.95, ..Sampling::default() };
            prop_assert_eq!(draws(sampling.clone(), &logits, 20), draws(sampling, &logits, 20));
        }

        /// Whether the device goes on from its own state, or is told of the tokens before.
        #[test]
        fn a_devices_draw_does_what_the_host_would(
            sampling in rules(),
            prompt in prop::collection::vec(0u32..16, 0..4),
            rows in prop::collection::vec((prop::collection::vec(-3f32..3.0, 12), any::<bool>()), 1..20),
        ) {
            let mut on_host = Sampler::new(sampling.clone(), &prompt);
            let mut on_device = Sampler::new(sampling, &prompt);
            let mut slot = Slot::from(&on_device.state(12));
            for (mut logits, set) in rows {
                let mut expected = logits.clone();
                on_host.penalise(&mut expected);
                let token = on_host.sample(&mut logits.clone()).unwrap().token;
                if set {
                    slot = Slot::from(&on_device.state(logits.len()));
                }
                let draw = on_device.rules(logits.len()).unwrap();
                slot.edit(&mut logits, &draw);
                prop_assert_eq!(&logits, &expected);
                prop_assert_eq!(slot.choose(&mut logits, &draw), Some(token));
                on_device.chose(token);
            }
        }
    }
}
