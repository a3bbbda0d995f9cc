//! Workers with GPUs. What needs one runs with the feature `cuda` where there is one.

use crate::Test;
use crate::digits::{Config, train};
use mobula_core::{Resources, Runtime};
use mobula_train::{Compression, LocalSgd, ScalingConfig, Trainer, Transport};

#[cfg(not(feature = "cuda"))]
pub(crate) const TESTS: &[Test] = &[
    ("devices::gpus_need_a_feature", refused),
    ("devices::sums_on_gpus_have_conditions", conditions),
];

#[cfg(feature = "cuda")]
pub(crate) const TESTS: &[Test] = &[
    ("devices::threads_have_no_gpus", refused),
    ("devices::sums_on_gpus_have_conditions", conditions),
    ("devices::workers_on_one_gpu_train_like_one_on_the_cpu", cuda::worlds_agree),
    ("devices::so_do_batch_norms", cuda::batch_norms),
    ("devices::half_precision_is_scaled", cuda::half),
    ("devices::optimizers_give_the_bits_of_the_cpu", cuda::optimizers),
    ("devices::a_run_on_a_gpu_resumes_to_the_same_bits", cuda::resumes),
    ("devices::a_run_moves_between_devices", cuda::moves),
    ("devices::a_worker_by_itself_sums_by_nccl", cuda::alone_by_nccl),
    ("devices::two_workers_sum_by_nccl", cuda::by_nccl),
];

#[cfg(feature = "cuda")]
pub(crate) use cuda::{folder, run};

fn refused(runtime: &Runtime) {
    let one = ScalingConfig {
        resources_per_worker: Resources::cpus(1.0).with_gpus(0.5),
        placement: mobula_core::Placement::Thread,
        ..ScalingConfig::default()
    };
    let trainer = Trainer::new(train::remote(Config::new(1))).with_scaling(one);
    let error = trainer.fit(runtime).expect_err("no GPUs").to_string();
    let expected = match cfg!(feature = "cuda") {
        true => "workers that hold 0.5 GPU need `placement` to be `Placement::Process`",
        false => "workers that hold 0.5 GPU need to be built with the feature `cuda`",
    };
    assert_eq!(error, expected);
}

fn conditions(runtime: &Runtime) {
    let nccl = ScalingConfig { transport: Transport::Nccl, ..ScalingConfig::workers(2) };
    let on_gpus =
        ScalingConfig { resources_per_worker: Resources::cpus(1.0).with_gpus(1.0), ..nccl.clone() };
    let in_shards = ScalingConfig { virtual_shards: Some(4), ..on_gpus.clone() };
    let rounded = ScalingConfig { compression: Compression::Bf16, ..on_gpus.clone() };
    let local = ScalingConfig { local_sgd: Some(LocalSgd::average(4)), ..on_gpus.clone() };
    let half = Resources::cpus(1.0).with_gpus(0.5);
    let shared = ScalingConfig { resources_per_worker: half, ..on_gpus };
    for scaling in [nccl, in_shards, rounded, local, shared] {
        let trainer = Trainer::new(train::remote(Config::new(1))).with_scaling(scaling);
        let error = trainer.fit(runtime).expect_err("refused").to_string();
        assert!(error.contains("transport") && error.contains("without a GPU for each"), "{error}");
    }
}

#[cfg(feature = "cuda")]
mod cuda {
    use super::*;
    use crate::digits::{Harm, Outcome};
    use crate::elsewhere::assert_same_bits_on;
    use crate::hosts::two_copies;
    use candle_core::Device;
    use mobula_core::RunDir;
    use mobula_train::TrainingResult;
    use mobula_train::optim::{LossScaleOptions, UpdaterOptions};
    use std::time::Duration;

    fn is_missing() -> bool {
        let is_missing = Resources::of_this_machine().gpus == 0.0;
        if is_missing {
            eprintln!("SKIPPED: this machine has no CUDA device, so nothing ran on one");
        }
        is_missing
    }

    fn scaling(workers: usize, gpus: f64) -> ScalingConfig {
        ScalingConfig {
            resources_per_worker: Resources::cpus(1.0).with_gpus(gpus),
            ..ScalingConfig::workers(workers)
        }
    }

    fn fit(
        runtime: &Runtime,
        workers: usize,
        gpus: f64,
        config: Config,
        run: Option<&RunDir>,
    ) -> TrainingResult<Outcome> {
        fit_by(runtime, scaling(workers, gpus), config, run)
    }

    fn fit_by(
        runtime: &Runtime,
        scaling: ScalingConfig,
        config: Config,
        run: Option<&RunDir>,
    ) -> TrainingResult<Outcome> {
        let gpus = scaling.resources_per_worker.gpus;
        let trainer = Trainer::new(train::remote(config)).with_logs_shown(false);
        let trainer = run.into_iter().fold(trainer, Trainer::with_run);
        let fit = trainer.with_scaling(scaling).fit(runtime).expect("fit");
        assert!(fit.values.iter().all(|rank| rank.is_on_gpu == (gpus > 0.0)));
        assert!(fit.values.iter().all(|rank| rank.weights == fit.values[0].weights));
        fit
    }

    fn assert_near(a: &[f32], b: &[f32]) {
        assert_eq!(a.len(), b.len());
        let difference = a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(difference < 1e-4, "they differ by {difference}");
    }

    fn assert_agreement(runtime: &Runtime, config: impl Fn() -> Config) {
        let here = fit(runtime, 1, 0.0, config(), None);
        for (workers, gpus) in [(1, 1.0), (2, 0.5)] {
            let there = fit(runtime, workers, gpus, config(), None);
            assert_near(&there.values[0].weights, &here.values[0].weights);
            assert_eq!(there.values[0].accuracy, here.values[0].accuracy);
            assert!(there.values[0].accuracy > 0.9);
        }
    }

    pub(super) fn worlds_agree(runtime: &Runtime) {
        if !is_missing() {
            // 89 of 90 rows: one rank has none in the last step.
            assert_agreement(runtime, || Config { batch_size: 89, ..Config::new(20) });
        }
    }

    pub(super) fn batch_norms(runtime: &Runtime) {
        if is_missing() {
            return;
        }
        let config = || Config { resnet: true, batch_size: 45, ..Config::new(2) };
        let here = fit(runtime, 1, 0.0, config(), None);
        let there = fit(runtime, 1, 1.0, config(), None);
        assert_near(&here.values[0].weights, &there.values[0].weights);
        for (name, buffer) in &here.values[0].buffers {
            assert_near(buffer, &there.values[0].buffers[name]);
        }
    }

    /// Gradients of logits in `f16` on one of two ranks, with a scale that overflows at first.
    pub(super) fn half(runtime: &Runtime) {
        if is_missing() {
            return;
        }
        let options = LossScaleOptions { init_scale: 16_777_216.0, ..Default::default() };
        let updater = UpdaterOptions { loss_scale: Some(options), ..Default::default() };
        for (workers, gpus) in [(2, 0.5), (1, 1.0)] {
            let updater = Some(updater.clone());
            let config = Config { updater, harm: Harm::Half, ..Config::new(12) };
            let fit = fit(runtime, workers, gpus, config, None);
            assert!(fit.metrics["skipped_steps"] >= 3.0, "{:?}", fit.metrics);
            assert!(fit.metrics["accuracy"] > 0.5, "{:?}", fit.metrics);
        }
    }

    pub(super) fn optimizers(_: &Runtime) {
        if !is_missing() {
            assert_same_bits_on(&Device::new_cuda_with_stream(0).expect("a GPU"));
        }
    }

    pub(super) fn resumes(runtime: &Runtime) {
        if is_missing() {
            return;
        }
        for (workers, gpus) in [(2, 0.5), (1, 1.0)] {
            let whole = fit(runtime, workers, gpus, Config::new(4), None);
            let root = tempfile::tempdir().expect("temporary folder");
            let run = RunDir::create(root.path(), "stopped", 5, &()).expect("run");
            fit(runtime, workers, gpus, Config::new(2), Some(&run));
            let resumed = fit(runtime, workers, gpus, Config::new(4), Some(&run));
            assert!(resumed.values[0].began_at > 0);
            assert_eq!(resumed.values[0].weights, whole.values[0].weights);
        }
    }

    /// A checkpoint of a GPU goes on on the CPU, and the other way round.
    pub(super) fn moves(runtime: &Runtime) {
        if is_missing() {
            return;
        }
        let whole = fit(runtime, 1, 0.0, Config::new(4), None);
        for gpus in [0.0, 1.0] {
            let root = tempfile::tempdir().expect("temporary folder");
            let run = RunDir::create(root.path(), "moved", 5, &()).expect("run");
            fit(runtime, 1, gpus, Config::new(2), Some(&run));
            let moved = fit(runtime, 1, 1.0 - gpus, Config::new(4), Some(&run));
            assert!(moved.values[0].began_at > 0);
            assert_near(&moved.values[0].weights, &whole.values[0].weights);
        }
    }

    fn lacks_nccl() -> bool {
        let version = mobula_train::nccl_version();
        match &version {
            Ok(version) => eprintln!("NCCL {version}"),
            Err(error) => eprintln!("SKIPPED: {error}, so nothing was summed by it"),
        }
        version.is_err()
    }

    /// All that there is to it but other ranks: what it sums are the gradients as they are.
    pub(super) fn alone_by_nccl(runtime: &Runtime) {
        if is_missing() || lacks_nccl() {
            return;
        }
        let nccl = ScalingConfig { transport: Transport::Nccl, ..scaling(1, 1.0) };
        let by_nccl = fit_by(runtime, nccl, Config::new(5), None);
        let without = fit(runtime, 1, 1.0, Config::new(5), None);
        assert_eq!(by_nccl.values[0].weights, without.values[0].weights);
    }

    /// Makes this program one of two copies, each with a worker on the first GPU.
    const FOLDER: &str = "MOBULA_TEST_GPUS";

    pub(crate) fn folder() -> Option<String> {
        std::env::var(FOLDER).ok()
    }

    /// NCCL refuses two ranks on one GPU of a machine, so each copy says to be another one.
    pub(super) fn by_nccl(_: &Runtime) {
        if !is_missing() && !lacks_nccl() {
            two_copies(FOLDER, |rank| {
                let machine = ("NCCL_HOSTID", format!("machine {rank}"));
                vec![machine, ("NCCL_SOCKET_IFNAME", "lo".to_owned())]
            });
        }
    }

    /// The copy that drives, and one that never leaves `init`.
    pub(crate) fn run(folder: &str) -> Result<(), Box<dyn std::error::Error>> {
        let runtime = mobula_core::init_with(Resources::cpus(2.0).with_gpus(1.0))?;
        let by = |transport, config| {
            let scaling = ScalingConfig { transport, ..scaling(2, 1.0) };
            fit_by(&runtime, scaling, config, None)
        };
        // 89 of 90 rows: one rank has none in the last step.
        let config = || Config { batch_size: 89, ..Config::new(5) };
        let by_nccl = by(Transport::Nccl, config());
        let by_sockets = by(Transport::Auto, config());
        assert_near(&by_nccl.values[0].weights, &by_sockets.values[0].weights);
        let norms = by(Transport::Nccl, Config { resnet: true, ..Config::new(2) });
        assert_eq!(norms.values[0].buffers, norms.values[1].buffers);
        assert_eq!(by_nccl.restarts, 0);
        let marker = |name: String| std::path::Path::new(folder).join(name);
        let first = Harm::KillOnce { at_step: 3, marker: marker("before".to_owned()) };
        // Some of these are in the middle of a sum.
        let later = [0, 1, 2, 5, 10, 20, 40].map(|ms| Harm::KillAfter {
            at_step: 3,
            wait: Duration::from_millis(ms),
            marker: marker(format!("after-{ms}")),
        });
        let before = by(Transport::Nccl, Config { harm: first, ..config() });
        assert_eq!(before.restarts, 1);
        assert_eq!(before.values[0].weights, by_nccl.values[0].weights);
        for harm in later {
            // A training may be over by then.
            let killed = by(Transport::Nccl, Config { harm: harm.clone(), ..config() });
            assert!(killed.restarts <= 1, "{harm:?}");
            assert_eq!(killed.values[0].weights, by_nccl.values[0].weights, "{harm:?}");
        }
        Ok(())
    }
}
