//! From text to tokens and back: chat template, tokenizer, incremental detokenizer, stop strings.
//!
//! Nothing here knows a tensor or a socket; a template that asks for the date is told it. A model's text side is opened from
//! the same path as its weights: a GGUF file, whose metadata hold vocabulary and template, or a Hugging Face folder.

mod bounded;
mod detokenizer;
mod gguf;
mod marks;
mod stand_in;
mod stop;
mod template;
mod tokenizer;

use std::path::{Path, PathBuf};

pub use detokenizer::{Detokenizer, Start};
pub use stand_in::stand_in;
pub use stop::StopMatcher;
pub use template::{ChatTemplate, Message};
pub use tokenizer::Tokenizer;

/// What can go wrong with a model's text files, or with a text given to them.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    #[error("cannot read {}: {source}; check that the file exists and may be read", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{}: {what}; fetch the model again, or convert it with a current converter", path.display())]
    Format { path: PathBuf, what: String },
    #[error("{}: {what} is not supported; use a model of the Llama, Mistral, Qwen or SmolLM families", path.display())]
    Unsupported { path: PathBuf, what: String },
    /// The template called `raise_exception`: it does not take these messages.
    #[error("the model's chat template refuses these messages: {0}")]
    TemplateRefused(String),
    /// The template itself is broken, does too much, or uses what the renderer lacks.
    #[error("the model's chat template failed: {0}")]
    Template(String),
    #[error("the text could not be tokenized: {0}")]
    Encode(String),
}

impl TextError {
    fn format(path: &Path, what: impl ToString) -> Self {
        Self::Format {
            path: path.to_path_buf(),
            what: what.to_string(),
        }
    }

    fn unsupported(path: &Path, what: impl ToString) -> Self {
        Self::Unsupported {
            path: path.to_path_buf(),
            what: what.to_string(),
        }
    }
}

/// The file's text, or `None` where it does not exist.
fn read_optional(path: &Path) -> Result<Option<String>, TextError> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(source) if source.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(TextError::Io {
            path: path.to_path_buf(),
            source,
        }),
    }
}

/// The file's JSON, or `None` where it does not exist.
fn read_optional_json(path: &Path) -> Result<Option<serde_json::Value>, TextError> {
    read_optional(path)?
        .map(|text| serde_json::from_str(&text).map_err(|e| TextError::format(path, format!("not valid JSON: {e}"))))
        .transpose()
}

/// The text of a special token as `tokenizer_config.json` gives it: a string, or an object with its `content`.
fn token_text(config: Option<&serde_json::Value>, key: &str) -> Option<String> {
    let value = config?.get(key)?;
    value
        .as_str()
        .or_else(|| value.get("content")?.as_str())
        .map(str::to_string)
}
