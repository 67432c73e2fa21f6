//! Arithmetic on the CPU: operators on slices, in vectorised kernels that are chosen at run time, with memory that each
//! thread keeps.
//!
//! Activations are float32, whatever the weights and the KV cache are stored as; products with weights that are multiplied
//! as whole numbers round them to eight bits (`quantized`) or cut them into digits (`compressed`), and those with bfloat16
//! weights or keys to bfloat16 where the processor multiplies such numbers. Every result is computed by a sequence of
//! roundings that depends neither on the number of rows in the step nor on the number of threads.

pub mod attention;
#[cfg(target_arch = "x86_64")]
mod attention_bfloat16;
mod attention_kernel;
#[cfg(test)]
mod attention_reference;
pub(crate) mod bfloat16;
pub(crate) mod compressed;
pub(crate) mod elementwise;
pub(crate) mod linear;
pub(crate) mod math;
pub(crate) mod panels;
mod prefetch;
pub(crate) mod quantized;
pub mod softmax;
pub(crate) mod stored;
mod tile;

use std::cell::Cell;
use std::thread::LocalKey;

#[cfg(test)]
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{CpuStorage, Layout, Result, WithDType, bail};
#[cfg(test)]
use candle_core::{Device, Tensor};

/// The elements of a contiguous operand.
pub(crate) fn slice<'a, T: WithDType>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [T]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<T>()?[start..end]),
        None => bail!("operand of shape {:?} is not contiguous", layout.shape()),
    }
}

/// Room for `len` elements at the beginning of a buffer, which is made longer if need be. What is in them is of no account.
fn room<T: Copy>(buffer: &mut Vec<T>, len: usize, filling: T) -> &mut [T] {
    if buffer.len() < len {
        buffer.resize(len, filling);
    }
    &mut buffer[..len]
}

/// Runs `work` with memory that the thread uses again and again, so that it stays in its cache; with new memory where the
/// thread took up this work while it waits for other threads in the midst of such work.
pub(crate) fn lend<T: Default, R>(memory: &'static LocalKey<Cell<T>>, work: impl FnOnce(&mut T) -> R) -> R {
    let mut lent = memory.take();
    let result = work(&mut lent);
    memory.set(lent);
    result
}

/// A matrix of which threads write disjoint parts that no slice can describe, such as stripes of columns.
#[derive(Clone, Copy)]
pub(crate) struct Stripes {
    data: *mut f32,
    len: usize,
}

// SAFETY: the pointer is only turned into slices by `part`, whose callers promise that no two parts overlap.
unsafe impl Send for Stripes {}
// SAFETY: as above.
unsafe impl Sync for Stripes {}

impl Stripes {
    pub fn new(data: &mut [f32]) -> Self {
        Self {
            data: data.as_mut_ptr(),
            len: data.len(),
        }
    }

    /// Asks for elements that are written soon.
    #[inline(always)]
    pub fn fetch(self, start: usize, len: usize) {
        prefetch::prefetch(self.data.wrapping_add(start), len);
    }

    /// `len` elements from `start` on.
    ///
    /// # Safety
    /// The matrix is alive, and nothing else refers to these elements while the slice lives.
    #[inline(always)]
    pub unsafe fn part<'a>(self, start: usize, len: usize) -> &'a mut [f32] {
        assert!(start + len <= self.len);
        // SAFETY: in bounds by the assertion; exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(start), len) }
    }
}

/// Numbers between -1 and 1 that look random.
#[cfg(test)]
pub(crate) fn numbers(len: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as i32 as f32 / i32::MAX as f32
    };
    (0..len).map(|_| next()).collect()
}

/// A matrix of such numbers, `[outputs, depth]`, as a file stores it, and the numbers that this stands for.
#[cfg(test)]
pub(crate) fn quantized_numbers(outputs: usize, depth: usize, dtype: GgmlDType, seed: u32) -> (QTensor, Vec<f32>) {
    let weights = Tensor::from_vec(numbers(outputs * depth, seed), (outputs, depth), &Device::Cpu).unwrap();
    let stored = QTensor::quantize(&weights, dtype).unwrap();
    let stands_for = stored.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap();
    (stored, stands_for.to_vec1().unwrap())
}
