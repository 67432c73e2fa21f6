//! What was learned of this machine and its clients: a step's duration from what it runs, an answer's length from what
//! was asked for, and how much either may be trusted.

use std::time::Instant;

/// What a step's duration is fitted to: a constant, prefill tokens, decode rows. Attention's part grows with the
/// context, slowly beside the rest; the fit forgets, so it follows the contexts of the present load.
const FEATURES: usize = 3;
/// What a step's weight in the fit is multiplied by at each later step: the last two hundred count.
const FORGET: f64 = 0.995;
/// Steps to measure before a prediction decides anything.
const LEARNING: u64 = 8;
/// How far back lengths are averaged, in answers.
const ANSWERS: f64 = 64.0;
/// Classes of `max_tokens`, by its power of two.
const CLASSES: usize = 32;

/// A step's seconds, as the sum of what it runs times what each costs: exponentially weighted least squares with no
/// coefficient below zero (coordinate descent from the last solution, Franc, Hlaváč and Navara 2005, section 4).
#[derive(Debug, Clone, Default)]
pub struct StepCost {
    /// Sums of features times features, and of features times seconds.
    products: [[f64; FEATURES]; FEATURES],
    seconds: [f64; FEATURES],
    coefficients: [f64; FEATURES],
    steps: u64,
}

impl StepCost {
    /// A step of so many prefill tokens and decode rows took `seconds`.
    pub fn observe(&mut self, prefill: usize, decodes: usize, seconds: f64) {
        let features = [1.0, prefill as f64, decodes as f64];
        // A long step is off by more than a short one, so each counts by how far off it is in proportion.
        let expected = self.predict(prefill, decodes).max(seconds / 4.0).max(1e-6);
        let weight = expected.powi(-2);
        for (i, &feature) in features.iter().enumerate() {
            for (product, &other) in self.products[i].iter_mut().zip(&features) {
                *product = *product * FORGET + weight * feature * other;
            }
            self.seconds[i] = self.seconds[i] * FORGET + weight * feature * seconds;
        }
        self.steps += 1;
        self.solve();
    }

    fn solve(&mut self) {
        for _ in 0..16 {
            for i in 0..FEATURES {
                let others: f64 = (0..FEATURES)
                    .filter(|&other| other != i)
                    .map(|other| self.products[i][other] * self.coefficients[other])
                    .sum();
                if self.products[i][i] > 0.0 {
                    self.coefficients[i] = ((self.seconds[i] - others) / self.products[i][i]).max(0.0);
                }
            }
        }
    }

    /// How long a step takes, in seconds.
    pub fn predict(&self, prefill: usize, decodes: usize) -> f64 {
        let [constant, token, row] = self.coefficients;
        constant + token * prefill as f64 + row * decodes as f64
    }
}

/// The share of `max_tokens` that answers use.
#[derive(Debug, Clone, Copy, Default)]
struct Share {
    answers: f64,
    mean: f64,
    variance: f64,
}

impl Share {
    /// West 1979, Updating mean and variance estimates, with a bounded weight.
    fn observe(&mut self, value: f64) {
        self.answers = (self.answers + 1.0).min(ANSWERS);
        let weight = 1.0 / self.answers;
        let off = value - self.mean;
        self.mean += weight * off;
        self.variance = (1.0 - weight) * (self.variance + weight * off * off);
    }
}

/// How long answers are. Answers are told apart by what was asked for at most, as one who asks for 64 tokens and one who
/// leaves it open mean different things. Of a class without answers the mean of all is taken; without any answer at
/// all, `max_tokens`, the upper bound.
#[derive(Debug, Clone)]
pub struct OutputLengths {
    classes: [Share; CLASSES],
    /// In tokens.
    all: Share,
}

impl Default for OutputLengths {
    fn default() -> Self {
        Self {
            classes: [Share::default(); CLASSES],
            all: Share::default(),
        }
    }
}

impl OutputLengths {
    /// An answer ended by itself after `generated` of at most `max_tokens` tokens.
    pub fn observe(&mut self, max_tokens: usize, generated: usize) {
        self.classes[class(max_tokens)].observe(generated as f64 / max_tokens.max(1) as f64);
        self.all.observe(generated as f64);
    }

    /// Mean and standard deviation in tokens.
    fn expected(&self, max_tokens: usize) -> (f64, f64) {
        let (share, most) = (self.classes[class(max_tokens)], max_tokens as f64);
        match () {
            () if share.answers > 0.0 => (share.mean * most, share.variance.sqrt() * most),
            () if self.all.answers > 0.0 => (self.all.mean.min(most), self.all.variance.sqrt()),
            () => (most, 0.0),
        }
    }

    /// The tokens that an answer which has `generated` so far is still expected to get. One that is longer than usual
    /// is expected to go on for a standard deviation, as there is no telling.
    pub fn left(&self, max_tokens: usize, generated: usize) -> usize {
        let (mean, deviation) = self.expected(max_tokens);
        let left = (mean - generated as f64).max(deviation).round() as usize;
        left.max(1).min(max_tokens.saturating_sub(generated).max(1))
    }

    /// The tokens that few answers still get beyond these (one in a hundred if lengths were normally distributed), for
    /// what is promised; no fewer than [`Self::left`].
    pub fn long_left(&self, max_tokens: usize, generated: usize) -> usize {
        let (mean, deviation) = self.expected(max_tokens);
        let long = (mean + 2.33 * deviation).ceil().min(max_tokens as f64) as usize;
        long.saturating_sub(generated).max(self.left(max_tokens, generated))
    }
}

fn class(max_tokens: usize) -> usize {
    (max_tokens.max(1).ilog2() as usize).min(CLASSES - 1)
}

/// The factor by which predictions are stretched before they are held against a deadline: raised by an accepted request
/// that was late nonetheless, lowered a little by each that was not (the stochastic approximation of a quantile, Robbins
/// and Monro 1951), so that late ones stay near one in two hundred. Requests that were accepted before it was last raised
/// do not raise it again: what made many late at once is one lesson.
#[derive(Debug, Clone, Copy)]
pub struct Margin {
    factor: f64,
    raised: Option<Instant>,
}

impl Margin {
    const LEAST: f64 = 1.2;
    const MOST: f64 = 2.0;
    const RAISE: f64 = 0.08;

    fn observe(&mut self, late: bool, accepted: Instant, now: Instant) {
        let factor = match late {
            true if self.raised.is_some_and(|raised| accepted < raised) => return,
            true => 1.0 + Self::RAISE,
            false => 1.0 - Self::RAISE / 200.0,
        };
        if late {
            self.raised = Some(now);
        }
        self.factor = (self.factor * factor).clamp(Self::LEAST, Self::MOST);
    }
}

/// All that predictions go by.
#[derive(Debug, Clone)]
pub struct Estimates {
    pub step: StepCost,
    pub lengths: OutputLengths,
    margin: Margin,
}

impl Default for Estimates {
    fn default() -> Self {
        Self {
            step: StepCost::default(),
            lengths: OutputLengths::default(),
            margin: Margin {
                factor: Margin::LEAST,
                raised: None,
            },
        }
    }
}

impl Estimates {
    /// Whether enough was measured to refuse anybody.
    pub fn are_known(&self) -> bool {
        self.step.steps >= LEARNING
    }

    /// What a predicted duration is multiplied by before it is held against a deadline.
    pub fn margin(&self) -> f64 {
        self.margin.factor
    }

    /// A request that was accepted at some time, in the belief that it would keep its deadline, ended, in time or late.
    pub fn ended(&mut self, late: bool, accepted: Instant, now: Instant) {
        self.margin.observe(late, accepted, now);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// From noisy steps of any mix, the fit predicts the mix it saw within the noise.
        #[test]
        fn the_fit_finds_the_costs(
            costs in (1e-3f64..2e-2, 1e-5f64..5e-3, 1e-5f64..2e-3),
            steps in prop::collection::vec((prop_oneof![Just(0), 1usize..400], 0usize..100, 0.9f64..1.1), 400..500),
        ) {
            let truth = |prefill: usize, decodes: usize| costs.0 + costs.1 * prefill as f64 + costs.2 * decodes as f64;
            let mut fit = StepCost::default();
            for &(prefill, decodes, noise) in &steps {
                fit.observe(prefill, decodes, noise * truth(prefill, decodes));
            }
            for (prefill, decodes) in [(0, 50), (200, 50), (400, 0)] {
                let (found, real) = (fit.predict(prefill, decodes), truth(prefill, decodes));
                prop_assert!((found / real - 1.0).abs() < 0.1, "{found} for {real}");
            }
        }

        /// However steps fall, no cost is below zero, so more work is never predicted to take less time.
        #[test]
        fn more_work_is_never_cheaper(
            steps in prop::collection::vec((0usize..400, 0usize..100, 0.0f64..1.0), 1..100),
        ) {
            let mut fit = StepCost::default();
            for &(prefill, decodes, seconds) in &steps {
                fit.observe(prefill, decodes, seconds);
            }
            prop_assert!(fit.predict(0, 0) >= 0.0);
            prop_assert!(fit.predict(10, 10) <= fit.predict(11, 10));
            prop_assert!(fit.predict(10, 10) <= fit.predict(10, 11));
        }
    }

    #[test]
    fn the_fit_follows_a_machine_that_slows_down() {
        let mut fit = StepCost::default();
        for speed in [1.0, 2.0] {
            for step in 0..1000 {
                fit.observe(step % 7 * 30, 50, speed * 0.05);
            }
        }
        assert!((fit.predict(60, 50) / 0.1 - 1.0).abs() < 0.05);
    }

    #[test]
    fn lengths_are_told_apart_by_what_was_asked_for() {
        let mut lengths = OutputLengths::default();
        assert_eq!(
            (lengths.left(64, 0), lengths.long_left(64, 0)),
            (64, 64),
            "the upper bound where nothing is known"
        );
        for _ in 0..50 {
            lengths.observe(64, 64);
            lengths.observe(8000, 80);
            lengths.observe(8000, 120);
        }
        assert_eq!(
            (lengths.left(64, 0), lengths.left(64, 60), lengths.long_left(64, 0)),
            (64, 4, 64)
        );
        assert_eq!(lengths.left(8000, 0), 100);
        assert_eq!(lengths.left(8000, 500), 20);
        assert!(
            (130..170).contains(&lengths.long_left(8000, 0)),
            "{}",
            lengths.long_left(8000, 0)
        );
        assert!(
            (70..95).contains(&lengths.left(1000, 0)),
            "an unknown class takes the mean of all"
        );
    }

    #[test]
    fn the_margin_settles_where_few_are_late() {
        let mut estimates = Estimates::default();
        // Each request needs up to a half more than was predicted, all equally likely; it is late where that is more
        // than the margin.
        let (mut late, start) = (0, Instant::now());
        for request in 0..40_000u32 {
            let needs = 1.0 + f64::from(request.wrapping_mul(2_654_435_761) >> 16) / 65_536.0 * 0.5;
            let is_late = needs > estimates.margin();
            late += u32::from(is_late && request >= 20_000);
            let now = start + Duration::from_millis(request.into());
            estimates.ended(is_late, now, now);
        }
        assert!((50..200).contains(&late), "{late} of 20000");
        assert!(estimates.margin() > 1.4);
    }

    #[test]
    fn many_late_at_once_are_one_lesson() {
        let (mut estimates, start) = (Estimates::default(), Instant::now());
        let later = start + Duration::from_secs(1);
        for _ in 0..50 {
            estimates.ended(true, start, later);
        }
        assert!((estimates.margin() / Margin::LEAST - 1.08).abs() < 1e-9);
        estimates.ended(true, later, later);
        assert!(
            estimates.margin() > Margin::LEAST * 1.15,
            "what came after it is another"
        );
    }
}
