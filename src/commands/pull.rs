//! `sconce pull`: fetches a model before a server needs it.

use super::{
    model_files::{self, PullError},
    say,
};
use crate::config::Pull;

/// Fetches the model unless it is there, and prints the path of its file or folder.
///
/// # Errors
/// [`PullError`], which says what to do by hand.
pub fn run(settings: &Pull) -> Result<(), PullError> {
    say(model_files::resolve(&settings.choice.model)?.display());
    Ok(())
}
