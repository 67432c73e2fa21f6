//! What can go wrong while a model is read: each value says what happened, to what, and what to do.

use std::path::PathBuf;

/// Why a model could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    #[error("cannot read {}: {source}; check the path and its permissions", path.display())]
    Io { path: PathBuf, source: std::io::Error },

    #[error("{} is damaged or not a model file: {reason}; fetch it again", path.display())]
    Corrupt { path: PathBuf, reason: String },

    #[error("{} lacks tensor {name}; the file is incomplete or of another architecture: fetch the whole model", path.display())]
    MissingTensor { path: PathBuf, name: String },

    #[error("{}: tensor {name} has shape {found:?} where the model's settings say {expected:?}; weights and settings are of different models", path.display())]
    WrongShape {
        path: PathBuf,
        name: String,
        expected: Vec<usize>,
        found: Vec<usize>,
    },

    #[error("{}: architecture {found} is not supported; choose a model of one of {}", path.display(), crate::config::ARCHITECTURES.join(", "))]
    UnsupportedArchitecture { path: PathBuf, found: String },

    #[error("{}: {what} is not supported; supported: {supported}", path.display())]
    Unsupported {
        path: PathBuf,
        what: String,
        supported: String,
    },

    #[error("{}: setting {key} {problem}; correct it or choose another model", path.display())]
    Setting {
        path: PathBuf,
        key: String,
        problem: String,
    },

    #[error("the GPU's kernels do not do {what}; supported: {supported}; choose the CPU or another model")]
    UnsupportedOnGpu { what: String, supported: String },

    #[error(
        "cannot compute on {device}: this build has arithmetic for {} only; choose the CPU",
        DEVICES
    )]
    UnsupportedDevice { device: String },

    #[error("{}: weights stay quantized only if they are a GGUF file's; leave out `--quantized`", path.display())]
    NotQuantized { path: PathBuf },

    #[error("cannot store weights or KV cache as {found}; choose f32, bf16 or f16")]
    UnsupportedDType { found: String },

    #[error("cannot build {what}: {source}; free memory or choose smaller settings")]
    Tensor { what: String, source: candle_core::Error },
}

/// What a model can be loaded on.
const DEVICES: &str = if cfg!(feature = "cuda") {
    "the CPU and NVIDIA GPUs"
} else {
    "the CPU"
};

/// candle's error without the backtrace that it carries where backtraces are switched on: messages are one line.
pub fn without_backtrace(error: candle_core::Error) -> candle_core::Error {
    match error {
        candle_core::Error::WithBacktrace { inner, .. } => without_backtrace(*inner),
        candle_core::Error::WithPath { inner, path } => without_backtrace(*inner).with_path(path),
        error => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_one_line() {
        let inner = Box::new(candle_core::Error::Msg("bad".into()));
        let backtrace = Box::new(std::backtrace::Backtrace::force_capture());
        let error = candle_core::Error::WithBacktrace { inner, backtrace };
        assert!(error.to_string().lines().count() > 1);
        assert_eq!(without_backtrace(error).to_string(), "bad");
    }
}
