//! Running the command, to its end or in the background.
#![allow(dead_code)] // Several test binaries share this file; not all use all of it.

use rustix::process::{Pid, Signal, kill_process};
use std::ffi::OsStr;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

/// Nothing in these tests takes as long.
const DEADLINE: Duration = Duration::from_secs(60);

/// What a finished command has printed.
#[derive(Debug)]
pub(crate) struct Finished {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Finished {
    /// The output as JSON.
    pub(crate) fn json(&self) -> serde_json::Value {
        assert_eq!(self.code, Some(0), "{self:?}");
        serde_json::from_str(&self.stdout).expect("JSON")
    }

    /// The one line on stderr of a command that failed.
    pub(crate) fn error(&self) -> &str {
        assert_eq!(self.code, Some(1), "{self:?}");
        let line = self.stderr.strip_prefix("error: ").map(str::trim_end);
        let line = line.expect("a line that begins with `error: `");
        assert!(!line.contains('\n'), "one line: {line}");
        line
    }
}

pub(crate) fn command(args: &[impl AsRef<OsStr>]) -> Command {
    // Shells start background jobs with SIGINT ignored, and the command would inherit that.
    let mut command = Command::new("env");
    command.args(["--default-signal=INT", env!("CARGO_BIN_EXE_mobula")]);
    command.args(args).env_remove("RUST_LOG").stdin(Stdio::null());
    command
}

/// Runs the command to its end.
pub(crate) fn mobula(args: &[impl AsRef<OsStr>]) -> Finished {
    finish(command(args))
}

/// Runs any command to its end.
pub(crate) fn finish(command: Command) -> Finished {
    let mut running = Running::of(command);
    let code = running.wait(DEADLINE).code();
    let rest = |lines: &Receiver<String>| lines.iter().map(|line| line + "\n").collect();
    Finished { code, stdout: rest(&running.stdout), stderr: rest(&running.stderr) }
}

/// A command under way; killed when dropped.
pub(crate) struct Running {
    child: Child,
    pub(crate) stdout: Receiver<String>,
    pub(crate) stderr: Receiver<String>,
}

impl Running {
    pub(crate) fn start(args: &[impl AsRef<OsStr>]) -> Self {
        Self::of(command(args))
    }

    pub(crate) fn of(mut command: Command) -> Self {
        command.stdin(Stdio::null());
        let mut child =
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the command");
        let stdout = lines(child.stdout.take().expect("a pipe"));
        let stderr = lines(child.stderr.take().expect("a pipe"));
        Self { child, stdout, stderr }
    }

    /// The next line on stdout that contains `part`.
    pub(crate) fn line_with(&self, part: &str) -> String {
        let begun = Instant::now();
        loop {
            let left = DEADLINE.saturating_sub(begun.elapsed());
            let Ok(line) = self.stdout.recv_timeout(left) else {
                let stderr: Vec<String> = self.stderr.try_iter().collect();
                panic!("no line with {part:?}; stderr: {stderr:?}");
            };
            if line.contains(part) {
                return line;
            }
        }
    }

    /// What Ctrl-C sends.
    pub(crate) fn interrupt(&self) {
        kill_process(self.id(), Signal::INT).expect("the command still runs");
    }

    /// The process id.
    pub(crate) fn id(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// The exit status, if it has ended.
    pub(crate) fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("a child")
    }

    /// The exit status. Panics when that takes longer than `deadline`.
    pub(crate) fn wait(&mut self, deadline: Duration) -> ExitStatus {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.ended() {
                return status;
            }
            assert!(begun.elapsed() < deadline, "still running after {deadline:?}");
            std::thread::park_timeout(Duration::from_millis(5));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Reads on a thread, so that no pipe ever fills up.
fn lines(pipe: impl std::io::Read + Send + 'static) -> Receiver<String> {
    let (send, lines) = channel();
    std::thread::spawn(move || {
        for line in BufReader::new(pipe).lines().map_while(Result::ok) {
            if send.send(line).is_err() {
                break;
            }
        }
    });
    lines
}
