//! From the name in `--model` to files on this machine.
//!
//! A name is the built-in model's, a GGUF file, a folder in Hugging Face's layout, or an id on its hub. Only the first
//! and the last may need the network; a model that was fetched once is found without it.

mod builtin;
mod download;
mod hub;

use std::io;
use std::path::{Path, PathBuf};

pub use builtin::{BuiltIn, SMOLLM2};

/// Why a model's files could not be had.
#[derive(Debug, thiserror::Error)]
pub enum PullError {
    #[error(
        "no model at {}: `--model` takes `{}`, a GGUF file, a folder with config.json, or a hub id such as `org/name`",
        .0.display(),
        SMOLLM2.name
    )]
    NotFound(PathBuf),
    #[error("{} is not a GGUF file: its name must end in .gguf", .0.display())]
    NotGguf(PathBuf),
    #[error("the folder {} has no {missing}, so it is no Hugging Face model", folder.display())]
    NotAModelFolder { folder: PathBuf, missing: &'static str },
    #[error("no cache folder: set SCONCE_HOME to a folder that sconce may write to")]
    NoCacheFolder,
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("cannot get {file}: {why}. By hand: {by_hand}")]
    Download {
        file: &'static str,
        why: String,
        by_hand: String,
    },
    #[error("stopped before the model was there; what was fetched is removed")]
    Interrupted,
    #[error(
        "there is no folder {id}, and it cannot be had from the hub: {why}. By hand: put {needed} into a folder and give \
         it to `--model`"
    )]
    Hub {
        id: String,
        why: String,
        needed: &'static str,
    },
}

/// The path of a GGUF file or of a folder in Hugging Face's layout for a name as `--model` takes it. Fetches the
/// built-in model and models of the hub if they are not there, with progress on standard error. Blocks meanwhile.
///
/// # Errors
/// [`PullError`].
pub fn resolve(model: &str) -> Result<PathBuf, PullError> {
    if model == SMOLLM2.name {
        let folder = models_folder().ok_or(PullError::NoCacheFolder)?;
        return download::Download {
            model: SMOLLM2,
            folder: &folder,
            python: "python3".as_ref(),
        }
        .run();
    }
    let path = Path::new(model);
    match std::fs::metadata(path) {
        Ok(found) if found.is_dir() => model_folder(path),
        Ok(_)
            if path
                .extension()
                .is_some_and(|extension| extension.eq_ignore_ascii_case("gguf")) =>
        {
            Ok(path.into())
        }
        Ok(_) => Err(PullError::NotGguf(path.into())),
        Err(error) if error.kind() != io::ErrorKind::NotFound && error.kind() != io::ErrorKind::NotADirectory => {
            Err(PullError::Io {
                action: "open",
                path: path.into(),
                source: error,
            })
        }
        Err(_) if hub::is_id(model) => hub::resolve(model),
        Err(_) => Err(PullError::NotFound(path.into())),
    }
}

/// The `config.json` that `--model` names where weights are random: the file itself, or one in a folder.
///
/// # Errors
/// [`PullError::NotFound`].
pub fn shape(model: &str) -> Result<PathBuf, PullError> {
    let path = Path::new(model);
    let file = if path.is_dir() {
        path.join("config.json")
    } else {
        path.into()
    };
    file.is_file()
        .then_some(file)
        .ok_or_else(|| PullError::NotFound(path.into()))
}

/// The folder of downloaded models: `models` in `$SCONCE_HOME`, else in `sconce` in the user's cache folder.
pub fn models_folder() -> Option<PathBuf> {
    let home = std::env::var_os("SCONCE_HOME")
        .filter(|home| !home.is_empty())
        .map(PathBuf::from);
    Some(home.or_else(|| Some(dirs::cache_dir()?.join("sconce")))?.join("models"))
}

/// The hub's own cache, which `HF_HOME` moves.
pub fn hub_folder() -> PathBuf {
    hf_hub::Cache::from_env().path().clone()
}

/// Bytes in a file or in a folder's files, as far as they can be read while others write them. Links count nothing.
pub fn size_of(path: &Path) -> u64 {
    match std::fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => {
            let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
            entries.map(|entry| size_of(&entry.path())).sum()
        }
        Ok(found) if found.is_file() => found.len(),
        _ => 0,
    }
}

fn model_folder(folder: &Path) -> Result<PathBuf, PullError> {
    for needed in ["config.json", "tokenizer.json"] {
        if !folder.join(needed).is_file() {
            return Err(PullError::NotAModelFolder {
                folder: folder.into(),
                missing: needed,
            });
        }
    }
    Ok(folder.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_and_folders() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
        assert!(matches!(
            resolve(&path("")),
            Err(PullError::NotAModelFolder {
                missing: "config.json",
                ..
            })
        ));
        std::fs::write(path("config.json"), "{}").unwrap();
        assert!(matches!(
            resolve(&path("")),
            Err(PullError::NotAModelFolder {
                missing: "tokenizer.json",
                ..
            })
        ));
        std::fs::write(path("tokenizer.json"), "{}").unwrap();
        assert_eq!(resolve(&path("")).unwrap(), Path::new(&path("")));
        assert!(matches!(resolve(&path("config.json")), Err(PullError::NotGguf(_))));
        assert!(matches!(
            resolve(&path("config.json/x.gguf")),
            Err(PullError::NotFound(_))
        ));
        assert!(matches!(resolve(&path("a.gguf")), Err(PullError::NotFound(_))));
        std::fs::write(path("a.gguf"), "").unwrap();
        assert_eq!(resolve(&path("a.gguf")).unwrap(), Path::new(&path("a.gguf")));
    }

    #[test]
    fn a_missing_path_is_not_taken_for_a_hub_id() {
        for missing in [
            "./org/name",
            "models/x.gguf",
            "/nowhere/model",
            "nowhere",
            "a/b/c",
            "~/model",
        ] {
            let error = resolve(missing).unwrap_err();
            assert!(matches!(error, PullError::NotFound(_)), "{missing}: {error}");
            assert_eq!(error.to_string().lines().count(), 1);
        }
    }
}
