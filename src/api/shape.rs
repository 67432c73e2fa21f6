//! The two shapes of a response: chat and completion, whole and in chunks.

use std::collections::BTreeMap;

use serde::Serialize;

use super::choice::{Delta, ShownToken};
use super::types::{
    AssistantMessage, ChatChoice, ChatDelta, ChatLogprobs, ChatTokenLogprob, DeltaBody, Envelope, TextChoice,
    TextLogprobs, Timing, TokenLogprob, Usage,
};
use crate::request::{FinishReason, TokenId};
use crate::text::Tokenizer;

/// JSON has no negative infinity; a token that cannot come has this instead.
const IMPOSSIBLE: f32 = -9999.0;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shape {
    Chat,
    Completion,
}

/// What all parts of one response begin with, and how they are written.
#[derive(Debug)]
pub(super) struct Head {
    pub shape: Shape,
    pub id: String,
    pub created: u64,
    pub model: String,
    /// Whether log-probabilities were asked for.
    pub logprobs: bool,
    pub tokenizer: Tokenizer,
}

impl Head {
    /// The response in one piece, from each choice's whole text.
    pub fn whole(&self, choices: Vec<Delta>, usage: Usage) -> Result<String, serde_json::Error> {
        let usage = Some(Some(usage));
        match self.shape {
            Shape::Chat => {
                let choices: Vec<ChatChoice> = choices.into_iter().enumerate().map(|c| self.chat_choice(c)).collect();
                self.envelope("chat.completion", &choices, usage, None)
            }
            Shape::Completion => {
                let choices: Vec<TextChoice> = choices.into_iter().enumerate().map(|c| self.text_choice(c)).collect();
                self.envelope("text_completion", &choices, usage, None)
            }
        }
    }

    /// One chunk of a stream. `usage` is absent, or `null` until the last chunk.
    pub fn chunk(&self, index: usize, delta: Delta, usage: Option<Option<Usage>>) -> Result<String, serde_json::Error> {
        match self.shape {
            Shape::Chat => {
                let finish_reason = delta.finish.map(finish_reason);
                let stop_reason = delta.finish.and_then(stop_reason);
                let logprobs = self.chat_logprobs(&delta.logprobs);
                let content = Some(delta.text).filter(|text| !text.is_empty());
                let delta = DeltaBody { role: None, content };
                self.chat_chunk(
                    ChatDelta {
                        index,
                        delta,
                        logprobs,
                        finish_reason,
                        stop_reason,
                    },
                    usage,
                )
            }
            Shape::Completion => self.envelope("text_completion", &[self.text_choice((index, delta))], usage, None),
        }
    }

    /// The chunk a choice begins with, where the shape has one.
    pub fn first_chunk(&self, index: usize, usage: Option<Option<Usage>>) -> Option<Result<String, serde_json::Error>> {
        let delta = DeltaBody {
            role: Some("assistant"),
            content: Some(String::new()),
        };
        let chunk = ChatDelta {
            index,
            delta,
            logprobs: None,
            finish_reason: None,
            stop_reason: None,
        };
        (self.shape == Shape::Chat).then(|| self.chat_chunk(chunk, usage))
    }

    /// The chunk after all choices, with what they used and what batching cost them.
    pub fn usage_chunk(&self, usage: Usage, timing: Timing) -> Result<String, serde_json::Error> {
        let object = match self.shape {
            Shape::Chat => "chat.completion.chunk",
            Shape::Completion => "text_completion",
        };
        self.envelope::<()>(object, &[], Some(Some(usage)), Some(timing))
    }

    fn chat_chunk(&self, choice: ChatDelta, usage: Option<Option<Usage>>) -> Result<String, serde_json::Error> {
        self.envelope("chat.completion.chunk", &[choice], usage, None)
    }

    fn envelope<C: Serialize>(
        &self,
        object: &'static str,
        choices: &[C],
        usage: Option<Option<Usage>>,
        sconce: Option<Timing>,
    ) -> Result<String, serde_json::Error> {
        let Self { id, created, model, .. } = self;
        serde_json::to_string(&Envelope {
            id,
            object,
            created: *created,
            model,
            choices,
            usage,
            sconce,
        })
    }

    fn chat_choice(&self, (index, choice): (usize, Delta)) -> ChatChoice {
        let message = AssistantMessage {
            role: "assistant",
            content: choice.text,
            refusal: None,
        };
        let logprobs = self.chat_logprobs(&choice.logprobs);
        let finish_reason = finish_reason(choice.finish.unwrap_or(FinishReason::Length));
        ChatChoice {
            index,
            message,
            logprobs,
            finish_reason,
            stop_reason: choice.finish.and_then(stop_reason),
        }
    }

    fn text_choice(&self, (index, choice): (usize, Delta)) -> TextChoice {
        let logprobs = self.logprobs.then(|| self.text_logprobs(&choice.logprobs));
        TextChoice {
            index,
            text: choice.text,
            logprobs,
            finish_reason: choice.finish.map(finish_reason),
            stop_reason: choice.finish.and_then(stop_reason),
        }
    }

    fn chat_logprobs(&self, tokens: &[ShownToken]) -> Option<ChatLogprobs> {
        let content = tokens.iter().map(|shown| ChatTokenLogprob {
            token: self.token(shown.id, shown.chosen),
            top_logprobs: shown
                .top
                .iter()
                .map(|(id, logprob)| self.token(*id, *logprob))
                .collect(),
        });
        (self.logprobs && !tokens.is_empty()).then(|| ChatLogprobs {
            content: content.collect(),
        })
    }

    fn token(&self, id: TokenId, logprob: f32) -> TokenLogprob {
        let bytes = self.tokenizer.token_bytes(id).to_vec();
        TokenLogprob {
            token: self.token_text(id),
            logprob: logprob.max(IMPOSSIBLE),
            bytes,
        }
    }

    fn token_text(&self, id: TokenId) -> String {
        String::from_utf8_lossy(self.tokenizer.token_bytes(id)).into_owned()
    }

    fn text_logprobs(&self, tokens: &[ShownToken]) -> TextLogprobs {
        let mut lists = TextLogprobs::default();
        for shown in tokens {
            lists.tokens.push(self.token_text(shown.id));
            lists.token_logprobs.push(shown.chosen.max(IMPOSSIBLE));
            lists.text_offset.push(shown.offset);
            let mut top = BTreeMap::new();
            for (id, logprob) in &shown.top {
                // Two tokens may show alike; the likelier one, which comes first, keeps the place.
                top.entry(self.token_text(*id)).or_insert(logprob.max(IMPOSSIBLE));
            }
            lists.top_logprobs.push(top);
        }
        lists
    }
}

pub(super) fn finish_reason(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop => "stop",
        FinishReason::Length | FinishReason::Deadline => "length",
    }
}

/// OpenAI's clients know no word for a deadline; `stop_reason` is where other servers say more, too.
fn stop_reason(reason: FinishReason) -> Option<&'static str> {
    (reason == FinishReason::Deadline).then_some("deadline")
}

#[cfg(test)]
mod tests {
    use super::super::testing::tokenizer;
    use super::*;
    use serde_json::{Value, json};

    fn head(shape: Shape) -> Head {
        Head {
            shape,
            id: "x".into(),
            created: 1,
            model: "m".into(),
            logprobs: true,
            tokenizer: tokenizer(),
        }
    }

    fn delta() -> Delta {
        let bee = tokenizer().encode("é", false).unwrap()[0];
        let logprobs = vec![ShownToken {
            id: bee,
            chosen: -0.5,
            top: vec![(28, f32::NEG_INFINITY)],
            offset: 4,
        }];
        Delta {
            text: "é".into(),
            logprobs,
            finish: Some(FinishReason::Stop),
        }
    }

    fn parsed(text: Result<String, serde_json::Error>) -> Value {
        serde_json::from_str(&text.unwrap()).unwrap()
    }

    #[test]
    fn chat_log_probabilities_have_bytes_and_no_infinity() {
        let chunk = parsed(head(Shape::Chat).chunk(0, delta(), None));
        let token = &chunk["choices"][0]["logprobs"]["content"][0];
        assert_eq!((&token["token"], &token["bytes"]), (&json!("é"), &json!([0xC3, 0xA9])));
        assert_eq!(token["logprob"], -0.5);
        assert_eq!(
            token["top_logprobs"],
            json!([{"token": ",", "logprob": -9999.0, "bytes": [44]}])
        );
        assert!(chunk.get("usage").is_none());
    }

    #[test]
    fn completion_log_probabilities_are_lists_side_by_side() {
        let chunk = parsed(head(Shape::Completion).chunk(3, delta(), Some(None)));
        assert_eq!(
            chunk,
            json!({
                "id": "x", "object": "text_completion", "created": 1, "model": "m", "usage": null,
                "choices": [{"index": 3, "text": "é", "finish_reason": "stop", "logprobs": {
                    "tokens": ["é"], "token_logprobs": [-0.5], "top_logprobs": [{",": -9999.0}], "text_offset": [4],
                }}],
            })
        );
    }
}
