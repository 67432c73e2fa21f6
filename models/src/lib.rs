//! Decoder architectures on candle: one configured decoder for the Llama, Mistral, Qwen2 and Qwen3 families,
//! its weights (GGUF and safetensors), a paged KV cache, and the arithmetic for the CPU and for CUDA.
//!
//! A [`Step`] carries any mix of prefill chunks and decodes, packed end to end; [`Decoder::forward`] runs it in
//! one pass over a [`KvCache`] and answers logits for the sequences that want them. What a sequence's logits are
//! does not depend, on the CPU to the last bit, on what else is in the step or on how its prompt was cut into chunks.

pub mod ceilings;
pub mod config;
mod cpu;
#[cfg(any(test, feature = "cuda"))]
mod cuda;
mod decoder;
mod draw;
mod error;
mod kv;
mod model;
mod random;
mod rope;
mod step;
mod weights;

pub use config::{Config, Rope, RopeScaling};
pub use cpu::softmax;

pub use draw::{Count, Draw, Slot, State};
pub use error::{ModelError, without_backtrace};
pub use kv::KvCache;
pub use model::{Carried, Decoder, GpuMemory, Pending, pci_bus_id};
pub use random::point;
pub use step::{Span, Step};
