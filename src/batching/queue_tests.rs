//! The queue's promises: shares, priorities, their bound, and an end to every wait.

use proptest::prelude::*;

use super::*;

fn tenant(name: &str, weight: u32) -> Arc<Tenant> {
    Arc::new(Tenant {
        name: name.into(),
        weight,
    })
}

fn entry(tenant: &Arc<Tenant>, priority: i32, arrival: Instant, tokens: f64) -> Entry<f64> {
    Entry {
        tenant: tenant.clone(),
        priority,
        arrival,
        item: tokens,
    }
}

/// Serves whoever is next, and gives its number.
fn serve(queue: &mut FairQueue<f64>, now: Instant) -> Option<SequenceId> {
    let id = queue.order(now, |&tokens| tokens).next()?.0;
    let entry = queue.remove(id)?;
    queue.charge(&entry.tenant, entry.item);
    Some(id)
}

#[test]
fn a_thousand_requests_do_not_push_out_one() {
    let (now, mut queue) = (Instant::now(), FairQueue::default());
    let (many, one) = (tenant("many", 1), tenant("one", 1));
    for id in 0..1000 {
        queue.push(id, entry(&many, 0, now, 100.0));
    }
    for _ in 0..300 {
        serve(&mut queue, now);
    }
    queue.push(1000, entry(&one, 0, now, 100.0));
    let place = (0..).find(|_| serve(&mut queue, now) == Some(1000));
    assert!(place.is_some_and(|before| before <= 1), "{place:?} went before it");
}

#[test]
fn idling_saves_up_no_claim() {
    let (now, mut queue) = (Instant::now(), FairQueue::default());
    let (busy, idle) = (tenant("busy", 1), tenant("idle", 1));
    queue.push(0, entry(&idle, 0, now, 1.0));
    serve(&mut queue, now);
    for id in 1..=100 {
        queue.push(id, entry(&busy, 0, now, 10.0));
    }
    for _ in 0..50 {
        serve(&mut queue, now);
    }
    for id in 101..=140 {
        queue.push(id, entry(&idle, 0, now, 10.0));
    }
    let of_busy = (0..40)
        .filter(|_| serve(&mut queue, now).is_some_and(|id| id <= 100))
        .count();
    assert_eq!(of_busy, 20, "both are served alike from where the idle one came back");
}

#[test]
fn a_smaller_priority_goes_first_and_an_aged_request_before_all() {
    let (start, mut queue) = (Instant::now(), FairQueue::default());
    let own = tenant("own", 1);
    for (id, priority) in [(0, 5), (1, 0), (2, -3), (3, 0)] {
        queue.push(id, entry(&own, priority, start, 1.0));
    }
    let order = |queue: &FairQueue<f64>, now| queue.order(now, |&tokens| tokens).map(|(id, _)| id).collect::<Vec<_>>();
    assert_eq!(order(&queue, start), [2, 1, 3, 0]);
    let later = start + AGING;
    queue.push(4, entry(&own, -9, later, 1.0));
    assert_eq!(order(&queue, later - Duration::from_nanos(1)), [4, 2, 1, 3, 0]);
    assert_eq!(order(&queue, later), [0, 1, 2, 3, 4]);
}

proptest! {
    /// With everybody always waiting, each tenant's service over its weight stays within one request of the others'.
    #[test]
    fn shares_follow_weights(
        weights in prop::collection::vec(1u32..10, 2..5),
        sizes in prop::collection::vec(1u32..500, 400),
    ) {
        let now = Instant::now();
        let mut queue = FairQueue::default();
        let tenants: Vec<_> = weights.iter().zip(0..).map(|(&weight, i)| tenant(&format!("t{i}"), weight)).collect();
        let mut served = vec![0.0; tenants.len()];
        let mut sizes = sizes.into_iter().map(f64::from);
        let mut id = 0;
        let mut owners = Vec::new();
        let mut push = |queue: &mut FairQueue<f64>, owners: &mut Vec<(usize, f64)>, owner: usize| {
            let Some(size) = sizes.next() else { return false };
            queue.push(id, entry(&tenants[owner], 0, now, size));
            owners.push((owner, size));
            id += 1;
            true
        };
        for owner in 0..tenants.len() {
            push(&mut queue, &mut owners, owner);
            push(&mut queue, &mut owners, owner);
        }
        while let Some(id) = serve(&mut queue, now) {
            let (owner, size) = owners[id as usize];
            served[owner] += size / f64::from(weights[owner]);
            let spread = served.iter().fold(f64::MIN, |a, &b| a.max(b)) - served.iter().fold(f64::MAX, |a, &b| a.min(b));
            prop_assert!(spread <= 500.0, "{served:?}");
            if !push(&mut queue, &mut owners, owner) {
                break;
            }
        }
    }

    /// Same tenant, same priority: first come, first served. Everything ends. Nobody who has waited for the aging
    /// bound is passed by a request of its tenant that came after it.
    #[test]
    fn order_and_bounds_hold(
        arrivals in prop::collection::vec((0usize..3, -2i32..3, 0u64..3000), 1..80),
        pause in 0u64..2000,
    ) {
        let mut now = Instant::now();
        let tenants = [tenant("a", 1), tenant("b", 2), tenant("c", 5)];
        let mut queue = FairQueue::default();
        let mut came = Vec::new();
        for (id, &(owner, priority, wait)) in arrivals.iter().enumerate() {
            now += Duration::from_millis(wait);
            queue.push(id as SequenceId, entry(&tenants[owner], priority, now, 10.0));
            came.push(now);
        }
        let mut gone = vec![false; arrivals.len()];
        while let Some(id) = serve(&mut queue, now) {
            let (id, (owner, priority, _)) = (id as usize, arrivals[id as usize]);
            for other in (0..id).filter(|&other| !gone[other] && arrivals[other].0 == owner) {
                prop_assert!(arrivals[other].1 != priority, "{other} came before {id}");
                prop_assert!(now - came[other] < AGING, "{other} has waited long enough");
            }
            gone[id] = true;
            now += Duration::from_millis(pause);
        }
        prop_assert!(gone.iter().all(|&gone| gone));
    }
}
