//! Training through its public interface, on real worker processes: `init()` comes first and the
//! harness is libtest-mimic.

mod checkpoints;
mod collectives;
mod compression;
mod devices;
mod digits;
mod elastic;
mod elsewhere;
mod faults;
mod fit;
mod hosts;
mod limits;
mod local;
mod loss_scale;
mod mirror;
mod models;
mod network;
mod optim;
mod overlap;
mod precision;
mod pytorch;
mod rollback;
mod shards;
mod stopping;
mod sync;
mod training;
mod updater;
mod zero;

use libtest_mimic::{Arguments, Trial};
use mobula_core::{Resources, Runtime};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    if let Some(folder) = hosts::folder() {
        return hosts::run(&folder);
    }
    #[cfg(feature = "cuda")]
    if let Some(folder) = devices::folder() {
        return devices::run(&folder);
    }
    if let Some(folder) = network::folder() {
        return network::run(&folder);
    }
    if let Some(folder) = limits::folder() {
        return limits::run(&folder);
    }
    if let Some(folder) = elastic::folder() {
        return elastic::run(&folder);
    }
    let gpus = Resources::of_this_machine().gpus;
    // Seats are for a test that nobody else is to disturb.
    let resources = Resources::cpus(4.0).with_gpus(gpus).with_custom("seat", 4.0);
    let runtime = mobula_core::init_with(resources)?;
    let mut arguments = Arguments::from_args();
    arguments.test_threads.get_or_insert(2);
    let tests = [
        checkpoints::TESTS,
        collectives::TESTS,
        compression::TESTS,
        devices::TESTS,
        elastic::TESTS,
        elsewhere::TESTS,
        faults::TESTS,
        fit::TESTS,
        hosts::TESTS,
        limits::TESTS,
        local::TESTS,
        loss_scale::TESTS,
        mirror::TESTS,
        models::TESTS,
        optim::TESTS,
        overlap::TESTS,
        precision::TESTS,
        pytorch::TESTS,
        rollback::TESTS,
        shards::TESTS,
        stopping::TESTS,
        sync::TESTS,
        training::TESTS,
        updater::TESTS,
        zero::TESTS,
    ]
    .concat();
    let trials = tests.into_iter().map(|(name, test)| {
        let runtime = runtime.clone();
        Trial::test(name, move || {
            test(&runtime);
            Ok(())
        })
    });
    libtest_mimic::run(&arguments, trials.chain(network::trials()).collect()).exit();
}

/// A test under its name.
type Test = (&'static str, fn(&Runtime));
