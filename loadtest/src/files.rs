//! How many files this process may have open; each connection is one.

/// Raises the limit as far as it may be without asking anybody: a load test has as many connections as requests run. Where
/// the system does not let it, requests beyond the limit fail and are counted so.
pub fn raise_limit() {
    #[cfg(unix)]
    {
        use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
        let limit = getrlimit(Resource::Nofile);
        let _ = setrlimit(
            Resource::Nofile,
            Rlimit {
                current: limit.maximum,
                ..limit
            },
        );
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

    use super::*;

    #[test]
    fn the_soft_limit_becomes_the_hard_one() {
        let limit = getrlimit(Resource::Nofile);
        // Lower, but not so low that another test would miss it.
        let current = limit.maximum.map_or(Some(1 << 20), |most| Some(most - 1));
        setrlimit(Resource::Nofile, Rlimit { current, ..limit }).unwrap();
        raise_limit();
        assert_eq!(getrlimit(Resource::Nofile).current, limit.maximum);
    }
}
