//! How long a text is in the server's tokens: asked of the server, or of a local `tokenizer.json`.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::json;

use crate::client::Target;

/// A source of token counts.
pub enum Tokens {
    /// The server's `/tokenize`.
    Server,
    Local(Box<tokenizers::Tokenizer>),
    /// Neither is there: a common word counts as a token.
    Unknown,
}

/// Why a local tokenizer cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("cannot read the tokenizer {}: {message}", path.display())]
pub struct TokenizerError {
    path: PathBuf,
    message: String,
}

#[derive(Deserialize)]
struct Tokenized {
    tokens: Vec<u32>,
}

impl Tokens {
    /// Takes the local file where one is given, else the server's route where it answers.
    ///
    /// # Errors
    /// [`TokenizerError`] where the given file is not a tokenizer.
    pub async fn find(file: Option<&Path>, target: &Target, model: &str) -> Result<Self, TokenizerError> {
        if let Some(path) = file {
            let tokenizer = tokenizers::Tokenizer::from_file(path).map_err(|error| TokenizerError {
                path: path.into(),
                message: error.to_string(),
            })?;
            return Ok(Tokens::Local(Box::new(tokenizer)));
        }
        match from_server(target, model, " time").await {
            Some(tokens) if !tokens.is_empty() => Ok(Tokens::Server),
            _ => Ok(Tokens::Unknown),
        }
    }

    /// The text's tokens without special ones; `None` where nobody can tell.
    pub async fn encode(&self, target: &Target, model: &str, text: &str) -> Option<Vec<u32>> {
        match self {
            Tokens::Server => from_server(target, model, text).await,
            Tokens::Local(tokenizer) => Some(tokenizer.encode(text, false).ok()?.get_ids().to_vec()),
            Tokens::Unknown => None,
        }
    }

    /// How reports name the source.
    pub fn describe(&self) -> &'static str {
        match self {
            Tokens::Server => "the server's /tokenize",
            Tokens::Local(_) => "a local tokenizer",
            Tokens::Unknown => "an estimate of one token a word",
        }
    }
}

/// `prompt` is the field of vLLM and sconce, `content` that of llama.cpp.
async fn from_server(target: &Target, model: &str, text: &str) -> Option<Vec<u32>> {
    for body in [
        json!({"model": model, "prompt": text, "add_special_tokens": false}),
        json!({"content": text, "add_special": false}),
    ] {
        let response = target.post("/tokenize", &body).await.ok()?;
        if let Ok(Tokenized { tokens }) = response.json().await
            && !tokens.is_empty()
        {
            return Some(tokens);
        }
    }
    None
}
