//! The server's process where it runs on this machine, found by the port it listens on (Linux's `/proc`).

use std::{collections::HashMap, fs, path::Path};

/// Processor time is counted in these parts of a second on every Linux that Rust runs on.
const TICKS_A_SECOND: f64 = 100.0;

/// A local server's process; its children count with it.
#[derive(Debug, Clone)]
pub struct Process {
    id: u32,
}

impl Process {
    /// The process that listens where this URL points; `None` for another machine's, or another user's.
    pub fn of(url: &str) -> Option<Self> {
        let url = reqwest::Url::parse(url).ok()?;
        let local = match url.host_str()? {
            "localhost" | "[::1]" => true,
            host => host
                .parse()
                .is_ok_and(|address: std::net::IpAddr| address.is_loopback()),
        };
        let port = url.port_or_known_default()?;
        if local { Self::listening_on(port) } else { None }
    }

    fn listening_on(port: u16) -> Option<Self> {
        let inodes: Vec<String> = ["/proc/net/tcp", "/proc/net/tcp6"]
            .iter()
            .filter_map(|path| fs::read_to_string(path).ok())
            .flat_map(|table| listeners(&table, port))
            .collect();
        let sockets: Vec<String> = inodes.iter().map(|inode| format!("socket:[{inode}]")).collect();
        let id = processes().find(|id| {
            let files = fs::read_dir(format!("/proc/{id}/fd")).into_iter().flatten().flatten();
            files
                .filter_map(|file| fs::read_link(file.path()).ok())
                .any(|link| sockets.iter().any(|socket| link == Path::new(socket)))
        })?;
        Some(Self { id })
    }

    /// Processor seconds used so far, in user and kernel mode.
    pub fn cpu_seconds(&self) -> Option<f64> {
        let ticks = self.family().into_iter().filter_map(|id| {
            let stat = fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
            // The second field may hold anything, in brackets; utime and stime are the 12th and 13th after it.
            let fields: Vec<&str> = stat[stat.rfind(')')? + 1..].split_whitespace().collect();
            Some(fields.get(11)?.parse::<f64>().ok()? + fields.get(12)?.parse::<f64>().ok()?)
        });
        ticks.reduce(|a, b| a + b).map(|ticks| ticks / TICKS_A_SECOND)
    }

    /// Resident bytes.
    pub fn memory(&self) -> Option<u64> {
        let resident = self.family().into_iter().filter_map(|id| {
            let status = fs::read_to_string(format!("/proc/{id}/status")).ok()?;
            let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
            Some(line.split_whitespace().next()?.parse::<u64>().ok()? * 1024)
        });
        resident.reduce(|a, b| a + b)
    }

    /// The process and its descendants.
    fn family(&self) -> Vec<u32> {
        let mut children: HashMap<u32, Vec<u32>> = HashMap::new();
        for id in processes() {
            if let Some(parent) = parent(id) {
                children.entry(parent).or_default().push(id);
            }
        }
        let mut family = vec![self.id];
        let mut next = 0;
        while let Some(id) = family.get(next).copied() {
            family.extend(children.remove(&id).unwrap_or_default());
            next += 1;
        }
        family
    }
}

fn processes() -> impl Iterator<Item = u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

fn parent(id: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
    stat[stat.rfind(')')? + 1..].split_whitespace().nth(1)?.parse().ok()
}

/// The inodes of sockets that listen on a port, from the kernel's table of TCP sockets.
fn listeners(table: &str, port: u16) -> Vec<String> {
    let port = format!(":{port:04X}");
    let rows = table
        .lines()
        .skip(1)
        .map(|row| row.split_whitespace().collect::<Vec<_>>());
    // Fields: number, local address, remote address, state (0A: listening), ..., inode the tenth.
    rows.filter(|row| row.len() > 9 && row[1].ends_with(&port) && row[3] == "0A")
        .map(|row| row[9].to_owned())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_itself_by_its_port() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let process = Process::of(&format!("http://127.0.0.1:{port}/")).unwrap();
        assert_eq!(process.id, std::process::id());
        assert!(process.memory().unwrap() > 100_000);
        assert!(process.cpu_seconds().is_some());
        assert!(Process::of(&format!("http://192.0.2.1:{port}")).is_none());
    }
}
