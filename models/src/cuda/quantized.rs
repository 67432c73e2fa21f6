//! Products with weight matrices that stay quantized, by candle's kernels.
//!
//! candle allocates what such a product gives, so a step with one runs launch by launch and not as a CUDA graph.

use std::sync::Arc;

use candle_core::cuda_backend::cudarc::driver::{CudaStream, result::memcpy_dtod_async};
use candle_core::quantized::QTensor;
use candle_core::{DType, Device, Result, Tensor};

use super::device_error;
use super::kernels::Address;
use super::weights::address;

/// A weight matrix `[outputs, inputs]` in blocks of quantized numbers.
pub struct Quantized {
    /// Its rows, in runs that may differ in type.
    parts: Vec<QTensor>,
    inputs: usize,
}

/// What products with quantized matrices need to know of their activations.
pub struct Activations<'a> {
    pub dtype: DType,
    pub device: &'a Device,
    pub stream: &'a Arc<CudaStream>,
}

impl Quantized {
    pub fn new(parts: Vec<QTensor>, inputs: usize) -> Self {
        Self { parts, inputs }
    }

    /// `out = x W^T`: `[rows, outputs]` from `[rows, inputs]`; `out` is of the activations' type, or in float32.
    ///
    /// # Safety
    /// `x` and `out` are addresses of this device that hold so much until the stream has come past the product.
    pub unsafe fn multiply(
        &self,
        of: &Activations,
        rows: usize,
        x: Address,
        out: Address,
        float_out: bool,
    ) -> Result<()> {
        if rows == 0 {
            return Ok(());
        }
        let mut input = Tensor::zeros((rows, self.inputs), of.dtype, of.device)?;
        // SAFETY: the tensor is as long as what the caller says lies at `x`.
        unsafe { copy(x, address(&input)?, &input, of.stream)? };
        if float_out {
            input = input.to_dtype(DType::F32)?;
        }
        let products = self.parts.iter().map(|part| input.apply_op1_no_bwd(part));
        let product = Tensor::cat(&products.collect::<Result<Vec<_>>>()?, 1)?;
        // SAFETY: the product is [rows, outputs] of its input's type, which is what the caller says that `out` holds.
        unsafe { copy(address(&product)?, out, &product, of.stream) }
    }
}

/// Copies as many bytes as `like` has on the stream that all of the device runs on, so that memory given back afterwards
/// is given back behind the copy.
///
/// # Safety
/// Both addresses hold so much.
unsafe fn copy(from: Address, to: Address, like: &Tensor, stream: &Arc<CudaStream>) -> Result<()> {
    let bytes = like.elem_count() * like.dtype().size_in_bytes();
    // SAFETY: the caller's promise.
    unsafe { memcpy_dtod_async(to, from, bytes, stream.cu_stream()) }.map_err(device_error)
}
