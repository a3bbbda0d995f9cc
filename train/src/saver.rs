//! Checkpoints that are written while training goes on.

use crate::snapshot::{Labels, Snapshot, Source};
use crate::{Error, Result};
use mobula_core::Member;
use mobula_core::checkpoint::CheckpointStore;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

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
    store: Arc<Store>,
    /// So many so far, on all ranks that write.
    saves: u64,
    /// The memory of the copy before.
    spare: Option<Snapshot>,
    /// That of the first one: the system takes longer to give it than a copy takes.
    room: Option<JoinHandle<Snapshot>>,
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
    pub(crate) fn new(store: Store) -> Self {
        Self { store: Arc::new(store), saves: 0, spare: None, room: None, under_way: None }
    }

    /// Whether it can go on writing for this member of a group, with a state that is divided or not: one
    /// of a generation before knows neither the ranks that write the other parts nor which these are.
    pub(crate) fn fits(&self, member: &Arc<Member>, is_divided: bool) -> bool {
        let was_divided = self.store.labels.share.is_some();
        Arc::ptr_eq(&self.store.member, member) || !(was_divided || is_divided)
    }

    /// Gets the memory of the first copy while training begins.
    pub(crate) fn make_room(&mut self, blank: Snapshot) {
        let touch = move || {
            step_back();
            blank.touch()
        };
        // Without a thread it is got later.
        self.room = std::thread::Builder::new().name("checkpoint".to_owned()).spawn(touch).ok();
    }

    /// Where the next copy goes.
    fn memory(&mut self) -> impl FnOnce() -> Snapshot + Send + use<> {
        let (spare, room) = (self.spare.take(), self.room.take());
        let made = move || room.and_then(|room| room.join().ok());
        move || spare.or_else(made).unwrap_or_default()
    }

    fn next(&mut self) -> u64 {
        self.saves += 1;
        self.saves
    }

    /// Begins to copy and write in a thread of its own, after what is under way. Nothing may change
    /// the tensors until the gate is open. Gives the error of the one before.
    pub(crate) fn begin(&mut self, source: Source, files: Files) -> (Arc<Gate>, Result<()>) {
        let before = self.finish();
        let gate = Arc::new(Gate::default());
        let opener = Opener(Arc::clone(&gate));
        let (store, memory, save) = (Arc::clone(&self.store), self.memory(), self.next());
        let is_on_cpu = source.is_on_cpu();
        let copy = move || source.copy(memory());
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
                    let written = store.write(&snapshot, &files, save);
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
        let snapshot = source.copy(self.memory()())?;
        let save = self.next();
        let written = self.store.write(&snapshot, files, save);
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

/// Where checkpoints are written, and with whom.
pub(crate) struct Store {
    pub(crate) checkpoints: CheckpointStore,
    pub(crate) labels: Labels,
    pub(crate) member: Arc<Member>,
}

impl Store {
    fn write(&self, snapshot: &Snapshot, files: &Files, save: u64) -> Result<()> {
        match self.labels.share {
            None => self.commit(snapshot, files, None),
            Some(_) => self.write_in_parts(snapshot, files, save),
        }
    }

    /// Each rank writes its part of the optimizer's state; when all have, the first one commits them
    /// with everything else.
    fn write_in_parts(&self, snapshot: &Snapshot, files: &Files, save: u64) -> Result<()> {
        let parts = self.parts(save);
        if self.member.rank() == 0 {
            // No other rank is further than this one, and none is at an earlier save.
            remove_parts(self.checkpoints.dir(), Some(&parts));
        }
        let name = std::fs::create_dir_all(&parts)
            .map_err(|error| Error::program(format!("cannot create {}: {error}", parts.display())))
            .and_then(|()| snapshot.write_optimizer(&parts, &self.labels));
        let names = self.tell(name, save);
        if self.member.rank() > 0 {
            return names.map(drop);
        }
        let done = names.and_then(|names| self.commit(snapshot, files, Some((&parts, &names))));
        // What is left of it costs room only, until the next training begins.
        let _ = std::fs::remove_dir_all(&parts);
        done
    }

    /// Tells all ranks the name of what this one has written, or why it could not, and gives theirs.
    fn tell(&self, name: Result<String>, save: u64) -> Result<Vec<String>> {
        let said: Said = name.map_err(|error| error.to_string());
        let said = serde_json::to_vec(&said).map_err(mobula_core::Error::layer)?;
        let key = format!("checkpoint: part {save}");
        let all = self.member.all_gather(&key, &said, LONG)?;
        let name = |(rank, said): (usize, &[u8])| match serde_json::from_slice::<Said>(said) {
            Ok(Ok(name)) => Ok(name),
            Ok(Err(reason)) => Err(Error::Unwritten { rank, reason }),
            Err(error) => Err(Error::program(error)),
        };
        all.iter().map(AsRef::as_ref).enumerate().map(name).collect()
    }

    fn parts(&self, save: u64) -> PathBuf {
        let generation = self.member.generation();
        self.checkpoints.dir().join(format!("{PARTS}{generation}-{save}"))
    }

    fn commit(
        &self,
        snapshot: &Snapshot,
        files: &Files,
        parts: Option<(&Path, &[String])>,
    ) -> Result<()> {
        let parts = parts.into_iter().flat_map(|(dir, names)| names.iter().map(|n| dir.join(n)));
        self.checkpoints.save(snapshot.saved.step, |dir| {
            snapshot.write(dir, &self.labels).map_err(mobula_core::Error::layer)?;
            for (name, content) in files {
                std::fs::write(dir.join(name), content).map_err(mobula_core::Error::layer)?;
            }
            for (rank, part) in parts.enumerate() {
                let name = part.file_name().unwrap_or_default();
                std::fs::rename(&part, dir.join(name)).map_err(|error| {
                    let part = part.display();
                    mobula_core::Error::layer(format!(
                        "cannot take rank {rank}'s part {part}: {error}; do all workers see the run directory?"
                    ))
                })?;
            }
            Ok(())
        })?;
        Ok(())
    }
}

/// The name of a part, or why there is none.
type Said = std::result::Result<String, String>;

/// How folders begin that hold the parts of a checkpoint which is not yet one.
const PARTS: &str = ".parts-";
/// How long ranks may take to write their parts. A lost one is noticed sooner.
const LONG: Duration = Duration::from_secs(600);

/// Removes what is left of checkpoints that were not finished, but for those parts.
pub(crate) fn remove_parts(checkpoints: &Path, but: Option<&Path>) {
    let entries = std::fs::read_dir(checkpoints).into_iter().flatten().flatten();
    let is_part = |name: &std::ffi::OsStr| name.to_string_lossy().starts_with(PARTS);
    let paths = entries.filter(|entry| is_part(&entry.file_name())).map(|entry| entry.path());
    for path in paths.filter(|path| but != Some(path)) {
        // It costs room only.
        let _ = std::fs::remove_dir_all(path);
    }
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
