//! The run directory `runs/<name>/`: everything that a run decides and measures, on disk.
//!
//! ```text
//! run.json         name, argv, config, seed, git revision, versions   (written once)
//! status.json      running | finished | failed | interrupted          (replaced atomically)
//! metrics.jsonl    one object a line: step, time, then name → value
//! tensorboard/     the same values as event files
//! checkpoints/     see `checkpoint`
//! logs/            rank-<r>.log: what each worker process printed
//! status.sock      leads to the program that works on it, see `status`
//! ```

use crate::Error;
use crate::checkpoint::{CheckpointStore, write_atomically};
use crate::error::AtPath;
use crate::files::append_whole;
use crate::tensorboard::EventWriter;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// Set for a program that is one trial of a sweep: the run directory that it must use.
pub const RUN_DIR_VARIABLE: &str = "MOBULA_RUN_DIR";

/// What `run.json` says of a run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RunInfo {
    /// The run's name, also its folder's.
    pub name: String,
    /// Seconds since 1970 when the run was created.
    pub created: f64,
    /// The command line.
    pub argv: Vec<String>,
    /// The folder the command ran in.
    pub cwd: PathBuf,
    /// `git rev-parse HEAD` of that folder, with `+dirty` when files were changed.
    pub git: Option<String>,
    /// Mobula's version.
    pub version: String,
    /// The seed of everything random.
    pub seed: u64,
    /// The program's own configuration.
    pub config: serde_json::Value,
}

/// How a run stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RunState {
    /// Its driver is at work.
    Running,
    /// It came to its end.
    Finished,
    /// It ended with an error.
    Failed,
    /// Ctrl-C or a kill: it can be resumed.
    Interrupted,
}

/// What `status.json` says.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RunStatus {
    /// The state as last written.
    pub state: RunState,
    /// The driver's process id.
    pub pid: u32,
    /// Seconds since 1970 of the last change.
    pub changed: f64,
}

/// One line of `metrics.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MetricsLine {
    /// The global step.
    pub step: u64,
    /// Seconds since 1970.
    pub time: f64,
    /// Name → value.
    #[serde(flatten)]
    pub values: BTreeMap<String, f64>,
}

/// An open run directory.
#[derive(Clone, Debug)]
pub struct RunDir {
    path: PathBuf,
}

impl RunDir {
    /// Creates `root/name`. Errors when a run of that name exists.
    pub fn create(
        root: impl AsRef<Path>,
        name: &str,
        seed: u64,
        config: &impl Serialize,
    ) -> Result<Self, Error> {
        Self::create_at(root.as_ref().join(name), seed, config)
    }

    /// Creates the run in exactly this folder.
    pub fn create_at(
        path: impl Into<PathBuf>,
        seed: u64,
        config: &impl Serialize,
    ) -> Result<Self, Error> {
        let path = path.into();
        if path.join("run.json").exists() {
            return Err(Error::RunExists { path });
        }
        for folder in ["checkpoints", "logs", "tensorboard"] {
            let folder = path.join(folder);
            fs::create_dir_all(&folder).at("create", &folder)?;
        }
        let info = RunInfo {
            name: Self { path: path.clone() }.name(),
            created: unix_time(),
            argv: std::env::args().collect(),
            cwd: std::env::current_dir().unwrap_or_default(),
            git: git_revision(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            seed,
            config: serde_json::to_value(config).map_err(Error::layer)?,
        };
        let text = serde_json::to_vec_pretty(&info).map_err(Error::layer)?;
        write_atomically(&path.join("run.json"), &text)?;
        let run = Self { path };
        run.set_state(RunState::Running)?;
        Ok(run)
    }

    /// The run of a program: the folder that a sweep gives to it as a trial
    /// ([`RUN_DIR_VARIABLE`]), else `runs/<name>`, else `runs/<prefix>-<time>`. Goes on with a run
    /// that exists.
    pub fn of_program(
        name: Option<&str>,
        prefix: &str,
        seed: u64,
        config: &impl Serialize,
    ) -> Result<Self, Error> {
        if let Some(path) = std::env::var_os(RUN_DIR_VARIABLE) {
            return Self::open(&path).or_else(|_| Self::create_at(path, seed, config));
        }
        let name = name.map_or_else(|| timestamped(prefix), str::to_owned);
        Self::open_or_create("runs", &name, seed, config)
    }

    /// Opens the run `root/name` to go on with it, or creates it.
    pub fn open_or_create(
        root: impl AsRef<Path>,
        name: &str,
        seed: u64,
        config: &impl Serialize,
    ) -> Result<Self, Error> {
        let path = root.as_ref().join(name);
        match path.join("run.json").exists() {
            true => Self::open(path),
            false => Self::create_at(path, seed, config),
        }
    }

    /// Opens an existing run.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self, Error> {
        let path = path.into();
        if !path.join("run.json").exists() {
            return Err(Error::NoSuchRun { path });
        }
        Ok(Self { path })
    }

    /// All runs in `root`, oldest first. A folder that does not exist has none.
    pub fn list(root: impl AsRef<Path>) -> Result<Vec<Self>, Error> {
        let root = root.as_ref();
        if !root.exists() {
            return Ok(Vec::new());
        }
        let mut runs = Vec::new();
        for entry in fs::read_dir(root).at("list", root)? {
            if let Ok(run) = Self::open(entry.at("list", root)?.path()) {
                runs.push((run.info().map_or(0.0, |info| info.created), run));
            }
        }
        runs.sort_by(|a, b| a.0.total_cmp(&b.0).then_with(|| a.1.path.cmp(&b.1.path)));
        Ok(runs.into_iter().map(|(_, run)| run).collect())
    }

    /// The run's name: its folder's.
    pub fn name(&self) -> String {
        self.path.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What `run.json` says.
    pub fn info(&self) -> Result<RunInfo, Error> {
        read_json(&self.path.join("run.json"))
    }

    /// How the run stands. One that says `Running` but whose driver is gone was interrupted.
    pub fn status(&self) -> Result<RunStatus, Error> {
        let mut status: RunStatus = read_json(&self.path.join("status.json"))?;
        let alive = Path::new("/proc").join(status.pid.to_string()).exists();
        if status.state == RunState::Running && !alive {
            status.state = RunState::Interrupted;
        }
        Ok(status)
    }

    /// Records how the run stands.
    pub fn set_state(&self, state: RunState) -> Result<(), Error> {
        let status = RunStatus { state, pid: std::process::id(), changed: unix_time() };
        let text = serde_json::to_vec(&status).map_err(Error::layer)?;
        write_atomically(&self.path.join("status.json"), &text)?;
        crate::status::follow_run(&self.path, state == RunState::Running);
        Ok(())
    }

    /// The run's checkpoints; a save keeps the newest `keep`.
    pub fn checkpoints(&self, keep: usize) -> CheckpointStore {
        CheckpointStore::new(self.path.join("checkpoints"), keep)
    }

    /// Where the output of a worker is captured.
    pub fn log_path(&self, rank: usize) -> PathBuf {
        self.path.join("logs").join(format!("rank-{rank}.log"))
    }

    /// Opens the metrics for appending; a line torn by a crash is dropped first.
    pub fn metrics_writer(&self) -> Result<MetricsWriter, Error> {
        MetricsWriter::open(&self.path)
    }

    /// Takes the run for this process. Errors when another one that is alive works on it.
    pub fn claim(&self) -> Result<(), Error> {
        if let Ok(status) = self.status()
            && status.state == RunState::Running
            && status.pid != std::process::id()
        {
            return Err(Error::RunBusy { path: self.path.clone(), pid: status.pid });
        }
        self.set_state(RunState::Running)
    }

    /// Drops the metrics of steps after `step`, and of ends of epochs after `epoch`, which are about to be
    /// made again.
    pub fn rewind_metrics(&self, step: u64, epoch: u64) -> Result<(), Error> {
        let lines = self.metrics()?;
        let ends_later = |line: &MetricsLine| line.values.get("epoch") > Some(&(epoch as f64));
        let stays = |line: &&MetricsLine| line.step <= step && !ends_later(line);
        if lines.iter().all(|line| stays(&line)) {
            return Ok(());
        }
        let mut text = Vec::new();
        for line in lines.iter().filter(stays) {
            text.extend(serde_json::to_vec(line).map_err(Error::layer)?);
            text.push(b'\n');
        }
        write_atomically(&self.path.join("metrics.jsonl"), &text)
    }

    /// Every whole line of `metrics.jsonl`.
    pub fn metrics(&self) -> Result<Vec<MetricsLine>, Error> {
        let path = self.path.join("metrics.jsonl");
        if !path.exists() {
            return Ok(Vec::new());
        }
        let text = fs::read_to_string(&path).at("read", &path)?;
        Ok(text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect())
    }
}

/// Appends to `metrics.jsonl` and to TensorBoard's event file.
#[derive(Debug)]
pub struct MetricsWriter {
    path: PathBuf,
    file: File,
    events: EventWriter,
}

impl MetricsWriter {
    fn open(run: &Path) -> Result<Self, Error> {
        let path = run.join("metrics.jsonl");
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(&path)
            .at("open", &path)?;
        let whole = whole_lines(&mut file).at("read", &path)?;
        file.set_len(whole).at("truncate", &path)?;
        file.seek(SeekFrom::End(0)).at("seek", &path)?;
        let events = EventWriter::create(&run.join("tensorboard"), unix_time())?;
        Ok(Self { path, file, events })
    }

    /// Appends one line. JSON has no NaN or infinity: such values are left out of the line. Where a
    /// disk is full, the line is not written, and later ones are as soon as there is room.
    pub fn log(&mut self, step: u64, values: &BTreeMap<String, f64>) -> Result<(), Error> {
        if let Some(name) = ["step", "time"].into_iter().find(|name| values.contains_key(*name)) {
            return Err(Error::ReservedMetric { name: name.to_owned() });
        }
        let line = MetricsLine {
            step,
            time: unix_time(),
            values: values
                .iter()
                .filter(|(_, v)| v.is_finite())
                .map(|(k, v)| (k.clone(), *v))
                .collect(),
        };
        let mut text = serde_json::to_vec(&line).map_err(Error::layer)?;
        text.push(b'\n');
        append_whole(&mut self.file, &text).at("append to", &self.path)?;
        self.events.scalars(line.time, step, values)
    }
}

/// The length of the file up to and with its last newline.
fn whole_lines(file: &mut File) -> std::io::Result<u64> {
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(bytes.iter().rposition(|b| *b == b'\n').map_or(0, |at| at as u64 + 1))
}

fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T, Error> {
    let bytes = fs::read(path).at("read", path)?;
    serde_json::from_slice(&bytes)
        .map_err(|error| Error::codec("decode", path.display().to_string(), error))
}

/// `prefix-20261122-163000`: a name for a run that begins now (UTC).
pub fn timestamped(prefix: &str) -> String {
    let compact = utc(unix_time()).replace(['-', ':'], "").replace(' ', "-");
    format!("{prefix}-{compact}")
}

/// Seconds since 1970 as `2026-11-22 16:30:00`, in UTC; at most the end of the year 9999.
pub fn utc(seconds: f64) -> String {
    let seconds = seconds.clamp(0.0, 253_402_300_799.0) as i64;
    let (year, month, day) = civil_from_days(seconds / 86_400);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}")
}

/// Year, month and day of a number of days since 1970 (Hinnant, *chrono-Compatible Low-Level Date
/// Algorithms*): a date library for one name would be too much.
fn civil_from_days(days: i64) -> (i64, i64, i64) {
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    (year_of_era + era * 400 + i64::from(month <= 2), month, day)
}

/// Seconds since 1970.
pub fn unix_time() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

fn git_revision() -> Option<String> {
    let git = |args: &[&str]| {
        let output = std::process::Command::new("git").args(args).output().ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        output.status.success().then(|| text.trim().to_owned())
    };
    let head = git(&["rev-parse", "HEAD"])?;
    let dirty =
        git(&["status", "--porcelain", "--untracked-files=no"]).is_some_and(|s| !s.is_empty());
    Some(if dirty { format!("{head}+dirty") } else { head })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn values(loss: f64) -> BTreeMap<String, f64> {
        BTreeMap::from([("loss".to_owned(), loss)])
    }

    #[test]
    fn a_torn_line_is_never_read_and_never_glued_to_the_next() {
        let root = tempfile::tempdir().expect("temporary folder");
        let run = RunDir::create(root.path(), "r", 1, &()).expect("create");
        run.metrics_writer().expect("open").log(1, &values(0.5)).expect("log");
        let path = run.path().join("metrics.jsonl");
        let mut file = OpenOptions::new().append(true).open(&path).expect("open");
        file.write_all(b"{\"step\":2,\"ti").expect("a torn write");
        assert_eq!(run.metrics().expect("metrics").len(), 1);

        run.metrics_writer().expect("open").log(3, &values(0.25)).expect("log");
        let steps: Vec<u64> = run.metrics().expect("metrics").iter().map(|m| m.step).collect();
        assert_eq!(steps, [1, 3]);
    }

    #[test]
    fn what_is_made_again_is_not_there_twice() {
        let root = tempfile::tempdir().expect("temporary folder");
        let run = RunDir::create(root.path(), "r", 1, &()).expect("create");
        let mut writer = run.metrics_writer().expect("open");
        (1..=4).for_each(|step| writer.log(step, &values(0.5)).expect("log"));
        run.rewind_metrics(2, 0).expect("rewind");
        run.metrics_writer().expect("open").log(3, &values(0.25)).expect("log");
        let steps: Vec<u64> = run.metrics().expect("metrics").iter().map(|m| m.step).collect();
        assert_eq!(steps, [1, 2, 3]);

        let reserved = BTreeMap::from([("time".to_owned(), 1.0)]);
        let error = run.metrics_writer().expect("open").log(5, &reserved).expect_err("reserved");
        assert!(matches!(error, Error::ReservedMetric { .. }), "{error}");
    }

    #[test]
    fn a_run_has_one_driver() {
        let root = tempfile::tempdir().expect("temporary folder");
        let run = RunDir::create(root.path(), "r", 1, &()).expect("create");
        run.claim().expect("our own");
        let other = format!(
            r#"{{"state":"running","pid":{},"changed":0.0}}"#,
            std::os::unix::process::parent_id()
        );
        fs::write(run.path().join("status.json"), other).expect("write");
        assert!(matches!(run.claim(), Err(Error::RunBusy { .. })));
    }

    #[test]
    fn a_name_is_taken_once_and_listed() {
        let root = tempfile::tempdir().expect("temporary folder");
        RunDir::create(root.path(), "a", 1, &()).expect("create");
        assert!(matches!(RunDir::create(root.path(), "a", 1, &()), Err(Error::RunExists { .. })));
        fs::create_dir(root.path().join("not-a-run")).expect("create");
        let names: Vec<_> =
            RunDir::list(root.path()).expect("list").iter().map(|r| r.path().to_owned()).collect();
        assert_eq!(names, [root.path().join("a")]);
    }

    #[test]
    fn dates_are_those_of_the_calendar() {
        let check = |seconds: f64, expected: &str| assert_eq!(utc(seconds), expected);
        check(0.0, "1970-01-01 00:00:00");
        check(951_782_400.0, "2000-02-29 00:00:00");
        check(1_709_251_199.9, "2024-02-29 23:59:59");
        check(1_767_225_600.0, "2026-01-01 00:00:00");
        check(1e300, "9999-12-31 23:59:59");
    }

    #[test]
    fn a_run_whose_driver_is_gone_was_interrupted() {
        let root = tempfile::tempdir().expect("temporary folder");
        let run = RunDir::create(root.path(), "a", 1, &()).expect("create");
        assert_eq!(run.status().expect("status").state, RunState::Running);
        // No process has the largest id: the kernel's limit is 2^22.
        let gone = r#"{"state":"running","pid":4294967295,"changed":0.0}"#;
        fs::write(run.path().join("status.json"), gone).expect("write");
        assert_eq!(run.status().expect("status").state, RunState::Interrupted);
    }
}
