//! The default model against tokens that PyTorch computed in float32 from the same file, and against itself in other
//! company. With `SCONCE_TEST_DEVICE=cuda` it runs on the first GPU, where logits may depend on company in their last bits.

mod common;

use std::sync::OnceLock;

use candle_core::{DType, Device, Tensor};
use sconce_models::{Decoder, KvCache, Span, Step};
use serde::Deserialize;

const BLOCK_SIZE: usize = 16;
/// Blocks that hold the longest prompt and its answer.
const BLOCKS: usize = 112;

#[derive(Deserialize)]
struct Reference {
    prompts: Vec<Prompt>,
}

#[derive(Deserialize)]
struct Prompt {
    name: String,
    prompt_tokens: Vec<u32>,
    tokens: Vec<u32>,
    /// Distance of the runner-up's logit at each step.
    gaps: Vec<f32>,
}

fn reference() -> Vec<Prompt> {
    let text = include_str!("../../tests/fixtures/smollm2-135m-instruct-q4_1.json");
    serde_json::from_str::<Reference>(text).unwrap().prompts
}

/// What all of the tests run on: a GPU's weights and cache have to share a stream.
fn device() -> &'static Device {
    static DEVICE: OnceLock<Device> = OnceLock::new();
    DEVICE.get_or_init(common::device)
}

/// Whether a test that compares to the last bit is left out, as on a GPU it cannot be held to that.
fn not_to_the_last_bit(test: &str) -> bool {
    if !device().is_cpu() {
        println!("{test}: left out on a GPU");
    }
    !device().is_cpu()
}

fn load(dtype: DType) -> Decoder {
    Decoder::load(&common::default_model(), device(), dtype).unwrap()
}

fn decoder() -> &'static Decoder {
    static DECODER: OnceLock<Decoder> = OnceLock::new();
    DECODER.get_or_init(|| load(DType::F32))
}

/// The same with its weights as the file has them, in four and eight bits.
fn quantized() -> &'static Decoder {
    static DECODER: OnceLock<Decoder> = OnceLock::new();
    DECODER.get_or_init(|| Decoder::load_quantized(&common::default_model(), device(), DType::F32).unwrap())
}

fn cache(blocks: usize) -> KvCache {
    cache_as(blocks, DType::F32)
}

fn cache_as(blocks: usize, dtype: DType) -> KvCache {
    KvCache::new(decoder().config(), blocks, BLOCK_SIZE, dtype, device()).unwrap()
}

/// A sequence in the pool: its blocks, and how many of its tokens have been run.
struct Sequence {
    block_table: Vec<u32>,
    start: usize,
}

impl Sequence {
    fn new(first_block: usize, blocks: usize) -> Self {
        Self {
            block_table: (first_block..first_block + blocks).map(|block| block as u32).collect(),
            start: 0,
        }
    }

    fn push(&mut self, step: &mut Step, tokens: &[u32]) {
        step.tokens.extend(tokens);
        let span = Span {
            start: self.start,
            len: tokens.len(),
            block_table: self.block_table.clone(),
            logits: true,
        };
        step.sequences.push(span);
        self.start += tokens.len();
    }
}

fn rows(logits: &Tensor) -> Vec<Vec<f32>> {
    logits.to_vec2().unwrap()
}

fn greedy(logits: &[f32]) -> u32 {
    (0..logits.len())
        .max_by(|&a, &b| logits[a].total_cmp(&logits[b]))
        .unwrap() as u32
}

/// Runs `tokens` in chunks of `chunk` and answers the last token's logits.
fn logits(decoder: &Decoder, tokens: &[u32], chunk: usize) -> Vec<f32> {
    let blocks = tokens.len().div_ceil(BLOCK_SIZE);
    let (mut cache, mut sequence) = (cache(blocks), Sequence::new(0, blocks));
    let mut last = Vec::new();
    for chunk in tokens.chunks(chunk) {
        let mut step = Step::default();
        sequence.push(&mut step, chunk);
        last = rows(&decoder.forward(&step, &mut cache).unwrap()).remove(0);
    }
    last
}

/// How many tokens were compared with PyTorch's, and which of them are others. Each goes on from PyTorch's.
fn agreement(decoder: &Decoder, dtype: DType) -> (usize, Vec<String>) {
    let prompts = reference();
    let mut cache = cache_as(BLOCKS * prompts.len(), dtype);
    let mut sequences: Vec<_> = (0..prompts.len()).map(|i| Sequence::new(i * BLOCKS, BLOCKS)).collect();
    let mut next: Vec<Vec<u32>> = prompts.iter().map(|prompt| prompt.prompt_tokens.clone()).collect();
    let (mut compared, mut others) = (0, Vec::new());
    for index in 0..64 {
        // A sequence stays in the batch until its answer ends or a near-tie makes the rest incomparable.
        let active: Vec<_> = (0..prompts.len())
            .filter(|&i| index < prompts[i].tokens.len() && prompts[i].gaps[..=index].iter().all(|&gap| gap >= 1e-3))
            .collect();
        if active.is_empty() {
            break;
        }
        let mut step = Step::default();
        for &i in &active {
            sequences[i].push(&mut step, &next[i]);
        }
        for (&i, logits) in active.iter().zip(rows(&decoder.forward(&step, &mut cache).unwrap())) {
            let token = prompts[i].tokens[index];
            if greedy(&logits) != token {
                others.push(format!("{}, token {index}", prompts[i].name));
            }
            next[i] = vec![token];
            compared += 1;
        }
    }
    println!(
        "{dtype:?}: {} of {compared} tokens are PyTorch's",
        compared - others.len()
    );
    (compared, others)
}

#[test]
fn greedy_tokens_equal_pytorchs() {
    let (compared, others) = agreement(decoder(), DType::F32);
    assert!(compared > 500, "only {compared} tokens were compared");
    assert!(others.is_empty(), "{others:?}");
    // What a GPU computes in where nothing else is asked for: a figure, as rounding may choose another token.
    if !device().is_cpu() {
        agreement(&load(DType::BF16), DType::BF16);
    }
}

#[test]
fn logits_do_not_depend_on_chunks() {
    if not_to_the_last_bit("logits_do_not_depend_on_chunks") {
        return;
    }
    let prompt = &reference()[2].prompt_tokens;
    for decoder in [decoder(), quantized()] {
        let whole = logits(decoder, prompt, prompt.len());
        for chunk in [1, 7, 16, 50] {
            assert!(logits(decoder, prompt, chunk) == whole, "chunks of {chunk}");
        }
    }
}

#[test]
fn logits_do_not_depend_on_company() {
    if not_to_the_last_bit("logits_do_not_depend_on_company") {
        return;
    }
    for decoder in [decoder(), quantized()] {
        company(decoder);
    }
}

fn company(decoder: &Decoder) {
    let mut prompts = reference();
    prompts.retain(|prompt| prompt.prompt_tokens.len() < 400);
    let (mut cache, mut step) = (cache(BLOCKS * prompts.len()), Step::default());
    // The first prompts run ahead, so that their one-token decodes share the step with the others' prefills.
    let ahead = prompts.len() / 2;
    let mut sequences: Vec<_> = (0..prompts.len()).map(|i| Sequence::new(i * BLOCKS, BLOCKS)).collect();
    for (sequence, prompt) in sequences.iter_mut().zip(&prompts).take(ahead) {
        let (_, first) = prompt.prompt_tokens.split_last().unwrap();
        sequence.push(&mut step, first);
    }
    decoder.forward(&step, &mut cache).unwrap();
    let mut step = Step::default();
    for (sequence, prompt) in sequences.iter_mut().zip(&prompts) {
        sequence.push(&mut step, &prompt.prompt_tokens[sequence.start..]);
    }
    let together = rows(&decoder.forward(&step, &mut cache).unwrap());
    for (prompt, together) in prompts.iter().zip(&together) {
        assert!(
            logits(decoder, &prompt.prompt_tokens, 512) == *together,
            "{}",
            prompt.name
        );
    }
}

/// The logits behind every token, each a row, in one step; keys and values are kept as `dtype`.
fn all_logits(decoder: &Decoder, dtype: DType, tokens: &[u32]) -> Vec<Vec<f32>> {
    let blocks = tokens.len().div_ceil(BLOCK_SIZE);
    let mut cache = cache_as(blocks, dtype);
    let (mut step, mut sequence) = (Step::default(), Sequence::new(0, blocks));
    for token in tokens {
        sequence.push(&mut step, &[*token]);
    }
    rows(&decoder.forward(&step, &mut cache).unwrap())
}

/// -ln of the probability of `next`.
fn loss(logits: &[f32], next: u32) -> f64 {
    let largest = logits.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
    let sum: f64 = logits.iter().map(|&logit| f64::from(logit - largest).exp()).sum();
    sum.ln() - f64::from(logits[next as usize] - largest)
}

/// The best token, and by how much it is better than the second.
fn choice(logits: &[f32]) -> (u32, f32) {
    let best = greedy(logits);
    let others = logits.iter().enumerate().filter(|(token, _)| *token != best as usize);
    let second = others.fold(f32::NEG_INFINITY, |most, (_, &logit)| most.max(logit));
    (best, logits[best as usize] - second)
}

/// What became of texts where the model's numbers were rounded.
#[derive(Default)]
struct Rounded {
    losses: f64,
    tokens: u32,
    /// Choices that no rounding can be blamed for, and how many of them are the same.
    clear: usize,
    same: usize,
}

impl Rounded {
    fn compare(&mut self, exact: &[Vec<f32>], rounded: &[Vec<f32>], next: &[u32]) {
        for ((exact, rounded), &next) in exact.iter().zip(rounded).zip(next) {
            self.losses += loss(rounded, next) - loss(exact, next);
            self.tokens += 1;
            let (best, ahead) = choice(exact);
            if ahead > 0.1 {
                self.clear += 1;
                self.same += usize::from(greedy(rounded) == best);
            }
        }
    }

    fn perplexity_is_within(&self, share: f64, what: &str) {
        let ratio = (self.losses / f64::from(self.tokens)).exp();
        println!("{what}: perplexity {ratio:.4} times float32's");
        assert!(
            (ratio - 1.0).abs() < share,
            "{what}: perplexity is {ratio} times float32's"
        );
    }

    /// At least this share of the clear choices is the same, in percent.
    fn choices_agree(&self, what: &str, percent: usize) {
        let Self { clear, same, .. } = *self;
        println!("{what}: {same} of {clear} clear choices agree");
        assert!(
            clear > 1000 && same * 100 >= clear * percent,
            "{what}: {same} of {clear} choices agree"
        );
    }
}

/// What rounding makes of some texts: in bfloat16, and with quantized weights.
fn rounded(texts: &[Vec<u32>]) -> [Rounded; 2] {
    let bf16 = load(DType::BF16);
    let (mut half, mut four_bits) = (Rounded::default(), Rounded::default());
    for text in texts {
        let exact = all_logits(decoder(), DType::F32, text);
        half.compare(&exact, &all_logits(&bf16, DType::BF16, text), &text[1..]);
        four_bits.compare(&exact, &all_logits(quantized(), DType::F32, text), &text[1..]);
    }
    // A GPU rounds what passes between the layers to bfloat16 too.
    half.choices_agree("bfloat16", if device().is_cpu() { 99 } else { 95 });
    four_bits.choices_agree("quantized", 97);
    [half, four_bits]
}

/// On prose of this project's own pages, 400 tokens a piece.
#[test]
fn rounded_numbers_cost_little_perplexity() {
    let [half, four_bits] = rounded(&serde_json::from_str::<Vec<_>>(include_str!("fixtures/prose.json")).unwrap());
    // A GPU rounds what passes between the layers to bfloat16 too.
    half.perplexity_is_within(if device().is_cpu() { 0.005 } else { 0.01 }, "bfloat16");
    four_bits.perplexity_is_within(0.005, "quantized");
}

/// On what the model wrote itself, the harder text: each token is there because float32 preferred it, so that to change the
/// numbers in any way is to prefer it less.
#[test]
fn rounded_numbers_choose_what_float32_chose() {
    let prompts = reference();
    let short = prompts.iter().filter(|prompt| prompt.prompt_tokens.len() < 350);
    let texts: Vec<_> = short
        .map(|prompt| [&prompt.prompt_tokens[..], &prompt.tokens].concat())
        .collect();
    let [half, four_bits] = rounded(&texts);
    half.perplexity_is_within(0.01, "bfloat16");
    four_bits.perplexity_is_within(0.01, "quantized");
}

#[test]
fn recomputed_in_other_blocks_a_decode_is_the_same() {
    if not_to_the_last_bit("recomputed_in_other_blocks_a_decode_is_the_same") {
        return;
    }
    let prompt = &reference()[0];
    let (last, before) = prompt.tokens.split_last().unwrap();
    let tokens = [&prompt.prompt_tokens[..], before, &[*last]].concat();
    let blocks = tokens.len().div_ceil(BLOCK_SIZE);
    let mut cache = cache(2 * blocks + 3);
    let mut decoded = Sequence::new(0, blocks);
    let mut first = Vec::new();
    for token in [&prompt.prompt_tokens[..]].into_iter().chain(prompt.tokens.chunks(1)) {
        let mut step = Step::default();
        decoded.push(&mut step, token);
        first = rows(&decoder().forward(&step, &mut cache).unwrap());
    }
    let mut again = Sequence::new(blocks + 2, blocks);
    again.block_table.reverse();
    let mut step = Step::default();
    again.push(&mut step, &tokens);
    assert!(rows(&decoder().forward(&step, &mut cache).unwrap()) == first);
}

#[test]
fn a_step_that_does_not_fit_is_refused() {
    let mut cache = cache(2);
    let mut refused = |tokens: Vec<u32>, start, len, block_table| {
        let step = Step {
            tokens,
            sequences: vec![Span {
                start,
                len,
                block_table,
                logits: true,
            }],
        };
        decoder().forward(&step, &mut cache).unwrap_err().to_string()
    };
    assert!(refused(vec![1], 0, 2, vec![0]).contains("cover 2 tokens"));
    assert!(refused(vec![49152], 0, 1, vec![0]).contains("vocabulary"));
    assert!(refused(vec![1], 16, 1, vec![0]).contains("too few"));
    assert!(refused(vec![1], 0, 1, vec![2]).contains("names block 2"));
    assert!(refused(vec![1], 8192, 1, vec![0; 600]).contains("positions"));
    assert!(refused(vec![], 0, 0, vec![0]).contains("adds no token"));
}

#[test]
fn a_step_without_logits_answers_none() {
    let step = Step {
        tokens: vec![1, 2, 3],
        sequences: vec![Span {
            start: 0,
            len: 3,
            block_table: vec![0],
            logits: false,
        }],
    };
    assert_eq!(decoder().forward(&step, &mut cache(1)).unwrap().dims(), [0, 49152]);
}
