//! Actors whose state outlives their process: `#[checkpoint]` and `#[restore]`.

use crate::Test;
use crate::driver::assert_gone;
use mobula_core::value::Blob;
use mobula_core::{ActorOptions, Error, Placement, Resources, RestartPolicy, Runtime, remote};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

const MODE: &str = "MOBULA_TEST_CHECKPOINTS";
const LONG: Duration = Duration::from_secs(60);
const LARGE: usize = 4 << 20;
const PLACES: [Placement; 2] = [Placement::Thread, Placement::Process];

pub(crate) const TESTS: &[Test] = &[
    ("checkpoints::a_lost_process_goes_on_from_what_was_answered", killed),
    ("checkpoints::with_every_third_change_saved_it_goes_on_from_there", every_third),
    ("checkpoints::a_change_that_is_retried_is_in_the_state_once", retried),
    ("checkpoints::a_panic_brings_the_newest_saved_state_back", panics),
    ("checkpoints::a_save_that_fails_leaves_the_older_one", failing_save),
    ("checkpoints::a_restore_that_fails_ends_the_actor", failing_load),
    ("checkpoints::nobody_changes_what_is_being_saved", alone),
    ("checkpoints::a_state_of_one_thread_is_saved_too", local_state),
    ("checkpoints::a_state_may_be_saved_as_it_is", whole_state),
    ("checkpoints::only_the_newest_large_state_is_kept", newest_only),
];

#[derive(Clone, Serialize, Deserialize)]
struct Saved {
    sum: u64,
    ballast: Blob,
}

struct Tally {
    saved: Saved,
    /// How its saves fail, if they do.
    flaw: String,
    looking: AtomicU64,
}

#[remote(crate = mobula_core)]
impl Tally {
    fn new(sum: u64, bytes: usize) -> Self {
        Self::load(Saved { sum, ballast: vec![7; bytes].into() }).expect("no 13")
    }

    #[checkpoint]
    fn save(&self) -> Result<Saved, String> {
        assert_ne!(self.flaw, "panic", "a save that panics");
        assert_eq!(self.looking.load(Ordering::SeqCst), 0, "somebody looks");
        if self.flaw.is_empty() { Ok(self.saved.clone()) } else { Err(self.flaw.clone()) }
    }

    #[restore]
    fn load(saved: Saved) -> Result<Self, String> {
        match saved.sum {
            13 => Err("13 is no state".to_owned()),
            _ => Ok(Self { saved, flaw: String::new(), looking: AtomicU64::new(0) }),
        }
    }

    /// 99 is too much, after it was added.
    fn add(&mut self, n: u64) -> u64 {
        self.saved.sum += n;
        assert_ne!(n, 99, "99 is too much");
        self.saved.sum
    }

    /// Adds, and kills its process the first time.
    fn add_and_die(&mut self, n: u64, marker: PathBuf) -> Result<u64, std::io::Error> {
        let sum = self.add(n);
        if !marker.exists() {
            std::fs::write(&marker, "")?;
            std::process::abort();
        }
        Ok(sum)
    }

    /// An error does not undo the change.
    fn add_in_vain(&mut self, n: u64) -> Result<(), String> {
        Err(format!("the sum is {}", self.add(n)))
    }

    fn spoil(&mut self, flaw: String) {
        self.flaw = flaw;
    }

    fn sum(&self) -> u64 {
        self.looking.fetch_add(1, Ordering::SeqCst);
        std::thread::yield_now();
        self.looking.fetch_sub(1, Ordering::SeqCst);
        self.saved.sum
    }

    fn ballast(&self) -> Blob {
        self.saved.ballast.clone()
    }

    /// Shared memory that its process holds open.
    fn segments(&self) -> Result<usize, std::io::Error> {
        let open = std::fs::read_dir("/proc/self/fd")?.flatten();
        let links = open.filter_map(|entry| std::fs::read_link(entry.path()).ok());
        Ok(links.filter(|link| link.to_string_lossy().contains("mobula-object")).count())
    }
}

fn options(every: u64, max_task_retries: u32) -> ActorOptions {
    ActorOptions {
        placement: Placement::Process,
        restart: RestartPolicy::at_most(9),
        max_task_retries,
        checkpoint_every: every,
        ..ActorOptions::new("tally")
    }
}

/// `kill -9`, and no call is on its way to the process that was.
fn kill(actor: &mobula_core::ActorRef) {
    let pid = actor.pid().expect("a process");
    let raw = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw);
    rustix::process::kill_process(raw.expect("a pid"), rustix::process::Signal::KILL)
        .expect("ours");
    assert_gone(&pid.to_string());
}

fn killed(runtime: &Runtime) {
    for bytes in [0, LARGE] {
        let call = Tally::remote(7_u64, bytes).with_options(options(1, 0));
        let tally = runtime.spawn(call).expect("actor");
        kill(tally.actor());
        assert_eq!(*tally.sum().get_timeout(LONG).expect("the constructor's"), 7);
        for n in 1..=5 {
            assert_eq!(*tally.add(1).get_timeout(LONG).expect("sum"), 7 + n);
        }
        tally.add_in_vain(1).get_timeout(LONG).expect_err("in vain");
        assert_eq!(*tally.add(1).get_timeout(LONG).expect("sum"), 14);
        // Twice from the same state, then from one that a later life has saved.
        for _ in 0..2 {
            kill(tally.actor());
            assert_eq!(*tally.sum().get_timeout(LONG).expect("goes on"), 14);
        }
        assert_eq!(*tally.add(6).get_timeout(LONG).expect("sum"), 20);
        kill(tally.actor());
        assert_eq!(*tally.add(1).get_timeout(LONG).expect("goes on"), 21);
        let ballast = tally.ballast().get_timeout(LONG).expect("came along");
        assert_eq!(ballast.0, vec![7; bytes]);
    }
}

fn every_third(runtime: &Runtime) {
    let call = Tally::remote(0_u64, 0_usize).with_options(options(3, 0));
    let tally = runtime.spawn(call).expect("actor");
    let add = |times| {
        let sums: Vec<_> = (0..times).map(|_| tally.add(1)).collect();
        mobula_core::collect(&sums).expect("sums");
    };
    for (times, expected) in [(2, 0), (8, 6), (3, 9), (0, 9)] {
        add(times);
        // Looks are not counted.
        tally.sum().get_timeout(LONG).expect("sum");
        kill(tally.actor());
        assert_eq!(*tally.sum().get_timeout(LONG).expect("goes on"), expected);
    }
}

fn retried(runtime: &Runtime) {
    for bytes in [0, LARGE] {
        let dir = tempfile::tempdir().expect("temporary folder");
        let call = Tally::remote(100_u64, bytes).with_options(options(1, 1));
        let tally = runtime.spawn(call).expect("actor");
        let before: Vec<_> = (0..20).map(|_| tally.add(1)).collect();
        let dying = tally.add_and_die(100, dir.path().join("marker"));
        let after: Vec<_> = (0..20).map(|_| tally.add(1)).collect();
        for (n, sum) in (1..).zip(&before) {
            assert_eq!(*sum.get_timeout(LONG).expect("sum"), 100 + n);
        }
        assert_eq!(*dying.get_timeout(LONG).expect("the second time"), 220, "added once");
        for (n, sum) in (1..).zip(&after) {
            assert_eq!(*sum.get_timeout(LONG).expect("sum"), 220 + n);
        }
    }
}

fn panics(runtime: &Runtime) {
    let kinds = [
        ActorOptions::new("on a thread"),
        ActorOptions { placement: Placement::Process, ..ActorOptions::new("in a process") },
        options(1, 0),
    ];
    for (kind, bytes) in kinds.iter().flat_map(|kind| [(kind, 0), (kind, LARGE)]) {
        let call = Tally::remote(5_u64, bytes).with_options(kind.clone());
        let tally = runtime.spawn(call).expect("actor");
        for expected in [5, 6, 7] {
            let panicked = tally.add(99).get_timeout(LONG);
            assert!(matches!(panicked, Err(Error::TaskPanicked { .. })), "{panicked:?}");
            assert_eq!(*tally.sum().get_timeout(LONG).expect("rebuilt"), expected, "{}", kind.name);
            tally.add(1).get_timeout(LONG).expect("sum");
        }
        assert_eq!(tally.ballast().get_timeout(LONG).expect("came along").0, vec![7; bytes]);
    }
}

/// How often saves of the actor of this name have failed.
fn failures(runtime: &Runtime, name: &str) -> u64 {
    let status = runtime.status();
    let actor = status.actors.iter().find(|actor| actor.name == name).expect("is listed");
    actor.failed_checkpoints
}

fn failing_save(runtime: &Runtime) {
    for (place, flaw) in PLACES.iter().flat_map(|place| [(*place, "full"), (*place, "panic")]) {
        let name = format!("flawed by {flaw} in {place:?}");
        let kind = ActorOptions { name: name.clone(), placement: place, ..options(1, 0) };
        let tally = runtime.spawn(Tally::remote(5_u64, 0_usize).with_options(kind)).expect("actor");
        tally.add(1).get_timeout(LONG).expect("sum");
        assert_eq!(failures(runtime, &name), 0);
        tally.spoil(flaw.to_owned()).get_timeout(LONG).expect("the save is not its own");
        assert_eq!(*tally.add(1).get_timeout(LONG).expect("the change was made"), 7);
        assert_eq!(failures(runtime, &name), 2);
        if place == Placement::Process {
            kill(tally.actor());
        } else {
            tally.add(99).get_timeout(LONG).expect_err("panics");
        }
        assert_eq!(*tally.sum().get_timeout(LONG).expect("goes on"), 6, "{name}");
        assert_eq!(*tally.add(1).get_timeout(LONG).expect("saved again"), 7);
        assert_eq!(failures(runtime, &name), 2);
    }
}

fn failing_load(runtime: &Runtime) {
    let call = Tally::remote(5_u64, 0_usize).with_options(options(1, 0));
    let tally = runtime.spawn(call).expect("actor");
    tally.add(8).get_timeout(LONG).expect("sum");
    kill(tally.actor());
    let error = tally.sum().get_timeout(LONG).expect_err("cannot be restored").to_string();
    assert!(error.contains("tally was lost"), "{error}");
    assert!(!tally.actor().is_alive());
}

fn alone(runtime: &Runtime) {
    for place in PLACES {
        let name = format!("crowded in {place:?}");
        let kind = ActorOptions { name: name.clone(), placement: place, ..options(1, 0) };
        let call = Tally::remote(0_u64, 0_usize).with_options(kind).with_concurrency(4);
        let tally = runtime.spawn(call).expect("actor");
        let mut calls = Vec::new();
        for _ in 0..50 {
            calls.push(tally.add(1));
            calls.extend((0..3).map(|_| tally.sum()));
        }
        for (n, call) in calls.iter().enumerate() {
            assert_eq!(*call.get_timeout(LONG).expect("sum"), n as u64 / 4 + 1);
        }
        assert_eq!(failures(runtime, &name), 0, "nobody looks meanwhile");
    }
}

/// Neither `Send` nor `Sync`.
struct Local(std::rc::Rc<u64>);

#[remote(crate = mobula_core)]
impl Local {
    fn new() -> Self {
        Self::load(0)
    }

    #[checkpoint]
    fn save(&self) -> u64 {
        *self.0
    }

    #[restore]
    fn load(saved: u64) -> Self {
        Self(std::rc::Rc::new(saved))
    }

    fn count(&mut self) -> u64 {
        self.0 = std::rc::Rc::new(*self.0 + 1);
        assert_ne!(*self.0, 5, "the fifth");
        *self.0
    }
}

/// Saved as it is.
#[derive(Clone, Serialize, Deserialize)]
struct Whole(u64);

#[remote(crate = mobula_core)]
impl Whole {
    fn new() -> Self {
        Self(0)
    }

    #[checkpoint]
    fn save(&self) -> Self {
        self.clone()
    }

    #[restore]
    fn load(saved: Self) -> Self {
        saved
    }

    fn count(&mut self) -> u64 {
        self.0 += 1;
        self.0
    }
}

fn whole_state(runtime: &Runtime) {
    let whole = runtime.spawn(Whole::remote().with_options(options(1, 0))).expect("actor");
    assert_eq!(*whole.count().get_timeout(LONG).expect("counts"), 1);
    kill(whole.actor());
    assert_eq!(*whole.count().get_timeout(LONG).expect("goes on"), 2);
}

fn local_state(runtime: &Runtime) {
    for place in PLACES {
        let kind = ActorOptions { placement: place, ..options(2, 0) };
        let local = runtime.spawn(Local::remote().with_options(kind)).expect("actor");
        for n in [1, 2, 3] {
            assert_eq!(*local.count().get_timeout(LONG).expect("counts"), n);
        }
        if place == Placement::Process {
            kill(local.actor());
            assert_eq!(*local.count().get_timeout(LONG).expect("goes on from 2"), 3);
        }
        assert_eq!(*local.count().get_timeout(LONG).expect("saved"), 4);
        local.count().get_timeout(LONG).expect_err("the fifth");
        local.count().get_timeout(LONG).expect_err("is the fifth again");
    }
}

/// Whether this process was started by a test of this module.
pub(crate) fn requested() -> bool {
    std::env::var_os(MODE).is_some()
}

/// A driver of its own, which nobody else puts objects into.
pub(crate) fn run() -> Result<(), Box<dyn std::error::Error>> {
    let runtime = mobula_core::init_with(Resources::cpus(2.0))?;
    let tally = runtime.spawn(Tally::remote(0_u64, LARGE).with_options(options(1, 0)))?;
    let objects = || runtime.status().objects;
    for life in 0..3 {
        for n in 1..=20 {
            assert_eq!(*tally.add(1).get()?, 20 * life + n);
            assert_eq!(objects().count, 1, "the newest state");
        }
        // A process lets go of what the driver has taken; the newest stays mapped, not open.
        until("the process holds old states", || tally.segments().get().is_ok_and(|n| *n <= 1));
        kill(tally.actor());
    }
    assert_eq!(*tally.sum().get()?, 60);
    assert_eq!(objects().count, 1);
    drop(tally);
    until("the state outlives its actor", || objects().memory_bytes == 0);
    println!("done");
    Ok(())
}

fn until(not_yet: &str, done: impl Fn() -> bool) {
    let deadline = Instant::now() + LONG;
    while !done() {
        assert!(Instant::now() < deadline, "{not_yet}");
        std::thread::yield_now();
    }
}

fn newest_only(_: &Runtime) {
    let mut command = Command::new(std::env::current_exe().expect("this binary"));
    let output = command.env(MODE, "newest").stdin(Stdio::null()).output().expect("starts");
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(said.contains("done"), "{said}");
}
