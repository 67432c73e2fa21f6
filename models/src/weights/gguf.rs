//! Tensors of a GGUF file, one at a time: dequantized, or as they are stored.

use std::borrow::Cow;
use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};

use candle_core::Device;
use candle_core::quantized::gguf_file::Content;
use candle_core::quantized::{GgmlDType, QStorage, QTensor};

use super::check_shape;
use crate::config::{ARCHITECTURES, Metadata};
use crate::{Config, ModelError, RopeScaling, without_backtrace};

/// An open GGUF file.
pub(crate) struct GgufFile {
    path: PathBuf,
    content: Content,
    /// `(query heads, KV heads)` where the file keeps the rows of Q and K in interleaved pairs.
    permuted: Option<(usize, usize)>,
}

impl GgufFile {
    /// Reads the header and the settings in it.
    pub fn open(path: &Path) -> Result<(Self, Config), ModelError> {
        let mut reader = BufReader::new(open(path)?);
        let content = Content::read(&mut reader).map_err(|e| corrupt(path, without_backtrace(e)))?;
        let metadata = Metadata { content: &content };
        let found = metadata.architecture();
        if !ARCHITECTURES.contains(&found.as_str()) {
            return Err(ModelError::UnsupportedArchitecture {
                path: path.into(),
                found,
            });
        }
        let setting = |(key, problem)| ModelError::Setting {
            path: path.into(),
            key,
            problem,
        };
        let mut config = metadata.config().map_err(setting)?;
        let permuted = matches!(found.as_str(), "llama" | "mistral").then_some((config.heads, config.kv_heads));
        let file = Self {
            path: path.into(),
            content,
            permuted,
        };
        if file.content.tensor_infos.contains_key("rope_freqs.weight") {
            config.rope.scaling = RopeScaling::Divisors(file.load("rope_freqs.weight", &[config.head_dim / 2])?);
        }
        Ok((file, config))
    }

    /// See [`super::Weights::read`].
    pub fn read(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, ModelError> {
        let data = self.load(&gguf_name(name), shape)?;
        Ok(match self.permuted_heads(name) {
            Some(heads) => deinterleave_rows(&data, heads, shape[0]),
            None => data,
        })
    }

    /// How many heads' rows are to be put back in order.
    fn permuted_heads(&self, name: &str) -> Option<usize> {
        let (heads, kv_heads) = self.permuted?;
        match name {
            name if name.ends_with("q_proj.weight") => Some(heads),
            name if name.ends_with("k_proj.weight") => Some(kv_heads),
            _ => None,
        }
    }

    /// The type that the file has `name` in, if it has it.
    pub fn stored_as(&self, name: &str) -> Option<GgmlDType> {
        let info = self.content.tensor_infos.get(&gguf_name(name))?;
        Some(info.ggml_dtype)
    }

    /// A matrix as it is stored, on `device`.
    pub fn quantized(&self, name: &str, shape: [usize; 2], device: &Device) -> Result<QTensor, ModelError> {
        let stored = self.stored(&gguf_name(name), &shape)?;
        let dtype = stored.dtype();
        let placed = || {
            let mut rows = stored.data()?;
            if let Some(heads) = self.permuted_heads(name) {
                // A row is a whole number of blocks.
                rows = Cow::Owned(deinterleave_rows(&rows, heads, shape[0]));
            }
            QTensor::new(QStorage::from_data(rows, device, dtype)?, &shape)
        };
        placed().map_err(|source| ModelError::Tensor {
            what: name.into(),
            source: without_backtrace(source),
        })
    }

    /// The tensor of GGUF name `name`, dequantized.
    fn load(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, ModelError> {
        let quantized = self.stored(name, shape)?;
        let read = || quantized.dequantize(&Device::Cpu)?.flatten_all()?.to_vec1();
        read().map_err(|e| self.unreadable(name, e))
    }

    /// The tensor of GGUF name `name`. Every call opens the file anew, so that threads may load side by side.
    fn stored(&self, name: &str, shape: &[usize]) -> Result<QTensor, ModelError> {
        let missing = || ModelError::MissingTensor {
            path: self.path.clone(),
            name: name.into(),
        };
        let info = self.content.tensor_infos.get(name).ok_or_else(missing)?;
        check_shape(&self.path, name, shape, info.shape.dims())?;
        let read = || {
            let mut file = File::open(&self.path)?;
            info.read(&mut file, self.content.tensor_data_offset, &Device::Cpu)
        };
        read().map_err(|e| self.unreadable(name, e))
    }

    fn unreadable(&self, name: &str, error: candle_core::Error) -> ModelError {
        corrupt(&self.path, format!("tensor {name}: {}", without_backtrace(error)))
    }
}

fn open(path: &Path) -> Result<File, ModelError> {
    File::open(path).map_err(|source| ModelError::Io {
        path: path.into(),
        source,
    })
}

fn corrupt(path: &Path, reason: impl ToString) -> ModelError {
    // candle's errors may carry a backtrace on further lines.
    let reason = reason.to_string().lines().next().unwrap_or_default().trim().to_string();
    ModelError::Corrupt {
        path: path.into(),
        reason,
    }
}

/// GGUF's name of a tensor, from its Hugging Face name.
fn gguf_name(name: &str) -> String {
    const NAMES: [(&str, &str); 14] = [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("model.layers", "blk"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
    ];
    let mut renamed = name.replace("mlp.down_proj", "ffn_down");
    for (from, to) in NAMES {
        renamed = renamed.replace(from, to);
    }
    renamed
}

/// Undoes the order in which llama.cpp stores Q and K of the Llama family: each head's rows in pairs `(i, i + half)`
/// side by side, as its interleaved rotation wants them.
fn deinterleave_rows<T: Copy>(data: &[T], heads: usize, rows: usize) -> Vec<T> {
    let width = data.len() / rows;
    let dim = rows / heads;
    let source = |row: usize| {
        let (head, within) = (row / dim, row % dim);
        head * dim + (within % (dim / 2)) * 2 + within / (dim / 2)
    };
    (0..rows)
        .flat_map(|row| data[source(row) * width..][..width].iter().copied())
        .collect()
}

#[cfg(test)]
mod tests {
    use candle_core::Tensor;
    use candle_core::quantized::gguf_file;

    use super::*;

    #[test]
    fn names_are_llama_cpps() {
        assert_eq!(gguf_name("model.layers.3.self_attn.q_proj.bias"), "blk.3.attn_q.bias");
        assert_eq!(
            gguf_name("model.layers.0.self_attn.k_norm.weight"),
            "blk.0.attn_k_norm.weight"
        );
        assert_eq!(
            gguf_name("model.layers.12.post_attention_layernorm.weight"),
            "blk.12.ffn_norm.weight"
        );
        assert_eq!(
            gguf_name("model.layers.1.mlp.down_proj.weight"),
            "blk.1.ffn_down.weight"
        );
        assert_eq!(gguf_name("model.norm.weight"), "output_norm.weight");
        assert_eq!(gguf_name("lm_head.weight"), "output.weight");
    }

    #[test]
    fn rows_of_a_pair_return_to_both_halves_of_the_head() {
        // Two heads of four rows: stored 0 2 1 3 of each head, one column.
        let stored = [0., 2., 1., 3., 10., 12., 11., 13.];
        assert_eq!(deinterleave_rows(&stored, 2, 8), [0., 1., 2., 3., 10., 11., 12., 13.]);
    }

    #[test]
    fn what_stays_quantized_stands_for_the_numbers_that_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        let values = (0..8 * 64).map(|index| (index * 37 % 101) as f32 - 50.0);
        let values = Tensor::from_vec(values.collect::<Vec<_>>(), (8, 64), &Device::Cpu).unwrap();
        let store = |dtype| QTensor::quantize(&values, dtype).unwrap();
        let (quantized, dense) = (store(GgmlDType::Q4_1), store(GgmlDType::F32));
        let tensors = [
            ("blk.0.attn_q.weight", &quantized),
            ("blk.0.attn_v.weight", &quantized),
            ("blk.0.attn_k.weight", &dense),
        ];
        gguf_file::write(&mut File::create(&path).unwrap(), &[], &tensors).unwrap();
        let file = GgufFile {
            content: Content::read(&mut File::open(&path).unwrap()).unwrap(),
            path,
            permuted: Some((2, 2)),
        };
        let name = |part| format!("model.layers.0.self_attn.{part}_proj.weight");
        let read = |part| file.read(&name(part), &[8, 64]).unwrap();
        let stored = |part| file.quantized(&name(part), [8, 64], &Device::Cpu).unwrap();
        for part in ["q", "v"] {
            let numbers = stored(part).dequantize(&Device::Cpu).unwrap();
            assert_eq!(numbers.flatten_all().unwrap().to_vec1::<f32>().unwrap(), read(part));
        }
        assert_ne!(read("q"), read("v"), "the heads' rows are put back in order");
        let types = ["q", "k"].map(|part| file.stored_as(&name(part)));
        assert_eq!(types, [Some(GgmlDType::Q4_1), Some(GgmlDType::F32)]);
    }
}
