//! What programs print: progress bars on a terminal, plain lines otherwise, never torn.

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::IsTerminal;
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Plain progress lines come at most this often.
const LINE_INTERVAL: Duration = Duration::from_secs(2);

static BARS: LazyLock<MultiProgress> = LazyLock::new(|| {
    let bars = MultiProgress::new();
    if !is_terminal() {
        bars.set_draw_target(ProgressDrawTarget::hidden());
    }
    bars
});

/// Whether stderr is a terminal: where live tables and bars go.
pub fn is_terminal() -> bool {
    std::io::stderr().is_terminal()
}

/// Prints a line to stderr above any progress bars.
pub fn note(line: impl AsRef<str>) {
    BARS.suspend(|| put(std::io::stderr(), line.as_ref()));
}

/// Prints a line to stdout above any progress bars.
pub fn line(line: impl AsRef<str>) {
    BARS.suspend(|| put(std::io::stdout(), line.as_ref()));
}

/// A reader that has gone, as in `program | head`, is no reason to end.
fn put(mut to: impl std::io::Write, line: &str) {
    let _ = writeln!(to, "{line}");
}

/// Progress of a long piece of work: a bar on a terminal; otherwise a plain line at most every two
/// seconds, and the last one.
#[derive(Debug)]
pub struct Progress {
    bar: ProgressBar,
    label: String,
    total: u64,
    lines: Mutex<Lines>,
}

/// What was and what is still to be printed where there is no terminal.
#[derive(Debug, Default)]
struct Lines {
    printed: Option<Instant>,
    waiting: Option<String>,
}

impl Progress {
    /// A bar over `total` steps.
    pub fn new(label: impl Into<String>, total: u64) -> Self {
        let (label, bar) = (label.into(), BARS.add(ProgressBar::new(total)));
        let template = "{prefix} {bar:32.cyan/blue} {pos}/{len} {elapsed_precise} {wide_msg}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_prefix(label.clone());
        Self { bar, label, total, lines: Mutex::default() }
    }

    /// Moves to `step` and shows `message` behind the bar.
    pub fn update(&self, step: u64, message: impl Into<String>) {
        let message = message.into();
        if is_terminal() {
            self.bar.set_position(step);
            self.bar.set_message(message);
            return;
        }
        let mut lines = self.lines();
        lines.waiting = Some(format!("{} {step}/{}  {message}", self.label, self.total));
        if lines.printed.is_none_or(|at| at.elapsed() >= LINE_INTERVAL) {
            lines.print();
        }
    }

    /// Takes the bar away, or prints the last line.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
        BARS.remove(&self.bar);
        self.lines().print();
    }

    fn lines(&self) -> MutexGuard<'_, Lines> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Lines {
    fn print(&mut self) {
        if let Some(line) = self.waiting.take() {
            put(std::io::stderr(), &line);
            self.printed = Some(Instant::now());
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.finish();
    }
}
