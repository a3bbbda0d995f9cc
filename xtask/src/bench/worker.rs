//! One side of a comparison: a process that stays warm and works when it is asked to.
//!
//! It writes a JSON line `{"ready": NAME, "flops": n, "bytes": m}` when it can start, n being what a
//! step takes, and m how far three steps raise what the process has in memory, at their peak, if it
//! knows. Then it answers each line that it reads:
//!
//! * `run STEPS` trains from the same initial state every time: `{"seconds": [..], "loss": x}`;
//! * `infer ROWS STEPS` gives what comes out of the first rows, again and again: the same, with the
//!   sum of what came out for the loss;
//! * `update STEPS` has the optimizer alone move the weights, by gradients that stay the same: the
//!   same, without a loss;
//! * `reduce LEN STEPS` sums as many numbers over all workers of this side, again and again: the same,
//!   without a loss;
//! * `save PATH` writes the weights it has now: `{"saved": true}`.
//!
//! It ends with its input.

use anyhow::{Context, Result, anyhow, bail};
use serde::Deserialize;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::Duration;

/// Long enough for `torch.compile` on a slow machine, short enough to notice a hang.
const DEADLINE: Duration = Duration::from_secs(300);

pub(super) struct Worker {
    /// What it calls itself.
    pub(super) name: String,
    /// Of a training step, if it knows.
    pub(super) flops: Option<f64>,
    /// In memory at the peak of a training, above those before, if it knows.
    pub(super) bytes: Option<f64>,
    child: Child,
    input: ChildStdin,
    output: Receiver<String>,
}

/// What one `run` measured.
#[derive(Debug, Deserialize)]
pub(super) struct Round {
    /// The time of each step.
    pub(super) seconds: Vec<f64>,
    /// The loss of the last step; missing where nothing is trained.
    pub(super) loss: Option<f64>,
    /// Seconds before the first step, where workers are started for it.
    pub(super) startup: Option<f64>,
}

#[derive(Deserialize)]
struct Ready {
    ready: String,
    flops: Option<f64>,
    bytes: Option<f64>,
}

impl Worker {
    pub(super) fn start(mut command: Command) -> Result<Self> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let program = command.get_program().to_string_lossy().into_owned();
        let mut child = command.spawn().with_context(|| format!("cannot start {program}"))?;
        let input = child.stdin.take().context("the input is piped")?;
        let lines = BufReader::new(child.stdout.take().context("the output is piped")?).lines();
        // A thread of its own, because reading from a pipe has no deadline.
        let (send, output) = sync_channel(16);
        std::thread::spawn(move || {
            lines.map_while(Result::ok).try_for_each(|line| send.send(line))
        });
        let mut worker = Self { name: program, flops: None, bytes: None, child, input, output };
        let Ready { ready, flops, bytes } = worker.answer()?;
        (worker.name, worker.flops, worker.bytes) = (ready, flops, bytes);
        Ok(worker)
    }

    /// Runs `steps` steps from the initial state.
    pub(super) fn run(&mut self, steps: usize) -> Result<Round> {
        let round: Round = self.ask(&format!("run {steps}"))?;
        if round.seconds.len() != steps {
            bail!("{}: asked for {steps} steps, got {}", self.name, round.seconds.len());
        }
        Ok(round)
    }

    /// What comes out of the first `rows` rows, `steps` times.
    pub(super) fn infer(&mut self, rows: usize, steps: usize) -> Result<Round> {
        self.ask(&format!("infer {rows} {steps}"))
    }

    /// `steps` updates by the same gradients.
    pub(super) fn update(&mut self, steps: usize) -> Result<Round> {
        self.ask(&format!("update {steps}"))
    }

    /// `steps` sums of `len` numbers.
    pub(super) fn reduce(&mut self, len: usize, steps: usize) -> Result<Round> {
        self.ask(&format!("reduce {len} {steps}"))
    }

    /// Writes the weights as they are now.
    pub(super) fn save(&mut self, path: &Path) -> Result<()> {
        self.ask::<serde_json::Value>(&format!("save {}", path.display())).map(|_| ())
    }

    /// The answer to any other line.
    pub(super) fn ask<T: for<'a> Deserialize<'a>>(&mut self, question: &str) -> Result<T> {
        writeln!(self.input, "{question}").with_context(|| format!("{} has ended", self.name))?;
        self.answer()
    }

    fn answer<T: for<'a> Deserialize<'a>>(&mut self) -> Result<T> {
        let line = self.output.recv_timeout(DEADLINE).map_err(|error| match error {
            RecvTimeoutError::Timeout => {
                anyhow!("{} did not answer within {DEADLINE:?}", self.name)
            }
            RecvTimeoutError::Disconnected => {
                anyhow!("{} ended; see what it wrote above", self.name)
            }
        })?;
        serde_json::from_str(&line).with_context(|| format!("{} answered {line:?}", self.name))
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // It holds nothing that must be saved.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Result<Worker> {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        Worker::start(command)
    }

    #[test]
    fn questions_are_answered() {
        let script = r#"echo '{"ready":"a"}'; while read c n; do echo "{\"seconds\":[1,2],\"loss\":$n}"; done"#;
        let mut worker = shell(script).expect("starts");
        assert_eq!(worker.name, "a");
        let round = worker.run(2).expect("two steps");
        assert_eq!((round.seconds, round.loss), (vec![1.0, 2.0], Some(2.0)));
        let error = worker.run(3).expect_err("too few steps").to_string();
        assert_eq!(error, "a: asked for 3 steps, got 2");
    }

    #[test]
    fn a_worker_that_ends_is_an_error() {
        let error = shell("exit 3").err().expect("ended").to_string();
        assert_eq!(error, "sh ended; see what it wrote above");
    }
}
