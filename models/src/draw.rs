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
    /// The row's random number, 0 to 1: where in the kept probability the draw falls.
    pub point: f32,
    /// Logits of tokens in the prompt and of generated ones are divided by it where positive, else multiplied; 1 is off.
    pub repetition: f32,
    /// Is taken from logits of generated tokens; 0 is off.
    pub presence: f32,
    /// Is taken from logits of generated tokens for each time that they were generated; 0 is off.
    pub frequency: f32,
    /// The tokens whose logits change, each once. A row that goes on from a token which the step before chooses counts that
    /// token as generated once more, whether it is among these or not.
    pub edits: Vec<Edit>,
}

impl Draw {
    /// The largest logit's token, the lower one on a tie.
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            point: 0.0,
            repetition: 1.0,
            presence: 0.0,
            frequency: 0.0,
            edits: Vec::new(),
        }
    }
}

/// Why a token's logit changes: it is divided or multiplied, then taken from, as [`Draw`] says; then comes the bias.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Edit {
    pub token: u32,
    pub in_prompt: bool,
    /// How often the token was generated.
    pub generated: u32,
    /// Is added.
    pub bias: f32,
}
