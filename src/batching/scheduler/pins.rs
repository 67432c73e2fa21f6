//! Prompts that are pinned: their blocks stay until they are unpinned or their time is over.

use std::time::Instant;

use super::{Scheduler, SequenceId};
use crate::{
    batching::{BlockId, Namespace},
    request::TokenId,
};

/// The most prompts that may be pinned at a time, whatever they take.
const MAX_PINS: usize = 1024;

/// A pinned prompt.
#[derive(Debug)]
pub struct Pin {
    pub id: String,
    /// Who pinned it; `None` for the settings file.
    pub owner: Option<String>,
    pub namespace: Namespace,
    /// How many it has, in full blocks.
    pub tokens: usize,
    pub expires: Option<Instant>,
    blocks: Vec<BlockId>,
}

/// Why a prompt was not pinned.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PinError {
    #[error("prompts cannot be pinned without the prefix cache; start the server without --no-prefix-cache")]
    NoPrefixCache,
    #[error("the prompt has {tokens} tokens, and only full blocks of {block_size} are pinned; pin a longer prompt")]
    BelowBlock { tokens: usize, block_size: usize },
    #[error(
        "pinning the prompt takes {wanted} more blocks, but {pinned} of the {budget} blocks for pinned prompts are \
         taken; unpin another prompt, or raise pin-memory or kv-memory (or lower max-model-len, which is kept free)"
    )]
    OverBudget {
        wanted: usize,
        pinned: usize,
        budget: usize,
    },
    #[error("{MAX_PINS} prompts are pinned, which is the most; unpin another one")]
    TooMany,
    #[error("the prompt's sequence ended before it was computed; pin it again")]
    Gone,
}

impl Scheduler {
    /// Whether a prompt can be pinned as things stand, and how many tokens of it in full blocks.
    pub fn check_pin(&self, namespace: &Namespace, prompt: &[TokenId]) -> Result<usize, PinError> {
        if !self.blocks.has_prefix_cache() {
            return Err(PinError::NoPrefixCache);
        }
        let block_size = self.blocks.block_size();
        let tokens = prompt.len() / block_size * block_size;
        if tokens == 0 {
            return Err(PinError::BelowBlock {
                tokens: prompt.len(),
                block_size,
            });
        }
        let known = self.blocks.look_up(namespace, &prompt[..tokens]);
        self.check_budget(&known, tokens)?;
        Ok(tokens)
    }

    fn check_budget(&self, known: &[BlockId], tokens: usize) -> Result<(), PinError> {
        if self.pins.len() >= MAX_PINS {
            return Err(PinError::TooMany);
        }
        let counts = self.blocks.pins();
        let wanted = self.blocks.unpinned(known, tokens);
        if counts.asked + wanted > counts.budget {
            return Err(PinError::OverBudget {
                wanted,
                pinned: counts.asked,
                budget: counts.budget,
            });
        }
        Ok(())
    }

    /// Ends a sequence whose prompt fills its blocks and is computed, and pins them.
    pub fn pin(
        &mut self,
        sequence: SequenceId,
        id: String,
        owner: Option<String>,
        expires: Option<Instant>,
    ) -> Result<&Pin, PinError> {
        let sequence = self.running.remove(&sequence).ok_or(PinError::Gone)?;
        let checked = match self.blocks.are_kept(&sequence.blocks) {
            true => self.check_budget(&sequence.blocks, sequence.prompt_len),
            // What it goes on from was forgotten meanwhile.
            false => Err(PinError::Gone),
        };
        if let Err(error) = checked {
            self.blocks.release(&sequence.blocks);
            return Err(error);
        }
        self.blocks.pin(&sequence.blocks);
        self.pins.push(Pin {
            id,
            owner,
            tokens: sequence.prompt_len,
            expires,
            namespace: sequence.namespace,
            blocks: sequence.blocks,
        });
        self.pins.last().ok_or(PinError::Gone)
    }

    /// The pinned prompts, in the order in which they were pinned.
    pub fn pins(&self) -> &[Pin] {
        &self.pins
    }

    /// Lets go of the prompts of which this is true. Gives how many they were.
    pub fn unpin(&mut self, leaves: impl Fn(&Pin) -> bool) -> usize {
        let before = self.pins.len();
        for pin in self.pins.extract_if(.., |pin| leaves(pin)) {
            self.blocks.unpin(&pin.blocks);
        }
        before - self.pins.len()
    }

    /// What the sequence computed or found is not to be trusted: nobody else shall find it. Gives the pinned prompts that
    /// are unpinned for it.
    pub fn distrust(&mut self, sequence: SequenceId) -> Vec<String> {
        let Some(sequence) = self.running.get(&sequence) else {
            return Vec::new();
        };
        self.blocks.forget(&sequence.blocks);
        let blocks = &self.blocks;
        let lost: Vec<Pin> = self.pins.extract_if(.., |pin| !blocks.are_kept(&pin.blocks)).collect();
        let unpin = |pin: Pin| {
            self.blocks.unpin(&pin.blocks);
            pin.id
        };
        lost.into_iter().map(unpin).collect()
    }

    /// Lets go of the pinned prompts whose time is over; gives when the next one's is.
    pub fn expire_pins(&mut self, now: Instant) -> Option<Instant> {
        self.unpin(|pin| pin.expires.is_some_and(|expires| expires <= now));
        self.pins.iter().filter_map(|pin| pin.expires).min()
    }
}
