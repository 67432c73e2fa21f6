//! What the machine offers, as far as it tells. A fact that cannot be read is left out rather than guessed.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde::Serialize;

use crate::engine::Memory;

/// The machine and what this build can use of it.
#[derive(Debug, Serialize)]
pub struct Machine {
    pub cpu: Option<String>,
    /// Cores that this process may use.
    pub cores: usize,
    /// The instruction sets that speed models up.
    pub simd: Vec<&'static str>,
    pub memory: Memory,
    /// One line a GPU, as its driver describes it.
    pub gpus: Vec<String>,
    /// Can this build use a GPU?
    pub built_with_cuda: bool,
}

impl Machine {
    /// Looks around.
    pub fn look() -> Self {
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        Self {
            cpu: field(&cpuinfo, "model name").map(str::to_owned),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            simd: simd(field(&cpuinfo, "flags").unwrap_or_default()),
            memory: Memory::look(),
            gpus: gpus(Path::new("/dev")),
            built_with_cuda: candle_core::utils::cuda_is_available(),
        }
    }

    /// Would `--device auto` take a GPU?
    pub fn uses_gpu(&self) -> bool {
        self.built_with_cuda && !self.gpus.is_empty()
    }
}

/// The value after `name` and a colon, in the first line that begins so.
fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let mut pairs = text.lines().filter_map(|line| line.split_once(':'));
    pairs
        .find(|(found, _)| found.trim() == name)
        .map(|(_, value)| value.trim())
}

#[cfg(target_arch = "x86_64")]
fn simd(flags: &str) -> Vec<&'static str> {
    let detected = [
        ("avx2", std::arch::is_x86_feature_detected!("avx2")),
        ("fma", std::arch::is_x86_feature_detected!("fma")),
        ("f16c", std::arch::is_x86_feature_detected!("f16c")),
        ("avx512f", std::arch::is_x86_feature_detected!("avx512f")),
        ("avx512vnni", std::arch::is_x86_feature_detected!("avx512vnni")),
        ("avx512bf16", std::arch::is_x86_feature_detected!("avx512bf16")),
        // The standard library does not tell of AMX yet; the kernel does.
        ("amx_bf16", flags.split(' ').any(|flag| flag == "amx_bf16")),
        ("amx_int8", flags.split(' ').any(|flag| flag == "amx_int8")),
    ];
    detected
        .into_iter()
        .filter(|(_, there)| *there)
        .map(|(name, _)| name)
        .collect()
}

#[cfg(target_arch = "aarch64")]
fn simd(_flags: &str) -> Vec<&'static str> {
    let detected = [
        ("neon", std::arch::is_aarch64_feature_detected!("neon")),
        ("bf16", std::arch::is_aarch64_feature_detected!("bf16")),
        ("sve", std::arch::is_aarch64_feature_detected!("sve")),
    ];
    detected
        .into_iter()
        .filter(|(_, there)| *there)
        .map(|(name, _)| name)
        .collect()
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn simd(_flags: &str) -> Vec<&'static str> {
    Vec::new()
}

/// The driver's own list, else its device files in `dev`.
fn gpus(dev: &Path) -> Vec<String> {
    let devices = gpu_devices(dev);
    if devices.is_empty() {
        return Vec::new();
    }
    let listed = Command::new("nvidia-smi").arg("-L").output();
    let listed = listed.ok().filter(|output| output.status.success());
    let lines: Vec<String> = listed
        .map(|output| {
            String::from_utf8_lossy(&output.stdout)
                .lines()
                .map(|line| line.trim().to_owned())
                .collect()
        })
        .unwrap_or_default();
    if lines.is_empty() {
        devices.iter().map(|path| path.display().to_string()).collect()
    } else {
        lines
    }
}

/// `nvidia0`, `nvidia1` and so on; the driver's control files have no number.
fn gpu_devices(dev: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dev).into_iter().flatten().flatten();
    let is_gpu = |path: &PathBuf| {
        let name = path
            .file_name()
            .map(|name| name.to_string_lossy().into_owned())
            .unwrap_or_default();
        name.strip_prefix("nvidia")
            .is_some_and(|number| number.parse::<usize>().is_ok())
    };
    let mut devices: Vec<PathBuf> = entries.map(|entry| entry.path()).filter(is_gpu).collect();
    devices.sort();
    devices
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_kernels_table() {
        assert_eq!(
            field("processor\t: 0\nmodel name\t: Some CPU: fast\n", "model name"),
            Some("Some CPU: fast")
        );
    }

    #[test]
    fn counts_only_numbered_devices() {
        let dev = tempfile::tempdir().unwrap();
        for name in ["nvidia1", "nvidia0", "nvidiactl", "nvidia-uvm", "null"] {
            std::fs::write(dev.path().join(name), "").unwrap();
        }
        assert_eq!(
            gpu_devices(dev.path()),
            [dev.path().join("nvidia0"), dev.path().join("nvidia1")]
        );
        assert_eq!(gpu_devices(Path::new("/nowhere")), [""; 0].map(PathBuf::from));
    }
}
