//! The folders of the two runs, and what a run has written.

use super::plan::Line;
use super::program::Home;
use anyhow::{Context, ensure};
use mobula::RunDir;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

/// The names of the two.
const NAMES: [&str; 2] = ["reference", "disturbed"];

/// The end of a `metrics.jsonl` that is read: some minutes of progress.
const TAIL_BYTES: u64 = 64 << 10;

/// A folder for both.
pub(super) struct Runs {
    folder: PathBuf,
    is_temporary: bool,
    /// Whether a temporary folder stays.
    pub(super) is_wanted: bool,
}

impl Runs {
    /// In `folder`, or in a temporary one. Errors when either is there already.
    pub(super) fn create(folder: Option<&Path>) -> anyhow::Result<Self> {
        let temporary =
            || std::env::temp_dir().join(format!("mobula-chaos-{}", std::process::id()));
        let root = folder.map_or_else(temporary, Path::to_owned);
        for name in NAMES {
            let folder = std::path::absolute(root.join(name))?;
            ensure!(
                !folder.exists(),
                "{} is already there: remove it, or name another folder with --runs",
                folder.display()
            );
            fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
        }
        let is_temporary = folder.is_none();
        Ok(Self { folder: std::path::absolute(root)?, is_temporary, is_wanted: true })
    }

    pub(super) fn folder(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }
}

impl Drop for Runs {
    fn drop(&mut self) {
        if self.is_temporary && !self.is_wanted {
            let _ = fs::remove_dir_all(&self.folder);
        }
        // Only what is empty goes.
        for folder in NAMES.map(|name| self.folder(name)).iter().chain([&self.folder]) {
            let _ = fs::remove_dir(folder);
        }
        if self.is_temporary && self.folder.exists() {
            mobula::console::note(format!("the runs are kept in {}", self.folder.display()));
        }
    }
}

/// The run that a program has made there.
pub(super) fn find(home: Home, folder: &Path) -> Option<RunDir> {
    match home {
        Home::Run => RunDir::open(folder).ok(),
        Home::WorkingDirectory => RunDir::list(folder.join("runs")).ok()?.pop(),
    }
}

/// The newest whole lines of the run's `metrics.jsonl`.
pub(super) fn newest_lines(run: &RunDir) -> Vec<Line> {
    let bytes = tail(&run.path().join("metrics.jsonl")).unwrap_or_default();
    // The first one may begin before what was read; then it is no JSON.
    bytes
        .split(|byte| *byte == b'\n')
        .filter_map(|line| serde_json::from_slice(line).ok())
        .collect()
}

fn tail(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(TAIL_BYTES)))?;
    let mut bytes = Vec::new();
    file.take(TAIL_BYTES).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    #[test]
    fn the_end_of_a_long_file_is_read() {
        let root = tempfile::tempdir().expect("temporary folder");
        let run = RunDir::create(root.path(), "r", 1, &()).expect("a run");
        assert_eq!(newest_lines(&run), []);
        let mut metrics = run.metrics_writer().expect("metrics");
        let values = BTreeMap::from([("step/loss".to_owned(), 0.5)]);
        (0..2000).for_each(|step| metrics.log(step, &values).expect("a line"));
        let lines = newest_lines(&run);
        let steps: Vec<u64> = lines.iter().map(|line| line.step).collect();
        let first = 2000 - lines.len() as u64;
        assert!(first > 0, "not all of it");
        assert!(lines.len() as u64 > TAIL_BYTES / 100 && steps.iter().copied().eq(first..2000));
    }

    #[test]
    fn folders_are_new_and_go_unless_they_are_wanted() {
        let root = tempfile::tempdir().expect("temporary folder");
        let folder = root.path().join("chaos");
        let runs = Runs::create(Some(&folder)).expect("new");
        let error = Runs::create(Some(&folder)).err().expect("there").to_string();
        assert!(error.contains("reference is already there"), "{error}");
        drop(runs);
        assert!(!folder.exists(), "empty folders go");

        let runs = Runs::create(Some(&folder)).expect("new");
        fs::write(runs.folder("reference").join("run.json"), "{}").expect("written");
        drop(runs);
        assert!(folder.join("reference/run.json").exists() && !folder.join("disturbed").exists());
    }
}
