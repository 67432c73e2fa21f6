//! Products with weight matrices: cuBLAS, into memory that is there already.

use std::ffi::c_void;

use candle_core::cuda_backend::{CudaDevice, cudarc};
use candle_core::{DType, Result, bail};
use cudarc::cublas::{CudaBlas, result::gemm_ex, sys};
use cudarc::driver::{CudaSlice, DevicePtr};

use super::device_error;
use super::kernels::Address;

/// What NVIDIA recommends for Hopper.
const WORKSPACE: usize = 32 << 20;

/// A weight matrix `[outputs, inputs]` on the device.
#[derive(Debug, Clone, Copy)]
pub struct Matrix {
    pub weights: Address,
    pub outputs: usize,
    pub inputs: usize,
}

/// Multiplies by matrices of one type.
pub struct Blas {
    /// Not candle's, which would go on using the workspace when it is gone.
    handle: CudaBlas,
    dtype: sys::cudaDataType_t,
    /// cuBLAS's own; without it a product in a graph would allocate.
    _workspace: CudaSlice<u8>,
}

impl Blas {
    pub fn new(device: &CudaDevice, dtype: DType) -> Result<Self> {
        let dtype = match dtype {
            DType::F32 => sys::cudaDataType_t::CUDA_R_32F,
            DType::BF16 => sys::cudaDataType_t::CUDA_R_16BF,
            DType::F16 => sys::cudaDataType_t::CUDA_R_16F,
            other => bail!("cuBLAS: no products of {other:?}"),
        };
        let stream = device.cuda_stream();
        let handle = CudaBlas::new(stream.clone()).map_err(device_error)?;
        // SAFETY: cuBLAS writes what it reads of its workspace.
        let workspace = unsafe { stream.alloc::<u8>(WORKSPACE) }.map_err(device_error)?;
        let address = workspace.device_ptr(&stream).0;
        // SAFETY: the memory is the handle's alone and lives as long as `self`, after which nobody multiplies here.
        let status = unsafe { sys::cublasSetWorkspace_v2(*handle.handle(), address as *mut c_void, WORKSPACE) };
        status.result().map_err(device_error)?;
        Ok(Self {
            handle,
            dtype,
            _workspace: workspace,
        })
    }

    /// `out = x W^T`: `[rows, outputs]` from `[rows, inputs]`; `out` is of the matrices' type, or in float32.
    ///
    /// # Safety
    /// `x` and `out` are addresses of this device that hold so much until the stream has come past the product.
    pub unsafe fn multiply(
        &self,
        matrix: Matrix,
        rows: usize,
        x: Address,
        out: Address,
        float_out: bool,
    ) -> Result<()> {
        if rows == 0 {
            return Ok(());
        }
        let (one, zero) = (1f32, 0f32);
        let out_type = if float_out {
            sys::cudaDataType_t::CUDA_R_32F
        } else {
            self.dtype
        };
        let (outputs, inputs) = (matrix.outputs as i32, matrix.inputs as i32);
        // cuBLAS counts by columns: what is row-major here is the transpose there.
        // SAFETY: the weights are [outputs, inputs] as `Matrix` says; the rest is the caller's promise.
        unsafe {
            gemm_ex(
                *self.handle.handle(),
                sys::cublasOperation_t::CUBLAS_OP_T,
                sys::cublasOperation_t::CUBLAS_OP_N,
                outputs,
                rows as i32,
                inputs,
                (&raw const one).cast(),
                matrix.weights as *const c_void,
                self.dtype,
                inputs,
                x as *const c_void,
                self.dtype,
                inputs,
                (&raw const zero).cast(),
                out as *mut c_void,
                out_type,
                outputs,
                sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        }
        .map_err(device_error)
    }
}
