//! The gate in front of the scheduler, on a device that exists in numbers only: no clock, no thread.

use std::collections::HashMap;

use rand::{RngExt, SeedableRng, rngs::StdRng};

use super::*;
use crate::{
    batching::{Arrival, BlockPool, Buckets, Config, Namespace, Plan, Schedule, Scheduler, WindowPolicy},
    request::TokenId,
};

/// A client's request, and how long its answer will in truth be.
#[derive(Debug, Clone)]
struct Client {
    /// Seconds from the start.
    at: f64,
    tenant: Arc<Tenant>,
    prompt: usize,
    max_tokens: usize,
    output: usize,
    timeout: f64,
}

/// What became of the clients, by their number.
#[derive(Debug, Default)]
struct Outcomes {
    refused: HashMap<usize, Refusal>,
    /// Accepted, and asked to leave the queue later.
    overtaken: Vec<usize>,
    in_time: Vec<usize>,
    late: Vec<usize>,
}

/// Scheduler, gate and device.
struct World {
    start: Instant,
    now: Instant,
    scheduler: Scheduler,
    gate: Gate,
    estimates: Estimates,
    random: StdRng,
    /// What runs or waits, with its client and the tokens that it still gets.
    sequences: HashMap<SequenceId, (usize, usize)>,
    /// Clients that were predicted to be in time when they came, and when that was.
    accepted: HashMap<usize, Instant>,
    outcomes: Outcomes,
    /// Whether the gate hears what a step takes.
    learns: bool,
}

fn limits() -> Limits {
    Limits {
        requests: 1024,
        tokens: None,
        in_flight: None,
        key_share: 0.5,
    }
}

fn tenant(name: &str) -> Arc<Tenant> {
    Arc::new(Tenant {
        name: name.into(),
        weight: 1,
    })
}

impl World {
    fn new(limits: Limits) -> Self {
        let config = Config {
            schedule: Schedule::Continuous,
            window_policy: WindowPolicy::Adaptive,
            window: Duration::from_millis(20),
            max_batch: 100,
            step_tokens: 512,
            buckets: Buckets::default(),
            max_model_len: 2048,
        };
        let scheduler = Scheduler::new(config, BlockPool::new(2000, 16, false)).unwrap();
        let start = Instant::now();
        let estimates = Estimates::default();
        let gate = Gate::new(limits, scheduler.outlook(&estimates, start));
        Self {
            start,
            now: start,
            scheduler,
            gate,
            estimates,
            random: StdRng::seed_from_u64(7),
            sequences: HashMap::new(),
            accepted: HashMap::new(),
            outcomes: Outcomes::default(),
            learns: true,
        }
    }

    /// What a step truly takes: not quite linear in its rows, and never twice the same.
    fn truth(&mut self, prefill: usize, decodes: usize) -> f64 {
        let seconds = 0.012 + 0.0009 * prefill as f64 + 0.0016 * (decodes as f64).powf(0.93);
        seconds * self.random.random_range(0.9..1.15)
    }

    fn at(&self, seconds: f64) -> Instant {
        self.start + Duration::from_secs_f64(seconds)
    }

    /// A client comes, at its time, whatever step the device is in.
    fn arrive(&mut self, number: usize, client: &Client, inbox: &mut Vec<(usize, Client, SequenceId)>) {
        let now = self.at(client.at);
        let ask = Ask {
            tenant: client.tenant.clone(),
            priority: 0,
            prompt: client.prompt,
            max_tokens: client.max_tokens,
            deadline: Some(now + Duration::from_secs_f64(client.timeout)),
        };
        match self.gate.ask(&[ask], now) {
            Ok(accepted) => {
                if accepted
                    .predicted
                    .is_some_and(|time| time.as_secs_f64() <= client.timeout)
                {
                    self.accepted.insert(number, now);
                }
                inbox.push((number, client.clone(), accepted.ids[0]));
            }
            Err(refusal) => drop(self.outcomes.refused.insert(number, refusal)),
        }
    }

    /// What the engine does between two steps.
    fn turn(&mut self, inbox: &mut Vec<(usize, Client, SequenceId)>) -> Plan {
        for (number, client, place) in inbox.drain(..) {
            let arrival = self.at(client.at);
            let first = number as TokenId * 4096;
            let id = self.scheduler.push(Arrival {
                prompt: (first..first + client.prompt as TokenId).collect(),
                namespace: Namespace::Shared,
                max_tokens: client.max_tokens,
                tenant: client.tenant.clone(),
                priority: 0,
                arrival,
                deadline: Some(arrival + Duration::from_secs_f64(client.timeout)),
            });
            self.gate.seen(place);
            self.sequences.insert(id, (number, client.output));
        }
        let plan = self.scheduler.plan(self.now);
        for id in &plan.expired {
            let (number, _) = self.sequences.remove(id).unwrap();
            self.end(number, true);
        }
        self.gate
            .update(self.scheduler.outlook(&self.estimates, self.now), &self.estimates);
        if let Some((id, _)) = self.gate.hopeless(self.now) {
            let (number, _) = self.sequences.remove(&id).unwrap();
            self.scheduler.remove(id, self.now);
            self.outcomes.overtaken.push(number);
        }
        plan
    }

    fn step(&mut self, plan: &Plan, clients: &[Client]) {
        let decodes = plan.rows.iter().filter(|row| row.len == 1 && row.start > 0).count();
        let tokens: usize = plan.rows.iter().map(|row| row.len).sum();
        let seconds = self.truth(tokens - decodes, decodes);
        self.now += Duration::from_secs_f64(seconds);
        self.scheduler.commit(plan);
        if self.learns {
            self.estimates.step.observe(tokens - decodes, decodes, seconds);
        }
        for row in plan.rows.iter().filter(|row| row.samples) {
            // One that was overtaken between plan and step is gone.
            let Some((number, left)) = self.sequences.get_mut(&row.id) else {
                continue;
            };
            *left -= 1;
            if *left > 0 {
                self.scheduler.append(row.id, 7);
                continue;
            }
            let number = *number;
            self.sequences.remove(&row.id);
            self.scheduler.remove(row.id, self.now);
            let client = &clients[number];
            let late = self.now > self.at(client.at + client.timeout);
            self.estimates.lengths.observe(client.max_tokens, client.output);
            self.end(number, late);
        }
    }

    fn end(&mut self, number: usize, late: bool) {
        if let Some(&accepted) = self.accepted.get(&number) {
            self.estimates.ended(late, accepted, self.now);
        }
        match late {
            true => self.outcomes.late.push(number),
            false => self.outcomes.in_time.push(number),
        }
    }

    /// Runs until all clients have come and gone.
    fn run(mut self, clients: &[Client]) -> Outcomes {
        let mut inbox = Vec::new();
        let mut coming = clients.iter().enumerate().peekable();
        loop {
            while let Some((number, client)) = coming.next_if(|(_, client)| self.at(client.at) <= self.now) {
                self.arrive(number, client, &mut inbox);
            }
            let plan = self.turn(&mut inbox);
            if !plan.rows.is_empty() {
                self.step(&plan, clients);
                continue;
            }
            let next = coming.peek().map(|(_, client)| self.at(client.at));
            match plan.wake.into_iter().chain(next).min() {
                Some(wake) => self.now = self.now.max(wake),
                None if self.sequences.is_empty() => return self.outcomes,
                None => {}
            }
        }
    }
}

/// Poisson arrivals of chats, 64 to 192 tokens in, 32 to 96 out: at half of what can be held until the server knows
/// itself, then a minute at `rate`.
fn chats(rate: f64, timeout: f64, seed: u64, exact: bool) -> Vec<Client> {
    let mut random = StdRng::seed_from_u64(seed);
    let (mut at, mut clients) = (0.0, Vec::new());
    loop {
        let rate = if at < WARM { SUSTAINABLE / 2.0 } else { rate };
        at -= random.random_range(f64::MIN_POSITIVE..1.0).ln() / rate;
        if at > WARM + 60.0 {
            return clients;
        }
        let max_tokens = random.random_range(32..=96);
        clients.push(Client {
            at,
            tenant: Arc::new(Tenant::anyone()),
            prompt: random.random_range(64..=192),
            max_tokens,
            output: if exact {
                max_tokens
            } else {
                random.random_range(1..=max_tokens)
            },
            timeout,
        });
    }
}

/// The highest rate whose every request is answered in time lies near this many a second, with the device above.
const SUSTAINABLE: f64 = 3.4;
/// Seconds of warm-up.
const WARM: f64 = 10.0;

/// Overload as the field has it: three times what can be held, for a minute.
#[test]
fn goodput_holds_in_overload_and_the_accepted_are_in_time() {
    for exact in [true, false] {
        let run = |load: f64| {
            let clients = chats(load * SUSTAINABLE, 6.0, 11, exact);
            let outcomes = World::new(limits()).run(&clients);
            assert_eq!(
                outcomes.refused.len() + outcomes.overtaken.len() + outcomes.in_time.len() + outcomes.late.len(),
                clients.len(),
                "every request has one outcome"
            );
            let accepted = outcomes.in_time.len() + outcomes.late.len();
            let late = outcomes.late.len() as f64 / accepted as f64;
            let measured = outcomes.in_time.iter().filter(|&&number| clients[number].at >= WARM);
            (measured.count() as f64 / 60.0, late)
        };
        let most = [0.8, 1.0, 1.2, 1.5]
            .map(|load| run(load).0)
            .into_iter()
            .fold(0.0, f64::max);
        let (goodput, late) = run(3.0);
        assert!(goodput >= 0.9 * most, "{goodput} of {most} requests a second");
        assert!(late <= 0.01, "{late} of the accepted were late");
    }
}

/// Without a gate that predicts, the same load loses everything to its queue: the check above can fail.
#[test]
fn without_predictions_overload_takes_the_goodput() {
    let clients = chats(3.0 * SUSTAINABLE, 6.0, 11, true);
    let world = World {
        learns: false,
        ..World::new(limits())
    };
    let outcomes = world.run(&clients);
    assert!(
        (outcomes.in_time.len() as f64) < 60.0 * SUSTAINABLE * 0.7,
        "{}",
        outcomes.in_time.len()
    );
}

/// One that comes again when it was told to is let in, if nobody else came.
#[test]
fn a_retry_after_means_something() {
    let mut clients = chats(3.0 * SUSTAINABLE, 6.0, 5, true);
    clients.retain(|client| client.at < WARM + 20.0);
    let outcomes = World::new(limits()).run(&clients);
    let (&last, refusal) = outcomes.refused.iter().max_by_key(|(number, _)| **number).unwrap();
    assert!(clients[last].at > WARM + 10.0, "overload lasts");
    let again = Client {
        at: clients[last].at + refusal.retry_after.as_secs_f64(),
        ..clients[last].clone()
    };
    clients.truncate(last + 1);
    clients.push(again);
    let outcomes = World::new(limits()).run(&clients);
    assert!(outcomes.in_time.contains(&(last + 1)), "{refusal}");
}

/// One key floods the server; another's few requests are all answered.
#[test]
fn a_flood_of_one_key_does_not_push_out_another() {
    let (flood, few) = (tenant("flood"), tenant("few"));
    let (mut answered, mut asked) = (0, 0);
    for seed in 1..=8 {
        let mut clients = chats(4.0 * SUSTAINABLE, 6.0, seed, true);
        for (number, client) in clients.iter_mut().enumerate() {
            client.tenant = if number % 40 == 20 { few.clone() } else { flood.clone() };
        }
        let outcomes = World::new(limits()).run(&clients);
        let of_few = (0..clients.len()).filter(|&number| clients[number].tenant == few);
        for number in of_few {
            asked += 1;
            answered += usize::from(outcomes.in_time.contains(&number));
        }
    }
    assert!(answered * 10 >= asked * 9, "{answered} of {asked}");
}

#[test]
fn each_limit_refuses_with_its_cause() {
    let now = Instant::now();
    let ask = |tenant: &Arc<Tenant>, prompt| Ask {
        tenant: tenant.clone(),
        priority: 0,
        prompt,
        max_tokens: 8,
        deadline: None,
    };
    let anyone = Arc::new(Tenant::anyone());
    let gate = |limits| World::new(limits).gate;
    let mut full = gate(Limits {
        requests: 2,
        ..limits()
    });
    assert_eq!(
        full.ask(&[ask(&anyone, 4), ask(&anyone, 4), ask(&anyone, 4)], now)
            .unwrap_err()
            .cause,
        Cause::Requests { limit: 2 }
    );
    let accepted = full.ask(&[ask(&anyone, 4), ask(&anyone, 4)], now).unwrap();
    assert_eq!((accepted.ids.len(), accepted.predicted), (2, None));
    assert_eq!(
        full.ask(&[ask(&anyone, 4)], now).unwrap_err().retry_after,
        Duration::from_secs(1)
    );
    let mut tokens = gate(Limits {
        tokens: Some(10),
        ..limits()
    });
    assert!(tokens.ask(&[ask(&anyone, 8)], now).is_ok());
    assert_eq!(
        tokens.ask(&[ask(&anyone, 3)], now).unwrap_err().cause,
        Cause::Tokens { limit: 10 }
    );
    let mut flight = gate(Limits {
        in_flight: Some(1),
        ..limits()
    });
    assert!(flight.ask(&[ask(&anyone, 8)], now).is_ok());
    assert_eq!(
        flight.ask(&[ask(&anyone, 3)], now).unwrap_err().cause,
        Cause::InFlight { limit: 1 }
    );
    let (a, b) = (tenant("a"), tenant("b"));
    let mut shared = gate(Limits {
        requests: 4,
        ..limits()
    });
    assert!(shared.ask(&[ask(&a, 1), ask(&a, 1)], now).is_ok());
    assert_eq!(shared.ask(&[ask(&a, 1)], now).unwrap_err().cause, Cause::Share);
    assert!(shared.ask(&[ask(&b, 1), ask(&b, 1)], now).is_ok());
}

#[test]
fn what_the_scheduler_has_not_seen_counts_until_it_has() {
    let now = Instant::now();
    let world = World::new(limits());
    let mut gate = Gate::new(
        Limits {
            requests: 1,
            ..limits()
        },
        world.scheduler.outlook(&world.estimates, now),
    );
    let ask = Ask {
        tenant: tenant("a"),
        priority: 0,
        prompt: 4,
        max_tokens: 8,
        deadline: None,
    };
    let accepted = gate.ask(std::slice::from_ref(&ask), now).unwrap();
    let empty = || world.scheduler.outlook(&world.estimates, now);
    gate.update(empty(), &world.estimates);
    assert!(
        gate.ask(std::slice::from_ref(&ask), now).is_err(),
        "an outlook without it does not forget it"
    );
    gate.seen(accepted.ids[0]);
    gate.update(empty(), &world.estimates);
    assert!(gate.ask(&[ask], now).is_ok());
}

#[test]
fn who_has_ended_no_longer_stands_in_the_way() {
    let mut world = World::new(Limits {
        in_flight: Some(1),
        ..limits()
    });
    let ask = Ask {
        tenant: tenant("a"),
        priority: 0,
        prompt: 4,
        max_tokens: 8,
        deadline: None,
    };
    let client = Client {
        at: 0.0,
        tenant: tenant("a"),
        prompt: 4,
        max_tokens: 8,
        output: 8,
        timeout: 60.0,
    };
    let mut inbox = Vec::new();
    world.arrive(0, &client, &mut inbox);
    world.turn(&mut inbox);
    assert!(world.gate.ask(std::slice::from_ref(&ask), world.now).is_err());
    let id = *world.sequences.keys().next().unwrap();
    world.scheduler.remove(id, world.now);
    world.gate.ended(id);
    assert!(world.gate.ask(&[ask], world.now).is_ok(), "before any new outlook");
}

/// One who takes ten steps and has so many seconds.
fn ten_steps(tenant: &Arc<Tenant>, now: Instant, seconds: f64) -> Ask {
    Ask {
        tenant: tenant.clone(),
        priority: 0,
        prompt: 4,
        max_tokens: 10,
        deadline: Some(now + Duration::from_secs_f64(seconds)),
    }
}

/// A gate that knows steps of 0.1 s, whatever they run, and has let in one with ten of them and all the time it needs:
/// alone or beside others that takes 1 s, stretched to 1.2 s.
fn at_ten_steps_of(tenant: &Arc<Tenant>) -> (Gate, Instant) {
    let mut world = World::new(limits());
    for step in 0..100 {
        world.estimates.step.observe(step % 3 * 10, 1 + step % 5, 0.1);
    }
    let now = world.now;
    let mut gate = world.gate;
    gate.update(world.scheduler.outlook(&world.estimates, now), &world.estimates);
    gate.ask(&[ten_steps(tenant, now, 60.0)], now).unwrap();
    (gate, now)
}

/// Near its deadline a request has a few steps to spare; only who holds far less than others may use them.
#[test]
fn steps_are_left_to_spare() {
    let (rich, poor) = (tenant("rich"), tenant("poor"));
    let accepts = |tenant: &Arc<Tenant>, seconds: f64| {
        let (mut gate, now) = at_ten_steps_of(&rich);
        gate.ask(&[ten_steps(tenant, now, seconds)], now).is_ok()
    };
    assert!(accepts(&rich, 1.6));
    assert!(!accepts(&rich, 1.3));
    assert!(accepts(&poor, 1.3));
    assert!(!accepts(&poor, 1.0));
}

/// Choices that would not all be in time with the server to themselves, as one of them alone would, are refused without
/// costing others their turn.
#[test]
fn nobody_yields_to_choices_that_never_fit() {
    let (rich, poor) = (tenant("rich"), tenant("poor"));
    let (mut gate, now) = at_ten_steps_of(&rich);
    // A step runs a hundred rows, so the other fifty need ten steps more.
    let choices = vec![ten_steps(&poor, now, 1.6); 150];
    assert_eq!(gate.ask(&choices, now).unwrap_err().cause, Cause::Deadline);
    let next = gate.ask(&[ten_steps(&rich, now, 60.0)], now);
    assert!(next.is_ok(), "{next:?}");
}
