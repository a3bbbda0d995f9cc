//! One trial as a process group: started, watched, ended with everything it started.

use super::tail::{Tail, measurement};
use crate::{Error, Flow, Trial};
use mobula_core::World;
use mobula_core::error::AtPath;
use mobula_core::run::RUN_DIR_VARIABLE;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process_group, waitid};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// How often metrics, exit and stop are looked at.
const POLL: Duration = Duration::from_millis(25);
/// From SIGTERM to SIGKILL: time to write a checkpoint's last bytes.
const GRACE: Duration = Duration::from_secs(2);
/// A failed trial's error shows so many lines of its log.
const TAIL_LINES: usize = 5;

/// Outlives a driver that dies in any way, kill -9 included: its stdin is a pipe from the driver,
/// which then closes. It ends the whole group, also what the trial's program started. A line on
/// its stdin tells it that the trial is over.
const WATCHDOG: &str = "read _ || { kill -TERM -$1; sleep 1; kill -KILL -$1; } 2>/dev/null";

/// Holds the command back until its watchdog is there: a driver that dies before that closes the
/// gate's stdin, and the command never starts. Started at once, it could outlive the driver.
const GATE: &str = r#"read _ && exec "$@" </dev/null"#;

/// Runs `command` to its end, or until the study wants no more of it.
pub(crate) fn run(
    trial: &mut Trial,
    command: &[String],
    run_dir: &Path,
    threads: usize,
) -> Result<(), Error> {
    let log = run_dir.join("logs/rank-0.log");
    let mut group = Group::start(command, &log, run_dir, threads, trial.attempt)?;
    let mut tails = [Tail::new(run_dir.join("metrics.jsonl")), Tail::new(log.clone())];
    let mut last = None;
    loop {
        // Exit first, then the metrics: what was written before the exit is read.
        let status = group.status()?;
        let flow = forward(trial, &mut tails, &mut last)?;
        if let Some(status) = status {
            return judge(status, &log, flow);
        }
        if flow == Flow::Stop || trial.should_stop() {
            return group.terminate();
        }
        std::thread::sleep(POLL);
    }
}

/// Reports what has been measured since the last time.
fn forward(trial: &mut Trial, tails: &mut [Tail], last: &mut Option<u64>) -> Result<Flow, Error> {
    for line in tails.iter_mut().flat_map(Tail::lines) {
        let Some((step, value)) = measurement(&line, &trial.metric, *last) else {
            continue;
        };
        if last.is_some_and(|last| step <= last) {
            continue;
        }
        *last = Some(step);
        if trial.report(step, value)? == Flow::Stop {
            return Ok(Flow::Stop);
        }
    }
    Ok(Flow::Continue)
}

fn judge(status: ExitStatus, log: &Path, flow: Flow) -> Result<(), Error> {
    if status.success() || flow == Flow::Stop {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&std::fs::read(log).unwrap_or_default()).into_owned();
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    let tail = lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n");
    Err(Error::CommandFailed { status: status.to_string(), log: log.to_owned(), tail })
}

/// A process group and its watchdog. Nothing of the group is left once this is dropped.
struct Group {
    child: Child,
    id: Option<Pid>,
    watchdog: Option<Child>,
}

impl Group {
    fn start(
        command: &[String],
        log: &Path,
        run_dir: &Path,
        threads: usize,
        attempt: u32,
    ) -> Result<Self, Error> {
        let output = open_log(log)?;
        let spawn_error = |source| Error::Spawn { program: "sh".into(), source };
        let mut trial = Command::new("sh");
        // Where the sweep is one copy of a launch, its trials are none.
        World::remove_from(&mut trial);
        let child = trial
            .args(["-c", GATE, "trial"])
            .args(command)
            .env(RUN_DIR_VARIABLE, run_dir)
            .env("RAYON_NUM_THREADS", threads.to_string())
            .env("RESTART_COUNT", attempt.saturating_sub(1).to_string())
            .stdin(Stdio::piped())
            .stdout(output.try_clone().at("open", log)?)
            .stderr(output)
            .process_group(0)
            .spawn()
            .map_err(spawn_error)?;
        let id = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        let mut group = Self { child, id, watchdog: None };
        group.watchdog = Some(watch(group.child.id()).map_err(spawn_error)?);
        group.open_gate();
        Ok(group)
    }

    fn open_gate(&mut self) {
        if let Some(mut stdin) = self.child.stdin.take() {
            // A gate that has died already is seen as the end of the trial.
            let _ = stdin.write_all(b"\n");
        }
    }

    /// The exit status once the command has ended, with what it left running.
    fn status(&mut self) -> Result<Option<ExitStatus>, Error> {
        let Some(id) = self.id else {
            return Ok(None);
        };
        // The exit is looked at without reaping first: until then the group's id cannot be
        // given to another process, and the signal meets nobody else.
        let look = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        let system =
            |source: std::io::Error| Error::Spawn { program: "the trial's process".into(), source };
        if waitid(WaitId::Pid(id), look).map_err(|e| system(e.into()))?.is_none() {
            return Ok(None);
        }
        self.signal(Signal::KILL);
        self.id = None;
        self.child.wait().map(Some).map_err(system)
    }

    /// SIGTERM to all, then after a while SIGKILL by dropping.
    fn terminate(mut self) -> Result<(), Error> {
        self.signal(Signal::TERM);
        let deadline = Instant::now() + GRACE;
        while self.status()?.is_none() && Instant::now() < deadline {
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    fn signal(&self, signal: Signal) {
        if let Some(id) = self.id {
            // A group that has already gone is what is wanted.
            let _ = kill_process_group(id, signal);
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.signal(Signal::KILL);
        let _ = self.child.wait();
        if let Some(watchdog) = &mut self.watchdog {
            if let Some(mut stdin) = watchdog.stdin.take() {
                let _ = stdin.write_all(b"\n");
            }
            let _ = watchdog.wait();
        }
    }
}

/// In a group of its own, so that Ctrl-C in a terminal, which goes to the driver's group, cannot
/// end the watchdog before its work.
fn watch(group: u32) -> std::io::Result<Child> {
    Command::new("sh")
        .args(["-c", WATCHDOG, "watchdog", &group.to_string()])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()
}

fn open_log(log: &Path) -> Result<File, Error> {
    let path: PathBuf = log.to_owned();
    OpenOptions::new().create(true).append(true).open(log).at("open", path).map_err(Error::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// INV-WATCHED: a command whose driver dies before the watchdog is there never starts.
    #[test]
    fn a_gate_that_is_never_opened_starts_nothing() {
        let run = |input: &[u8]| {
            let mut gate = Command::new("sh")
                .args(["-c", GATE, "trial", "echo", "started"])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .expect("sh");
            let mut stdin = gate.stdin.take().expect("a pipe");
            stdin.write_all(input).expect("write");
            drop(stdin);
            gate.wait_with_output().expect("the end").stdout
        };
        assert_eq!(run(b""), b"");
        assert_eq!(run(b"\n"), b"started\n");
    }
}
