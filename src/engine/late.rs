//! Stands in for a device that chooses tokens itself: a step is computed when it is enqueued, with what the step before
//! has chosen, which the host is told only when it waits for it.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use candle_core::bail;
use sconce_models::{Decoder, Draw, Edit, KvCache, Step, softmax};

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
        // By where the span ends whose last token it is.
        let mut taken = HashMap::new();
        for (index, row) in carried {
            let Some(Awaited::Late(before)) = before else {
                bail!("no step is under way")
            };
            step.tokens[index] = before.chosen[row].unwrap_or(0);
            taken.insert(index + 1, before.chosen[row]);
        }
        let mut end = 0;
        let spans = step.sequences.iter().map(|span| {
            end += span.len;
            (span.logits, taken.get(&end).copied().flatten())
        });
        let carried: Vec<_> = spans.filter(|(logits, _)| *logits).map(|(_, token)| token).collect();
        let logits = decoder.forward(&step, cache)?.to_vec2::<f32>()?;
        assert_eq!((logits.len(), carried.len()), (draws.len(), draws.len()));
        let failed = self.failing.contains(&self.enqueued);
        let rows = logits.into_iter().zip(draws).zip(carried);
        let chosen = rows.map(|((mut logits, draw), carried)| {
            edit(&mut logits, draw, carried);
            choose(&mut logits, draw).filter(|_| !failed)
        });
        let tokens = Tokens {
            chosen: chosen.collect(),
            failed,
            under_way: self.under_way.clone(),
        };
        self.enqueued += 1;
        let others = self.under_way.fetch_add(1, Relaxed);
        assert!(others <= 1, "{others} steps are under way when another is enqueued");
        self.overlapped.fetch_add(others, Relaxed);
        Ok(Awaited::Late(tokens))
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

/// Does what a draw says to the logits that follow the token `carried`, where the step before chose that.
pub fn edit(logits: &mut [f32], draw: &Draw, carried: Option<TokenId>) {
    let listed = draw.edits.iter().any(|edit| Some(edit.token) == carried);
    let unlisted = carried.filter(|_| !listed).map(|token| Edit {
        token,
        in_prompt: false,
        generated: 0,
        bias: 0.0,
    });
    for &edit in draw.edits.iter().chain(&unlisted) {
        let logit = &mut logits[edit.token as usize];
        let generated = edit.generated + u32::from(Some(edit.token) == carried);
        if edit.in_prompt || generated > 0 {
            *logit = if *logit > 0.0 {
                *logit / draw.repetition
            } else {
                *logit * draw.repetition
            };
        }
        if generated > 0 {
            *logit -= draw.presence + draw.frequency * generated as f32;
        }
        *logit += edit.bias;
    }
}

/// As the host's sampler chooses from logits that are edited, which it changes, without its cuts.
pub fn choose(logits: &mut [f32], draw: &Draw) -> Option<TokenId> {
    let highest = softmax::highest(logits)?;
    Some(match draw.temperature {
        0.0 => greedy(logits, highest),
        temperature => draw_from_all(logits, highest, temperature, draw.point),
    })
}
