//! The most that may be in the server, and what is more than that by itself.

use super::Ask;

/// The most that may be in the server.
#[derive(Debug, Clone, PartialEq)]
pub struct Limits {
    /// Requests that wait.
    pub requests: usize,
    /// Prompt tokens of requests that wait.
    pub tokens: Option<usize>,
    /// Requests that wait or run.
    pub in_flight: Option<usize>,
    /// The share of each of these that one API key may take.
    pub key_share: f64,
}

impl Limits {
    /// Whether an idle server takes so much.
    ///
    /// # Errors
    /// [`TooLarge`]
    pub(super) fn check(&self, asks: &[Ask]) -> Result<(), TooLarge> {
        let (choices, tokens) = (asks.len(), asks.iter().map(|ask| ask.prompt).sum::<usize>());
        let bounds = [
            (choices, "choices", Some(self.requests), "queue"),
            (
                tokens,
                "prompt tokens, counted once a choice",
                self.tokens,
                "queue-tokens",
            ),
            (choices, "choices", self.in_flight, "max-in-flight"),
        ];
        for (asked, what, limit, setting) in bounds {
            if let Some(limit) = limit.filter(|limit| asked > *limit) {
                return Err(TooLarge {
                    asked,
                    what,
                    limit,
                    setting,
                });
            }
        }
        Ok(())
    }
}

/// A request that no server with these limits takes, however idle it is.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("the request has {asked} {what}, and the server takes at most {limit} (`--{setting}`); ask for less at a time")]
pub struct TooLarge {
    asked: usize,
    what: &'static str,
    limit: usize,
    setting: &'static str,
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::request::Tenant;

    #[test]
    fn what_an_idle_server_does_not_take_is_too_large() {
        let limits = Limits {
            requests: 8,
            tokens: Some(10),
            in_flight: Some(4),
            key_share: 0.5,
        };
        let check = |choices: usize, prompt: usize| {
            let ask = Ask {
                tenant: Arc::new(Tenant::anyone()),
                priority: 0,
                prompt,
                max_tokens: 8,
                deadline: None,
            };
            limits.check(&vec![ask; choices]).map_err(|excess| excess.to_string())
        };
        assert_eq!((check(1, 10), check(4, 2)), (Ok(()), Ok(())));
        for (choices, prompt, limit) in [
            (1, 11, "10 (`--queue-tokens`)"),
            (5, 2, "4 (`--max-in-flight`)"),
            (9, 1, "8 (`--queue`)"),
        ] {
            let message = check(choices, prompt).unwrap_err();
            assert!(message.contains(limit), "{message}");
        }
    }
}
