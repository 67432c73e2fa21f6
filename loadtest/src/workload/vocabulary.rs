//! Words that are one token each, and the texts made of them.
//!
//! Byte-pair tokenizers cut text before each space first, so the tokens of ` one` and ` two` together are the tokens of
//! ` one two`: a text of an exact length needs no tokenizer once its words were counted.

use rand::{Rng, RngExt};

use crate::{client::Target, tokens::Tokens};

const WORDS: &str = include_str!("words.txt");

/// Common words that, with a space in front, are one token each, and the ids of these tokens.
#[derive(Debug, Clone)]
pub struct Vocabulary {
    /// Never empty.
    words: Vec<&'static str>,
    ids: Vec<u32>,
}

impl Vocabulary {
    /// Keeps the words that are one token each. Asks the source about every word; `None` where it does not tell of all, or
    /// none is a token.
    pub async fn measured(tokens: &Tokens, target: &Target, model: &str) -> Option<Self> {
        let (mut words, mut ids) = (Vec::new(), Vec::new());
        for word in WORDS.split_whitespace() {
            let found = tokens.encode(target, model, &format!(" {word}")).await?;
            if let [id] = found[..] {
                words.push(word);
                ids.push(id);
            }
        }
        (!words.is_empty()).then_some(Self { words, ids })
    }

    /// Takes every word for one token.
    pub fn estimated() -> Self {
        Self {
            words: WORDS.split_whitespace().collect(),
            ids: Vec::new(),
        }
    }

    pub fn has_ids(&self) -> bool {
        !self.ids.is_empty()
    }

    /// A text of this many tokens.
    pub fn text(&self, tokens: u32, random: &mut impl Rng) -> String {
        let mut text = String::with_capacity(tokens as usize * 6);
        for _ in 0..tokens {
            text.push(' ');
            text.push_str(self.words[random.random_range(0..self.words.len())]);
        }
        text
    }

    /// Ids of tokens that the server knows.
    pub fn ids(&self, count: u32, random: &mut impl Rng) -> Vec<u32> {
        (0..count)
            .map(|_| self.ids[random.random_range(0..self.ids.len())])
            .collect()
    }
}
