//! The batcher's invariants on virtual time, over random histories.

use super::*;
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};

const MS: Duration = Duration::from_millis(1);

fn options(max_delay: Duration) -> BatchingOptions {
    BatchingOptions { max_batch_size: 8, max_delay, max_queue_rows: 24, request_timeout: 100 * MS }
}

/// The batcher with the books that a careful caller would keep.
struct World {
    batcher: Batcher,
    now: Duration,
    rows: BTreeMap<RequestId, usize>,
    deadlines: BTreeMap<RequestId, Duration>,
    open: BTreeSet<RequestId>,
    started: BTreeSet<RequestId>,
    running: Vec<Option<Vec<RequestId>>>,
    failed: BTreeSet<RequestId>,
}

impl World {
    fn new(options: BatchingOptions, replicas: usize) -> Self {
        let mut world = Self {
            batcher: Batcher::new(options, replicas),
            now: Duration::ZERO,
            rows: BTreeMap::new(),
            deadlines: BTreeMap::new(),
            open: BTreeSet::new(),
            started: BTreeSet::new(),
            running: vec![None; replicas],
            failed: BTreeSet::new(),
        };
        for replica in 0..replicas {
            world.step(Event::Up(replica));
        }
        world
    }

    /// A request that arrives alone.
    fn arrive(&mut self, rows: usize, timeout: Duration, class: u64) -> RequestId {
        let id = self.arrive_among_others(rows, timeout, class);
        self.step(Event::Tick);
        id
    }

    fn arrive_among_others(&mut self, rows: usize, timeout: Duration, class: u64) -> RequestId {
        let id = self.rows.len() as RequestId;
        let deadline = self.now + timeout;
        self.rows.insert(id, rows);
        self.deadlines.insert(id, deadline);
        self.open.insert(id);
        let arrived = self.now;
        self.step(Event::Arrive(Request { id, rows, class, arrived, deadline }));
        id
    }

    /// Runs a batch to its end: it fails when one of its requests is poison.
    fn finish(&mut self, replica: usize, poison: impl Fn(RequestId) -> bool) {
        if let Some(batch) = self.running[replica].take() {
            let ok = !batch.into_iter().any(poison);
            self.step(Event::Finished { replica, ok });
        }
    }

    fn step(&mut self, event: Event) -> Vec<Command> {
        let commands = self.batcher.step(event, self.now);
        for command in &commands {
            self.keep_books(command);
        }
        for id in &self.open {
            assert!(self.deadlines[id] > self.now, "INV-DEADLINE: {id} is late");
        }
        assert_eq!(self.batcher.unanswered(), self.open.len());
        commands
    }

    fn keep_books(&mut self, command: &Command) {
        match command {
            Command::Run { replica, batch } => {
                let rows: usize = batch.iter().map(|id| self.rows[id]).sum();
                assert!(rows <= 8, "INV-CAP: {rows} rows");
                assert!(!batch.is_empty() && self.running[*replica].is_none());
                for id in batch {
                    let last = self.started.last().copied();
                    let first_run = self.started.insert(*id);
                    assert!(!first_run || last < Some(*id), "INV-FIFO: {id} after {last:?}");
                }
                self.running[*replica] = Some(batch.clone());
            }
            Command::Fail(id) => {
                self.failed.insert(*id);
                assert!(self.open.remove(id), "INV-ANSWER: {id} twice");
            }
            Command::Complete(id) | Command::Expire(id) | Command::Refuse(id, _) => {
                assert!(self.open.remove(id), "INV-ANSWER: {id} twice");
            }
        }
    }

    fn waiting(&self) -> usize {
        self.batcher.queue.len() + self.batcher.retries.iter().map(Vec::len).sum::<usize>()
    }
}

#[derive(Clone, Debug)]
enum Op {
    Arrive { rows: usize, timeout_ms: u32, class: u64 },
    Burst { rows: usize, n: usize },
    Finish(usize),
    Gone(RequestId),
    Pass(u32),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (1usize..=8, 1u32..200, 0u64..10)
            .prop_map(|(rows, timeout_ms, c)| Op::Arrive { rows, timeout_ms, class: c / 9 }),
        1 => (1usize..=3, 1usize..8).prop_map(|(rows, n)| Op::Burst { rows, n }),
        3 => (0usize..3).prop_map(Op::Finish),
        1 => (0u64..60).prop_map(Op::Gone),
        2 => (0u32..30).prop_map(Op::Pass),
    ]
}

fn play(
    world: &mut World,
    ops: Vec<Op>,
    poison: fn(RequestId) -> bool,
    mut check: impl FnMut(&World),
) {
    for op in ops {
        match op {
            Op::Arrive { rows, timeout_ms, class } => {
                world.arrive(rows, timeout_ms * MS, class);
            }
            Op::Burst { rows, n } => {
                for _ in 0..n {
                    world.arrive_among_others(rows, 50 * MS, 0);
                }
                let idle = world.running.iter().any(Option::is_none);
                let due = world
                    .batcher
                    .queue
                    .front()
                    .map(|r| r.arrived + world.batcher.options.max_delay);
                if idle && due.is_some() {
                    assert!(world.batcher.next_wake() <= due, "a tick is asked for");
                }
                world.step(Event::Tick);
            }
            Op::Finish(replica) => world.finish(replica % world.running.len(), poison),
            Op::Gone(id) => {
                world.open.remove(&id);
                world.step(Event::Gone(id));
            }
            Op::Pass(ms) => {
                world.now += ms * MS;
                world.step(Event::Tick);
            }
        }
        check(world);
    }
}

fn run_dry(world: &mut World, poison: fn(RequestId) -> bool) {
    while world.running.iter().any(Option::is_some) {
        for replica in 0..world.running.len() {
            world.finish(replica, poison);
        }
    }
}

fn poison(id: RequestId) -> bool {
    id % 7 == 3
}

proptest! {
    /// INV-ANSWER, INV-CAP, INV-FIFO, INV-DEADLINE (in `World::step`), INV-WORK and INV-POISON.
    #[test]
    fn every_history_keeps_the_invariants(
        ops in prop::collection::vec(op(), 1..120),
        replicas in 1usize..=3,
    ) {
        let mut world = World::new(options(Duration::ZERO), replicas);
        play(&mut world, ops, poison, |world| {
            let idle = world.running.iter().any(Option::is_none);
            assert!(!idle || world.waiting() == 0, "INV-WORK: {} wait", world.waiting());
            assert!(world.batcher.queued_rows() <= 24 + 2 * 8 * world.running.len());
        });
        run_dry(&mut world, poison);
        prop_assert!(world.open.is_empty(), "INV-ANSWER: {:?} unanswered", world.open);
        prop_assert!(world.failed.iter().all(|id| poison(*id)), "INV-POISON: {:?}", world.failed);
        prop_assert_eq!(world.batcher.queued_rows(), 0);
    }

    /// With a delay nothing waits longer than it, as long as the timer is obeyed.
    #[test]
    fn a_delay_is_an_upper_bound(ops in prop::collection::vec(op(), 1..120)) {
        let mut world = World::new(options(10 * MS), 2);
        for op in ops {
            if let Op::Pass(ms) = op {
                let end = world.now + ms * MS;
                while let Some(wake) = world.batcher.next_wake().filter(|at| *at <= end) {
                    world.now = wake.max(world.now);
                    world.step(Event::Tick);
                }
                world.now = end;
            } else {
                play(&mut world, vec![op], |_| false, |_| {});
            }
            let idle = world.running.iter().any(Option::is_none);
            if let (true, Some(oldest)) = (idle, world.batcher.queue.front()) {
                prop_assert!(world.now <= oldest.arrived + 10 * MS);
            }
        }
    }

    /// INV-ANSWER when replicas die: the last one takes everyone's hope with it.
    #[test]
    fn lost_replicas_leave_nobody_waiting(
        ops in prop::collection::vec(op(), 1..60),
        order in Just(vec![0usize, 1, 2]).prop_shuffle(),
    ) {
        let mut world = World::new(options(Duration::ZERO), 3);
        play(&mut world, ops, |_| false, |_| {});
        for replica in order {
            world.running[replica] = None;
            world.step(Event::Down(replica));
        }
        prop_assert!(world.open.is_empty());
        let late = world.arrive(1, MS, 0);
        prop_assert!(!world.open.contains(&late), "refused at once");
    }
}

#[test]
fn requests_that_arrive_while_the_replica_is_busy_share_the_next_batch() {
    let mut world = World::new(options(Duration::ZERO), 1);
    for _ in 0..5 {
        world.arrive(1, 100 * MS, 0);
    }
    assert_eq!(world.running[0], Some(vec![0]));
    world.finish(0, |_| false);
    assert_eq!(world.running[0], Some(vec![1, 2, 3, 4]));
}

#[test]
fn requests_that_arrive_together_run_together() {
    let mut world = World::new(options(Duration::ZERO), 2);
    for _ in 0..3 {
        world.arrive_among_others(1, 100 * MS, 0);
    }
    assert_eq!(world.batcher.next_wake(), Some(Duration::ZERO));
    world.step(Event::Tick);
    assert_eq!(world.running, [Some(vec![0, 1, 2]), None]);
}

#[test]
fn a_full_batch_does_not_wait_for_the_delay() {
    let mut world = World::new(options(10 * MS), 1);
    world.arrive(4, 100 * MS, 0);
    assert_eq!(world.running[0], None);
    assert_eq!(world.batcher.next_wake(), Some(10 * MS));
    world.arrive(4, 100 * MS, 0);
    assert_eq!(world.running[0], Some(vec![0, 1]));
}

#[test]
fn rows_of_other_shapes_run_apart() {
    let mut world = World::new(options(Duration::ZERO), 1);
    for class in [0, 1, 1, 0] {
        world.arrive(1, 100 * MS, class);
    }
    world.finish(0, |_| false);
    assert_eq!(world.running[0], Some(vec![1, 2]));
}

#[test]
fn a_full_queue_says_how_long_it_needs_to_drain() {
    let mut world = World::new(options(Duration::ZERO), 1);
    world.arrive(8, 100_000 * MS, 0);
    world.now += 16_000 * MS; // 8 rows took 16 s: 2 s a row.
    world.finish(0, |_| false);
    for _ in 0..4 {
        world.arrive(8, 100_000 * MS, 0);
    }
    let (arrived, deadline) = (world.now, world.now + 1000 * MS);
    let request = Request { id: 99, rows: 1, class: 0, arrived, deadline };
    let refused = world.batcher.step(Event::Arrive(request), world.now);
    let retry_after = Duration::from_secs(48); // 24 rows wait.
    assert_eq!(refused, [Command::Refuse(99, Refusal::QueueFull { retry_after })]);
}

#[test]
fn a_request_that_expires_in_a_failing_batch_is_not_blamed_on_its_neighbour() {
    let mut world = World::new(options(Duration::ZERO), 1);
    world.arrive(1, 100 * MS, 0);
    world.arrive(1, 5 * MS, 0);
    world.arrive(1, 100 * MS, 0);
    world.finish(0, |_| false);
    assert_eq!(world.running[0], Some(vec![1, 2]));
    world.now = 5 * MS;
    world.step(Event::Tick); // 1 expires while it runs; the batch then fails because of it.
    world.finish(0, |id| id == 1);
    assert_eq!(world.running[0], Some(vec![2]));
    world.finish(0, |id| id == 1);
    assert!(world.failed.is_empty() && world.open.is_empty());
}
