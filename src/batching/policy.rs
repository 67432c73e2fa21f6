//! The two choices an experiment turns: what a batch waits for, and when sequences may join one.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// When a batch that is not full closes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WindowPolicy {
    /// At the end of the window; at once when the device would stand idle or the wait would cost a deadline
    Adaptive,
    /// At the end of the window, always
    Fixed,
    /// At once, always
    None,
}

/// When sequences join and leave the batch that runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Schedule {
    /// At every step
    Continuous,
    /// A closed batch runs to completion before the next
    Dynamic,
    /// One request at a time
    Sequential,
}
