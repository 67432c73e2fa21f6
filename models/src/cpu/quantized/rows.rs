//! Quantized matrices row by row, as they come from a file.

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Result, bail};
use half::f16;
use rayon::prelude::*;

use super::BLOCK;

/// Bits of a weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bits {
    /// 0 to 15.
    Four,
    /// -127 to 127, and -128 if a file has it.
    Eight,
}

/// A matrix `[outputs, depth]` whose weights are `scale * value + minimum`, scale and minimum being a block's.
pub struct Rows {
    pub bits: Bits,
    pub depth: usize,
    /// `[outputs, depth]`
    pub values: Vec<i8>,
    /// `[outputs, depth / BLOCK]`
    pub scales: Vec<f16>,
    /// As the scales; zeros with eight bits.
    pub minima: Vec<f16>,
}

impl Rows {
    /// A GGUF file's matrix on the CPU: Q4_0, Q4_1, Q4_K and Q8_0 in as many bits as they have, others rounded to eight.
    ///
    /// # Errors
    /// The tensor is no matrix, or its rows are no whole number of blocks.
    pub fn read(tensor: &QTensor) -> Result<Self> {
        let (_, depth) = tensor.shape().dims2()?;
        if depth % BLOCK != 0 {
            bail!("a row of {depth} weights is no whole number of blocks")
        }
        let mut rows = Self::with_room(Bits::Four, depth, tensor.shape().elem_count());
        match tensor.dtype() {
            GgmlDType::Q4_0 => tensor.data()?.as_chunks::<18>().0.iter().for_each(|block| {
                let scale = number(block[0], block[1]);
                rows.push_nibbles(scale, f16::from_f32(-8.0 * scale.to_f32()), &block[2..]);
            }),
            GgmlDType::Q4_1 => tensor.data()?.as_chunks::<20>().0.iter().for_each(|block| {
                rows.push_nibbles(number(block[0], block[1]), number(block[2], block[3]), &block[4..]);
            }),
            GgmlDType::Q4K => tensor
                .data()?
                .as_chunks()
                .0
                .iter()
                .for_each(|block| rows.push_q4_k(block)),
            GgmlDType::Q8_0 => {
                rows.bits = Bits::Eight;
                for block in tensor.data()?.as_chunks::<34>().0 {
                    rows.scales.push(number(block[0], block[1]));
                    rows.minima.push(f16::ZERO);
                    rows.values.extend(block[2..].iter().map(|&byte| byte as i8));
                }
            }
            _ => {
                return Ok(Self::round(
                    &tensor.dequantize(&Device::Cpu)?.flatten_all()?.to_vec1()?,
                    depth,
                ));
            }
        }
        Ok(rows)
    }

    pub fn outputs(&self) -> usize {
        self.values.len() / self.depth
    }

    fn with_room(bits: Bits, depth: usize, weights: usize) -> Self {
        Self {
            bits,
            depth,
            values: Vec::with_capacity(weights),
            scales: Vec::with_capacity(weights / BLOCK),
            minima: Vec::with_capacity(weights / BLOCK),
        }
    }

    /// A block of GGUF's: the first half of it in the low nibbles, the second in the high ones.
    fn push_nibbles(&mut self, scale: f16, minimum: f16, nibbles: &[u8]) {
        self.scales.push(scale);
        self.minima.push(minimum);
        self.values.extend(nibbles.iter().map(|byte| (byte & 15) as i8));
        self.values.extend(nibbles.iter().map(|byte| (byte >> 4) as i8));
    }

    /// Eight blocks of GGUF's Q4_K: a scale and a minimum for them all, of which each block has its own multiples in six
    /// bits; the products are rounded to float16. Two blocks share their bytes, one in the low nibbles, the next in the
    /// high ones.
    fn push_q4_k(&mut self, blocks: &[u8; 144]) {
        let scale_of_all = number(blocks[0], blocks[1]).to_f32();
        let minimum_of_all = number(blocks[2], blocks[3]).to_f32();
        let (packed, nibbles) = blocks[4..].split_at(12);
        for (pair, nibbles) in nibbles.chunks_exact(BLOCK).enumerate() {
            for (index, shift) in [(2 * pair, 0), (2 * pair + 1, 4)] {
                let (scale, minimum) = six_bits(packed, index);
                self.scales.push(f16::from_f32(scale_of_all * f32::from(scale)));
                self.minima.push(f16::from_f32(-minimum_of_all * f32::from(minimum)));
                self.values
                    .extend(nibbles.iter().map(|byte| (byte >> shift & 15) as i8));
            }
        }
    }

    /// Rounds weights to eight bits; `depth` is a whole number of blocks.
    pub fn round(weights: &[f32], depth: usize) -> Self {
        let blocks: Vec<(f16, [i8; BLOCK])> = weights
            .par_chunks_exact(BLOCK)
            .map(|block| {
                // By their bits, what is not a number is above all others, and stays so.
                let largest = block.iter().fold(0, |most: u32, w| most.max(w.to_bits() & 0x7FFF_FFFF));
                let largest = f32::from_bits(largest);
                let scale = f16::from_f32(largest / 127.0);
                let inverse = match scale.to_f32() {
                    0.0 => 0.0,
                    scale => 1.0 / scale,
                };
                // The cast saturates, where the scale was rounded down.
                let value = |index: usize| ((block[index] * inverse).round() as i8).max(-127);
                (scale, std::array::from_fn(value))
            })
            .collect();
        let mut rows = Self::with_room(Bits::Eight, depth, weights.len());
        for (scale, values) in blocks {
            rows.scales.push(scale);
            rows.minima.push(f16::ZERO);
            rows.values.extend(values);
        }
        rows
    }

    /// The weights that these stand for.
    fn weights(&self) -> Vec<f32> {
        let blocks = self
            .values
            .chunks_exact(BLOCK)
            .zip(self.scales.iter().zip(&self.minima));
        let weights = blocks.flat_map(|(values, (scale, minimum))| {
            let (scale, minimum) = (scale.to_f32(), minimum.to_f32());
            values.iter().map(move |&value| scale * f32::from(value) + minimum)
        });
        weights.collect()
    }

    /// Matrices in as many bits as the largest of them has.
    pub fn alike(parts: Vec<Self>) -> Vec<Self> {
        let eight = parts.iter().any(|part| part.bits == Bits::Eight);
        let widen = |part: Self| match eight && part.bits == Bits::Four {
            true => Self::round(&part.weights(), part.depth),
            false => part,
        };
        parts.into_iter().map(widen).collect()
    }

    /// One matrix of the rows of all `parts`, which are alike and of one depth.
    pub fn concat(parts: Vec<Self>) -> Option<Self> {
        parts.into_iter().reduce(|mut all, part| {
            all.values.extend(part.values);
            all.scales.extend(part.scales);
            all.minima.extend(part.minima);
            all
        })
    }
}

/// The multiples of scale and minimum that block `index` of eight has: of the first four in bytes of their own, of the
/// others low bits in the last bytes and high bits on top of the first.
fn six_bits(packed: &[u8], index: usize) -> (u8, u8) {
    if index < 4 {
        return (packed[index] & 63, packed[index + 4] & 63);
    }
    let low = packed[index + 4];
    let high = |byte: u8| byte >> 6 << 4;
    (low & 15 | high(packed[index - 4]), low >> 4 | high(packed[index]))
}

fn number(low: u8, high: u8) -> f16 {
    f16::from_le_bytes([low, high])
}

#[cfg(test)]
mod tests {
    use candle_core::Tensor;

    use super::super::super::numbers;
    use super::*;

    fn stored(weights: &[f32], depth: usize, dtype: GgmlDType) -> (Rows, Vec<f32>) {
        let tensor = Tensor::from_slice(weights, (weights.len() / depth, depth), &Device::Cpu).unwrap();
        let stored = QTensor::quantize(&tensor, dtype).unwrap();
        let stands_for = stored.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap();
        (Rows::read(&stored).unwrap(), stands_for.to_vec1().unwrap())
    }

    #[test]
    fn what_a_file_stores_stands_for_the_numbers_candle_reads() {
        let weights = numbers(6 * 256, 3);
        for (dtype, bits, within) in [
            (GgmlDType::Q4_0, Bits::Four, 0.0),
            (GgmlDType::Q4_1, Bits::Four, 0.0),
            (GgmlDType::Q4K, Bits::Four, 1e-3),
            (GgmlDType::Q8_0, Bits::Eight, 0.0),
            (GgmlDType::Q5_1, Bits::Eight, 4.5e-3),
            (GgmlDType::Q6K, Bits::Eight, 4.5e-3),
        ] {
            let (rows, stands_for) = stored(&weights, 256, dtype);
            assert_eq!(rows.bits, bits, "{dtype:?}");
            for (found, exact) in rows.weights().iter().zip(&stands_for) {
                assert!((found - exact).abs() <= within, "{dtype:?}: {found} is not {exact}");
            }
        }
    }

    #[test]
    fn matrices_side_by_side_take_the_wider_type() {
        let (first, second) = (numbers(4 * 64, 5), numbers(2 * 64, 6));
        let (four, _) = stored(&first, 64, GgmlDType::Q4_1);
        let exact = [four.weights(), stored(&second, 64, GgmlDType::Q8_0).1].concat();
        let parts = vec![four, stored(&second, 64, GgmlDType::Q8_0).0];
        let both = Rows::concat(Rows::alike(parts)).unwrap();
        assert_eq!((both.bits, both.values.len()), (Bits::Eight, 6 * 64));
        for (found, exact) in both.weights().iter().zip(&exact) {
            assert!((found - exact).abs() < 4.5e-3, "{found} is not {exact}");
        }
    }

    #[test]
    fn blocks_of_zeros_and_of_one_outlier_are_rounded() {
        let mut weights = vec![0.0; 64];
        weights[40] = -1000.0;
        weights[41] = 5.0;
        let rows = Rows::round(&weights, 64);
        assert_eq!(rows.weights()[..32], [0.0; 32]);
        assert_eq!(rows.values[40], -127);
        assert!((rows.weights()[40] + 1000.0).abs() < 1.0 && (rows.weights()[41] - 5.0).abs() < 4.0);
        weights[3] = f32::NAN;
        let rows = Rows::round(&weights, 64);
        assert!(rows.weights()[..32].iter().all(|weight| weight.is_nan()) && rows.weights()[40] < -999.0);
    }
}
