//! A decoder's settings, the same whichever file they were read from.

mod gguf;
mod huggingface;

pub(crate) use gguf::Metadata;

/// Architectures that can be loaded, as `model_type` in config.json or `general.architecture` in GGUF.
pub const ARCHITECTURES: [&str; 4] = ["llama", "mistral", "qwen2", "qwen3"];

/// Everything that tells one decoder of the supported families from another.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// One of [`ARCHITECTURES`].
    pub architecture: String,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub vocab_size: usize,
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; `heads / kv_heads` query heads share each (GQA).
    pub kv_heads: usize,
    pub head_dim: usize,
    pub rms_norm_eps: f64,
    pub rope: Rope,
    /// Longest sequence, prompt and answer together.
    pub max_position_embeddings: usize,
    /// A token attends to this many positions, its own included; `None`: to all before it.
    pub sliding_window: Option<usize>,
    /// Whether the query, key and value projections have biases (Qwen2).
    pub qkv_bias: bool,
    /// Whether queries and keys are normalised head by head before they are rotated (Qwen3).
    pub qk_norm: bool,
    /// Whether the output projection is the embedding table.
    pub tie_word_embeddings: bool,
}

/// Rotary position embedding.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Base of the geometric series of wavelengths.
    pub theta: f64,
    pub scaling: RopeScaling,
}

/// How rotary frequencies were changed for a longer context.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    None,
    /// All frequencies divided by `factor`.
    Linear {
        factor: f64,
    },
    /// Llama 3.1: low frequencies divided by `factor`, high ones kept, those between blended.
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original_max_position_embeddings: usize,
    },
    /// Each frequency divided by its own number: what a GGUF's `rope_freqs.weight` holds, `[head_dim / 2]`.
    Divisors(Vec<f32>),
}

/// More than any size of any model, and little enough that two of them multiplied still count bytes.
const MOST: usize = 1 << 27;
const MOST_LAYERS: usize = 4096;

/// A setting that cannot be used: its key and what is wrong with it.
type Problem = (String, String);

impl Config {
    /// Refuses sizes that no decoder can have.
    fn check(self) -> Result<Self, Problem> {
        let problem = |key: &str, problem: String| Err((key.to_string(), problem));
        let sizes = [
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("vocab_size", self.vocab_size),
            ("num_hidden_layers", self.layers),
            ("num_attention_heads", self.heads),
            ("num_key_value_heads", self.kv_heads),
            ("head_dim", self.head_dim),
            ("max_position_embeddings", self.max_position_embeddings),
        ];
        if let Some((key, _)) = sizes.iter().find(|(_, size)| *size == 0) {
            return problem(key, "is zero".into());
        }
        if let Some((key, size)) = sizes.iter().find(|(_, size)| *size > MOST) {
            return problem(key, format!("is {size}, and no model has more than {MOST}"));
        }
        if self.heads * self.head_dim > MOST {
            let width = self.heads * self.head_dim;
            return problem(
                "head_dim",
                format!("times the heads is {width}, and no model has more than {MOST}"),
            );
        }
        if self.layers > MOST_LAYERS {
            return problem(
                "num_hidden_layers",
                format!("is {}, and no model has more than {MOST_LAYERS}", self.layers),
            );
        }
        if self.sliding_window == Some(0) {
            return problem("sliding_window", "is zero".into());
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            return problem(
                "num_attention_heads",
                format!("({}) is no multiple of the {} KV heads", self.heads, self.kv_heads),
            );
        }
        if !self.head_dim.is_multiple_of(2) {
            return problem(
                "head_dim",
                format!("({}) is odd and cannot be rotated in pairs", self.head_dim),
            );
        }
        Ok(self)
    }
}
