//! `sconce bench`.

use crate::config::Bench;

/// Runs the command.
///
/// # Errors
/// What went wrong, in one line.
pub fn run(_settings: Bench) -> Result<(), String> {
    Err("this build does not have the `bench` command".to_owned())
}
