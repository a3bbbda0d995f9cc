//! The tree-structured Parzen estimator.

use super::bells::Group;
use super::parzen::Parzen;
use super::{RandomSampler, Sampler};
use crate::history::{History, TrialState};
use crate::{Error, Params, SearchSpace};
use mobula_core::random::Stream;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// Draws candidates from the density of the good trials and takes the one that is most likely
/// under it compared with the density of all others (arXiv 2304.11127, as in Optuna 5).
///
/// ```
/// use mobula_tune::TpeSampler;
///
/// let sampler = TpeSampler::default().with_startup_trials(5);
/// assert!(sampler.multivariate);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TpeSampler {
    /// Random trials before the first modelled one. Default 10; with a budget of 16, use 5.
    pub n_startup_trials: usize,
    /// Candidates drawn for each trial. Default 24.
    pub n_ei_candidates: usize,
    /// One density over all parameters, so that their combinations count; otherwise each
    /// parameter by itself. Default true.
    pub multivariate: bool,
    /// Count running trials as bad ones, so that parallel trials spread out. Default true.
    pub constant_liar: bool,
}

impl Default for TpeSampler {
    fn default() -> Self {
        Self { n_startup_trials: 10, n_ei_candidates: 24, multivariate: true, constant_liar: true }
    }
}

impl TpeSampler {
    /// The same with so many random trials first.
    pub fn with_startup_trials(self, n_startup_trials: usize) -> Self {
        Self { n_startup_trials, ..self }
    }

    /// The same with one density over all parameters, or one for each.
    pub fn with_multivariate(self, multivariate: bool) -> Self {
        Self { multivariate, ..self }
    }

    /// The best of the candidates for the parameters `dims`, as internal coordinates.
    fn search(
        &self,
        space: &SearchSpace,
        history: &History,
        split: &Split,
        dims: &[usize],
        stream: Stream,
    ) -> Vec<f64> {
        let good = Parzen::new(space, history, &split.below, dims);
        let rest = Parzen::new(space, history, &split.above, dims);
        let draw = |c| good.sample(&mut stream.at(dims[0] as u64, c as u32));
        let mut candidates: Vec<Vec<f64>> = (0..self.n_ei_candidates).map(draw).collect();
        let (l, g) = (good.log_densities(&candidates), rest.log_densities(&candidates));
        let score = |c: usize| l[c] - g[c];
        let better = |best: usize, c: usize| if score(c) > score(best) { c } else { best };
        let best = (1..candidates.len()).fold(0, better);
        candidates.swap_remove(best)
    }
}

impl Sampler for TpeSampler {
    fn sample(&self, space: &SearchSpace, history: &History, seed: u64, number: usize) -> Params {
        if history.observed() < self.n_startup_trials.max(1) {
            return RandomSampler.sample(space, history, seed, number);
        }
        let stream = Stream::new(seed, "tune/tpe").child(number as u64);
        let split = Split::new(history, self.constant_liar);
        let dims: Vec<usize> = (0..space.parameters().len()).collect();
        let width = if self.multivariate { dims.len() } else { 1 };
        let search = |dims: &[usize]| self.search(space, history, &split, dims, stream);
        let coordinates: Vec<f64> = dims.chunks(width).flat_map(search).collect();
        space.decode(&coordinates)
    }

    fn config(&self) -> Value {
        json!({"tpe": self})
    }

    fn trials(&self, _: &SearchSpace) -> Result<Option<usize>, Error> {
        if self.n_ei_candidates == 0 {
            let (option, expected) = ("tpe: n_ei_candidates", "at least 1");
            return Err(Error::Option { option, expected, got: "0".into() });
        }
        Ok(None)
    }
}

/// The good trials and the others.
struct Split {
    below: Group,
    above: Group,
}

impl Split {
    /// The best tenth (at most 25) of the trials with a value are good: complete ones first, then
    /// pruned ones, those that got further first. Failed trials say nothing.
    fn new(history: &History, constant_liar: bool) -> Self {
        let trials = history.trials();
        let n = trials.len();
        let n_below = history.observed().div_ceil(10).min(25);
        let mut below = best(history, TrialState::Complete, n_below);
        below.extend(best(history, TrialState::Pruned, n_below - below.len()));
        below.sort_unstable();
        let counts = |t: usize| match trials[t].state {
            TrialState::Complete | TrialState::Pruned => below.binary_search(&(t as u32)).is_err(),
            TrialState::Waiting | TrialState::Running => constant_liar,
            TrialState::Failed => false,
        };
        let above = (0..n).filter(|t| counts(*t)).map(|t| t as u32).collect();
        Self { below: Group::new(below, n), above: Group::new(above, n) }
    }
}

/// The best `count` trials in this state; ties go to the earlier trial.
fn best(history: &History, state: TrialState, count: usize) -> Vec<u32> {
    let trials = history.trials();
    let mut found: Vec<u32> =
        (0..trials.len() as u32).filter(|t| trials[*t as usize].state == state).collect();
    // Pruned trials first by how far they got; complete ones only by value.
    let depth = |t: &u32| match state {
        TrialState::Pruned => trials[*t as usize].step.unwrap_or(0),
        _ => 0,
    };
    let loss = |t: &u32| trials[*t as usize].loss;
    let order = |a: &u32, b: &u32| {
        // NaN sorts last under total_cmp once its sign is cleared.
        let (x, y) = (loss(a), loss(b));
        let by_loss = x.is_nan().cmp(&y.is_nan()).then(x.total_cmp(&y));
        depth(b).cmp(&depth(a)).then(by_loss).then(a.cmp(b))
    };
    if count < found.len() {
        found.select_nth_unstable_by(count, order);
        found.truncate(count);
    }
    found
}
