//! A file that takes another's place when it is whole: written beside it, on disk before it is moved.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

/// The new contents of a file. Dropped before [`Self::commit`], it leaves the old file and nothing else.
pub struct Replacement {
    path: PathBuf,
    part: PathBuf,
    /// `None` once it was moved to its place.
    file: Option<File>,
    /// One process at a time writes the part; whoever waits for it begins when it is done. Never removed, so that all
    /// lock the same file.
    _lock: File,
}

impl Replacement {
    /// Begins with nothing in it. What a killed process left is overwritten.
    pub fn create(path: &Path) -> io::Result<Self> {
        let lock = private().append(true).open(beside(path, ".lock"))?;
        lock.lock()?;
        let part = beside(path, ".part");
        let file = private().write(true).truncate(true).open(&part)?;
        Ok(Self {
            path: path.into(),
            part,
            file: Some(file),
            _lock: lock,
        })
    }

    /// Puts the new file into the old one's place; it lasts from then on.
    pub fn commit(mut self) -> io::Result<()> {
        if let Some(file) = &self.file {
            file.sync_all()?;
        }
        fs::rename(&self.part, &self.path)?;
        self.file = None;
        // The rename itself lasts only once the folder is on disk.
        File::open(folder(&self.path)).and_then(|folder| folder.sync_all())
    }
}

impl io::Write for Replacement {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut self.file {
            Some(file) => file.write(bytes),
            None => Ok(0),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Replacement {
    fn drop(&mut self) {
        if self.file.is_some()
            && let Err(error) = fs::remove_file(&self.part)
        {
            tracing::warn!("cannot remove {}: {error}", self.part.display());
        }
    }
}

/// The folder that a file lies in.
pub fn folder(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(ending);
    name.into()
}

/// Made for the server's own user: what it holds are prompts.
fn private() -> fs::OpenOptions {
    let mut options = File::options();
    options.create(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options
}
