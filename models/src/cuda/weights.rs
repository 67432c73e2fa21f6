//! A model's weights on the device, as candle tensors.

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::{CudaDevice, cudarc::driver::DevicePtr};
use candle_core::{DType, Device, Storage, Tensor, bail};
use half::{bf16, f16};

use super::device_error;
use super::kernels::Address;
use super::quantized::Quantized;
use crate::decoder::built;
use crate::rope::inverse_frequencies;
use crate::weights::{EMBEDDING, FINAL_NORM, LayerWeights, OUTPUT, QUANTIZED, StoredLayer, Weights};
use crate::{Config, ModelError};

/// A tensor on the device and its address, which stays where it is as long as the tensor lives.
pub struct Held {
    pub address: Address,
    _tensor: Tensor,
}

impl Held {
    fn new(values: Vec<f32>, dtype: DType, device: &CudaDevice) -> candle_core::Result<Self> {
        let len = values.len();
        let tensor = Tensor::from_vec(values, len, &Device::Cpu)?.to_dtype(dtype)?;
        let held = tensor.to_device(&Device::Cuda(device.clone()))?;
        // The copy may read host memory until then.
        device.cuda_stream().synchronize().map_err(device_error)?;
        Ok(Self {
            address: address(&held)?,
            _tensor: held,
        })
    }
}

/// The address of a contiguous tensor on the device.
pub fn address(tensor: &Tensor) -> candle_core::Result<Address> {
    let (storage, layout) = tensor.storage_and_layout();
    let (Storage::Cuda(storage), Some((0, _))) = (&*storage, layout.contiguous_offsets()) else {
        bail!("a tensor of shape {:?} is not whole on the device", layout.shape())
    };
    let stream = storage.device.cuda_stream();
    Ok(match storage.dtype() {
        DType::F32 => storage.as_cuda_slice::<f32>()?.device_ptr(&stream).0,
        DType::BF16 => storage.as_cuda_slice::<bf16>()?.device_ptr(&stream).0,
        DType::F16 => storage.as_cuda_slice::<f16>()?.device_ptr(&stream).0,
        other => bail!("no kernels for {other:?}"),
    })
}

/// A weight matrix `[outputs, inputs]`.
pub enum Projection {
    Dense { held: Held, outputs: usize, inputs: usize },
    Quantized(Quantized),
}

pub struct Layer {
    pub attention_norm: Held,
    pub qkv: Projection,
    pub qkv_bias: Option<Held>,
    pub query_norm: Option<Held>,
    pub key_norm: Option<Held>,
    pub attention_output: Projection,
    pub mlp_norm: Held,
    /// Gate and up in one projection.
    pub gate_up: Projection,
    pub down: Projection,
}

/// All of a model's weights.
pub struct ModelWeights {
    pub embedding: Held,
    /// `None` where the output projection is the embedding table too.
    pub output: Option<Projection>,
    pub layers: Vec<Layer>,
    pub norm: Held,
    pub inverse_frequencies: Held,
}

/// Reads weights and puts them on the device.
struct Loader<'a> {
    weights: &'a Weights,
    config: &'a Config,
    device: &'a CudaDevice,
    dtype: DType,
    /// Whether matrices stay quantized that are.
    quantized: bool,
}

impl ModelWeights {
    /// Dense matrices as `dtype`; if `quantized`, those stay as they are which candle multiplies so, but for the embedding
    /// table.
    pub fn load(
        weights: &Weights,
        config: &Config,
        device: &CudaDevice,
        dtype: DType,
        quantized: bool,
    ) -> Result<Self, ModelError> {
        let loader = Loader {
            weights,
            config,
            device,
            dtype,
            quantized,
        };
        let table = [config.vocab_size, config.hidden_size];
        let output = || match loader.quantized(&[(OUTPUT.into(), table[0])], table[1])? {
            Some(quantized) => Ok(quantized),
            None => loader.dense(OUTPUT, weights.read(OUTPUT, &table)?, table[1]),
        };
        let inverse = inverse_frequencies(&config.rope, config.head_dim);
        Ok(Self {
            embedding: loader.hold(EMBEDDING, weights.read(EMBEDDING, &table)?, dtype)?,
            output: (!config.tie_word_embeddings).then(output).transpose()?,
            layers: (0..config.layers)
                .map(|index| loader.layer(index))
                .collect::<Result<_, _>>()?,
            norm: loader.vector(weights.read(FINAL_NORM, &[config.hidden_size])?)?,
            inverse_frequencies: loader.vector(inverse)?,
        })
    }
}

impl Loader<'_> {
    fn hold(&self, what: &str, values: Vec<f32>, dtype: DType) -> Result<Held, ModelError> {
        Held::new(values, dtype, self.device).map_err(built(what))
    }

    fn vector(&self, values: Vec<f32>) -> Result<Held, ModelError> {
        self.hold("a norm or bias", values, DType::F32)
    }

    fn dense(&self, what: &str, values: Vec<f32>, inputs: usize) -> Result<Projection, ModelError> {
        Ok(Projection::Dense {
            outputs: values.len() / inputs,
            inputs,
            held: self.hold(what, values, self.dtype)?,
        })
    }

    /// Matrices with so many outputs each as one projection, if they are to stay quantized and all of them are.
    fn quantized(&self, parts: &[(String, usize)], inputs: usize) -> Result<Option<Projection>, ModelError> {
        if !self.quantized {
            return Ok(None);
        }
        let device = Device::Cuda(self.device.clone());
        let read = self.weights.quantized(parts, inputs, QUANTIZED, &device)?;
        Ok(read.map(|parts| Projection::Quantized(Quantized::new(parts, inputs))))
    }

    fn layer(&self, index: usize) -> Result<Layer, ModelError> {
        let config = self.config;
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let queries = config.heads * config.head_dim;
        let stored = StoredLayer::read(config, index, |parts, inputs| self.quantized(parts, inputs))?;
        let read = LayerWeights::read(self.weights, config, index, |part| !stored.has(part))?;
        let optional = |values: Option<Vec<f32>>| values.map(|values| self.vector(values)).transpose();
        let or_dense = |held: Option<Projection>, what, values, inputs| match held {
            Some(quantized) => Ok(quantized),
            None => self.dense(what, values, inputs),
        };
        let gate_and_up = [read.gate.as_slice(), &read.up].concat();
        Ok(Layer {
            attention_norm: self.vector(read.attention_norm)?,
            qkv: or_dense(stored.qkv, "qkv", read.qkv, hidden)?,
            qkv_bias: optional(read.qkv_bias)?,
            query_norm: optional(read.query_norm)?,
            key_norm: optional(read.key_norm)?,
            attention_output: or_dense(
                stored.attention_output,
                "attention output",
                read.attention_output,
                queries,
            )?,
            mlp_norm: self.vector(read.mlp_norm)?,
            gate_up: or_dense(stored.gate_up, "gate and up projection", gate_and_up, hidden)?,
            down: or_dense(stored.down, "down projection", read.down, inner)?,
        })
    }
}
