//! How a row's token is chosen by a device that samples.

/// How the token of one row of logits is chosen.
#[derive(Debug, Clone, PartialEq)]
pub struct Draw {
    /// 0 takes the largest logit, the lower token on a tie.
    pub temperature: f32,
    /// Keeps the likeliest `top_k` tokens; 0 is off.
    pub top_k: u32,
    /// Keeps the likeliest tokens that together have this share of the probability; 1 is off.
    pub top_p: f32,
    /// Keeps tokens at least `min_p` times as likely as the likeliest; 0 is off.
    pub min_p: f32,
    /// Logits of tokens in the prompt and of generated ones are divided by it where positive, else multiplied; 1 is off.
    pub repetition: f32,
    /// Is taken from logits of generated tokens; 0 is off.
    pub presence: f32,
    /// Is taken from logits of generated tokens for each time that they were generated; 0 is off.
    pub frequency: f32,
    /// Tokens, each once, and what is added to their logits behind the penalties.
    pub biases: Vec<(u32, f32)>,
    /// Where on the device the sequence's state is, which the choice brings up to date. A row may have none whose choice
    /// needs none: without temperature and penalties.
    pub slot: Option<Slot>,
}

/// One of the places on the device in which the state of a sequence is kept from step to step. No two rows of a step have
/// the same one.
#[derive(Debug, Clone, PartialEq)]
pub struct Slot {
    /// From 0. Memory is taken for all up to the highest.
    pub number: u32,
    /// What the slot is set to before the token is chosen; `None` where it is as the sequence's last choice left it.
    pub set: Option<State>,
}

/// What a sequence's next token depends on besides logits and rules.
#[derive(Debug, Clone, PartialEq)]
pub struct State {
    /// Of the sequence's random numbers: its token number `n` is drawn with [`crate::point`]`(seed, n)`.
    pub seed: u64,
    /// How many tokens were generated.
    pub generated: u32,
    /// The tokens that penalties concern, each once. Nothing is kept of them where there are no penalties.
    pub counts: Vec<Count>,
}

/// What penalties ask of a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Count {
    pub token: u32,
    pub in_prompt: bool,
    /// How often it was generated, below 2^31.
    pub generated: u32,
}

impl Draw {
    /// The largest logit's token, the lower one on a tie.
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition: 1.0,
            presence: 0.0,
            frequency: 0.0,
            biases: Vec::new(),
            slot: None,
        }
    }

    /// Whether tokens are counted for it.
    pub fn penalises(&self) -> bool {
        self.repetition != 1.0 || self.presence != 0.0 || self.frequency != 0.0
    }
}
