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
    /// What is done to logits before, at most once for each token.
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
            edits: Vec::new(),
        }
    }
}

/// A change to one token's logit: divided where positive, else multiplied, by `repetition`; less `subtract`; plus `add`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Edit {
    pub token: u32,
    pub repetition: f32,
    pub subtract: f32,
    pub add: f32,
}
