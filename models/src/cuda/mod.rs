//! Arithmetic on an NVIDIA GPU: matrix products by cuBLAS through candle's device, all else by the kernels in `kernels/`.
//!
//! What needs no GPU (how a step is told to the device) is compiled for tests without the `cuda` feature too, and so are
//! the kernels' own tests, which run the kernels on the host.

#[cfg(feature = "cuda")]
mod blas;
#[cfg(feature = "cuda")]
mod decoder;
mod draw;
#[cfg(feature = "cuda")]
mod kernels;
mod metadata;
#[cfg(feature = "cuda")]
mod quantized;
#[cfg(feature = "cuda")]
mod weights;
#[cfg(feature = "cuda")]
mod workspace;

#[cfg(test)]
mod tests;

#[cfg(feature = "cuda")]
pub(crate) use decoder::CudaDecoder;
#[cfg(feature = "cuda")]
pub(crate) use workspace::{Sampled, Workspace};

/// See [`crate::pci_bus_id`].
#[cfg(feature = "cuda")]
pub(crate) fn pci_bus_id(ordinal: usize) -> Option<String> {
    use candle_core::cuda_backend::cudarc::driver::{result, sys::CUdevice_attribute::*};

    result::init().ok()?;
    let device = result::device::get(i32::try_from(ordinal).ok()?).ok()?;
    // SAFETY: the device is one that the driver named.
    let part = |attribute| unsafe { result::device::get_attribute(device, attribute) }.ok();
    let domain = part(CU_DEVICE_ATTRIBUTE_PCI_DOMAIN_ID)?;
    let bus = part(CU_DEVICE_ATTRIBUTE_PCI_BUS_ID)?;
    let slot = part(CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID)?;
    Some(format!("{domain:08x}:{bus:02x}:{slot:02x}.0"))
}

/// An error of the driver or of cuBLAS as candle's.
#[cfg(feature = "cuda")]
fn device_error(error: impl std::error::Error + Send + Sync + 'static) -> candle_core::Error {
    candle_core::Error::Cuda(Box::new(error))
}
