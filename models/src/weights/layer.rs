//! The tensors of a decoder by what they are for.

use rayon::prelude::*;

use super::Weights;
use crate::{Config, ModelError};

pub(crate) const EMBEDDING: &str = "model.embed_tokens.weight";
pub(crate) const OUTPUT: &str = "lm_head.weight";
pub(crate) const FINAL_NORM: &str = "model.norm.weight";

/// The name of a layer's tensor, from its name within the layer.
pub(crate) fn layer_name(index: usize, part: &str) -> String {
    format!("model.layers.{index}.{part}")
}

/// The matrices of a layer that stay in a file's blocks: those which `T` was made of.
pub(crate) struct StoredLayer<T> {
    /// Queries, keys and values.
    pub qkv: Option<T>,
    pub attention_output: Option<T>,
    /// Gate and up.
    pub gate_up: Option<T>,
    pub down: Option<T>,
}

impl<T> StoredLayer<T> {
    /// `stored` is asked with the names and the outputs of matrices that belong together, and their inputs.
    pub fn read(
        config: &Config,
        index: usize,
        stored: impl Fn(&[(String, usize)], usize) -> Result<Option<T>, ModelError>,
    ) -> Result<Self, ModelError> {
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let (queries, keys) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        let matrices = |parts: &[(&str, usize)], inputs| {
            let named = parts.iter().map(|(part, outputs)| (layer_name(index, part), *outputs));
            stored(&named.collect::<Vec<_>>(), inputs)
        };
        let qkv = [
            ("self_attn.q_proj.weight", queries),
            ("self_attn.k_proj.weight", keys),
            ("self_attn.v_proj.weight", keys),
        ];
        Ok(Self {
            qkv: matrices(&qkv, hidden)?,
            attention_output: matrices(&[("self_attn.o_proj.weight", hidden)], queries)?,
            gate_up: matrices(
                &[("mlp.gate_proj.weight", inner), ("mlp.up_proj.weight", inner)],
                hidden,
            )?,
            down: matrices(&[("mlp.down_proj.weight", hidden)], inner)?,
        })
    }

    /// Whether the matrix of this name within the layer is among them.
    pub fn has(&self, part: &str) -> bool {
        match part {
            "self_attn.o_proj.weight" => self.attention_output.is_some(),
            "mlp.down_proj.weight" => self.down.is_some(),
            "mlp.gate_proj.weight" | "mlp.up_proj.weight" => self.gate_up.is_some(),
            "self_attn.q_proj.weight" | "self_attn.k_proj.weight" | "self_attn.v_proj.weight" => self.qkv.is_some(),
            _ => false,
        }
    }
}

/// One layer's tensors in float32, matrices as `[outputs, inputs]`.
pub(crate) struct LayerWeights {
    pub attention_norm: Vec<f32>,
    /// Queries, keys and values in one projection.
    pub qkv: Vec<f32>,
    pub qkv_bias: Option<Vec<f32>>,
    pub query_norm: Option<Vec<f32>>,
    pub key_norm: Option<Vec<f32>>,
    pub attention_output: Vec<f32>,
    pub mlp_norm: Vec<f32>,
    pub gate: Vec<f32>,
    pub up: Vec<f32>,
    pub down: Vec<f32>,
}

impl LayerWeights {
    /// Leaves matrices out, whose names within the layer are not `wanted`: they are of no rows.
    pub fn read(
        weights: &Weights,
        config: &Config,
        index: usize,
        wanted: impl Fn(&str) -> bool + Sync,
    ) -> Result<Self, ModelError> {
        let Config {
            hidden_size: hidden,
            intermediate_size: inner,
            head_dim,
            ..
        } = *config;
        let (queries, keys) = (config.heads * head_dim, config.kv_heads * head_dim);
        let name = |part: &str| layer_name(index, part);
        let matrices = [
            ("self_attn.q_proj.weight", [queries, hidden]),
            ("self_attn.k_proj.weight", [keys, hidden]),
            ("self_attn.v_proj.weight", [keys, hidden]),
            ("self_attn.o_proj.weight", [hidden, queries]),
            ("mlp.gate_proj.weight", [inner, hidden]),
            ("mlp.up_proj.weight", [inner, hidden]),
            ("mlp.down_proj.weight", [hidden, inner]),
        ];
        let read = matrices.par_iter().map(|(part, shape)| match wanted(part) {
            true => weights.read(&name(part), shape),
            false => Ok(Vec::new()),
        });
        let mut read = read.collect::<Result<Vec<_>, _>>()?.into_iter();
        let mut next = || read.next().unwrap_or_default();
        let qkv = [next(), next(), next()].concat();
        let (attention_output, gate, up, down) = (next(), next(), next(), next());
        let vector = |part: &str, len: usize| weights.read(&name(part), &[len]);
        let head_norm = |part: &str| config.qk_norm.then(|| vector(part, head_dim)).transpose();
        let bias = || {
            let parts = [("q", queries), ("k", keys), ("v", keys)];
            let read = parts.map(|(part, len)| vector(&format!("self_attn.{part}_proj.bias"), len));
            Ok(read.into_iter().collect::<Result<Vec<_>, _>>()?.concat())
        };
        Ok(Self {
            attention_norm: vector("input_layernorm.weight", hidden)?,
            qkv,
            qkv_bias: config.qkv_bias.then(bias).transpose()?,
            query_norm: head_norm("self_attn.q_norm.weight")?,
            key_norm: head_norm("self_attn.k_norm.weight")?,
            attention_output,
            mlp_norm: vector("post_attention_layernorm.weight", hidden)?,
            gate,
            up,
            down,
        })
    }
}
