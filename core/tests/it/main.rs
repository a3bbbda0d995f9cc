//! Core through its public interface. Worker processes are this same binary, so `init()` comes
//! first and the harness is libtest-mimic.

mod actors;
mod checkpoints;
mod concurrent_actors;
mod driver;
mod elastic;
mod fork_server;
mod graphs;
mod groups;
mod hygiene;
mod nested;
mod nested_groups;
mod nodes;
mod placement;
mod regroup;
mod remote_actors;
mod secrets;
mod status;
mod streams;
mod tasks;
mod upward;

use libtest_mimic::{Arguments, Trial};
use mobula_core::Runtime;
use std::time::{Duration, Instant};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    if driver::requested() {
        return driver::run();
    }
    if checkpoints::requested() {
        return checkpoints::run();
    }
    if fork_server::requested() {
        return fork_server::run();
    }
    if nodes::requested() {
        return nodes::run();
    }
    if status::requested() {
        return status::run();
    }
    if hygiene::requested() {
        return hygiene::run();
    }
    let runtime = mobula_core::init_with(mobula_core::Resources::cpus(4.0))?;
    let mut arguments = Arguments::from_args();
    // Tests share four logical CPUs: more at once would only wait for each other.
    arguments.test_threads.get_or_insert(2);
    let tests = [
        actors::TESTS,
        checkpoints::TESTS,
        concurrent_actors::TESTS,
        driver::TESTS,
        elastic::TESTS,
        fork_server::TESTS,
        graphs::TESTS,
        groups::TESTS,
        hygiene::TESTS,
        nested::TESTS,
        nested_groups::TESTS,
        nodes::TESTS,
        placement::TESTS,
        regroup::TESTS,
        remote_actors::TESTS,
        secrets::TESTS,
        status::TESTS,
        streams::TESTS,
        tasks::TESTS,
        upward::TESTS,
    ]
    .concat();
    let trials = tests.into_iter().map(|(name, test)| {
        let runtime = runtime.clone();
        Trial::test(name, move || {
            test(&runtime);
            Ok(())
        })
    });
    let conclusion = libtest_mimic::run(&arguments, trials.collect());
    if !conclusion.has_failed() {
        all_is_given_back(&runtime);
    }
    conclusion.exit();
}

/// Whatever the tests did to their tasks, no CPU may be lost.
fn all_is_given_back(runtime: &Runtime) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while runtime.free_resources() != runtime.resources() {
        assert!(Instant::now() < deadline, "free at the end: {}", runtime.free_resources());
        std::thread::yield_now();
    }
}

/// A test under its name.
type Test = (&'static str, fn(&Runtime));
