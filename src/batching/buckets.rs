//! Buckets: which requests have prompts of similar length.

use std::{fmt, str::FromStr};

/// Upper bounds of prompt lengths, in tokens, ascending. A prompt longer than the last bound is in a bucket of its own
/// kind, above all others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Buckets(Vec<usize>);

/// Boundaries that do not make buckets.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BucketsError {
    #[error("`{0}` is not a number of tokens; give ascending numbers with commas between, as in 64,128,256")]
    NotANumber(String),
    #[error("{1} stands after {0}; bucket boundaries must ascend and start above 0")]
    NotAscending(usize, usize),
}

impl Buckets {
    /// Buckets with these inclusive upper bounds; none at all puts every prompt into one bucket.
    pub fn new(bounds: Vec<usize>) -> Result<Self, BucketsError> {
        let mut below = 0;
        for &bound in &bounds {
            if bound <= below {
                return Err(BucketsError::NotAscending(below, bound));
            }
            below = bound;
        }
        Ok(Self(bounds))
    }

    /// The bucket of a prompt of `length` tokens.
    pub fn of(&self, length: usize) -> usize {
        self.0.partition_point(|&bound| bound < length)
    }

    /// Which of the waiting prompts, in the order in which they are due, make the next batch of at most `room`: the first
    /// one's bucket. Whoever is passed over moves up, and goes first in time.
    pub fn select(&self, lengths: impl Iterator<Item = usize>, room: usize) -> Vec<usize> {
        let mut wanted = None;
        let chosen = lengths.enumerate().filter(|&(_, length)| {
            let bucket = self.of(length);
            *wanted.get_or_insert(bucket) == bucket
        });
        chosen.map(|(index, _)| index).take(room).collect()
    }
}

impl Default for Buckets {
    /// Doubling from 64 to 8192 tokens.
    fn default() -> Self {
        Self((6..=13).map(|power| 1 << power).collect())
    }
}

impl FromStr for Buckets {
    type Err = BucketsError;

    fn from_str(text: &str) -> Result<Self, BucketsError> {
        let bounds = text.split(',').map(str::trim).filter(|bound| !bound.is_empty());
        let bounds = bounds.map(|bound| bound.parse().map_err(|_| BucketsError::NotANumber(bound.into())));
        Self::new(bounds.collect::<Result<_, _>>()?)
    }
}

impl fmt::Display for Buckets {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bounds: Vec<_> = self.0.iter().map(usize::to_string).collect();
        out.write_str(&bounds.join(","))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn bounds_are_inclusive() {
        let buckets: Buckets = "64, 128".parse().unwrap();
        assert_eq!([1, 64, 65, 128, 129].map(|length| buckets.of(length)), [0, 0, 1, 1, 2]);
        assert_eq!(buckets.to_string(), "64,128");
    }

    #[test]
    fn refuses_what_does_not_ascend() {
        assert_eq!("64,64".parse::<Buckets>(), Err(BucketsError::NotAscending(64, 64)));
        assert_eq!("0".parse::<Buckets>(), Err(BucketsError::NotAscending(0, 0)));
        assert_eq!("a".parse::<Buckets>(), Err(BucketsError::NotANumber("a".into())));
    }

    proptest! {
        #[test]
        fn a_batch_has_the_oldest_and_only_its_bucket(
            lengths in prop::collection::vec(1usize..600, 1..50), room in 1usize..20,
        ) {
            let buckets = Buckets::new(vec![32, 128, 512]).unwrap();
            let chosen = buckets.select(lengths.iter().copied(), room);
            prop_assert_eq!(chosen[0], 0);
            prop_assert!(chosen.len() <= room);
            prop_assert!(chosen.iter().all(|&index| buckets.of(lengths[index]) == buckets.of(lengths[0])));
            let all = lengths.iter().filter(|&&length| buckets.of(length) == buckets.of(lengths[0])).count();
            prop_assert_eq!(chosen.len(), all.min(room));
        }
    }
}
