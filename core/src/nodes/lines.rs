//! What workers on other machines print, on its way to the terminal or to files. Whoever takes nothing
//! holds up nobody: then lines are left out, and it is said how many.

use super::far::FarWorker;
use crate::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};

/// Lines that may wait to be written.
const LINES: usize = 4096;

/// To the thread that writes.
#[derive(Clone, Debug)]
pub(super) struct Lines(SyncSender<(Arc<FarWorker>, String)>);

impl Lines {
    /// A thread that writes, and may have to wait for a terminal or a disk.
    pub(super) fn start() -> Result<Self, Error> {
        let (lines, inbox) = sync_channel::<(Arc<FarWorker>, String)>(LINES);
        let thread = std::thread::Builder::new().name("mobula-log".to_owned());
        let write = move || inbox.into_iter().for_each(|(worker, line)| worker.line(&line));
        thread.spawn(write).map_err(|error| Error::system("starting a thread", error))?;
        Ok(Self(lines))
    }

    pub(super) fn print(&self, worker: &Arc<FarWorker>, line: String) {
        worker.left_out().pass(line, |line| {
            let sent = self.0.try_send((Arc::clone(worker), line));
            !matches!(sent, Err(TrySendError::Full(_)))
        });
    }

    /// Of a worker that prints no more.
    pub(super) fn end(&self, worker: &Arc<FarWorker>, tokio: &tokio::runtime::Handle) {
        let Some(note) = worker.left_out().take() else { return };
        let (lines, worker) = (self.0.clone(), Arc::clone(worker));
        // It may wait: nothing comes after it.
        tokio.spawn_blocking(move || drop(lines.send((worker, note))));
    }
}

/// Lines of one worker that were left out, and of which that was not said yet.
#[derive(Debug, Default)]
pub(super) struct LeftOut(AtomicU64);

impl LeftOut {
    /// Sends a line, after how many were left out before it; `send` says whether there was room.
    fn pass(&self, line: String, send: impl Fn(String) -> bool) {
        let is_said = match self.0.load(Ordering::Relaxed) {
            0 => true,
            lines => send(note(lines)),
        };
        if is_said {
            self.0.store(0, Ordering::Relaxed);
        }
        if !is_said || !send(line) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// What is still to be said.
    fn take(&self) -> Option<String> {
        Some(self.0.swap(0, Ordering::Relaxed)).filter(|lines| *lines > 0).map(note)
    }
}

fn note(lines: u64) -> String {
    format!("{lines} lines left out")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_that_are_left_out_are_counted_and_said() {
        let (sender, written) = sync_channel(2);
        let left_out = LeftOut::default();
        let print = |line: &str| {
            left_out.pass(line.to_owned(), |line| sender.try_send(line).is_ok());
        };
        ["a", "b", "c", "d"].into_iter().for_each(print);
        assert_eq!(written.try_iter().collect::<Vec<_>>(), ["a", "b"]);
        print("e");
        assert_eq!(written.try_iter().collect::<Vec<_>>(), ["2 lines left out", "e"]);
        ["f", "g", "h"].into_iter().for_each(print);
        // There is room for what is to be said, and no more.
        written.recv().expect("f");
        print("i");
        assert_eq!(written.try_iter().collect::<Vec<_>>(), ["g", "1 lines left out"]);
        assert_eq!(left_out.take().as_deref(), Some("1 lines left out"));
        assert_eq!(left_out.take(), None);
    }
}
