//! The commands of `docs/guides/cluster.md`, as they stand there.

use crate::engines;
use crate::program::{Finished, command, finish};
use crate::rank::{PROGRAM, check_agreement, program, told, told_in};
use crate::slurm::{Slurm, poll};
use crate::{SlurmTest, Test};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

const GUIDE: &str = include_str!("../../docs/guides/cluster.md");

pub(crate) const TESTS: &[Test] =
    &[("guide::on_this_machine", on_this_machine), ("guide::kubernetes", kubernetes)];
pub(crate) const MPI_TESTS: &[Test] = &[("guide::mpirun", mpirun)];
pub(crate) const SLURM_TESTS: &[SlurmTest] = &[("guide::slurm", slurm), ("guide::srun", srun)];

/// The words of the one command that begins with `begin`.
fn words(begin: &str) -> Vec<&'static str> {
    let code = GUIDE.split("```text\n").skip(1).filter_map(|block| block.split("```").next());
    let mut lines = code.flat_map(str::lines).filter(|line| line.starts_with(begin));
    let line = lines.next().unwrap_or_else(|| panic!("no command {begin:?} in the guide"));
    assert_eq!(lines.next(), None, "one command {begin:?}");
    line.split_whitespace().collect()
}

/// A folder with `./program` in it.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("temporary folder");
    std::os::unix::fs::symlink(program(), folder.path().join(PROGRAM)).expect("a link");
    folder
}

fn finish_in(folder: &Path, mut command: Command) -> Finished {
    command.current_dir(folder);
    let ran = finish(command);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    ran
}

fn on_this_machine() {
    let ran = finish_in(folder().path(), command(&words("mobula launch --workers")[1..]));
    assert_eq!(check_agreement(&told(&ran.stdout)), [4], "{ran:?}");
}

fn kubernetes() {
    let ran = finish_in(folder().path(), command(&words("mobula launch --kubernetes")[1..]));
    assert!(ran.stdout.contains("kind: Job"), "{ran:?}");
}

fn mpirun() {
    let words = words("mpirun");
    let mut mpirun = engines::mpirun();
    mpirun.args(&words[1..]);
    let ran = finish_in(folder().path(), mpirun);
    assert_eq!(check_agreement(&told(&ran.stdout)), [4], "{ran:?}");
}

fn srun(slurm: &mut Slurm) {
    let words = words("srun");
    let mut srun = slurm.command(words[0]);
    srun.args(&words[1..]);
    let ran = finish_in(folder().path(), srun);
    assert_eq!(check_agreement(&told(&ran.stdout)).len(), 3, "{ran:?}");
}

fn slurm(slurm: &mut Slurm) {
    let folder = folder();
    let mut launch = command(&words("mobula launch --slurm")[1..]);
    launch.env("SLURM_CONF", slurm.configuration());
    let submitted = finish_in(folder.path(), launch);
    let logs = folder.path().join("runs/digits/logs");
    let log = || std::fs::read_dir(&logs).ok()?.flatten().next().map(|file| file.path());
    let enough = || Some(told_in(&log()?)).filter(|told| told.len() == 3);
    let told = poll(Duration::from_secs(60), enough);
    let told = told
        .unwrap_or_else(|| panic!("{submitted:?}\n{}", slurm.ask("scontrol", &["show", "job"])));
    assert_eq!(check_agreement(&told), [1, 1, 1]);
}
