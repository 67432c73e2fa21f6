//! One self-contained HTML file.

use super::Report;

/// The page of one report, or of several side by side.
pub fn page(_reports: &[Report]) -> String {
    String::new()
}
