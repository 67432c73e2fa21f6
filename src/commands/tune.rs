//! `sconce tune`.

use crate::config::Tune;

/// Runs the command.
///
/// # Errors
/// What went wrong, in one line.
pub fn run(_settings: Tune) -> Result<(), String> {
    Err("this build does not have the `tune` command".to_owned())
}
