//! Typed actors whose calls run at the same time, or overtake each other.

use crate::Test;
use mobula_core::{
    ActorOptions, Error, Placement, Resources, RestartPolicy, Runtime, Task, remote,
};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, OnceLock};
use std::time::Duration;

const LONG: Duration = Duration::from_secs(60);
const PLACES: [Placement; 2] = [Placement::Thread, Placement::Process];

pub(crate) const TESTS: &[Test] = &[
    ("concurrent_actors::urgent_calls_overtake_those_that_wait", urgent),
    ("concurrent_actors::an_urgent_call_needs_no_room_of_others", urgent_room),
    ("concurrent_actors::another_group_answers_during_a_long_call", health),
    ("concurrent_actors::as_many_calls_run_together_as_the_group_may", together),
    ("concurrent_actors::a_change_runs_alone", alone),
    ("concurrent_actors::an_unknown_group_is_refused", unknown_group),
    ("concurrent_actors::a_panic_makes_the_state_anew", panics),
    ("concurrent_actors::only_what_had_begun_is_lost_with_a_process", lost),
    ("concurrent_actors::calls_that_wait_lend_what_the_actor_holds", lends),
    ("concurrent_actors::a_state_may_belong_to_one_thread", local_state),
    ("concurrent_actors::self_is_the_actor_in_its_methods", own_type),
];

#[derive(Default)]
struct Ledger {
    entries: Vec<u64>,
    inside: Mutex<usize>,
    came: Condvar,
    looking: AtomicU64,
}

#[remote(crate = mobula_core)]
impl Ledger {
    fn new() -> Self {
        Self::default()
    }

    /// Says that it has begun, then waits for the gate.
    fn long(&self, begun: PathBuf, gate: PathBuf) -> Result<(), std::io::Error> {
        std::fs::write(begun, "begun")?;
        while !gate.exists() {
            std::thread::yield_now();
        }
        Ok(())
    }

    fn enter(&mut self, n: u64) -> usize {
        assert_eq!(self.looking.load(Ordering::SeqCst), 0, "somebody looks");
        assert!(n != 99, "99 is too much");
        self.entries.push(n);
        self.entries.len()
    }

    fn entries(&self) -> Vec<u64> {
        self.looking.fetch_add(1, Ordering::SeqCst);
        std::thread::yield_now();
        let entries = self.entries.clone();
        self.looking.fetch_sub(1, Ordering::SeqCst);
        entries
    }

    #[group("ops")]
    fn health(&self) -> usize {
        self.entries.len()
    }

    #[group("ops")]
    fn die(&self) {
        std::process::abort();
    }

    /// Waits until so many calls are in here.
    #[group("meeting")]
    fn meet(&self, count: usize) -> bool {
        self.meet_now(count)
    }

    fn meet_elsewhere(&self, count: usize) -> bool {
        self.meet_now(count)
    }

    fn nested(&self, n: u64) -> Result<u64, Error> {
        let runtime = SMALL.get().ok_or_else(|| Error::Internal("no runtime".to_owned()))?;
        runtime.submit(Task::new("nested", move || Ok::<_, Error>(n))).get().map(|n| *n)
    }
}

impl Ledger {
    fn meet_now(&self, count: usize) -> bool {
        let mut inside = self.inside.lock().expect("not poisoned");
        *inside += 1;
        self.came.notify_all();
        let waited = self.came.wait_timeout_while(inside, LONG, |inside| *inside < count);
        !waited.expect("not poisoned").1.timed_out()
    }
}

static SMALL: OnceLock<Runtime> = OnceLock::new();

/// Two files: one that a long call writes, and one that it waits for.
struct Gate {
    _dir: tempfile::TempDir,
    begun: PathBuf,
    gate: PathBuf,
}

impl Gate {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("temporary folder");
        let file = |name: &str| Path::join(dir.path(), name);
        Self { begun: file("begun"), gate: file("gate"), _dir: dir }
    }

    fn open(&self) {
        std::fs::write(&self.gate, "").expect("write");
    }
}

/// A ledger that is busy with a long call, which began.
fn busy(handle: &LedgerHandle) -> (Gate, mobula_core::ObjectRef<()>) {
    let gate = Gate::new();
    let long = handle.long(gate.begun.clone(), gate.gate.clone());
    crate::driver::wait_for_file(&gate.begun);
    (gate, long)
}

fn urgent(runtime: &Runtime) {
    for place in PLACES {
        let ledger = runtime.spawn(Ledger::remote().on(place)).expect("actor");
        let (gate, long) = busy(&ledger);
        let calls = [
            ledger.enter(1),
            ledger.enter(2),
            ledger.urgent().enter(3),
            ledger.urgent().enter(4),
            ledger.enter(5),
        ];
        // Its answer says that all before it have arrived.
        assert_eq!(*ledger.health().get_timeout(LONG).expect("health"), 0);
        gate.open();
        long.get_timeout(LONG).expect("released");
        mobula_core::collect(&calls).expect("all entered");
        let entries = ledger.entries().get_timeout(LONG).expect("entries");
        assert_eq!(*entries, [3, 4, 1, 2, 5], "{place:?}");
    }
}

fn urgent_room(runtime: &Runtime) {
    for place in PLACES {
        let options = ActorOptions { mailbox: 1, placement: place, ..ActorOptions::new("small") };
        let ledger = runtime.spawn(Ledger::remote().with_options(options)).expect("actor");
        let (gate, long) = busy(&ledger);
        assert!(ledger.try_enter(1).expect_err("full").is_overloaded());
        let urgent = ledger.urgent().try_enter(2).expect("room of its own");
        assert!(ledger.urgent().try_enter(3).expect_err("full too").is_overloaded());
        assert_eq!(ledger.actor().pending(), 2);
        gate.open();
        long.get_timeout(LONG).expect("released");
        assert_eq!(*urgent.get_timeout(LONG).expect("entered"), 1);
    }
}

fn health(runtime: &Runtime) {
    for place in PLACES {
        let ledger = runtime.spawn(Ledger::remote().on(place)).expect("actor");
        let (gate, long) = busy(&ledger);
        assert_eq!(*ledger.health().get_timeout(LONG).expect("beside the long one"), 0);
        let change = ledger.enter(1);
        for _ in 0..10 {
            assert_eq!(*ledger.health().get_timeout(LONG).expect("before the change"), 0);
        }
        assert!(!long.is_ready() && !change.is_ready());
        gate.open();
        assert_eq!(*change.get_timeout(LONG).expect("its turn"), 1);
        assert_eq!(*ledger.health().get_timeout(LONG).expect("after it"), 1);
    }
}

fn together(runtime: &Runtime) {
    for place in PLACES {
        let call = Ledger::remote().on(place).with_group("meeting", 3).with_concurrency(2);
        let ledger = runtime.spawn(call).expect("actor");
        let meeting: Vec<_> = (0..3).map(|_| ledger.meet(3)).collect();
        let met = mobula_core::collect(&meeting).expect("answers");
        assert!(met.iter().all(|met| **met), "{place:?}: three at a time");
        let others = [ledger.meet_elsewhere(5), ledger.meet_elsewhere(5)];
        let met = mobula_core::collect(&others).expect("answers");
        assert!(met.iter().all(|met| **met), "{place:?}: two at a time");
    }
}

fn alone(runtime: &Runtime) {
    for place in PLACES {
        let call = Ledger::remote().on(place).with_concurrency(4);
        let ledger = runtime.spawn(call).expect("actor");
        let mut changes = Vec::new();
        let mut looks = Vec::new();
        for n in 0..50 {
            changes.push(ledger.enter(n));
            looks.extend((0..3).map(|_| ledger.entries()));
        }
        for (n, change) in changes.iter().enumerate() {
            assert_eq!(*change.get_timeout(LONG).expect("nobody looks meanwhile"), n + 1);
        }
        for (n, look) in looks.iter().enumerate() {
            let seen = look.get_timeout(LONG).expect("entries").len();
            assert_eq!(seen, n / 3 + 1, "calls of one group begin in order");
        }
    }
}

fn unknown_group(runtime: &Runtime) {
    let error = runtime.spawn(Ledger::remote().with_group("oops", 2)).expect_err("unknown");
    assert_eq!(
        error.to_string(),
        "Ledger has no group \"oops\"; its methods have: ops, meeting; \
         write #[group(\"oops\")] on one"
    );
}

fn panics(runtime: &Runtime) {
    for place in PLACES {
        let ledger = runtime.spawn(Ledger::remote().on(place)).expect("actor");
        ledger.enter(1).get_timeout(LONG).expect("entered");
        let panicked = ledger.enter(99).get_timeout(LONG);
        assert!(matches!(panicked, Err(Error::TaskPanicked { .. })), "{panicked:?}");
        assert_eq!(*ledger.enter(2).get_timeout(LONG).expect("rebuilt"), 1);
        assert_eq!(*ledger.health().get_timeout(LONG).expect("the same one"), 1);
    }
}

fn lost(runtime: &Runtime) {
    let options = ActorOptions {
        placement: Placement::Process,
        restart: RestartPolicy::at_most(1),
        ..ActorOptions::new("ledger")
    };
    let ledger = runtime.spawn(Ledger::remote().with_options(options)).expect("actor");
    let (_gate, long) = busy(&ledger);
    let waiting = [ledger.enter(1), ledger.enter(2)];
    let dying = ledger.die();
    for begun in [&long, &dying] {
        let error = begun.get_timeout(LONG);
        assert!(matches!(error, Err(Error::WorkerLost { .. })), "{error:?}");
    }
    for (n, call) in waiting.iter().enumerate() {
        assert_eq!(*call.get_timeout(LONG).expect("in the next process"), n + 1);
    }
}

fn lends(_: &Runtime) {
    let runtime = Runtime::local(Resources::cpus(1.0)).expect("runtime");
    let runtime = SMALL.get_or_init(|| runtime);
    let ledger = runtime.spawn(Ledger::remote().with_concurrency(3)).expect("actor");
    let calls: Vec<_> = (0..30).map(|n| ledger.nested(n)).collect();
    for (n, call) in (0..).zip(&calls) {
        assert_eq!(*call.get_timeout(LONG).expect("one CPU is enough"), n);
    }
}

/// Neither `Send` nor `Sync`.
struct Local(Rc<u64>);

#[remote(crate = mobula_core)]
impl Local {
    fn new(n: u64) -> Self {
        Self(Rc::new(n))
    }

    fn get(&self) -> u64 {
        *self.0
    }

    fn set(&mut self, n: u64) {
        assert!(n != 99, "99 is too much");
        self.0 = Rc::new(n);
    }
}

fn local_state(runtime: &Runtime) {
    for place in PLACES {
        let local = runtime.spawn(Local::remote(1).on(place)).expect("actor");
        local.set(2).get_timeout(LONG).expect("set");
        assert_eq!(*local.get().get_timeout(LONG).expect("value"), 2);
        local.set(99).get_timeout(LONG).expect_err("a panic");
        assert_eq!(*local.get().get_timeout(LONG).expect("rebuilt"), 1);
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Sum(u64);

#[remote(crate = mobula_core)]
impl Sum {
    fn new(n: u64) -> Self {
        Self(n)
    }

    fn merge(&mut self, others: Vec<Self>) -> Self {
        self.0 += others.iter().map(|other| other.0).sum::<u64>();
        self.clone()
    }

    #[cfg(any())]
    fn never(&self, unknown: NoSuchType) {}
}

fn own_type(runtime: &Runtime) {
    let sum = runtime.spawn(Sum::remote(1).on(Placement::Process)).expect("actor");
    let merged = sum.merge(vec![Sum(2), Sum(3)]).get_timeout(LONG).expect("merged");
    assert_eq!(*merged, Sum(6));
}
