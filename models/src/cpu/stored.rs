//! Quantized matrices row by row, as they come from a file.

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Result, bail};
use half::f16;

/// Inputs of a file's smallest blocks; every row is a whole number of them.
pub const BLOCK: usize = 32;

/// Bits of a weight's value, and how many inputs share a scale. What is said in one can be said in those that come after.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Format {
    /// 0 to 15.
    FourBy32,
    /// -127 to 127, and -128 if a file has it.
    EightBy32,
    EightBy16,
}

impl Format {
    /// Inputs that share a scale.
    pub fn group(self) -> usize {
        match self {
            Self::FourBy32 | Self::EightBy32 => 32,
            Self::EightBy16 => 16,
        }
    }

    /// Bits of a value.
    pub fn bits(self) -> usize {
        match self {
            Self::FourBy32 => 4,
            Self::EightBy32 | Self::EightBy16 => 8,
        }
    }
}

/// A matrix `[outputs, depth]` whose weights are `scale * value + minimum`, scale and minimum being a group's. No product of
/// a scale and a value has more digits than float32, so that one rounding gives the weight.
pub struct StoredMatrix {
    pub format: Format,
    /// Inputs.
    pub depth: usize,
    /// `[outputs, depth]`
    pub values: Vec<i8>,
    /// `[outputs, depth / group]`
    pub scales: Vec<f32>,
    /// As the scales.
    pub minima: Vec<f32>,
}

impl StoredMatrix {
    /// File types that can be read.
    pub const TYPES: &[GgmlDType] = {
        use GgmlDType::{Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0};
        &[Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4K, Q5K, Q6K]
    };

    /// A GGUF file's matrix on the CPU. It stands for what candle reads, but for the sign of zeros, as long as the file's
    /// numbers are finite.
    ///
    /// # Errors
    /// The tensor is no matrix or of none of [`Self::TYPES`], or its rows are no whole number of blocks.
    pub fn read(tensor: &QTensor) -> Result<Self> {
        use Format::{EightBy16, EightBy32, FourBy32};
        match tensor.dtype() {
            GgmlDType::Q4_0 => Self::fill(tensor, FourBy32, Self::push_q4_0),
            GgmlDType::Q4_1 => Self::fill(tensor, FourBy32, Self::push_q4_1),
            GgmlDType::Q4K => Self::fill(tensor, FourBy32, Self::push_q4_k),
            GgmlDType::Q5_0 => Self::fill(tensor, EightBy32, Self::push_q5_0),
            GgmlDType::Q5_1 => Self::fill(tensor, EightBy32, Self::push_q5_1),
            GgmlDType::Q5K => Self::fill(tensor, EightBy32, Self::push_q5_k),
            GgmlDType::Q8_0 => Self::fill(tensor, EightBy32, Self::push_q8_0),
            GgmlDType::Q6K => Self::fill(tensor, EightBy16, Self::push_q6_k),
            other => bail!("a matrix in {other:?} cannot stay so"),
        }
    }

    /// Of blocks of `N` bytes, each of which `push` appends.
    fn fill<const N: usize>(tensor: &QTensor, format: Format, push: fn(&mut Self, &[u8; N])) -> Result<Self> {
        let (outputs, depth) = shape(tensor)?;
        let mut matrix = Self::with_room(format, depth, outputs * depth);
        let data = tensor.data()?;
        data.as_chunks().0.iter().for_each(|block| push(&mut matrix, block));
        Ok(matrix)
    }

    /// None yet, with room for some.
    pub fn with_room(format: Format, depth: usize, weights: usize) -> Self {
        Self {
            format,
            depth,
            values: Vec::with_capacity(weights),
            scales: Vec::with_capacity(weights / format.group()),
            minima: Vec::with_capacity(weights / format.group()),
        }
    }

    /// Rows.
    pub fn outputs(&self) -> usize {
        self.values.len() / self.depth
    }

    /// The weights that these stand for, `[outputs, depth]`.
    pub fn weights(&self) -> Vec<f32> {
        let groups = self.values.chunks_exact(self.format.group());
        let factors = self.scales.iter().zip(&self.minima);
        let weights = groups
            .zip(factors)
            .flat_map(|(values, (scale, minimum))| values.iter().map(move |&value| scale * f32::from(value) + minimum));
        weights.collect()
    }

    /// Matrices that stand for the same, all in one format.
    pub fn alike(parts: Vec<Self>) -> Vec<Self> {
        let format = parts.iter().map(|part| part.format).max();
        let to = |mut part: Self| {
            let format = format.unwrap_or(part.format);
            let times = part.format.group() / format.group();
            let repeat = |factors: Vec<f32>| {
                factors
                    .into_iter()
                    .flat_map(|factor| std::iter::repeat_n(factor, times))
            };
            part.scales = repeat(part.scales).collect();
            part.minima = repeat(part.minima).collect();
            Self { format, ..part }
        };
        parts.into_iter().map(to).collect()
    }

    /// One matrix of the rows of all `parts`, which are of one format and depth.
    pub fn concat(parts: Vec<Self>) -> Option<Self> {
        parts.into_iter().reduce(|mut all, part| {
            all.values.extend(part.values);
            all.scales.extend(part.scales);
            all.minima.extend(part.minima);
            all
        })
    }

    /// Appends a group, of as many values as the format has in one.
    pub fn push(&mut self, scale: f32, minimum: f32, values: impl Iterator<Item = i8>) {
        self.scales.push(scale);
        self.minima.push(minimum);
        self.values.extend(values);
    }

    /// Scale, and the first half of the values in low nibbles, the second in high ones, 8 too large.
    fn push_q4_0(&mut self, block: &[u8; 18]) {
        let scale = number(block, 0);
        self.push(scale, -8.0 * scale, halves(&block[2..]));
    }

    /// As Q4_0, with a minimum after the scale.
    fn push_q4_1(&mut self, block: &[u8; 20]) {
        self.push(number(block, 0), number(block, 2), halves(&block[4..]));
    }

    /// As Q4_0, with a word of the values' fifth bits after the scale; they are 16 too large.
    fn push_q5_0(&mut self, block: &[u8; 22]) {
        self.push(number(block, 0), 0.0, with_fifth(&block[2..]).map(|value| value - 16));
    }

    /// As Q4_1, with the fifth bits of Q5_0.
    fn push_q5_1(&mut self, block: &[u8; 24]) {
        self.push(number(block, 0), number(block, 2), with_fifth(&block[4..]));
    }

    /// Scale and values.
    fn push_q8_0(&mut self, block: &[u8; 34]) {
        self.push(number(block, 0), 0.0, block[2..].iter().map(|&byte| byte as i8));
    }

    /// Eight groups: a scale and a minimum for them all, of which each group has its own multiples in six bits. Two groups
    /// share their bytes, one in the low nibbles, the next in the high ones.
    fn push_q4_k(&mut self, block: &[u8; 144]) {
        for (index, [scale, minimum]) in multiples(block).into_iter().enumerate() {
            let nibbles = &block[16 + index / 2 * 32..][..32];
            let nibble = |byte: &u8| (byte >> (index % 2 * 4) & 15) as i8;
            self.push(scale, minimum, nibbles.iter().map(nibble));
        }
    }

    /// As Q4_K, with the fifth bits of all groups' values at one place in a byte before the nibbles.
    fn push_q5_k(&mut self, block: &[u8; 176]) {
        for (index, [scale, minimum]) in multiples(block).into_iter().enumerate() {
            let (fifths, nibbles) = (&block[16..][..32], &block[48 + index / 2 * 32..][..32]);
            let value = |(byte, fifth): (&u8, &u8)| (byte >> (index % 2 * 4) & 15 | (fifth >> index & 1) << 4) as i8;
            self.push(scale, minimum, nibbles.iter().zip(fifths).map(value));
        }
    }

    /// Sixteen groups of 16 values, 32 too large: low nibbles of two halves of 128 values, each half's first 64 in low and
    /// the others in high nibbles of its bytes, then two more bits of each value, of every 32 values at another place in a
    /// byte, then the groups' multiples of a scale, then that.
    fn push_q6_k(&mut self, block: &[u8; 210]) {
        let scale = number(block, 208);
        for (group, &multiple) in block[192..208].iter().enumerate() {
            let value = |at: usize| {
                let (half, quarter, place) = (at / 128, at % 128 / 32, at % 32);
                let low = block[64 * half + quarter % 2 * 32 + place] >> (quarter / 2 * 4) & 15;
                let high = block[128 + 32 * half + place] >> (2 * quarter) & 3;
                (low | high << 4) as i8 - 32
            };
            let values = (16 * group..16 * (group + 1)).map(value);
            self.push(scale * f32::from(multiple as i8), 0.0, values);
        }
    }
}

/// Outputs and depth of a matrix.
///
/// # Errors
/// The tensor is no matrix, or its rows are no whole number of blocks.
pub fn shape(tensor: &QTensor) -> Result<(usize, usize)> {
    let (outputs, depth) = tensor.shape().dims2()?;
    if depth % BLOCK != 0 {
        bail!("a row of {depth} weights is no whole number of blocks")
    }
    Ok((outputs, depth))
}

/// The float16 number at a place of a block.
fn number(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Low nibbles, then high ones.
fn halves(nibbles: &[u8]) -> impl Iterator<Item = i8> {
    let (low, high) = (
        nibbles.iter().map(|byte| byte & 15),
        nibbles.iter().map(|byte| byte >> 4),
    );
    low.chain(high).map(|value| value as i8)
}

/// As [`halves`], after a word of the values' fifth bits.
fn with_fifth(bytes: &[u8]) -> impl Iterator<Item = i8> {
    let (word, nibbles) = bytes.split_at(4);
    let fifth = |index: usize| (word[index / 8] >> (index % 8) & 1) << 4;
    halves(nibbles)
        .enumerate()
        .map(move |(index, value)| value | fifth(index) as i8)
}

/// Scale and minimum of the eight groups of a block of Q4_K or Q5_K.
fn multiples(block: &[u8]) -> [[f32; 2]; 8] {
    let (scale, minimum) = (number(block, 0), number(block, 2));
    std::array::from_fn(|index| {
        let (scales, minima) = six_bits(&block[4..16], index);
        [scale * f32::from(scales), -minimum * f32::from(minima)]
    })
}

/// The multiples of scale and minimum that group `index` of eight has: of the first four in bytes of their own, of the
/// others low bits in the last bytes and high bits on top of the first.
fn six_bits(packed: &[u8], index: usize) -> (u8, u8) {
    if index < 4 {
        return (packed[index] & 63, packed[index + 4] & 63);
    }
    let low = packed[index + 4];
    let high = |byte: u8| byte >> 6 << 4;
    (low & 15 | high(packed[index - 4]), low >> 4 | high(packed[index]))
}

#[cfg(test)]
mod tests {
    use super::super::quantized_numbers;
    use super::*;

    #[test]
    fn what_a_file_stores_stands_for_the_numbers_candle_reads() {
        for &dtype in StoredMatrix::TYPES {
            let (stored, stands_for) = quantized_numbers(6, 512, dtype, 3);
            assert!(
                StoredMatrix::read(&stored).unwrap().weights() == stands_for,
                "{dtype:?}"
            );
        }
        assert!(StoredMatrix::read(&quantized_numbers(6, 512, GgmlDType::Q3K, 3).0).is_err());
    }

    #[test]
    fn matrices_in_one_format_stand_for_the_same() {
        let types = [GgmlDType::Q4K, GgmlDType::Q6K, GgmlDType::Q8_0];
        let parts = types.map(|dtype| quantized_numbers(3, 256, dtype, 5));
        let exact = parts.each_ref().map(|(_, exact)| exact.clone());
        let read = parts.iter().map(|(stored, _)| StoredMatrix::read(stored).unwrap());
        let parts = StoredMatrix::alike(read.collect());
        assert!(parts.iter().all(|part| part.format == Format::EightBy16));
        let all = StoredMatrix::concat(parts).unwrap();
        assert_eq!(all.outputs(), 9);
        assert!(all.weights() == exact.concat());
    }
}
