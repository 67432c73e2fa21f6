//! A model's weights on the device, as candle tensors.

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::{CudaDevice, cudarc::driver::DevicePtr};
use candle_core::{DType, Device, Storage, Tensor, bail};
use half::{bf16, f16};

use super::blas::Matrix;
use super::kernels::Address;
use crate::decoder::built;
use crate::rope::inverse_frequencies;
use crate::weights::{EMBEDDING, FINAL_NORM, LayerWeights, OUTPUT, Weights};
use crate::{Config, ModelError};

/// A tensor on the device and its address, which stays where it is as long as the tensor lives.
pub struct Held {
    pub address: Address,
    _tensor: Tensor,
}

impl Held {
    fn new(values: Vec<f32>, dtype: DType, device: &CudaDevice) -> candle_core::Result<Self> {
        let len = values.len();
        let tensor = Tensor::from_vec(values, len, &Device::Cpu)?
            .to_dtype(dtype)?
            .to_device(&Device::Cuda(device.clone()))?;
        Ok(Self {
            address: address(&tensor)?,
            _tensor: tensor,
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

/// A matrix and its size.
pub struct Projection {
    held: Held,
    outputs: usize,
    inputs: usize,
}

impl Projection {
    pub fn matrix(&self) -> Matrix {
        Matrix {
            weights: self.held.address,
            outputs: self.outputs,
            inputs: self.inputs,
        }
    }
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
    output: Option<Held>,
    pub layers: Vec<Layer>,
    pub norm: Held,
    pub inverse_frequencies: Held,
    vocabulary: usize,
    hidden: usize,
}

impl ModelWeights {
    pub fn load(weights: &Weights, config: &Config, device: &CudaDevice, dtype: DType) -> Result<Self, ModelError> {
        let hold = |what: &str, values, dtype| Held::new(values, dtype, device).map_err(built(what));
        let table = |name: &str| {
            let shape = [config.vocab_size, config.hidden_size];
            hold(name, weights.read(name, &shape)?, dtype)
        };
        let layer = |index| layer(LayerWeights::read(weights, config, index)?, config, device, dtype);
        let norm = weights.read(FINAL_NORM, &[config.hidden_size])?;
        let inverse = inverse_frequencies(&config.rope, config.head_dim);
        Ok(Self {
            embedding: table(EMBEDDING)?,
            output: (!config.tie_word_embeddings).then(|| table(OUTPUT)).transpose()?,
            layers: (0..config.layers).map(layer).collect::<Result<_, _>>()?,
            norm: hold("norm", norm, DType::F32)?,
            inverse_frequencies: hold("rotary frequencies", inverse, DType::F32)?,
            vocabulary: config.vocab_size,
            hidden: config.hidden_size,
        })
    }

    /// The projection to the vocabulary.
    pub fn output(&self) -> Matrix {
        Matrix {
            weights: self.output.as_ref().unwrap_or(&self.embedding).address,
            outputs: self.vocabulary,
            inputs: self.hidden,
        }
    }
}

fn layer(read: LayerWeights, config: &Config, device: &CudaDevice, dtype: DType) -> Result<Layer, ModelError> {
    let vector = |values: Vec<f32>| Held::new(values, DType::F32, device).map_err(built("a norm or bias"));
    let optional = |values: Option<Vec<f32>>| values.map(vector).transpose();
    let projection = |what: &str, values: Vec<f32>, inputs: usize| {
        Ok(Projection {
            outputs: values.len() / inputs,
            inputs,
            held: Held::new(values, dtype, device).map_err(built(what))?,
        })
    };
    let (hidden, queries) = (config.hidden_size, config.heads * config.head_dim);
    let gate_up = [read.gate.as_slice(), &read.up].concat();
    Ok(Layer {
        attention_norm: vector(read.attention_norm)?,
        qkv: projection("qkv", read.qkv, hidden)?,
        qkv_bias: optional(read.qkv_bias)?,
        query_norm: optional(read.query_norm)?,
        key_norm: optional(read.key_norm)?,
        attention_output: projection("attention output", read.attention_output, queries)?,
        mlp_norm: vector(read.mlp_norm)?,
        gate_up: projection("gate and up projection", gate_up, hidden)?,
        down: projection("down projection", read.down, config.intermediate_size)?,
    })
}
