//! `sconce serve`.

use crate::config::Serve;

/// Runs the command.
///
/// # Errors
/// What went wrong, in one line.
pub fn run(_settings: Serve) -> Result<(), String> {
    Err("this build does not have the `serve` command".to_owned())
}
