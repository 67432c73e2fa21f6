//! Weights packed for the CPU: a matrix `[out, in]` cut into panels of as many outputs as one tile has columns,
//! each panel `[in, width]`, so that a product reads them from front to back.

use candle_core::{DType, Result, bail};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

/// A packed matrix. The last panel is filled up with zeros.
pub struct Panels {
    data: Elements,
    /// Inputs: rows of a panel.
    pub depth: usize,
    /// Outputs: columns over all panels, without the filling.
    pub outputs: usize,
    /// Columns of a panel.
    pub width: usize,
}

enum Elements {
    F32(Aligned<f32>),
    Bf16(Aligned<bf16>),
    F16(Aligned<f16>),
}

/// Part of a panel, as it is stored.
pub enum Block<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
    F16(&'a [f16]),
}

/// Of each panel, which matrix it is cut from and the how-manieth of that matrix it is, where panels of two matrices lie in
/// turn.
pub fn in_turn<'a, T: ?Sized>(first: &'a T, second: &'a T) -> impl Fn(usize) -> (&'a T, usize) {
    move |panel| (if panel.is_multiple_of(2) { first } else { second }, panel / 2)
}

/// The weights in float32, in `buffer`.
#[inline(always)]
pub fn widen_bf16<'a>(weights: &[bf16], buffer: &'a mut Vec<f32>) -> &'a [f32] {
    buffer.resize(weights.len(), 0.0);
    for (to, from) in buffer.iter_mut().zip(weights) {
        *to = f32::from_bits(u32::from(from.to_bits()) << 16);
    }
    buffer
}

/// The weights in float32, in `buffer`.
#[inline(always)]
pub fn widen_f16<'a>(weights: &[f16], buffer: &'a mut Vec<f32>) -> &'a [f32] {
    buffer.resize(weights.len(), 0.0);
    weights.convert_to_f32_slice(buffer);
    buffer
}

/// A vector whose elements begin at a cache line.
#[derive(Default)]
pub struct Aligned<T> {
    data: Vec<T>,
    start: usize,
    len: usize,
}

impl<T: Copy + Default> Aligned<T> {
    pub fn zeros(len: usize) -> Self {
        let data = vec![T::default(); len + 64];
        let start = data.as_ptr().align_offset(64).min(64);
        Self { data, start, len }
    }

    /// Room for `len` elements at the beginning, made longer if need be. What is in them is of no account.
    pub fn room(&mut self, len: usize) -> &mut [T] {
        if self.len < len {
            *self = Self::zeros(len);
        }
        &mut self.get_mut()[..len]
    }

    pub fn get(&self) -> &[T] {
        &self.data[self.start..][..self.len]
    }

    pub fn get_mut(&mut self) -> &mut [T] {
        &mut self.data[self.start..][..self.len]
    }
}

/// Columns of a panel on this machine: two vectors.
pub fn panel_width() -> usize {
    struct Width;
    impl WithSimd for Width {
        type Output = usize;
        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) -> usize {
            2 * S::F32_LANES
        }
    }
    Arch::new().dispatch(Width)
}

/// What `weights` are stored as to stand for what they are in `dtype`: float32 numbers that are bfloat16 numbers as well, as
/// those of most files are, are kept as such. They take half the memory and time to read, and their products are the same.
pub fn stored_as(dtype: DType, weights: &[&[f32]]) -> DType {
    let is_bfloat16 = |weight: &f32| weight.to_bits() & 0xFFFF == 0;
    match dtype {
        DType::F32 if weights.iter().all(|part| part.iter().all(is_bfloat16)) => DType::BF16,
        dtype => dtype,
    }
}

impl Panels {
    /// Packs rows of `depth` inputs, one an output, stored as `dtype` (f32, bf16 or f16).
    pub fn pack(rows: &[f32], depth: usize, dtype: DType) -> Result<Self> {
        let outputs = rows.len() / depth;
        let count = outputs.div_ceil(panel_width());
        Self::build(count, outputs, depth, dtype, |panel| (rows, panel))
    }

    /// Packs two matrices of equal shape, a panel of `first` and the same panel of `second` in turn.
    pub fn pack_pairs(first: &[f32], second: &[f32], depth: usize, dtype: DType) -> Result<Self> {
        let outputs = first.len() / depth;
        let count = 2 * outputs.div_ceil(panel_width());
        Self::build(count, outputs, depth, dtype, in_turn(first, second))
    }

    /// `source` tells of each panel which matrix it is cut from, and the how-manieth of that matrix it is.
    fn build<'a>(
        count: usize,
        outputs: usize,
        depth: usize,
        dtype: DType,
        source: impl Fn(usize) -> (&'a [f32], usize) + Sync,
    ) -> Result<Self> {
        let width = panel_width();
        fn fill<'a, T: Copy + Default + Send + Sync>(
            count: usize,
            (depth, width): (usize, usize),
            source: impl Fn(usize) -> (&'a [f32], usize) + Sync,
            convert: fn(f32) -> T,
        ) -> Aligned<T> {
            let mut data = Aligned::zeros(count * depth * width);
            data.get_mut()
                .par_chunks_exact_mut(depth * width)
                .enumerate()
                .for_each(|(index, panel)| {
                    let (rows, nth) = source(index);
                    for (column, row) in rows.chunks_exact(depth).skip(nth * width).take(width).enumerate() {
                        for (k, &value) in row.iter().enumerate() {
                            panel[k * width + column] = convert(value);
                        }
                    }
                });
            data
        }
        let shape = (depth, width);
        let data = match dtype {
            DType::F32 => Elements::F32(fill(count, shape, source, |x| x)),
            DType::BF16 => Elements::Bf16(fill(count, shape, source, bf16::from_f32)),
            DType::F16 => Elements::F16(fill(count, shape, source, f16::from_f32)),
            other => bail!("weights: cannot store {other:?}; choose f32, bf16 or f16"),
        };
        Ok(Self {
            data,
            depth,
            outputs,
            width,
        })
    }

    /// Rows `first..first + depth` of panel `index`.
    #[inline(always)]
    pub fn block(&self, index: usize, first: usize, depth: usize) -> Block<'_> {
        let range = (index * self.depth + first) * self.width..(index * self.depth + first + depth) * self.width;
        match &self.data {
            Elements::F32(data) => Block::F32(&data.get()[range]),
            Elements::Bf16(data) => Block::Bf16(&data.get()[range]),
            Elements::F16(data) => Block::F16(&data.get()[range]),
        }
    }

    /// Whether weights become float32 only when they are multiplied.
    pub fn are_widened(&self) -> bool {
        !matches!(self.data, Elements::F32(_))
    }

    /// Bytes of the weights.
    pub fn bytes(&self) -> usize {
        match &self.data {
            Elements::F32(data) => size_of_val(data.get()),
            Elements::Bf16(data) => size_of_val(data.get()),
            Elements::F16(data) => size_of_val(data.get()),
        }
    }

    /// Writes the weights of output `index` to `row`, as an embedding lookup wants them.
    pub fn gather(&self, index: usize, row: &mut [f32]) {
        let start = index / self.width * self.depth * self.width + index % self.width;
        let positions = (start..).step_by(self.width);
        match &self.data {
            Elements::F32(data) => row.iter_mut().zip(positions).for_each(|(to, at)| *to = data.get()[at]),
            Elements::Bf16(data) => row
                .iter_mut()
                .zip(positions)
                .for_each(|(to, at)| *to = data.get()[at].to_f32()),
            Elements::F16(data) => row
                .iter_mut()
                .zip(positions)
                .for_each(|(to, at)| *to = data.get()[at].to_f32()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_output_is_found_again_and_the_filling_is_zero() {
        for (outputs, depth) in [(1, 1), (15, 3), (16, 5), (17, 2), (67, 7)] {
            let rows: Vec<f32> = (0..outputs * depth).map(|i| i as f32 + 1.0).collect();
            for dtype in [DType::F32, DType::BF16, DType::F16] {
                let panels = Panels::pack(&rows, depth, dtype).unwrap();
                for output in 0..outputs {
                    let mut row = vec![0.0; depth];
                    panels.gather(output, &mut row);
                    let expected: Vec<f32> = match dtype {
                        DType::BF16 => rows[output * depth..][..depth]
                            .iter()
                            .map(|&x| bf16::from_f32(x).to_f32())
                            .collect(),
                        _ => rows[output * depth..][..depth].to_vec(),
                    };
                    assert_eq!(row, expected);
                }
                let last = outputs / panels.width;
                if outputs % panels.width != 0 {
                    let mut buffer = Vec::new();
                    let block = match panels.block(last, 0, depth) {
                        Block::F32(weights) => weights,
                        Block::Bf16(weights) => widen_bf16(weights, &mut buffer),
                        Block::F16(weights) => widen_f16(weights, &mut buffer),
                    };
                    assert!(
                        block
                            .chunks(panels.width)
                            .all(|row| row[outputs % panels.width..].iter().all(|&x| x == 0.0))
                    );
                }
            }
        }
    }
}
