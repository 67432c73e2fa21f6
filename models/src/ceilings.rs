//! What the device can do at most, measured: the speeds beside which a forward pass's own are put.

use std::time::{Duration, Instant};

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Result, Tensor};
use rayon::prelude::*;

use crate::cpu::linear::Linear;
use crate::cpu::quantized;
use crate::cpu::stored::StoredMatrix;

/// Bytes copied at a time: far more than the caches hold.
const COPY_BYTES: usize = 128 << 20;
/// Bytes that a thread copies in one piece.
const PIECE_BYTES: usize = 1 << 20;
/// Rows, inputs and outputs of the product.
const SIZE: usize = 1536;
/// Bytes that a GPU copies at a time, and rows, inputs and outputs of its product: as much as keeps it busy.
const GPU_COPY_BYTES: usize = 1 << 30;
const GPU_SIZE: usize = 8192;

/// Memory bandwidth in GB/s, bytes read and bytes written both counted: the best of the copies by all threads that fit
/// into `budget`, at least one.
pub fn copy_bandwidth(device: &Device, budget: Duration) -> Result<f64> {
    if !device.is_cpu() {
        let source = Tensor::zeros(GPU_COPY_BYTES, DType::U8, device)?;
        let seconds = best(budget, || source.copy().and_then(|_copy| device.synchronize()))?;
        return Ok(2.0 * GPU_COPY_BYTES as f64 / seconds / 1e9);
    }
    let source = vec![1u8; COPY_BYTES];
    let mut target = vec![0u8; COPY_BYTES];
    let seconds = best(budget, || {
        let pieces = target.par_chunks_mut(PIECE_BYTES).zip(source.par_chunks(PIECE_BYTES));
        pieces.for_each(|(to, from)| to.copy_from_slice(from));
        Ok(())
    })?;
    Ok(2.0 * COPY_BYTES as f64 / seconds / 1e9)
}

/// How a decoder multiplies by most of its weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arithmetic {
    /// As numbers of the compute type.
    Numbers,
    /// On the CPU as a file's blocks, with float32's accuracy.
    Blocks,
    /// On the CPU as blocks, with rounded activations.
    Rounded,
}

/// Speed in GFLOP/s of a large projection with weights stored as `dtype`, or on the CPU in blocks of four bits if the
/// arithmetic is that of blocks, through the same code as the decoder's: the best of those that fit into `budget`, at least
/// one.
///
/// # Errors
/// What candle says of memory or of a type that it has no product for.
pub fn matmul_rate(device: &Device, dtype: DType, arithmetic: Arithmetic, budget: Duration) -> Result<f64> {
    if !device.is_cpu() {
        // Random, because a GPU multiplies zeros with less power and thus faster.
        let matrix = Tensor::randn(0f32, 1.0, (GPU_SIZE, GPU_SIZE), device)?.to_dtype(dtype)?;
        let seconds = best(budget, || {
            matrix.matmul(&matrix).and_then(|_product| device.synchronize())
        })?;
        return Ok(2.0 * (GPU_SIZE as f64).powi(3) / seconds / 1e9);
    }
    // No bfloat16 number, which would be stored as one.
    let numbers = vec![0.3; SIZE * SIZE];
    let blocks = || QTensor::quantize(&Tensor::from_slice(&numbers, (SIZE, SIZE), device)?, GgmlDType::Q4_1);
    let linear = match arithmetic {
        Arithmetic::Numbers => Linear::new(&numbers, SIZE, None, dtype)?,
        Arithmetic::Blocks => Linear::compressed(&StoredMatrix::read(&blocks()?)?, None),
        Arithmetic::Rounded => Linear::quantized(&quantized::read(&blocks()?)?, None)?,
    };
    let (x, mut out) = (vec![1.0; SIZE * SIZE], Vec::new());
    let seconds = best(budget, || linear.forward(&x, &mut out))?;
    Ok(2.0 * (SIZE as f64).powi(3) / seconds / 1e9)
}

/// Shortest time of a run, in seconds. The first run, which finds cold pages, counts only if it is the only one.
fn best(budget: Duration, mut run: impl FnMut() -> Result<()>) -> Result<f64> {
    let begin = Instant::now();
    let mut shortest = f64::INFINITY;
    loop {
        let start = Instant::now();
        run()?;
        let cold = shortest.is_infinite() && begin.elapsed() < budget;
        shortest = if cold {
            f64::MAX
        } else {
            shortest.min(start.elapsed().as_secs_f64())
        };
        if begin.elapsed() >= budget {
            return Ok(shortest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn even_no_budget_measures_once() {
        assert!(copy_bandwidth(&Device::Cpu, Duration::ZERO).unwrap() > 0.0);
        for arithmetic in [Arithmetic::Numbers, Arithmetic::Blocks, Arithmetic::Rounded] {
            assert!(matmul_rate(&Device::Cpu, DType::F32, arithmetic, Duration::ZERO).unwrap() > 0.0);
        }
    }
}
