//! Launches as a user starts them: `mobula launch`, a real Slurm, `mpirun`. The program that is
//! launched is this one, which then tells what it finds itself to be.

#[path = "../cli/program.rs"]
mod program;
#[path = "../support/slurm.rs"]
mod slurm;

mod engines;
mod guide;
mod local;
mod manifests;
mod rank;
mod spread;
mod submitted;

use libtest_mimic::{Arguments, Completion, Failed, Trial};
use slurm::Slurm;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};

/// A test under its name.
type Test = (&'static str, fn());
/// One that has the cluster for itself.
type SlurmTest = (&'static str, fn(&mut Slurm));

fn main() -> ExitCode {
    if let Some(arguments) = rank::arguments() {
        return rank::run(&arguments);
    }
    let cluster = Cluster::default();
    let passed = |test: fn()| {
        test();
        Ok(())
    };
    let plain = [local::TESTS, manifests::TESTS, guide::TESTS, spread::TESTS].concat().into_iter();
    let plain = plain.map(|(name, test)| Trial::test(name, move || passed(test)));
    let mpi = [engines::MPI_TESTS, guide::MPI_TESTS, spread::MPI_TESTS].concat().into_iter().map(
        |(name, test)| {
            let missing = engines::mpirun_is_missing();
            Trial::ignorable_test(name, move || if_there(missing, || passed(test)))
        },
    );
    let slurm = [engines::SLURM_TESTS, submitted::TESTS, guide::SLURM_TESTS, spread::SLURM_TESTS]
        .concat()
        .into_iter()
        .map(|(name, test)| {
            let cluster = cluster.clone();
            Trial::ignorable_test(name, move || if_there(Slurm::missing(), || cluster.with(test)))
        });
    let trials = plain.chain(mpi).chain(slurm).collect();
    let conclusion = libtest_mimic::run(&Arguments::from_args(), trials);
    cluster.end();
    conclusion.exit_code()
}

/// Runs a test that needs other programs. Where they are not installed it is reported as ignored;
/// continuous integration must have them.
fn if_there(
    missing: Option<String>,
    test: impl FnOnce() -> Result<(), Failed>,
) -> Result<Completion, Failed> {
    match missing {
        None => test().map(|()| Completion::Completed),
        Some(reason) if std::env::var_os("CI").is_some() => Err(reason.into()),
        Some(reason) => Ok(Completion::ignored_with(reason)),
    }
}

/// The cluster of all tests, started by the first that needs it. One test at a time has it.
#[derive(Clone, Default)]
struct Cluster(Arc<Mutex<Option<Result<Slurm, String>>>>);

impl Cluster {
    fn with(&self, test: fn(&mut Slurm)) -> Result<(), Failed> {
        let mut cluster = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match cluster.get_or_insert_with(Slurm::start) {
            Ok(slurm) => {
                test(slurm);
                Ok(())
            }
            Err(reason) => Err(reason.as_str().into()),
        }
    }

    fn end(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}
