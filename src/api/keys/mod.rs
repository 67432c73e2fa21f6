//! API keys: who a caller is, what they may still ask this minute, and the file all this is read from.

mod file;
mod limiter;

use std::collections::HashMap;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::http::{HeaderMap, HeaderName, HeaderValue};
use tokio::sync::watch;

use super::error::ApiError;
use crate::request::Tenant;
use file::{Digest, Entry};
pub use file::{KeysError, hash};
use limiter::{Exceeded, Left, Limiter};

/// How often the file is looked at.
const POLL: Duration = Duration::from_secs(1);

/// The keys in force. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Keys {
    path: Arc<Path>,
    /// The last table that was understood: whoever reads the file replaces it, every request looks at it.
    table: Arc<watch::Sender<Arc<Table>>>,
}

#[derive(Debug)]
struct Table {
    text: String,
    /// By hash. A lookup's time depends on the hash of what was sent, which nobody can steer, so it tells nothing.
    keys: HashMap<Digest, Arc<Key>>,
}

/// One caller: the name and weight that scheduling knows them by, and their limits.
#[derive(Debug)]
pub(super) struct Key {
    entry: Entry,
    pub tenant: Arc<Tenant>,
    requests: Option<Arc<Limiter>>,
    tokens: Option<Arc<Limiter>>,
    /// How many requests run, whether or not that is limited: a limit may come.
    in_flight: Arc<AtomicUsize>,
}

/// One of a key's requests, from its admission to the end of its answer.
#[derive(Debug)]
pub(super) struct InFlight(Arc<AtomicUsize>);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Whether lines for a file of keys are right.
pub fn check(lines: &str) -> Result<(), KeysError> {
    file::parse(Path::new("new lines"), lines).map(drop)
}

impl Keys {
    /// Reads the file at `path`.
    pub fn open(path: PathBuf) -> Result<Self, KeysError> {
        let table = Table::read(&path, None)?;
        Ok(Self {
            path: path.into(),
            table: Arc::new(watch::Sender::new(Arc::new(table))),
        })
    }

    /// How many keys are in force.
    pub fn count(&self) -> usize {
        self.table.borrow().keys.len()
    }

    /// Reads the file again. Keys that stay keep what they have spent; an error leaves all as they were.
    pub fn reload(&self) -> Result<(), KeysError> {
        let before = self.table.borrow().clone();
        let table = Table::read(&self.path, Some(&before))?;
        if table.text != before.text {
            tracing::info!(path = %self.path.display(), keys = table.keys.len(), "API keys read again");
            self.table.send_replace(Arc::new(table));
        }
        Ok(())
    }

    /// Keeps the keys as the file has them, for as long as this runs. The text is compared and not the file's time,
    /// which two quick changes can share.
    pub async fn follow_file(self) {
        let mut said = None;
        loop {
            tokio::time::sleep(POLL).await;
            let keys = self.clone();
            let read = tokio::task::spawn_blocking(move || keys.reload()).await;
            let problem = read.ok().and_then(Result::err).map(|error| error.to_string());
            if let Some(problem) = problem.as_ref().filter(|_| problem != said) {
                tracing::warn!("{problem}; the keys read before stay in force");
            }
            said = problem;
        }
    }

    /// Whose key this is.
    pub(super) fn find(&self, secret: &str) -> Option<Arc<Key>> {
        self.table.borrow().keys.get(&hash(secret)).cloned()
    }
}

impl Table {
    fn read(path: &Path, before: Option<&Table>) -> Result<Self, KeysError> {
        let text = std::fs::read_to_string(path).map_err(|source| KeysError::Read {
            path: path.into(),
            source,
        })?;
        let old = |entry: &Entry| before.and_then(|table| table.keys.values().find(|key| key.entry.name == entry.name));
        let keys = file::parse(path, &text)?.into_iter();
        let keys = keys.map(|entry| (entry.digest, Arc::new(Key::new(old(&entry).map(Arc::as_ref), entry))));
        Ok(Self {
            keys: keys.collect(),
            text,
        })
    }
}

impl Key {
    /// `old` is the key of the same name before: a quota that stays keeps its count, also when the secret changes, and
    /// what runs is counted whatever changes.
    fn new(old: Option<&Key>, entry: Entry) -> Self {
        let limiter = |limit: Option<NonZeroU32>, old: Option<&Arc<Limiter>>| {
            limit.map(|limit| match old.filter(|old| old.limit() == limit) {
                Some(old) => old.clone(),
                None => Arc::new(Limiter::a_minute(limit)),
            })
        };
        Self {
            tenant: Arc::new(Tenant {
                name: entry.name.clone(),
                weight: entry.weight,
            }),
            requests: limiter(entry.requests_per_minute, old.and_then(|old| old.requests.as_ref())),
            tokens: limiter(entry.tokens_per_minute, old.and_then(|old| old.tokens.as_ref())),
            in_flight: old.map(|old| old.in_flight.clone()).unwrap_or_default(),
            entry,
        }
    }

    pub fn disabled(&self) -> bool {
        self.entry.disabled
    }

    pub fn admin(&self) -> bool {
        self.entry.admin
    }

    /// Counts one request, which takes one of the key's places until what this gives is dropped.
    pub fn admit(&self) -> Result<InFlight, ApiError> {
        let most = self.entry.max_in_flight.map_or(u32::MAX, NonZeroU32::get);
        let one_more = |running: usize| (running < most as usize).then_some(running + 1);
        self.in_flight
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more)
            .map_err(|_| {
                let message = format!("This key's {most} requests at a time are all running.");
                ApiError::quota("in_flight", message, Some(1))
            })?;
        let place = InFlight(self.in_flight.clone());
        if let Some(limiter) = &self.requests {
            limiter
                .charge(NonZeroU32::MIN)
                .map_err(|exceeded| refuse("requests", limiter, 1, exceeded))?;
        }
        Ok(place)
    }

    /// Takes what a request may use out of the minute's tokens: `prompt` tokens for sure and up to `answer` more. Where
    /// that is more than a minute gives, it needs the whole minute; what it then used is settled when it has ended.
    pub fn reserve(self: &Arc<Self>, prompt: usize, answer: usize) -> Result<Option<Reservation>, ApiError> {
        let Some(limiter) = &self.tokens else {
            return Ok(None);
        };
        let cells = |count: usize| NonZeroU32::new(u32::try_from(count).unwrap_or(u32::MAX)).unwrap_or(NonZeroU32::MIN);
        let wanted = cells(prompt.saturating_add(answer))
            .min(limiter.limit())
            .max(cells(prompt));
        limiter
            .charge(wanted)
            .map_err(|exceeded| refuse("tokens", limiter, wanted.get(), exceeded))?;
        Ok(Some(Reservation {
            limiter: limiter.clone(),
            charged: wanted.get().into(),
            used: 0,
        }))
    }

    /// Tells what is left, in OpenAI's headers.
    pub fn show(&self, headers: &mut HeaderMap) {
        for (what, limiter) in [("requests", &self.requests), ("tokens", &self.tokens)] {
            let Some(Left {
                limit,
                remaining,
                reset,
            }) = limiter.as_ref().map(|limiter| limiter.left())
            else {
                continue;
            };
            let values = [
                ("limit", limit.to_string()),
                ("remaining", remaining.to_string()),
                ("reset", written(reset)),
            ];
            for (part, value) in values {
                let name = HeaderName::try_from(format!("x-ratelimit-{part}-{what}"));
                if let (Ok(name), Ok(value)) = (name, HeaderValue::try_from(value)) {
                    headers.insert(name, value);
                }
            }
        }
    }
}

/// Tokens taken out of a key's minute. When it is dropped, the difference to what was used is settled.
#[derive(Debug)]
pub(super) struct Reservation {
    limiter: Arc<Limiter>,
    charged: u64,
    used: u64,
}

impl Reservation {
    /// How many tokens the request has used, if it ends now. None, until told otherwise.
    pub fn used(&mut self, tokens: usize) {
        self.used = tokens as u64;
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.limiter.settle(self.charged, self.used);
    }
}

fn refuse(what: &'static str, limiter: &Limiter, wanted: u32, exceeded: Exceeded) -> ApiError {
    let limit = limiter.limit();
    match exceeded {
        Exceeded::Until(wait) => {
            let seconds = wait.as_secs_f64().ceil().clamp(1.0, f64::from(u16::MAX));
            let message = format!(
                "This key may use {limit} {what} a minute, and {} of them are left; this request needs {wanted}. Try again \
                 in {seconds} s.",
                limiter.left().remaining
            );
            ApiError::quota(what, message, Some(seconds as u16))
        }
        Exceeded::Never => {
            let message = format!(
                "This key may use {limit} {what} a minute, and this request's prompt alone has {wanted}. Shorten it."
            );
            ApiError::quota(what, message, None)
        }
    }
}

/// A duration as OpenAI writes it: `6m0s`, `1.5s`, `20ms`.
fn written(duration: Duration) -> String {
    match duration {
        short if short < Duration::from_secs(1) => format!("{}ms", short.as_millis()),
        medium if medium < Duration::from_secs(60) => {
            let text = format!("{:.3}", medium.as_secs_f64());
            format!("{}s", text.trim_end_matches('0').trim_end_matches('.'))
        }
        long => format!("{}m{}s", long.as_secs() / 60, long.as_secs() % 60),
    }
}

#[cfg(test)]
mod tests;
