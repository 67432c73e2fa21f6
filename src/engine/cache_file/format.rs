//! The cache file's bytes.
//!
//! ```text
//! magic [8]  version u32  header length u32  header (JSON, an Identity)
//! records:  1  length u32  text                              a namespace, numbered from 0
//!           2  namespace u32  above u32  tokens  contents    a block, numbered from 0
//! 0  digest [16]                                             the end; XXH3-128 of all bytes before the digest
//! ```
//!
//! Numbers are little-endian. A block stands behind the block above it and behind its namespace; a namespace stands only
//! where a block of it follows. Blocks come in the order in which they are worth keeping, so a reader with less room
//! takes the first ones.

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};
use twox_hash::XxHash3_128;

use crate::request::TokenId;

/// Raised whenever the bytes change.
pub const VERSION: u32 = 1;
const MAGIC: [u8; 8] = *b"SCONCEKV";
/// No header of this version is longer.
const MAX_HEADER: u64 = 4 << 10;
/// The longest text of a namespace, in bytes.
const MAX_NAMESPACE: u64 = 64 << 10;
const DIGEST: u64 = 16;
const END: u8 = 0;
const NAMESPACE: u8 = 1;
const BLOCK: u8 = 2;
/// Stands for "above" where a block begins a prompt.
const ROOT: u32 = u32::MAX;

/// What the blocks of a file were computed with. They mean nothing where any of it differs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    /// SHA-256 of the model's files, hexadecimal.
    pub weights: String,
    /// The type of weights and KV cache.
    pub dtype: String,
    /// Tokens in a block.
    pub block_size: usize,
    /// Bytes of a block over all layers.
    pub block_bytes: usize,
    /// [`sconce_models::KvCache::layout`].
    pub layout: u32,
}

impl Identity {
    /// What differs in a file that was written for `self`, or nothing.
    fn difference(&self, here: &Self) -> Option<String> {
        let Self {
            weights,
            dtype,
            block_size,
            block_bytes,
            layout,
        } = self;
        if *weights != here.weights {
            Some("it was written for another model".into())
        } else if *dtype != here.dtype {
            Some(format!("it was written for dtype {dtype}, not {}", here.dtype))
        } else if *block_size != here.block_size {
            Some(format!(
                "it was written for block-size {block_size}, not {}",
                here.block_size
            ))
        } else if (*block_bytes, *layout) != (here.block_bytes, here.layout) {
            Some("it was written for another layout of the KV cache".into())
        } else {
            None
        }
    }
}

/// Why a file is not used.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    #[error("it is no cache file")]
    NotACacheFile,
    #[error("it has version {0} of the format, and this server reads version {VERSION}")]
    Version(u32),
    #[error("{0}")]
    Foreign(String),
    #[error("it is damaged: {0}")]
    Damaged(&'static str),
    #[error("it cannot be read: {0}")]
    Io(#[from] io::Error),
    /// A block's contents did not go into the pool.
    #[error("its blocks cannot be taken: {0}")]
    Pool(#[from] candle_core::Error),
}

/// One part of a file, as a [`Reader`] gives it.
#[derive(Debug, PartialEq)]
pub enum Record<'a> {
    Namespace(String),
    Block {
        /// Number of a namespace that came before.
        namespace: u32,
        /// Number of the block above; `None` where the block begins a prompt.
        above: Option<u32>,
        tokens: Vec<TokenId>,
        contents: &'a [u8],
    },
}

/// Writes a file from its beginning to its end.
pub struct Writer<W> {
    out: W,
    digest: XxHash3_128,
    bytes: u64,
}

impl<W: Write> Writer<W> {
    pub fn new(out: W, identity: &Identity) -> io::Result<Self> {
        let header = serde_json::to_vec(identity)?;
        let mut writer = Self {
            out,
            digest: XxHash3_128::new(),
            bytes: 0,
        };
        writer.put(&MAGIC)?;
        writer.put(&VERSION.to_le_bytes())?;
        writer.put(&(header.len() as u32).to_le_bytes())?;
        writer.put(&header)?;
        Ok(writer)
    }

    /// The next namespace; a block of it follows. Texts over the limit are an error.
    pub fn namespace(&mut self, text: &str) -> io::Result<()> {
        if text.len() as u64 > MAX_NAMESPACE {
            return Err(io::Error::other("a namespace is too long to be written"));
        }
        self.put(&[NAMESPACE])?;
        self.put(&(text.len() as u32).to_le_bytes())?;
        self.put(text.as_bytes())
    }

    /// The next block. Tokens and contents have the lengths that the identity says.
    pub fn block(&mut self, namespace: u32, above: Option<u32>, tokens: &[TokenId], contents: &[u8]) -> io::Result<()> {
        let mut head = vec![BLOCK];
        for number in [namespace, above.unwrap_or(ROOT)].iter().chain(tokens) {
            head.extend(number.to_le_bytes());
        }
        self.put(&head)?;
        self.put(contents)
    }

    /// Ends the file: what it was written to, and the file's size in bytes.
    pub fn finish(mut self) -> io::Result<(W, u64)> {
        self.put(&[END])?;
        let digest = self.digest.finish_128();
        self.put(&digest.to_le_bytes())?;
        self.out.flush()?;
        Ok((self.out, self.bytes))
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.digest.write(bytes);
        self.bytes += bytes.len() as u64;
        self.out.write_all(bytes)
    }
}

/// Reads a file once from its beginning to its end, with memory for one block. Nothing of it may be used before the end
/// was reached without a [`Refusal`].
pub struct Reader<R> {
    input: R,
    digest: XxHash3_128,
    /// Bytes of the file that were not read yet.
    left: u64,
    block_size: usize,
    contents: Vec<u8>,
    namespaces: u32,
    blocks: u32,
}

impl<R: Read> Reader<R> {
    /// Reads the header of a file of `len` bytes. It must have been written for `here`.
    pub fn new(input: R, len: u64, here: &Identity) -> Result<Self, Refusal> {
        let mut reader = Self {
            input,
            digest: XxHash3_128::new(),
            left: len,
            block_size: here.block_size,
            contents: Vec::new(),
            namespaces: 0,
            blocks: 0,
        };
        if len < MAGIC.len() as u64 || reader.take()? != MAGIC {
            return Err(Refusal::NotACacheFile);
        }
        match reader.number()? {
            VERSION => {}
            other => return Err(Refusal::Version(other)),
        }
        let length = reader.number()?;
        let header = reader.bytes(length.into(), MAX_HEADER)?;
        let identity: Identity =
            serde_json::from_slice(&header).map_err(|_| Refusal::Damaged("its header is not understood"))?;
        if let Some(difference) = identity.difference(here) {
            return Err(Refusal::Foreign(difference));
        }
        reader.contents = vec![0; here.block_bytes];
        Ok(reader)
    }

    /// The next record; `None` at the end of a file that is whole.
    pub fn next(&mut self) -> Result<Option<Record<'_>>, Refusal> {
        match self.take()? {
            [NAMESPACE] if self.namespaces <= self.blocks => {
                let length = self.number()?;
                let text = self.bytes(length.into(), MAX_NAMESPACE)?;
                self.namespaces += 1;
                let text = String::from_utf8(text).map_err(|_| Refusal::Damaged("a namespace is not text"))?;
                Ok(Some(Record::Namespace(text)))
            }
            [BLOCK] => self.block().map(Some),
            [END] => self.end().map(|()| None),
            _ => Err(Refusal::Damaged("a record is of no known kind")),
        }
    }

    fn block(&mut self) -> Result<Record<'_>, Refusal> {
        let namespace = self.number()?;
        let above = Some(self.number()?).filter(|&above| above != ROOT);
        if namespace >= self.namespaces || above.is_some_and(|above| above >= self.blocks) || self.blocks == ROOT - 1 {
            return Err(Refusal::Damaged("a block stands where it cannot"));
        }
        let tokens = (0..self.block_size).map(|_| self.number()).collect::<Result<_, _>>()?;
        let mut contents = std::mem::take(&mut self.contents);
        let read = self.fill(&mut contents);
        self.contents = contents;
        read?;
        self.blocks += 1;
        Ok(Record::Block {
            namespace,
            above,
            tokens,
            contents: &self.contents,
        })
    }

    fn end(&mut self) -> Result<(), Refusal> {
        let expected = self.digest.finish_128().to_le_bytes();
        if self.left != DIGEST {
            return Err(Refusal::Damaged("it does not end where its blocks do"));
        }
        match self.take()? == expected {
            true => Ok(()),
            false => Err(Refusal::Damaged("its checksum is wrong")),
        }
    }

    fn number(&mut self) -> Result<u32, Refusal> {
        self.take().map(u32::from_le_bytes)
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], Refusal> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    /// `length` bytes, at most `most`. Nothing is allocated for more than the file has.
    fn bytes(&mut self, length: u64, most: u64) -> Result<Vec<u8>, Refusal> {
        if length > most.min(self.left) {
            return Err(Refusal::Damaged("a length is out of range"));
        }
        let mut bytes = vec![0; length as usize];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<(), Refusal> {
        let left = self.left.checked_sub(bytes.len() as u64);
        self.left = left.ok_or(Refusal::Damaged("it ends early"))?;
        self.input.read_exact(bytes).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => Refusal::Damaged("it ends early"),
            _ => Refusal::Io(error),
        })?;
        self.digest.write(bytes);
        Ok(())
    }
}
