//! What each command of the command line does.

pub mod bench;
pub mod device;
pub mod doctor;
pub mod key;
pub mod loadtest;
pub mod model_files;
pub mod pull;
pub mod serve;
mod signals;
pub mod tune;

use std::fmt::Display;
use std::io::Write;

/// Writes a line to standard output. Whoever has closed that, as `head` does, has read enough: the command goes on.
fn say(line: impl Display) {
    let _ = writeln!(std::io::stdout(), "{line}");
}
