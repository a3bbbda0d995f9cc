//! The network between two machines is cut: copies of this program in network namespaces of their
//! own, and the link between these goes down. Needs Linux's `ip` and `unshare`, and the right to make
//! namespaces; where that is missing, the test says so and counts as ignored.

use crate::digits::{Config, Outcome, train};
use libtest_mimic::{Completion, Failed, Trial};
use mobula_core::{BoxError, Node, Placement, Resources, RunDir, Runtime, TaskOptions, remote};
use mobula_train::{CheckpointConfig, Error, ScalingConfig, Trainer, TrainingResult};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Makes this program one of the copies, with a folder of its own.
const FOLDER: &str = "MOBULA_TEST_NETWORK";
/// A machine is lost when it has been silent for 4 seconds; the rest is for a slow one.
const NOTICED: Duration = Duration::from_secs(20);
const LONG: Duration = Duration::from_secs(60);

/// Two machines with a cable: the first makes the second, which waits for its end of the cable. When
/// the driver has ended, the cable is back, and the second machine hears that the driver is gone.
const MACHINES: &str = r#"
PATH=$PATH:/usr/sbin:/sbin
ip link set lo up
ip link add cable type veth peer name far
ip addr add 10.77.0.1/24 dev cable
ip link set cable up
RANK=1 GROUP_RANK=1 unshare --net sh -c '
    touch made
    until ip addr add 10.77.0.2/24 dev far 2>/dev/null; do sleep 0.02; done
    ip link set lo up
    ip link set far up
    exec "$0"' "$0" 2>far.txt &
far=$!
until [ -e made ]; do sleep 0.02; done
ip link set far netns $far || exit 99
RANK=0 GROUP_RANK=0 "$0"
status=$?
ip link set cable up
wait $far
exit $status
"#;

pub(crate) fn folder() -> Option<String> {
    std::env::var(FOLDER).ok()
}

pub(crate) fn trials() -> Vec<Trial> {
    let name = "network::training_goes_on_with_what_a_cut_leaves";
    let run = || match missing() {
        None => {
            cut();
            Ok::<_, Failed>(Completion::Completed)
        }
        Some(reason) => Ok(Completion::ignored_with(reason)),
    };
    vec![Trial::ignorable_test(name, run)]
}

fn in_namespaces(script: &str) -> Command {
    // Ends itself and all of its children.
    let mut command = Command::new("timeout");
    command.args(["--kill-after=5", "100", "unshare", "--user", "--map-root-user", "--net"]);
    command.args(["sh", "-c", script]).arg(std::env::current_exe().expect("this binary"));
    command.stdin(Stdio::null());
    command
}

/// Why there can be no network to be cut.
fn missing() -> Option<String> {
    let probe = "PATH=$PATH:/usr/sbin:/sbin
        ip link add near type veth peer name far && unshare --net true";
    match in_namespaces(probe).output() {
        Ok(output) if output.status.success() => None,
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr);
            Some(format!("no network namespaces with veth here: {}", said.trim()))
        }
        Err(error) => Some(format!("no `timeout` or `unshare` here: {error}")),
    }
}

fn cut() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let mut command = in_namespaces(MACHINES);
    command.envs([("WORLD_SIZE", "2"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1")]);
    command.envs([("MASTER_ADDR", "10.77.0.1"), ("MASTER_PORT", "29400")]);
    command.env("MOBULA_SECRET", "of this test");
    command.env(FOLDER, folder.path()).current_dir(folder.path());
    let output = command.output().expect("starts");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let far = std::fs::read_to_string(folder.path().join("far.txt")).unwrap_or_default();
    let said = format!("{said}\non the other machine: {far}");
    assert!(output.status.success(), "{}: {said}", output.status);
    assert!(said.contains("was lost: it sent no heartbeat for 4s"), "{said}");
    assert!(said.contains("continuing from step"), "{said}");
    // It has ended, since the script waits for it.
    assert!(said.contains("the driver is gone"), "{said}");
}

/// The copy that drives; the other one never leaves `init`.
pub(crate) fn run(folder: &str) -> Result<(), Box<dyn std::error::Error>> {
    let runtime = mobula_core::init_with(Resources::cpus(2.0))?;
    assert_eq!(runtime.nodes().len(), 2);
    one_on_each(&runtime, Path::new(folder))
}

#[remote(crate = mobula_core)]
fn hold(until: PathBuf) -> Result<(), BoxError> {
    let begun = Instant::now();
    while !until.exists() && begun.elapsed() < LONG {
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// With one CPU of the driver's machine taken until the cut, each has one of two workers.
fn one_on_each(runtime: &Runtime, folder: &Path) -> Result<(), Box<dyn std::error::Error>> {
    let cut = folder.join("cut");
    let (placement, node) = (Placement::Process, Some(Node::HERE));
    let options = TaskOptions { placement, node, ..TaskOptions::default() };
    let held = runtime.submit(hold::remote(cut).with_options(options));
    let disturbed = train_and_cut(runtime, folder)?;
    held.get()?;
    assert_eq!(disturbed.restarts, 1);
    // Two numbers have one sum, wherever it is made; and no step is lost.
    let config = Config::new(EPOCHS);
    let alone = Trainer::new(train::remote(config)).with_logs_shown(false);
    let alone = alone.with_scaling(ScalingConfig::workers(2)).fit(runtime)?;
    assert_eq!(disturbed.values[0].weights, alone.values[0].weights);
    Ok(())
}

/// So many that training has not ended when the cable is cut.
const EPOCHS: u64 = 600;

/// Cuts the cable in the middle of the training.
fn train_and_cut(runtime: &Runtime, folder: &Path) -> Result<TrainingResult<Outcome>, Error> {
    let run = RunDir::create(folder, "run", 5, &())?;
    let metrics = run.path().join("metrics.jsonl");
    let marker = folder.join("cut");
    let cutter = std::thread::spawn(move || {
        let begun = Instant::now();
        let epochs = || std::fs::read_to_string(&metrics).unwrap_or_default().lines().count();
        while epochs() < 20 && begun.elapsed() < LONG {
            std::thread::sleep(Duration::from_millis(5));
        }
        let done = Command::new("ip").args(["link", "set", "cable", "down"]).status();
        assert!(done.expect("ip").success(), "the cable is cut");
        std::fs::write(marker, "").expect("marker");
        Instant::now()
    });
    let rarely = CheckpointConfig { every_epochs: u64::MAX, ..CheckpointConfig::default() };
    let trainer = Trainer::new(train::remote(Config::new(EPOCHS))).with_logs_shown(false);
    let trainer = trainer.with_run(&run).with_checkpoints(rarely);
    let fit = trainer.with_scaling(ScalingConfig::workers(2)).fit(runtime);
    let since = cutter.join().expect("cuts").elapsed();
    assert!(since < NOTICED, "over {since:?} after the cut");
    fit
}
