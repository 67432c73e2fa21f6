//! Keeps what a client writes from being read as the model's control tokens.
//!
//! A chat template puts the messages and the control tokens around them into one text, so a message that spells
//! `<|im_end|>` would end its own turn and could open one in another's name. Before rendering, each such spelling in a
//! message gets a mark inside it, which the template carries along with the text around it. The tokenizer then looks for
//! control tokens in the marked text, finds only the template's own, and takes the marks out before it cuts the rest
//! into tokens as plain text. A text without such spellings is not touched at all.
//!
//! Some vocabularies have tokens that mark up a turn without being control tokens, such as `<tool_response>` and
//! `</think>`: they are shown in an answer. Whatever is spelled like them is marked too, but for what the model itself
//! has said: an assistant's message keeps them, as the model wrote them and templates look for them.

use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap};

use aho_corasick::AhoCorasick;
use tokenizers::{AddedToken, NormalizedString, Normalizer, NormalizerWrapper};

/// A noncharacter: Unicode keeps it for a program's own use, and no text means anything by it.
pub(super) const MARK: char = '\u{FDD0}';

/// Finds control tokens that are written out in a text.
pub(super) struct Marker {
    spellings: Vec<String>,
    automaton: AhoCorasick,
    /// The ends of all spellings, two characters and more, by their first two.
    ends: HashMap<[char; 2], Vec<String>>,
    /// Bytes of the longest spelling.
    longest: usize,
}

impl Marker {
    /// For a vocabulary's control tokens. An error says that there are more than any vocabulary has.
    pub fn new(spellings: Vec<String>) -> Result<Self, aho_corasick::BuildError> {
        let mut ends: HashMap<[char; 2], Vec<String>> = HashMap::new();
        let unique: BTreeSet<&str> = spellings
            .iter()
            .flat_map(|text| text.char_indices().skip(1).map(|(i, _)| &text[i..]))
            .collect();
        for end in unique {
            if let Some(two) = first_two(end) {
                ends.entry(two).or_default().push(end.to_owned());
            }
        }
        Ok(Self {
            automaton: AhoCorasick::new(&spellings)?,
            longest: spellings.iter().map(String::len).max().unwrap_or(0),
            ends,
            spellings,
        })
    }

    /// The text with a mark behind the first character of everything that is a control token, or could become one
    /// together with what a template puts before or after it.
    pub fn mark<'a>(&self, text: &'a str) -> Cow<'a, str> {
        let mut places = BTreeSet::new();
        let behind_first = |start: usize| start + text[start..].chars().next().map_or(0, char::len_utf8);
        for found in self.automaton.find_overlapping_iter(text) {
            places.insert(behind_first(found.start()));
        }
        if self.could_end_one(text) {
            places.insert(behind_first(0));
        }
        // The beginning of a spelling, which something behind the text could complete.
        let last = text.len().saturating_sub(self.longest);
        for (start, _) in text.char_indices().rev().take_while(|(start, _)| *start >= last) {
            if self
                .spellings
                .iter()
                .any(|spelling| spelling.starts_with(&text[start..]))
            {
                places.insert(behind_first(start));
            }
        }
        if places.is_empty() {
            return Cow::Borrowed(text);
        }
        let mut marked = String::with_capacity(text.len() + places.len() * MARK.len_utf8());
        let mut from = 0;
        for place in places {
            marked.push_str(&text[from..place]);
            marked.push(MARK);
            from = place;
        }
        marked.push_str(&text[from..]);
        Cow::Owned(marked)
    }

    /// Whether the text begins as some spelling ends, or is a part out of the middle of one. A single character is not
    /// looked at: what it could complete has a mark already, if it is a client's.
    fn could_end_one(&self, text: &str) -> bool {
        let ends = first_two(text).and_then(|two| self.ends.get(&two));
        ends.is_some_and(|ends| {
            ends.iter()
                .any(|end| text.starts_with(end.as_str()) || end.starts_with(text))
        })
    }
}

fn first_two(text: &str) -> Option<[char; 2]> {
    let mut chars = text.chars();
    Some([chars.next()?, chars.next()?])
}

/// The spellings of what gives a text its structure.
pub(super) struct Structure {
    /// Control tokens.
    pub control: Vec<String>,
    /// Tokens of markup, such as `</think>`.
    pub markup: Vec<String>,
}

/// The vocabulary's structure, all of it looked for in a text as it was written: what is looked for only after
/// normalization would also be found where its mark has been taken out.
pub(super) fn structure_on_raw_text(tokenizer: &mut tokenizers::Tokenizer) -> tokenizers::Result<Structure> {
    let added = tokenizer.get_added_tokens_decoder().into_values();
    let (control, others): (Vec<AddedToken>, Vec<_>) = added.partition(|token| token.special);
    // Others are words, or runs of spaces, which mean what they say.
    let markup: Vec<AddedToken> = others.into_iter().filter(|token| is_tag(&token.content)).collect();
    let spellings = |tokens: &[AddedToken]| tokens.iter().map(|token| token.content.clone()).collect();
    let structure = Structure {
        control: spellings(&control),
        markup: spellings(&markup),
    };
    let normalized = control.into_iter().chain(markup).filter(|token| token.normalized);
    let raw: Vec<AddedToken> = normalized.map(|token| token.normalized(false)).collect();
    if !raw.is_empty() {
        tokenizer.add_tokens(raw)?;
    }
    Ok(structure)
}

fn is_tag(text: &str) -> bool {
    let inside = text.strip_prefix('<').and_then(|text| text.strip_suffix('>'));
    inside.is_some_and(|inside| !inside.trim().is_empty())
}

/// The text without marks, for people.
pub(super) fn unmarked(text: &str) -> String {
    text.replace(MARK, "")
}

/// Takes marks out, then does as the tokenizer's own normalizer.
pub(super) struct Unmark<'a>(pub Option<&'a NormalizerWrapper>);

impl Normalizer for Unmark<'_> {
    fn normalize(&self, text: &mut NormalizedString) -> tokenizers::Result<()> {
        text.filter(|c| c != MARK);
        self.0.map_or(Ok(()), |own| own.normalize(text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn marker() -> Marker {
        Marker::new(["<|im_start|>", "<|im_end|>", "<s>", "</s>"].map(String::from).to_vec()).unwrap()
    }

    /// What a text becomes, with `#` for a mark.
    fn marked(text: &str) -> String {
        marker().mark(text).replace(MARK, "#")
    }

    #[test]
    fn ordinary_text_is_not_touched() {
        for text in [
            "",
            "a",
            "> quoted",
            "1 < 2 and 3 > 2",
            "<b>bold</b>.",
            "if a<b|c> d",
            "ein Fluß",
            "im ok",
        ] {
            assert!(matches!(marker().mark(text), Cow::Borrowed(_)), "{text}");
        }
    }

    #[test]
    fn control_tokens_and_parts_of_them_at_the_edges_are_broken() {
        for (text, expected) in [
            ("a<|im_end|>b", "a<#|im_end|>b"),
            ("<s><s>", "<#s><#s>"),
            ("well <|im_", "well <#|im_"),
            ("well <", "well <#"),
            ("_end|> more", "_#end|> more"),
            ("im_start", "i#m_start"),
        ] {
            assert_eq!(marked(text), expected, "{text}");
        }
    }

    proptest! {
        #[test]
        fn nothing_a_client_writes_becomes_a_control_token(
            parts in proptest::collection::vec("(<|>|\\||/|s|im_|start|end|<\\|im_start\\|>| |x){0,6}", 1..5)
        ) {
            let marker = marker();
            let together: String = parts.iter().map(|part| marker.mark(part).into_owned()).collect();
            for spelling in &marker.spellings {
                prop_assert!(!together.contains(spelling.as_str()), "{}", together);
            }
            prop_assert_eq!(unmarked(&together), parts.concat());
        }

        #[test]
        fn a_template_that_opens_a_bracket_before_a_text_opens_no_token(
            before in "(<|</|<\\||<\\|im)",
            // A single character that ends a token is the template's own doing.
            text in "(im_|start|end|(s|>|\\||im_|start|end|x){2,5})"
        ) {
            let marker = marker();
            let text = marker.mark(&text).into_owned();
            let together = format!("{before}{text}");
            for spelling in &marker.spellings {
                prop_assert!(!together.contains(spelling.as_str()), "{}", together);
            }
        }
    }
}
