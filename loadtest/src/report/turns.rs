//! What the requests of a session have in common by their place in it: a later turn has a longer history, which the
//! server may have kept.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::recorder::Record;

/// The answered requests that were the `turn`-th of their session.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Turn {
    /// From 1.
    pub turn: u32,
    pub answered: u64,
    /// Means over the requests for which the server says: the prompt, and what of it the prefix cache had.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt_tokens: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cached_tokens: Option<f64>,
    /// Medians and 99th percentiles in milliseconds; no TTFT for whole answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttft_p50_ms: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttft_p99_ms: Option<f64>,
    pub e2e_p50_ms: f64,
}

/// Empty where no session had a second request.
pub fn of(records: &[Record]) -> Vec<Turn> {
    let mut by_turn: BTreeMap<u32, Vec<&Record>> = BTreeMap::new();
    for record in records {
        by_turn.entry(record.turn).or_default().push(record);
    }
    if by_turn.keys().all(|&turn| turn <= 1) {
        return Vec::new();
    }
    by_turn.into_iter().map(|(turn, records)| one(turn, &records)).collect()
}

/// `records` holds at least one.
fn one(turn: u32, records: &[&Record]) -> Turn {
    let mean = |tokens: fn(&Record) -> Option<u32>| {
        let tokens: Vec<f64> = records
            .iter()
            .filter_map(|record| tokens(record))
            .map(f64::from)
            .collect();
        (!tokens.is_empty()).then(|| tokens.iter().sum::<f64>() / tokens.len() as f64)
    };
    let ttft: Vec<u64> = records.iter().filter_map(|record| record.ttft).collect();
    let e2e: Vec<u64> = records.iter().map(|record| record.e2e).collect();
    Turn {
        turn,
        answered: records.len() as u64,
        prompt_tokens: mean(|record| record.prompt_tokens),
        cached_tokens: mean(|record| record.cached_tokens),
        ttft_p50_ms: percentile(&ttft, 50),
        ttft_p99_ms: percentile(&ttft, 99),
        e2e_p50_ms: percentile(&e2e, 50).unwrap_or_default(),
    }
}

/// The least value that so many per cent of the values do not exceed, from microseconds to milliseconds.
fn percentile(values: &[u64], percent: usize) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_unstable();
    let index = (sorted.len() * percent).div_ceil(100).checked_sub(1)?;
    Some(sorted[index] as f64 / 1e3)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(turn: u32, ttft_ms: u64, prompt_tokens: u32, cached_tokens: Option<u32>) -> Record {
        Record {
            turn,
            ttft: Some(ttft_ms * 1000),
            e2e: ttft_ms * 2000,
            prompt_tokens: Some(prompt_tokens),
            cached_tokens,
            ..Record::default()
        }
    }

    #[test]
    fn turns_are_summed_up_one_by_one() {
        let records = [
            record(1, 30, 100, Some(0)),
            record(2, 9, 220, Some(100)),
            record(1, 10, 80, Some(48)),
            record(1, 20, 120, Some(0)),
        ];
        let turns = of(&records);
        assert_eq!(turns.len(), 2);
        let first = &turns[0];
        assert_eq!((first.turn, first.answered, first.prompt_tokens), (1, 3, Some(100.0)));
        assert_eq!((first.ttft_p50_ms, first.ttft_p99_ms), (Some(20.0), Some(30.0)));
        assert_eq!((first.cached_tokens, first.e2e_p50_ms), (Some(16.0), 40.0));
        assert_eq!((turns[1].turn, turns[1].cached_tokens), (2, Some(100.0)));
    }

    #[test]
    fn single_requests_have_no_turns() {
        assert!(of(&[record(1, 5, 1, None)]).is_empty());
    }
}
