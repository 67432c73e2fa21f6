//! What requests ask: presets, lengths, prompts of an exact number of tokens, chat sessions, files of prompts.

mod lengths;
mod vocabulary;

use std::{sync::Arc, time::Duration};

use rand::{SeedableRng, rngs::Xoshiro256PlusPlus};
use rand_distr::{Distribution, Exp};

pub(crate) use lengths::MOST_TOKENS;
pub use lengths::{Lengths, LengthsError};
pub use vocabulary::Vocabulary;

use crate::{
    client::Api,
    trace::{Line, Message},
};

/// Workloads with names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Preset {
    /// A short question under a shared system prompt, a longer answer
    Chat,
    /// Text to be continued
    Completion,
    /// A long prompt, a short answer
    Rag,
    /// Code to be continued, lengths spread widely
    Code,
    /// A text of some length, an answer of a few tokens
    Classify,
    /// Random token ids, 64 to 192 in and 32 to 96 out, as vLLM's `random` data set has them
    Random,
}

/// What a run's requests look like. Lengths are in tokens.
#[derive(Debug, Clone)]
pub struct Workload {
    pub name: String,
    pub api: Api,
    pub prompt: Lengths,
    pub output: Lengths,
    /// Tokens that all prompts begin with: the system message of a chat, the first words of a completion.
    pub shared_prefix: u32,
    /// Requests in a session; each carries the whole history, the server's answers included.
    pub turns: Lengths,
    /// Mean of the exponential pause between an answer and the session's next request.
    pub think_time: Duration,
    pub ignore_eos: bool,
    /// Prompts are random token ids instead of words.
    pub token_ids: bool,
    /// Lines to send in turn, from the first again after the last; empty: all prompts are made up.
    pub lines: Vec<Line>,
}

impl Preset {
    pub fn workload(self) -> Workload {
        let uniform = |least, most| Lengths::Uniform { least, most };
        let spread = |median, most| Lengths::LogNormal {
            median,
            sigma: 0.7,
            most,
        };
        let (name, api, prompt, output, shared_prefix) = match self {
            Preset::Chat => ("chat", Api::Chat, spread(80.0, 1024), spread(120.0, 512), 48),
            Preset::Completion => ("completion", Api::Completions, uniform(32, 256), uniform(32, 128), 0),
            Preset::Rag => ("rag", Api::Chat, uniform(1024, 2048), uniform(32, 128), 48),
            Preset::Code => ("code", Api::Completions, spread(400.0, 2048), spread(64.0, 512), 0),
            Preset::Classify => ("classify", Api::Chat, uniform(64, 256), uniform(1, 4), 96),
            Preset::Random => ("random", Api::Completions, uniform(64, 192), uniform(32, 96), 0),
        };
        Workload {
            name: name.to_owned(),
            api,
            prompt,
            output,
            shared_prefix,
            turns: Lengths::Fixed(1),
            think_time: Duration::ZERO,
            ignore_eos: true,
            token_ids: self == Preset::Random,
            lines: Vec::new(),
        }
    }
}

/// One user's requests, each to be sent after the answer to the one before.
#[derive(Debug, Clone, PartialEq)]
pub struct Session {
    /// Messages (or, for completions, text) that stand before the first turn.
    pub before: Vec<Message>,
    pub turns: Vec<Turn>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Turn {
    pub content: Content,
    pub max_tokens: u32,
    /// The pause before this turn; zero for the first.
    pub pause: Duration,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Content {
    Text(String),
    Tokens(Vec<u32>),
}

/// Makes a workload's sessions, one after the other, the same for the same seeds.
#[derive(Debug)]
pub struct Sessions {
    workload: Arc<Workload>,
    vocabulary: Arc<Vocabulary>,
    random: Xoshiro256PlusPlus,
    words: Xoshiro256PlusPlus,
    prefix: Option<Message>,
    made: usize,
}

impl Sessions {
    /// One seed fixes lengths and pauses, another the words.
    pub fn new(workload: Arc<Workload>, vocabulary: Arc<Vocabulary>, seed: u64, words: u64) -> Self {
        // All runs share the prefix, whatever their seed: it is part of the workload.
        let mut fixed = Xoshiro256PlusPlus::seed_from_u64(0);
        let prefix = (workload.shared_prefix > 0).then(|| Message {
            role: "system".to_owned(),
            content: vocabulary.text(workload.shared_prefix, &mut fixed),
        });
        Self {
            workload,
            vocabulary,
            random: Xoshiro256PlusPlus::seed_from_u64(seed),
            words: Xoshiro256PlusPlus::seed_from_u64(words),
            prefix,
            made: 0,
        }
    }

    pub fn make(&mut self) -> Session {
        let line = match self.workload.lines.len() {
            0 => None,
            count => Some(self.workload.lines[self.made % count].clone()),
        };
        self.made += 1;
        match &line {
            Some(line) if line.messages.is_some() => self.conversation(line),
            line => self.synthetic(line.as_ref()),
        }
    }

    /// Each user's message is a turn; the file's answers give way to the server's own.
    fn conversation(&mut self, line: &Line) -> Session {
        let messages = line.messages.as_deref().unwrap_or_default();
        let first = messages.iter().position(|message| message.role == "user").unwrap_or(0);
        let asked = messages.iter().filter(|message| message.role == "user");
        let mut turns: Vec<Turn> = Vec::new();
        for message in asked {
            turns.push(self.turn(Content::Text(message.content.clone()), line.output_tokens, turns.len()));
        }
        Session {
            before: messages[..first].to_vec(),
            turns,
        }
    }

    fn synthetic(&mut self, line: Option<&Line>) -> Session {
        let count = match line {
            Some(_) => 1,
            None => self.workload.turns.sample(&mut self.random),
        };
        let turns = (0..count as usize).map(|index| {
            let content = match line.and_then(|line| line.prompt.clone()) {
                Some(text) => Content::Text(text),
                None => self.content(line.and_then(|line| line.prompt_tokens)),
            };
            self.turn(content, line.and_then(|line| line.output_tokens), index)
        });
        let turns = turns.collect();
        Session {
            before: self.prefix.clone().into_iter().collect(),
            turns,
        }
    }

    fn content(&mut self, length: Option<u32>) -> Content {
        let length = length.unwrap_or_else(|| self.workload.prompt.sample(&mut self.random));
        if self.workload.token_ids && self.vocabulary.has_ids() {
            Content::Tokens(self.vocabulary.ids(length, &mut self.words))
        } else {
            Content::Text(self.vocabulary.text(length, &mut self.words))
        }
    }

    fn turn(&mut self, content: Content, max_tokens: Option<u32>, index: usize) -> Turn {
        let mean = self.workload.think_time.as_secs_f64();
        let pause = match Exp::new(1.0 / mean) {
            Ok(pauses) if index > 0 && mean > 0.0 => Duration::from_secs_f64(pauses.sample(&mut self.random)),
            _ => Duration::ZERO,
        };
        Turn {
            content,
            max_tokens: max_tokens.unwrap_or_else(|| self.workload.output.sample(&mut self.random)),
            pause,
        }
    }
}

impl Workload {
    /// The mean number of requests in a session.
    pub fn mean_turns(&self) -> f64 {
        if self.lines.is_empty() {
            return self.turns.mean();
        }
        let turns = self.lines.iter().map(|line| match &line.messages {
            Some(messages) => messages.iter().filter(|message| message.role == "user").count(),
            None => 1,
        });
        turns.sum::<usize>() as f64 / self.lines.len() as f64
    }

    /// How reports name it.
    pub fn describe(&self) -> String {
        let api = self.api.path();
        if !self.lines.is_empty() {
            return format!("{}: {} lines to {api}", self.name, self.lines.len());
        }
        let mut text = format!("{}: {} tokens in, {} out, {api}", self.name, self.prompt, self.output);
        if self.shared_prefix > 0 {
            text += &format!(", {} shared", self.shared_prefix);
        }
        if self.turns != Lengths::Fixed(1) {
            text += &format!(", {} turns", self.turns);
        }
        if !self.think_time.is_zero() {
            text += &format!(", {:?} think time", self.think_time);
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sessions(workload: &Workload, seed: u64) -> Vec<Session> {
        worded(workload, seed, seed)
    }

    fn worded(workload: &Workload, seed: u64, words: u64) -> Vec<Session> {
        let vocabulary = Arc::new(Vocabulary::estimated());
        let mut sessions = Sessions::new(Arc::new(workload.clone()), vocabulary, seed, words);
        (0..20).map(|_| sessions.make()).collect()
    }

    #[test]
    fn other_words_keep_the_lengths() {
        let (one, two) = (
            worded(&Preset::Chat.workload(), 1, 1),
            worded(&Preset::Chat.workload(), 1, 2),
        );
        for (one, two) in one.iter().zip(&two) {
            let ([one], [two]) = (&one.turns[..], &two.turns[..]) else {
                panic!("one turn each")
            };
            let (Content::Text(a), Content::Text(b)) = (&one.content, &two.content) else {
                panic!("texts")
            };
            assert_eq!(a.split_whitespace().count(), b.split_whitespace().count());
            assert_eq!(one.max_tokens, two.max_tokens);
            assert_ne!(a, b);
        }
    }

    #[test]
    fn a_seed_repeats_its_sessions() {
        let workload = Preset::Chat.workload();
        assert_eq!(sessions(&workload, 1), sessions(&workload, 1));
        let (one, two) = (sessions(&workload, 1), sessions(&workload, 2));
        assert_ne!(one[0].turns, two[0].turns);
        assert_eq!(one[0].before, two[7].before, "the prefix is shared");
    }

    #[test]
    fn conversations_leave_the_answers_to_the_server() {
        let message = |role: &str, content: &str| Message {
            role: role.into(),
            content: content.into(),
        };
        let line = Line {
            messages: Some(vec![
                message("system", "be brief"),
                message("user", "one"),
                message("assistant", "recorded"),
                message("user", "two"),
            ]),
            output_tokens: Some(9),
            ..Line::default()
        };
        let mut workload = Preset::Chat.workload();
        workload.lines = vec![line];
        assert_eq!(workload.mean_turns(), 2.0);
        let session = &sessions(&workload, 0)[0];
        assert_eq!(session.before, [message("system", "be brief")]);
        let texts: Vec<_> = session
            .turns
            .iter()
            .map(|turn| (&turn.content, turn.max_tokens))
            .collect();
        assert_eq!(
            texts,
            [(&Content::Text("one".into()), 9), (&Content::Text("two".into()), 9)]
        );
    }

    #[test]
    fn sessions_have_turns_and_pauses() {
        let mut workload = Preset::Chat.workload();
        workload.turns = Lengths::Uniform { least: 2, most: 4 };
        workload.think_time = Duration::from_secs(3);
        let sessions = sessions(&workload, 5);
        assert!(sessions.iter().all(|session| (2..=4).contains(&session.turns.len())));
        assert!(sessions.iter().all(|session| session.turns[0].pause.is_zero()));
        let pauses: Vec<f64> = sessions
            .iter()
            .flat_map(|s| &s.turns[1..])
            .map(|turn| turn.pause.as_secs_f64())
            .collect();
        let mean = pauses.iter().sum::<f64>() / pauses.len() as f64;
        assert!((1.5..5.0).contains(&mean), "{mean}");
    }
}
