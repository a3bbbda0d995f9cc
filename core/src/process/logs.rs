//! What a worker prints: into its log file, and to the driver's stderr behind its name.

use crate::console;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, PipeReader, Read, Write};
use std::path::PathBuf;
use std::sync::Arc;

const MAX_LINE: u64 = 64 << 10;

/// Where the output of one worker goes.
#[derive(Clone, Default)]
pub(crate) struct LogTarget {
    /// What the worker is for.
    pub(crate) name: String,
    /// Put before each line on the driver's stderr; `None` shows nothing there.
    pub(crate) prefix: Option<String>,
    /// Appended to, if given.
    pub(crate) file: Option<PathBuf>,
    /// Gets each line, without its end, in place of this machine's stderr.
    pub(crate) lines: Option<Arc<dyn Fn(String) + Send + Sync>>,
}

impl LogTarget {
    /// Of a worker for that, onto the driver's stderr, behind a prefix.
    pub(crate) fn new(name: String, prefix: String) -> Self {
        Self { name, prefix: Some(prefix), ..Self::default() }
    }

    /// To who passes the lines on.
    pub(crate) fn lines(take: impl Fn(String) + Send + Sync + 'static) -> Self {
        Self { lines: Some(Arc::new(take)), ..Self::default() }
    }
}

impl std::fmt::Debug for LogTarget {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LogTarget").field("prefix", &self.prefix).field("file", &self.file).finish()
    }
}

/// Copies lines until every writer has closed the pipe. Never fails: a full disk must not block
/// a worker on its own output.
pub(crate) fn pump(output: PipeReader, target: &LogTarget) {
    let mut file = target.file.as_ref().and_then(open);
    let mut reader = BufReader::new(output);
    let mut line = Vec::new();
    // A line without end, such as another program's progress bar, is passed on in pieces.
    while matches!(reader.by_ref().take(MAX_LINE).read_until(b'\n', &mut line), Ok(n) if n > 0) {
        if let Some(file) = &mut file {
            let _ = file.write_all(&line);
        }
        let text = || String::from_utf8_lossy(&line).trim_end().to_owned();
        if let Some(lines) = &target.lines {
            lines(text());
        }
        if let Some(prefix) = &target.prefix {
            console::note(format!("{prefix} {}", text()));
        }
        line.clear();
    }
}

fn open(path: &PathBuf) -> Option<File> {
    let file = OpenOptions::new().create(true).append(true).open(path);
    file.map_err(|error| console::note(format!("cannot log to {}: {error}", path.display()))).ok()
}
