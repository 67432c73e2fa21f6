//! With the `cuda` feature: compiles the kernels with nvcc, for the compute capability in `CUDA_COMPUTE_CAP` (Hopper's
//! where that is not set) and, as PTX, for any GPU from Ampere on. `scripts/cuda-toolkit` installs nvcc.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, thread};

const KERNELS: [&str; 5] = ["elementwise", "rope", "attention_decode", "attention_prefill", "sample"];

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    println!("cargo::rerun-if-changed=kernels");
    for variable in ["CUDA_COMPUTE_CAP", "CUDA_HOME", "NVCC_CCBIN"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    let capability = env::var("CUDA_COMPUTE_CAP").unwrap_or("90".into());
    let number: u32 = capability.trim_end_matches(char::is_alphabetic).parse().unwrap_or(0);
    assert!(
        number >= 80,
        "CUDA_COMPUTE_CAP is {capability}: the kernels need a GPU of compute capability 8.0 (Ampere) or later, written 80"
    );
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    thread::scope(|scope| {
        for kernel in KERNELS {
            let (out, capability) = (&out, &capability);
            scope.spawn(move || compile(kernel, capability, out));
        }
    });
}

fn compile(kernel: &str, capability: &str, out: &Path) {
    let nvcc = env::var_os("CUDA_HOME").map(|home| Path::new(&home).join("bin/nvcc"));
    let nvcc = nvcc.filter(|nvcc| nvcc.exists()).unwrap_or("nvcc".into());
    let output = Command::new(&nvcc)
        .args(["-fatbin", "-std=c++17", "-O3"])
        .arg(format!("-gencode=arch=compute_{capability},code=sm_{capability}"))
        .arg("-gencode=arch=compute_80,code=compute_80")
        .arg("-o")
        .arg(out.join(kernel).with_extension("fatbin"))
        .arg(Path::new("kernels").join(kernel).with_extension("cu"))
        .output()
        .unwrap_or_else(|error| {
            panic!(
                "cannot run {}: {error}; eval \"$(scripts/cuda-toolkit)\" installs it",
                nvcc.display()
            )
        });
    assert!(
        output.status.success(),
        "{kernel}.cu does not compile:\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
}
