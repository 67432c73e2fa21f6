//! A model of the hub is fetched once, whole, and found without the hub afterwards. A small server stands in for it.

use std::path::Path;
use std::process::{Command, Output};

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, Uri};
use axum::response::{IntoResponse, Response};

type Files = &'static [(&'static str, &'static str)];

const SHARDED: Files = &[
    ("config.json", "{}"),
    ("tokenizer.json", "{ }"),
    ("chat_template.jinja", "template"),
    (
        "model.safetensors.index.json",
        r#"{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}"#,
    ),
    ("a.safetensors", "the first shard"),
    ("b.safetensors", "the second shard"),
    ("pytorch_model.bin", "not needed"),
];

/// Answers as the hub does: what a repository holds, and each file, whole or from a byte on.
async fn answer(State(files): State<Files>, uri: Uri, headers: HeaderMap) -> Response {
    if uri.path() == "/api/models/org/name/revision/main" {
        let siblings: Vec<_> = files
            .iter()
            .map(|(name, _)| serde_json::json!({ "rfilename": name }))
            .collect();
        return serde_json::json!({ "siblings": siblings, "sha": "abc" })
            .to_string()
            .into_response();
    }
    let name = uri.path().strip_prefix("/org/name/resolve/main/").unwrap_or_default();
    let Some((_, text)) = files.iter().find(|(found, _)| *found == name) else {
        return StatusCode::NOT_FOUND.into_response();
    };
    let range = headers["range"].to_str().unwrap().strip_prefix("bytes=").unwrap();
    let (start, end) = range.split_once('-').unwrap();
    let start: usize = start.parse().unwrap();
    let end = end.parse().map_or(text.len(), |end: usize| end + 1);
    let content_range = format!("bytes {start}-{}/{}", end - 1, text.len());
    let headers = [
        ("x-repo-commit", "abc"),
        ("etag", name),
        ("content-range", &content_range),
    ];
    (StatusCode::PARTIAL_CONTENT, headers, text[start..end].to_owned()).into_response()
}

async fn pull(files: Files, home: &Path) -> Output {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let hub = format!("http://{}", listener.local_addr().unwrap());
    let server = tokio::spawn(axum::serve(listener, Router::new().fallback(answer).with_state(files)).into_future());
    let output = run(hub, home.to_owned()).await;
    server.abort();
    output
}

async fn run(hub: String, home: std::path::PathBuf) -> Output {
    let pull = move || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sconce"));
        command
            .args(["pull", "--model", "org/name"])
            .env("HF_HOME", home)
            .env("HF_ENDPOINT", hub);
        command
            .env("NO_PROXY", "127.0.0.1")
            .current_dir(std::env::temp_dir())
            .output()
            .unwrap()
    };
    tokio::task::spawn_blocking(pull).await.unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sharded_model_is_fetched_whole_and_once() {
    let home = tempfile::tempdir().unwrap();
    let output = pull(SHARDED, home.path()).await;
    assert!(output.status.success(), "{}", said(&output));
    let folder = String::from_utf8(output.stdout.clone()).unwrap();
    let folder = Path::new(folder.trim_end());
    for (name, text) in SHARDED {
        let found = std::fs::read_to_string(folder.join(name)).ok();
        assert_eq!(
            found.as_deref(),
            (*name != "pytorch_model.bin").then_some(*text),
            "{name}"
        );
    }
    // Port 9 answers nothing: the second time needs no hub.
    let again = run("http://127.0.0.1:9".to_owned(), home.path().to_owned()).await;
    assert_eq!(again.stdout, output.stdout, "{}", said(&again));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repository_without_safetensors_is_refused() {
    let home = tempfile::tempdir().unwrap();
    let files: Files = &[
        ("config.json", "{}"),
        ("tokenizer.json", "{ }"),
        ("pytorch_model.bin", "weights"),
    ];
    let output = pull(files, home.path()).await;
    assert_eq!(output.status.code(), Some(1));
    assert!(
        said(&output).contains("the repository has neither model.safetensors nor"),
        "{}",
        said(&output)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unreachable_hub_says_what_to_do() {
    let home = tempfile::tempdir().unwrap();
    let output = run("http://127.0.0.1:9".to_owned(), home.path().to_owned()).await;
    assert_eq!(output.status.code(), Some(1));
    let said = said(&output);
    assert!(
        said.contains("there is no folder org/name") && said.contains("By hand: put config.json"),
        "{said}"
    );
}
