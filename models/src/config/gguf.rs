//! Settings from a GGUF file's metadata.

use candle_core::quantized::gguf_file::{Content, Value};

use super::{Config, Problem, Rope, RopeScaling};

/// Reads settings out of a GGUF header; keys are prefixed by the architecture's name.
pub(crate) struct Metadata<'a> {
    pub content: &'a Content,
}

impl Metadata<'_> {
    /// What `general.architecture` says, or nothing.
    pub fn architecture(&self) -> String {
        match self.content.metadata.get("general.architecture") {
            Some(Value::String(name)) => name.clone(),
            _ => String::new(),
        }
    }

    /// The settings; sizes that the metadata lacks are taken from the tensors' shapes.
    pub fn config(&self) -> Result<Config, Problem> {
        let hidden_size = self.size("embedding_length")?;
        let heads = self.size("attention.head_count")?;
        let head_dim = self
            .optional("attention.key_length")
            .unwrap_or(hidden_size / heads.max(1));
        if self
            .optional("attention.value_length")
            .is_some_and(|dim| dim != head_dim)
        {
            return Err((
                "attention.value_length".into(),
                "differs from attention.key_length".into(),
            ));
        }
        if self.optional("rope.dimension_count").is_some_and(|dim| dim != head_dim) {
            return Err((
                "rope.dimension_count".into(),
                "is not the head's size; only whole heads can be rotated".into(),
            ));
        }
        let config = Config {
            architecture: self.architecture(),
            hidden_size,
            intermediate_size: self.size("feed_forward_length")?,
            vocab_size: self.vocab_size()?,
            layers: self.size("block_count")?,
            heads,
            kv_heads: self.optional("attention.head_count_kv").unwrap_or(heads),
            head_dim,
            rms_norm_eps: self
                .number("attention.layer_norm_rms_epsilon")
                .ok_or_else(|| self.missing("attention.layer_norm_rms_epsilon"))?,
            rope: self.rope()?,
            max_position_embeddings: self.size("context_length")?,
            sliding_window: self.optional("attention.sliding_window").filter(|&window| window > 0),
            qkv_bias: self.has("blk.0.attn_q.bias"),
            qk_norm: self.has("blk.0.attn_q_norm.weight"),
            tie_word_embeddings: !self.has("output.weight"),
        };
        config.check()
    }

    fn rope(&self) -> Result<Rope, Problem> {
        let theta = self.number("rope.freq_base").unwrap_or(10000.0);
        let kind = match self.value("rope.scaling.type") {
            Some(Value::String(kind)) => kind.as_str(),
            _ => "none",
        };
        let scaling = match kind {
            "none" => RopeScaling::None,
            "linear" => RopeScaling::Linear {
                factor: self
                    .number("rope.scaling.factor")
                    .ok_or_else(|| self.missing("rope.scaling.factor"))?,
            },
            other => {
                return Err((
                    "rope.scaling.type".into(),
                    format!("is {other:?}; supported are none and linear"),
                ));
            }
        };
        Ok(Rope { theta, scaling })
    }

    fn vocab_size(&self) -> Result<usize, Problem> {
        let embedding = self
            .content
            .tensor_infos
            .get("token_embd.weight")
            .and_then(|info| info.shape.dims().first());
        embedding
            .copied()
            .ok_or(("token_embd.weight".into(), "is missing".into()))
    }

    fn has(&self, tensor: &str) -> bool {
        self.content.tensor_infos.contains_key(tensor)
    }

    fn value(&self, key: &str) -> Option<&Value> {
        self.content.metadata.get(&format!("{}.{key}", self.architecture()))
    }

    fn missing(&self, key: &str) -> Problem {
        (format!("{}.{key}", self.architecture()), "is missing".into())
    }

    fn size(&self, key: &str) -> Result<usize, Problem> {
        self.optional(key).ok_or_else(|| self.missing(key))
    }

    /// An unsigned integer of any width.
    fn optional(&self, key: &str) -> Option<usize> {
        match *self.value(key)? {
            Value::U8(v) => Some(v.into()),
            Value::U16(v) => Some(v.into()),
            Value::U32(v) => Some(v as usize),
            Value::U64(v) => usize::try_from(v).ok(),
            Value::I32(v) => usize::try_from(v).ok(),
            Value::I64(v) => usize::try_from(v).ok(),
            _ => None,
        }
    }

    fn number(&self, key: &str) -> Option<f64> {
        match *self.value(key)? {
            // Through decimal text, so that 1e-5 stored as a float32 reads as 1e-5.
            Value::F32(v) => v.to_string().parse().ok(),
            Value::F64(v) => Some(v),
            _ => None,
        }
    }
}
