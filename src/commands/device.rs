//! From the settings' device, type and threads to what computes.

use candle_core::{DType, Device};
use sconce_models::without_backtrace;

use crate::config;

/// The device cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("cannot open {device}: {source}; `--device cpu` needs no GPU")]
pub struct DeviceError {
    device: config::Device,
    source: candle_core::Error,
}

/// Opens the device; `auto` is the first GPU, where this build and machine have one.
pub fn open(device: config::Device) -> Result<Device, DeviceError> {
    let failed = |source| DeviceError {
        device,
        source: without_backtrace(source),
    };
    match device {
        config::Device::Cpu => Ok(Device::Cpu),
        // A stream of its own: the engine's thread is not the one that loads the model.
        config::Device::Cuda(ordinal) => Device::new_cuda_with_stream(ordinal).map_err(failed),
        config::Device::Auto if !candle_core::utils::cuda_is_available() => Ok(Device::Cpu),
        config::Device::Auto => Ok(Device::new_cuda_with_stream(0).unwrap_or_else(|error| {
            let error = sconce_models::without_backtrace(error);
            tracing::warn!(%error, "no GPU can be opened; the CPU computes");
            Device::Cpu
        })),
    }
}

/// The type to compute in, `None` being the device's own.
pub fn dtype(dtype: config::Dtype) -> Option<DType> {
    match dtype {
        config::Dtype::Auto => None,
        config::Dtype::F32 => Some(DType::F32),
        config::Dtype::Bf16 => Some(DType::BF16),
        config::Dtype::F16 => Some(DType::F16),
    }
}

/// Sets how many threads compute, which can be done once in a process. `None` takes one a core.
pub fn set_threads(threads: Option<usize>) {
    if let Some(threads) = threads
        && rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build_global()
            .is_err()
    {
        tracing::warn!("the threads were already started; --threads has no effect");
    }
}
