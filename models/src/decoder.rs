//! The decoder on the CPU: embedding, layers of attention and MLP, and the logits of the rows that are wanted.

use std::cell::Cell;

use candle_core::quantized::QTensor;
use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

use crate::ceilings::Arithmetic;
use crate::cpu::attention::{Attention, Queries};
use crate::cpu::elementwise::{Half, ROWS_A_THREAD, RmsNorm, Rotate, Store};
use crate::cpu::lend;
use crate::cpu::linear::{GateUp, Linear};
use crate::cpu::panels::stored_as;
use crate::cpu::quantized;
use crate::cpu::stored::StoredMatrix;
use crate::kv::Pools;
use crate::rope::{cos_sin, inverse_frequencies};
use crate::weights::{EMBEDDING, FINAL_NORM, LayerWeights, OUTPUT, QUANTIZED, StoredLayer, Weights};
use crate::{Config, KvCache, ModelError, Step, without_backtrace};

/// A loaded model.
pub(crate) struct CpuDecoder {
    config: Config,
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

/// Rows of a part at the most, or nearly: few enough for what a layer makes of them to stay in a usual second-level cache.
const MOST_ROWS: usize = 64;
/// Fewest rows, on average, for which it is worth reading all weights again.
const FEWEST_ROWS: usize = 12;

/// Some rows of a step on their way through the layers.
struct Part<'a> {
    rows: Rows<'a>,
    /// `[rows, hidden_size]`
    x: Vec<f32>,
    /// Queries, keys and values of the layer that comes next: `[rows, (heads + 2 * kv_heads) * head_dim]`.
    qkv: Vec<f32>,
}

/// What every layer needs to know of a part.
#[derive(Default)]
struct Rows<'a> {
    slots: Vec<usize>,
    /// `[rows, head_dim / 2]`
    cos: Vec<f32>,
    sin: Vec<f32>,
    queries: Vec<Queries<'a>>,
    /// Rows whose logits are wanted.
    logit_rows: Vec<u32>,
}

/// What a layer makes of a part on the way.
#[derive(Default)]
struct Buffers {
    /// `[rows, hidden_size]`
    normed: Vec<f32>,
    /// `[rows, heads * head_dim]`
    attended: Vec<f32>,
    /// `[rows, intermediate_size]`
    gated: Vec<f32>,
}

thread_local! {
    /// Used again from part to part and layer to layer.
    static BUFFERS: Cell<Buffers> = Cell::default();
}

impl CpuDecoder {
    /// Packs a model's weights to be multiplied as `dtype` (f32, bf16 or f16); if `quantized`, quantized matrices are
    /// multiplied in whole numbers.
    pub fn load(weights: &Weights, config: Config, dtype: DType, quantized: bool) -> Result<Self, ModelError> {
        let loader = Loader {
            weights,
            config: &config,
            dtype,
            quantized,
        };
        // The largest tensor first, while little else is in memory.
        let (embedding, output) = loader.embedding_and_output()?;
        let layers = (0..config.layers)
            .map(|index| loader.layer(index))
            .collect::<Result<_, _>>()?;
        let norm = loader.norm(weights.read(FINAL_NORM, &[config.hidden_size])?);
        let inverse_frequencies = inverse_frequencies(&config.rope, config.head_dim);
        Ok(Self {
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

    /// How most weights are multiplied: the first layer's, as those of the others.
    pub fn arithmetic(&self) -> Arithmetic {
        let first = self.layers.first();
        first.map_or(Arithmetic::Numbers, |layer| layer.gate_up.arithmetic())
    }

    /// Bytes of weights that a step reads.
    pub fn weight_bytes(&self) -> u64 {
        let layer = |layer: &Layer| {
            layer.qkv.bytes() + layer.attention_output.bytes() + layer.gate_up.bytes() + layer.down.bytes()
        };
        (self.output.bytes() + self.layers.iter().map(layer).sum::<usize>()) as u64
    }

    /// Runs a step that was checked; see [`crate::Decoder::logits`].
    pub fn logits(&self, step: &Step, cache: &mut KvCache, logits: &mut Vec<f32>) -> candle_core::Result<()> {
        // One way into the thread pool for the whole step, instead of one for each operator.
        rayon::scope(|_| self.run(step, cache, logits))
    }

    /// Each part of the rows goes through a layer on one thread, while what it makes of them is in that thread's cache; where
    /// there is one part, threads share out the operators' work instead. A query attends to keys of other parts, so
    /// all parts store theirs before any goes on to attention.
    fn run(&self, step: &Step, cache: &KvCache, logits: &mut Vec<f32>) -> candle_core::Result<()> {
        let steps = step.split(parts(step.tokens.len(), rayon::current_num_threads()));
        let parts = steps.par_iter().map(|step| self.enter(step, cache));
        let mut parts: Vec<Part> = parts.collect::<candle_core::Result<_>>()?;
        let layers = self.layers.iter().zip(&cache.layers);
        for ((layer, pools), (next, next_pools)) in layers.clone().zip(layers.skip(1)) {
            parts.par_iter_mut().try_for_each(|part| {
                layer.finish(part, pools, &self.config)?;
                next.qkv(part, next_pools, &self.config)
            })?;
        }
        self.leave(step, &parts, cache, logits)
    }

    /// A part's embedding, and its queries, keys and values in the first layer.
    fn enter<'a>(&self, step: &'a Step, cache: &KvCache) -> candle_core::Result<Part<'a>> {
        let (cos, sin) = cos_sin(&self.inverse_frequencies, &step.positions());
        let mut row = 0;
        let queries = step.sequences.iter().map(|span| {
            row += span.len;
            Queries {
                row: row - span.len,
                start: span.start,
                len: span.len,
                block_table: &span.block_table,
            }
        });
        let rows = Rows {
            queries: queries.collect(),
            slots: step.slots(cache.block_size()),
            cos,
            sin,
            logit_rows: step.logit_rows(),
        };
        let mut part = Part {
            rows,
            x: self.embed(&step.tokens)?,
            qkv: Vec::new(),
        };
        self.layers[0].qkv(&mut part, &cache.layers[0], &self.config)?;
        Ok(part)
    }

    /// The logits that are wanted, once the last layer's keys and values are stored: the rest of that layer matters only for
    /// these rows.
    fn leave(&self, step: &Step, parts: &[Part], cache: &KvCache, logits: &mut Vec<f32>) -> candle_core::Result<()> {
        let answering = step.sequences.iter().filter(|span| span.logits).enumerate();
        let queries = answering.map(|(row, span)| Queries {
            row,
            start: span.start + span.len - 1,
            len: 1,
            block_table: &span.block_table,
        });
        let queries: Vec<Queries> = queries.collect();
        if queries.is_empty() {
            logits.clear();
            return Ok(());
        }
        let (mut x, mut qkv) = (Vec::new(), Vec::new());
        for part in parts {
            let rows = part.rows.slots.len();
            for (all, wanted) in [(&part.x, &mut x), (&part.qkv, &mut qkv)] {
                let width = all.len() / rows;
                for &row in &part.rows.logit_rows {
                    wanted.extend_from_slice(&all[row as usize * width..][..width]);
                }
            }
        }
        // Their keys and values are stored.
        let rows = Rows {
            queries,
            ..Rows::default()
        };
        let mut last = Part { rows, x, qkv };
        let index = self.layers.len() - 1;
        self.layers[index].finish(&mut last, &cache.layers[index], &self.config)?;
        lend(&BUFFERS, |Buffers { normed, .. }| {
            self.norm.forward(&last.x, normed);
            self.output.forward(normed, logits)
        })
    }

    /// Rows of the embedding table: `[tokens, hidden_size]`.
    fn embed(&self, tokens: &[u32]) -> candle_core::Result<Vec<f32>> {
        let Some(table) = &self.embedding else {
            let mut rows = Vec::new();
            self.output.gather(tokens, &mut rows);
            return Ok(rows);
        };
        let rows = table.index_select(&Tensor::new(tokens, table.device())?, 0)?;
        rows.to_dtype(DType::F32)?.flatten_all()?.to_vec1()
    }
}

impl Layer {
    /// The part's queries, keys and values, rotated, the latter two in the cache as well.
    fn qkv(&self, part: &mut Part, pools: &Pools, config: &Config) -> candle_core::Result<()> {
        let Part { rows, x, qkv } = part;
        lend(&BUFFERS, |Buffers { normed, .. }| {
            self.attention_norm.forward(x, normed);
            self.qkv.forward(normed, qkv)
        })?;
        let rotate = Rotate {
            query_heads: config.heads,
            key_heads: config.kv_heads,
            head_dim: config.head_dim,
            query_norm: self.query_norm.as_ref(),
            key_norm: self.key_norm.as_ref(),
        };
        let width = qkv_width(config);
        rotate.forward(qkv, width, &rows.cos, &rows.sin);
        let keys_at = config.heads * config.head_dim;
        let values_at = keys_at + config.kv_heads * config.head_dim;
        let (slots, qkv) = (&rows.slots, &**qkv);
        let store = |half, column| Store {
            half,
            slots,
            qkv,
            width,
            column,
        };
        let keys = || store(Half::Keys, keys_at).forward(&pools.keys);
        let values = || store(Half::Values, values_at).forward(&pools.values);
        let (keys, values) = match slots.len() {
            ..ROWS_A_THREAD => (keys(), values()),
            _ => rayon::join(keys, values),
        };
        keys.and(values)
    }

    /// The layer's attention and MLP, added to the part's `x`.
    fn finish(&self, part: &mut Part, pools: &Pools, config: &Config) -> candle_core::Result<()> {
        let Part { rows, x, qkv } = part;
        let attention = Attention {
            queries: &rows.queries,
            heads: config.heads,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            window: config.sliding_window,
        };
        lend(&BUFFERS, |buffers| {
            let Buffers {
                normed,
                attended,
                gated,
            } = buffers;
            attention.forward(qkv, qkv_width(config), &pools.keys, &pools.values, attended)?;
            self.attention_output.add_to(x, attended)?;
            self.mlp_norm.forward(x, normed);
            self.gate_up.forward(normed, gated)?;
            self.down.add_to(x, gated)
        })
    }
}

/// Columns of queries, keys and values together.
fn qkv_width(config: &Config) -> usize {
    (config.heads + 2 * config.kv_heads) * config.head_dim
}

/// How many parts a step is cut into: as many as the threads can share evenly, or one if that leaves too few rows.
fn parts(rows: usize, threads: usize) -> usize {
    let even = rows.div_ceil(MOST_ROWS).next_multiple_of(threads);
    if rows < even * FEWEST_ROWS { 1 } else { even }
}

/// Reads and packs weights.
struct Loader<'a> {
    weights: &'a Weights,
    config: &'a Config,
    dtype: DType,
    /// Whether quantized matrices are multiplied in whole numbers.
    quantized: bool,
}

impl Loader<'_> {
    /// The embedding table, unless it is the output projection as well, and that projection.
    fn embedding_and_output(&self) -> Result<(Option<Tensor>, Linear), ModelError> {
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
        let table = Tensor::from_vec(table, shape.as_slice(), &Device::Cpu)
            .and_then(|table| table.to_dtype(dtype))
            .map_err(built(EMBEDDING))?;
        Ok((Some(table), projection(OUTPUT)?))
    }

    /// Matrices with so many outputs each, all in one format, if they are to stay in blocks and all of them can.
    fn stored(&self, parts: &[(String, usize)], inputs: usize) -> Result<Option<Vec<StoredMatrix>>, ModelError> {
        type Read = fn(&QTensor) -> candle_core::Result<StoredMatrix>;
        type Alike = fn(Vec<StoredMatrix>) -> Vec<StoredMatrix>;
        let (types, read, alike): (_, Read, Alike) = match (self.quantized, self.dtype) {
            (true, _) => (QUANTIZED, quantized::read, quantized::alike),
            (false, DType::F32) => (StoredMatrix::TYPES, StoredMatrix::read, StoredMatrix::alike),
            (false, _) => return Ok(None),
        };
        let Some(stored) = self.weights.quantized(parts, inputs, types, &Device::Cpu)? else {
            return Ok(None);
        };
        let matrices = stored.par_iter().zip(parts);
        let matrices = matrices.map(|(stored, (name, _))| read(stored).map_err(built(name)));
        Ok(Some(alike(matrices.collect::<Result<_, _>>()?)))
    }

    fn layer(&self, index: usize) -> Result<Layer, ModelError> {
        let config = self.config;
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let queries = config.heads * config.head_dim;
        let stored = StoredLayer::read(config, index, |parts, inputs| self.stored(parts, inputs))?;
        let read = LayerWeights::read(self.weights, config, index, |part| !stored.has(part))?;
        let norm = |weight| self.norm(weight);
        let gate_up = match stored.gate_up.as_deref() {
            Some([gate, up]) if self.quantized => GateUp::quantized(gate, up),
            Some([gate, up]) => Ok(GateUp::compressed(gate, up)),
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
        stored: Option<Vec<StoredMatrix>>,
        weight: Vec<f32>,
        inputs: usize,
        bias: Option<Vec<f32>>,
    ) -> Result<Linear, ModelError> {
        match stored.and_then(StoredMatrix::concat) {
            Some(matrix) if self.quantized => Linear::quantized(&matrix, bias).map_err(built(what)),
            Some(matrix) => Ok(Linear::compressed(&matrix, bias)),
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Decoder, Span};

    #[test]
    fn parts_are_as_many_as_threads_share_evenly() {
        for (rows, threads, count) in [
            (0, 2, 0),
            (1, 2, 1),
            (23, 2, 1),
            (24, 2, 2),
            (64, 2, 2),
            (512, 2, 8),
            (500, 1, 8),
            (100, 16, 1),
            (512, 16, 16),
            (100, 3, 3),
        ] {
            assert_eq!(parts(rows, threads), count, "{rows} rows on {threads} threads");
        }
    }

    /// A prompt that lies in several parts, one that goes on, and decodes: together on any number of threads, and token by
    /// token.
    #[test]
    fn a_sequence_is_the_same_in_whatever_parts() {
        let shape = r#""hidden_size": 64, "intermediate_size": 96, "vocab_size": 300, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "rms_norm_eps": 1e-6,
            "max_position_embeddings": 256"#;
        let qwen = format!(r#"{{"model_type": "qwen3", {shape}}}"#);
        let windowed = format!(r#"{{"model_type": "mistral", "sliding_window": 40, {shape}}}"#);
        for (config, dtype, block_size) in [
            (&qwen, DType::F32, 16),
            (&qwen, DType::BF16, 16),
            (&qwen, DType::F16, 5),
            (&windowed, DType::BF16, 32),
        ] {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("config.json");
            std::fs::write(&path, config).unwrap();
            let decoder = Decoder::dummy(&path, &Device::Cpu, dtype).unwrap();
            Sequences::new(block_size).are_the_same_in_whatever_parts(&decoder, dtype);
        }
    }

    struct Sequences {
        spans: Vec<Span>,
        blocks: usize,
        block_size: usize,
    }

    impl Sequences {
        fn new(block_size: usize) -> Self {
            let mut blocks = 0..;
            let spans = [150, 37].into_iter().chain([1; 20]).map(|len| Span {
                start: if len == 150 { 0 } else { 16 },
                len,
                block_table: blocks.by_ref().take((16 + len).div_ceil(block_size)).collect(),
                logits: true,
            });
            let spans = spans.collect();
            Self {
                spans,
                blocks: blocks.start as usize,
                block_size,
            }
        }

        fn are_the_same_in_whatever_parts(&self, decoder: &Decoder, dtype: DType) {
            let alone: Vec<Vec<f32>> = self
                .spans
                .iter()
                .map(|span| {
                    let mut cache = self.cache(decoder, dtype);
                    let ones = (span.start..span.start + span.len).map(|start| Span {
                        start,
                        len: 1,
                        ..span.clone()
                    });
                    let rows = ones.map(|one| run(decoder, &mut cache, &[one]).remove(0));
                    rows.last().unwrap()
                })
                .collect();
            for threads in [1, 2, 3, 16] {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let together = pool.install(|| run(decoder, &mut self.cache(decoder, dtype), &self.spans));
                assert!(together == alone, "{dtype:?} on {threads} threads");
            }
        }

        fn cache(&self, decoder: &Decoder, dtype: DType) -> KvCache {
            KvCache::new(decoder.config(), self.blocks, self.block_size, dtype, &Device::Cpu).unwrap()
        }
    }

    /// Of tokens that their positions decide.
    fn run(decoder: &Decoder, cache: &mut KvCache, spans: &[Span]) -> Vec<Vec<f32>> {
        let positions = spans.iter().flat_map(|span| span.start..span.start + span.len);
        let step = Step {
            tokens: positions.map(|at| (at * 7 % 300) as u32).collect(),
            sequences: spans.to_vec(),
        };
        decoder.forward(&step, cache).unwrap().to_vec2().unwrap()
    }
}
