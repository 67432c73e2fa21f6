//! Who may find whose cached blocks.

use std::sync::Arc;

use clap::ValueEnum;

/// A part of the prefix cache. Blocks kept in one are found from there alone; those in [`Namespace::Shared`] from
/// everywhere. Compared by the strings themselves.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Namespace {
    /// For what was declared to be everyone's: that it is cached may be seen by anyone.
    Shared,
    /// For the requests of one tenant that carry one salt.
    Private {
        /// `None` where the tenants share their cache.
        tenant: Option<Arc<str>>,
        salt: Option<Arc<str>>,
    },
}

/// Whose requests find each other's prefixes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum CacheScope {
    /// Those of one API key
    Tenant,
    /// Everyone's: that a prompt is cached, which shows in the time to its first token, tells that somebody sent it
    Shared,
}

impl CacheScope {
    /// Where the blocks of a tenant's requests with this salt lie.
    pub fn namespace(self, tenant: &str, salt: Option<&str>) -> Namespace {
        Namespace::Private {
            tenant: (self == Self::Tenant).then(|| tenant.into()),
            salt: salt.map(Arc::from),
        }
    }
}

impl Namespace {
    /// Whether a tenant may be told what lies here.
    pub fn is_open_to(&self, reader: &str) -> bool {
        match self {
            Self::Shared | Self::Private { tenant: None, .. } => true,
            Self::Private {
                tenant: Some(tenant), ..
            } => **tenant == *reader,
        }
    }
}
