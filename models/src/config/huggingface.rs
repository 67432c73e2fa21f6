//! Settings from a Hugging Face `config.json`, of both generations: `rope_theta` and `rope_scaling` at the top level,
//! and the `rope_parameters` of transformers 5.

use std::path::Path;

use serde::Deserialize;

use super::{ARCHITECTURES, Config, Problem, Rope, RopeScaling};
use crate::ModelError;

#[derive(Deserialize)]
struct Raw {
    model_type: Option<String>,
    hidden_size: usize,
    intermediate_size: usize,
    vocab_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    rms_norm_eps: f64,
    max_position_embeddings: usize,
    hidden_act: Option<String>,
    rope_theta: Option<f64>,
    rope_scaling: Option<RawRope>,
    rope_parameters: Option<RawRope>,
    partial_rotary_factor: Option<f64>,
    sliding_window: Option<usize>,
    use_sliding_window: Option<bool>,
    max_window_layers: Option<usize>,
    layer_types: Option<Vec<String>>,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    tie_word_embeddings: Option<bool>,
}

#[derive(Deserialize, Default)]
struct RawRope {
    rope_theta: Option<f64>,
    rope_type: Option<String>,
    /// What `rope_type` was called before; some files have both.
    #[serde(rename = "type")]
    old_type: Option<String>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<usize>,
    partial_rotary_factor: Option<f64>,
}

impl Config {
    /// Reads a Hugging Face `config.json`.
    pub fn from_json(path: &Path) -> Result<Self, ModelError> {
        let text = std::fs::read_to_string(path).map_err(|source| ModelError::Io {
            path: path.into(),
            source,
        })?;
        Self::parse_json(&text, path)
    }

    fn parse_json(text: &str, path: &Path) -> Result<Self, ModelError> {
        let corrupt = |e: serde_json::Error| ModelError::Corrupt {
            path: path.into(),
            reason: e.to_string(),
        };
        let value: serde_json::Value = serde_json::from_str(text).map_err(corrupt)?;
        // Another architecture need not have our fields, so its name is looked at before them.
        let architecture = value["model_type"].as_str().unwrap_or_default().to_string();
        if !ARCHITECTURES.contains(&architecture.as_str()) {
            return Err(ModelError::UnsupportedArchitecture {
                path: path.into(),
                found: architecture,
            });
        }
        let raw: Raw = serde_json::from_value(value).map_err(corrupt)?;
        raw.config().map_err(|(key, problem)| ModelError::Setting {
            path: path.into(),
            key,
            problem,
        })
    }
}

impl Raw {
    fn config(self) -> Result<Config, Problem> {
        let architecture = self.model_type.clone().unwrap_or_default();
        self.refuse_unknown(&architecture)?;
        let config = Config {
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            vocab_size: self.vocab_size,
            layers: self.num_hidden_layers,
            heads: self.num_attention_heads,
            kv_heads: self.num_key_value_heads.unwrap_or(self.num_attention_heads),
            head_dim: self
                .head_dim
                .unwrap_or(self.hidden_size / self.num_attention_heads.max(1)),
            rms_norm_eps: self.rms_norm_eps,
            max_position_embeddings: self.max_position_embeddings,
            sliding_window: self.window(&architecture)?,
            qkv_bias: architecture == "qwen2",
            qk_norm: architecture == "qwen3",
            tie_word_embeddings: self.tie_word_embeddings.unwrap_or(false),
            rope: self.rope()?,
            architecture,
        };
        config.check()
    }

    fn refuse_unknown(&self, architecture: &str) -> Result<(), Problem> {
        if self.hidden_act.as_deref().is_some_and(|act| act != "silu") {
            return Err((
                "hidden_act".into(),
                format!("is {:?}; only \"silu\" is supported", self.hidden_act),
            ));
        }
        if self.attention_bias && architecture != "qwen2" {
            return Err((
                "attention_bias".into(),
                "is true, which is supported for qwen2 only".into(),
            ));
        }
        if self.mlp_bias {
            return Err(("mlp_bias".into(), "is true, which is not supported".into()));
        }
        let partial = self
            .rope_parameters
            .as_ref()
            .and_then(|rope| rope.partial_rotary_factor);
        if self
            .partial_rotary_factor
            .or(partial)
            .is_some_and(|factor| factor != 1.0)
        {
            return Err((
                "partial_rotary_factor".into(),
                "is not 1; only whole heads can be rotated".into(),
            ));
        }
        Ok(())
    }

    /// Mistral's window holds in every layer; Qwen's only when `use_sliding_window`, from `max_window_layers` on.
    fn window(&self, architecture: &str) -> Result<Option<usize>, Problem> {
        match architecture {
            "mistral" => Ok(self.sliding_window),
            "qwen2" | "qwen3" if self.use_sliding_window == Some(true) => {
                let layers = self.num_hidden_layers;
                let full = match &self.layer_types {
                    Some(types) => types.iter().filter(|kind| *kind == "full_attention").count(),
                    None => self.max_window_layers.unwrap_or(layers).min(layers),
                };
                match full {
                    0 => Ok(self.sliding_window),
                    full if full == layers => Ok(None),
                    _ => Err((
                        "sliding_window".into(),
                        "holds in some layers only, which is not supported".into(),
                    )),
                }
            }
            _ => Ok(None),
        }
    }

    fn rope(self) -> Result<Rope, Problem> {
        let top = self.rope_theta;
        let raw = self.rope_parameters.or(self.rope_scaling).unwrap_or_default();
        let theta = raw.rope_theta.or(top).unwrap_or(10000.0);
        let need = |key: &str, value: Option<f64>| value.ok_or((format!("rope {key}"), "is missing".to_string()));
        let scaling = match raw.rope_type.or(raw.old_type).as_deref() {
            None | Some("default") => RopeScaling::None,
            Some("linear") => RopeScaling::Linear {
                factor: need("factor", raw.factor)?,
            },
            Some("llama3") => RopeScaling::Llama3 {
                factor: need("factor", raw.factor)?,
                low_freq_factor: need("low_freq_factor", raw.low_freq_factor)?,
                high_freq_factor: need("high_freq_factor", raw.high_freq_factor)?,
                original_max_position_embeddings: raw.original_max_position_embeddings.ok_or((
                    "rope original_max_position_embeddings".to_string(),
                    "is missing".to_string(),
                ))?,
            },
            Some(other) => {
                return Err((
                    "rope_type".into(),
                    format!("is {other:?}; supported are default, linear and llama3"),
                ));
            }
        };
        Ok(Rope { theta, scaling })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZES: &str = r#""hidden_size": 64, "intermediate_size": 96, "vocab_size": 50, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 128"#;

    fn parse(rest: &str) -> Result<Config, ModelError> {
        Config::parse_json(&format!("{{{SIZES}, {rest}}}"), Path::new("config.json"))
    }

    #[test]
    fn both_generations_mean_the_same() {
        let scaling = r#""factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32, "rope_type": "llama3""#;
        let old = format!(r#""model_type": "llama", "rope_theta": 5e5, "rope_scaling": {{{scaling}}}"#);
        let new = format!(r#""model_type": "llama", "rope_parameters": {{"rope_theta": 5e5, {scaling}}}"#);
        let (old, new) = (parse(&old).unwrap(), parse(&new).unwrap());
        assert_eq!(old, new);
        assert_eq!((old.rope.theta, old.head_dim), (5e5, 16));
        assert!(matches!(old.rope.scaling, RopeScaling::Llama3 { factor: 8.0, .. }));
        let both = r#""model_type": "llama", "rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2.0}"#;
        assert_eq!(parse(both).unwrap().rope.scaling, RopeScaling::Linear { factor: 2.0 });
    }

    #[test]
    fn shapes_can_be_read() {
        let shapes = Path::new(env!("CARGO_MANIFEST_DIR")).join("shapes");
        let read: Vec<Config> = std::fs::read_dir(shapes)
            .unwrap()
            .map(|shape| Config::from_json(&shape.unwrap().path().join("config.json")).unwrap())
            .collect();
        assert_eq!(read.len(), 4);
        assert!(
            read.iter()
                .any(|config| config.layers == 16 && config.tie_word_embeddings)
        );
    }

    #[test]
    fn families_differ_in_window_bias_and_norm() {
        let mistral = parse(r#""model_type": "mistral", "sliding_window": 7"#).unwrap();
        assert_eq!(mistral.sliding_window, Some(7));
        let qwen2 = parse(r#""model_type": "qwen2", "sliding_window": 7, "use_sliding_window": false"#).unwrap();
        assert_eq!(
            (qwen2.sliding_window, qwen2.qkv_bias, qwen2.qk_norm),
            (None, true, false)
        );
        let qwen3 = parse(r#""model_type": "qwen3", "head_dim": 32"#).unwrap();
        assert_eq!((qwen3.head_dim, qwen3.qkv_bias, qwen3.qk_norm), (32, false, true));
    }

    #[test]
    fn what_cannot_be_computed_is_refused_by_name() {
        let message = |rest: &str| parse(rest).unwrap_err().to_string();
        assert!(message(r#""model_type": "gpt2""#).contains("gpt2 is not supported"));
        assert!(message(r#""model_type": "llama", "hidden_act": "gelu""#).contains("hidden_act"));
        assert!(message(r#""model_type": "llama", "rope_scaling": {"type": "yarn", "factor": 4}"#).contains("yarn"));
        assert!(message(r#""model_type": "llama", "head_dim": 7"#).contains("head_dim"));
        assert!(message(r#""model_type": "llama", "mlp_bias": true"#).contains("mlp_bias"));
        assert!(
            message(r#""model_type": "qwen2", "use_sliding_window": true, "max_window_layers": 1"#)
                .contains("some layers only")
        );
    }
}
