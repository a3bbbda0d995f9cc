//! What a worker keeps of its run: checkpoints on disk, and, for a rank that loses its own, what it
//! has in memory.

use crate::collective::Collective;
use crate::heal::{Kept, heal};
use crate::report::{Resumed, WorkerReport};
use crate::saver::{Saver, Store};
use crate::snapshot::{Labels, Snapshot, Source};
use crate::state::{STATE, SavedState, TrainState};
use crate::{Result, setup::Setup};
use mobula_core::Member;
use mobula_core::checkpoint::CheckpointStore;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

/// What the rank of this process had when its function ended, by training. A function that is called
/// again in the next generation, maybe as another rank, finds it here. Only of workers in processes,
/// which are of one group and end with it.
static LEFT: LazyLock<Mutex<HashMap<u64, Left>>> = LazyLock::new(Mutex::default);

#[derive(Default)]
struct Left {
    /// The states that the context had restored, in that order, after their last steps.
    last: Vec<Option<Kept>>,
    /// With a checkpoint that is being written.
    saver: Option<Saver>,
}

fn left() -> MutexGuard<'static, HashMap<u64, Left>> {
    LEFT.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(crate) struct Keeper {
    member: Arc<Member>,
    training: u64,
    /// Whether new ranks get what the others have.
    heals: bool,
    last: Vec<Option<Kept>>,
    /// States restored so far.
    restored: usize,
    saver: Option<Saver>,
    /// More files for each checkpoint.
    pub(crate) files: BTreeMap<String, Vec<u8>>,
}

impl Keeper {
    pub(crate) fn new(member: &Arc<Member>, setup: &Setup) -> Self {
        let Left { last, saver } = left().remove(&setup.training).unwrap_or_default();
        Self {
            member: Arc::clone(member),
            training: setup.training,
            heals: setup.heals && (setup.is_elastic || member.world_size() > 1),
            last,
            restored: 0,
            saver,
            files: BTreeMap::new(),
        }
    }

    pub(crate) fn is_first_generation(&self) -> bool {
        self.member.generation() == 0
    }

    /// Errors when a newer generation follows.
    pub(crate) fn check_generation(&self) -> Result<()> {
        Ok(self.member.check_generation()?)
    }

    /// The run changes now.
    pub(crate) fn let_go(&mut self, state: &TrainState) {
        if let Some(last) = state.slot.and_then(|slot| self.last.get_mut(slot)) {
            *last = None;
        }
    }

    /// Remembers the run as it is after a step or an epoch.
    pub(crate) fn remember(&mut self, state: &TrainState) -> Result<()> {
        self.keep(state, true)
    }

    /// Remembers it after a step of which others have weights that this rank does not have yet.
    pub(crate) fn remember_part(&mut self, state: &TrainState) -> Result<()> {
        self.keep(state, false)
    }

    fn keep(&mut self, state: &TrainState, is_complete: bool) -> Result<()> {
        // Without a position nobody could go on from it.
        if let Some(slot) = state.slot.filter(|_| self.heals && state.has_position()) {
            let length = self.last.len().max(slot + 1);
            self.last.resize_with(length, || None);
            self.last[slot] = Some(Kept::of(state, is_complete)?);
        }
        Ok(())
    }

    /// Keeps what this rank needs to take the next step, if others have.
    pub(crate) fn keep_gradients(&mut self, state: &mut TrainState, is_taken: bool) {
        let slot = state.slot.and_then(|slot| self.last.get_mut(slot));
        if let Some(kept) = slot.and_then(Option::as_mut) {
            kept.keep_gradients(state, is_taken);
        }
    }

    /// Goes on from what the ranks have that were not lost, the one that is furthest. All ranks must
    /// call it alike.
    pub(crate) fn heal(
        &mut self,
        state: &mut TrainState,
        collective: &dyn Collective,
    ) -> Result<Option<Resumed>> {
        let slot = self.restored;
        (self.restored, state.slot) = (slot + 1, Some(slot));
        if !self.heals || self.is_first_generation() {
            return Ok(None);
        }
        // It stays: if one is lost meanwhile, it is what this rank leaves once more.
        heal(self.last.get(slot).and_then(Option::as_ref), state, collective)
    }

    /// What writes this rank's checkpoints, if it does.
    fn saver(&mut self, state: &TrainState, setup: &Setup) -> Option<&mut Saver> {
        let (is_first, is_shared) = (self.member.rank() == 0, state.updater.shared().is_some());
        let dir = setup.checkpoints.as_ref().filter(|_| is_first || is_shared)?;
        Some(self.saver.get_or_insert_with(|| {
            let (checkpoints, labels) = (store(dir, setup), Labels::of(state));
            Saver::new(Store { checkpoints, labels, member: Arc::clone(&self.member) })
        }))
    }

    /// Training begins, and will have checkpoints in the background.
    pub(crate) fn make_room(&mut self, state: &TrainState, setup: &Setup) -> Result<()> {
        let is_first = self.member.rank() == 0;
        // One that is there has room, or is yet to end.
        if self.saver.is_some() || !setup.asynchronous {
            return Ok(());
        }
        if let Some(saver) = self.saver(state, setup) {
            saver.make_room(Snapshot::blank(state, is_first)?);
        }
        Ok(())
    }

    /// Rank 0 writes a checkpoint, if the run has any, or each its part of it. In the background it may fail, which is said
    /// later; otherwise the others have to wait.
    pub(crate) fn save(
        &mut self,
        state: &mut TrainState,
        setup: &Setup,
        in_background: bool,
    ) -> Result<()> {
        let (is_first, files) = (self.member.rank() == 0, self.files.clone());
        self.settle_former(state)?;
        let Some(saver) = self.saver(state, setup) else {
            return Ok(());
        };
        let source = match is_first {
            true => Source::of(state, state.saved())?,
            false => Source::of_optimizer(state, state.saved())?,
        };
        if !in_background {
            return saver.save(source, &files);
        }
        let (copying, before) = saver.begin(source, files);
        state.updater.hold(copying);
        before.or_else(|error| self.note_unsaved(&error))
    }

    /// Ends what cannot go on writing for this generation.
    fn settle_former(&mut self, state: &TrainState) -> Result<()> {
        let is_divided = state.updater.shared().is_some();
        match self.saver.take_if(|saver| !saver.fits(&self.member, is_divided)) {
            Some(mut former) => former.finish().or_else(|error| self.note_unsaved(&error)),
            None => Ok(()),
        }
    }

    /// Training goes on, and what was saved before stays.
    fn note_unsaved(&self, error: &crate::Error) -> Result<()> {
        self.note(format!("a checkpoint was not written, the one before it stays: {error}"))
    }

    /// Waits for the checkpoint that is being written.
    pub(crate) fn settle(&mut self) -> Result<()> {
        let written = self.saver.as_mut().map_or(Ok(()), Saver::finish);
        written.or_else(|error| self.note_unsaved(&error))
    }

    /// Says what the user should know, once for all ranks.
    pub(crate) fn note(&self, text: String) -> Result<()> {
        match self.member.rank() {
            0 => Ok(self.member.report(&WorkerReport::Note(text))?),
            _ => Ok(()),
        }
    }

    /// Whether no checkpoint is being written.
    pub(crate) fn is_idle(&self) -> bool {
        self.saver.as_ref().is_none_or(Saver::is_idle)
    }

    /// Says if a checkpoint in the background has failed.
    pub(crate) fn poll(&mut self) -> Result<()> {
        let written = self.saver.as_mut().map_or(Ok(()), Saver::poll);
        written.or_else(|error| self.note_unsaved(&error))
    }
}

impl Drop for Keeper {
    /// However the function ends: if a rank was lost, all are called again.
    fn drop(&mut self) {
        if !self.heals || std::thread::panicking() {
            return;
        }
        // What is being written may take longer than the others wait. It is waited for where the
        // function is not known to be called again.
        let saver = self.saver.take().filter(|_| self.check_generation().is_err());
        let last = std::mem::take(&mut self.last);
        left().insert(self.training, Left { last, saver });
    }
}

/// The checkpoints of a run, as it keeps them.
pub(crate) fn store(dir: &Path, setup: &Setup) -> CheckpointStore {
    let store = CheckpointStore::new(dir, setup.keep);
    match setup.best.clone() {
        Some(best) => store.with_best(best.keep, move |path| best.score(path)),
        None => store,
    }
}

impl crate::config::BestCheckpoints {
    /// The metric of the epoch that it was taken after, so that more is better.
    pub(crate) fn score(&self, checkpoint: &Path) -> Option<f64> {
        let text = std::fs::read(checkpoint.join(STATE)).ok()?;
        let saved: SavedState = serde_json::from_slice(&text).ok()?;
        // The metrics of one that was taken within an epoch are those of the epoch before.
        let is_after_epoch = saved.tally.rows == 0;
        let value = saved.metrics.get(&self.metric).filter(|_| is_after_epoch)?;
        Some(self.mode.sign() * value).filter(|score| !score.is_nan())
    }
}
