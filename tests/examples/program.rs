//! Running an example to its end, in a folder of its own, with a deadline.

use std::ffi::OsStr;
use std::fmt;
use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Nothing in these tests takes as long, on a busy machine.
const DEADLINE: Duration = Duration::from_secs(120);

/// An example that is to run.
pub(crate) struct Example(Command);

/// How it ended, and what it printed.
pub(crate) struct Outcome {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { code, stdout, stderr } = self;
        write!(f, "exit code {code:?}\n--- stdout\n{stdout}\n--- stderr\n{stderr}")
    }
}

/// The example of this name: `cargo test` builds it into `examples`, beside the tests' `deps`.
pub(crate) fn example(name: &str) -> Example {
    let test = std::env::current_exe().expect("this test's path");
    let folder = test.ancestors().nth(2).expect("the folder of the build profile");
    let mut command = Command::new(folder.join("examples").join(name));
    command.env("RUST_BACKTRACE", "0").env_remove("RUST_LOG");
    command.env_remove(mobula::run::RUN_DIR_VARIABLE);
    Example(command)
}

impl Example {
    pub(crate) fn args(mut self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Self {
        self.0.args(args);
        self
    }

    pub(crate) fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.0.env(name, value);
        self
    }

    /// Runs it with `folder` as its working directory.
    pub(crate) fn run(mut self, folder: &Path) -> Outcome {
        let command = self.0.current_dir(folder).stdin(Stdio::null());
        let spawned = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let mut child = spawned.unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let stdout = text(child.stdout.take().expect("a pipe"));
        let stderr = text(child.stderr.take().expect("a pipe"));
        let code = wait(&mut child);
        let [stdout, stderr] = [stdout, stderr].map(|text| text.join().expect("UTF-8"));
        let outcome = Outcome { code: code.flatten(), stdout, stderr };
        assert!(code.is_some(), "killed after {DEADLINE:?}: {outcome}");
        outcome
    }
}

/// The exit code; `None` for a program that had to be killed.
fn wait(child: &mut Child) -> Option<Option<i32>> {
    let begun = Instant::now();
    while begun.elapsed() < DEADLINE {
        if let Some(status) = child.try_wait().expect("a child") {
            return Some(status.code());
        }
        std::thread::park_timeout(Duration::from_millis(5));
    }
    child.kill().expect("a child");
    child.wait().expect("a child");
    None
}

/// Reads on a thread, so that no pipe ever fills up.
fn text(mut pipe: impl Read + Send + 'static) -> JoinHandle<String> {
    std::thread::spawn(move || {
        let mut text = String::new();
        pipe.read_to_string(&mut text).expect("UTF-8");
        text
    })
}
