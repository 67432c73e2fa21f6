//! The gate: who may wait. It refuses at once whom the server could not answer in time, and whoever would make those
//! late that were accepted before.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{Estimates, Limits, Line, Outlook, SequenceId, TooLarge, Work};
use crate::request::Tenant;

/// For so long after a refusal a tenant counts as wanting more: those that hold more than it yield meanwhile.
const WANTING: Duration = Duration::from_secs(2);
/// For so long after its last request a tenant that holds less than others finds room for one more kept free.
const ACTIVE: Duration = Duration::from_secs(60);
/// What a prediction leaves for the way between the engine and the client's socket.
const ON_THE_WAY: f64 = 0.02;
/// Steps that may be held up before anybody who was let in is late for it.
const SPARE_STEPS: f64 = 3.0;
/// Requests that the scheduler has not seen yet are numbered from here.
const UNSEEN: SequenceId = 1 << 63;

/// A request at the gate.
#[derive(Debug, Clone)]
pub struct Ask {
    pub tenant: Arc<Tenant>,
    pub priority: i32,
    /// Prompt tokens.
    pub prompt: usize,
    pub max_tokens: usize,
    pub deadline: Option<Instant>,
}

/// Why nobody was let in.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Cause {
    #[error("the queue is full ({limit} requests wait)")]
    Requests { limit: usize },
    #[error("the queue is full ({limit} prompt tokens wait)")]
    Tokens { limit: usize },
    #[error("the server is full ({limit} requests are in flight)")]
    InFlight { limit: usize },
    #[error("this API key has its share of the server, and others wait")]
    Share,
    #[error("the server is too busy to finish the request, and those it accepted before, by their deadlines")]
    Deadline,
}

impl Cause {
    /// All of them as labels.
    pub const LABELS: [&'static str; 5] = ["queue_full", "queue_tokens", "in_flight", "key_share", "deadline"];

    /// Its name in metrics and in errors.
    pub fn label(&self) -> &'static str {
        let index = match self {
            Cause::Requests { .. } => 0,
            Cause::Tokens { .. } => 1,
            Cause::InFlight { .. } => 2,
            Cause::Share => 3,
            Cause::Deadline => 4,
        };
        Self::LABELS[index]
    }
}

/// A refusal, and when the same request is expected to fit.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{cause}; try again in {} s", .retry_after.as_secs())]
pub struct Refusal {
    pub cause: Cause,
    /// Whole seconds, at least one.
    pub retry_after: Duration,
}

impl Refusal {
    fn new(cause: Cause, seconds: f64) -> Self {
        let retry_after = Duration::from_secs(seconds.clamp(1.0, 3600.0).ceil() as u64);
        Self { cause, retry_after }
    }
}

/// Requests that were let in.
#[derive(Debug, Clone, PartialEq)]
pub struct Accepted {
    /// What [`Gate::seen`] is told once the scheduler has them.
    pub ids: Vec<SequenceId>,
    /// How long they are expected to take; `None` before anything was measured.
    pub predicted: Option<Duration>,
}

/// What a tenant holds.
#[derive(Debug, Clone, Copy, Default)]
struct Held {
    waiting: usize,
    waiting_tokens: usize,
    in_flight: usize,
    /// Tokens still to compute.
    work: usize,
}

/// A tenant that asked lately.
#[derive(Debug)]
struct Recent {
    tenant: Arc<Tenant>,
    asked: Instant,
    /// When it was refused, if it has got nothing since.
    refused: Option<Instant>,
}

/// Knows what the scheduler last had before it and what was let in since.
#[derive(Debug)]
pub struct Gate {
    limits: Limits,
    estimates: Estimates,
    /// The scheduler's outlook with `unseen` put in.
    outlook: Outlook,
    unseen: BTreeMap<SequenceId, (Ask, Work)>,
    next: SequenceId,
    /// By the tenant's name.
    recent: BTreeMap<String, Recent>,
}

impl Gate {
    /// A gate before a scheduler that has nothing to do yet.
    pub fn new(limits: Limits, outlook: Outlook) -> Self {
        Self {
            limits,
            estimates: Estimates::default(),
            outlook,
            unseen: BTreeMap::new(),
            next: UNSEEN,
            recent: BTreeMap::new(),
        }
    }

    /// The scheduler's present outlook. What it has not seen yet still counts.
    pub fn update(&mut self, outlook: Outlook, estimates: &Estimates) {
        self.outlook = outlook;
        self.estimates.clone_from(estimates);
        for (ask, work) in self.unseen.values() {
            queue(&mut self.outlook, ask, *work);
        }
    }

    /// The scheduler has this one, or it is gone; the next outlook says which.
    pub fn seen(&mut self, id: SequenceId) {
        self.unseen.remove(&id);
    }

    /// This one of the scheduler's has ended; whoever hears of it and asks again need not wait for the next outlook.
    pub fn ended(&mut self, id: SequenceId) {
        self.outlook.running.retain(|(_, work)| work.id != id);
        forget(&mut self.outlook, id);
    }

    /// Whether `asks` may be let in at any time; only then [`Self::ask`] whether they may be now.
    ///
    /// # Errors
    /// [`TooLarge`]
    pub fn check(&self, asks: &[Ask]) -> Result<(), TooLarge> {
        self.limits.check(asks)
    }

    /// Lets all of `asks` in (the choices and prompts of one client request), or none of them. Refuses nobody for a
    /// deadline before enough was measured, and nobody when the server is idle: there is no one to harm, and what it
    /// then takes corrects the estimates, should they be wrong.
    ///
    /// # Errors
    /// [`Refusal`]
    pub fn ask(&mut self, asks: &[Ask], now: Instant) -> Result<Accepted, Refusal> {
        self.recent
            .retain(|_, recent| now.saturating_duration_since(recent.asked) < ACTIVE);
        let decided = self.within_limits(asks, now).and_then(|()| self.in_time(asks, now));
        let Some(tenant) = asks.first().map(|ask| ask.tenant.clone()) else {
            return decided;
        };
        // Nobody need yield to one whom an idle server could not serve in time either.
        let wants = matches!(&decided, Err(refusal) if refusal.cause != Cause::Share) && self.fits_alone(asks, now);
        let recent = Recent {
            tenant,
            asked: now,
            refused: wants.then_some(now),
        };
        self.recent.insert(recent.tenant.name.clone(), recent);
        decided
    }

    fn within_limits(&self, asks: &[Ask], now: Instant) -> Result<(), Refusal> {
        let Some(tenant) = asks.first().map(|ask| &ask.tenant) else {
            return Ok(());
        };
        let refuse = |cause| Err(Refusal::new(cause, self.first_end()));
        let (all, own) = (self.held(|_| true), self.held(|other| other.name == tenant.name));
        let tokens: usize = asks.iter().map(|ask| ask.prompt).sum();
        let wanted = [
            (Some(self.limits.requests), all.waiting, own.waiting, asks.len()),
            (self.limits.tokens, all.waiting_tokens, own.waiting_tokens, tokens),
            (self.limits.in_flight, all.in_flight, own.in_flight, asks.len()),
        ];
        let causes = [
            |limit| Cause::Requests { limit },
            |limit| Cause::Tokens { limit },
            |limit| Cause::InFlight { limit },
        ];
        for ((limit, all, own, more), cause) in wanted.into_iter().zip(causes) {
            let Some(limit) = limit else { continue };
            if all + more > limit {
                return refuse(cause(limit));
            }
            let share = ((limit as f64 * self.limits.key_share) as usize).max(1);
            // The first goes in whatever its size: a share is about the others' room.
            if **tenant != Tenant::anyone() && own > 0 && own + more > share {
                return refuse(Cause::Share);
            }
        }
        let wants = |recent: &Recent| {
            let refused = recent.refused.map(|refused| now.saturating_duration_since(refused));
            refused.is_some_and(|ago| ago < WANTING)
        };
        match self.poorer(tenant).any(wants) {
            true => refuse(Cause::Share),
            false => Ok(()),
        }
    }

    /// The tenants that asked lately and hold less over their weight than this one.
    fn poorer(&self, tenant: &Tenant) -> impl Iterator<Item = &Recent> {
        let own = self.holds(tenant);
        self.others(tenant)
            .filter(move |recent| self.holds(&recent.tenant) < own)
    }

    /// Whether a tenant that asked lately holds more than twice as much over its weight as this one.
    fn is_poor(&self, tenant: &Tenant) -> bool {
        let own = self.holds(tenant);
        self.others(tenant).any(|recent| self.holds(&recent.tenant) > 2.0 * own)
    }

    fn others(&self, tenant: &Tenant) -> impl Iterator<Item = &Recent> {
        let name = tenant.name.clone();
        self.recent.values().filter(move |recent| recent.tenant.name != name)
    }

    /// Tokens to compute over the tenant's weight.
    fn holds(&self, tenant: &Tenant) -> f64 {
        let held = self.held(|holder| holder.name == tenant.name);
        held.work as f64 / f64::from(tenant.weight.max(1))
    }

    /// What the tenants that `of` takes hold together.
    fn held(&self, of: impl Fn(&Tenant) -> bool) -> Held {
        let mut held = Held::default();
        let lines = self.outlook.lines.iter().filter(|line| of(&line.tenant));
        for (_, work) in lines.flat_map(|line| &line.waiting) {
            held.waiting += 1;
            held.waiting_tokens += work.length;
            held.in_flight += 1;
            held.work += work.prefill + work.decode;
        }
        for (_, work) in self.outlook.running.iter().filter(|(tenant, _)| of(tenant)) {
            held.in_flight += 1;
            held.work += work.prefill + work.decode;
        }
        held
    }

    /// Puts the requests into the outlook, and takes them out again if somebody who was accepted, or they themselves,
    /// would be late.
    ///
    /// While a tenant that holds less asks too, room for one more request like these is kept for it: where everybody
    /// takes what there is at once, one who seldom asks would find nothing. One who holds far less need not leave spare
    /// steps either.
    fn in_time(&mut self, asks: &[Ask], now: Instant) -> Result<Accepted, Refusal> {
        let idle = self.outlook.is_idle();
        let poorer = asks.first().and_then(|ask| self.poorer(&ask.tenant).next());
        let is_poor = asks.first().is_some_and(|ask| self.is_poor(&ask.tenant));
        let spare = if is_poor { 0.0 } else { SPARE_STEPS };
        let kept = poorer.map(|poorer| Ask {
            tenant: poorer.tenant.clone(),
            ..asks[0].clone()
        });
        let (first, wanted) = (self.next, asks.len());
        let asks: Vec<Ask> = asks.iter().cloned().chain(kept).collect();
        let works: Vec<Work> = (first..).zip(&asks).map(|(id, ask)| self.work(id, ask)).collect();
        for (ask, work) in asks.iter().zip(&works) {
            queue(&mut self.outlook, ask, *work);
        }
        let predicted = match self.estimates.are_known() {
            true => self.predict(first, spare, now).map(Some),
            false => Ok(None),
        };
        let accepted = if idle || predicted.is_ok() { wanted } else { 0 };
        for work in &works[accepted..] {
            forget(&mut self.outlook, work.id);
        }
        let predicted = if idle {
            predicted.unwrap_or_default()
        } else {
            predicted?
        };
        self.next += wanted as SequenceId;
        for (ask, work) in asks.into_iter().zip(&works[..accepted]) {
            self.unseen.insert(work.id, (ask, *work));
        }
        Ok(Accepted {
            ids: works[..accepted].iter().map(|work| work.id).collect(),
            predicted,
        })
    }

    fn work(&self, id: SequenceId, ask: &Ask) -> Work {
        Work {
            id,
            length: ask.prompt,
            prefill: ask.prompt,
            decode: self.estimates.lengths.left(ask.max_tokens, 0),
            long: self.estimates.lengths.long_left(ask.max_tokens, 0),
            deadline: ask.deadline,
        }
    }

    /// How long the requests from `first` on, which are in the outlook, take.
    ///
    /// Late is who ends after its deadline by the prediction stretched by the margin, with a longer answer than is
    /// expected of it and so many `spare` steps, as the margin leaves hardly anything to one that is about to end. Those
    /// behind the new ones in fair order are not looked at: they give way, and hear it from [`Self::hopeless`]. Nor is one
    /// that would be late had it the device to itself: refusing others does not save it.
    fn predict(&self, first: SequenceId, spare: f64, now: Instant) -> Result<Duration, Refusal> {
        let step = &self.estimates.step;
        let order = self.outlook.fair_order();
        let ends = self.outlook.ends(step, &order);
        let running = self.outlook.running.len();
        let row = step.predict(0, (running + order.len()).min(self.outlook.max_batch));
        let late = |work: &Work, end: f64| {
            let longer = (work.long - work.decode) as f64 * row;
            self.stretched(end + longer) + spare * row - left(work, now)
        };
        let (mut longest, mut last, mut overshoot) = (0.0f64, 0, 0.0f64);
        for (place, (work, &end)) in order.iter().zip(&ends[running..]).enumerate() {
            if work.id >= first {
                overshoot = overshoot.max(late(work, end));
                (longest, last) = (longest.max(end), place);
            }
        }
        let ahead = self.outlook.running.iter().map(|(_, work)| work).chain(&order[..last]);
        for (work, &end) in ahead.zip(&ends) {
            // Ids grow, those that the scheduler has not seen yet beyond all that it has.
            if work.id < first && self.alone(work) <= left(work, now) {
                overshoot = overshoot.max(late(work, end));
            }
        }
        match overshoot > 0.0 {
            // By then so much of what is ahead has ended; when all has, there is nothing more to wait for.
            true => Err(Refusal::new(
                Cause::Deadline,
                overshoot.min(ends.iter().copied().fold(0.0, f64::max)),
            )),
            false => Ok(Duration::try_from_secs_f64(longest).unwrap_or(Duration::MAX)),
        }
    }

    /// How long a request would take yet if it had the device to itself.
    fn alone(&self, work: &Work) -> f64 {
        let step = &self.estimates.step;
        step.predict(work.prefill, 0) + (work.decode - 1) as f64 * step.predict(0, 1)
    }

    /// A predicted end as it is held against a deadline.
    fn stretched(&self, end: f64) -> f64 {
        end * self.estimates.margin() + ON_THE_WAY
    }

    /// Whether a server without anything else to do would answer all of them in time.
    fn fits_alone(&self, asks: &[Ask], now: Instant) -> bool {
        let works: Vec<Work> = asks.iter().map(|ask| self.work(UNSEEN, ask)).collect();
        let idle = Outlook {
            running: Vec::new(),
            lines: Vec::new(),
            ..self.outlook
        };
        let ends = idle.ends(&self.estimates.step, &works);
        let mut answers = works.iter().zip(ends);
        answers.all(|(work, end)| self.stretched(end) <= left(work, now))
    }

    /// Seconds until something that runs has ended.
    fn first_end(&self) -> f64 {
        let ends = self.outlook.ends(&self.estimates.step, &[]);
        ends.into_iter().reduce(f64::min).unwrap_or(0.0)
    }

    /// The first of those that wait for which even the plain prediction says that it will be late: others went before
    /// it, or the machine became slower. One at a time, as the next may make it without that one.
    pub fn hopeless(&self, now: Instant) -> Option<(SequenceId, Refusal)> {
        let waits = self.outlook.lines.iter().any(|line| !line.waiting.is_empty());
        if !waits || self.outlook.running.is_empty() || !self.estimates.are_known() {
            return None;
        }
        let order = self.outlook.fair_order();
        let ends = self.outlook.ends(&self.estimates.step, &order);
        let mut waiting = order.iter().zip(&ends[self.outlook.running.len()..]);
        let (work, end) = waiting.find(|(work, end)| work.id < UNSEEN && **end > left(work, now))?;
        Some((work.id, Refusal::new(Cause::Deadline, end - left(work, now))))
    }
}

/// Seconds to the deadline.
fn left(work: &Work, now: Instant) -> f64 {
    let left = |deadline: Instant| deadline.saturating_duration_since(now).as_secs_f64();
    work.deadline.map_or(f64::INFINITY, left)
}

/// Puts a request where it belongs in its tenant's line.
fn queue(outlook: &mut Outlook, ask: &Ask, work: Work) {
    let served = outlook.lines.iter().map(|line| line.served).reduce(f64::min);
    let found = outlook
        .lines
        .iter()
        .position(|line| line.tenant.name == ask.tenant.name);
    let index = found.unwrap_or_else(|| {
        outlook.lines.push(Line {
            tenant: ask.tenant.clone(),
            served: served.unwrap_or(0.0),
            waiting: Vec::new(),
        });
        outlook.lines.len() - 1
    });
    let waiting = &mut outlook.lines[index].waiting;
    let behind = waiting.iter().rposition(|(priority, _)| *priority <= ask.priority);
    waiting.insert(behind.map_or(0, |place| place + 1), (ask.priority, work));
}

fn forget(outlook: &mut Outlook, id: SequenceId) {
    for line in &mut outlook.lines {
        line.waiting.retain(|(_, work)| work.id != id);
    }
}

#[cfg(test)]
#[path = "admission_tests.rs"]
mod tests;
