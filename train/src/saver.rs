//! Checkpoints that are written while training goes on.

use crate::snapshot::{Labels, Snapshot, Source};
use crate::{Error, Result};
use mobula_core::checkpoint::CheckpointStore;
use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

/// Closed while something is copied.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    is_open: Mutex<bool>,
    opened: Condvar,
}

impl Gate {
    pub(crate) fn wait(&self) {
        let is_open = self.is_open.lock().unwrap_or_else(PoisonError::into_inner);
        let opened = self.opened.wait_while(is_open, |is_open| !*is_open);
        drop(opened.unwrap_or_else(PoisonError::into_inner));
    }
}

/// Opens the gate when dropped, so that nobody waits for a thread that has panicked.
struct Opener(Arc<Gate>);

impl Drop for Opener {
    fn drop(&mut self) {
        *self.0.is_open.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.0.opened.notify_all();
    }
}

/// Writes the checkpoints of a run, one at a time.
pub(crate) struct Saver {
    store: CheckpointStore,
    labels: Labels,
    /// The memory of the copy before.
    spare: Option<Snapshot>,
    under_way: Option<JoinHandle<Written>>,
}

/// Of what is to be written.
enum Copy<F> {
    Due(F),
    Made(Box<Result<Snapshot>>),
}

type Written = (Option<Snapshot>, Result<()>);

/// What goes into a checkpoint beside the state of the run.
type Files = BTreeMap<String, Vec<u8>>;

impl Saver {
    pub(crate) fn new(store: CheckpointStore, labels: Labels) -> Self {
        Self { store, labels, spare: None, under_way: None }
    }

    /// Begins to copy and write in a thread of its own, after what is under way. Nothing may change
    /// the tensors until the gate is open. Gives the error of the one before.
    pub(crate) fn begin(&mut self, source: Source, files: Files) -> (Arc<Gate>, Result<()>) {
        let before = self.finish();
        let gate = Arc::new(Gate::default());
        let opener = Opener(Arc::clone(&gate));
        let (store, labels, spare) = (self.store.clone(), self.labels.clone(), self.spare.take());
        let is_on_cpu = source.is_on_cpu();
        let copy = move || source.copy(spare.unwrap_or_default());
        // A device is for the thread that computes on it.
        let copy = if is_on_cpu { Copy::Due(copy) } else { Copy::Made(Box::new(copy())) };
        let write = move || {
            let snapshot = match copy {
                Copy::Due(copy) => copy(),
                Copy::Made(snapshot) => *snapshot,
            };
            drop(opener);
            step_back();
            match snapshot {
                Ok(snapshot) => {
                    let written = write(&store, &labels, &snapshot, &files);
                    (Some(snapshot), written)
                }
                Err(error) => (None, Err(error)),
            }
        };
        match std::thread::Builder::new().name("checkpoint".to_owned()).spawn(write) {
            Ok(thread) => self.under_way = Some(thread),
            Err(error) => return (gate, before.and(Err(Error::program(error)))),
        }
        (gate, before)
    }

    /// Copies and writes now.
    pub(crate) fn save(&mut self, source: Source, files: &Files) -> Result<()> {
        // What became of the one before, this one replaces.
        let _before = self.finish();
        let snapshot = source.copy(self.spare.take().unwrap_or_default())?;
        let written = write(&self.store, &self.labels, &snapshot, files);
        self.spare = Some(snapshot);
        written
    }

    /// Whether nothing is under way, or it is over.
    pub(crate) fn is_idle(&self) -> bool {
        self.under_way.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// What has become of the one that is under way, if it is over.
    pub(crate) fn poll(&mut self) -> Result<()> {
        match &self.under_way {
            Some(thread) if thread.is_finished() => self.finish(),
            _ => Ok(()),
        }
    }

    /// Waits for what is under way.
    pub(crate) fn finish(&mut self) -> Result<()> {
        let Some(thread) = self.under_way.take() else {
            return Ok(());
        };
        let panicked = |_| (None, Err(Error::program("the thread that writes it panicked")));
        let (spare, written) = thread.join().unwrap_or_else(panicked);
        self.spare = spare;
        written
    }
}

impl Drop for Saver {
    fn drop(&mut self) {
        if let Err(error) = self.finish() {
            tracing::warn!(%error, "the last checkpoint was not written");
        }
    }
}

fn write(
    store: &CheckpointStore,
    labels: &Labels,
    snapshot: &Snapshot,
    files: &Files,
) -> Result<()> {
    store.save(snapshot.saved.step, |dir| {
        snapshot.write(dir, labels).map_err(mobula_core::Error::layer)?;
        for (name, content) in files {
            std::fs::write(dir.join(name), content).map_err(mobula_core::Error::layer)?;
        }
        Ok(())
    })?;
    Ok(())
}

/// The thread leaves its processor to the one that computes, which may have no other.
fn step_back() {
    #[cfg(target_os = "linux")]
    {
        let me = rustix::thread::gettid();
        // It is only slower then.
        let _ = rustix::process::setpriority_process(Some(me), 10);
    }
}
