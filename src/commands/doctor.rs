//! `sconce doctor`: what the machine offers and what the settings would be.

use crate::config::{Doctor, Setting};

/// Prints the report.
///
/// # Errors
/// When it cannot be written.
pub fn run(_settings: &Doctor, _origins: &[Setting]) -> Result<(), std::io::Error> {
    Ok(())
}
