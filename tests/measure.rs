//! `sconce loadtest` and `sconce tune` as a user runs them, against a server with the real model.
#![cfg(unix)]

mod common;

use std::{
    collections::BTreeSet,
    fs,
    path::Path,
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use common::Server;
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(60);
/// Requests that cost little.
const SMALL: [&str; 6] = [
    "--workload",
    "completion",
    "--prompt-tokens",
    "8",
    "--output-tokens",
    "4",
];

/// The program with a command for this server.
fn sconce(command: &str, server: &Server) -> Command {
    let mut program = Command::new(env!("CARGO_BIN_EXE_sconce"));
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("SCONCE_")) {
        program.env_remove(name);
    }
    program.args([command, "--url", &server.url("")]).args(SMALL);
    program
}

/// What a command that ends well prints.
fn printed(program: &mut Command) -> String {
    let Output { status, stdout, stderr } = program.output().expect("runs");
    assert!(status.success(), "{}", String::from_utf8_lossy(&stderr));
    String::from_utf8(stdout).expect("text")
}

/// What a command that is refused says in its one line.
fn complaint(program: &mut Command) -> String {
    let Output { status, stderr, .. } = program.output().expect("runs");
    assert!(!status.success());
    String::from_utf8(stderr).expect("text")
}

fn report(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).expect("a report")).expect("JSON")
}

fn settings(server: &Server) -> Value {
    server.get("/admin/batching").json().expect("JSON")
}

#[test]
fn a_load_is_sent_reported_and_compared() {
    let server = Server::start_quietly(&[]);
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name);
    let (whole, cut) = (path("whole.json"), path("cut.json"));

    let load = ["--rate", "8", "--duration", "2s", "--slo", "e2e.p99=60s", "--save-json"];
    let table = printed(sconce("loadtest", &server).args(load).arg(&whole));
    assert!(table.contains("| load") && table.contains("TTFT P50"), "{table}");
    let found = report(&whole);
    let requests = &found["runs"][0]["requests"];
    assert_eq!((&found["schema"], &found["interrupted"]), (&1.into(), &false.into()));
    assert!(
        requests["answered"].as_u64() > Some(0) && requests["failed"] == 0,
        "{requests}"
    );
    assert_eq!(requests["answered"], requests["sent"]);
    assert_eq!(found["runs"][0]["slo_kept"], true);

    is_refused(&server, &path("trace.jsonl"));
    ends_early(&server, &cut);

    let page = path("page.html");
    let mut compare = Command::new(env!("CARGO_BIN_EXE_sconce"));
    compare
        .args(["loadtest", "compare"])
        .args([&whole, &cut])
        .arg("--save-html")
        .arg(&page);
    let table = printed(&mut compare);
    assert!(table.contains("| whole ") && table.contains("| cut "), "{table}");
    let page = fs::read_to_string(&page).expect("a page");
    assert!(page.contains("<svg") && page.contains("whole") && !page.contains("src="));
}

#[test]
fn a_rubric_has_three_loads_and_a_report_that_the_page_describes() {
    let server = Server::start_quietly(&[]);
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name);
    let mut rubric = sconce("loadtest", &server);
    rubric.args([
        "--rubric",
        "--target-qps",
        "10",
        "--requests",
        "10",
        "--slo",
        "e2e.p99=60s",
    ]);
    rubric.arg("--output-dir").arg(folder.path());
    rubric.arg("--save-hdr").arg(path("all.hlog"));
    let table = printed(&mut rubric);
    let found = report(&path("report.json"));
    let runs = found["runs"].as_array().expect("loads");
    let loads: Vec<_> = runs
        .iter()
        .map(|run| {
            (
                run["label"].as_str(),
                run["offered_rate"].as_f64(),
                run["requests"]["answered"].as_u64(),
            )
        })
        .collect();
    let expected = [("50 %", 5.0), ("80 %", 8.0), ("100 %", 10.0)];
    assert_eq!(loads, expected.map(|(label, rate)| (Some(label), Some(rate), Some(10))));
    for (label, _) in expected {
        assert!(table.contains(&format!("| {label}")), "{table}");
    }
    assert!(table.contains("sent/s") && table.contains("busy"), "{table}");
    for file in ["report.html", "load-1.hlog", "load-2.hlog", "load-3.hlog"] {
        assert!(fs::metadata(path(file)).expect(file).len() > 0);
    }
    let log = fs::read_to_string(path("all.hlog")).expect("a log");
    assert!(
        log.contains("\nTag=50%-e2e,") && log.contains("\nTag=100%-e2e,"),
        "{log}"
    );
    let page = include_str!("../docs/loadtest.md");
    let mut keys = BTreeSet::new();
    add_keys(&found, &mut keys);
    for key in keys {
        let named = ["", "."].iter().any(|dot| {
            ["", "[]"]
                .iter()
                .any(|list| page.contains(&format!("`{dot}{key}{list}`")))
        });
        assert!(named, "{key} is not on the page");
    }
}

/// Adds the keys of all objects in a value.
fn add_keys(value: &Value, keys: &mut BTreeSet<String>) {
    if let Some(fields) = value.as_object() {
        keys.extend(fields.keys().cloned());
        fields.values().for_each(|field| add_keys(field, keys));
    }
    value
        .as_array()
        .into_iter()
        .flatten()
        .for_each(|item| add_keys(item, keys));
}

/// Ctrl-C ends a run with a report of what was measured.
fn ends_early(server: &Server, path: &Path) {
    let answered = || server.metric("sconce_sequences_total{outcome=\"length\"}");
    let before = answered();
    let mut endless = sconce("loadtest", server);
    endless
        .args(["--rate", "8", "--duration", "1h", "--save-json"])
        .arg(path);
    let endless = endless
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("starts");
    // What is asked before the run are a few.
    server.wait_until("it runs", LIMIT, || answered() > before + 10.0);
    let interrupt = Command::new("kill").args(["-INT", &endless.id().to_string()]).status();
    assert!(interrupt.expect("kill runs").success());
    let Output { status, stdout, .. } = endless.wait_with_output().expect("ends");
    let table = String::from_utf8(stdout).expect("text");
    assert!(status.success() && table.contains("| load"), "{status}: {table}");
    let found = report(path);
    assert_eq!(found["interrupted"], true);
    assert!(found["runs"][0]["requests"]["answered"].as_u64() > Some(0), "{found}");
}

/// Bad input is refused before any load is sent to a server that has answered all it was asked.
fn is_refused(server: &Server, trace: &Path) {
    let asked = || server.metric("sconce_http_requests_total{route=\"/v1/completions\",status=\"200\"}");
    let before = asked();
    let said = complaint(sconce("loadtest", server).args(["--rate", "0"]));
    assert!(said.contains("--rate"), "{said}");
    fs::write(trace, "{\"timestamp\": 1}\n\n{\"timestamp\": \"noon\"}\n").expect("writes");
    let said = complaint(
        sconce("loadtest", server)
            .args(["--arrivals", "trace", "--trace"])
            .arg(trace),
    );
    assert!(said.contains("trace.jsonl, line 3:"), "{said}");
    let said = complaint(sconce("loadtest", server).args(["--slo", "e2e.p99=soon"]));
    assert!(said.contains("soon"), "{said}");
    let said = complaint(sconce("loadtest", server).args(["--served-model-name", "gpt-9"]));
    assert!(said.contains("gpt-9"), "{said}");
    assert_eq!(asked(), before);
}

#[cfg(target_os = "linux")]
#[test]
fn a_tuner_that_is_ended_leaves_no_server_behind() {
    let mut tune = Command::new(env!("CARGO_BIN_EXE_sconce"));
    tune.args(["tune", "--slo", "e2e.p99=60s"]).envs(common::device());
    let mut tune = tune
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("starts");
    let began = Instant::now();
    let server = loop {
        assert!(began.elapsed() < LIMIT, "it starts no server");
        assert_eq!(
            tune.try_wait().expect("a child can be asked"),
            None,
            "it ended by itself"
        );
        if let Some(server) = child_of(tune.id()) {
            break server;
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let signal = Command::new("kill").args(["-TERM", &tune.id().to_string()]).status();
    assert!(signal.expect("kill runs").success());
    assert!(!tune.wait().expect("ends").success(), "nothing was tried");
    assert!(!Path::new(&format!("/proc/{server}")).exists());
}

/// A process that another started.
#[cfg(target_os = "linux")]
fn child_of(parent: u32) -> Option<u32> {
    let entries = fs::read_dir("/proc").expect("processes").flatten();
    let mut processes = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    processes.find(|process| {
        let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
        // After the name in brackets: the state, the parent.
        let after = stat.rsplit(')').next().unwrap_or_default();
        after.split_whitespace().nth(1) == Some(parent.to_string().as_str())
    })
}

#[test]
fn settings_are_tried_and_recommended_and_the_servers_own_come_back() {
    let server = Server::start_quietly(&["--admin", "--max-batch", "16"]);
    let before = settings(&server);
    let folder = tempfile::tempdir().expect("a folder");
    let (toml, page) = (folder.path().join("best.toml"), folder.path().join("page.html"));
    let mut tune = sconce("tune", &server);
    tune.args([
        "--slo",
        "e2e.p99=60s",
        "--rates",
        "8",
        "--duration",
        "1s",
        "--warmup",
        "0s",
    ]);
    tune.args(["--max-experiments", "3", "--save-html"])
        .arg(&page)
        .arg("--save-toml")
        .arg(&toml);
    let said = printed(&mut tune);
    assert!(said.contains("Pareto front") && said.contains("sequential"), "{said}");
    assert_eq!(settings(&server), before, "as before");
    assert!(fs::read_to_string(&page).expect("a page").contains("<svg"));

    let text = fs::read_to_string(&toml).expect("settings");
    let recommended: toml::Table = text.parse().expect("TOML");
    let tuned = Server::start_quietly(&["--admin", "--config", toml.to_str().expect("text")]);
    let shown = settings(&tuned);
    assert_eq!(
        shown["max_batch"].as_i64(),
        recommended["max-batch"].as_integer(),
        "{text}"
    );
    assert_eq!(shown["schedule"].as_str(), recommended["schedule"].as_str(), "{text}");
}
