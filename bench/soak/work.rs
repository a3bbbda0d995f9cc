//! What runs in the workers. Each run leaves a mark, so that the driver can count the runs.

use mobula_core::value::Blob;
use mobula_core::{BoxError, Member};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long members wait for each other.
const GATHER: Duration = Duration::from_secs(30);

/// Where a run is noted, and under which number.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Mark {
    file: PathBuf,
    number: u64,
}

impl Mark {
    pub(crate) fn new(file: &Path, number: u64) -> Self {
        Self { file: file.to_owned(), number }
    }

    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    /// One write to a file that is open for appending: other processes do the same meanwhile.
    fn leave(&self) -> Result<(), std::io::Error> {
        let mut file = std::fs::File::options().append(true).create(true).open(&self.file)?;
        file.write_all(format!("{}\n", self.number).as_bytes())
    }
}

/// How often each number was run.
pub(crate) fn runs(file: &Path) -> HashMap<u64, u32> {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    let mut runs = HashMap::new();
    text.lines().filter_map(|line| line.parse().ok()).for_each(|number| {
        *runs.entry(number).or_default() += 1;
    });
    runs
}

#[mobula_core::remote(crate = mobula_core)]
pub(crate) fn square(mark: Mark, x: u64, millis: u64) -> Result<u64, std::io::Error> {
    mark.leave()?;
    std::thread::sleep(Duration::from_millis(millis));
    Ok(x * x)
}

#[mobula_core::remote(crate = mobula_core)]
pub(crate) fn add(mark: Mark, a: u64, b: u64) -> Result<u64, std::io::Error> {
    mark.leave()?;
    Ok(a + b)
}

#[mobula_core::remote(crate = mobula_core)]
pub(crate) fn transform(mark: Mark, data: Blob, key: u8) -> Result<Blob, std::io::Error> {
    mark.leave()?;
    Ok(transformed(&data, key))
}

/// What [`transform`] is to give.
pub(crate) fn transformed(data: &Blob, key: u8) -> Blob {
    data.as_ref().iter().map(|byte| byte ^ key).collect::<Vec<_>>().into()
}

#[mobula_core::remote(crate = mobula_core)]
pub(crate) fn refuse(mark: Mark) -> Result<u64, BoxError> {
    mark.leave()?;
    Err("asked to refuse".into())
}

/// Never ends by itself, nor does the program that it has started.
#[mobula_core::remote(crate = mobula_core)]
pub(crate) fn linger(mark: Mark, with_child: bool) -> Result<u64, std::io::Error> {
    mark.leave()?;
    if with_child {
        std::process::Command::new("sleep").arg("86400").spawn()?;
    }
    loop {
        std::thread::park();
    }
}

/// An actor that knows how many calls its process has had.
pub(crate) struct Counter {
    calls: u64,
}

#[mobula_core::remote(crate = mobula_core)]
impl Counter {
    pub(crate) fn new() -> Self {
        Self { calls: 0 }
    }

    /// The process, and its calls so far.
    pub(crate) fn count(&mut self, mark: Mark, millis: u64) -> Result<(u32, u64), std::io::Error> {
        mark.leave()?;
        std::thread::sleep(Duration::from_millis(millis));
        self.calls += 1;
        Ok((std::process::id(), self.calls))
    }

    pub(crate) fn transform(
        &mut self,
        mark: Mark,
        data: Blob,
        key: u8,
    ) -> Result<Blob, std::io::Error> {
        mark.leave()?;
        Ok(transformed(&data, key))
    }
}

/// Members meet twice, report in between, and give a large result.
#[mobula_core::remote(crate = mobula_core)]
pub(crate) fn meet(member: Member, data: Blob, millis: u64) -> Result<Blob, BoxError> {
    let rank = [member.rank() as u8];
    let all = member.all_gather("before", &rank, GATHER)?;
    if all.iter().enumerate().any(|(i, value)| value.as_ref() != [i as u8]) {
        return Err(format!("gathered {all:?}").into());
    }
    member.report(&member.rank())?;
    std::thread::sleep(Duration::from_millis(millis));
    member.all_gather("after", &rank, GATHER)?;
    Ok(transformed(&data, rank[0]))
}
