//! The whole decoder on the first GPU against the CPU's; run where `SCONCE_TEST_DEVICE=cuda` says that there is one.

use std::collections::BTreeMap;

use candle_core::{DType, Device};

use crate::{Carried, Count, Decoder, Draw, KvCache, Slot, Span, State, Step};

const BLOCK: usize = 16;
const BLOCKS: usize = 12;

/// A shape with every part that the families have; head sizes are the kernels'.
fn config(architecture: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let window = if architecture == "mistral" { "50" } else { "null" };
    let text = format!(
        r#"{{"model_type": "{architecture}", "hidden_size": 256, "intermediate_size": 384, "vocab_size": 1000,
            "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64,
            "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "rope_theta": 10000.0, "sliding_window": {window}}}"#
    );
    std::fs::write(folder.path().join("config.json"), text).unwrap();
    folder
}

fn span(index: usize, start: usize, len: usize) -> Span {
    let blocks = index * BLOCKS..(index + 1) * BLOCKS;
    Span {
        start,
        len,
        block_table: blocks.rev().map(|block| block as u32).collect(),
        logits: true,
    }
}

fn step(spans: Vec<Span>) -> Step {
    let tokens: usize = spans.iter().map(|span| span.len).sum();
    Step {
        tokens: (0..tokens).map(|token| (token * 37 % 1000) as u32).collect(),
        sequences: spans,
    }
}

/// Two prompts of which one is cut, then three decodes.
fn steps() -> [Step; 3] {
    [
        step(vec![span(0, 0, 70), span(1, 0, 33)]),
        step(vec![span(0, 70, 1), span(1, 33, 60), span(2, 0, 1)]),
        step(vec![span(1, 93, 1), span(0, 71, 1), span(2, 1, 1)]),
    ]
}

fn run(architecture: &str, dtype: DType, tolerance: f32) {
    let folder = config(architecture);
    let path = folder.path().join("config.json");
    let device = Device::new_cuda_with_stream(0).unwrap();
    let on_cpu = Decoder::dummy(&path, &Device::Cpu, DType::F32).unwrap();
    let on_gpu = Decoder::dummy(&path, &device, dtype).unwrap();
    let cache = |device: &Device, dtype| KvCache::new(on_cpu.config(), 3 * BLOCKS, BLOCK, dtype, device).unwrap();
    let mut host = cache(&Device::Cpu, DType::F32);
    // Step by step, and then the same with graphs and choices on the device.
    let (mut plain, mut graphs) = (cache(&device, dtype), cache(&device, dtype));
    on_gpu.prepare(&mut graphs, 128, 16, true).unwrap();
    for step in steps() {
        let expected: Vec<Vec<f32>> = on_cpu.forward(&step, &mut host).unwrap().to_vec2().unwrap();
        let found: Vec<Vec<f32>> = on_gpu.forward(&step, &mut plain).unwrap().to_vec2().unwrap();
        let draws = vec![Draw::greedy(); found.len()];
        let tokens = on_gpu.sample(&step, &mut graphs, &draws).unwrap();
        for ((found, expected), token) in found.iter().zip(&expected).zip(tokens) {
            super::assert_close(found, expected, tolerance);
            let token = token.expect("a finite row") as usize;
            let highest = found.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            assert!(highest - found[token] <= tolerance, "{token} is not the largest");
        }
    }
}

fn there_is_a_gpu() -> bool {
    std::env::var("SCONCE_TEST_DEVICE").as_deref() == Ok("cuda")
}

#[test]
fn logits_are_the_cpus() {
    if !there_is_a_gpu() {
        return;
    }
    for architecture in ["llama", "mistral", "qwen3"] {
        run(architecture, DType::F32, 2e-3);
        run(architecture, DType::BF16, 0.15);
        run(architecture, DType::F16, 0.03);
    }
}

/// A draw of the sequence that has the slot, which is set, if that is to be, to the tokens that it has generated.
fn penalised(number: usize, generated: Option<&[u32]>) -> Draw {
    let set = generated.map(|tokens| {
        let mut counts = BTreeMap::new();
        tokens.iter().for_each(|&token| *counts.entry(token).or_default() += 1);
        let count = |(token, generated)| Count {
            token,
            in_prompt: false,
            generated,
        };
        State {
            seed: number as u64,
            generated: tokens.len() as u32,
            counts: counts.into_iter().map(count).collect(),
        }
    });
    Draw {
        temperature: 0.8,
        repetition: 1.5,
        presence: 0.2,
        frequency: 0.4,
        slot: Some(Slot {
            number: number as u32,
            set,
        }),
        ..Draw::greedy()
    }
}

#[test]
fn a_step_goes_on_from_tokens_that_the_host_has_not_seen() {
    if !there_is_a_gpu() {
        return;
    }
    let folder = config("qwen3");
    let device = Device::new_cuda_with_stream(0).unwrap();
    let decoder = Decoder::dummy(&folder.path().join("config.json"), &device, DType::BF16).unwrap();
    let first = step(vec![span(0, 0, 70), span(1, 0, 33)]);
    // The other way round than before, and then as before.
    let next = |number| step(vec![span(1, 33 + number, 1), span(0, 70 + number, 1)]);
    let place = |number: usize, row: usize| if number == 0 { 1 - row } else { row };
    let begin = [0, 1].map(|slot| penalised(slot, Some(&[])));
    let go_on = [1, 0].map(|slot| penalised(slot, None));
    // As if every step were the slots' first.
    let set = |steps: &[Vec<Option<u32>>]| {
        let tokens = |row| (0..).zip(steps).map(move |(n, tokens)| tokens[place(n, row)].unwrap());
        [0, 1].map(|row| penalised(1 - row, Some(&tokens(row).collect::<Vec<_>>())))
    };
    for graphs in [false, true] {
        let cache = || {
            let mut cache = KvCache::new(decoder.config(), 2 * BLOCKS, BLOCK, DType::BF16, &device).unwrap();
            decoder.prepare(&mut cache, 128, 16, graphs).unwrap();
            cache
        };
        let (mut waited, mut ahead) = (cache(), cache());
        let mut expected = vec![decoder.sample(&first, &mut waited, &begin).unwrap()];
        let mut pending = decoder.enqueue(&first, &mut ahead, &begin, None).unwrap();
        let mut found = Vec::new();
        for number in 0..5 {
            let rows = [0, 1].map(|row| place(number, row));
            let mut known = next(number);
            known.tokens = rows.map(|row| expected[number][row].unwrap()).to_vec();
            let all = set(&expected);
            expected.push(decoder.sample(&known, &mut waited, &all).unwrap());
            let carried = Carried {
                from: &pending,
                tokens: rows.into_iter().enumerate().collect(),
            };
            let later = decoder
                .enqueue(&next(number), &mut ahead, &go_on, Some(carried))
                .unwrap();
            found.push(decoder.wait(pending, &mut ahead).unwrap());
            pending = later;
        }
        found.push(decoder.wait(pending, &mut ahead).unwrap());
        assert_eq!(found, expected, "graphs: {graphs}");
    }
}

#[test]
fn a_block_comes_back_as_it_was_written() {
    if !there_is_a_gpu() {
        return;
    }
    let folder = config("llama");
    let decoder = Decoder::dummy(&folder.path().join("config.json"), &Device::Cpu, DType::F32).unwrap();
    let device = Device::new_cuda_with_stream(0).unwrap();
    let mut cache = KvCache::new(decoder.config(), 100, BLOCK, DType::BF16, &device).unwrap();
    let bytes: Vec<u8> = (0..cache.block_bytes()).map(|i| (i % 61) as u8).collect();
    cache.write_block(57, &bytes).unwrap();
    for block in [56, 57, 58] {
        let mut found = Vec::new();
        cache.read_block(block, &mut found).unwrap();
        assert!(if block == 57 {
            found == bytes
        } else {
            found.iter().all(|&byte| byte == 0)
        });
    }
}

/// Lists that outgrow their memory take the graphs with them; the next decode captures its own again.
#[test]
fn graphs_come_back_after_memory_was_too_small() {
    if !there_is_a_gpu() {
        return;
    }
    let folder = config("llama");
    let device = Device::new_cuda_with_stream(0).unwrap();
    let decoder = Decoder::dummy(&folder.path().join("config.json"), &device, DType::BF16).unwrap();
    let mut cache = KvCache::new(decoder.config(), 3 * BLOCKS, BLOCK, DType::BF16, &device).unwrap();
    decoder.prepare(&mut cache, 8, 8, true).unwrap();
    let decode = |cache: &mut KvCache| {
        decoder
            .sample(&step(vec![span(0, 0, 1)]), cache, &[Draw::greedy()])
            .unwrap()
    };
    let before = decode(&mut cache);
    decoder
        .sample(&step(vec![span(2, 0, 1)]), &mut cache, &[penalised(3, Some(&[]))])
        .unwrap();
    let none = |cache: &KvCache| format!("{:?}", cache.workspace).contains("graphs: 0");
    assert!(!none(&cache));
    let prompt = step(vec![span(1, 0, 150)]);
    decoder.sample(&prompt, &mut cache, &[Draw::greedy()]).unwrap();
    assert!(none(&cache), "the prompt needed more memory");
    assert_eq!([decode(&mut cache), decode(&mut cache)], [before.clone(), before]);
    assert!(!none(&cache));
    // Slots move to the larger memory with what they hold.
    let mut other = KvCache::new(decoder.config(), 3 * BLOCKS, BLOCK, DType::BF16, &device).unwrap();
    decoder.prepare(&mut other, 256, 8, true).unwrap();
    let prompt = step(vec![span(2, 0, 1)]);
    decoder.sample(&prompt, &mut other, &[penalised(3, Some(&[]))]).unwrap();
    let next = step(vec![span(2, 1, 1)]);
    let found = decoder.sample(&next, &mut cache, &[penalised(3, None)]).unwrap();
    assert_eq!(found, decoder.sample(&next, &mut other, &[penalised(3, None)]).unwrap());
}

#[test]
fn a_share_of_the_memory_is_left_for_the_cache() {
    if !there_is_a_gpu() {
        return;
    }
    let folder = config("llama");
    let device = Device::new_cuda_with_stream(0).unwrap();
    let decoder = Decoder::dummy(&folder.path().join("config.json"), &device, DType::BF16).unwrap();
    let memory = decoder.memory_beside_kv(512, 100).unwrap().unwrap();
    assert!(0 < memory.taken && memory.taken < memory.total);
    assert!(memory.left(0.5) > 1 << 30);
    assert!(memory.left(0.5) < memory.left(0.6));
}
