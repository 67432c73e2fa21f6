//! The two choices that decide when a request runs: how long a batch waits, and what runs beside what.

use clap::ValueEnum;

/// When the batch window closes before its time is up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum WindowPolicy {
    /// Also close when the device would stand idle or a deadline would be missed
    Adaptive,
    /// Always wait the window out, unless the batch is full
    Fixed,
    /// Never wait
    None,
}

/// How requests share the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Schedule {
    /// Sequences join and leave at every step; prompts run in chunks
    Continuous,
    /// A closed batch runs to completion before the next starts
    Dynamic,
    /// One request at a time
    Sequential,
}
