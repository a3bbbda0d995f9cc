//! The program under test, from its start to its end.

use super::Kind;
use super::plan::Worker;
use super::workers::Victim;
use anyhow::Context;
use mobula::run::RUN_DIR_VARIABLE;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process_group, waitid};
use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

/// Where a program's run directory is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Home {
    /// The folder itself: the program is told so.
    Run,
    /// In `runs/` below the folder, which is the program's working directory.
    WorkingDirectory,
}

/// A program that runs, in a process group of its own. Killed when dropped, with all that it has
/// started.
pub(super) struct Program {
    child: Child,
    group: Pid,
    ended: Option<ExitStatus>,
    /// Those that a signal was sent to: one that hangs would stay.
    victims: Vec<(Victim, Kind)>,
}

impl Program {
    /// Starts it. It ends with this process, however that ends, if this is the main thread.
    pub(super) fn start(command: &[OsString], home: Home, folder: &Path) -> anyhow::Result<Self> {
        let (program, arguments) = command.split_first().context("no program was named")?;
        let mut start = Command::new("/proc/self/exe");
        start.args(["launch-child", &std::process::id().to_string(), "--"]);
        start.arg(absolute(program)?).args(arguments).process_group(0).stdin(Stdio::null());
        // Stdout is for the report.
        start.stdout(std::io::stderr());
        match home {
            Home::Run => start.env(RUN_DIR_VARIABLE, folder),
            Home::WorkingDirectory => start.env_remove(RUN_DIR_VARIABLE).current_dir(folder),
        };
        let child = start.spawn().with_context(|| format!("starting {}", program.display()))?;
        let group = Pid::from_child(&child);
        Ok(Self { child, group, ended: None, victims: Vec::new() })
    }

    pub(super) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal to a worker of it. `false` if the worker has just ended.
    pub(super) fn strike(&mut self, worker: &Worker, kind: Kind) -> bool {
        let Some(victim) = Victim::find(worker) else { return false };
        let was_there = victim.send(kind.signal());
        self.victims.push((victim, kind));
        was_there
    }

    /// Sends SIGSEGV again to who still lives: a Rust program takes the first one for a stack that
    /// has overflowed, sees that it has not, and goes on without its handler.
    pub(super) fn insist(&self) {
        for (victim, _) in self.victims.iter().filter(|(_, kind)| *kind == Kind::Segv) {
            victim.send(Kind::Segv.signal());
        }
    }

    /// How it ended, if it has.
    pub(super) fn ended(&mut self) -> anyhow::Result<Option<ExitStatus>> {
        if self.ended.is_none() {
            let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT | WaitIdOptions::NOHANG;
            // Not reaped yet, so that the number of the group is still its own.
            if waitid(WaitId::Pid(self.group), options)?.is_some() {
                self.ended = Some(self.end()?);
            }
        }
        Ok(self.ended)
    }

    /// Ends the whole group, before its leader is reaped.
    fn end(&mut self) -> std::io::Result<ExitStatus> {
        let _ = kill_process_group(self.group, Signal::KILL);
        for (victim, _) in &self.victims {
            // Those that hang too: this signal needs nobody to be awake.
            victim.send(Signal::KILL);
        }
        self.child.wait()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        if self.ended.is_none() {
            let _ = self.end();
        }
    }
}

/// A path to the program holds in another folder too; a name is looked for in `PATH`.
fn absolute(program: &OsString) -> anyhow::Result<PathBuf> {
    let path = Path::new(program);
    match path.components().count() {
        0 | 1 => Ok(path.to_owned()),
        _ => Ok(std::path::absolute(path)?),
    }
}

#[cfg(test)]
mod tests {
    use super::absolute;
    use std::path::Path;

    #[test]
    fn only_a_name_is_looked_for() {
        assert_eq!(absolute(&"python3".into()).expect("a path"), Path::new("python3"));
        let here = std::env::current_dir().expect("a folder");
        assert_eq!(absolute(&"./train".into()).expect("a path"), here.join("train"));
        assert_eq!(absolute(&"/bin/train".into()).expect("a path"), Path::new("/bin/train"));
    }
}
