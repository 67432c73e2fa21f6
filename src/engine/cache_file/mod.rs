//! The file that keeps the prefix cache's blocks from one run of the server to the next.
//!
//! It is read once at the start, block by block into the pool, and either all of what fits is taken or nothing: the
//! prefix tree hears of the blocks when the last byte was checked. It is written beside its place and moved there when
//! it is whole and on disk, so that a crash at any time leaves the old file.

mod format;
mod namespace;
mod replace;
mod save;
mod weights;

use std::{
    fs::File,
    io::{self, BufReader},
    path::PathBuf,
    time::Instant,
};

use sconce_models::KvCache;

pub use format::{Identity, Refusal};
use format::{Reader, Record};
pub use replace::folder;
pub use save::{Reply, SaveError, Saved, Saves};
pub use weights::hash as weights_hash;

use crate::{
    batching::{BlockId, BlockPool, Namespace},
    request::TokenId,
};

/// Where the blocks are kept, and what they must have been computed with.
#[derive(Debug)]
pub struct CacheFile {
    pub path: PathBuf,
    pub identity: Identity,
}

/// A block that was read and not yet kept for its tokens.
struct Read {
    block: BlockId,
    /// Its number.
    namespace: u32,
    above: Option<u32>,
    tokens: Vec<TokenId>,
}

/// What was read, by its numbers in the file.
#[derive(Default)]
struct Taken {
    namespaces: Vec<Namespace>,
    blocks: Vec<Read>,
}

impl CacheFile {
    /// Fills the pool with the file's blocks, cached and held by nobody. A file that is not there or cannot be used is
    /// said in the log, and leaves the pool empty.
    pub fn load(&self, pool: &mut BlockPool, cache: &mut KvCache) {
        let (started, path) = (Instant::now(), self.path.display());
        let file = match File::open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return tracing::info!("no cache file at {path} yet; starting cold");
            }
            Err(error) => return tracing::warn!("the cache file {path} cannot be opened: {error}; starting cold"),
        };
        let read = file.metadata().map_err(Refusal::from).and_then(|metadata| {
            let input = BufReader::with_capacity(1 << 20, file);
            self.restore(input, metadata.len(), pool, cache)
        });
        match read {
            Ok((blocks, 0)) => {
                let seconds = started.elapsed().as_secs_f64();
                tracing::info!(%path, blocks, seconds, "cache file read");
            }
            Ok((blocks, left)) => {
                let seconds = started.elapsed().as_secs_f64();
                tracing::info!(%path, blocks, left, seconds, "cache file read; the least recently used did not fit");
            }
            Err(refusal) => tracing::warn!("the cache file {path} is not used: {refusal}; starting cold"),
        }
    }

    /// The numbers of blocks taken and left because the pool is smaller. After a refusal the pool is as it was.
    fn restore(
        &self,
        input: impl io::Read,
        len: u64,
        pool: &mut BlockPool,
        cache: &mut KvCache,
    ) -> Result<(usize, usize), Refusal> {
        let mut taken = Taken::default();
        let read = self.read(input, len, pool, cache, &mut taken);
        let now = Instant::now();
        // Each block's final place, by its number in the file: blocks of a sequence that nobody runs any more.
        let mut blocks: Vec<BlockId> = Vec::with_capacity(taken.blocks.len());
        for Read {
            block,
            namespace,
            above,
            tokens,
        } in taken.blocks
        {
            let above = above.map(|above| blocks[above as usize]);
            let namespace = &taken.namespaces[namespace as usize];
            blocks.push(match &read {
                Ok(_) => pool.keep(namespace, now, above, &tokens, block),
                Err(_) => block,
            });
        }
        // Lets go of the last first, so that the first is the most recently used again.
        pool.release(&blocks);
        read.map(|left| (blocks.len(), left))
    }

    /// Reads the file to its end and its blocks into those that the pool has; gives how many were left.
    fn read(
        &self,
        input: impl io::Read,
        len: u64,
        pool: &mut BlockPool,
        cache: &mut KvCache,
        taken: &mut Taken,
    ) -> Result<usize, Refusal> {
        let mut reader = Reader::new(input, len, &self.identity)?;
        let mut left = 0;
        while let Some(record) = reader.next()? {
            match record {
                Record::Namespace(text) => {
                    let namespace = namespace::from_text(&text);
                    let namespace = namespace.map_err(|_| Refusal::Damaged("a namespace is not understood"))?;
                    taken.namespaces.push(namespace);
                }
                // Those above a block come first, so those below one that was left are left too.
                Record::Block { .. } if left > 0 => left += 1,
                Record::Block {
                    namespace,
                    above,
                    tokens,
                    contents,
                } => match pool.allocate() {
                    None => left = 1,
                    Some(block) => {
                        taken.blocks.push(Read {
                            block,
                            namespace,
                            above,
                            tokens,
                        });
                        cache.write_block(block, contents)?;
                    }
                },
            }
        }
        Ok(left)
    }
}

#[cfg(test)]
mod tests;
