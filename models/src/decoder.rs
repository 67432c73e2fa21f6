//! The decoder on the CPU: embedding, layers of attention and MLP, and the logits of the rows that are wanted.

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

use crate::cpu::attention::{Attention, Queries};
use crate::cpu::elementwise::{Half, ROWS_A_THREAD, RmsNorm, Rotate, Store};
use crate::cpu::linear::{GateUp, Linear};
use crate::cpu::panels::stored_as;
use crate::cpu::quantized::Rows;
use crate::kv::Pools;
use crate::rope::{cos_sin, inverse_frequencies};
use crate::weights::{EMBEDDING, FINAL_NORM, LayerWeights, OUTPUT, StoredLayer, Weights};
use crate::{Config, KvCache, ModelError, Step, without_backtrace};

/// A loaded model.
pub(crate) struct CpuDecoder {
    config: Config,
    device: Device,
    /// `None` where the output projection is the embedding table too.
    embedding: Option<Tensor>,
    layers: Vec<Layer>,
    norm: RmsNorm,
    output: Linear,
    inverse_frequencies: Vec<f32>,
}

struct Layer {
    attention_norm: RmsNorm,
    /// Queries, keys and values in one projection.
    qkv: Linear,
    query_norm: Option<RmsNorm>,
    key_norm: Option<RmsNorm>,
    attention_output: Linear,
    mlp_norm: RmsNorm,
    gate_up: GateUp,
    down: Linear,
}

/// What every layer of one step needs to know.
struct Pass<'a> {
    slots: Vec<usize>,
    cos: Tensor,
    sin: Tensor,
    queries: Vec<Queries<'a>>,
    /// The last layer's queries: only the rows whose logits are wanted.
    last_queries: Vec<Queries<'a>>,
    logit_rows: Tensor,
}

impl CpuDecoder {
    /// Packs a model's weights to be multiplied as `dtype` (f32, bf16 or f16); if `quantized`, quantized matrices stay
    /// quantized.
    pub fn load(weights: &Weights, config: Config, dtype: DType, quantized: bool) -> Result<Self, ModelError> {
        let device = &Device::Cpu;
        let loader = Loader {
            weights,
            config: &config,
            dtype,
            quantized,
        };
        // The largest tensor first, while little else is in memory.
        let (embedding, output) = loader.embedding_and_output(device)?;
        let layers = (0..config.layers)
            .map(|index| loader.layer(index))
            .collect::<Result<_, _>>()?;
        let norm = loader.norm(weights.read(FINAL_NORM, &[config.hidden_size])?);
        let inverse_frequencies = inverse_frequencies(&config.rope, config.head_dim);
        Ok(Self {
            device: device.clone(),
            embedding,
            layers,
            norm,
            output,
            inverse_frequencies,
            config,
        })
    }

    /// The model's settings.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Bytes of weights that a step reads.
    pub fn weight_bytes(&self) -> u64 {
        let layer = |layer: &Layer| {
            layer.qkv.bytes() + layer.attention_output.bytes() + layer.gate_up.bytes() + layer.down.bytes()
        };
        (self.output.bytes() + self.layers.iter().map(layer).sum::<usize>()) as u64
    }

    /// Runs a step that was checked; see [`crate::Decoder::forward`].
    pub fn forward(&self, step: &Step, cache: &mut KvCache) -> candle_core::Result<Tensor> {
        // One way into the thread pool for the whole step, instead of one for each operator.
        rayon::scope(|_| self.run(step, cache))
    }

    fn run(&self, step: &Step, cache: &KvCache) -> candle_core::Result<Tensor> {
        let pass = self.pass(step, cache)?;
        let mut x = self.embed(&step.tokens)?;
        for (index, (layer, pools)) in self.layers.iter().zip(&cache.layers).enumerate() {
            let qkv = layer.qkv(&x, &pass, pools, &self.config)?;
            if index + 1 < self.layers.len() {
                layer.finish(&x, &qkv, &pass.queries, pools, &self.config)?;
                continue;
            }
            // The last layer's keys and values are stored; the rest of it matters only for the rows that answer.
            if pass.last_queries.is_empty() {
                return Tensor::zeros((0, self.config.vocab_size), DType::F32, &self.device);
            }
            x = x.index_select(&pass.logit_rows, 0)?;
            let qkv = qkv.index_select(&pass.logit_rows, 0)?;
            layer.finish(&x, &qkv, &pass.last_queries, pools, &self.config)?;
        }
        self.output.forward(&self.norm.forward(&x)?)
    }

    fn pass<'a>(&self, step: &'a Step, cache: &KvCache) -> candle_core::Result<Pass<'a>> {
        let (cos, sin) = cos_sin(&self.inverse_frequencies, &step.positions());
        let shape = (step.tokens.len(), self.config.head_dim / 2);
        let mut row = 0;
        let mut queries = Vec::new();
        let mut last_queries = Vec::new();
        for span in &step.sequences {
            let block_table = span.block_table.as_slice();
            queries.push(Queries {
                row,
                start: span.start,
                len: span.len,
                block_table,
            });
            if span.logits {
                let start = span.start + span.len - 1;
                last_queries.push(Queries {
                    row: last_queries.len(),
                    start,
                    len: 1,
                    block_table,
                });
            }
            row += span.len;
        }
        Ok(Pass {
            slots: step.slots(cache.block_size()),
            cos: Tensor::from_vec(cos, shape, &self.device)?,
            sin: Tensor::from_vec(sin, shape, &self.device)?,
            logit_rows: Tensor::from_vec(step.logit_rows(), last_queries.len(), &self.device)?,
            queries,
            last_queries,
        })
    }

    /// Rows of the embedding table: `[tokens, hidden_size]`.
    fn embed(&self, tokens: &[u32]) -> candle_core::Result<Tensor> {
        match &self.embedding {
            None => self.output.gather(tokens, &self.device),
            Some(table) => table
                .index_select(&Tensor::new(tokens, &self.device)?, 0)?
                .to_dtype(DType::F32),
        }
    }
}

impl Layer {
    /// The step's queries, keys and values, rotated, the latter two in the cache as well.
    fn qkv(&self, x: &Tensor, pass: &Pass, pools: &Pools, config: &Config) -> candle_core::Result<Tensor> {
        let qkv = self.qkv.forward(&self.attention_norm.forward(x)?)?;
        let rotate = Rotate {
            query_heads: config.heads,
            key_heads: config.kv_heads,
            head_dim: config.head_dim,
            query_norm: self.query_norm.as_ref(),
            key_norm: self.key_norm.as_ref(),
        };
        rotate.forward(&qkv, &pass.cos, &pass.sin)?;
        let keys_at = config.heads * config.head_dim;
        let values_at = keys_at + config.kv_heads * config.head_dim;
        let store = |half, column, pool: &Tensor| {
            let slots = &pass.slots;
            Store { half, slots, column }.forward(pool, &qkv)
        };
        let keys = || store(Half::Keys, keys_at, &pools.keys);
        let values = || store(Half::Values, values_at, &pools.values);
        let (keys, values) = match pass.slots.len() {
            ..ROWS_A_THREAD => (keys(), values()),
            _ => rayon::join(keys, values),
        };
        keys.and(values)?;
        Ok(qkv)
    }

    /// The layer's attention and MLP, added to `x` in place.
    fn finish(
        &self,
        x: &Tensor,
        qkv: &Tensor,
        queries: &[Queries],
        pools: &Pools,
        config: &Config,
    ) -> candle_core::Result<()> {
        let attention = Attention {
            queries,
            heads: config.heads,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            window: config.sliding_window,
        };
        self.attention_output
            .add_to(x, &attention.forward(qkv, &pools.keys, &pools.values)?)?;
        self.down.add_to(x, &self.gate_up.forward(&self.mlp_norm.forward(x)?)?)
    }
}

/// Reads and packs weights.
struct Loader<'a> {
    weights: &'a Weights,
    config: &'a Config,
    dtype: DType,
    /// Whether quantized matrices stay quantized.
    quantized: bool,
}

impl Loader<'_> {
    /// The embedding table, unless it is the output projection as well, and that projection.
    fn embedding_and_output(&self, device: &Device) -> Result<(Option<Tensor>, Linear), ModelError> {
        let shape @ [vocabulary, hidden] = [self.config.vocab_size, self.config.hidden_size];
        let projection = |name: &str| match self.stored(&[(name.into(), vocabulary)], hidden)? {
            None => self.linear(name, None, self.weights.read(name, &shape)?, hidden, None),
            stored => self.linear(name, stored, Vec::new(), hidden, None),
        };
        if self.config.tie_word_embeddings {
            return Ok((None, projection(EMBEDDING)?));
        }
        let table = self.weights.read(EMBEDDING, &shape)?;
        let dtype = stored_as(self.dtype, &[&table]);
        let table = Tensor::from_vec(table, shape.as_slice(), device)
            .and_then(|table| table.to_dtype(dtype))
            .map_err(built(EMBEDDING))?;
        Ok((Some(table), projection(OUTPUT)?))
    }

    /// Matrices with so many outputs each, all in as many bits, if they are to stay quantized and all of them are.
    fn stored(&self, parts: &[(String, usize)], inputs: usize) -> Result<Option<Vec<Rows>>, ModelError> {
        if !self.quantized {
            return Ok(None);
        }
        let read = |(name, outputs): &(String, usize)| {
            let stored = self.weights.quantized(name, [*outputs, inputs], &Device::Cpu)?;
            stored
                .map(|stored| Rows::read(&stored).map_err(built(name)))
                .transpose()
        };
        let read: Vec<Option<Rows>> = parts.par_iter().map(read).collect::<Result<_, _>>()?;
        Ok(read.into_iter().collect::<Option<_>>().map(Rows::alike))
    }

    fn layer(&self, index: usize) -> Result<Layer, ModelError> {
        let config = self.config;
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let queries = config.heads * config.head_dim;
        let stored = StoredLayer::read(config, index, |parts, inputs| self.stored(parts, inputs))?;
        let read = LayerWeights::read(self.weights, config, index, |part| !stored.has(part))?;
        let norm = |weight| self.norm(weight);
        let gate_up = match stored.gate_up.as_deref() {
            Some([gate, up]) => GateUp::quantized(gate, up),
            _ => GateUp::new(&read.gate, &read.up, hidden, self.dtype),
        };
        let output = "attention output";
        Ok(Layer {
            attention_norm: norm(read.attention_norm),
            qkv: self.linear("qkv", stored.qkv, read.qkv, hidden, read.qkv_bias)?,
            query_norm: read.query_norm.map(norm),
            key_norm: read.key_norm.map(norm),
            attention_output: self.linear(output, stored.attention_output, read.attention_output, queries, None)?,
            mlp_norm: norm(read.mlp_norm),
            gate_up: gate_up.map_err(built("gate and up projection"))?,
            down: self.linear("down projection", stored.down, read.down, inner, None)?,
        })
    }

    fn norm(&self, weight: Vec<f32>) -> RmsNorm {
        RmsNorm {
            weight,
            eps: self.config.rms_norm_eps as f32,
        }
    }

    /// Of what is `stored` quantized, or else of `weight`.
    fn linear(
        &self,
        what: &str,
        stored: Option<Vec<Rows>>,
        weight: Vec<f32>,
        inputs: usize,
        bias: Option<Vec<f32>>,
    ) -> Result<Linear, ModelError> {
        match stored.and_then(Rows::concat) {
            Some(rows) => Ok(Linear::quantized(&rows, bias)),
            None => Linear::new(&weight, inputs, bias, self.dtype).map_err(built(what)),
        }
    }
}

pub(crate) fn built(what: &str) -> impl FnOnce(candle_core::Error) -> ModelError {
    let what = what.to_string();
    move |error| ModelError::Tensor {
        what,
        source: without_backtrace(error),
    }
}
