//! Files of requests, one JSON object a line: traces with times, and prompts or conversations to send.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::Deserialize;

use crate::workload::MOST_TOKENS;

/// No trace is longer; what looks longer has times that are none.
const LONGEST: Duration = Duration::from_secs(366 * 24 * 3600);

/// One line of a file. Unknown fields are passed over, so that production logs can be used as they are.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
pub struct Line {
    /// Of its file, from 1.
    #[serde(skip)]
    pub number: usize,
    /// Seconds from any origin.
    pub timestamp: Option<f64>,
    /// Milliseconds from any origin, instead of `timestamp`.
    pub timestamp_ms: Option<f64>,
    pub prompt: Option<String>,
    pub messages: Option<Vec<Message>>,
    /// The prompt's length where the line has no text.
    #[serde(alias = "input_length")]
    pub prompt_tokens: Option<u32>,
    #[serde(alias = "output_length", alias = "max_tokens")]
    pub output_tokens: Option<u32>,
}

/// A chat message of OpenAI's API.
#[derive(Debug, Clone, PartialEq, Deserialize, serde::Serialize)]
pub struct Message {
    pub role: String,
    pub content: String,
}

/// Why a file of requests cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    #[error("cannot read {}: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{}, line {line}: {message}", path.display())]
    Line {
        path: PathBuf,
        line: usize,
        message: String,
    },
    #[error("{}: the file has no requests", path.display())]
    Empty { path: PathBuf },
}

/// Reads a file of requests; empty lines are passed over.
///
/// # Errors
/// [`TraceError`], which names the line.
pub fn read(path: &Path) -> Result<Vec<Line>, TraceError> {
    let text = std::fs::read_to_string(path).map_err(|source| TraceError::Read {
        path: path.into(),
        source,
    })?;
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let lines: Vec<Line> = lines
        .map(|(index, text)| {
            let line: Result<Line, String> = serde_json::from_str(text).map_err(|error| in_a_line(&error));
            let number = index + 1;
            let line = line.and_then(checked).map(|line| Line { number, ..line });
            line.map_err(|message| wrong(path, number, &message))
        })
        .collect::<Result<_, _>>()?;
    if lines.is_empty() {
        return Err(TraceError::Empty { path: path.into() });
    }
    Ok(lines)
}

fn wrong(path: &Path, line: usize, message: &str) -> TraceError {
    TraceError::Line {
        path: path.into(),
        line,
        message: message.to_owned(),
    }
}

/// What is wrong, without the line that serde counts within the text it was given.
fn in_a_line(error: &serde_json::Error) -> String {
    error.to_string().replace(" at line 1 column", " at column")
}

fn checked(line: Line) -> Result<Line, String> {
    let time = line.timestamp.or(line.timestamp_ms);
    if time.is_some_and(|time| !time.is_finite() || time < 0.0) {
        return Err("the timestamp is not a number of seconds from 0".to_owned());
    }
    let mut lengths = [line.prompt_tokens, line.output_tokens].into_iter().flatten();
    if let Some(length) = lengths.find(|length| !(1..=MOST_TOKENS).contains(length)) {
        return Err(format!("a length of {length} tokens; they go from 1 to {MOST_TOKENS}"));
    }
    if let Some(messages) = &line.messages
        && !messages.iter().any(|message| message.role == "user")
    {
        return Err("the conversation has no message of role `user`".to_owned());
    }
    Ok(line)
}

impl Line {
    fn seconds(&self) -> Option<f64> {
        self.timestamp.or(self.timestamp_ms.map(|time| time / 1e3))
    }
}

/// The lines' times from the first, in ascending order, with the lines put into the same order.
///
/// # Errors
/// [`TraceError`] names the first line without a time, or one whose time is too far from the first.
pub fn times(path: &Path, lines: &mut [Line]) -> Result<Vec<Duration>, TraceError> {
    if let Some(line) = lines.iter().find(|line| line.seconds().is_none()) {
        let message = "a trace needs `timestamp` (seconds) or `timestamp_ms` in every line";
        return Err(wrong(path, line.number, message));
    }
    let seconds = |line: &Line| line.seconds().unwrap_or_default();
    lines.sort_by(|a, b| seconds(a).total_cmp(&seconds(b)));
    let first = lines.first().map(seconds).unwrap_or_default();
    let after = |line: &Line| {
        let after = Duration::try_from_secs_f64(seconds(line) - first).ok();
        let after = after.filter(|after| *after <= LONGEST);
        after.ok_or_else(|| wrong(path, line.number, "the timestamp lies more than a year after the first"))
    };
    lines.iter().map(after).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(name: &str, text: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("sconce-trace-{}-{name}", std::process::id()));
        std::fs::write(&path, text).unwrap();
        path
    }

    #[test]
    fn reads_times_prompts_and_lengths() {
        let path = file(
            "good",
            "{\"timestamp_ms\": 2500, \"input_length\": 7, \"output_length\": 3, \"hash_ids\": [1]}\n\n\
             {\"timestamp\": 1.0, \"prompt\": \"hello\"}\n",
        );
        let mut lines = read(&path).unwrap();
        assert_eq!(
            times(&path, &mut lines).unwrap(),
            [Duration::ZERO, Duration::from_millis(1500)]
        );
        assert_eq!(lines[0].prompt.as_deref(), Some("hello"));
        assert_eq!((lines[1].prompt_tokens, lines[1].output_tokens), (Some(7), Some(3)));
    }

    #[test]
    fn names_the_line_that_is_wrong() {
        for (name, text) in [
            ("syntax", "{\"timestamp\": 1}\n{\"timestamp\":\n"),
            ("negative", "{\"timestamp\": 1}\n{\"timestamp\": -4}\n"),
            ("type", "{\"timestamp\": 1}\n{\"timestamp\": \"noon\"}\n"),
            ("zero", "{\"timestamp\": 1}\n{\"timestamp\": 2, \"output_tokens\": 0}\n"),
            (
                "long",
                "{\"timestamp\": 1}\n{\"timestamp\": 2, \"output_tokens\": 1000001}\n",
            ),
            (
                "longer",
                "{\"timestamp\": 1}\n{\"timestamp\": 2, \"prompt_tokens\": 4000000000}\n",
            ),
        ] {
            let message = read(&file(name, text)).unwrap_err().to_string();
            assert!(message.contains("line 2"), "{message}");
        }
        for (name, second) in [
            ("timeless", "{\"prompt\": \"when?\"}"),
            ("late", "{\"timestamp\": 1e300}"),
            ("later", "{\"timestamp_ms\": 1e308}"),
        ] {
            // Empty lines count, and so does the order in the file.
            let path = file(
                name,
                &format!("{{\"timestamp\": 5}}\n\n\n{second}\n{{\"timestamp\": 1}}\n"),
            );
            let message = times(&path, &mut read(&path).unwrap()).unwrap_err().to_string();
            assert!(message.contains("line 4:"), "{message}");
        }
        let path = file("syntax-behind", "\n{\"timestamp\": 1}\n\n{\"timestamp\":\n");
        let message = read(&path).unwrap_err().to_string();
        assert!(message.contains("line 4:"), "{message}");
        assert!(matches!(read(&file("empty", "\n\n")), Err(TraceError::Empty { .. })));
    }
}
