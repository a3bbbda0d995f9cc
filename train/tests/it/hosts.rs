//! Training on two machines: copies of this program, as torchrun starts them, of two CPUs each.

use crate::Test;
use crate::digits::{Config, Harm, Outcome, train};
use mobula_core::world::free_port;
use mobula_core::{Resources, Runtime};
use mobula_train::{ScalingConfig, Trainer, TrainingResult};
use std::path::Path;
use std::process::{Command, Stdio};

/// Makes this program one of the copies, with a folder of its own.
const FOLDER: &str = "MOBULA_TEST_HOSTS";

pub(crate) const TESTS: &[Test] = &[("hosts::workers_on_two_machines_train_like_one", two)];

pub(crate) fn folder() -> Option<String> {
    std::env::var(FOLDER).ok()
}

/// The copy that drives, and copies that never leave `init`.
pub(crate) fn run(folder: &str) -> Result<(), Box<dyn std::error::Error>> {
    let runtime = mobula_core::init_with(Resources::cpus(2.0))?;
    assert_eq!(runtime.nodes().len(), 2);
    let marker = Path::new(folder).join("killed");
    let harm = Harm::KillOnce { at_step: 3, marker: marker.clone() };
    let four = fit(&runtime, 4, Config::new(6));
    let three = fit(&runtime, 3, Config { batch_size: 16, ..Config::new(6) });
    let killed = fit(&runtime, 4, Config { harm, ..Config::new(6) });
    let norms = fit(&runtime, 4, Config { resnet: true, ..Config::new(2) });
    let one = fit(&runtime, 1, Config::new(6));
    assert!(norms.values.iter().all(|rank| rank.buffers == norms.values[0].buffers));
    assert_eq!((four.restarts, killed.restarts, marker.exists()), (0, 1, true));
    assert_eq!(killed.values[0].weights, four.values[0].weights, "the same order of additions");
    for fit in [four, three] {
        let pairs = fit.values[0].weights.iter().zip(&one.values[0].weights);
        let difference = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(difference < 1e-4, "weights differ by {difference}");
    }
    Ok(())
}

fn fit(runtime: &Runtime, workers: usize, config: Config) -> TrainingResult<Outcome> {
    let trainer = Trainer::new(train::remote(config)).with_logs_shown(false);
    let fit = trainer.with_scaling(ScalingConfig::workers(workers)).fit(runtime).expect("fit");
    assert!(fit.values.iter().all(|rank| rank.weights == fit.values[0].weights));
    fit
}

fn two(_: &Runtime) {
    two_copies(FOLDER, |_| Vec::new());
}

/// Runs two copies of this program, as of two machines. `variable` tells them a folder, and what to do.
pub(crate) fn two_copies(variable: &str, more: impl Fn(usize) -> Vec<(&'static str, String)>) {
    let folder = tempfile::tempdir().expect("temporary folder");
    let port = free_port().expect("a port");
    let copies = [0, 1].map(|rank: usize| {
        let mut command = Command::new(std::env::current_exe().expect("this binary"));
        let numbers = [("RANK", rank), ("WORLD_SIZE", 2), ("GROUP_RANK", rank)];
        command.envs(numbers.map(|(name, number)| (name, number.to_string())));
        command.envs([
            ("LOCAL_RANK", "0"),
            ("LOCAL_WORLD_SIZE", "1"),
            ("MASTER_ADDR", "127.0.0.1"),
        ]);
        command.env("MASTER_PORT", port.to_string()).env("MOBULA_SECRET", "of this test");
        command.env(variable, folder.path()).current_dir(folder.path()).envs(more(rank));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().expect("starts")
    });
    for (rank, copy) in copies.into_iter().enumerate() {
        let ended = copy.wait_with_output().expect("ends");
        let text = String::from_utf8_lossy(&ended.stderr);
        assert!(ended.status.success(), "copy {rank}: {} {text}", ended.status);
    }
}
