//! Saving the cached blocks while requests run.
//!
//! The engine thread takes a list of the blocks when a save begins, and copies a few of them out after each step; a thread
//! of its own writes them to the file. Nothing is held for it: a block that is evicted before its turn is left out, and
//! those below it went before it. So a save costs running requests a few milliseconds a step, and never a block.

use std::{
    collections::{HashMap, VecDeque},
    io::{self, BufWriter},
    sync::Arc,
    thread,
    time::{Duration, Instant},
    vec,
};

use sconce_models::{KvCache, without_backtrace};
use tokio::sync::{mpsc, oneshot};

use super::{CacheFile, format::Writer, namespace, replace::Replacement};
use crate::{
    batching::{BlockId, BlockPool, Namespace, NodeId},
    request::TokenId,
};

/// Blocks copied between two steps.
const BLOCKS_A_TURN: usize = 4;
/// Blocks that were copied and wait to be written, at most: the memory that a save takes.
const BLOCKS_AHEAD: usize = 8;
/// When to look again where nothing runs and the writer is behind.
const PAUSE: Duration = Duration::from_millis(1);

/// What a save wrote.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Saved {
    pub blocks: u64,
    /// The file's size.
    pub bytes: u64,
    pub seconds: f64,
}

/// Why the cache file was not written. The old one, if there is one, is as it was.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    #[error("the server was started without cache-file")]
    NoCacheFile,
    #[error("cannot write the cache file {path}: {source}; check the folder's permissions and space")]
    Write { path: String, source: io::Error },
    #[error("cannot copy a block of the KV cache: {0}")]
    Copy(candle_core::Error),
    #[error("the engine failed or ended before the cache was saved; the cache file is as it was")]
    EngineLost,
}

/// Where the outcome of a save goes.
pub type Reply = oneshot::Sender<Result<Saved, SaveError>>;

/// What the writing thread gets.
enum Piece {
    Block {
        namespace: Namespace,
        above: Option<u32>,
        tokens: Vec<TokenId>,
        contents: Vec<u8>,
    },
    End,
    Failed(candle_core::Error),
}

/// Saves that were asked for and the one under way.
#[derive(Default)]
pub struct Saves {
    asked: VecDeque<Reply>,
    under_way: Option<Save>,
}

/// A save whose blocks are being copied.
struct Save {
    left: vec::IntoIter<NodeId>,
    /// Which number in the file a block has.
    numbers: HashMap<BlockId, u32>,
    pieces: mpsc::Sender<Piece>,
}

impl Saves {
    /// Begins a save once those asked for before are copied.
    pub fn ask(&mut self, reply: Reply) {
        self.asked.push_back(reply);
    }

    /// When [`Self::advance`] has more to do, if nothing runs until then.
    pub fn wake(&self, now: Instant) -> Option<Instant> {
        (self.under_way.is_some() || !self.asked.is_empty()).then(|| now + PAUSE)
    }

    /// Copies some blocks, if a save is under way and its file keeps up.
    pub fn advance(&mut self, file: Option<&Arc<CacheFile>>, pool: &BlockPool, cache: &KvCache) {
        if self.under_way.is_none() {
            self.under_way = self.asked.pop_front().and_then(|reply| begin(file, pool, reply));
        }
        if let Some(save) = &mut self.under_way
            && !save.copy(pool, cache)
        {
            self.under_way = None;
        }
    }
}

fn begin(file: Option<&Arc<CacheFile>>, pool: &BlockPool, reply: Reply) -> Option<Save> {
    let Some(file) = file.cloned() else {
        // Whoever asked may have left.
        let _ = reply.send(Err(SaveError::NoCacheFile));
        return None;
    };
    let (pieces, received) = mpsc::channel(BLOCKS_AHEAD);
    let thread = thread::Builder::new().name("cache file".into());
    if let Err(error) = thread.spawn(move || drop(reply.send(write(&file, received)))) {
        tracing::error!(%error, "cannot start a thread to write the cache file");
        return None;
    }
    Some(Save {
        left: pool.kept_by_use().into_iter(),
        numbers: HashMap::new(),
        pieces,
    })
}

impl Save {
    /// Copies up to [`BLOCKS_A_TURN`] blocks. False: there is nothing more to do.
    fn copy(&mut self, pool: &BlockPool, cache: &KvCache) -> bool {
        for _ in 0..BLOCKS_A_TURN {
            let place = match self.pieces.try_reserve() {
                Ok(place) => place,
                Err(mpsc::error::TrySendError::Full(())) => return true,
                // The writer failed and has said so.
                Err(mpsc::error::TrySendError::Closed(())) => return false,
            };
            let Some(id) = self.left.next() else {
                place.send(Piece::End);
                return false;
            };
            let Some((namespace, above, tokens)) = pool.kept(id) else {
                continue;
            };
            let mut contents = Vec::new();
            if let Err(error) = cache.read_block(id.block, &mut contents) {
                place.send(Piece::Failed(error));
                return false;
            }
            // The block above outlives those below it, so it is still the one that was written before them.
            let above = match above.map(|above| self.numbers.get(&above).copied()) {
                Some(None) => continue,
                Some(number) => number,
                None => None,
            };
            self.numbers.insert(id.block, self.numbers.len() as u32);
            place.send(Piece::Block {
                namespace: namespace.clone(),
                above,
                tokens: tokens.to_vec(),
                contents,
            });
        }
        true
    }
}

/// Writes what comes, and puts the file into its place at the end.
fn write(file: &Arc<CacheFile>, mut pieces: mpsc::Receiver<Piece>) -> Result<Saved, SaveError> {
    let started = Instant::now();
    let failed = |source| SaveError::Write {
        path: file.path.display().to_string(),
        source,
    };
    let out = Replacement::create(&file.path).map_err(failed)?;
    let mut writer = Writer::new(BufWriter::new(out), &file.identity).map_err(failed)?;
    let mut blocks = 0;
    // The numbers of those written so far.
    let mut namespaces: HashMap<Namespace, u32> = HashMap::new();
    loop {
        match pieces.blocking_recv() {
            Some(Piece::Block {
                namespace,
                above,
                tokens,
                contents,
            }) => {
                let number = match namespaces.get(&namespace) {
                    Some(&number) => number,
                    None => {
                        let number = namespaces.len() as u32;
                        let text = namespace::to_text(&namespace)
                            .map_err(io::Error::from)
                            .map_err(failed)?;
                        writer.namespace(&text).map_err(failed)?;
                        namespaces.insert(namespace, number);
                        number
                    }
                };
                writer.block(number, above, &tokens, &contents).map_err(failed)?;
                blocks += 1;
            }
            Some(Piece::End) => break,
            Some(Piece::Failed(error)) => return Err(SaveError::Copy(without_backtrace(error))),
            None => return Err(SaveError::EngineLost),
        }
    }
    let (out, bytes) = writer.finish().map_err(failed)?;
    let out = out.into_inner().map_err(|error| failed(error.into_error()))?;
    out.commit().map_err(failed)?;
    let seconds = started.elapsed().as_secs_f64();
    tracing::info!(path = %file.path.display(), blocks, bytes, seconds, "cache file written");
    Ok(Saved { blocks, bytes, seconds })
}
