//! A GGUF file's metadata, and the tokenizer built from its vocabulary (`tokenizer.ggml.*`, as the GGUF specification
//! of the ggml project names them). Tensors are not read.

use std::collections::HashMap;
use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::{Content, Value};
use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::normalizers::{NFC, Prepend, Replace, Sequence as Normalizers};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizers;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, NormalizerWrapper, PreTokenizerWrapper, SplitDelimiterBehavior};

use super::TextError;
use crate::request::TokenId;

/// Token types of the GGUF specification.
const NORMAL: i64 = 1;
const UNKNOWN: i64 = 2;
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;

/// How Llama 3 splits text; Qwen differs in its digits, and both took it from OpenAI's cl100k.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// How Mistral's Tekken vocabulary splits text.
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// A GGUF file's key-value pairs.
pub(super) struct Metadata {
    path: PathBuf,
    values: HashMap<String, Value>,
}

impl Metadata {
    pub fn open(path: &Path) -> Result<Self, TextError> {
        let file = File::open(path).map_err(|source| TextError::Io {
            path: path.to_path_buf(),
            source,
        })?;
        let content = Content::read(&mut BufReader::with_capacity(1 << 20, file))
            .map_err(sconce_models::without_backtrace)
            .map_err(|e| TextError::format(path, format!("not a readable GGUF file: {e}")))?;
        Ok(Self {
            path: path.to_path_buf(),
            values: content.metadata,
        })
    }

    pub fn string(&self, key: &str) -> Option<&str> {
        match self.values.get(key)? {
            Value::String(text) => Some(text),
            _ => None,
        }
    }

    fn bool(&self, key: &str) -> Option<bool> {
        self.values.get(key)?.to_bool().ok()
    }

    /// A token's id under `tokenizer.ggml.<name>_token_id`.
    pub fn token_id(&self, name: &str) -> Option<TokenId> {
        self.values
            .get(&format!("tokenizer.ggml.{name}_token_id"))?
            .to_u32()
            .ok()
    }

    /// The text of the token whose id stands under `tokenizer.ggml.<name>_token_id`.
    pub fn token_text(&self, name: &str) -> Option<String> {
        let id = self.token_id(name)?;
        match self
            .values
            .get("tokenizer.ggml.tokens")?
            .to_vec()
            .ok()?
            .get(id as usize)?
        {
            Value::String(text) => Some(text.clone()),
            _ => None,
        }
    }

    fn list<T>(&self, key: &str, item: impl Fn(&Value) -> Option<T>) -> Result<Vec<T>, TextError> {
        match self.values.get(key) {
            Some(Value::Array(values)) => values
                .iter()
                .map(|value| {
                    item(value).ok_or_else(|| TextError::format(&self.path, format!("`{key}` has a bad entry")))
                })
                .collect(),
            Some(_) => Err(TextError::format(&self.path, format!("`{key}` is not a list"))),
            None => Err(TextError::format(&self.path, format!("`{key}` is missing"))),
        }
    }

    fn strings(&self, key: &str) -> Result<Vec<String>, TextError> {
        self.list(key, |value| value.to_string().ok().cloned())
    }
}

/// Builds the tokenizer that the vocabulary was made with.
pub(super) fn tokenizer(metadata: &Metadata) -> Result<tokenizers::Tokenizer, TextError> {
    let path = &metadata.path;
    let tokens = metadata.strings("tokenizer.ggml.tokens")?;
    let mut tokenizer = match metadata.string("tokenizer.ggml.model") {
        Some("gpt2") => byte_level(metadata, &tokens)?,
        Some("llama") => sentencepiece(metadata, &tokens)?,
        Some(other) => return Err(TextError::unsupported(path, format!("the vocabulary type `{other}`"))),
        None => return Err(TextError::format(path, "`tokenizer.ggml.model` is missing")),
    };
    let added = added_tokens(metadata, &tokens)?;
    tokenizer.add_tokens(added).map_err(|e| TextError::format(path, e))?;
    if let Some(bos) = metadata.token_id("bos").filter(|_| adds_bos(metadata)) {
        let text = tokens
            .get(bos as usize)
            .ok_or_else(|| TextError::format(path, "`bos_token_id` is no token"))?;
        let template = TemplateProcessing::builder()
            .try_single(vec![text.clone(), "$0".to_string()])
            .map_err(|e| TextError::format(path, e))?
            .special_tokens(vec![(text.clone(), bos)])
            .build()
            .map_err(|e| TextError::format(path, e))?;
        tokenizer.with_post_processor(Some(template));
    }
    Ok(tokenizer)
}

/// Whether a raw prompt begins with the beginning-of-sequence token. Files that do not say follow their family.
fn adds_bos(metadata: &Metadata) -> bool {
    metadata.bool("tokenizer.ggml.add_bos_token").unwrap_or_else(|| {
        metadata.string("tokenizer.ggml.model") == Some("llama")
            || matches!(
                metadata.string("tokenizer.ggml.pre"),
                Some("llama-bpe" | "llama3" | "tekken")
            )
    })
}

/// What kind each token is of; empty where the file does not say.
fn token_types(metadata: &Metadata) -> Result<Vec<i64>, TextError> {
    const KEY: &str = "tokenizer.ggml.token_type";
    if !metadata.values.contains_key(KEY) {
        return Ok(Vec::new());
    }
    metadata.list(KEY, |value| {
        value
            .to_i32()
            .map(i64::from)
            .or_else(|_| value.to_u32().map(i64::from))
            .ok()
    })
}

/// The tokens that are recognised in a text before anything else is split.
fn added_tokens(metadata: &Metadata, tokens: &[String]) -> Result<Vec<AddedToken>, TextError> {
    let types = token_types(metadata)?;
    Ok(tokens
        .iter()
        .zip(types)
        .filter(|(_, kind)| matches!(*kind, UNKNOWN | CONTROL | USER_DEFINED))
        .map(|(text, kind)| AddedToken::from(text.clone(), kind != USER_DEFINED).normalized(false))
        .collect())
}

fn vocabulary(tokens: &[String]) -> Vocab {
    tokens
        .iter()
        .enumerate()
        .map(|(id, text)| (text.clone(), id as TokenId))
        .collect()
}

/// Byte-level BPE (GPT-2 and what came of it): the file holds the merges; the splitting is known by name.
fn byte_level(metadata: &Metadata, tokens: &[String]) -> Result<tokenizers::Tokenizer, TextError> {
    let path = &metadata.path;
    let merges: Merges = metadata.list("tokenizer.ggml.merges", |value| {
        let (left, right) = value.to_string().ok()?.split_once(' ')?;
        Some((left.to_string(), right.to_string()))
    })?;
    let name = metadata.string("tokenizer.ggml.pre").unwrap_or("default");
    let (pre_tokenizer, whole_words) = pre_tokenizer(name)
        .ok_or_else(|| TextError::unsupported(path, format!("the pre-tokenizer `{name}` (`tokenizer.ggml.pre`)")))?;
    let bpe = BPE::builder()
        .vocab_and_merges(vocabulary(tokens), merges)
        .ignore_merges(whole_words)
        .build()
        .map_err(|e| TextError::format(path, e))?;
    let mut tokenizer = tokenizers::Tokenizer::new(bpe);
    if matches!(name, "qwen2" | "deepseek-r1-qwen") {
        tokenizer
            .with_normalizer(Some(NFC))
            .map_err(|e| TextError::format(path, e))?;
    }
    tokenizer.with_pre_tokenizer(Some(pre_tokenizer));
    tokenizer.with_decoder(Some(ByteLevel::default()));
    Ok(tokenizer)
}

/// How the pre-tokenizer of that name splits text, and whether a word that is itself a token skips the merges.
fn pre_tokenizer(name: &str) -> Option<(PreTokenizerWrapper, bool)> {
    let gpt2 = ByteLevel::new(false, true, true);
    let split = |regex: &str| {
        let split = Split::new(
            SplitPattern::Regex(regex.to_string()),
            SplitDelimiterBehavior::Isolated,
            false,
        )
        .ok()?;
        let bytes = ByteLevel::new(false, true, false);
        Some(PreTokenizers::new(vec![split.into(), bytes.into()]).into())
    };
    Some(match name {
        "default" | "gpt-2" => (gpt2.into(), false),
        "smollm" => (
            PreTokenizers::new(vec![Digits::new(true).into(), gpt2.into()]).into(),
            false,
        ),
        "llama-bpe" | "llama3" => (split(LLAMA3)?, true),
        "tekken" => (split(TEKKEN)?, true),
        "qwen2" | "deepseek-r1-qwen" => (split(QWEN2)?, false),
        _ => return None,
    })
}

/// SentencePiece BPE with byte fallback (Llama 2, Mistral, TinyLlama): the file holds a score for each token, and the
/// merge whose result scores highest goes first (Kudo and Richardson 2018; `bpe_model.cc` of SentencePiece).
fn sentencepiece(metadata: &Metadata, tokens: &[String]) -> Result<tokenizers::Tokenizer, TextError> {
    let path = &metadata.path;
    let scores = metadata.list("tokenizer.ggml.scores", |value| value.to_f32().ok())?;
    if scores.len() != tokens.len() {
        return Err(TextError::format(
            path,
            format!("{} tokens but {} scores", tokens.len(), scores.len()),
        ));
    }
    let vocabulary = vocabulary(tokens);
    let types = token_types(metadata)?;
    // Text that spells a control token or the name of a byte is not that token.
    let is_text = |id: usize| types.get(id).is_none_or(|kind| *kind == NORMAL);
    let merges = merges_by_score(tokens, &scores, &vocabulary, is_text);
    let unknown = metadata.token_text("unknown").unwrap_or_else(|| "<unk>".to_string());
    let mut builder = BPE::builder()
        .vocab_and_merges(vocabulary, merges)
        .byte_fallback(true)
        .fuse_unk(true);
    if tokens.contains(&unknown) {
        builder = builder.unk_token(unknown);
    }
    let mut tokenizer = tokenizers::Tokenizer::new(builder.build().map_err(|e| TextError::format(path, e))?);
    let mut normalizers: Vec<NormalizerWrapper> = Vec::new();
    let adds_space = metadata.bool("tokenizer.ggml.add_space_prefix").unwrap_or(true);
    if adds_space {
        normalizers.push(Prepend::new("▁".to_string()).into());
    }
    normalizers.push(Replace::new(" ", "▁").map_err(|e| TextError::format(path, e))?.into());
    tokenizer
        .with_normalizer(Some(Normalizers::new(normalizers)))
        .map_err(|e| TextError::format(path, e))?;
    tokenizer.with_decoder(Some(
        sentencepiece_decoder(adds_space).map_err(|e| TextError::format(path, e))?,
    ));
    Ok(tokenizer)
}

/// Undoes the normalizer of [`sentencepiece`].
fn sentencepiece_decoder(strips_space: bool) -> tokenizers::Result<tokenizers::decoders::sequence::Sequence> {
    use tokenizers::decoders::{byte_fallback::ByteFallback, fuse::Fuse, sequence::Sequence, strip::Strip};
    let mut decoders = vec![
        Replace::new("▁", " ")?.into(),
        ByteFallback::new().into(),
        Fuse::new().into(),
    ];
    if strips_space {
        decoders.push(Strip::new(' ', 1, 0).into());
    }
    Ok(Sequence::new(decoders))
}

/// Every way to make a token that `is_text` of two others, the highest-scoring token first, the lower id on a tie.
fn merges_by_score(tokens: &[String], scores: &[f32], vocabulary: &Vocab, is_text: impl Fn(usize) -> bool) -> Merges {
    let mut order: Vec<usize> = (0..tokens.len()).filter(|&id| is_text(id)).collect();
    order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]).then(a.cmp(b)));
    let mut merges = Merges::new();
    for id in order {
        let token = &tokens[id];
        for (cut, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(cut);
            if vocabulary.contains_key(left) && vocabulary.contains_key(right) {
                merges.push((left.to_string(), right.to_string()));
            }
        }
    }
    merges
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

    fn split(name: &str, text: &str) -> Vec<String> {
        let mut pieces = PreTokenizedString::from(text);
        pre_tokenizer(name).unwrap().0.pre_tokenize(&mut pieces).unwrap();
        let pieces = pieces.get_splits(OffsetReferential::Original, OffsetType::Byte);
        pieces
            .into_iter()
            .map(|(_, (start, end), _)| text[start..end].to_string())
            .collect()
    }

    #[test]
    fn no_merge_makes_a_control_token() {
        let tokens = ["</s>", "<", "/", "s", ">", "</", "s>"].map(String::from);
        let scores = [0.0, -1.0, -1.0, -1.0, -1.0, -2.0, -3.0];
        let merges = merges_by_score(&tokens, &scores, &vocabulary(&tokens), |id| id > 0);
        let pair = |left: &str, right: &str| (left.to_string(), right.to_string());
        assert_eq!(merges, [pair("<", "/"), pair("s", ">")]);
    }

    #[test]
    fn each_family_splits_digits_and_words_its_own_way() {
        let text = "It's 12345 DON'T\n\n ok";
        assert_eq!(
            split("gpt-2", text),
            ["It", "'s", " 12345", " DON", "'", "T", "\n\n", " ok"]
        );
        assert_eq!(
            split("smollm", text),
            [
                "It", "'s", " ", "1", "2", "3", "4", "5", " DON", "'", "T", "\n\n", " ok"
            ]
        );
        assert_eq!(
            split("llama-bpe", text),
            ["It", "'s", " ", "123", "45", " DON", "'T", "\n\n", " ok"]
        );
        assert_eq!(
            split("qwen2", text),
            ["It", "'s", " ", "1", "2", "3", "4", "5", " DON", "'T", "\n\n", " ok"]
        );
        assert_eq!(split("tekken", "HelloWorld/x"), ["Hello", "World", "/x"]);
        assert!(pre_tokenizer("something-new").is_none());
    }
}
