//! Steps that are enqueued while the device runs the one before: every request gets the answer that it gets without.

use std::{
    path::Path,
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
};

use proptest::prelude::*;

use super::{
    late::Late,
    tests::{metrics, places, request, settings, wait},
    *,
};
use crate::request::{Event, Failure, FinishReason, Sampling, TokenId};

const VOCABULARY: u32 = 64;
const CONTEXT: usize = 48;
/// Bytes of a token's keys and values in the model below.
const TOKEN_BYTES: u64 = 2 * 2 * 16 * 4;

#[derive(Debug, Clone)]
struct Ask {
    prompt: Vec<TokenId>,
    sampling: Sampling,
    /// How many events its client reads before it leaves, if it does.
    leaves: Option<usize>,
    id: &'static str,
}

/// What became of a request.
#[derive(Debug, PartialEq)]
struct Answer {
    tokens: Vec<TokenId>,
    end: Option<Event>,
}

/// A small model with random weights, which answers to anything at once.
fn weights(folder: &Path, kv_tokens: usize, prefix_cache: bool, overlap: bool) -> Weights {
    let path = folder.join("config.json");
    let config = r#"{"model_type": "qwen3", "hidden_size": 32, "intermediate_size": 48, "vocab_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
        "rms_norm_eps": 1e-6, "max_position_embeddings": 64}"#;
    std::fs::write(&path, config).unwrap();
    let settings = settings();
    let batching = Config {
        max_batch: 6,
        step_tokens: 12,
        ..settings.batching.clone()
    };
    let settings = Settings {
        path,
        dummy: true,
        batching,
        max_model_len: Some(CONTEXT),
        kv_memory: Some(kv_tokens as u64 * TOKEN_BYTES),
        block_size: 4,
        prefix_cache,
        overlap,
        ..settings
    };
    Weights::load(&settings).unwrap()
}

fn run(weights: &Weights, late: Option<Late>, asks: &[Ask]) -> Vec<Answer> {
    let mut engine = Engine::new(weights, metrics()).unwrap();
    engine.model.late = late;
    let (handle, guard) = engine.start(places(asks.len())).unwrap();
    // So that what each step ran is counted for it.
    let timeline = handle.timeline.clone();
    let _recording = timeline.begin().unwrap();
    let ask = |ask: &Ask| {
        let (mut request, events) = request(ask.prompt.clone(), ask.sampling.clone());
        request.id = ask.id.into();
        (request, events)
    };
    let (requests, receivers): (Vec<_>, Vec<_>) = asks.iter().map(ask).unzip();
    handle.submit(requests).unwrap();
    drop(handle);
    let answers = asks.iter().zip(receivers).map(|(ask, mut events)| {
        let (mut tokens, mut end) = (Vec::new(), None);
        let mut left = ask.leaves.unwrap_or(usize::MAX);
        while let Some(event) = (left > 0).then(|| events.blocking_recv()).flatten() {
            left -= 1;
            match event {
                Event::Token(token) => tokens.push(token.id),
                Event::Admitted { .. } | Event::Prefilled { .. } => {}
                event => end = Some(event),
            }
        }
        Answer { tokens, end }
    });
    let answers = answers.collect();
    wait(guard);
    answers
}

/// Penalties, each with and without effect, and a bias.
fn penalties() -> impl Strategy<Value = Sampling> {
    let repetition = prop_oneof![Just(1.0f32), 0.7f32..2.0];
    let penalty = || prop_oneof![Just(0.0f32), -1f32..1.5];
    (repetition, penalty(), penalty(), 0..VOCABULARY).prop_map(
        |(repetition_penalty, presence_penalty, frequency_penalty, token)| Sampling {
            repetition_penalty,
            presence_penalty,
            frequency_penalty,
            logit_bias: vec![(token, 1.0)],
            ..Sampling::default()
        },
    )
}

/// Prompts that begin alike, to different lengths; greedy and seeded, some with penalties, some with log-probabilities,
/// which do not go ahead, and some with stop tokens, which nobody can foresee.
fn ask() -> impl Strategy<Value = Ask> {
    let prompt = (0u32..12, prop::collection::vec(0..VOCABULARY, 1..12))
        .prop_map(|(shared, tail)| (0..shared).chain(tail).collect::<Vec<_>>());
    let rules = (any::<bool>(), any::<bool>(), prop::option::weighted(0.05, 0usize..3));
    let penalties = prop::option::of(penalties());
    let leaves = prop::option::weighted(0.15, 0usize..12);
    (prompt, rules, penalties, any::<u64>(), 1usize..40, leaves).prop_map(
        |(prompt, (greedy, stops, logprobs), penalties, seed, max_tokens, leaves)| Ask {
            prompt,
            sampling: Sampling {
                temperature: if greedy { 0.0 } else { 1.0 },
                stop_token_ids: if stops { (0..6).collect() } else { Vec::new() },
                logprobs,
                seed,
                max_tokens,
                ..penalties.unwrap_or_default()
            },
            leaves,
            id: "test",
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Token for token, whoever shares the batch, stops or leaves, however little memory there is, with and without the
    /// prefix cache, and if steps under way fail.
    #[test]
    fn overlap_changes_no_answer(
        asks in prop::collection::vec(ask(), 1..14),
        kv_tokens in CONTEXT..4 * CONTEXT,
        prefix_cache in any::<bool>(),
        failing in prop::collection::vec(0usize..40, 0..3),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let alone: Vec<Ask> = asks.iter().map(|ask| Ask { leaves: None, ..ask.clone() }).collect();
        let expected = run(&weights(folder.path(), 1024, false, false), None, &alone);
        for overlap in [true, false] {
            let late = Late::failing(failing.clone());
            let overlapped = late.overlapped.clone();
            let answers = run(&weights(folder.path(), kv_tokens, prefix_cache, overlap), Some(late), &asks);
            let mut failures = 0;
            for ((ask, expected), answer) in asks.iter().zip(&expected).zip(&answers) {
                let failed = matches!(answer.end, Some(Event::Failed(Failure::Step(_))));
                failures += usize::from(failed);
                if failed || ask.leaves.is_some() {
                    prop_assert!(expected.tokens.starts_with(&answer.tokens));
                } else {
                    prop_assert_eq!(expected, answer);
                }
            }
            // A step of one row that fails ends its request.
            prop_assert!(failures <= failing.len());
            prop_assert!(overlap || overlapped.load(Relaxed) == 0);
        }
    }
}

fn greedy(prompt: Vec<TokenId>, max_tokens: usize, id: &'static str) -> Ask {
    Ask {
        prompt,
        sampling: tests::greedy(max_tokens),
        leaves: None,
        id,
    }
}

fn overlapping() -> (Late, Arc<AtomicUsize>) {
    let late = Late::default();
    let overlapped = late.overlapped.clone();
    (late, overlapped)
}

#[test]
fn a_step_is_enqueued_while_the_one_before_runs() {
    let folder = tempfile::tempdir().unwrap();
    let (late, overlapped) = overlapping();
    let answers = run(
        &weights(folder.path(), 256, true, true),
        Some(late),
        &[greedy(vec![1, 2], 20, "test")],
    );
    assert_eq!(answers[0].tokens.len(), 20);
    assert_eq!(answers[0].end, Some(Event::Finished(FinishReason::Length)));
    // All but the first, and none for a token behind the last.
    assert_eq!(overlapped.load(Relaxed), 19);
}

#[test]
fn penalties_do_not_keep_a_step_from_being_enqueued_ahead() {
    let folder = tempfile::tempdir().unwrap();
    let penalised = |first, temperature, penalties: Sampling| {
        let mut ask = greedy(vec![first, 2, 3], 20, "test");
        ask.sampling = Sampling {
            temperature,
            max_tokens: 20,
            seed: 5,
            ..penalties
        };
        ask
    };
    let frequency = Sampling {
        frequency_penalty: 0.9,
        ..Sampling::default()
    };
    let all = Sampling {
        repetition_penalty: 1.5,
        presence_penalty: 0.5,
        logit_bias: vec![(7, 0.5)],
        ..frequency.clone()
    };
    let asks = [
        penalised(1, 0.0, frequency.clone()),
        penalised(2, 0.0, all.clone()),
        penalised(3, 1.0, frequency),
        penalised(4, 1.0, all),
    ];
    let expected = run(&weights(folder.path(), 256, true, false), None, &asks);
    let (late, overlapped) = overlapping();
    assert_eq!(
        run(&weights(folder.path(), 256, true, true), Some(late), &asks),
        expected
    );
    assert_eq!(overlapped.load(Relaxed), 19);
}

#[test]
fn the_device_is_told_of_a_sequence_once_and_again_after_a_failure() {
    let folder = tempfile::tempdir().unwrap();
    let asks = [greedy(vec![1, 2], 20, "test"), greedy(vec![3, 4, 5], 16, "test")];
    for (failing, told) in [(vec![], 2), (vec![5], 4)] {
        let late = Late::failing(failing);
        let sets = late.sets.clone();
        run(&weights(folder.path(), 512, true, true), Some(late), &asks);
        assert_eq!(sets.load(Relaxed), told);
    }
}

#[test]
fn a_fault_in_a_step_behind_another_has_one_victim() {
    let folder = tempfile::tempdir().unwrap();
    let weights = weights(folder.path(), 512, true, true);
    let good = |first| greedy(vec![first, 7, 9], 24, "test");
    let alone = run(&weights, None, &[good(1), good(2)]);
    for (fault, tokens) in [
        ("fault.nan.3", Some(3)),
        ("fault.step.3", Some(3)),
        ("fault.step-panic.2", Some(2)),
        ("fault.out-of-memory.2", None),
    ] {
        let (late, overlapped) = overlapping();
        let answers = run(&weights, Some(late), &[good(1), greedy(vec![3; 5], 12, fault), good(2)]);
        assert_eq!([&answers[0], &answers[2]], [&alone[0], &alone[1]], "{fault}");
        let failed = matches!(answers[1].end, Some(Event::Failed(_)));
        assert_eq!(failed, tokens.is_some(), "{fault}: {:?}", answers[1].end);
        assert_eq!(answers[1].tokens.len(), tokens.unwrap_or(12), "{fault}");
        assert!(overlapped.load(Relaxed) > 0);
    }
}

#[test]
fn whoever_waits_is_told_when_a_step_behind_another_hangs_or_loses_the_device() {
    let folder = tempfile::tempdir().unwrap();
    for (fault, hangs) in [("fault.hang.2", true), ("fault.device-lost.2", false)] {
        let mut weights = weights(folder.path(), 512, true, true);
        if hangs {
            weights.set_step_timeout(Duration::from_millis(200));
        }
        let mut engine = Engine::new(&weights, metrics()).unwrap();
        engine.model.late = Some(Late::default());
        let (handle, guard) = engine.start(places(2)).unwrap();
        let (mut faulty, mut events) = request(vec![1, 2, 3], tests::greedy(12));
        faulty.id = fault.into();
        handle.submit(vec![faulty]).unwrap();
        let end = wait(guard);
        assert_eq!(end == End::Hung, hangs, "{end:?}");
        let mut last = None;
        while let Some(event) = events.blocking_recv() {
            last = Some(event);
            if let Some(Event::Failed(_)) = last {
                break;
            }
        }
        assert!(matches!(last, Some(Event::Failed(Failure::EngineLost(_)))), "{last:?}");
    }
}

#[test]
fn a_prompt_is_pinned_while_others_decode() {
    let folder = tempfile::tempdir().unwrap();
    let mut engine = Engine::new(&weights(folder.path(), 512, true, true), metrics()).unwrap();
    let late = Late::default();
    let overlapped = late.overlapped.clone();
    engine.model.late = Some(late);
    let (handle, guard) = engine.start(places(4)).unwrap();
    let (long, mut events) = request(vec![5, 6], tests::greedy(40));
    handle.submit(vec![long]).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .unwrap();
    let (prompt, _) = request((0..14).collect(), tests::greedy(1000));
    let order = PinRequest {
        id: "pin".into(),
        owner: None,
        shared: false,
        ttl: None,
    };
    let pinned = runtime.block_on(handle.pin(prompt, order, || ())).unwrap();
    assert_eq!(pinned.tokens, 12);
    let report = runtime.block_on(handle.cache_report("anyone".into())).unwrap();
    assert_eq!((report.pins.asked, report.prompts.len()), (3, 1));
    let mut tokens = 0;
    while let Some(event) = events.blocking_recv() {
        tokens += usize::from(matches!(event, Event::Token(_)));
    }
    assert_eq!(tokens, 40);
    assert!(overlapped.load(Relaxed) > 0);
    drop(handle);
    assert_eq!(wait(guard), End::Finished);
}
