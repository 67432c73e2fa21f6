//! What can go wrong with a step, sorted by what is to be done about it.

use std::any::Any;

use sconce_models::without_backtrace;

/// Why a forward pass gave no logits. Nothing of it counts: its rows are computed again in place, or end.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StepError {
    /// A smaller step may fit.
    #[error("the device is out of memory: {0}")]
    OutOfMemory(String),
    /// No step will run any more.
    #[error("the device was lost: {0}")]
    DeviceLost(String),
    /// The forward pass panicked.
    #[error("the forward pass panicked: {0}")]
    Panicked(String),
    /// Some row's doing, as far as one can tell.
    #[error("{0}")]
    Failed(String),
}

/// The CUDA driver's words (`cuda.h`, `CUresult`) for errors after which its context answers nothing any more.
const LOST: [&str; 15] = [
    "CUDA_ERROR_ASSERT",
    "CUDA_ERROR_CONTEXT_IS_DESTROYED",
    "CUDA_ERROR_DEVICE_UNAVAILABLE",
    "CUDA_ERROR_ECC_UNCORRECTABLE",
    "CUDA_ERROR_EXTERNAL_DEVICE",
    "CUDA_ERROR_HARDWARE_STACK_ERROR",
    "CUDA_ERROR_ILLEGAL_ADDRESS",
    "CUDA_ERROR_ILLEGAL_INSTRUCTION",
    "CUDA_ERROR_INVALID_ADDRESS_SPACE",
    "CUDA_ERROR_INVALID_PC",
    "CUDA_ERROR_LAUNCH_FAILED",
    "CUDA_ERROR_LAUNCH_TIMEOUT",
    "CUDA_ERROR_MISALIGNED_ADDRESS",
    "CUDA_ERROR_NO_DEVICE",
    "CUDA_ERROR_NVLINK_UNCORRECTABLE",
];

impl From<candle_core::Error> for StepError {
    fn from(error: candle_core::Error) -> Self {
        // candle boxes the driver's error without its type. On the CPU memory that cannot be had ends the process.
        let message = without_backtrace(error).to_string();
        if message.contains("CUDA_ERROR_OUT_OF_MEMORY") {
            Self::OutOfMemory(message)
        } else if LOST.iter().any(|name| message.contains(name)) {
            Self::DeviceLost(message)
        } else {
            Self::Failed(message)
        }
    }
}

/// What a panic said.
pub fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| text.to_string());
    text.or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "without a message".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_drivers_error_is_known_by_its_name() {
        let driver = |name: &str| {
            let inner = candle_core::Error::Cuda(format!("DriverError({name}, \"so\")").into());
            StepError::from(inner.bt())
        };
        assert!(matches!(driver("CUDA_ERROR_OUT_OF_MEMORY"), StepError::OutOfMemory(_)));
        assert!(matches!(driver("CUDA_ERROR_ILLEGAL_ADDRESS"), StepError::DeviceLost(_)));
        assert!(matches!(driver("CUDA_ERROR_INVALID_VALUE"), StepError::Failed(_)));
        assert_eq!(
            StepError::from(candle_core::Error::Msg("bad".into())),
            StepError::Failed("bad".into())
        );
    }
}
