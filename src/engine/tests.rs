//! The engine with the real model, without HTTP.

use std::{sync::Arc, time::Instant};

use prometheus::Registry;
use tokio::sync::mpsc;

use super::*;
use crate::{
    batching::{Buckets, Config, Schedule, WindowPolicy},
    commands::model_files,
    request::{Event, Failure, FinishReason, Sampling, Tenant, TokenId},
};

fn settings() -> Settings {
    let path = model_files::resolve("smollm2-135m-instruct").expect("the default model can be had");
    let batching = Config {
        schedule: Schedule::Continuous,
        window_policy: WindowPolicy::Adaptive,
        window: std::time::Duration::from_millis(1),
        max_batch: 8,
        step_tokens: 64,
        buckets: Buckets::default(),
        max_model_len: usize::MAX,
    };
    Settings {
        path,
        device: candle_core::Device::Cpu,
        dtype: None,
        batching,
        max_model_len: Some(256),
        dummy: false,
        kv_memory: None,
        gpu_memory: 0.9,
        cuda_graphs: true,
        block_size: 16,
        prefix_cache: true,
    }
}

fn request(prompt: Vec<TokenId>, sampling: Sampling) -> (Request, mpsc::UnboundedReceiver<Event>) {
    let (events, receiver) = mpsc::unbounded_channel();
    (
        Request {
            id: "test".into(),
            tenant: Arc::new(Tenant::anyone()),
            prompt,
            sampling,
            arrival: Instant::now(),
            deadline: None,
            events,
        },
        receiver,
    )
}

fn greedy(max_tokens: usize) -> Sampling {
    Sampling {
        temperature: 0.0,
        max_tokens,
        ..Sampling::default()
    }
}

/// A request's tokens and how it ended.
fn answer(mut events: mpsc::UnboundedReceiver<Event>) -> (Vec<TokenId>, Option<Event>) {
    let mut tokens = Vec::new();
    while let Some(event) = events.blocking_recv() {
        match event {
            Event::Admitted { .. } => assert!(tokens.is_empty(), "admitted before the first token"),
            Event::Token(token) => tokens.push(token.id),
            end => return (tokens, Some(end)),
        }
    }
    (tokens, None)
}

#[test]
fn answers_end_as_they_should_and_the_thread_ends_with_its_handles() {
    let metrics = Arc::new(EngineMetrics::new(&Registry::new()).unwrap());
    let engine = Engine::load(&settings(), metrics.clone()).unwrap();
    assert_eq!(engine.max_model_len(), 256);
    let (handle, thread) = engine.start(4).unwrap();

    // "What is the capital of France?" in the model's chat template; its answer is 8 tokens with the end token.
    let file: serde_json::Value =
        serde_json::from_str(include_str!("../../tests/fixtures/smollm2-135m-instruct-q4_1.json")).unwrap();
    let tokens = |field: &str| -> Vec<TokenId> { serde_json::from_value(file["prompts"][0][field].clone()).unwrap() };
    let (prompt, expected) = (tokens("prompt_tokens"), tokens("tokens"));

    let stopping = Sampling {
        stop_token_ids: vec![2],
        ..greedy(64)
    };
    let cases = [
        (stopping.clone(), expected.len(), FinishReason::Stop),
        (greedy(5), 5, FinishReason::Length),
        // Without its end token the answer goes on until the context is full.
        (
            Sampling {
                ignore_eos: true,
                max_tokens: 1000,
                ..stopping
            },
            256 - prompt.len(),
            FinishReason::Length,
        ),
    ];
    let (requests, receivers): (Vec<_>, Vec<_>) = cases
        .iter()
        .map(|(sampling, ..)| request(prompt.clone(), sampling.clone()))
        .unzip();
    handle.submit(requests).unwrap();
    for ((_, length, reason), receiver) in cases.iter().zip(receivers) {
        let (tokens, end) = answer(receiver);
        assert_eq!(end, Some(Event::Finished(*reason)));
        assert_eq!(tokens.len(), *length);
        assert_eq!(
            tokens[..expected.len().min(*length)],
            expected[..expected.len().min(*length)]
        );
    }

    let (mut late, receiver) = request(prompt.clone(), greedy(1000));
    late.deadline = Some(Instant::now());
    handle.submit(vec![late]).unwrap();
    assert_eq!(answer(receiver).1, Some(Event::Failed(Failure::DeadlinePassed)));

    let five: Vec<_> = (0..5).map(|_| request(prompt.clone(), greedy(1)).0).collect();
    assert_eq!(handle.submit(five), Err(Refused::QueueFull { limit: 4 }));

    drop(handle);
    thread.join().unwrap();
    assert_eq!(metrics.sequences.with_label_values(&["stop"]).get(), 1);
    assert_eq!(metrics.sequences.with_label_values(&["expired"]).get(), 1);
    assert_eq!(metrics.kv_blocks.with_label_values(&["held"]).get(), 0.0);
}
