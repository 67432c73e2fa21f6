//! The queue: whose request goes next.
//!
//! Tenants share by the virtual token counter (Sheng et al. 2024, Fairness in Serving Large Language Models, algorithm
//! 2, weighted): each tenant's counter grows by the tokens it was served over its weight, whoever has the smallest goes
//! next, and a tenant that comes back starts no lower than those that waited meanwhile, so that idling saves up no
//! claim. Within a tenant a smaller priority goes first, then the older request. A claim to priority is the tenant's
//! own, so it moves nobody else's requests.

use std::{
    collections::{BTreeMap, BTreeSet},
    iter::Peekable,
    sync::Arc,
    time::{Duration, Instant},
};

use super::SequenceId;
use crate::request::Tenant;

/// For so long may requests of a smaller priority that came later go before one of the same tenant. Then it goes before
/// all of them.
pub const AGING: Duration = Duration::from_secs(10);
/// What an output token counts beside an input token, as in the paper's measure of service.
pub const OUTPUT_COST: f64 = 2.0;

/// A request that waits.
#[derive(Debug)]
pub struct Entry<T> {
    pub tenant: Arc<Tenant>,
    /// Smaller goes first.
    pub priority: i32,
    pub arrival: Instant,
    pub item: T,
}

/// What one tenant has waiting, and what it has been served.
#[derive(Debug)]
struct Line {
    weight: f64,
    /// The virtual counter: tokens served over the weight.
    served: f64,
    /// In order of arrival.
    ids: BTreeSet<SequenceId>,
    ranks: BTreeSet<(i32, SequenceId)>,
}

/// Requests that wait, in fair order. Not bounded by itself.
#[derive(Debug)]
pub struct FairQueue<T> {
    entries: BTreeMap<SequenceId, Entry<T>>,
    /// By the tenant's name; a line stays when it is empty, for its counter. There are no more of them than keys.
    lines: BTreeMap<String, Line>,
    /// The counter of the line that was served last.
    last_served: f64,
}

impl<T> Default for FairQueue<T> {
    fn default() -> Self {
        Self {
            entries: BTreeMap::new(),
            lines: BTreeMap::new(),
            last_served: 0.0,
        }
    }
}

impl<T> FairQueue<T> {
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// In order of arrival.
    pub fn iter(&self) -> impl Iterator<Item = (SequenceId, &Entry<T>)> {
        self.entries.iter().map(|(&id, entry)| (id, entry))
    }

    pub fn oldest_arrival(&self) -> Option<Instant> {
        self.entries.first_key_value().map(|(_, entry)| entry.arrival)
    }

    /// Ids grow from one to the next.
    pub fn push(&mut self, id: SequenceId, mut entry: Entry<T>) {
        // Arrivals grow with the ids too, so that age and order agree.
        if let Some((_, last)) = self.entries.last_key_value() {
            entry.arrival = entry.arrival.max(last.arrival);
        }
        let waiting = self.lines.values().filter(|line| !line.ids.is_empty());
        let floor = waiting
            .map(|line| line.served)
            .reduce(f64::min)
            .unwrap_or(self.last_served);
        let line = self.line(&entry.tenant);
        if line.ids.is_empty() {
            line.served = line.served.max(floor);
        }
        self.insert(id, entry);
    }

    /// Puts a request back that was removed just now.
    pub fn insert(&mut self, id: SequenceId, entry: Entry<T>) {
        let line = self.line(&entry.tenant);
        line.ids.insert(id);
        line.ranks.insert((entry.priority, id));
        self.entries.insert(id, entry);
    }

    pub fn remove(&mut self, id: SequenceId) -> Option<Entry<T>> {
        let entry = self.entries.remove(&id)?;
        let line = self.line(&entry.tenant);
        line.ids.remove(&id);
        line.ranks.remove(&(entry.priority, id));
        Some(entry)
    }

    /// A tenant has been served so many tokens' worth.
    pub fn charge(&mut self, tenant: &Tenant, cost: f64) {
        let line = self.line(tenant);
        line.served += cost / line.weight;
        self.last_served = line.served;
    }

    fn line(&mut self, tenant: &Tenant) -> &mut Line {
        // Looked up twice so that a name is copied once and not at every call.
        if !self.lines.contains_key(&tenant.name) {
            let line = Line {
                weight: 1.0,
                served: 0.0,
                ids: BTreeSet::new(),
                ranks: BTreeSet::new(),
            };
            self.lines.insert(tenant.name.clone(), line);
        }
        // Cannot fail: it is there from before or from above.
        let line = self.lines.get_mut(&tenant.name).expect("a line");
        line.weight = f64::from(tenant.weight.max(1));
        line
    }

    /// Who goes next, and so on, each at the cost that `cost` gives.
    pub fn order<'a>(
        &'a self,
        now: Instant,
        cost: impl Fn(&T) -> f64 + Copy + 'a,
    ) -> impl Iterator<Item = (SequenceId, &'a Entry<T>)> {
        let turns = self
            .lines
            .values()
            .filter(|line| !line.ids.is_empty())
            .map(move |line| {
                let upcoming = self
                    .within(line, now)
                    .map(move |(id, entry)| (cost(&entry.item), (id, entry)));
                Turns {
                    served: line.served,
                    weight: line.weight,
                    upcoming: upcoming.peekable(),
                }
            });
        fair_order(turns.collect())
    }

    /// Each tenant with what it was served and its own requests in its own order.
    pub fn tenants(&self, now: Instant) -> impl Iterator<Item = (f64, Vec<(SequenceId, &Entry<T>)>)> {
        let lines = self.lines.values().filter(|line| !line.ids.is_empty());
        lines.map(move |line| (line.served, self.within(line, now).collect()))
    }

    /// A line's own order: the aged by arrival, then the others by priority and arrival.
    fn within<'a>(&'a self, line: &'a Line, now: Instant) -> impl Iterator<Item = (SequenceId, &'a Entry<T>)> {
        let aged = move |id: &SequenceId| now.saturating_duration_since(self.entries[id].arrival) >= AGING;
        let first = line.ids.iter().copied().take_while(aged);
        let others = line.ranks.iter().map(|&(_, id)| id).filter(move |id| !aged(id));
        first.chain(others).map(|id| (id, &self.entries[&id]))
    }
}

/// One tenant's requests with their costs, in its own order.
pub struct Turns<I: Iterator> {
    /// The tenant's virtual counter.
    pub served: f64,
    pub weight: f64,
    pub upcoming: Peekable<I>,
}

/// Merges the tenants' requests: the next is always of the tenant with the smallest counter, which then pays for it.
pub fn fair_order<T, I: Iterator<Item = (f64, T)>>(mut tenants: Vec<Turns<I>>) -> impl Iterator<Item = T> {
    std::iter::from_fn(move || {
        tenants.retain_mut(|turns| turns.upcoming.peek().is_some());
        let next = tenants.iter_mut().min_by(|a, b| a.served.total_cmp(&b.served))?;
        let (cost, item) = next.upcoming.next()?;
        next.served += cost / next.weight;
        Some(item)
    })
}

#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;
