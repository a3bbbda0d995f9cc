//! Asks running programs what they are doing.

use super::server::REQUEST;
use super::{Status, socket};
use crate::{Error, RunDir};
use std::io::{ErrorKind, Read, Write};
use std::path::Path;
use std::time::{Duration, Instant};

/// How long a program may take to answer.
const DEADLINE: Duration = Duration::from_secs(5);
/// An answer is no longer.
const MOST_BYTES: u64 = 64 << 20;

#[derive(serde::Deserialize)]
#[serde(untagged)]
enum Answer {
    Refused { error: String },
    Status(Box<Status>),
}

/// All running programs of this user, by process id: how each is, or why it did not answer. What
/// programs that were killed have left behind is removed.
pub fn running() -> Vec<(u32, Result<Status, Error>)> {
    let asked = socket::all().into_iter().filter_map(|(pid, path)| Some((pid, ask(&path)?)));
    asked.collect()
}

/// The program with this process id. Errors when there is none that answers.
pub fn of_pid(pid: u32) -> Result<Status, Error> {
    let answer = socket::of_pid(pid).iter().find_map(|path| ask(path));
    answer.unwrap_or_else(|| {
        Err(Error::NotRunning {
            what: format!("a program of yours with process id {pid}"),
            hint: "`mobula status` lists those that do".to_owned(),
        })
    })
}

/// The program that works on the run in this folder. Errors when there is none that answers.
pub fn of_run(run: impl AsRef<Path>) -> Result<Status, Error> {
    let run = RunDir::open(run.as_ref())?;
    let answer = socket::of_run(run.path()).and_then(|path| {
        let answer = ask(&path);
        if answer.is_none() {
            socket::forget_run(run.path());
        }
        answer
    });
    answer.unwrap_or_else(|| {
        let state = run.status().map(|status| format!("{:?}", status.state).to_lowercase());
        Err(Error::NotRunning {
            what: format!("a program of yours on this machine at the run {}", run.path().display()),
            hint: format!(
                "the run's state is {}; `mobula runs show` tells more",
                state.as_deref().unwrap_or("unknown")
            ),
        })
    })
}

/// `None` when the socket's program has ended; then the socket is removed.
fn ask(socket: &Path) -> Option<Result<Status, Error>> {
    match exchange(socket) {
        Ok(answer) => Some(read(&answer)),
        // It listened before it had its name, so nobody does any more.
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
            let _ = std::fs::remove_file(socket);
            None
        }
        Err(error) if error.kind() == ErrorKind::NotFound => None,
        Err(error) => {
            let late = matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut);
            let what = || format!("the answer of the program at {}", socket.display());
            Some(Err(match late {
                true => Error::Timeout { what: what(), after: DEADLINE },
                false => Error::system("asking a program for its status", error),
            }))
        }
    }
}

fn read(answer: &[u8]) -> Result<Status, Error> {
    match serde_json::from_slice(answer) {
        Ok(Answer::Status(status)) => Ok(*status),
        Ok(Answer::Refused { error }) => Err(Error::layer(format!("it answered: {error}"))),
        Err(error) => Err(Error::codec("decode", "the answer of a program", error)),
    }
}

fn exchange(path: &Path) -> std::io::Result<Vec<u8>> {
    let deadline = Instant::now() + DEADLINE;
    let mut stream = socket::connect(path)?;
    stream.set_write_timeout(Some(DEADLINE))?;
    stream.write_all(REQUEST)?;
    let mut answer = Vec::new();
    let mut piece = vec![0; 64 << 10];
    loop {
        // Each read has what is left, so that a trickle ends too.
        let left = deadline.saturating_duration_since(Instant::now());
        stream.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
        let bytes = stream.read(&mut piece)?;
        answer.extend_from_slice(&piece[..bytes]);
        if bytes == 0 {
            return Ok(answer);
        }
        if left.is_zero() || answer.len() as u64 > MOST_BYTES {
            return Err(ErrorKind::TimedOut.into());
        }
    }
}
