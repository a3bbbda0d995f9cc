//! Jobs that `mobula launch --slurm` has submitted.

use crate::SlurmTest;
use crate::program::{self, Finished};
use crate::rank::{ROLE, Told, check_agreement, program, told_in};
use crate::slurm::{Slurm, poll};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

pub(crate) const TESTS: &[SlurmTest] = &[
    ("slurm::a_job_is_written_and_submitted", a_job_is_written_and_submitted),
    ("slurm::a_job_that_fails_is_requeued", a_job_that_fails_is_requeued),
    ("slurm::a_job_near_its_time_limit_is_requeued", a_job_near_its_time_limit_is_requeued),
    ("slurm::a_job_that_is_cancelled_is_not_requeued", a_job_that_is_cancelled_is_not_requeued),
    ("slurm::what_sbatch_refuses_is_one_line", what_sbatch_refuses_is_one_line),
];

/// Jobs of a second; a busy machine takes several.
const DEADLINE: Duration = Duration::from_secs(60);

/// After it, the clock shows another second for sure.
const NEXT_SECOND: Duration = Duration::from_millis(1500);

/// A job in a folder whose name a shell would take apart.
struct Job<'a> {
    slurm: &'a Slurm,
    folder: tempfile::TempDir,
    id: String,
}

impl<'a> Job<'a> {
    fn submit(slurm: &'a Slurm, options: &[&str], arguments: &[&str]) -> Self {
        let folder = tempfile::Builder::new().prefix("it's a 100% #1 & ").tempdir();
        let folder = folder.expect("temporary folder");
        let submitted = launch(slurm, folder.path(), options, arguments);
        assert_eq!(submitted.code, Some(0), "{submitted:?}");
        let id = submitted.stdout.strip_prefix("submitted job ").and_then(|s| s.split(',').next());
        let id = id.unwrap_or_else(|| panic!("a number in {submitted:?}")).to_owned();
        Self { slurm, folder, id }
    }

    fn run_dir(&self) -> PathBuf {
        self.folder.path().canonicalize().expect("the folder").join("runs/r")
    }

    fn log(&self) -> PathBuf {
        self.run_dir().join(format!("logs/slurm-{}.log", self.id))
    }

    /// What `squeue` says, empty once the job is over.
    fn state(&self) -> String {
        let state = self.slurm.ask("squeue", &["-h", "-j", &self.id, "-o", "%T"]);
        if state.is_empty() { "OVER".to_owned() } else { state }
    }

    /// The last word about a job that is over.
    fn end(&self) -> String {
        let text = self.slurm.ask("scontrol", &["--oneliner", "show", "job", &self.id]);
        let state = text.split_whitespace().find_map(|word| word.strip_prefix("JobState="));
        state.unwrap_or_else(|| panic!("no state in {text:?}")).to_owned()
    }

    /// Waits until this many copies have told who they are.
    fn wait_told(&self, count: usize) -> Vec<Told> {
        let enough = || Some(told_in(&self.log())).filter(|told| told.len() >= count);
        poll(DEADLINE, enough).unwrap_or_else(|| self.give_up("nobody told anything"))
    }

    fn wait_over(&self) {
        let over = || (self.state() == "OVER").then_some(());
        poll(DEADLINE, over).unwrap_or_else(|| self.give_up("it goes on"));
    }

    /// Slurm holds back a job that was requeued, for two minutes: too long for a test. But not at
    /// once: a node refuses what was begun in the second in which the job ended there before.
    fn wait_told_after_requeue(&self, count: usize) -> Vec<Told> {
        let update = format!("JobId={}", self.id);
        let mut requeued = None;
        let enough = || {
            // Before it has told anything it waits for its first start.
            let has_run = !told_in(&self.log()).is_empty();
            let is_pending = has_run && self.state() == "PENDING";
            if is_pending && requeued.get_or_insert_with(Instant::now).elapsed() > NEXT_SECOND {
                self.slurm.ask("scontrol", &["update", &update, "StartTime=now"]);
            }
            Some(told_in(&self.log())).filter(|told| told.len() >= count)
        };
        poll(DEADLINE, enough).unwrap_or_else(|| self.give_up("it was not started again"))
    }

    fn give_up(&self, what: &str) -> ! {
        let log = std::fs::read_to_string(self.log()).unwrap_or_default();
        let job = self.slurm.ask("scontrol", &["show", "job", &self.id]);
        panic!("{what}\n{log}\n{job}\n{}", self.slurm.logs())
    }
}

fn launch(slurm: &Slurm, folder: &Path, options: &[&str], arguments: &[&str]) -> Finished {
    let program = program();
    let fixed = ["launch", "--slurm", "--name", "r"];
    let words = [&fixed, options, &["--", program.as_str(), ROLE], arguments].concat();
    let mut command = program::command(&words);
    command.current_dir(folder).env("SLURM_CONF", slurm.configuration());
    // As within another job, and another launch.
    command.envs([("SLURM_NTASKS", "7"), ("SLURM_MEM_PER_NODE", "1"), ("RANK", "3")]);
    program::finish(command)
}

fn a_job_is_written_and_submitted(slurm: &mut Slurm) {
    let arguments = ["--note", "it's $HOME & \"so\" {{run_dir}}", "", "*"];
    let options = ["--nodes", "3", "--cpus-per-task", "2", "--gpus-per-node", "2", "--time", "5"];
    let job = Job::submit(slurm, &options, &arguments);
    let told = job.wait_told(3);
    assert_eq!(check_agreement(&told), [1, 1, 1]);
    let secret = &told[0].variables["MOBULA_SECRET"];
    assert_eq!(secret.len(), 64);
    for told in &told {
        assert_eq!(told.arguments, arguments);
        assert_eq!(told.variables["CUDA_VISIBLE_DEVICES"], "0,1");
        assert_eq!(told.variables["MOBULA_RUN_DIR"], job.run_dir().to_str().expect("UTF-8"));
        assert_eq!(&told.variables["MOBULA_SECRET"], secret);
        assert_eq!(told.world.restart_count, 0);
    }
    job.wait_over();
    assert_eq!(job.end(), "COMPLETED");
    let script = std::fs::read_to_string(job.run_dir().join("job.sh")).expect("the script");
    assert!(!script.contains(secret), "{script}");
}

fn a_job_that_fails_is_requeued(slurm: &mut Slurm) {
    let job = Job::submit(slurm, &["--nodes", "2", "--max-restarts", "1"], &["fail-at-first"]);
    let told = job.wait_told_after_requeue(4);
    for (restart_count, told) in told.chunks(2).enumerate() {
        assert_eq!(check_agreement(told), [1, 1]);
        assert_eq!(told[0].world.restart_count, restart_count as u32);
    }
    assert_ne!(told[0].variables["MOBULA_SECRET"], told[2].variables["MOBULA_SECRET"]);
    job.wait_over();
    assert_eq!(job.end(), "COMPLETED");
    let log = std::fs::read_to_string(job.log()).expect("the log");
    assert!(log.contains("mobula: exit code 3; restart 1 of 1"), "{log}");
}

/// The time limit is far; what Slurm sends before it comes from here.
fn a_job_near_its_time_limit_is_requeued(slurm: &mut Slurm) {
    let job = Job::submit(slurm, &["--nodes", "2", "--max-restarts", "1"], &["wait-at-first"]);
    job.wait_told(2);
    slurm.ask("scancel", &["--batch", "--signal=USR1", &job.id]);
    let told = job.wait_told_after_requeue(4);
    assert_eq!(told[3].world.restart_count, 1);
    job.wait_over();
    assert_eq!(job.end(), "COMPLETED");
}

fn a_job_that_is_cancelled_is_not_requeued(slurm: &mut Slurm) {
    let job = Job::submit(slurm, &["--nodes", "2", "--max-restarts", "5"], &["wait"]);
    job.wait_told(2);
    slurm.ask("scancel", &[&job.id]);
    job.wait_over();
    assert_eq!(job.end(), "CANCELLED");
    let log = std::fs::read_to_string(job.log()).expect("the log");
    assert!(!log.contains("mobula: exit code"), "{log}");
}

fn what_sbatch_refuses_is_one_line(slurm: &mut Slurm) {
    let folder = tempfile::tempdir().expect("temporary folder");
    let refused = launch(slurm, folder.path(), &["--partition", "none"], &[]);
    assert!(refused.error().contains("sbatch refused"), "{refused:?}");
    assert!(refused.error().contains("partition"), "{refused:?}");
}
