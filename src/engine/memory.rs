//! Main memory, as far as the machine tells of it, and how much of it the KV cache takes where nobody says.

use serde::Serialize;

/// The KV cache's size on a machine with memory to spare: a hundred chats of the default model, within the memory of a
/// small machine.
const COMFORTABLE: u64 = 640 << 20;

/// Main memory, in bytes. A fact that cannot be read is left out rather than guessed.
#[derive(Debug, Default, Clone, PartialEq, Serialize)]
pub struct Memory {
    pub total: Option<u64>,
    /// What programs may still take without swapping.
    pub available: Option<u64>,
    /// What the control group (a container, a service) allows its processes.
    pub limit: Option<u64>,
    /// What they have of it.
    pub used: Option<u64>,
}

impl Memory {
    /// Looks around.
    pub fn look() -> Self {
        // Version 2 of Linux's control groups, as a container sees its own.
        let group = |file: &str| {
            let text = std::fs::read_to_string(format!("/sys/fs/cgroup/{file}")).ok()?;
            text.trim().parse().ok()
        };
        Self {
            limit: group("memory.max"),
            used: group("memory.current"),
            ..Self::of(&std::fs::read_to_string("/proc/meminfo").unwrap_or_default())
        }
    }

    /// What the kernel's table says.
    fn of(meminfo: &str) -> Self {
        let bytes = |name: &str| {
            let mut pairs = meminfo.lines().filter_map(|line| line.split_once(':'));
            let value = pairs.find(|(found, _)| *found == name)?.1;
            Some(value.trim().strip_suffix(" kB")?.parse::<u64>().ok()? * 1024)
        };
        Self {
            total: bytes("MemTotal"),
            available: bytes("MemAvailable"),
            ..Self::default()
        }
    }

    /// What this process may still take, if anything tells.
    fn free(&self) -> Option<u64> {
        let allowed = self.limit.map(|limit| limit.saturating_sub(self.used.unwrap_or(0)));
        self.available.into_iter().chain(allowed).min()
    }

    /// The KV cache's size where none is asked for: half of what is free, at most 640 MiB, and at least the `needed`
    /// bytes without which no sequence of the length that was asked for fits.
    pub fn for_kv_cache(&self, needed: u64) -> u64 {
        let share = self.free().map_or(COMFORTABLE, |free| free / 2);
        share.min(COMFORTABLE).max(needed)
    }
}

/// Bytes, for people.
pub fn readable(bytes: u64) -> String {
    if bytes < 1 << 30 {
        return format!("{:.1} MiB", bytes as f64 / (1u64 << 20) as f64);
    }
    format!("{:.1} GiB", bytes as f64 / (1u64 << 30) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_written_for_people() {
        assert_eq!(readable(98_362_432), "93.8 MiB");
        assert_eq!(readable(3 << 30), "3.0 GiB");
    }

    #[test]
    fn reads_the_kernels_table() {
        let meminfo = "MemTotal:       24689764 kB\nMemFree:  1 kB\nMemAvailable:   10 kB\n";
        let expected = Memory {
            total: Some(24_689_764 * 1024),
            available: Some(10_240),
            ..Memory::default()
        };
        assert_eq!(Memory::of(meminfo), expected);
        assert_eq!(Memory::of("nothing"), Memory::default());
    }

    #[test]
    fn the_kv_cache_takes_a_bounded_share() {
        const GIB: u64 = 1 << 30;
        let share = |available, limit, used| {
            let memory = Memory {
                available,
                limit,
                used,
                total: None,
            };
            memory.for_kv_cache(1 << 20)
        };
        assert_eq!(share(Some(16 * GIB), None, None), COMFORTABLE);
        assert_eq!(share(None, None, None), COMFORTABLE);
        assert_eq!(share(Some(GIB), None, None), GIB / 2);
        assert_eq!(share(Some(16 * GIB), Some(GIB), Some(GIB / 2)), GIB / 4, "a container");
        assert_eq!(share(Some(0), None, None), 1 << 20);
        assert_eq!(
            Memory::default().for_kv_cache(2 * GIB),
            2 * GIB,
            "a long context was asked for"
        );
    }
}
