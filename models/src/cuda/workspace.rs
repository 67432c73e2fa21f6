//! What a cache's steps need on the device besides weights and pools: activations, the step's lists, the sampled tokens,
//! the states of the sequences that sample, and the graphs that were captured over them.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use candle_core::cuda_backend::cudarc;
use candle_core::{DType, Result, bail};
use cudarc::driver::result::{memcpy_dtod_async, memcpy_dtoh_async, memcpy_htod_async};
use cudarc::driver::{CudaEvent, CudaGraph, CudaSlice, CudaStream, DevicePtr, DeviceRepr, PinnedHostSlice};

use super::device_error;
use super::draw::SlotRoom;
use super::kernels::{Address, Sizes, States};

/// How much a workspace holds.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Capacity {
    pub tokens: usize,
    pub rows: usize,
    /// Words of a step's lists.
    pub words: usize,
    /// Splits of decodes, over all heads.
    pub parts: usize,
    pub slots: SlotRoom,
}

impl Capacity {
    fn holds(&self, other: &Self) -> bool {
        *self == self.with(other)
    }

    fn with(&self, other: &Self) -> Self {
        Self {
            tokens: self.tokens.max(other.tokens),
            rows: self.rows.max(other.rows),
            words: self.words.max(other.words),
            parts: self.parts.max(other.parts),
            slots: SlotRoom {
                slots: self.slots.slots.max(other.slots.slots),
                counted: self.slots.counted.max(other.slots.counted),
            },
        }
    }
}

/// Memory on the device, by its address.
struct Memory<T>(CudaSlice<T>);

impl<T: DeviceRepr> Memory<T> {
    fn new(stream: &Arc<CudaStream>, len: usize) -> Result<Self> {
        // SAFETY: every kernel writes what a later one reads, and a slot is set before a row goes on from it; what padding
        // leaves unwritten is never used.
        Ok(Self(unsafe { stream.alloc(len.max(1)) }.map_err(device_error)?))
    }

    fn address(&self) -> Address {
        self.0.device_ptr(self.0.stream()).0
    }

    /// Begins to copy what `from` holds, as far as there is room.
    fn take_over(&self, from: &Self) -> Result<()> {
        let (stream, bytes) = (self.0.stream(), size_of::<T>() * from.0.len().min(self.0.len()));
        // SAFETY: `bytes` are within both; `from` is given back on the same stream, behind the copy.
        unsafe { memcpy_dtod_async(self.address(), from.address(), bytes, stream.cu_stream()) }.map_err(device_error)
    }
}

/// A decode step for one batch size, ready to be run again.
struct Captured(CudaGraph);

// SAFETY: a graph may be launched from any thread as long as no two calls on it overlap, which the exclusive borrow of the
// workspace that owns it ensures; its stream and context are bound to the calling thread by each call.
unsafe impl Send for Captured {}
// SAFETY: nothing of a graph can be reached through a shared reference.
unsafe impl Sync for Captured {}

/// A step's tokens on their way to the host.
pub struct Sampled {
    tokens: PinnedHostSlice<u32>,
    rows: usize,
    /// Which of the workspace's steps it was.
    step: u64,
    /// When the step had ended and the tokens were copied.
    arrived: CudaEvent,
}

impl Sampled {
    fn new(stream: &Arc<CudaStream>, rows: usize) -> Result<Self> {
        let context = stream.context();
        // SAFETY: nothing of it is read before it is written.
        let tokens = unsafe { context.alloc_pinned_with_flags(rows.max(1), 0) }.map_err(device_error)?;
        let arrived = context.new_event(None).map_err(device_error)?;
        Ok(Self {
            tokens,
            rows: 0,
            step: 0,
            arrived,
        })
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The tokens, once the step has ended.
    pub fn wait(&self) -> Result<Vec<u32>> {
        self.arrived.synchronize().map_err(device_error)?;
        Ok(self.tokens.as_slice().map_err(device_error)?[..self.rows].to_vec())
    }
}

impl Drop for Sampled {
    /// The device may still be about to write into the memory. An error means that it will not.
    fn drop(&mut self) {
        let _ = self.arrived.synchronize();
    }
}

/// What steps leave for those behind them.
struct Kept {
    sampled: Memory<u32>,
    /// Steps that chose tokens: the last one's are in `sampled`.
    steps: u64,
    /// Seed and number of generated tokens of the sequence that has the slot: `[slots, 2]`.
    slots: Memory<u64>,
    /// How often each token was generated there, and whether it is in the prompt: `[counted slots, vocabulary]`.
    counts: Memory<u32>,
    /// Whether decodes run as graphs.
    with_graphs: bool,
}

/// The memory of one cache's steps. Everything runs on one stream, so that a step may be enqueued before the one before
/// has ended.
pub struct Workspace {
    stream: Arc<CudaStream>,
    /// The decoder whose weights the graphs read.
    decoder: u64,
    capacity: Capacity,
    /// Residual stream in float32, `[tokens, hidden]`.
    x: Memory<f32>,
    /// Normalised rows, `[tokens, hidden]`, in the weights' type as all that follow up to `projected`.
    normed: Memory<u8>,
    qkv: Memory<u8>,
    attended: Memory<u8>,
    gate_up: Memory<u8>,
    activated: Memory<u8>,
    projected: Memory<u8>,
    angles: [Memory<f32>; 2],
    sums: Memory<f32>,
    totals: Memory<f32>,
    logits: Memory<f32>,
    kept: Kept,
    /// Where tokens were fetched to, to be used again.
    spare: Vec<Sampled>,
    words: Memory<u32>,
    staging: PinnedHostSlice<u32>,
    /// When the last copy out of `staging` was done.
    copied: CudaEvent,
    graphs: HashMap<usize, Captured>,
}

/// The addresses of a workspace's memory.
#[derive(Debug, Clone, Copy)]
pub struct Addresses {
    pub x: Address,
    pub normed: Address,
    pub qkv: Address,
    pub attended: Address,
    pub gate_up: Address,
    pub activated: Address,
    pub projected: Address,
    pub angles: [Address; 2],
    pub sums: Address,
    pub totals: Address,
    pub logits: Address,
    pub sampled: Address,
    pub states: States,
    pub words: Address,
}

impl Kept {
    /// Goes on from what was kept before, in memory that was no larger.
    fn take_over(&mut self, before: &Self) -> Result<()> {
        (self.steps, self.with_graphs) = (before.steps, before.with_graphs);
        self.sampled.take_over(&before.sampled)?;
        self.slots.take_over(&before.slots)?;
        self.counts.take_over(&before.counts)
    }
}

impl Workspace {
    /// Memory for steps up to `capacity`.
    fn new(decoder: u64, stream: &Arc<CudaStream>, dtype: DType, sizes: &Sizes, capacity: Capacity) -> Result<Self> {
        let Capacity {
            tokens,
            rows,
            words,
            parts,
            slots,
        } = capacity;
        let typed = |columns: usize| Memory::new(stream, tokens * columns * dtype.size_in_bytes());
        let (queries, all) = (
            sizes.heads * sizes.head_dim,
            (sizes.heads + 2 * sizes.kv_heads) * sizes.head_dim,
        );
        let angles = || Memory::new(stream, tokens * sizes.head_dim / 2);
        // SAFETY: the host writes what a copy reads.
        let staging = unsafe { stream.context().alloc_pinned(words) }.map_err(device_error)?;
        let copied = stream.context().new_event(None).map_err(device_error)?;
        Ok(Self {
            stream: stream.clone(),
            decoder,
            capacity,
            x: Memory::new(stream, tokens * sizes.hidden)?,
            normed: typed(sizes.hidden)?,
            qkv: typed(all)?,
            attended: typed(queries)?,
            gate_up: typed(2 * sizes.inner)?,
            activated: typed(sizes.inner)?,
            projected: typed(sizes.hidden)?,
            angles: [angles()?, angles()?],
            sums: Memory::new(stream, parts * sizes.head_dim)?,
            totals: Memory::new(stream, parts * 2)?,
            logits: Memory::new(stream, rows * sizes.vocabulary)?,
            kept: Kept {
                sampled: Memory::new(stream, rows)?,
                steps: 0,
                slots: Memory::new(stream, slots.slots * 2)?,
                counts: Memory::new(stream, slots.counted * sizes.vocabulary)?,
                with_graphs: false,
            },
            spare: Vec::new(),
            words: Memory::new(stream, words)?,
            staging,
            copied,
            graphs: HashMap::new(),
        })
    }

    /// `decoder`'s workspace, made or made larger to hold `needed`. Graphs over memory that is given back go with it, and
    /// are captured again when they are wanted.
    pub fn holding<'a>(
        workspace: &'a mut Option<Self>,
        decoder: u64,
        stream: &Arc<CudaStream>,
        dtype: DType,
        sizes: &Sizes,
        needed: Capacity,
    ) -> Result<&'a mut Self> {
        workspace.take_if(|workspace| workspace.decoder != decoder);
        let held = workspace.as_ref().map(|w| w.capacity).unwrap_or_default();
        if workspace.is_none() || !held.holds(&needed) {
            // The old memory first: both might not fit.
            let before = workspace.take().map(Self::retire).transpose()?;
            let make = |capacity| -> Result<Self> {
                let mut new = Self::new(decoder, stream, dtype, sizes, capacity)?;
                if let Some(before) = &before {
                    new.kept.take_over(before)?;
                }
                Ok(new)
            };
            let larger = make(held.with(&needed));
            if larger.is_err() && before.is_some() {
                // Smaller steps go on, as before, in as much memory as there was.
                *workspace = make(held).ok();
            }
            *workspace = Some(larger?);
        }
        match workspace {
            Some(workspace) => Ok(workspace),
            None => bail!("a step of nothing"),
        }
    }

    /// Gives back all memory but what the next step may go on from.
    fn retire(self) -> Result<Kept> {
        // Graphs and copies may be under way.
        self.stream.synchronize().map_err(device_error)?;
        Ok(self.kept)
    }

    pub fn addresses(&self) -> Addresses {
        Addresses {
            x: self.x.address(),
            normed: self.normed.address(),
            qkv: self.qkv.address(),
            attended: self.attended.address(),
            gate_up: self.gate_up.address(),
            activated: self.activated.address(),
            projected: self.projected.address(),
            angles: [self.angles[0].address(), self.angles[1].address()],
            sums: self.sums.address(),
            totals: self.totals.address(),
            logits: self.logits.address(),
            sampled: self.kept.sampled.address(),
            states: States {
                slots: self.kept.slots.address(),
                counts: self.kept.counts.address(),
            },
            words: self.words.address(),
        }
    }

    /// Begins to copy a step's lists to the device.
    pub fn upload(&mut self, words: &[u32]) -> Result<()> {
        self.copied.synchronize().map_err(device_error)?;
        let staging = &mut self.staging.as_mut_slice().map_err(device_error)?[..words.len()];
        staging.copy_from_slice(words);
        // SAFETY: the device's memory is as long as the staging's; that stays as it is until `copied` has come.
        unsafe { memcpy_htod_async(self.words.address(), staging, self.stream.cu_stream()) }.map_err(device_error)?;
        self.copied.record(&self.stream).map_err(device_error)
    }

    /// Begins to copy what the step that was just enqueued chooses for its rows to the host.
    pub fn fetch(&mut self, rows: usize) -> Result<Sampled> {
        let spare = self.spare.pop().filter(|spare| spare.tokens.len() >= rows);
        let mut fetched = match spare {
            Some(spare) => spare,
            None => Sampled::new(&self.stream, self.capacity.rows)?,
        };
        self.kept.steps += 1;
        (fetched.rows, fetched.step) = (rows, self.kept.steps);
        if rows > 0 {
            let tokens = &mut fetched.tokens.as_mut_slice().map_err(device_error)?[..rows];
            // SAFETY: the device's memory holds so many; the host's stays as it is until `arrived` has come.
            unsafe { memcpy_dtoh_async(tokens, self.kept.sampled.address(), self.stream.cu_stream()) }
                .map_err(device_error)?;
        }
        fetched.arrived.record(&self.stream).map_err(device_error)?;
        Ok(fetched)
    }

    /// Whether what a step chose is still on the device.
    pub fn holds(&self, sampled: &Sampled) -> bool {
        self.kept.steps == sampled.step
    }

    pub fn take_back(&mut self, sampled: Sampled) {
        self.spare.push(sampled);
    }

    /// The logits of the last step's rows, once it has ended: `[rows, vocabulary]`.
    pub fn logits(&self, rows: usize, vocabulary: usize) -> Result<Vec<f32>> {
        let logits = self.logits.0.slice(..rows * vocabulary);
        let host = self.stream.clone_dtoh(&logits).map_err(device_error)?;
        // The copy need not have been done when the call returns.
        self.stream.synchronize().map_err(device_error)?;
        Ok(host)
    }

    /// Runs the graph for steps of `batch` decodes; `false` if there is none.
    pub fn replay(&mut self, batch: usize) -> Result<bool> {
        let Some(graph) = self.graphs.get_mut(&batch) else {
            return Ok(false);
        };
        graph.0.launch().map_err(device_error)?;
        Ok(true)
    }

    /// Lets decodes run as graphs, or not.
    pub fn run_graphs(&mut self, with_graphs: bool) {
        self.kept.with_graphs = with_graphs;
    }

    pub fn runs_graphs(&self) -> bool {
        self.kept.with_graphs
    }

    /// Keeps what `enqueue` puts on the stream as the graph for `batch` decodes, without running it.
    pub fn capture(&mut self, batch: usize, enqueue: impl FnOnce() -> Result<()>) -> Result<()> {
        use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
        // Another thread's calls must not end in the capture, nor break it.
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        self.stream.begin_capture(mode).map_err(device_error)?;
        let enqueued = enqueue();
        // The capture is ended whatever came of it, or the stream could not be used any more.
        let graph = self.stream.end_capture(CUgraphInstantiate_flags(0));
        enqueued?;
        match graph.map_err(device_error)? {
            Some(graph) => {
                graph.upload().map_err(device_error)?;
                self.graphs.insert(batch, Captured(graph));
                Ok(())
            }
            None => bail!("a decode of {batch} left nothing to capture"),
        }
    }
}

impl fmt::Debug for Workspace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Workspace")
            .field("capacity", &self.capacity)
            .field("graphs", &self.graphs.len())
            .finish_non_exhaustive()
    }
}
