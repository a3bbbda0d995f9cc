//! What the ranks that are left have of a run is put together on all of them.
//!
//! Where each rank has all of it, that is what the one has that is furthest. Where the optimizer's state
//! is divided, each has a part and the mirror of another one. No rank begins to update its parts before
//! all have the sums of the gradients ([`WorkerContext::commit`]), and none begins the next step before
//! all have updated. So those that are left are of one step, or can be: who has not heard that all had
//! the sums has kept them, and takes the step now.
//!
//! [`WorkerContext::commit`]: crate::WorkerContext

use crate::collective::Collective;
use crate::optim::{Ema, ParamState, Updater};
use crate::report::Resumed;
use crate::share::Held;
use crate::snapshot::{Named, Snapshot, Source, broadcast_bytes};
use crate::state::{SavedState, TrainState};
use crate::{Error, Result};
use mobula_nn::{Gradients, Params};
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// What a rank has kept of a run after its last step.
pub(crate) struct Kept {
    source: Source,
    /// Where the optimizer's state is divided.
    held: Option<Held>,
    /// Weights that others have updated are of this step too, and the averages have taken them in.
    is_complete: bool,
    /// The step that comes next, if others may have taken it.
    next: Option<Next>,
}

/// A step of which all ranks have the sums.
enum Next {
    Taken(Box<Gradients>),
    LeftOut,
}

impl Kept {
    pub(crate) fn of(state: &TrainState, is_complete: bool) -> Result<Self> {
        let held = state.updater.shared().map(|share| share.held().clone());
        Ok(Self { source: Source::of(state, state.saved())?, held, is_complete, next: None })
    }

    /// The step ends here, and so does the state.
    pub(crate) fn keep_gradients(&mut self, state: &mut TrainState, is_taken: bool) {
        let blank = || Gradients::zeros(state.model.params());
        self.next = Some(match is_taken {
            true => Next::Taken(Box::new(std::mem::replace(&mut state.gradients, blank()))),
            false => Next::LeftOut,
        });
    }

    /// Of so many parameters.
    fn standing(&self, params: usize) -> Standing {
        let SavedState { step, epoch, .. } = *self.source.saved();
        let (is_complete, has_next) = (self.is_complete, self.next.is_some());
        let held = self.held.as_ref().map_or([0..params, 0..0], Held::ranges);
        Standing { step, epoch, is_complete, has_next, params, held }
    }

    /// As of this step, which is the one that was kept or the one behind it.
    fn at(&self, step: u64, state: &mut TrainState) -> Result<Snapshot> {
        let mut snapshot = self.source.clone().copy(Snapshot::default())?;
        if let (Some(Next::Taken(gradients)), Some(held)) = (&self.next, &self.held)
            && snapshot.saved.step < step
        {
            let params = state.model.params();
            put(&snapshot.weights, params)?;
            let kept = (&mut snapshot.optimizer, &snapshot.saved.updater);
            state.updater.update_kept(params, gradients, kept, held)?;
            for (named, (name, var)) in snapshot.weights.iter_mut().zip(params.vars()) {
                named.fill(&name, &var)?;
            }
        }
        Ok(snapshot)
    }
}

fn put(weights: &[Named], params: &Params) -> Result<()> {
    weights.iter().zip(params.vars()).try_for_each(|(named, (_, var))| named.put(&var))
}

/// What a rank says of what it has.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Standing {
    step: u64,
    epoch: u64,
    is_complete: bool,
    has_next: bool,
    /// Parameters of the model.
    params: usize,
    /// Of them, in the order of their names.
    held: [Range<usize>; 2],
}

impl Standing {
    fn numbers(own: Option<&Self>) -> [f64; 10] {
        let Some(own) = own else {
            return [0.0; 10];
        };
        let [held, mirrored] = &own.held;
        let ends = [held.start, held.end, mirrored.start, mirrored.end].map(|end| end as u64);
        let [a, b, c, d] = ends;
        let flags = [own.is_complete, own.has_next].map(u64::from);
        let [is_complete, has_next] = flags;
        let (step, epoch, params) = (own.step, own.epoch, own.params as u64);
        [1, step, epoch, is_complete, has_next, params, a, b, c, d].map(|number| number as f64)
    }

    fn from_numbers(numbers: [f64; 10]) -> Option<Self> {
        let [is_there, step, epoch, is_complete, has_next, params, a, b, c, d] =
            numbers.map(|number| number as u64);
        let standing = Self {
            step,
            epoch,
            is_complete: is_complete > 0,
            has_next: has_next > 0,
            params: params as usize,
            held: [a as usize..b as usize, c as usize..d as usize],
        };
        (is_there > 0).then_some(standing)
    }

    fn can_be_at(&self, step: u64) -> bool {
        self.step == step || (self.has_next && self.step + 1 == step)
    }

    fn has(&self, param: usize) -> bool {
        self.held.iter().any(|range| range.contains(&param))
    }
}

/// Who gives what.
#[derive(Debug, PartialEq, Eq)]
struct Plan {
    step: u64,
    /// Who has come furthest, and gives what is not of one parameter.
    root: usize,
    /// Who gives each parameter, with what the optimizer remembers of it.
    givers: Vec<usize>,
    /// Whether the averages of the root are of this step.
    is_complete: bool,
}

impl Plan {
    /// Of what the ranks have; nothing if that is not all.
    fn of(standings: &[Option<Standing>]) -> Option<Self> {
        let any = || standings.iter().enumerate().filter_map(|(at, one)| Some((at, one.as_ref()?)));
        let furthest = |one: &Standing| (one.step, one.epoch, one.is_complete);
        // The first one of equals.
        let (root, of_root) = any().rev().max_by_key(|(_, one)| furthest(one))?;
        let (step, is_complete) = (of_root.step, of_root.is_complete);
        let giver = |param| {
            let mut givers = any().filter(|(_, one)| one.can_be_at(step) && one.has(param));
            givers.next().map(|(rank, _)| rank)
        };
        let givers = (0..of_root.params).map(giver).collect::<Option<_>>()?;
        Some(Self { step, root, givers, is_complete })
    }
}

/// Goes on from what the ranks have, if that is all of a run. All ranks must call it alike.
pub(crate) fn heal(
    kept: Option<&Kept>,
    state: &mut TrainState,
    collective: &dyn Collective,
) -> Result<Option<Resumed>> {
    let params = state.model.params().vars().len();
    let own = kept.map(|kept| kept.standing(params));
    let standings = collective.gather_each(Standing::numbers(own.as_ref()))?;
    let standings: Vec<_> = standings.into_iter().map(Standing::from_numbers).collect();
    let Some(plan) = Plan::of(&standings) else {
        return Ok(None);
    };
    let own = kept.filter(|_| own.is_some_and(|own| own.can_be_at(plan.step)));
    let mut whole = match own {
        Some(kept) => kept.at(plan.step, state)?,
        None => Snapshot::of(state, state.saved())?,
    };
    Healing { plan: &plan, collective }.fill(&mut whole, &state.updater)?;
    whole.put(state)?;
    if !plan.is_complete {
        state.updater.average_in(state.model.params())?;
    }
    let SavedState { step, epoch, metrics, .. } = whole.saved;
    Ok(Some(Resumed { step, epoch, metrics, from_rank: Some(plan.root) }))
}

/// Of a snapshot of which each rank has what it gives.
struct Healing<'a> {
    plan: &'a Plan,
    collective: &'a dyn Collective,
}

impl Healing<'_> {
    fn fill(&self, whole: &mut Snapshot, updater: &Updater) -> Result<()> {
        self.header(whole)?;
        for (at, giver) in self.plan.givers.iter().enumerate() {
            self.collective.broadcast(&mut whole.weights[at].values, *giver)?;
            self.remembered(&mut whole.optimizer.params[at], *giver, updater)?;
        }
        for buffer in &mut whole.buffers {
            self.collective.broadcast(&mut buffer.values, self.plan.root)?;
        }
        for averages in whole.ema.iter_mut().flat_map(Ema::averages_mut) {
            self.collective.broadcast(averages, self.plan.root)?;
        }
        Ok(())
    }

    /// What the optimizer remembers of a parameter, for the ranks that are to have it.
    fn remembered(&self, param: &mut ParamState, giver: usize, updater: &Updater) -> Result<()> {
        let moves = updater.optimizer().param_options(&param.name, &param.shape).is_some();
        if param.slots.is_empty() && moves {
            param.slots = updater.optimizer().slots(&param.shape);
        }
        let mut steps = [param.steps as f64];
        self.collective.broadcast(&mut steps, giver)?;
        param.steps = steps[0] as u64;
        for slot in &mut param.slots {
            self.collective.broadcast(&mut slot.values, giver)?;
        }
        if updater.shared().is_some_and(|share| !share.held().has(&param.name)) {
            (param.steps, param.slots) = (0, Vec::new());
        }
        Ok(())
    }

    /// What is not a tensor.
    fn header(&self, whole: &mut Snapshot) -> Result<()> {
        let root = self.plan.root;
        let mut header =
            serde_json::to_vec(&Header::of(whole)).map_err(mobula_core::Error::layer)?;
        broadcast_bytes(self.collective, &mut header, root)?;
        let header: Header = serde_json::from_slice(&header).map_err(mobula_core::Error::layer)?;
        if header.lens != lens(whole) {
            let (expected, got) = (header.lens.iter().sum(), lens(whole).iter().sum());
            return Err(Error::OtherState { root, expected, got });
        }
        (whole.saved, whole.stopped) = (header.saved, header.stopped);
        whole.optimizer.step = header.step;
        let weights = whole.weights.iter().map(|weights| weights.values.len());
        whole.ema.iter_mut().for_each(|ema| ema.begin_at(header.ema_updates, weights.clone()));
        Ok(())
    }
}

/// What is told of a snapshot beside its tensors.
#[derive(Serialize, Deserialize)]
struct Header {
    saved: SavedState,
    stopped: bool,
    lens: Vec<usize>,
    step: u64,
    ema_updates: u64,
}

impl Header {
    fn of(snapshot: &Snapshot) -> Self {
        Self {
            saved: snapshot.saved.clone(),
            stopped: snapshot.stopped,
            lens: lens(snapshot),
            step: snapshot.optimizer.step,
            ema_updates: snapshot.ema.as_ref().map_or(0, Ema::updates),
        }
    }
}

/// Of weights and buffers.
fn lens(snapshot: &Snapshot) -> Vec<usize> {
    let named = snapshot.weights.iter().chain(&snapshot.buffers);
    named.map(|named| named.values.len()).collect()
}

#[cfg(test)]
mod tests;
