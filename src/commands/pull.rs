//! `sconce pull`: fetches a model before a server needs it.

use super::{
    OutputError,
    model_files::{self, PullError},
    say,
};
use crate::config::Pull;

/// Why there is no model, or no word of where it is.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub enum NotPulled {
    Pull(#[from] PullError),
    Output(#[from] OutputError),
}

/// Fetches the model unless it is there, and prints the path of its file or folder.
///
/// # Errors
/// [`PullError`] says what to do by hand.
pub fn run(settings: &Pull) -> Result<(), NotPulled> {
    let path = model_files::resolve(&settings.choice.model)?;
    Ok(say(path.display())?)
}
