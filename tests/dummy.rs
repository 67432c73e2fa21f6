//! A server with random weights: any shape can be measured without its weights.

mod common;

use std::process::Command;

use common::Server;
use serde_json::json;

#[test]
fn a_shape_is_served_without_weights() {
    let folder = tempfile::tempdir().unwrap();
    let shape = json!({
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "vocab_size": 400, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 256,
    });
    std::fs::write(folder.path().join("config.json"), shape.to_string()).unwrap();
    let path = folder.path().to_str().unwrap();
    let server = Server::start(&[
        "--load-format",
        "dummy",
        "--model",
        path,
        "--served-model-name",
        "shape",
    ]);
    let body = json!({"model": "shape", "prompt": [1, 2, 399], "max_tokens": 7, "temperature": 0});
    let answer = server.ask("/v1/completions", &body);
    assert_eq!(answer["usage"]["prompt_tokens"], 3);
    assert_eq!(answer["usage"]["completion_tokens"], 7);
    assert_eq!(server.ask("/v1/completions", &body)["choices"], answer["choices"]);
    let body = json!({"model": "shape", "messages": [{"role": "user", "content": "abcd"}], "max_tokens": 3});
    // The stand-in template ends each message with a line break.
    assert_eq!(server.ask("/v1/chat/completions", &body)["usage"]["prompt_tokens"], 5);
}

#[test]
fn random_weights_are_not_quantized() {
    for command in ["serve", "bench"] {
        let output = Command::new(env!("CARGO_BIN_EXE_sconce"))
            .args([command, "--load-format", "dummy", "--quantized", "--model"])
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/models/shapes/Llama-3.2-1B"))
            .args(if command == "serve" {
                vec!["--port", "0"]
            } else {
                Vec::new()
            })
            .output()
            .expect("runs");
        assert!(!output.status.success());
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(error.contains("leave out `--quantized`"), "{error}");
    }
}
