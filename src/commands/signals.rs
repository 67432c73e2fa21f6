//! How a user ends a measurement: once for a report of what was measured, twice at once.

use std::{fs, io};

use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{mpsc, oneshot, watch},
};

/// What a second signal exits with, as a shell says of a program ended by Ctrl-C.
pub const SIGNALLED_TWICE: i32 = 130;

/// Catches signals from this call on: the first turns the one receiver true, the second completes the other.
///
/// # Errors
/// Where the system does not let them be caught.
pub fn stop_at(kinds: &[SignalKind]) -> io::Result<(watch::Receiver<bool>, oneshot::Receiver<()>)> {
    let (came, mut signals) = mpsc::unbounded_channel();
    for &kind in kinds {
        let (mut signal, came) = (signal(kind)?, came.clone());
        tokio::spawn(async move { while signal.recv().await.is_some() && came.send(()).is_ok() {} });
    }
    let (stop, stopped) = watch::channel(false);
    let (end, ended) = oneshot::channel();
    tokio::spawn(async move {
        signals.recv().await;
        stop.send_replace(true);
        signals.recv().await;
        // Nobody waits for it where the measurement has ended.
        let _ = end.send(());
    });
    Ok((stopped, ended))
}

/// Those that would end this process and leave behind what it started: Ctrl-C, a service manager's, and a closed
/// terminal's, unless that is ignored, as `nohup` has it.
pub fn all_that_end() -> Vec<SignalKind> {
    let mut kinds = vec![SignalKind::interrupt(), SignalKind::terminate()];
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    if !ignores_hangup(&status) {
        kinds.push(SignalKind::hangup());
    }
    kinds
}

/// Whether a process of this state, as Linux writes it, ignores SIGHUP, which is the first of the signals.
fn ignores_hangup(status: &str) -> bool {
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = ignored.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    ignored.is_some_and(|mask| mask & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hangup_that_is_ignored_stays_ignored() {
        let status =
            |mask: &str| format!("Name:\tx\nSigBlk:\t0000000000000001\nSigIgn:\t{mask}\nSigCgt:\t0000000000000001\n");
        assert!(ignores_hangup(&status("0000000000001001")));
        assert!(!ignores_hangup(&status("0000000000001000")));
        assert!(!ignores_hangup(""));
    }
}
