//! What ranks on threads put together, wherever they were when one was lost.

use super::*;
use crate::collective::threads;
use crate::optim::{Clip, PlateauOptions, UpdaterOptions};
use crate::share::Share;
use candle_core::Device;
use mobula_core::StreamState;
use mobula_core::random::Stream;
use mobula_nn::models::MlpOptions;
use mobula_nn::{Model, ModelSpec};
use std::collections::BTreeMap;
use std::sync::Arc;

fn standing(step: u64, has_next: bool, held: [Range<usize>; 2]) -> Option<Standing> {
    Some(Standing { step, epoch: 0, is_complete: true, has_next, params: 3, held })
}

#[test]
fn what_ranks_say_comes_back() {
    let one = standing(9, true, [2..5, 0..2]).expect("one");
    let one = Standing { epoch: 7, is_complete: false, ..one };
    assert_eq!(Standing::from_numbers(Standing::numbers(Some(&one))), Some(one));
    assert_eq!(Standing::from_numbers(Standing::numbers(None)), None);
}

#[test]
fn the_furthest_gives_what_each_has() {
    let all = |step| standing(step, false, [0..3, 0..0]);
    let plan = Plan::of(&[None, all(4), all(5), all(5)]).expect("all");
    assert_eq!((plan.step, plan.root, plan.givers), (5, 2, vec![2, 2, 2]));
    assert_eq!(Plan::of(&[None, None]), None);
}

/// Of three ranks with a parameter each, and the mirror of the one before, the second is lost.
#[test]
fn mirrors_give_what_is_lost() {
    let plan = |first, third| Plan::of(&[first, None, third]);
    let first = |step, has_next| standing(step, has_next, [0..1, 2..3]);
    let third = |step, has_next| standing(step, has_next, [2..3, 1..2]);
    assert_eq!(plan(first(5, false), third(5, false)).expect("all").givers, [0, 2, 0]);
    let later = plan(first(4, true), third(5, false)).expect("it can take the step");
    assert_eq!((later.step, later.root, later.givers), (5, 2, vec![0, 2, 0]));
    assert_eq!(plan(first(4, true), third(4, true)).expect("nobody has").step, 4);
    assert_eq!(plan(first(4, false), third(5, false)), None, "of other steps");
    assert_eq!(plan(None, third(5, false)), None, "a part and its mirror");
}

fn state(seed: u64, collective: &Arc<dyn Collective>) -> TrainState {
    let options = UpdaterOptions {
        plateau: Some(PlateauOptions { patience: 0, ..Default::default() }),
        clip: Some(Clip::Norm(0.3)),
        ema: Some(0.9),
        ..Default::default()
    };
    let spec = ModelSpec::new("mlp", &MlpOptions::new(8, [16, 12], 3)).expect("spec");
    let model = Model::build(&spec, seed, &Device::Cpu).expect("model");
    let mut state = TrainState::new(model, options.build().expect("updater"), 5, 9);
    if collective.shard().world > 1 {
        state.updater.share(Share::of(&state.gradients, collective, true)).expect("shares");
    }
    state
}

/// How far a rank came in its third step before it heard of a loss.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Came {
    /// To its own end.
    Lost,
    /// Not to the sums of the gradients.
    Nowhere,
    /// So far that others may have had the sums. Whether the step is not left out.
    ToSums(bool),
    /// To its own part.
    ToUpdate,
    ToEnd(bool),
}

/// Gradients of a step, the sums over all ranks.
fn sums(state: &mut TrainState) {
    let mut rng = Stream::new(3, "gradients").at(state.step(), 0);
    state.gradients.values_mut().iter_mut().for_each(|value| *value = rng.normal() as f32);
    assert!(state.check(1.0).expect("numbers"));
}

fn count(state: &mut TrainState) {
    let step = state.step() + 1;
    let position = StreamState { manifest: "m".into(), version: 1, seed: 0, epoch: 0, step };
    state.count_step(Some(position));
}

/// So many steps. Between the second and the third the learning rate falls.
fn trained(steps: u64, collective: &Arc<dyn Collective>) -> TrainState {
    let mut state = state(5, collective);
    for step in 0..steps {
        if step == 2 {
            [1.0, 2.0].into_iter().for_each(|metric| state.updater.observe(metric));
        }
        sums(&mut state);
        state.update().expect("update");
        count(&mut state);
        state.updater.gather(state.model.params(), &mut state.gradients).expect("gather");
        state.updater.average_in(state.model.params()).expect("averages");
    }
    state
}

/// What a rank has kept that came so far in the third step.
fn train(came: Came, collective: &Arc<dyn Collective>) -> Option<Kept> {
    let keep = |state: &TrainState, is_complete| Kept::of(state, is_complete).ok();
    let (mut state, at_end) = (trained(2, collective), trained(3, collective));
    [1.0, 2.0].into_iter().for_each(|metric| state.updater.observe(metric));
    let mut before = keep(&state, true);
    sums(&mut state);
    match came {
        Came::Lost => None,
        Came::Nowhere => before,
        Came::ToSums(is_taken) => {
            before.as_mut().expect("kept").keep_gradients(&mut state, is_taken);
            before
        }
        Came::ToUpdate => {
            state.update().expect("update");
            count(&mut state);
            keep(&state, false)
        }
        Came::ToEnd(true) => keep(&at_end, true),
        Came::ToEnd(false) => {
            count(&mut state);
            keep(&state, true)
        }
    }
}

/// Runs a function on a rank for each of these.
fn on_ranks<T: Send, R: Send>(
    each: Vec<T>,
    run: impl Fn(T, &Arc<dyn Collective>) -> R + Sync,
) -> Vec<R> {
    let (collectives, run) = (threads(each.len()), &run);
    std::thread::scope(|scope| {
        let start = |(own, collective)| scope.spawn(move || run(own, &collective));
        let ranks: Vec<_> = each.into_iter().zip(collectives).map(start).collect();
        ranks.into_iter().map(|rank| rank.join().expect("a rank")).collect()
    })
}

/// What has to be the same, to the bit.
#[derive(Debug, PartialEq)]
struct Bits {
    step: u64,
    weights: Vec<Vec<u32>>,
    averages: Vec<Vec<u32>>,
    /// Of each parameter whose state the rank has: how often it was updated, and the state.
    remembered: BTreeMap<String, (u64, Vec<Vec<u32>>)>,
}

fn bits(state: &TrainState) -> Bits {
    let snapshot = Snapshot::of(state, state.saved()).expect("snapshot");
    let of = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
    let held = |param: &&ParamState| !param.slots.is_empty();
    let slots = |param: &ParamState| param.slots.iter().map(|s| of(&s.values)).collect();
    let remembered = |param: &ParamState| (param.name.clone(), (param.steps, slots(param)));
    let averages = snapshot.ema.as_ref().expect("averages").averages();
    Bits {
        step: snapshot.saved.step,
        weights: snapshot.weights.iter().map(|named| of(&named.values)).collect(),
        averages: averages.iter().map(|values| of(values)).collect(),
        remembered: snapshot.optimizer.params.iter().filter(held).map(remembered).collect(),
    }
}

/// What ranks have that began anew with what three others, or those that are left of them, had kept.
fn healed(came: [Came; 3], world: usize) -> Vec<Option<Bits>> {
    let mut kept = on_ranks(came.to_vec(), train);
    if world < kept.len() {
        kept.retain(Option::is_some);
    }
    kept.resize_with(world, || None);
    on_ranks(kept, |kept, collective| {
        let mut state = state(99, collective);
        let healed = heal(kept.as_ref(), &mut state, collective.as_ref()).expect("heal");
        healed.map(|_| bits(&state))
    })
}

/// Whether ranks have what an undisturbed training has after so many steps, and each parameter's
/// state twice, if there are two.
fn check(came: [Came; 3], world: usize, steps: u64) {
    let whole = on_ranks(vec![(); 3], |(), collective| bits(&trained(steps, collective)));
    let all: BTreeMap<_, _> = whole.iter().flat_map(|rank| rank.remembered.clone()).collect();
    let ranks: Vec<Bits> = healed(came, world).into_iter().flatten().collect();
    assert_eq!(ranks.len(), world, "{came:?}");
    let mut times: BTreeMap<&str, usize> = BTreeMap::new();
    for rank in &ranks {
        assert!(rank.weights == whole[0].weights, "{came:?}");
        assert!(rank.averages == whole[0].averages, "{came:?}");
        for (name, remembered) in &rank.remembered {
            assert!(*remembered == all[name], "{came:?}: {name}");
            *times.entry(name).or_default() += 1;
        }
    }
    assert_eq!(times.len(), all.len());
    assert!(times.values().all(|times| *times == world.min(2)), "{came:?}: {times:?}");
}

use Came::{Lost, Nowhere, ToEnd, ToSums, ToUpdate};

/// Whoever is lost, and wherever the others are, in as many ranks, fewer, and more.
#[test]
fn parts_come_together() {
    let after = [[ToSums(true), ToUpdate], [ToUpdate, ToUpdate], [ToEnd(true), ToUpdate]];
    let after = after.into_iter().chain([[ToEnd(true), ToEnd(true)], [ToSums(true), ToEnd(true)]]);
    let before = [[Nowhere, Nowhere], [Nowhere, ToSums(true)], [ToSums(true), ToSums(true)]];
    let before = before.into_iter().chain([[ToSums(false), Nowhere]]).map(|left| (left, 2));
    for ([a, b], steps) in after.map(|left| (left, 3)).chain(before) {
        for came in [[Lost, a, b], [a, Lost, b], [a, b, Lost], [Lost, b, a], [b, Lost, a]] {
            [2, 3, 4].into_iter().for_each(|world| check(came, world, steps));
        }
    }
}

/// All ranks leave to become more.
#[test]
fn parts_are_dealt_anew() {
    check([ToEnd(true), ToUpdate, ToSums(true)], 4, 3);
    check([Nowhere, ToSums(true), Nowhere], 5, 2);
}

/// It counts, and changes nothing.
#[test]
fn a_step_that_is_left_out_stays_so() {
    for came in [[ToSums(false), Lost, ToEnd(false)], [ToEnd(false), ToSums(false), Lost]] {
        let ranks: Vec<Bits> = healed(came, 3).into_iter().flatten().collect();
        let whole = on_ranks(vec![(); 3], |(), collective| bits(&trained(2, collective)));
        assert!(ranks.iter().all(|rank| rank.step == 3 && rank.weights == whole[0].weights));
        assert!(ranks.iter().zip(&whole).all(|(a, b)| a.remembered == b.remembered));
    }
}

#[test]
fn what_is_lost_with_its_mirror_is_lost() {
    for came in [[Lost, Lost, ToEnd(true)], [ToEnd(true), Lost, Nowhere], [Lost; 3]] {
        assert!(healed(came, 3).iter().all(Option::is_none), "{came:?}");
    }
}
