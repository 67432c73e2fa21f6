//! How many tokens one forward pass may run when memory is short.
//!
//! A step that does not fit is run in parts; the next steps are cut to what fitted, and after a while without trouble
//! they grow again.

use crate::batching::Row;

/// Passes without trouble after which twice as many tokens are tried.
const CALM: u32 = 64;

#[derive(Debug, Default)]
pub struct Budget {
    /// The most tokens in a pass; `None` where memory has not been short.
    limit: Option<usize>,
    calm: u32,
}

impl Budget {
    /// Cuts rows into passes that keep the limit, in order. A row longer than the limit runs in several passes, of
    /// which only the last samples.
    pub fn passes(&self, rows: &[Row]) -> Vec<Vec<Row>> {
        match self.limit {
            None => vec![rows.to_vec()],
            Some(limit) => cut(rows, limit),
        }
    }

    /// A pass of these rows did not fit: half as many tokens are tried from now on. `None`: it was a single token.
    pub fn shrink(&mut self, rows: &[Row]) -> Option<Vec<Vec<Row>>> {
        let half = tokens(rows) / 2;
        self.calm = 0;
        self.limit = Some(half.max(1));
        (half > 0).then(|| cut(rows, half))
    }

    /// A pass ran; `whole` is how many tokens a step may have where memory is not short.
    pub fn ran(&mut self, whole: usize) {
        let Some(limit) = self.limit else { return };
        self.calm += 1;
        if self.calm == CALM {
            self.calm = 0;
            self.limit = Some(2 * limit).filter(|&limit| limit < whole);
        }
    }
}

pub fn tokens(rows: &[Row]) -> usize {
    rows.iter().map(|row| row.len).sum()
}

fn cut(rows: &[Row], limit: usize) -> Vec<Vec<Row>> {
    let mut passes: Vec<Vec<Row>> = Vec::new();
    let mut room = 0;
    for row in rows {
        let (mut start, end) = (row.start, row.start + row.len);
        while start < end {
            // A sequence stands in a pass once: its next part goes to the next pass.
            if room == 0 || start > row.start {
                passes.push(Vec::new());
                room = limit;
            }
            let len = (end - start).min(room);
            let part = Row {
                start,
                len,
                samples: row.samples && start + len == end,
                ..*row
            };
            passes.last_mut().into_iter().for_each(|pass| pass.push(part));
            room -= len;
            start += len;
        }
    }
    passes
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn rows(lens: &[usize]) -> Vec<Row> {
        let row = |(id, &len)| Row {
            id: id as u64,
            start: 7,
            len,
            samples: true,
        };
        lens.iter().enumerate().map(row).collect()
    }

    proptest! {
        /// Every token runs once, in order, within the limit, and each row samples once, with its last token.
        #[test]
        fn passes_are_the_rows_in_parts(lens in prop::collection::vec(1usize..20, 1..12), limit in 1usize..30) {
            let rows = rows(&lens);
            let passes = cut(&rows, limit);
            for pass in &passes {
                prop_assert!(!pass.is_empty() && tokens(pass) <= limit);
                prop_assert!(pass.windows(2).all(|pair| pair[0].id < pair[1].id));
            }
            for row in &rows {
                let parts: Vec<_> = passes.iter().flatten().filter(|part| part.id == row.id).collect();
                let mut at = row.start;
                for part in &parts {
                    prop_assert_eq!(part.start, at);
                    at += part.len;
                    prop_assert_eq!(part.samples, at == row.start + row.len);
                }
                prop_assert_eq!(at, row.start + row.len);
            }
        }
    }

    #[test]
    fn shrinks_to_half_and_grows_back() {
        let mut budget = Budget::default();
        let rows = rows(&[1, 1, 30]);
        assert_eq!(budget.passes(&rows).len(), 1);
        assert_eq!(budget.shrink(&rows).unwrap().len(), 2);
        assert_eq!(budget.passes(&rows).len(), 2);
        assert_eq!(budget.shrink(&rows[2..]).unwrap().len(), 2);
        assert!(budget.passes(&rows).iter().all(|pass| tokens(pass) <= 15));
        for _ in 0..2 * CALM {
            budget.ran(32);
        }
        assert_eq!(budget.passes(&rows).len(), 1, "15, 30, then no limit");
    }

    #[test]
    fn a_single_token_cannot_shrink() {
        assert_eq!(Budget::default().shrink(&rows(&[1])), None);
    }
}
