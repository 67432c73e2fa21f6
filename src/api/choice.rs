//! One choice of a response: the engine's tokens in, text that is certain out.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::request::{FinishReason, Token, TokenId};
use crate::text::{Detokenizer, StopMatcher};

/// What a choice adds to what its client has.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct Delta {
    /// Whole characters, none of a stop string.
    pub text: String,
    /// The tokens that the client's text now reaches, where log-probabilities were asked for.
    pub logprobs: Vec<ShownToken>,
    /// `Some` with the last delta.
    pub finish: Option<FinishReason>,
}

/// A token with its log-probabilities and its place in the choice's text.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct ShownToken {
    pub id: TokenId,
    pub chosen: f32,
    pub top: Vec<(TokenId, f32)>,
    /// Where it begins, in characters.
    pub offset: usize,
}

/// The assembly of one choice, and what it knows of its own course.
#[derive(Debug)]
pub(super) struct Choice {
    detokenizer: Detokenizer,
    stop: StopMatcher,
    /// Tokens that end the sequence and are not shown.
    stop_tokens: Vec<TokenId>,
    /// Put before the text that is generated: the prompt, if it is to be echoed.
    echo: String,
    /// Tokens whose text the client does not have yet, with the byte of the text where each begins.
    unshown: VecDeque<(usize, ShownToken)>,
    /// Text made so far, held back or not.
    made_bytes: usize,
    made_chars: usize,
    /// Text given to the client so far.
    shown_bytes: usize,
    /// Tokens consumed, the one that ended the choice included.
    pub tokens: usize,
    pub cached_tokens: usize,
    /// When the request left the queue, and how much of its wait was the window.
    pub admitted: Option<(Instant, Duration)>,
    pub first: Option<Instant>,
    pub last: Option<Instant>,
}

impl Choice {
    pub fn new(detokenizer: Detokenizer, stops: Vec<String>, stop_tokens: Vec<TokenId>, echo: String) -> Self {
        Self {
            detokenizer,
            stop: StopMatcher::new(stops),
            stop_tokens,
            echo,
            unshown: VecDeque::new(),
            made_bytes: 0,
            made_chars: 0,
            shown_bytes: 0,
            tokens: 0,
            cached_tokens: 0,
            admitted: None,
            first: None,
            last: None,
        }
    }

    /// Takes the next token; `finish` is set if its text completed a stop string.
    pub fn push(&mut self, token: Token) -> Delta {
        self.tokens += 1;
        self.first.get_or_insert(token.at);
        self.last = Some(token.at);
        if let Some(logprobs) = token.logprobs {
            let shown = ShownToken {
                id: token.id,
                chosen: logprobs.chosen,
                top: logprobs.top,
                offset: self.made_chars,
            };
            self.unshown.push_back((self.made_bytes, shown));
        }
        if self.stop_tokens.contains(&token.id) {
            return Delta::default();
        }
        let text = self.detokenizer.push(token.id);
        let text = self.pass(&text);
        let finish = self.stop.stopped().then_some(FinishReason::Stop);
        self.delta(text, finish)
    }

    /// Gives out what was held back, now that the engine has ended the sequence.
    pub fn finish(&mut self, reason: FinishReason) -> Delta {
        let rest = self.detokenizer.finish();
        let mut text = self.pass(&rest);
        text += &self.stop.finish();
        let reason = if self.stop.stopped() {
            FinishReason::Stop
        } else {
            reason
        };
        let mut delta = self.delta(text, Some(reason));
        if !self.stop.stopped() {
            delta.logprobs.extend(self.unshown.drain(..).map(|(_, token)| token));
        }
        delta
    }

    fn pass(&mut self, text: &str) -> String {
        self.made_bytes += text.len();
        self.made_chars += text.chars().count();
        self.stop.push(text)
    }

    fn delta(&mut self, text: String, finish: Option<FinishReason>) -> Delta {
        self.shown_bytes += text.len();
        let mut logprobs = Vec::new();
        while self.unshown.front().is_some_and(|(begin, _)| *begin < self.shown_bytes) {
            logprobs.extend(self.unshown.pop_front().map(|(_, token)| token));
        }
        let text = if self.echo.is_empty() {
            text
        } else {
            std::mem::take(&mut self.echo) + &text
        };
        Delta { text, logprobs, finish }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{token, tokenizer};
    use super::*;
    use crate::text::Start;

    fn choice(stops: &[&str]) -> Choice {
        let stops = stops.iter().map(|stop| stop.to_string()).collect();
        Choice::new(
            Detokenizer::new(tokenizer(), Start::Text),
            stops,
            vec![2],
            String::new(),
        )
    }

    /// Runs a text's tokens through, then the end, and gives what came of each.
    fn run(choice: &mut Choice, text: &str) -> Vec<Delta> {
        let ids = tokenizer().encode(text, false).unwrap();
        let mut deltas = Vec::new();
        for id in ids {
            deltas.push(choice.push(token(id)));
            if deltas.last().unwrap().finish.is_some() {
                return deltas;
            }
        }
        deltas.push(choice.finish(FinishReason::Length));
        deltas
    }

    fn text(deltas: &[Delta]) -> String {
        deltas.iter().map(|delta| delta.text.as_str()).collect()
    }

    #[test]
    fn the_token_that_completes_a_stop_string_is_the_last_counted() {
        let whole = "One two three. Four five.";
        let before = tokenizer().encode("One two three.", false).unwrap().len();
        let mut choice = choice(&["three."]);
        let deltas = run(&mut choice, whole);
        assert_eq!(text(&deltas), "One two ");
        assert_eq!(deltas.last().unwrap().finish, Some(FinishReason::Stop));
        assert_eq!(choice.tokens, before);
    }

    #[test]
    fn a_held_beginning_comes_out_at_the_end() {
        let mut choice = choice(&["three four"]);
        let deltas = run(&mut choice, "one two three");
        assert_eq!(text(&deltas), "one two three");
        assert_eq!(deltas.last().unwrap().finish, Some(FinishReason::Length));
        assert!(
            deltas[..deltas.len() - 1]
                .iter()
                .all(|delta| !delta.text.contains("three"))
        );
    }

    #[test]
    fn a_stop_token_counts_and_is_not_shown() {
        let mut choice = Choice::new(
            Detokenizer::new(tokenizer(), Start::Text),
            vec![],
            vec![28],
            String::new(),
        );
        choice.push(token(4093));
        assert_eq!(choice.push(token(28)), Delta::default());
        let last = choice.finish(FinishReason::Stop);
        assert_eq!(
            (last.text.as_str(), last.finish, choice.tokens),
            ("", Some(FinishReason::Stop), 2)
        );
    }

    #[test]
    fn log_probabilities_wait_for_their_text_and_none_is_lost() {
        let mut choice = choice(&[]);
        let deltas = run(&mut choice, "a🦀b");
        for delta in &deltas[..deltas.len() - 1] {
            assert_eq!(delta.text.is_empty(), delta.logprobs.is_empty());
        }
        let shown: Vec<&ShownToken> = deltas.iter().flat_map(|delta| &delta.logprobs).collect();
        assert_eq!(shown.len(), choice.tokens);
        let ids: Vec<TokenId> = shown.iter().map(|token| token.id).collect();
        assert_eq!(tokenizer().decode(&ids, false), "a🦀b");
        assert_eq!(
            (shown[0].offset, shown[1].offset, shown.last().unwrap().offset),
            (0, 1, 2)
        );
    }

    #[test]
    fn tokens_of_a_stop_string_are_not_shown_as_log_probabilities() {
        let mut choice = choice(&[" two three"]);
        let deltas = run(&mut choice, "one two three four");
        let ids: Vec<TokenId> = deltas
            .iter()
            .flat_map(|delta| &delta.logprobs)
            .map(|token| token.id)
            .collect();
        assert_eq!(tokenizer().decode(&ids, false), "one");
    }

    #[test]
    fn the_prompt_is_echoed_once() {
        let mut choice = Choice::new(
            Detokenizer::new(tokenizer(), Start::Continuation),
            vec!["Say".to_string()],
            vec![2],
            "Say hi:".to_string(),
        );
        assert_eq!(text(&run(&mut choice, " hi there")), "Say hi: hi there");
    }
}
