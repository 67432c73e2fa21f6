//! The engine with the real model, without HTTP.

use std::{sync::Arc, time::Instant};

use prometheus::Registry;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use tokio::sync::mpsc;

use super::*;
use crate::{
    batching::{Buckets, CacheScope, Config, Outlook, Schedule, WindowPolicy},
    commands::model_files,
    request::{Event, Failure, FinishReason, Sampling, Tenant, TokenId},
};

pub(crate) fn settings() -> Settings {
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
        quantized: false,
        kv_memory: None,
        gpu_memory: 0.9,
        cuda_graphs: true,
        overlap: true,
        block_size: 16,
        prefix_cache: true,
        cache_file: None,
        cache_scope: CacheScope::Tenant,
        pin_share: 0.25,
        step_timeout: std::time::Duration::from_secs(60),
    }
}

pub(super) fn request(prompt: Vec<TokenId>, sampling: Sampling) -> (Request, mpsc::UnboundedReceiver<Event>) {
    let (events, receiver) = mpsc::unbounded_channel();
    (
        Request {
            id: "test".into(),
            tenant: Arc::new(Tenant::anyone()),
            priority: 0,
            prompt,
            cache_salt: None,
            sampling,
            arrival: Instant::now(),
            deadline: None,
            span: tracing::Span::none(),
            events,
            ended: Arc::default(),
        },
        receiver,
    )
}

pub(super) fn greedy(max_tokens: usize) -> Sampling {
    Sampling {
        temperature: 0.0,
        max_tokens,
        ..Sampling::default()
    }
}

pub(super) fn wait(guard: Guard) -> End {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
    runtime.unwrap().block_on(guard.wait())
}

/// A request's tokens and how it ended.
fn answer(mut events: mpsc::UnboundedReceiver<Event>) -> (Vec<TokenId>, Option<Event>) {
    let mut tokens = Vec::new();
    while let Some(event) = events.blocking_recv() {
        match event {
            Event::Admitted { .. } | Event::Prefilled { .. } => assert!(tokens.is_empty(), "before the first token"),
            Event::Token(token) => tokens.push(token.id),
            end => return (tokens, Some(end)),
        }
    }
    (tokens, None)
}

/// Prompts that begin with one of three texts, to different lengths, and go on differently; greedy and seeded.
fn mixed(count: u64) -> Vec<(Vec<TokenId>, Sampling)> {
    let mut random = StdRng::seed_from_u64(count);
    let mut one = |number| {
        let (text, shared) = (random.random_range(0..3), random.random_range(0..24));
        let own = random.random_range(1..10);
        let prompt = (0..shared)
            .map(|index| 1000 * (text + 1) + index)
            .chain((0..own).map(|_| random.random_range(300..4000)))
            .collect();
        let sampling = Sampling {
            temperature: if number % 2 == 0 { 0.0 } else { 0.9 },
            seed: number,
            ignore_eos: true,
            ..greedy(random.random_range(10..30))
        };
        (prompt, sampling)
    };
    (0..count).map(&mut one).collect()
}

impl Handle {
    /// The way into an engine that has been given up.
    pub(crate) fn lost() -> Self {
        let (queue, _) = mpsc::unbounded_channel();
        let outlook = Outlook {
            schedule: Schedule::Continuous,
            max_batch: 1,
            step_tokens: 1,
            capacity: 1,
            running: Vec::new(),
            lines: Vec::new(),
        };
        let watch = watch::Watch::new();
        watch.tell(&End::Hung);
        Self {
            queue,
            gate: SharedGate::new(Gate::new(places(1), outlook)),
            timeline: Arc::default(),
            watch,
            metrics: metrics(),
            number: 1,
        }
    }
}

/// No limit but this many requests that wait.
pub(crate) fn places(requests: usize) -> Limits {
    Limits {
        requests,
        tokens: None,
        in_flight: None,
        key_share: 1.0,
    }
}

pub(crate) fn metrics() -> Arc<EngineMetrics> {
    Arc::new(EngineMetrics::new(&Registry::new()).unwrap())
}

/// The answers to all of the requests, sent in bursts of eight to an engine of their own that counts into `metrics`.
fn answers(
    metrics: &Arc<EngineMetrics>,
    settings: &Settings,
    requests: &[(Vec<TokenId>, Sampling)],
) -> Vec<Vec<TokenId>> {
    let engine = Engine::new(&Weights::load(settings).unwrap(), metrics.clone()).unwrap();
    let (handle, guard) = engine.start(places(requests.len())).unwrap();
    let mut answers = Vec::new();
    for burst in requests.chunks(8) {
        let (burst, receivers): (Vec<_>, Vec<_>) = burst
            .iter()
            .map(|(prompt, sampling)| request(prompt.clone(), sampling.clone()))
            .unzip();
        handle.submit(burst).unwrap();
        answers.extend(receivers.into_iter().map(|receiver| answer(receiver).0));
    }
    drop(handle);
    assert_eq!(wait(guard), End::Finished);
    answers
}

#[test]
fn the_prefix_cache_changes_no_token_however_little_memory_there_is() {
    let requests = mixed(20);
    let engine = |prefix_cache, block_size, kv_tokens: u64| {
        let settings = settings();
        Settings {
            max_model_len: Some(64),
            // A token's keys and values in the default model, in float32.
            kv_memory: Some(kv_tokens * 46_080),
            block_size,
            prefix_cache,
            batching: Config {
                step_tokens: 48,
                ..settings.batching.clone()
            },
            ..settings
        }
    };
    let expected = answers(&metrics(), &engine(false, 4, 1024), &requests);
    // One engine after another counts into the same metrics, as after a restart.
    let metrics = metrics();
    let counted = || {
        (
            metrics.cache.tokens.get(),
            metrics.cache.evictions.get(),
            metrics.preemptions.get(),
        )
    };
    let mut before = (0, 0, 0);
    for (engines, (block_size, kv_tokens)) in (1..).zip([(4, 80), (8, 96)]) {
        let answers = answers(&metrics, &engine(true, block_size, kv_tokens), &requests);
        assert_eq!(answers, expected, "with blocks of {block_size}");
        let prompts: usize = requests.iter().map(|(prompt, _)| prompt.len()).sum();
        assert_eq!(
            metrics.prefill_tokens.get() + metrics.cache.tokens.get(),
            (engines * prompts) as u64
        );
        let by_outcome = ["hit", "miss"].map(|outcome| metrics.cache.requests.with_label_values(&[outcome]).get());
        assert_eq!(by_outcome.iter().sum::<u64>(), (engines * requests.len()) as u64);
        let (found, evictions, preemptions) = counted();
        assert!(
            found > before.0 && evictions > before.1 && preemptions > before.2,
            "{found} found, {evictions} evicted, {preemptions} preempted; before: {before:?}"
        );
        before = (found, evictions, preemptions);
    }
}

#[test]
fn answers_end_as_they_should_and_the_thread_ends_with_its_handles() {
    let metrics = metrics();
    let engine = Engine::new(&Weights::load(&settings()).unwrap(), metrics.clone()).unwrap();
    assert_eq!(engine.max_model_len(), 256);
    let (handle, guard) = engine.start(places(4)).unwrap();
    handle.show();

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

    // It is let in once the engine has said that it is idle.
    let receiver = loop {
        let (mut late, receiver) = request(prompt.clone(), greedy(1000));
        late.deadline = Some(Instant::now());
        if handle.submit(vec![late]).is_ok() {
            break receiver;
        }
        thread::yield_now();
    };
    assert_eq!(answer(receiver).1, Some(Event::Failed(Failure::DeadlinePassed)));

    let five: Vec<_> = (0..5).map(|_| request(prompt.clone(), greedy(1)).0).collect();
    let refused = handle.submit(five).unwrap_err();
    assert!(
        matches!(refused, Refused::TooLarge(_)) && refused.to_string().contains("at most 4 (`--queue`)"),
        "{refused}"
    );

    drop(handle);
    assert_eq!(wait(guard), End::Finished);
    assert_eq!(metrics.sequences.with_label_values(&["stop"]).get(), 1);
    assert_eq!(metrics.sequences.with_label_values(&["expired"]).get(), 1);
    assert_eq!(metrics.kv_blocks.with_label_values(&["held"]).get(), 0.0);
}

#[test]
fn an_answer_that_its_reader_ends_is_no_cancelled_one() {
    let metrics = metrics();
    let engine = Engine::new(&Weights::load(&settings()).unwrap(), metrics.clone()).unwrap();
    let (handle, guard) = engine.start(places(4)).unwrap();
    let asked = |max_tokens: usize| {
        let sampling = Sampling {
            ignore_eos: true,
            ..greedy(max_tokens)
        };
        request(vec![300; 4], sampling)
    };
    // After so many steps there are predictions.
    let (first, receiver) = asked(20);
    handle.submit(vec![first]).unwrap();
    answer(receiver);
    for end in [Some(FinishReason::Stop), Some(FinishReason::Deadline), None] {
        let (mut request, mut events) = asked(200);
        request.deadline = Some(request.arrival + std::time::Duration::from_secs(3600));
        let ended = request.ended.clone();
        handle.submit(vec![request]).unwrap();
        while !matches!(events.blocking_recv().expect("a token"), Event::Token(_)) {}
        if let Some(reason) = end {
            ended.set(reason).unwrap();
        }
    }
    drop(handle);
    assert_eq!(wait(guard), End::Finished);
    let outcomes = ["stop", "cut", "cancelled", "length"];
    assert_eq!(
        outcomes.map(|outcome| metrics.sequences.with_label_values(&[outcome]).get()),
        [1; 4]
    );
    // The first had no prediction, and one that was cancelled says nothing of its own.
    assert_eq!(metrics.prediction_error.get_sample_count(), 2);
}

#[test]
fn whoever_leaves_frees_its_place_within_a_step() {
    let metrics = metrics();
    let mut settings = settings();
    (settings.batching.max_batch, settings.batching.step_tokens) = (1, 8);
    settings.max_model_len = Some(8192);
    let engine = Engine::new(&Weights::load(&settings).unwrap(), metrics.clone()).unwrap();
    let (handle, guard) = engine.start(places(4)).unwrap();
    handle.show();
    let wait_until = |condition: &dyn Fn() -> bool| {
        let start = Instant::now();
        while !condition() {
            assert!(start.elapsed().as_secs() < 60);
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    };
    let held = || metrics.kv_blocks.with_label_values(&["held"]).get();
    // In its prefill of a thousand steps, and in its decode of several, each with another that waits behind it. Neither
    // is done before it is looked at.
    for (prompt, decodes) in [(vec![300; 8000], 0), (vec![300; 4], 3)] {
        let ignoring = Sampling {
            ignore_eos: true,
            ..greedy(8000)
        };
        let (runs, running) = request(prompt.clone(), ignoring);
        let (waits, waiting) = request(prompt, greedy(1));
        let (prefilled, decoded) = (metrics.prefill_tokens.get(), metrics.decode_tokens.get());
        handle.submit(vec![runs, waits]).unwrap();
        wait_until(&|| metrics.prefill_tokens.get() > prefilled && metrics.decode_tokens.get() >= decoded + decodes);
        // The gauge follows the counters at the end of the step.
        wait_until(&|| held() > 0.0);
        // In this order, or the one that waits might still be answered.
        drop((waiting, running));
        let steps = metrics.step_seconds.get_sample_count();
        wait_until(&|| held() == 0.0 && metrics.waiting.get() == 0.0);
        // The step that ran as they left, and none after it.
        assert!(metrics.step_seconds.get_sample_count() <= steps + 1);
    }
    drop(handle);
    assert_eq!(wait(guard), End::Finished);
    assert_eq!(metrics.sequences.with_label_values(&["cancelled"]).get(), 4);
}
