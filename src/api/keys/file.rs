//! The file of API keys: who may ask, how much, and with which share of a busy server.

use std::collections::HashSet;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer, de::Error as _};
use sha2::{Digest as _, Sha256};

use crate::request::Tenant;

/// The SHA-256 of a key. A key is at least 128 random bits, so nobody can guess one from its hash however fast the hash
/// is; the slow hashes made for passwords would only let strangers cost the server time.
pub(super) type Digest = [u8; 32];

/// Larger weights tell nothing that smaller ones do not.
const MAX_WEIGHT: u32 = 1000;
const MAX_NAME: usize = 64;

/// Why keys could not be read.
#[derive(Debug, thiserror::Error)]
pub enum KeysError {
    #[error("cannot read the API keys in {}: {source}; check the path and its permissions", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("the API keys in {} are not understood: {message}", path.display())]
    Syntax { path: PathBuf, message: String },
    #[error("the API keys in {}: key `{name}` {problem}", path.display())]
    Key {
        path: PathBuf,
        name: String,
        problem: String,
    },
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default, rename = "key")]
    keys: Vec<Entry>,
}

/// One key as the file has it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct Entry {
    /// Whose it is, in logs and metrics.
    pub name: String,
    #[serde(rename = "sha256", deserialize_with = "digest")]
    pub digest: Digest,
    #[serde(default = "one")]
    pub weight: u32,
    pub requests_per_minute: Option<NonZeroU32>,
    pub tokens_per_minute: Option<NonZeroU32>,
    pub max_in_flight: Option<NonZeroU32>,
    /// May read `/metrics` and use `/admin`, `/debug` and `/v1/cache/save`, where the server has them.
    #[serde(default)]
    pub admin: bool,
    #[serde(default)]
    pub disabled: bool,
}

fn one() -> u32 {
    1
}

fn digest<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Digest, D::Error> {
    let text = String::deserialize(deserializer)?;
    from_hex(&text).ok_or_else(|| D::Error::custom("`sha256` must be 64 hexadecimal digits"))
}

fn from_hex(text: &str) -> Option<Digest> {
    let digits = text
        .bytes()
        .map(|digit| char::from(digit).to_digit(16))
        .collect::<Option<Vec<u32>>>()?;
    let bytes: Vec<u8> = digits
        .chunks_exact(2)
        .map(|pair| (pair[0] * 16 + pair[1]) as u8)
        .collect();
    Digest::try_from(bytes).ok().filter(|_| text.len() == 64)
}

/// What the file has of a key in place of the key.
pub fn hash(key: &str) -> Digest {
    Sha256::digest(key.as_bytes()).into()
}

/// Reads the text of a file of keys; `path` is for errors.
pub(super) fn parse(path: &Path, text: &str) -> Result<Vec<Entry>, KeysError> {
    let file: File = toml::from_str(text).map_err(|e| {
        let line = text[..e.span().map_or(0, |span| span.start)].matches('\n').count() + 1;
        KeysError::Syntax {
            path: path.into(),
            // Not the error's own text, which shows the line, and with it a hash.
            message: format!("line {line}: {}", e.message()),
        }
    })?;
    let (mut names, mut digests) = (HashSet::new(), HashSet::new());
    for entry in &file.keys {
        let refuse = |problem: String| KeysError::Key {
            path: path.into(),
            name: entry.name.clone(),
            problem,
        };
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.@".contains(c);
        if !(1..=MAX_NAME).contains(&entry.name.len()) || !entry.name.chars().all(plain) {
            return Err(refuse(format!(
                "needs a name of 1 to {MAX_NAME} letters, digits and any of `-_.@`"
            )));
        }
        if !(1..=MAX_WEIGHT).contains(&entry.weight) {
            return Err(refuse(format!("has a weight that is not between 1 and {MAX_WEIGHT}")));
        }
        if entry.name == Tenant::anyone().name {
            return Err(refuse("is a name that the server uses itself; choose another".into()));
        }
        if !names.insert(&entry.name) {
            return Err(refuse("stands there twice; give each key its own name".into()));
        }
        if !digests.insert(entry.digest) {
            return Err(refuse("has the same hash as another; one key is one client's".into()));
        }
    }
    Ok(file.keys)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Vec<Entry>, String> {
        parse(Path::new("keys.toml"), text).map_err(|e| e.to_string())
    }

    fn entry(rest: &str) -> String {
        format!("[[key]]\nname = \"a\"\nsha256 = \"{}\"\n{rest}\n", "0f".repeat(32))
    }

    #[test]
    fn a_key_has_defaults_and_limits() {
        let keys = read(&entry("")).unwrap();
        assert_eq!((keys[0].digest, keys[0].weight, keys[0].admin), ([15; 32], 1, false));
        let keys = read(&entry(
            "weight = 3\nrequests-per-minute = 60\ntokens-per-minute = 9000\nmax-in-flight = 2",
        ));
        let keys = keys.unwrap();
        assert_eq!((keys[0].weight, keys[0].tokens_per_minute), (3, NonZeroU32::new(9000)));
        assert_eq!(read("").unwrap(), []);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, part) in [
            (entry("wieght = 3"), "line 4: unknown field `wieght`"),
            (entry("weight = 0"), "not between 1 and 1000"),
            (entry("requests-per-minute = 0"), "line 4"),
            (entry("") + &entry(""), "key `a` stands there twice"),
            (entry("").replace("\"a\"", "\"a b\""), "needs a name"),
            (entry("").replace("0f", "0g"), "64 hexadecimal digits"),
            (
                entry("") + &entry("").replace("\"a\"", "\"b\""),
                "key `b` has the same hash",
            ),
            ("[[key]]\nname = \"a\"".into(), "missing field `sha256`"),
        ] {
            let message = read(&text).unwrap_err();
            assert!(message.contains(part), "{text}: {message}");
            assert!(!message.contains("0f0f0f"), "{message}");
        }
    }

    #[test]
    fn a_key_is_known_by_its_hash() {
        // The digest of "abc" in FIPS 180-2, appendix B.1.
        let digest = from_hex("ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        assert_eq!(Some(hash("abc")), digest);
    }
}
