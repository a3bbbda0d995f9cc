//! Copies that `srun` and `mpirun` have started.

use crate::program::{self, Finished};
use crate::rank::{ROLE, check_agreement, program, told};
use crate::slurm::{NODES, Slurm};
use crate::{SlurmTest, Test};
use mobula::World;
use mobula::world::Launcher;
use std::collections::BTreeSet;
use std::process::Command;

pub(crate) const SLURM_TESTS: &[SlurmTest] = &[
    ("slurm::six_ranks_on_three_nodes", six_ranks_on_three_nodes),
    ("slurm::ranks_on_one_node", ranks_on_one_node),
    ("slurm::two_steps_of_a_job_have_two_ports", two_steps_of_a_job_have_two_ports),
    ("slurm::a_shell_in_an_allocation_is_no_rank", a_shell_in_an_allocation_is_no_rank),
    ("slurm::each_rank_has_its_gpus", each_rank_has_its_gpus),
    ("slurm::copies_started_by_a_rank_are_ranks_of_their_own", copies_started_by_a_rank),
    ("slurm::a_node_is_killed_and_comes_back", a_node_is_killed_and_comes_back),
];

pub(crate) const MPI_TESTS: &[Test] = &[("mpirun::four_ranks", four_ranks_of_mpirun)];

/// Runs a command of Slurm to its end.
pub(crate) fn run(slurm: &Slurm, words: &[&str]) -> Finished {
    let mut command = slurm.command(words[0]);
    command.args(&words[1..]);
    program::finish(command)
}

fn srun(slurm: &Slurm, options: &[&str], arguments: &[&str]) -> Finished {
    let program = program();
    run(slurm, &[&["srun"], options, &[program.as_str(), ROLE], arguments].concat())
}

fn six_ranks_on_three_nodes(slurm: &mut Slurm) {
    let ran = srun(slurm, &["-N3", "-n6"], &["resolve"]);
    let told = told(&ran.stdout);
    assert_eq!(check_agreement(&told).iter().sum::<usize>(), 6, "{ran:?}");
    for told in &told {
        assert_eq!(told.world.launcher, Launcher::Slurm);
        assert_eq!(told.world.master_addr, NODES[0]);
        assert_eq!(told.variables["SLURMD_NODENAME"], NODES[told.world.node_rank]);
        // Its name resolves nowhere; Slurm knows the address.
        assert_eq!(told.master, Some(format!("127.0.0.11:{}", told.world.master_port)), "{ran:?}");
    }
    // Dealt out in turn: neighbours are on different nodes.
    let ran = srun(slurm, &["-N3", "-n6", "--ntasks-per-node=2", "--distribution=cyclic"], &[]);
    let told = crate::rank::told(&ran.stdout);
    assert_eq!(check_agreement(&told), [2, 2, 2], "{ran:?}");
    assert_eq!(told[1].world.node_rank, 1, "{ran:?}");
}

fn ranks_on_one_node(slurm: &mut Slurm) {
    let ran = srun(slurm, &["-N1"], &[]);
    assert_eq!(check_agreement(&told(&ran.stdout)), [1], "{ran:?}");
    let ran = srun(slurm, &["-N1", "-n3", "-w", "node2"], &[]);
    let told = told(&ran.stdout);
    assert_eq!(check_agreement(&told), [3], "{ran:?}");
    assert_eq!(told[0].world.master_addr, "node2", "{ran:?}");
}

fn two_steps_of_a_job_have_two_ports(slurm: &mut Slurm) {
    let step = format!("srun --overlap -n2 {} {ROLE}", program());
    let ran = run(slurm, &["salloc", "-N2", "-n2", "sh", "-c", &format!("{step}; {step}")]);
    let told = told(&ran.stdout);
    let ports: BTreeSet<u16> = told.iter().map(|told| told.world.master_port).collect();
    assert_eq!((told.len(), ports.len()), (4, 2), "{ran:?}");
}

fn a_shell_in_an_allocation_is_no_rank(slurm: &mut Slurm) {
    let alone = |ran: &Finished| {
        let told = told(&ran.stdout);
        assert_eq!(told.len(), 1, "{ran:?}");
        assert_eq!(told[0].world, World::alone(), "{ran:?}");
        assert!(told[0].variables.contains_key("SLURM_JOB_ID"), "{ran:?}");
    };
    let program = program();
    alone(&run(slurm, &["salloc", "-N2", "-n3", &program, ROLE]));

    let folder = tempfile::tempdir().expect("temporary folder");
    let file = folder.path().join("out");
    let out = format!("--output={}", file.display());
    let wrap = format!("--wrap={program} {ROLE}");
    let batch = ["sbatch", "--wait", "-N2", "-n3", &out, &wrap];
    let read = |ran: Finished| {
        assert_eq!(ran.code, Some(0), "{ran:?}");
        Finished { stdout: std::fs::read_to_string(&file).expect("output"), ..ran }
    };
    alone(&read(run(slurm, &batch)));
    // Submitted by a rank, whose variables the batch script inherits.
    let quoted: Vec<String> = batch.iter().map(|word| format!("'{word}'")).collect();
    let from_within = format!("[ $SLURM_PROCID != 1 ] || {}", quoted.join(" "));
    alone(&read(run(slurm, &["srun", "-n2", "sh", "-c", &from_within])));
}

fn each_rank_has_its_gpus(slurm: &mut Slurm) {
    let ran = srun(slurm, &["-N2", "--ntasks-per-node=2", "--gpus-per-task=1"], &[]);
    let told = told(&ran.stdout);
    assert_eq!(check_agreement(&told), [2, 2], "{ran:?}");
    let gpus: BTreeSet<_> = told
        .iter()
        .map(|told| (told.world.node_rank, told.variables["CUDA_VISIBLE_DEVICES"].clone()))
        .collect();
    let expected = [(0, "0"), (0, "1"), (1, "0"), (1, "1")].map(|(node, id)| (node, id.to_owned()));
    assert_eq!(gpus, BTreeSet::from(expected), "{ran:?}");
    assert_ne!(srun(slurm, &["-N1", "--gpus-per-node=3"], &[]).code, Some(0));
}

/// `mobula launch` inside of a step: its contract beats Slurm's.
fn copies_started_by_a_rank(slurm: &mut Slurm) {
    let (program, launch) = (program(), env!("CARGO_BIN_EXE_mobula"));
    let launch = [launch, "launch", "--workers", "2", "--", &program, ROLE];
    let ran = run(slurm, &[&["srun", "-N1", "-n1"], &launch[..]].concat());
    let told = told(&ran.stdout);
    assert_eq!(check_agreement(&told), [2], "{ran:?}");
    assert_eq!(told[0].world.launcher, Launcher::Torchrun, "{ran:?}");
}

/// For the tests to come, of what happens then.
fn a_node_is_killed_and_comes_back(slurm: &mut Slurm) {
    let folder = tempfile::tempdir().expect("temporary folder");
    let out = format!("--output={}/out", folder.path().display());
    let step = format!("--wrap=srun --no-kill {} {ROLE} wait", program());
    let ran = run(slurm, &["sbatch", "--parsable", "--no-kill", "-N3", &out, &step]);
    let job = ran.stdout.trim().to_owned();
    let deadline = std::time::Duration::from_secs(30);
    let output = folder.path().join("out");
    let begun = || (crate::rank::told_in(&output).len() == 3).then_some(());
    crate::slurm::poll(deadline, begun).expect("three ranks");
    assert!(!slurm.processes_of("node2").is_empty());
    slurm.kill_node("node2");
    let gone = || slurm.processes_of("node2").is_empty().then_some(());
    crate::slurm::poll(deadline, gone).expect("nothing runs on a node that was killed");
    assert!(!slurm.processes_of("node3").is_empty(), "the others run on");
    run(slurm, &["scancel", &job]);
    slurm.start_node("node2").expect("a node");
    slurm.wait_idle(deadline).expect("three nodes");
}

pub(crate) fn mpirun_is_missing() -> Option<String> {
    let version = Command::new("mpirun").arg("--version").output();
    let is_open = version.is_ok_and(|v| String::from_utf8_lossy(&v.stdout).contains("Open MPI"));
    (!is_open).then(|| "not installed: openmpi-bin".to_owned())
}

/// Where there are fewer CPUs than ranks, and continuous integration runs as root.
pub(crate) fn mpirun() -> Command {
    let mut mpirun = Command::new("mpirun");
    mpirun.args(["--mca", "btl", "self,tcp", "--oversubscribe"]);
    mpirun.env("OMPI_ALLOW_RUN_AS_ROOT", "1").env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
    mpirun
}

fn four_ranks_of_mpirun() {
    let mut mpirun = mpirun();
    mpirun.args(["-np", "4", &program(), ROLE]);
    let ran = program::finish(mpirun);
    let told = told(&ran.stdout);
    assert_eq!(check_agreement(&told), [4], "{ran:?}");
    assert_eq!(told[0].world.launcher, Launcher::OpenMpi, "{ran:?}");
    assert_eq!(told[0].world.master_addr, "127.0.0.1", "{ran:?}");
    assert_ne!(told[0].world.master_port, 0, "{ran:?}");
}
