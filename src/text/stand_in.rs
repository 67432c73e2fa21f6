//! Text for a model without any: where weights are random, all that counts is how many tokens there are.

use std::path::Path;

use serde_json::json;

use super::tokenizer::byte_characters;
use super::{ChatTemplate, TextError, Tokenizer};

/// A vocabulary of `size` tokens, the first 256 of which are the bytes and the others numbered words, with a chat template
/// that puts messages one below the other. A text has as many tokens as bytes, and no token ends an answer.
///
/// # Errors
/// Where `size` is too small for the bytes.
pub fn stand_in(size: usize) -> Result<(Tokenizer, ChatTemplate), TextError> {
    let path = Path::new("the stand-in vocabulary");
    if size < 256 {
        return Err(TextError::unsupported(
            path,
            format!("a vocabulary of {size} tokens, fewer than there are bytes"),
        ));
    }
    let mut vocabulary: serde_json::Map<_, _> = byte_characters()
        .map(|(character, byte)| (character.to_string(), byte.into()))
        .collect();
    // `Ġ` is a space in this alphabet.
    vocabulary.extend((256..size).map(|token| (format!("Ġ{token}"), token.into())));
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let tokenizer = json!({
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    });
    let tokenizer =
        tokenizers::Tokenizer::from_bytes(tokenizer.to_string()).map_err(|error| TextError::format(path, error))?;
    let template = "{% for message in messages %}{{ message.content }}\n{% endfor %}";
    Ok((
        Tokenizer::new(path, tokenizer, Vec::new())?,
        ChatTemplate::new(template.into(), String::new(), String::new())?,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_byte_is_a_token_and_every_token_has_text() {
        let (tokenizer, _) = stand_in(300).unwrap();
        let tokens = tokenizer.encode("a é", true).unwrap();
        assert_eq!(tokens, [0x61, 0x20, 0xC3, 0xA9]);
        assert_eq!(tokenizer.decode(&tokens, false), "a é");
        assert_eq!(tokenizer.decode(&[299], false), " 299");
        assert_eq!((tokenizer.vocab_size(), tokenizer.end_tokens()), (300, [].as_slice()));
        assert!(stand_in(255).is_err());
    }
}
