//! `sconce doctor`: what the machine offers, which models lie in the caches, and what the settings of `serve` would be.

mod machine;

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::model_files::{self, SMOLLM2};
use crate::config::{Doctor, Setting};
use crate::engine::readable;
use machine::Machine;

#[derive(Debug, Serialize)]
struct Report {
    version: &'static str,
    machine: Machine,
    /// Models that sconce fetched.
    models: Option<Cache>,
    /// Models of the hub, which other programs may have fetched.
    hub: Cache,
    settings: Vec<Line>,
}

#[derive(Debug, Serialize)]
struct Cache {
    folder: PathBuf,
    entries: Vec<Entry>,
}

#[derive(Debug, Serialize)]
struct Entry {
    name: String,
    bytes: u64,
}

/// One setting of `serve`.
#[derive(Debug, Serialize)]
struct Line {
    name: String,
    value: Option<String>,
    /// What an `auto` or unset value comes to here.
    means: Option<String>,
    origin: &'static str,
}

/// Prints the report: `settings` are those of the command line that asked for it.
///
/// # Errors
/// When standard output takes no more.
pub fn run(doctor: &Doctor, settings: &[Setting]) -> std::io::Result<()> {
    let report = Report::new(doctor, settings);
    let text = if doctor.json {
        serde_json::to_string_pretty(&report)? + "\n"
    } else {
        report.text()
    };
    std::io::stdout().write_all(text.as_bytes())
}

impl Report {
    fn new(doctor: &Doctor, settings: &[Setting]) -> Self {
        let machine = Machine::look();
        let lines = settings
            .iter()
            .filter(|setting| setting.name != "json")
            .map(|setting| Line {
                name: setting.name.clone(),
                value: setting.value.clone(),
                means: means(setting, doctor, &machine),
                origin: setting.origin.as_str(),
            });
        let hub = model_files::hub_folder();
        Self {
            version: env!("CARGO_PKG_VERSION"),
            settings: lines.collect(),
            models: model_files::models_folder().map(|folder| Cache {
                entries: gguf_files(&folder),
                folder,
            }),
            hub: Cache {
                entries: hub_models(&hub),
                folder: hub,
            },
            machine,
        }
    }

    fn text(&self) -> String {
        let machine = &self.machine;
        let cuda = if machine.built_with_cuda { "with" } else { "without" };
        let mut text = format!("sconce {}, built {cuda} CUDA\n\nMachine\n", self.version);
        // Writing to a String cannot fail.
        let mut row = |name: &str, value: &str| {
            let _ = writeln!(text, "  {name:<20}{value}");
        };
        row("CPU", machine.cpu.as_deref().unwrap_or("unknown"));
        row("cores", &machine.cores.to_string());
        row("SIMD", &or_none(machine.simd.join(" ")));
        row("memory", &optional_size(machine.memory.total));
        row("  available", &optional_size(machine.memory.available));
        if let Some(limit) = machine.memory.limit {
            row("  limit", &readable(limit));
        }
        row("GPU", &or_none(machine.gpus.join("; ")));
        text.push_str("\nModels\n");
        match &self.models {
            Some(models) => models.write(&mut text),
            None => text.push_str("  no cache folder: set SCONCE_HOME\n"),
        }
        self.hub.write(&mut text);
        text.push_str("\nSettings of serve\n");
        for line in &self.settings {
            let value = line.value.as_deref().unwrap_or("unset");
            let means = line
                .means
                .as_ref()
                .map(|means| format!(" ({means})"))
                .unwrap_or_default();
            let _ = writeln!(text, "  --{:<20}{:<12} {value}{means}", line.name, line.origin);
        }
        text
    }
}

impl Cache {
    fn write(&self, text: &mut String) {
        let _ = writeln!(
            text,
            "  {}{}",
            self.folder.display(),
            if self.entries.is_empty() { ": none" } else { "" }
        );
        for entry in &self.entries {
            let _ = writeln!(text, "    {}, {}", entry.name, readable(entry.bytes));
        }
    }
}

/// What a value that leaves the choice to sconce comes to on this machine.
fn means(setting: &Setting, doctor: &Doctor, machine: &Machine) -> Option<String> {
    let gpu = match doctor.serve.model.device {
        crate::config::Device::Auto => machine.uses_gpu(),
        crate::config::Device::Cpu => false,
        crate::config::Device::Cuda(_) => true,
    };
    let text = match (setting.name.as_str(), setting.value.as_deref()) {
        ("device", Some("auto")) => if gpu { "cuda:0" } else { "cpu" }.to_owned(),
        ("dtype", Some("auto")) => if gpu { "bf16" } else { "f32" }.to_owned(),
        ("threads", None) => machine.cores.to_string(),
        ("kv-memory", None) => format!("{} MiB", machine.memory.for_kv_cache(0) >> 20),
        ("max-model-len", None) => "the model's limit, as far as the KV cache holds it".to_owned(),
        ("model", Some(name)) if name == SMOLLM2.name => {
            let there = model_files::models_folder().is_some_and(|folder| folder.join(SMOLLM2.file).is_file());
            if there { "in the cache" } else { "not fetched yet" }.to_owned()
        }
        _ => return None,
    };
    Some(text)
}

fn gguf_files(folder: &Path) -> Vec<Entry> {
    entries(folder, |name| name.ends_with(".gguf").then(|| name.to_owned()))
}

/// The hub's cache has a folder `models--org--name` a model.
fn hub_models(folder: &Path) -> Vec<Entry> {
    entries(folder, |name| {
        name.strip_prefix("models--").map(|id| id.replacen("--", "/", 1))
    })
}

fn entries(folder: &Path, name: impl Fn(&str) -> Option<String>) -> Vec<Entry> {
    let found = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut entries: Vec<Entry> = found
        .filter_map(|entry| {
            let name = name(&entry.file_name().to_string_lossy())?;
            Some(Entry {
                name,
                bytes: model_files::size_of(&entry.path()),
            })
        })
        .collect();
    entries.sort_by(|a, b| a.name.cmp(&b.name));
    entries
}

fn or_none(text: String) -> String {
    if text.is_empty() { "none".to_owned() } else { text }
}

fn optional_size(bytes: Option<u64>) -> String {
    bytes.map_or("unknown".to_owned(), readable)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_models_with_their_sizes() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("b.gguf"), [0; 10]).unwrap();
        std::fs::write(folder.path().join("a.gguf"), [0; 20]).unwrap();
        std::fs::write(folder.path().join(".lock"), "").unwrap();
        let blobs = folder.path().join("models--org--a--b/blobs");
        std::fs::create_dir_all(&blobs).unwrap();
        std::fs::write(blobs.join("x"), [0; 30]).unwrap();
        let found = |entries: Vec<Entry>| {
            entries
                .into_iter()
                .map(|entry| (entry.name, entry.bytes))
                .collect::<Vec<_>>()
        };
        assert_eq!(
            found(gguf_files(folder.path())),
            [("a.gguf".to_owned(), 20), ("b.gguf".to_owned(), 10)]
        );
        assert_eq!(found(hub_models(folder.path())), [("org/a--b".to_owned(), 30)]);
        assert!(gguf_files(&folder.path().join("nowhere")).is_empty());
    }
}
