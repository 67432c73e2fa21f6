//! The default model's forward pass in float32, in bfloat16 and quantized: prefills of several lengths, and decodes of
//! several batch sizes at position 128.

#[path = "../tests/common/mod.rs"]
mod common;

use candle_core::{DType, Device};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use sconce_models::{Decoder, KvCache, Span, Step};

const BLOCK_SIZE: usize = 16;
/// Blocks of each sequence.
const BLOCKS: usize = 32;

/// `sequences` sequences that each run `len` tokens from position `start` on.
fn step(sequences: usize, start: usize, len: usize) -> Step {
    let blocks = |index: usize| {
        (index * BLOCKS..(index + 1) * BLOCKS)
            .map(|block| block as u32)
            .collect()
    };
    let spans = (0..sequences).map(|index| Span {
        start,
        len,
        block_table: blocks(index),
        logits: true,
    });
    Step {
        tokens: (0..sequences * len).map(|i| i as u32 % 1000).collect(),
        sequences: spans.collect(),
    }
}

fn forward(c: &mut Criterion) {
    let prefills =
        [(1, 32), (1, 128), (4, 128), (1, 512)].map(|(n, len)| (format!("prefill {n} x {len}"), step(n, 0, len)));
    let decodes = [1, 8, 64].map(|n| (format!("decode {n}"), step(n, 128, 1)));
    let (path, device) = (common::default_model(), Device::Cpu);
    for (kind, dtype, decoder) in [
        ("float32", DType::F32, Decoder::load(&path, &device, DType::F32)),
        ("bfloat16", DType::BF16, Decoder::load(&path, &device, DType::BF16)),
        (
            "quantized",
            DType::F32,
            Decoder::load_quantized(&path, &device, DType::F32),
        ),
    ] {
        let decoder = decoder.unwrap();
        let mut cache = KvCache::new(decoder.config(), 64 * BLOCKS, BLOCK_SIZE, dtype, &device).unwrap();
        // What is read of memory that was never written is one page of zeros, over and over.
        decoder.forward(&step(64, 0, 128), &mut cache).unwrap();
        let mut group = c.benchmark_group(kind);
        group.sample_size(10);
        for (name, step) in prefills.iter().chain(&decodes) {
            group.throughput(Throughput::Elements(step.tokens.len() as u64));
            group.bench_function(BenchmarkId::from_parameter(name), |b| {
                b.iter(|| decoder.forward(step, &mut cache).unwrap());
            });
        }
    }
}

criterion_group!(benches, forward);
criterion_main!(benches);
