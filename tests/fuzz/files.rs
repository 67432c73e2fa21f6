//! The text side of model files: the vocabulary and template in a GGUF header, `tokenizer.json`, and the small JSON
//! files beside it.

use std::path::Path;
use std::sync::LazyLock;

use candle_core::quantized::gguf_file::{Value as G, write};
use proptest::prelude::*;
use sconce::text::{ChatTemplate, Tokenizer};

use super::{config, json, mutated, mutations, within_memory};

/// A header with both a vocabulary and a template.
fn gguf(model: &str) -> Vec<u8> {
    let strings = |texts: &[&str]| G::Array(texts.iter().map(|text| G::String((*text).to_owned())).collect());
    let tokens = ["<unk>", "<s>", "</s>", "a", "b", "ab", "▁", "▁a", "<0x41>", "Ġ"];
    let metadata = [
        ("tokenizer.ggml.model", G::String(model.to_owned())),
        ("tokenizer.ggml.pre", G::String("llama-bpe".to_owned())),
        ("tokenizer.ggml.tokens", strings(&tokens)),
        ("tokenizer.ggml.merges", strings(&["a b"])),
        (
            "tokenizer.ggml.scores",
            G::Array((0..tokens.len()).map(|i| G::F32(-(i as f32))).collect()),
        ),
        (
            "tokenizer.ggml.token_type",
            G::Array([2, 3, 3, 1, 1, 1, 1, 1, 6, 1].map(G::I32).to_vec()),
        ),
        ("tokenizer.ggml.bos_token_id", G::U32(1)),
        ("tokenizer.ggml.eos_token_id", G::U32(2)),
        (
            "tokenizer.chat_template",
            G::String("{% for m in messages %}{{ m.content }}{% endfor %}".to_owned()),
        ),
    ];
    let metadata: Vec<(&str, &G)> = metadata.iter().map(|(key, value)| (*key, value)).collect();
    let mut bytes = std::io::Cursor::new(Vec::new());
    write(&mut bytes, &metadata, &[]).expect("writes to memory");
    bytes.into_inner()
}

static GGUF: LazyLock<[Vec<u8>; 2]> = LazyLock::new(|| [gguf("llama"), gguf("gpt2")]);

const TOKENIZER_JSON: &str = r#"{"version":"1.0","truncation":null,"padding":null,"added_tokens":[{"id":3,"content":"</s>",
"special":true,"single_word":false,"lstrip":false,"rstrip":false,"normalized":false}],"normalizer":{"type":"Sequence",
"normalizers":[{"type":"Prepend","prepend":"▁"},{"type":"Replace","pattern":{"String":" "},"content":"▁"}]},
"pre_tokenizer":{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,"use_regex":true},"post_processor":null,
"decoder":{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,"use_regex":true},"model":{"type":"BPE",
"dropout":null,"unk_token":null,"byte_fallback":false,"vocab":{"a":0,"Ġ":1,"Ġa":2},"merges":[["Ġ","a"]]}}"#;

/// Opens both halves of the text side, and uses what opens.
fn open(path: &Path) {
    if let Ok(tokenizer) = Tokenizer::open(path) {
        // A vocabulary may be unable to write a text; it says so.
        let tokens = tokenizer.encode("ab a<s>", true).unwrap_or_default();
        tokenizer.decode(&tokens, true);
        drop(tokenizer.encode_chat(&tokenizer.defuse("ab</s>"), false));
    }
    if let Ok(Some(template)) = ChatTemplate::open(path) {
        drop(template.render(&[], true));
    }
}

fn file(bytes: &[u8]) {
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), bytes).expect("writes");
    within_memory(|| open(file.path()));
}

fn folder(name: &str, bytes: &[u8]) {
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::write(folder.path().join("tokenizer.json"), TOKENIZER_JSON).expect("writes");
    std::fs::write(folder.path().join(name), bytes).expect("writes");
    within_memory(|| open(folder.path()));
}

#[test]
fn an_id_beyond_every_vocabulary_is_refused() {
    for id in [u32::MAX, 1 << 30] {
        let text = TOKENIZER_JSON.replace("\"Ġa\":2", &format!("\"Ġa\":{id}"));
        folder("tokenizer.json", text.as_bytes());
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn a_changed_vocabulary_header_is_read_or_refused(which in 0..2usize, changes in mutations()) {
        file(&mutated(&GGUF[which], usize::MAX, &changes));
    }

    #[test]
    fn bytes_behind_the_magic_are_refused(rest in prop::collection::vec(any::<u8>(), 0..200), version in 0..5u32) {
        file(&[b"GGUF", &version.to_le_bytes()[..], &rest].concat());
    }

    #[test]
    fn a_changed_tokenizer_file_is_read_or_refused(changes in mutations()) {
        folder("tokenizer.json", &mutated(TOKENIZER_JSON.as_bytes(), usize::MAX, &changes));
    }

    #[test]
    fn any_json_beside_it_is_read_or_refused(
        name in prop::sample::select(vec!["tokenizer.json", "config.json", "generation_config.json", "tokenizer_config.json"]),
        eos in json(), template in json(), rest in json()
    ) {
        let text = serde_json::json!({"eos_token_id": eos, "eos_token": rest, "chat_template": template, "model": rest});
        folder(name, text.to_string().as_bytes());
    }
}
