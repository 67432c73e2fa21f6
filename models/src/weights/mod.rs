//! A model's files: its settings, and its tensors by their Hugging Face names as rows of float32.

mod gguf;
mod layer;
mod random;
mod safetensors;

use std::path::Path;

use candle_core::Device;
use candle_core::quantized::{GgmlDType, QTensor};

use crate::{Config, ModelError};

pub(crate) use layer::{EMBEDDING, FINAL_NORM, LayerWeights, OUTPUT, StoredLayer};

/// Types that are multiplied as they are stored, or on the CPU rounded to one that is.
pub(crate) const QUANTIZED: &[GgmlDType] = {
    use GgmlDType::{Q2K, Q3K, Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0};
    &[Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2K, Q3K, Q4K, Q5K, Q6K]
};

/// Where a model's tensors come from.
pub(crate) enum Weights {
    Gguf(gguf::GgufFile),
    Safetensors(safetensors::Folder),
    /// Random numbers of any shape.
    Random,
}

impl Weights {
    /// Opens a GGUF file, or a folder with `config.json` and safetensors, and reads the model's settings.
    pub fn open(path: &Path) -> Result<(Self, Config), ModelError> {
        if path.is_dir() {
            let config = Config::from_json(&path.join("config.json"))?;
            return Ok((Self::Safetensors(safetensors::Folder::open(path)?), config));
        }
        let (file, config) = gguf::GgufFile::open(path)?;
        Ok((Self::Gguf(file), config))
    }

    /// Tensor `name`, which must have `shape`, row-major in float32.
    pub fn read(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, ModelError> {
        match self {
            Self::Gguf(file) => file.read(name, shape),
            Self::Safetensors(folder) => folder.read(name, shape),
            Self::Random => Ok(random::tensor(name, shape)),
        }
    }

    /// Matrices that belong together, by name and outputs, on `device` as they are stored; `None` unless a GGUF file has all
    /// of them as one of `types`.
    pub fn quantized(
        &self,
        parts: &[(String, usize)],
        inputs: usize,
        types: &[GgmlDType],
        device: &Device,
    ) -> Result<Option<Vec<QTensor>>, ModelError> {
        let Self::Gguf(file) = self else {
            return Ok(None);
        };
        let is_one = |(name, _): &(String, usize)| file.stored_as(name).is_some_and(|dtype| types.contains(&dtype));
        if !parts.iter().all(is_one) {
            return Ok(None);
        }
        let read = parts
            .iter()
            .map(|(name, outputs)| file.quantized(name, [*outputs, inputs], device));
        read.collect::<Result<_, _>>().map(Some)
    }
}

/// Refuses a tensor of another shape than the settings ask for.
fn check_shape(path: &Path, name: &str, expected: &[usize], found: &[usize]) -> Result<(), ModelError> {
    if expected == found {
        return Ok(());
    }
    Err(ModelError::WrongShape {
        path: path.into(),
        name: name.into(),
        expected: expected.into(),
        found: found.into(),
    })
}
