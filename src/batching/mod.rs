//! Policy only: queue, window, buckets, scheduler, KV blocks, prefix tree. No tensor, no I/O, no clock of its own.
pub mod policy;
