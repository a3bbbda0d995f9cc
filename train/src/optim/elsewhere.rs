//! What an optimizer does to parameters that are not on the CPU: where they are.

use super::rule::check_fit;
use super::{Clip, Now, Optimizer, OptimizerState, ParamOptions, Rule};
use crate::{Error, Result};
use candle_core::{D, DType, Device, Tensor, Var};
use mobula_nn::{Gradients, Params};
use std::ops::Range;

/// Elements of a group of more than one parameter, at most: an update takes about ten times their memory for a
/// moment. 64 MiB are enough for the rate of any device.
const MOST: usize = 16 << 20;

/// An optimizer's state, where the parameters are. No tensor of it is written to, so that a clone stays what
/// it is.
#[derive(Clone, Debug)]
pub(crate) struct Elsewhere {
    /// All of it but the values of those that are in groups.
    outline: OptimizerState,
    groups: Vec<Group>,
}

/// Parameters that are treated alike: one tensor of all of them is as quick to compute with as one of a
/// few.
#[derive(Clone, Debug)]
struct Group {
    members: Vec<usize>,
    /// What is remembered of all of them, for each slot in one piece.
    slots: Vec<Tensor>,
}

/// Parameters that are to be treated alike, and how.
struct Alike {
    members: Vec<usize>,
    elements: usize,
    options: ParamOptions,
    steps: u64,
}

impl Elsewhere {
    /// Takes a state there with the first update.
    pub(super) fn new(state: OptimizerState) -> Self {
        Self { outline: state, groups: Vec::new() }
    }

    /// Steps and learning rate.
    pub(super) fn outline(&self) -> &OptimizerState {
        &self.outline
    }

    pub(super) fn set_lr(&mut self, lr: f64) {
        self.outline.lr = lr;
    }

    /// The state, on the CPU.
    pub(super) fn here(&self) -> Result<OptimizerState> {
        let mut state = OptimizerState::default();
        self.copy_to(&mut state)?;
        Ok(state)
    }

    /// Makes a state on the CPU the same, in the memory that it has.
    pub(super) fn copy_to(&self, into: &mut OptimizerState) -> Result<()> {
        into.copy_from(&self.outline);
        let all = self.groups.iter().flat_map(|group| {
            group.slots.iter().enumerate().map(|(at, slot)| (&group.members, at, slot))
        });
        for (members, at, slot) in all {
            let values = slot.to_vec1::<f32>()?;
            let mut rest = values.as_slice();
            for member in members {
                let own = &mut into.params[*member].slots[at];
                let (first, others) = rest.split_at(own.shape.iter().product());
                own.values.clear();
                own.values.extend_from_slice(first);
                rest = others;
            }
        }
        Ok(())
    }

    /// One step with the learning rate of the state. Errors when the state is of other parameters; then
    /// nothing has changed.
    pub(super) fn update(
        &mut self,
        optimizer: &dyn Optimizer,
        params: &Params,
        gradients: &Gradients,
    ) -> Result<()> {
        let vars = params.vars();
        check_fit(&self.outline, gradients, &vars)?;
        let alike = self.alike(optimizer);
        self.regroup(&alike, params.device())?;
        let all = match gradients.elsewhere() {
            Some(all) => all.to_device(params.device())?,
            None => Tensor::new(gradients.values(), params.device())?,
        };
        let places: Vec<_> = gradients.places().iter().map(|(_, place)| place.clone()).collect();
        for (group, alike) in self.groups.iter_mut().zip(&alike) {
            let rule = rule(optimizer, alike, self.outline.lr)?;
            group.update(&rule, &vars, pieces(&all, &alike.members, &places)?)?;
        }
        self.outline.step += 1;
        for member in alike.into_iter().flat_map(|alike| alike.members) {
            self.outline.params[member].steps += 1;
        }
        Ok(())
    }

    /// The parameters that are updated, by how.
    fn alike(&self, optimizer: &dyn Optimizer) -> Vec<Alike> {
        let mut all: Vec<Alike> = Vec::new();
        for (member, param) in self.outline.params.iter().enumerate() {
            let Some(options) = optimizer.param_options(&param.name, &param.shape) else {
                continue;
            };
            let (elements, steps) = (param.shape.iter().product(), param.steps + 1);
            let has_room = |alike: &&mut Alike| {
                (alike.options, alike.steps) == (options, steps)
                    && alike.elements + elements <= MOST
            };
            match all.iter_mut().find(has_room) {
                Some(alike) => {
                    alike.members.push(member);
                    alike.elements += elements;
                }
                None => all.push(Alike { members: vec![member], elements, options, steps }),
            }
        }
        all
    }

    /// Groups are these from here on.
    fn regroup(&mut self, all: &[Alike], device: &Device) -> Result<()> {
        let before = self.groups.iter().map(|group| &group.members);
        if before.eq(all.iter().map(|alike| &alike.members)) {
            return Ok(());
        }
        if !self.groups.is_empty() {
            (self.outline, self.groups) = (self.here()?, Vec::new());
        }
        let group = |alike: &Alike| Group::of(&self.outline, alike.members.clone(), device);
        self.groups = all.iter().map(group).collect::<Result<_>>()?;
        for member in self.groups.iter().flat_map(|group| &group.members) {
            let slots = &mut self.outline.params[*member].slots;
            slots.iter_mut().for_each(|slot| slot.values = Vec::new());
        }
        Ok(())
    }
}

fn rule(optimizer: &dyn Optimizer, alike: &Alike, lr: f64) -> Result<Rule> {
    let ParamOptions { lr_scale, weight_decay } = alike.options;
    let rule = optimizer.rule(Now { lr: lr * lr_scale, weight_decay }, alike.steps);
    rule.ok_or_else(|| Error::NoRule { optimizer: optimizer.name().to_owned() })
}

impl Group {
    fn of(state: &OptimizerState, members: Vec<usize>, device: &Device) -> Result<Self> {
        let slots = members.first().map_or(0, |first| state.params[*first].slots.len());
        let slot = |slot: usize| -> Result<_> {
            let own = |member: &usize| state.params[*member].slots.get(slot);
            let values = members.iter().filter_map(own).flat_map(|slot| &slot.values).copied();
            let values: Vec<f32> = values.collect();
            Ok(Tensor::from_slice(&values, values.len(), device)?)
        };
        let slots = (0..slots).map(slot).collect::<Result<_>>()?;
        Ok(Self { members, slots })
    }

    fn update(&mut self, rule: &Rule, vars: &[(String, Var)], gradient: Tensor) -> Result<()> {
        let vars: Vec<_> = self.members.iter().map(|member| &vars[*member]).collect();
        let values = vars.iter().map(|(_, var)| var.as_detached_tensor().flatten_all());
        let values = Tensor::cat(&values.collect::<candle_core::Result<Vec<_>>>()?, 0)?;
        // Of one tensor, `cat` is that tensor, and a rule may leave it as it is.
        let values = if vars.len() == 1 { values.copy()? } else { values };
        let name = vars.first().map_or("", |(name, _)| name);
        let (values, slots) = rule.of_tensors(name, values, gradient, &self.slots)?;
        let mut start = 0;
        for (_, var) in vars {
            let len = var.elem_count();
            var.set(&values.narrow(0, start, len)?.reshape(var.shape())?)?;
            start += len;
        }
        self.slots = slots;
        Ok(())
    }
}

/// The pieces of these places, in one.
fn pieces(all: &Tensor, members: &[usize], places: &[Range<usize>]) -> Result<Tensor> {
    let runs = runs(members.iter().map(|member| places[*member].clone()));
    let runs = runs.into_iter().map(|run| all.narrow(0, run.start, run.len()));
    Ok(Tensor::cat(&runs.collect::<candle_core::Result<Vec<_>>>()?, 0)?)
}

/// The same places, those that follow each other as one.
fn runs(places: impl Iterator<Item = Range<usize>>) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for place in places {
        match runs.last_mut() {
            Some(last) if last.end == place.start => last.end = place.end,
            _ => runs.push(place),
        }
    }
    runs
}

/// Multiplies gradients that are elsewhere by a factor. Says whether all are finite then.
pub(crate) fn scale_elsewhere(gradients: &mut Gradients, factor: f32) -> Result<bool> {
    let mut all = gradients.take_elsewhere()?;
    if factor != 1.0 {
        all = all.affine(factor.into(), -0.0)?;
    }
    // 0 times what is finite is 0.
    let is_finite = sum(&all.affine(0.0, 0.0)?)? == 0.0;
    gradients.put_elsewhere(all)?;
    Ok(is_finite)
}

/// The same as [`Clip::apply`] of gradients that are elsewhere, by the norm of those at some places. Others
/// are scaled with them.
pub(super) fn clip_elsewhere(
    clip: Clip,
    gradients: &mut Gradients,
    moving: &[Range<usize>],
) -> Result<Option<f64>> {
    let all = gradients.take_elsewhere()?;
    let (clipped, norm) = match clip {
        Clip::Norm(most) => {
            let runs = runs(moving.iter().cloned());
            let parts = runs.into_iter().flat_map(|run| {
                run.clone().step_by(MOST).map(move |start| start..run.end.min(start + MOST))
            });
            let squares = parts.map(|part| {
                sum(&all.narrow(0, part.start, part.len())?.to_dtype(DType::F64)?.sqr()?)
            });
            let norm = squares.sum::<Result<f64>>()?.sqrt();
            let factor = Clip::factor(most, norm);
            let clipped = if factor < 1.0 { all.affine(factor, -0.0)? } else { all };
            (clipped, Some(norm))
        }
        Clip::Value(most) => (all.clamp(-most as f32, most as f32)?, None),
    };
    gradients.put_elsewhere(clipped)?;
    Ok(norm)
}

/// The sum of many numbers: a device takes one row at a time with few of its threads, and rows beside each
/// other.
fn sum(numbers: &Tensor) -> Result<f64> {
    const WIDTH: usize = 1024;
    let rows = numbers.elem_count() / WIDTH;
    let whole = numbers.narrow(0, 0, rows * WIDTH)?.reshape((rows, WIDTH))?;
    let rest = numbers.narrow(0, rows * WIDTH, numbers.elem_count() - rows * WIDTH)?;
    let sums = [whole, rest.unsqueeze(0)?].map(|part| match part.elem_count() {
        0 => Tensor::zeros(1, numbers.dtype(), numbers.device()),
        _ => part.sum(D::Minus1),
    });
    let [whole, rest] = sums;
    let sum = Tensor::cat(&[whole?, rest?], 0)?.sum_all()?;
    Ok(sum.to_dtype(DType::F64)?.to_scalar()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optim::{AdamW, AdamWOptions, ParamState};
    use mobula_nn::Init;

    fn elsewhere(values: &[f32]) -> Gradients {
        let params = Params::new(1, &Device::Cpu);
        params.get(values.len(), "a", Init::Zeros).expect("parameter");
        let mut gradients = Gradients::zeros(&params);
        let values = Tensor::new(values, &Device::Cpu).expect("gradients");
        gradients.put_elsewhere(values).expect("as many");
        gradients
    }

    #[test]
    fn sums_are_of_all_numbers() {
        for len in [1usize, 1023, 1024, 1025, 5000] {
            let numbers: Vec<f64> = (0..len).map(|at| at as f64).collect();
            let numbers = Tensor::new(numbers, &Device::Cpu).expect("numbers");
            assert_eq!(sum(&numbers).expect("sum"), (len * (len - 1) / 2) as f64);
        }
    }

    /// Wherever they are, and what is large is not among them.
    #[test]
    fn numbers_that_are_not_finite_are_found() {
        for (at, bad) in [(0, f32::NAN), (1500, f32::INFINITY), (2999, f32::NEG_INFINITY)] {
            let mut values = vec![1e38; 3000];
            let mut fine = elsewhere(&values);
            assert!(scale_elsewhere(&mut fine, 0.5).expect("scaled"));
            let scaled = fine.take_elsewhere().expect("gradients").to_vec1::<f32>();
            assert!(scaled.expect("values").iter().all(|value| *value == 5e37));
            assert!(!scale_elsewhere(&mut elsewhere(&values), 1e38).expect("scaled"), "overflow");
            values[at] = bad;
            assert!(!scale_elsewhere(&mut elsewhere(&values), 0.5).expect("scaled"), "{bad}");
        }
    }

    /// What a gradient was computed from, and all states before, would stay as long as the state does.
    #[test]
    fn a_state_does_not_hold_on_to_its_past() {
        let params = Params::new(1, &Device::Cpu);
        let weight = params.get(3, "a", Init::Ones).expect("parameter");
        let mut gradients = Gradients::zeros(&params);
        let optimizer = AdamW::new(AdamWOptions::default()).expect("options");
        let mut state = Elsewhere::new(optimizer.init(&params).expect("state"));
        let mut update = |state: &mut Elsewhere| {
            let tracked = (&weight * &weight).expect("product");
            assert!(tracked.track_op());
            gradients.put_elsewhere(tracked).expect("as many");
            state.update(&optimizer, &params, &gradients).expect("update");
        };
        update(&mut state);
        let (kept, then) = (state.clone(), state.here().expect("then"));
        update(&mut state);
        assert!(state.groups.iter().flat_map(|group| &group.slots).all(|slot| !slot.track_op()));
        assert!(kept.here().expect("kept") == then, "what is remembered stays");
        assert!(state.here().expect("now") != then);
    }

    /// Those that are alike, as long as there are not too many of them.
    #[test]
    fn large_parameters_are_groups_of_their_own() {
        let sizes = [MOST - 1, 1, 1, MOST + 5];
        let state = |(at, size): (usize, usize)| ParamState {
            name: at.to_string(),
            shape: vec![size],
            steps: 0,
            slots: Vec::new(),
        };
        let params = sizes.into_iter().enumerate().map(state).collect();
        let state = Elsewhere::new(OptimizerState { step: 0, lr: 0.1, params });
        let alike = state.alike(&AdamW::new(AdamWOptions::default()).expect("options"));
        let members: Vec<_> = alike.into_iter().map(|alike| alike.members).collect();
        assert_eq!(members, [vec![0, 1], vec![2], vec![3]]);
    }
}
