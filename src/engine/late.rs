//! Stands in for a device that chooses tokens itself: a step is computed when it is enqueued, with what the step before
//! has chosen, which the host is told only when it waits for it. What the sequences' next tokens depend on stays here.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use candle_core::bail;
use sconce_models::{Count, Decoder, Draw, KvCache, State, Step, point, softmax};

use super::{
    model::Awaited,
    sampler::{draw_from_all, greedy},
};
use crate::request::TokenId;

#[derive(Debug, Default)]
pub struct Late {
    /// Steps that fail.
    failing: Vec<usize>,
    enqueued: usize,
    slots: HashMap<u32, Slot>,
    /// How often a slot was set.
    pub sets: Arc<AtomicUsize>,
    /// Steps that were not waited for yet.
    under_way: Arc<AtomicUsize>,
    /// How many steps were enqueued while another was under way.
    pub overlapped: Arc<AtomicUsize>,
}

/// What a step chose.
#[derive(Debug)]
pub struct Tokens {
    chosen: Vec<Option<TokenId>>,
    failed: bool,
    under_way: Arc<AtomicUsize>,
}

impl Late {
    /// One whose steps with these numbers, from 0, fail, of which the host hears when it waits for them.
    pub fn failing(steps: Vec<usize>) -> Self {
        Self {
            failing: steps,
            ..Self::default()
        }
    }

    /// `carried`: which of the step's tokens are which of the rows of `before`.
    pub fn enqueue(
        &mut self,
        decoder: &Decoder,
        cache: &mut KvCache,
        mut step: Step,
        draws: &[Draw],
        carried: Vec<(usize, usize)>,
        before: Option<&Awaited>,
    ) -> candle_core::Result<Awaited> {
        for (index, row) in carried {
            let Some(Awaited::Late(before)) = before else {
                bail!("no step is under way")
            };
            step.tokens[index] = before.chosen[row].unwrap_or(0);
        }
        let logits = decoder.forward(&step, cache)?.to_vec2::<f32>()?;
        assert_eq!(logits.len(), draws.len());
        let failed = self.failing.contains(&self.enqueued);
        self.enqueued += 1;
        let mut chosen: Vec<_> = logits
            .into_iter()
            .zip(draws)
            .map(|(row, draw)| self.choose(row, draw))
            .collect();
        if failed {
            // What a failed step leaves of the slots is of no use.
            self.slots.clear();
            chosen.fill(None);
        }
        let tokens = Tokens {
            chosen,
            failed,
            under_way: self.under_way.clone(),
        };
        let others = self.under_way.fetch_add(1, Relaxed);
        assert!(others <= 1, "{others} steps are under way when another is enqueued");
        self.overlapped.fetch_add(others, Relaxed);
        Ok(Awaited::Late(tokens))
    }

    fn choose(&mut self, mut logits: Vec<f32>, draw: &Draw) -> Option<TokenId> {
        let place = draw.slot.as_ref().expect("every sequence has a slot");
        if let Some(state) = &place.set {
            self.sets.fetch_add(1, Relaxed);
            self.slots.insert(place.number, Slot::from(state));
        }
        let slot = self.slots.entry(place.number).or_default();
        slot.edit(&mut logits, draw);
        slot.choose(&mut logits, draw)
    }
}

impl Tokens {
    pub fn wait(self) -> candle_core::Result<Vec<Option<TokenId>>> {
        self.under_way.fetch_sub(1, Relaxed);
        if self.failed {
            bail!("injected: a step under way")
        }
        Ok(self.chosen)
    }
}

/// A sequence's state as the device has it.
#[derive(Debug, Default)]
pub struct Slot {
    seed: u64,
    generated: u64,
    /// Whether a token is in the prompt, and how often it was generated.
    counts: HashMap<TokenId, (bool, u32)>,
}

impl From<&State> for Slot {
    fn from(state: &State) -> Self {
        let count = |count: &Count| (count.token, (count.in_prompt, count.generated));
        Self {
            seed: state.seed,
            generated: state.generated.into(),
            counts: state.counts.iter().map(count).collect(),
        }
    }
}

impl Slot {
    /// Does to logits what a draw says.
    pub fn edit(&self, logits: &mut [f32], draw: &Draw) {
        for (&token, &(_, generated)) in &self.counts {
            let logit = &mut logits[token as usize];
            *logit = if *logit > 0.0 {
                *logit / draw.repetition
            } else {
                *logit * draw.repetition
            };
            if generated > 0 {
                *logit -= draw.presence + draw.frequency * generated as f32;
            }
        }
        for &(token, bias) in &draw.biases {
            logits[token as usize] += bias;
        }
    }

    /// As the host's sampler chooses from logits that are edited, which it changes, without its cuts.
    pub fn choose(&mut self, logits: &mut [f32], draw: &Draw) -> Option<TokenId> {
        let point = point(self.seed, self.generated);
        self.generated += 1;
        let highest = softmax::highest(logits)?;
        let token = match draw.temperature {
            0.0 => greedy(logits, highest),
            temperature => draw_from_all(logits, highest, temperature, point),
        };
        self.counts.entry(token).or_default().1 += 1;
        Some(token)
    }
}
