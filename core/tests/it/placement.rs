//! Placement groups, named actors and pools.

use crate::Test;
use mobula_core::{
    ActorPoolOptions, Error, Placement, PlacementGroupOptions, PlacementStrategy, Resources,
    Runtime, Task, TaskOptions, collect, remote, wait,
};
use std::sync::mpsc::channel;
use std::time::Duration;

const LONG: Duration = Duration::from_secs(60);

pub(crate) const TESTS: &[Test] = &[
    ("placement::a_bundle_is_only_for_those_who_name_it", bundles),
    ("placement::a_group_that_never_fits_is_refused", never_fits),
    ("placement::what_waits_for_a_bundle_that_goes_is_refused", bundle_gone),
    ("placement::an_actor_is_found_by_its_name", named),
    ("placement::a_pool_grows_to_its_load", pool),
    ("placement::a_pool_replaces_dead_members", dead_members),
];

fn runtime() -> Runtime {
    Runtime::local(Resources::cpus(4.0).with_gpus(2.0)).expect("runtime")
}

fn two_bundles() -> PlacementGroupOptions {
    PlacementGroupOptions::new("pair", vec![Resources::cpus(1.0), Resources::cpus(2.0)])
}

fn bundles(_: &Runtime) {
    let runtime = runtime();
    let group = runtime.placement_group(&two_bundles()).expect("group");
    assert_eq!(runtime.free_resources().cpus, 1.0);
    let inside = |bundle, cpus| {
        let bundle = Some(group.bundle(bundle).expect("bundle"));
        let options =
            TaskOptions { resources: Resources::cpus(cpus), bundle, ..Default::default() };
        runtime.submit(Task::new("inside", || Ok::<_, Error>(1)).with_options(options))
    };
    inside(1, 2.0).get_timeout(LONG).expect("fits");
    let error = inside(0, 2.0).get_timeout(LONG).expect_err("2 > 1");
    assert!(matches!(error, Error::Unplaceable { .. }), "{error}");
    let outside = Task::new("outside", || Ok::<_, Error>(1)).with_resources(Resources::cpus(2.0));
    let outside = runtime.submit(outside);
    let (ready, pending) = wait(vec![outside], 1, Some(Duration::ZERO));
    assert!(ready.is_empty(), "only one CPU is left outside");
    let error = group.bundle(2).expect_err("two bundles").to_string();
    assert!(error.contains("has no bundle 2: it has 2"), "{error}");
    drop(group);
    collect(&pending).expect("all four are free again");
}

fn never_fits(_: &Runtime) {
    let options = PlacementGroupOptions::new("large", vec![Resources::cpus(3.0); 2]);
    let error = runtime().placement_group(&options).expect_err("6 > 4");
    assert!(matches!(&error, Error::Unplaceable { .. }), "{error}");
    let spread = two_bundles().with_strategy(PlacementStrategy::StrictSpread);
    assert!(runtime().placement_group(&spread).is_err(), "there is one node");
}

fn bundle_gone(_: &Runtime) {
    let runtime = runtime();
    let group = runtime.placement_group(&two_bundles()).expect("group");
    let options =
        || TaskOptions { bundle: Some(group.bundle(0).expect("bundle")), ..TaskOptions::default() };
    let (release, gate) = channel::<()>();
    let running = Task::new("running", move || gate.recv()).with_options(options());
    let running = runtime.submit(running);
    let waiting = Task::new("waiting", || Ok::<_, Error>(1)).with_options(options());
    let waiting = runtime.submit(waiting);
    drop(group);
    let error = waiting.get_timeout(LONG).expect_err("its bundle is gone");
    assert!(matches!(&error, Error::BundleGone { name } if name == "waiting"), "{error}");
    release.send(()).expect("it runs on");
    running.get_timeout(LONG).expect("it was left to finish");
    assert_eq!(runtime.free_resources().cpus, 4.0);
}

struct Echo(u64);

#[remote(crate = mobula_core)]
impl Echo {
    fn new(number: u64) -> Self {
        Self(number)
    }

    fn number(&self) -> u64 {
        self.0
    }

    fn wait_for(&self, file: std::path::PathBuf) -> u64 {
        while !file.exists() {
            std::thread::yield_now();
        }
        self.0
    }
}

fn named(runtime: &Runtime) {
    for place in [Placement::Thread, Placement::Process] {
        let echo = runtime.spawn(Echo::remote(7).named("seven").on(place)).expect("actor");
        let found = runtime.named_actor::<Echo>("seven").expect("found");
        assert_eq!(*found.number().get().expect("number"), 7);
        drop((echo, found));
        let error = runtime.named_actor::<Echo>("seven").expect_err("gone").to_string();
        assert!(error.contains("no actor named \"seven\""), "{error}");
    }
}

fn pool(_: &Runtime) {
    let dir = tempfile::tempdir().expect("temporary folder");
    let gate = dir.path().join("gate");
    let runtime = runtime();
    let options = ActorPoolOptions { grow_at: 1, ..ActorPoolOptions::elastic(1, 9) };
    let pool = runtime.actor_pool(options, |n| Echo::remote(n as u64)).expect("pool");
    let held: Vec<_> =
        (0..6).map(|_| pool.call(|echo| echo.wait_for(gate.clone())).expect("a member")).collect();
    assert_eq!(pool.size(), 4, "one a CPU, however many may be had");
    std::fs::write(&gate, "").expect("write");
    let mut members: Vec<u64> = collect(&held).expect("numbers").iter().map(|n| **n).collect();
    members.sort_unstable();
    members.dedup();
    assert_eq!(members, [0, 1, 2, 3], "all of them got work");
}

fn dead_members(runtime: &Runtime) {
    let make = |n| Echo::remote(n as u64).on(Placement::Process);
    let pool = runtime.actor_pool(ActorPoolOptions::fixed(2), make).expect("pool");
    for dead in 0..2 {
        let first = pool.call(Clone::clone).expect("a member");
        assert_eq!(*first.number().get().expect("number"), dead);
        first.actor().kill();
        assert!(first.number().get_timeout(LONG).is_err());
    }
    let number = pool.call(|echo| echo.number()).expect("a member").get_timeout(LONG);
    assert!(*number.expect("a new one") >= 2);
    assert_eq!(pool.size(), 2);
}
