//! What there is for the KV cache, and the longest sequence that it allows.

use std::fmt;

use sconce_models::GpuMemory;

use super::memory::readable;

/// The shortest limit, in tokens, to which a model's own is cut where nobody asked for one: a question and its answer.
const LEAST_CONTEXT: usize = 256;

/// Bytes for the KV cache, and where they come from.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum KvRoom {
    /// As many as `kv-memory` says.
    Asked(u64),
    /// Of main memory, where nothing was asked for.
    Main(u64),
    /// What is left of this share of a GPU's.
    Gpu { share: f64, memory: GpuMemory },
}

impl KvRoom {
    pub fn bytes(&self) -> u64 {
        match self {
            Self::Asked(bytes) | Self::Main(bytes) => *bytes,
            Self::Gpu { share, memory } => memory.left(*share),
        }
    }

    /// The setting that makes it larger or smaller.
    pub fn setting(&self) -> &'static str {
        match self {
            Self::Asked(_) | Self::Main(_) => "kv-memory",
            Self::Gpu { .. } => "gpu-memory",
        }
    }

    /// The longest sequence in tokens, `asked` if it is given, of a model made for `limit` tokens, in blocks of `block_size`
    /// slots and `block_bytes` bytes. Where nothing was asked for, the cache may hold less than the model's limit, but not less
    /// than is of use.
    ///
    /// # Errors
    /// When one sequence of that length does not fit.
    pub fn context(
        &self,
        asked: Option<usize>,
        limit: usize,
        block_size: usize,
        block_bytes: usize,
    ) -> Result<usize, KvTooSmall> {
        let holds = usize::try_from(self.bytes() / block_bytes as u64)
            .unwrap_or(usize::MAX)
            .saturating_mul(block_size);
        let length = asked.unwrap_or(limit);
        if holds >= length {
            return Ok(length);
        }
        if asked.is_some() || holds < LEAST_CONTEXT {
            return Err(KvTooSmall {
                room: *self,
                holds,
                length,
                needed: length.div_ceil(block_size) as u64 * block_bytes as u64,
            });
        }
        tracing::warn!(
            "sequences may have {holds} tokens, not the {limit} that the model was made for: {self}; raise {} for more, or \
             set max-model-len",
            self.setting()
        );
        Ok(holds)
    }
}

/// One sequence of the greatest length does not fit the KV cache.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error(
    "one sequence of {length} tokens needs {} of KV cache, and {room}, which holds {holds} tokens; raise {} or lower \
     max-model-len", readable(*.needed), room.setting()
)]
pub struct KvTooSmall {
    room: KvRoom,
    /// Tokens.
    holds: usize,
    length: usize,
    /// Bytes.
    needed: u64,
}

impl fmt::Display for KvRoom {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Asked(bytes) => write!(f, "kv-memory is {}", readable(*bytes)),
            Self::Main(bytes) => write!(f, "{} of main memory are taken for it", readable(*bytes)),
            Self::Gpu { share, memory } => write!(
                f,
                "gpu-memory allows {share} of the GPU's {}, of which weights, the largest step and other programs take {} \
                 and leave {}",
                readable(memory.total),
                readable(memory.taken),
                readable(memory.left(*share)),
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    /// Of a GPU with 80 GiB of which so much is taken.
    fn gpu(taken: u64) -> KvRoom {
        KvRoom::Gpu {
            share: 0.9,
            memory: GpuMemory { total: 80 * GIB, taken },
        }
    }

    /// In blocks of 16 tokens and 2 MiB, of a model made for 8192 tokens: 1 GiB.
    fn context(room: KvRoom, asked: Option<usize>) -> Result<usize, String> {
        room.context(asked, 8192, 16, 2 << 20)
            .map_err(|error| error.to_string())
    }

    #[test]
    fn a_gpu_with_too_little_left_is_refused_with_its_numbers() {
        // A hundred blocks are left.
        let message = context(gpu(72 * GIB - 200 * MIB), Some(4096)).unwrap_err();
        assert_eq!(
            message,
            "one sequence of 4096 tokens needs 512.0 MiB of KV cache, and gpu-memory allows 0.9 of the GPU's 80.0 GiB, of \
             which weights, the largest step and other programs take 71.8 GiB and leave 200.0 MiB, which holds 1600 \
             tokens; raise gpu-memory or lower max-model-len"
        );
        // Nothing is left, or less than nothing, whatever was asked for.
        for taken in [72 * GIB, 79 * GIB] {
            for (asked, length) in [
                (None, "8192 tokens needs 1.0 GiB"),
                (Some(16), "16 tokens needs 2.0 MiB"),
            ] {
                let message = context(gpu(taken), asked).unwrap_err();
                assert!(
                    message.contains(length) && message.contains("leave 0.0 MiB"),
                    "{message}"
                );
                assert!(
                    message.contains("raise gpu-memory") && !message.contains("kv-memory"),
                    "{message}"
                );
            }
        }
    }

    #[test]
    fn a_length_that_nobody_asked_for_is_cut_while_it_is_of_use() {
        for room in [KvRoom::Asked, KvRoom::Main] {
            assert_eq!(context(room(GIB), None), Ok(8192));
            assert_eq!(context(room(GIB - 1), None), Ok(8176), "a block less");
            assert_eq!(context(room(32 * MIB), None), Ok(256));
            let message = context(room(32 * MIB - 1), None).unwrap_err();
            assert!(message.contains("which holds 240 tokens; raise kv-memory"), "{message}");
            assert_eq!(context(room(32 * MIB), Some(256)), Ok(256));
            assert!(
                context(room(32 * MIB), Some(257)).is_err(),
                "what is asked for is not cut"
            );
            assert_eq!(
                context(room(2 * MIB), Some(16)),
                Ok(16),
                "little is enough for whoever asks for it"
            );
        }
        assert_eq!(context(gpu(72 * GIB - 600 * MIB), None), Ok(4800));
        // A model for short texts is whole in a small cache.
        assert_eq!(KvRoom::Asked(2 << 20).context(None, 10, 16, 2 << 20), Ok(10));
    }
}
