//! A loaded model, on whichever device.

use std::path::Path;

use candle_core::{DType, Device, Result, Tensor, bail};

use crate::ceilings::Arithmetic;
#[cfg(feature = "cuda")]
use crate::cuda::CudaDecoder;
use crate::decoder::CpuDecoder;
use crate::weights::Weights;
use crate::{Config, Draw, KvCache, ModelError, Step};

/// A loaded model.
pub struct Decoder(On);

/// The tokens of a step that was put on the device: [`Decoder::wait`] has them once it has run.
pub struct Pending(#[cfg(feature = "cuda")] crate::cuda::Sampled);

/// Tokens that a step goes on from before the host knows them.
pub struct Carried<'a> {
    /// The step that chooses them, the last that was enqueued to choose any.
    pub from: &'a Pending,
    /// Places in the new step's tokens, and which of the rows of `from` each one is.
    pub tokens: Vec<(usize, usize)>,
}

/// A GPU's memory, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GpuMemory {
    pub total: u64,
    /// Taken by weights, by what the largest step needs, and by other programs.
    pub taken: u64,
}

impl GpuMemory {
    /// What is left of a share of it.
    pub fn left(&self, share: f64) -> u64 {
        ((self.total as f64 * share) as u64).saturating_sub(self.taken)
    }
}

/// Where on the PCI bus the GPU of this ordinal is, `domain:bus:device.function` as NVIDIA's tools write it: their own
/// ordinals are others where `CUDA_VISIBLE_DEVICES` or `CUDA_DEVICE_ORDER` say so. `None` where there is no such GPU, or
/// no CUDA.
#[cfg_attr(
    not(feature = "cuda"),
    expect(unused_variables, reason = "there is no GPU to ask for")
)]
pub fn pci_bus_id(ordinal: usize) -> Option<String> {
    #[cfg(feature = "cuda")]
    return crate::cuda::pci_bus_id(ordinal);
    #[cfg(not(feature = "cuda"))]
    None
}

enum On {
    Cpu(Box<CpuDecoder>),
    #[cfg(feature = "cuda")]
    Cuda(Box<CudaDecoder>),
}

impl Decoder {
    /// Loads a model from a `.gguf` file, or from a folder with `config.json` and safetensors. Weights are stored as
    /// `dtype`: f32, bf16 or f16. With f32 on the CPU, matrices that the file has in bfloat16 or in blocks of four to eight
    /// bits stay small, and stand for the same numbers.
    pub fn load(path: &Path, device: &Device, dtype: DType) -> std::result::Result<Self, ModelError> {
        let (weights, config) = Weights::open(path)?;
        Self::from_weights(&weights, config, device, dtype, false)
    }

    /// As [`Self::load`], with the matrices of a GGUF file multiplied as it stores them, activations rounded to eight bits;
    /// what is not quantized in the file is stored as `dtype`, and on a GPU the embedding table too. On the CPU Q4_0, Q4_1,
    /// Q5_0 and Q8_0 are kept as they are and Q4_K nearly so; others are rounded to eight bits, and so are those in four
    /// beside one in eight in one projection.
    pub fn load_quantized(path: &Path, device: &Device, dtype: DType) -> std::result::Result<Self, ModelError> {
        let (weights, config) = Weights::open(path)?;
        if !matches!(weights, Weights::Gguf(_)) {
            return Err(ModelError::NotQuantized { path: path.into() });
        }
        Self::from_weights(&weights, config, device, dtype, true)
    }

    /// A model of the shape in a `config.json`, with random weights: to measure speed where weights cannot be had. What it
    /// generates means nothing.
    pub fn dummy(path: &Path, device: &Device, dtype: DType) -> std::result::Result<Self, ModelError> {
        let config = Config::from_json(path)?;
        Self::from_weights(&Weights::Random, config, device, dtype, false)
    }

    fn from_weights(
        weights: &Weights,
        config: Config,
        device: &Device,
        dtype: DType,
        quantized: bool,
    ) -> std::result::Result<Self, ModelError> {
        if !matches!(dtype, DType::F32 | DType::BF16 | DType::F16) {
            return Err(ModelError::UnsupportedDType {
                found: dtype.as_str().into(),
            });
        }
        match device {
            Device::Cpu => Ok(Self(On::Cpu(Box::new(CpuDecoder::load(
                weights, config, dtype, quantized,
            )?)))),
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => Ok(Self(On::Cuda(Box::new(CudaDecoder::load(
                weights, config, device, dtype, quantized,
            )?)))),
            other => Err(ModelError::UnsupportedDevice {
                device: format!("{:?}", other.location()),
            }),
        }
    }

    /// The model's settings.
    pub fn config(&self) -> &Config {
        match &self.0 {
            On::Cpu(decoder) => decoder.config(),
            #[cfg(feature = "cuda")]
            On::Cuda(decoder) => decoder.config(),
        }
    }

    /// How it multiplies by most of its weights.
    pub fn arithmetic(&self) -> Arithmetic {
        match &self.0 {
            On::Cpu(decoder) => decoder.arithmetic(),
            #[cfg(feature = "cuda")]
            On::Cuda(_) => Arithmetic::Numbers,
        }
    }

    /// Bytes of weights that a step reads; `None` where they are on a GPU.
    pub fn weight_bytes(&self) -> Option<u64> {
        match &self.0 {
            On::Cpu(decoder) => Some(decoder.weight_bytes()),
            #[cfg(feature = "cuda")]
            On::Cuda(_) => None,
        }
    }

    /// Runs a step: writes its tokens' keys and values into `cache`, and answers the logits (float32,
    /// `[logit rows, vocab_size]`, on the CPU) of the last token of each span that asks for them, in order. A step that
    /// does not fit the model or the cache is refused before anything is written.
    pub fn forward(&self, step: &Step, cache: &mut KvCache) -> Result<Tensor> {
        match &self.0 {
            On::Cpu(_) => {
                let mut logits = Vec::new();
                self.logits(step, cache, &mut logits)?;
                let columns = self.config().vocab_size;
                Tensor::from_vec(logits, (step.logit_rows().len(), columns), &Device::Cpu)
            }
            #[cfg(feature = "cuda")]
            On::Cuda(decoder) => {
                step.check(self.config(), cache)?;
                decoder.forward(step, cache)
            }
        }
    }

    /// As [`Self::forward`], with the logits row by row in `logits`, whose memory the CPU uses again. After an error its
    /// contents mean nothing.
    pub fn logits(&self, step: &Step, cache: &mut KvCache, logits: &mut Vec<f32>) -> Result<()> {
        step.check(self.config(), cache)?;
        match &self.0 {
            On::Cpu(decoder) => decoder.logits(step, cache, logits),
            #[cfg(feature = "cuda")]
            On::Cuda(decoder) => {
                *logits = decoder.forward(step, cache)?.flatten_all()?.to_vec1()?;
                Ok(())
            }
        }
    }

    /// Whether the device chooses tokens itself: [`Self::sample`] works.
    pub fn samples(&self) -> bool {
        !matches!(self.0, On::Cpu(_))
    }

    /// Runs a step as [`Self::forward`] does and chooses a token for each row of logits by its draw, on the device; `None`
    /// where a logit is not a finite number. What is in the rows' slots stays with `cache`; after an error it is not to be
    /// relied upon.
    pub fn sample(&self, step: &Step, cache: &mut KvCache, draws: &[Draw]) -> Result<Vec<Option<u32>>> {
        let pending = self.enqueue(step, cache, draws, None)?;
        self.wait(pending, cache)
    }

    /// Begins what [`Self::sample`] does, behind the steps that were enqueued before, and does not wait for any of them.
    /// Whatever stands in `step` for tokens that are `carried` does not matter.
    pub fn enqueue(
        &self,
        step: &Step,
        cache: &mut KvCache,
        draws: &[Draw],
        carried: Option<Carried>,
    ) -> Result<Pending> {
        step.check(self.config(), cache)?;
        match &self.0 {
            On::Cpu(_) => {
                let carried = carried.map_or(0, |carried| carried.tokens.len());
                bail!(
                    "the CPU answers logits; {} draws cannot be made there, nor {carried} tokens carried on",
                    draws.len()
                )
            }
            #[cfg(feature = "cuda")]
            On::Cuda(decoder) => {
                let carried = carried
                    .as_ref()
                    .map(|carried| (&carried.from.0, carried.tokens.as_slice()));
                decoder.enqueue(step, cache, draws, carried).map(Pending)
            }
        }
    }

    /// Waits until a step that was enqueued on `cache` has run, and gives what [`Self::sample`] does.
    #[cfg_attr(
        not(feature = "cuda"),
        expect(unused_variables, reason = "the CPU has nothing under way")
    )]
    pub fn wait(&self, pending: Pending, cache: &mut KvCache) -> Result<Vec<Option<u32>>> {
        match &self.0 {
            On::Cpu(_) => bail!("the CPU has no step under way"),
            #[cfg(feature = "cuda")]
            On::Cuda(decoder) => decoder.wait(pending.0, cache),
        }
    }

    /// Takes the memory for steps on `cache` of up to `tokens` tokens, of which `rows` want logits, and if `graphs`, captures
    /// the decodes that [`Self::sample`] will run as CUDA graphs. Without it, and on the CPU, memory is taken as steps come.
    #[cfg_attr(not(feature = "cuda"), expect(unused_variables, reason = "they concern GPUs alone"))]
    pub fn prepare(&self, cache: &mut KvCache, tokens: usize, rows: usize, graphs: bool) -> Result<()> {
        match &self.0 {
            On::Cpu(_) => Ok(()),
            #[cfg(feature = "cuda")]
            On::Cuda(decoder) => decoder.prepare(cache, tokens, rows, graphs),
        }
    }

    /// How much of a GPU's memory is taken by all but a KV cache. Runs the largest step to find out: `tokens` tokens, of which
    /// `rows` want logits. `None` for the CPU, whose memory is not ours alone.
    #[cfg_attr(not(feature = "cuda"), expect(unused_variables, reason = "they concern GPUs alone"))]
    pub fn memory_beside_kv(&self, tokens: usize, rows: usize) -> Result<Option<GpuMemory>> {
        match &self.0 {
            On::Cpu(_) => Ok(None),
            #[cfg(feature = "cuda")]
            On::Cuda(decoder) => decoder.memory_beside_kv(tokens, rows).map(Some),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Span;

    #[test]
    fn random_weights_give_finite_logits_and_the_same_each_time() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.json");
        let config = r#"{"model_type": "qwen3", "hidden_size": 48, "intermediate_size": 80, "vocab_size": 300,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
            "rms_norm_eps": 1e-6, "max_position_embeddings": 64}"#;
        std::fs::write(&path, config).unwrap();
        let logits = || {
            let decoder = Decoder::dummy(&path, &Device::Cpu, DType::F32).unwrap();
            let mut cache = KvCache::new(decoder.config(), 1, 16, DType::F32, &Device::Cpu).unwrap();
            let span = Span {
                start: 0,
                len: 3,
                block_table: vec![0],
                logits: true,
            };
            let step = Step {
                tokens: vec![5, 299, 0],
                sequences: vec![span],
            };
            assert!(!decoder.samples() && decoder.sample(&step, &mut cache, &[]).is_err());
            assert_eq!(decoder.memory_beside_kv(3, 1).unwrap(), None);
            decoder.forward(&step, &mut cache).unwrap().to_vec2::<f32>().unwrap()
        };
        let first = logits();
        let spread = first[0].iter().map(|v| v * v).sum::<f32>() / 300.0;
        assert!(spread.is_finite() && spread > 0.1, "{spread}");
        assert_eq!(first, logits());
    }
}
