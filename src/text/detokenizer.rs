//! From tokens to text, one token at a time.

use super::Tokenizer;
use crate::request::TokenId;

/// What stands before the first token that a detokenizer sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// Nothing: the space that SentencePiece puts before every text is taken away again.
    Text,
    /// The text that the tokens continue, so that a leading space is the tokens' own.
    Continuation,
}

/// Turns a sequence's tokens into text as they come, holding back the bytes of a character that is not complete yet.
/// Special tokens are not shown. What comes out, put together, is [`Tokenizer::decode`] of all tokens.
#[derive(Debug, Clone)]
pub struct Detokenizer {
    tokenizer: Tokenizer,
    /// The beginning of a character, at most three bytes between two calls.
    pending: Vec<u8>,
    drop_space: bool,
}

impl Detokenizer {
    pub fn new(tokenizer: Tokenizer, start: Start) -> Self {
        let drop_space = start == Start::Text && tokenizer.strips_space();
        Self {
            tokenizer,
            pending: Vec::new(),
            drop_space,
        }
    }

    /// The text that is certain now and was not before.
    pub fn push(&mut self, token: TokenId) -> String {
        if self.tokenizer.is_special(token) {
            return String::new();
        }
        let mut bytes = self.tokenizer.token_bytes(token);
        if self.drop_space && !bytes.is_empty() {
            bytes = bytes.strip_prefix(b" ").unwrap_or(bytes);
            self.drop_space = false;
        }
        self.pending.extend_from_slice(bytes);
        self.take_complete()
    }

    /// The rest, now that no more tokens come: a character cut short becomes U+FFFD.
    pub fn finish(&mut self) -> String {
        let rest = String::from_utf8_lossy(&self.pending).into_owned();
        self.pending.clear();
        rest
    }

    fn take_complete(&mut self) -> String {
        let mut text = String::new();
        let mut rest: &[u8] = &[];
        for chunk in self.pending.utf8_chunks() {
            text.push_str(chunk.valid());
            match chunk.invalid() {
                [] => {}
                invalid if is_beginning(invalid) && ends_with(&self.pending, invalid) => rest = invalid,
                _ => text.push(char::REPLACEMENT_CHARACTER),
            }
        }
        self.pending = rest.to_vec();
        text
    }
}

/// Whether more bytes could complete these to a character.
fn is_beginning(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_err_and(|e| e.error_len().is_none())
}

/// Whether `part`, a slice of `whole`, is its end.
fn ends_with(whole: &[u8], part: &[u8]) -> bool {
    whole.as_ptr_range().end == part.as_ptr_range().end
}

#[cfg(test)]
mod tests {
    use super::super::tokenizer::tests::{REFERENCE, SMOLLM2, sentencepiece_file};
    use super::*;
    use proptest::prelude::*;

    fn stream(detokenizer: &mut Detokenizer, tokens: &[TokenId]) -> Vec<String> {
        let mut pieces: Vec<String> = tokens.iter().map(|token| detokenizer.push(*token)).collect();
        pieces.push(detokenizer.finish());
        pieces
    }

    #[test]
    fn a_character_of_several_tokens_comes_whole() {
        let text = "I like 🦀 and 漢字.";
        let tokens = SMOLLM2.encode(text, false).unwrap();
        let pieces = stream(&mut Detokenizer::new(SMOLLM2.clone(), Start::Text), &tokens);
        assert!(pieces.iter().all(|piece| !piece.contains('\u{FFFD}')));
        assert!(pieces.iter().filter(|piece| piece.is_empty()).count() > 2, "{pieces:?}");
        assert_eq!(pieces.concat(), text);
    }

    #[test]
    fn a_character_cut_short_is_replaced_once() {
        let tokens = SMOLLM2.encode("a🦀", false).unwrap();
        let mut detokenizer = Detokenizer::new(SMOLLM2.clone(), Start::Text);
        let pieces = stream(&mut detokenizer, &tokens[..tokens.len() - 1]);
        assert_eq!(pieces.concat(), "a\u{FFFD}");
        assert_eq!(pieces.last().unwrap(), "\u{FFFD}");
    }

    #[test]
    fn a_leading_space_is_kept_only_in_a_continuation() {
        let tokenizer = Tokenizer::open(sentencepiece_file().path()).unwrap();
        let tokens = tokenizer.encode("hi hi", true).unwrap();
        let text = |start| stream(&mut Detokenizer::new(tokenizer.clone(), start), &tokens).concat();
        assert_eq!(text(Start::Text), "hi hi");
        assert_eq!(text(Start::Continuation), " hi hi");
    }

    #[test]
    fn reference_completions_stream_as_they_decode() {
        for prompt in REFERENCE["prompts"].as_array().unwrap() {
            let tokens: Vec<TokenId> = serde_json::from_value(prompt["tokens"].clone()).unwrap();
            let text = stream(&mut Detokenizer::new(SMOLLM2.clone(), Start::Text), &tokens).concat();
            assert_eq!(text, SMOLLM2.decode(&tokens, false));
        }
    }

    proptest! {
        #[test]
        fn any_tokens_stream_as_they_decode(tokens in proptest::collection::vec(0u32..49152, 0..40)) {
            let pieces = stream(&mut Detokenizer::new(SMOLLM2.clone(), Start::Text), &tokens);
            prop_assert_eq!(pieces.concat(), SMOLLM2.decode(&tokens, false));
        }

        #[test]
        fn single_bytes_stream_as_they_decode(bytes in proptest::collection::vec(proptest::sample::select(
            vec![b'a', 0xC3, 0xA9, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0xA6, 0x80, 0xED, 0xA0, 0xFF]), 0..12)) {
            static TOKENIZER: std::sync::LazyLock<Tokenizer> =
                std::sync::LazyLock::new(|| Tokenizer::open(sentencepiece_file().path()).unwrap());
            let tokens: Vec<TokenId> = bytes.iter().map(|byte| 3 + TokenId::from(*byte)).collect();
            let pieces = stream(&mut Detokenizer::new(TOKENIZER.clone(), Start::Text), &tokens);
            prop_assert_eq!(pieces.concat(), String::from_utf8_lossy(&bytes).into_owned());
        }
    }
}
