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
use std::io::{self, Write};

/// Standard output did not take what a command has to say.
#[derive(Debug, thiserror::Error)]
#[error("cannot write to standard output: {0}")]
pub struct OutputError(#[from] io::Error);

/// Writes a line to standard output. Whoever has closed that, as `head` does, has read enough: the command goes on.
fn say(line: impl Display) -> Result<(), OutputError> {
    match writeln!(io::stdout(), "{line}") {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}
