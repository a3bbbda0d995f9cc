//! Typed actors, on threads and in processes of their own.

use crate::Test;
use mobula_core::{ActorOptions, Error, Placement, Resources, RestartPolicy, Runtime, remote};
use std::time::Duration;

const LONG: Duration = Duration::from_secs(60);
const PLACES: [Placement; 2] = [Placement::Thread, Placement::Process];

pub(crate) const TESTS: &[Test] = &[
    ("remote_actors::calls_keep_their_order_and_their_state", order),
    ("remote_actors::errors_and_panics_are_the_callers", errors),
    ("remote_actors::a_constructor_that_fails_is_an_error", bad_constructor),
    ("remote_actors::a_lost_process_is_started_again_if_asked", restarts),
    ("remote_actors::a_lost_process_is_an_error_otherwise", lost),
    ("remote_actors::calls_under_way_are_retried_if_asked", retries),
    ("remote_actors::a_full_mailbox_refuses", full),
    ("remote_actors::objects_are_arguments", objects),
    ("remote_actors::the_last_handle_ends_the_process", last_handle),
];

struct Counter {
    count: u64,
}

#[remote(crate = mobula_core)]
impl Counter {
    fn new(count: u64) -> Result<Self, String> {
        if count == 13 { Err("13 is no start".to_owned()) } else { Ok(Self { count }) }
    }

    /// Adds, and gives the sum.
    fn add(&mut self, n: u64) -> u64 {
        self.count += n;
        self.count
    }

    fn divide(&mut self, by: u64) -> Result<u64, String> {
        assert!(by != 99, "99 is too much");
        self.count.checked_div(by).ok_or_else(|| "by zero".to_owned())
    }

    fn pid(&self) -> u32 {
        std::process::id()
    }

    /// Kills its process the first time; the file remembers that there was a first time.
    fn die_once(&self, marker: std::path::PathBuf) -> Result<u64, std::io::Error> {
        if marker.exists() {
            return Ok(self.count);
        }
        std::fs::write(&marker, "")?;
        std::process::abort();
    }

    fn wait_for(&self, file: std::path::PathBuf) {
        while !file.exists() {
            std::thread::yield_now();
        }
    }
}

fn order(runtime: &Runtime) {
    for place in PLACES {
        let counter = runtime.spawn(Counter::remote(5).on(place)).expect("actor");
        let sums: Vec<_> = (1..=500).map(|n| counter.add(n)).collect();
        let mut expected = 5;
        for (n, sum) in (1..=500).zip(&sums) {
            expected += n;
            assert_eq!(*sum.get_timeout(LONG).expect("sum"), expected);
        }
        let here = *counter.pid().get().expect("pid") == std::process::id();
        assert_eq!(here, place == Placement::Thread);
        assert_eq!(counter.actor().pending(), 0);
    }
}

fn errors(runtime: &Runtime) {
    for place in PLACES {
        let counter = runtime.spawn(Counter::remote(5).on(place)).expect("actor");
        counter.add(5).get().expect("sum");
        let error = counter.divide(0).get().expect_err("by zero").to_string();
        assert!(error.ends_with("Counter::divide failed: by zero"), "{error}");
        assert_eq!(*counter.add(0).get().expect("an error leaves the state"), 10);
        let panicked = counter.divide(99).get();
        assert!(
            matches!(&panicked, Err(Error::TaskPanicked { message, location, .. })
            if message == "99 is too much" && location.contains("remote_actors.rs")),
            "{panicked:?}"
        );
        assert_eq!(*counter.add(0).get().expect("rebuilt"), 5, "a panic loses the state");
    }
}

fn bad_constructor(runtime: &Runtime) {
    for place in PLACES {
        let error = runtime.spawn(Counter::remote(13).on(place)).expect_err("13").to_string();
        assert!(error.contains("13 is no start"), "{error}");
    }
    let task = Counter::remote(1).with_resources(Resources::cpus(64.0));
    assert!(matches!(runtime.spawn(task), Err(Error::Unplaceable { .. })));
}

fn restartable(max_restarts: u32, max_task_retries: u32) -> ActorOptions {
    ActorOptions {
        placement: Placement::Process,
        restart: RestartPolicy::at_most(max_restarts),
        max_task_retries,
        ..ActorOptions::new("counter")
    }
}

fn restarts(runtime: &Runtime) {
    let dir = tempfile::tempdir().expect("temporary folder");
    let call = Counter::remote(7).with_options(restartable(1, 0));
    let counter = runtime.spawn(call).expect("actor");
    counter.add(1).get().expect("sum");
    let dying = counter.die_once(dir.path().join("marker"));
    // These were not begun, so they wait for the next process.
    let waiting: Vec<_> = (0..10).map(|_| counter.add(1)).collect();
    let error = dying.get_timeout(LONG).expect_err("it died").to_string();
    assert!(error.contains("counter was lost") && error.contains("signal 6"), "{error}");
    let sums: Vec<u64> = waiting.iter().map(|sum| *sum.get_timeout(LONG).expect("sum")).collect();
    assert_eq!(sums, (8..18).collect::<Vec<_>>(), "built anew, nothing lost, in order");
}

fn lost(runtime: &Runtime) {
    let dir = tempfile::tempdir().expect("temporary folder");
    let counter = runtime.spawn(Counter::remote(7).on(Placement::Process)).expect("actor");
    let dying = counter.die_once(dir.path().join("marker"));
    assert!(matches!(dying.get_timeout(LONG), Err(Error::WorkerLost { .. })));
    let after = counter.add(1).get_timeout(LONG);
    assert!(matches!(after, Err(Error::WorkerLost { .. })), "{after:?}");
}

fn retries(runtime: &Runtime) {
    let dir = tempfile::tempdir().expect("temporary folder");
    let call = Counter::remote(7).with_options(restartable(1, 1));
    let counter = runtime.spawn(call).expect("actor");
    let count = counter.die_once(dir.path().join("marker"));
    assert_eq!(*count.get_timeout(LONG).expect("the second time"), 7);
}

fn full(runtime: &Runtime) {
    let dir = tempfile::tempdir().expect("temporary folder");
    let gate = dir.path().join("gate");
    for place in PLACES {
        let options = ActorOptions { mailbox: 2, placement: place, ..ActorOptions::new("small") };
        let counter = runtime.spawn(Counter::remote(0).with_options(options)).expect("actor");
        let held = counter.wait_for(gate.clone());
        let waiting = counter.try_add(1).expect("room for two");
        let refused = counter.try_add(1).expect_err("full");
        assert!(refused.is_overloaded(), "{refused}");
        std::fs::write(&gate, "").expect("write");
        held.get_timeout(LONG).expect("released");
        assert_eq!(*waiting.get_timeout(LONG).expect("sum"), 1);
        assert_eq!(*counter.add(1).get().expect("room again"), 2);
        std::fs::remove_file(&gate).expect("remove");
    }
}

fn objects(runtime: &Runtime) {
    let counter =
        runtime.spawn(Counter::remote(runtime.put(2)).on(Placement::Process)).expect("actor");
    let four = counter.add(2);
    let eight = counter.add(&four);
    assert_eq!(*eight.get().expect("sum"), 8);
    let next = mobula_core::Task::with_inputs("next", (eight,), |(n,)| Ok::<_, Error>(*n + 1));
    assert_eq!(*runtime.submit(next).get().expect("nine"), 9);
}

fn last_handle(runtime: &Runtime) {
    let counter = runtime.spawn(Counter::remote(1).on(Placement::Process)).expect("actor");
    let pid = counter.actor().pid().expect("a process");
    let last = counter.add(1);
    drop(counter);
    assert_eq!(*last.get_timeout(LONG).expect("what was sent is done"), 2);
    crate::driver::assert_gone(&pid.to_string());
}
