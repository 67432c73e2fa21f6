//! `sconce loadtest`.

use crate::config::Loadtest;

/// Runs the command.
///
/// # Errors
/// What went wrong, in one line.
pub fn run(_settings: Loadtest) -> Result<(), String> {
    Err("this build does not have the `loadtest` command".to_owned())
}
