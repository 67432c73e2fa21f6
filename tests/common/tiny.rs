//! A model of two layers with random weights, small enough that a request costs microseconds.

use std::{fs, path::Path};

use serde_json::{Map, Value, json};
use tempfile::TempDir;

/// Tokens that the model knows. The tokenizer knows more, as those of some published models do.
pub const VOCABULARY: u64 = 67;

/// The model in a folder of its own. Token `i` is the character after `i` others from `!` on; the last one the model
/// knows is `c`. Its chat template puts contents one behind the other and refuses the content `NO`.
pub fn model() -> TempDir {
    let folder = TempDir::new().expect("a temporary folder");
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tests/fixtures/llama-tied");
    for name in ["config.json", "model.safetensors"] {
        fs::copy(fixtures.join(name), folder.path().join(name)).expect("copies");
    }
    let characters = (b'!'..=b'q').enumerate();
    let vocabulary: Map<String, Value> = characters
        .map(|(id, byte)| (char::from(byte).to_string(), json!(id)))
        .collect();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocabulary, "merges": []},
    });
    let template = "{% for message in messages %}{% if message.content == 'NO' %}\
        {{ raise_exception('this model does not hear NO') }}{% endif %}{{ message.content }}{% endfor %}";
    let write = |name: &str, text: String| fs::write(folder.path().join(name), text).expect("writes");
    write("tokenizer.json", tokenizer.to_string());
    write("tokenizer_config.json", json!({"chat_template": template}).to_string());
    folder
}

/// The folder as an argument.
pub fn path(folder: &TempDir) -> &str {
    folder.path().to_str().expect("a path in UTF-8")
}
