//! Parameters that an optimizer treats differently.

use super::rule::fresh;
use super::state::{OptimizerState, ParamState, Slot};
use super::{Now, Optimizer, ParamOptions, Rule, check};
use crate::{Error, Result};
use mobula_nn::Params;
use serde::{Deserialize, Serialize};

/// Which parameters, and how they differ from the others.
///
/// ```
/// use mobula_train::optim::ParamGroup;
///
/// let head = ParamGroup { lr_scale: 10.0, ..ParamGroup::named(["head.*"]) };
/// let frozen = ParamGroup { frozen: true, ..ParamGroup::named(["encoder.*", "*.embedding"]) };
/// # let _ = (head, frozen);
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ParamGroup {
    /// Full names, where `*` stands for any characters. Default: `["*"]`, all.
    pub params: Vec<String>,
    /// Only those with at most so many dimensions. Default: no matter how many.
    pub max_dims: Option<usize>,
    /// Multiplies the learning rate. Default 1.
    pub lr_scale: f64,
    /// Weight decay, instead of the optimizer's. Default: the optimizer's.
    pub weight_decay: Option<f64>,
    /// Whether they are left as they are, and have no state. Default: no.
    pub frozen: bool,
}

impl Default for ParamGroup {
    fn default() -> Self {
        Self {
            params: vec!["*".to_owned()],
            max_dims: None,
            lr_scale: 1.0,
            weight_decay: None,
            frozen: false,
        }
    }
}

impl ParamGroup {
    /// The parameters whose full names are like one of the patterns.
    pub fn named<S: Into<String>>(patterns: impl IntoIterator<Item = S>) -> Self {
        Self { params: patterns.into_iter().map(Into::into).collect(), ..Self::default() }
    }

    /// No weight decay for whatever has one dimension or none: biases, and scales of
    /// normalisation layers.
    pub fn no_decay() -> Self {
        Self { max_dims: Some(1), weight_decay: Some(0.0), ..Self::default() }
    }

    fn validate(&self) -> Result<()> {
        check::not_negative("lr_scale", self.lr_scale)?;
        check::not_negative("weight_decay", self.weight_decay.unwrap_or(0.0))
    }

    fn holds(&self, name: &str, shape: &[usize]) -> bool {
        let few = self.max_dims.is_none_or(|most| shape.len() <= most);
        few && self.params.iter().any(|pattern| matches(pattern, name))
    }
}

/// Whether the name is like the pattern, where `*` stands for any characters.
fn matches(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == name,
        Some((start, rest)) => name.strip_prefix(start).is_some_and(|name| {
            (0..=name.len()).any(|at| name.is_char_boundary(at) && matches(rest, &name[at..]))
        }),
    }
}

/// An optimizer with groups of parameters that it treats differently. The first group that a
/// parameter belongs to counts; one that belongs to none is treated as without groups.
#[derive(Debug)]
pub struct Grouped<O> {
    optimizer: O,
    groups: Vec<ParamGroup>,
}

impl<O: Optimizer> Grouped<O> {
    /// Errors when an option of a group is out of its range.
    pub fn new(optimizer: O, groups: impl IntoIterator<Item = ParamGroup>) -> Result<Self> {
        let groups: Vec<_> = groups.into_iter().collect();
        groups.iter().try_for_each(ParamGroup::validate)?;
        Ok(Self { optimizer, groups })
    }
}

impl<O: Optimizer> Optimizer for Grouped<O> {
    fn name(&self) -> &str {
        self.optimizer.name()
    }

    fn options(&self) -> serde_json::Value {
        self.optimizer.options()
    }

    fn lr(&self) -> f64 {
        self.optimizer.lr()
    }

    fn weight_decay(&self) -> f64 {
        self.optimizer.weight_decay()
    }

    fn slots(&self, shape: &[usize]) -> Vec<Slot> {
        self.optimizer.slots(shape)
    }

    fn rule(&self, now: Now, steps: u64) -> Option<Rule> {
        self.optimizer.rule(now, steps)
    }

    fn update_param(
        &self,
        now: Now,
        values: &mut [f32],
        gradient: &[f32],
        state: &mut ParamState,
    ) -> Result<()> {
        self.optimizer.update_param(now, values, gradient, state)
    }

    fn param_options(&self, name: &str, shape: &[usize]) -> Option<ParamOptions> {
        let options = self.optimizer.param_options(name, shape)?;
        match self.groups.iter().find(|group| group.holds(name, shape)) {
            None => Some(options),
            Some(ParamGroup { frozen: true, .. }) => None,
            Some(group) => Some(ParamOptions {
                lr_scale: options.lr_scale * group.lr_scale,
                weight_decay: group.weight_decay.unwrap_or(options.weight_decay),
            }),
        }
    }

    /// Errors when a pattern is like no parameter's name: it is misspelt, or the model is another.
    fn init(&self, params: &Params) -> Result<OptimizerState> {
        let names = params.names();
        for pattern in self.groups.iter().flat_map(|group| &group.params) {
            if pattern != "*" && !names.iter().any(|name| matches(pattern, name)) {
                return Err(Error::ParamPattern { pattern: pattern.clone(), names });
            }
        }
        Ok(fresh(self, params))
    }
}

#[cfg(test)]
mod tests {
    use super::matches;

    #[test]
    fn patterns() {
        let yes =
            [("*", ""), ("*.bias", "a.b.bias"), ("a.*", "a.b"), ("a*c*e", "abcde"), ("a", "a")];
        let no = [("*.bias", "bias2"), ("a.*", "ab"), ("a*c", "ab"), ("a", "ab"), ("", "a")];
        assert!(yes.iter().all(|(pattern, name)| matches(pattern, name)));
        assert!(!no.iter().any(|(pattern, name)| matches(pattern, name)));
    }
}
