//! Stop strings found in a text that arrives in pieces.

/// Passes text on until one of the stop strings is complete, and never passes on a part of it.
///
/// The match that counts is the one that ends first, so what comes out does not depend on how the text was cut into
/// pieces; of several that end at the same place, it is the longest.
#[derive(Debug, Clone)]
pub struct StopMatcher {
    stops: Vec<String>,
    /// The end of the text so far that may be the beginning of a stop string.
    held: String,
    stopped: bool,
}

impl StopMatcher {
    /// Empty stop strings are ignored.
    pub fn new(mut stops: Vec<String>) -> Self {
        stops.retain(|stop| !stop.is_empty());
        Self {
            stops,
            held: String::new(),
            stopped: false,
        }
    }

    /// The text that is now certain to be outside any stop string; after a match, nothing more.
    pub fn push(&mut self, text: &str) -> String {
        if self.stopped {
            return String::new();
        }
        if self.stops.is_empty() {
            return text.to_string();
        }
        self.held.push_str(text);
        if let Some(start) = self.first_match() {
            self.stopped = true;
            self.held.truncate(start);
            return std::mem::take(&mut self.held);
        }
        let rest = self.held.split_off(self.held.len() - self.possible_beginning());
        std::mem::replace(&mut self.held, rest)
    }

    /// Whether a stop string was found.
    pub fn stopped(&self) -> bool {
        self.stopped
    }

    /// What was held back, now that no more text comes.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Where the match that ends first begins.
    fn first_match(&self) -> Option<usize> {
        let matches = self
            .stops
            .iter()
            .filter_map(|stop| self.held.find(stop).map(|start| (start + stop.len(), start)));
        matches.min().map(|(_, start)| start)
    }

    /// How many bytes at the end are the beginning of a stop string, at most.
    fn possible_beginning(&self) -> usize {
        let held = self.held.as_bytes();
        let longest = |stop: &String| {
            let most = held.len().min(stop.len() - 1);
            (1..=most)
                .rev()
                .find(|&n| held[held.len() - n..] == stop.as_bytes()[..n])
                .unwrap_or(0)
        };
        self.stops.iter().map(longest).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (String, bool) {
        let mut matcher = StopMatcher::new(stops.iter().map(|s| s.to_string()).collect());
        let mut out: String = pieces.iter().map(|piece| matcher.push(piece)).collect();
        out += &matcher.finish();
        (out, matcher.stopped())
    }

    #[test]
    fn holds_back_only_a_possible_beginning() {
        let mut matcher = StopMatcher::new(vec!["END".to_string()]);
        assert_eq!(matcher.push("the E"), "the ");
        assert_eq!(matcher.push("N"), "");
        assert_eq!(matcher.push("E"), "EN");
        assert_eq!(matcher.push("ND and more"), "");
        assert!(matcher.stopped());
        assert_eq!(matcher.push("later"), "");
        assert_eq!(matcher.finish(), "");
    }

    #[test]
    fn the_match_that_ends_first_wins_and_the_longest_of_those() {
        assert_eq!(run(&["abcd", "bc"], &["xabcd"]), ("xa".to_string(), true));
        assert_eq!(run(&["bc", "abc"], &["xabc"]), ("x".to_string(), true));
        assert_eq!(run(&["", "é"], &["caf", "é!"]), ("caf".to_string(), true));
        assert_eq!(run(&[], &["a", "b"]), ("ab".to_string(), false));
    }

    /// The whole text cut where the first-ending (then longest) match begins, found the slow way.
    fn cut(text: &str, stops: &[String]) -> String {
        for end in 0..=text.len() {
            let ending = stops
                .iter()
                .filter(|stop| text.as_bytes()[..end].ends_with(stop.as_bytes()));
            if let Some(stop) = ending.max_by_key(|stop| stop.len()) {
                return text[..end - stop.len()].to_string();
            }
        }
        text.to_string()
    }

    proptest! {
        #[test]
        fn output_is_the_text_cut_at_the_first_match(
            pieces in proptest::collection::vec("[abé]{0,5}", 0..12),
            stops in proptest::collection::vec("[abé]{1,4}", 0..4),
        ) {
            let mut matcher = StopMatcher::new(stops.clone());
            let mut out = String::new();
            for piece in &pieces {
                out += &matcher.push(piece);
                prop_assert!(cut(&pieces.concat(), &stops).starts_with(&out));
            }
            out += &matcher.finish();
            prop_assert_eq!(out, cut(&pieces.concat(), &stops));
        }
    }
}
