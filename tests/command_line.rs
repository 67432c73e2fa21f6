//! The program's other commands, and what it says when it cannot start.

use std::{fs, net::TcpListener, process::Command};

/// Runs the program and gives its success, standard output and standard error.
fn sconce(arguments: &[&str]) -> (bool, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_sconce")).args(arguments).output().expect("the program runs");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("text");
    (output.status.success(), text(output.stdout), text(output.stderr))
}

/// Expects failure with one line on standard error that has all of `parts`.
fn fails(arguments: &[&str], parts: &[&str]) {
    let (success, _, error) = sconce(arguments);
    assert!(!success, "{arguments:?} succeeded");
    let lines: Vec<_> = error.lines().filter(|line| !line.contains("INFO")).collect();
    assert_eq!(lines.len(), 1, "{arguments:?} printed:\n{error}");
    assert!(parts.iter().all(|part| lines[0].contains(part)), "{arguments:?} printed {}", lines[0]);
}

#[test]
fn what_cannot_be_served_is_said_in_one_line() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name).to_str().expect("text").to_owned();
    fails(&["serve", "--port", "0", "--model", &path("absent.gguf")], &["absent.gguf"]);

    fs::write(path("corrupt.gguf"), b"GGUF\x03\0\0\0 and then nonsense").expect("writes");
    fails(&["serve", "--port", "0", "--model", &path("corrupt.gguf")], &["corrupt.gguf"]);

    let other = path("other");
    fs::create_dir(&other).expect("a folder");
    fs::write(format!("{other}/config.json"), r#"{"architectures": ["MambaForCausalLM"], "model_type": "mamba"}"#)
        .expect("writes");
    fails(&["serve", "--port", "0", "--model", &other], &["mamba"]);

    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = taken.local_addr().expect("an address").port().to_string();
    fails(&["serve", "--port", &port], &[&port]);
}

#[test]
fn settings_that_cannot_work_together_are_refused() {
    fails(&["serve", "--port", "0", "--step-tokens", "50"], &["step", "50", "100"]);
    fails(&["serve", "--port", "0", "--kv-memory", "1MiB", "--max-model-len", "512"], &["512", "kv-memory"]);
    fails(&["serve", "--port", "0", "--max-model-len", "100000"], &["100000", "8192"]);
}

#[test]
fn a_setting_comes_from_the_flag_the_variable_or_the_file() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("sconce.toml");
    fs::write(&file, "max-batch = 7\nbatch-window = \"3ms\"\n").expect("writes");
    let doctor = |variable: Option<&str>, flags: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sconce"));
        command.args(["doctor", "--json", "--config"]).arg(&file).args(flags);
        if let Some(value) = variable {
            command.env("SCONCE_MAX_BATCH", value);
        }
        String::from_utf8(command.output().expect("runs").stdout).expect("text")
    };
    let max_batch = |report: &str| {
        let report: serde_json::Value = serde_json::from_str(report).expect("JSON");
        let settings = report["settings"].as_array().expect("settings");
        let setting = settings.iter().find(|setting| setting["name"] == "max-batch").expect("max-batch");
        (setting["value"].as_str().expect("a value").to_owned(), setting["source"].as_str().expect("a source").to_owned())
    };
    assert_eq!(max_batch(&doctor(None, &[])), ("7".into(), "file".into()));
    assert_eq!(max_batch(&doctor(Some("8"), &[])), ("8".into(), "environment".into()));
    assert_eq!(max_batch(&doctor(Some("8"), &["--max-batch", "9"])), ("9".into(), "flag".into()));
}
