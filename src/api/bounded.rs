//! Parts of bodies that are bounded while they are read: a list past its bound is refused at the item that is too many,
//! and what is not supported is not kept, however much of it there is.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;

use serde::de::{Deserialize, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::MAX_CHOICES;
use crate::request::TokenId;

/// A list of at most `MOST` items.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct AtMost<T, const MOST: usize>(pub Vec<T>);

struct ListVisitor<T, const MOST: usize>(PhantomData<T>);

impl<'de, T: Deserialize<'de>, const MOST: usize> Deserialize<'de> for AtMost<T, MOST> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer
            .deserialize_seq(ListVisitor::<T, MOST>(PhantomData))
            .map(Self)
    }
}

impl<'de, T: Deserialize<'de>, const MOST: usize> Visitor<'de> for ListVisitor<T, MOST> {
    type Value = Vec<T>;

    fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str("a list")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<T>, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = list.next_element()? {
            push::<_, A::Error>(&mut items, item, MOST)?;
        }
        Ok(items)
    }
}

fn push<T, E: Error>(items: &mut Vec<T>, item: T, most: usize) -> Result<(), E> {
    if items.len() == most {
        return Err(too_many(most));
    }
    items.push(item);
    Ok(())
}

fn too_many<E: Error>(most: usize) -> E {
    E::custom(format!("there are too many; the most is {most}"))
}

/// A text, or up to `MOST` of something.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum TextOr<T, const MOST: usize> {
    Text(String),
    List(Vec<T>),
}

struct TextOrVisitor<T, const MOST: usize>(PhantomData<T>);

impl<'de, T: Deserialize<'de>, const MOST: usize> Deserialize<'de> for TextOr<T, MOST> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(TextOrVisitor::<T, MOST>(PhantomData))
    }
}

impl<'de, T: Deserialize<'de>, const MOST: usize> Visitor<'de> for TextOrVisitor<T, MOST> {
    type Value = TextOr<T, MOST>;

    fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str("a string or a list")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Self::Value, E> {
        Ok(TextOr::Text(text.to_owned()))
    }

    fn visit_string<E: Error>(self, text: String) -> Result<Self::Value, E> {
        Ok(TextOr::Text(text))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<Self::Value, A::Error> {
        ListVisitor::<T, MOST>(PhantomData).visit_seq(list).map(TextOr::List)
    }
}

/// Numbers by name, at most `MOST`.
#[derive(Debug)]
pub(super) struct Numbers<const MOST: usize>(pub BTreeMap<String, f32>);

struct NumbersVisitor<const MOST: usize>;

impl<'de, const MOST: usize> Deserialize<'de> for Numbers<MOST> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(NumbersVisitor::<MOST>).map(Self)
    }
}

impl<'de, const MOST: usize> Visitor<'de> for NumbersVisitor<MOST> {
    type Value = BTreeMap<String, f32>;

    fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str("an object of numbers")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Self::Value, A::Error> {
        let mut numbers = BTreeMap::new();
        while let Some((name, number)) = fields.next_entry()? {
            numbers.insert(name, number);
            if numbers.len() > MOST {
                return Err(too_many(MOST));
            }
        }
        Ok(numbers)
    }
}

/// One prompt as it was sent. Ids take twice the bytes that they had in the body at most, and what a growing list leaves
/// unused.
#[derive(Debug, PartialEq)]
pub(super) enum Given {
    Text(String),
    Tokens(Vec<TokenId>),
}

/// The field `prompt`.
#[derive(Debug, Default, PartialEq)]
pub(super) enum Prompts {
    #[default]
    Missing,
    One(Given),
    Many(Vec<Given>),
}

impl Prompts {
    /// Whether nothing is to be read.
    pub fn is_empty(&self) -> bool {
        match self {
            Self::Missing => true,
            Self::One(Given::Text(text)) => text.is_empty(),
            Self::One(Given::Tokens(_)) => false,
            Self::Many(prompts) => prompts.is_empty(),
        }
    }
}

/// What a list of prompts, or one of ids, is made of.
enum Item {
    Id(TokenId),
    Prompt(Given),
}

struct ItemVisitor;
struct PromptsVisitor;

impl<'de> Deserialize<'de> for Item {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ItemVisitor)
    }
}

impl<'de> Visitor<'de> for ItemVisitor {
    type Value = Item;

    fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str("a string, a token id or a list of those")
    }

    fn visit_u64<E: Error>(self, id: u64) -> Result<Item, E> {
        let id = TokenId::try_from(id).map_err(|_| E::custom(format!("{id} is no token id")))?;
        Ok(Item::Id(id))
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Item, E> {
        self.visit_string(text.to_owned())
    }

    fn visit_string<E: Error>(self, text: String) -> Result<Item, E> {
        Ok(Item::Prompt(Given::Text(text)))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Item, A::Error> {
        let mut ids = Vec::new();
        while let Some(id) = list.next_element()? {
            ids.push(id);
        }
        Ok(Item::Prompt(Given::Tokens(ids)))
    }
}

impl<'de> Deserialize<'de> for Prompts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(PromptsVisitor)
    }
}

impl<'de> Visitor<'de> for PromptsVisitor {
    type Value = Prompts;

    fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str("a string, a list of strings, a list of token ids, or a list of those lists")
    }

    fn visit_unit<E: Error>(self) -> Result<Prompts, E> {
        Ok(Prompts::Missing)
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Prompts, E> {
        self.visit_string(text.to_owned())
    }

    fn visit_string<E: Error>(self, text: String) -> Result<Prompts, E> {
        Ok(Prompts::One(Given::Text(text)))
    }

    /// The first item says which kind of list it is.
    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Prompts, A::Error> {
        let mut prompts = match list.next_element()? {
            None => return Ok(Prompts::Many(Vec::new())),
            Some(Item::Prompt(first)) => vec![first],
            Some(Item::Id(first)) => {
                let mut ids = vec![first];
                while let Some(id) = list.next_element()? {
                    ids.push(id);
                }
                return Ok(Prompts::One(Given::Tokens(ids)));
            }
        };
        while let Some(item) = list.next_element()? {
            match item {
                Item::Prompt(prompt) => push::<_, A::Error>(&mut prompts, prompt, MAX_CHOICES)?,
                Item::Id(_) => return Err(A::Error::custom("a prompt cannot be a number")),
            }
        }
        Ok(Prompts::Many(prompts))
    }
}

/// Bytes of the longest word that [`Asked`] keeps.
const LONGEST_WORD: usize = 16;

/// What a field asks for that this server does not do: enough to tell what asks for nothing, and no more.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) enum Asked {
    /// `null`, `false`, 0, and what is empty.
    #[default]
    Nothing,
    One,
    Word(String),
    /// A list of this word alone.
    Only(String),
    /// An object whose `type` is this word.
    Typed(String),
    Something,
}

impl Asked {
    fn unless(nothing: bool) -> Self {
        if nothing { Self::Nothing } else { Self::Something }
    }
}

struct AskedVisitor;

impl<'de> Deserialize<'de> for Asked {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(AskedVisitor)
    }
}

impl<'de> Visitor<'de> for AskedVisitor {
    type Value = Asked;

    fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str("anything")
    }

    fn visit_unit<E: Error>(self) -> Result<Asked, E> {
        Ok(Asked::Nothing)
    }

    fn visit_bool<E: Error>(self, asked: bool) -> Result<Asked, E> {
        Ok(Asked::unless(!asked))
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<Asked, E> {
        Ok(if number == 1 {
            Asked::One
        } else {
            Asked::unless(number == 0)
        })
    }

    fn visit_i64<E: Error>(self, number: i64) -> Result<Asked, E> {
        Ok(if number == 1 {
            Asked::One
        } else {
            Asked::unless(number == 0)
        })
    }

    fn visit_f64<E: Error>(self, number: f64) -> Result<Asked, E> {
        Ok(Asked::unless(number == 0.0))
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Asked, E> {
        Ok(match text.len() {
            0 => Asked::Nothing,
            1..=LONGEST_WORD => Asked::Word(text.to_owned()),
            _ => Asked::Something,
        })
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Asked, A::Error> {
        let Some(first) = list.next_element()? else {
            return Ok(Asked::Nothing);
        };
        let mut alone = true;
        while list.next_element::<IgnoredAny>()?.is_some() {
            alone = false;
        }
        Ok(match first {
            Asked::Word(word) if alone => Asked::Only(word),
            _ => Asked::Something,
        })
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Asked, A::Error> {
        let mut asked = Asked::Nothing;
        while let Some(name) = fields.next_key::<String>()? {
            if name != "type" {
                fields.next_value::<IgnoredAny>()?;
            } else if let Asked::Word(word) = fields.next_value()? {
                asked = Asked::Typed(word);
            }
            if asked == Asked::Nothing {
                asked = Asked::Something;
            }
        }
        Ok(asked)
    }
}

#[cfg(test)]
mod tests {
    use super::super::body;
    use super::*;
    use serde_json::{Value, from_value, json};

    #[test]
    fn a_list_is_refused_at_the_first_item_too_many() {
        // What follows is not JSON, and not read.
        let error = |text: &str| body::parse::<AtMost<u8, 3>>(text.as_bytes()).unwrap_err().to_string();
        assert!(error("[1, 2, 3, 4, oops").contains("the most is 3"));
        assert_eq!(body::parse::<AtMost<u8, 3>>(b"[1, 2, 3]"), Ok(AtMost(vec![1, 2, 3])));
        let error = |text: &str| body::parse::<Numbers<1>>(text.as_bytes()).unwrap_err().to_string();
        assert!(error(r#"{"1": 0, "2": 0, oops"#).contains("the most is 1"));
        let prompts = format!("[{}oops", "\"\",".repeat(MAX_CHOICES + 1));
        let error = body::parse::<Prompts>(prompts.as_bytes()).unwrap_err().to_string();
        assert!(error.contains("the most is 128"), "{error}");
    }

    #[test]
    fn a_prompt_is_given_in_four_ways() {
        let text = |text: &str| Given::Text(text.to_string());
        let read = |value: Value| from_value::<Prompts>(value).unwrap();
        assert_eq!(read(json!(null)), Prompts::Missing);
        assert_eq!(read(json!([])), Prompts::Many(vec![]));
        assert_eq!(read(json!("a")), Prompts::One(text("a")));
        assert_eq!(read(json!(["a", "b"])), Prompts::Many(vec![text("a"), text("b")]));
        assert_eq!(read(json!([1, 2])), Prompts::One(Given::Tokens(vec![1, 2])));
        assert_eq!(
            read(json!([[1], [2, 3]])),
            Prompts::Many(vec![Given::Tokens(vec![1]), Given::Tokens(vec![2, 3])])
        );
        for wrong in [
            json!(7),
            json!([1, "a"]),
            json!(["a", 1]),
            json!([1, -1]),
            json!([1, 1u64 << 32]),
            json!([{}]),
            json!([["a"]]),
            json!([[[1]]]),
        ] {
            assert!(from_value::<Prompts>(wrong.clone()).is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_asks_for_nothing_is_told_from_what_asks_for_something() {
        let read = |value: Value| from_value::<Asked>(value).unwrap();
        for nothing in [
            json!(null),
            json!(false),
            json!(0),
            json!(0.0),
            json!(""),
            json!([]),
            json!({}),
        ] {
            assert_eq!(read(nothing.clone()), Asked::Nothing, "{nothing}");
        }
        for something in [
            json!(true),
            json!(2),
            json!(-1),
            json!(1.5),
            json!("a text of more than sixteen bytes"),
            json!(["text", "audio"]),
            json!([{}]),
            json!({"a": {"type": "text"}}),
            json!({"type": 1}),
        ] {
            assert_eq!(read(something.clone()), Asked::Something, "{something}");
        }
        assert_eq!(read(json!(1)), Asked::One);
        assert_eq!(read(json!("auto")), Asked::Word("auto".into()));
        assert_eq!(read(json!(["text"])), Asked::Only("text".into()));
        assert_eq!(
            read(json!({"a": 1, "type": "text", "b": 2})),
            Asked::Typed("text".into())
        );
    }
}
