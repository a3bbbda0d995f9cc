//! What a sweep file says.

use crate::{
    AshaScheduler, Domain, Error, GridSampler, Metric, ParamValue, RandomSampler, SearchSpace,
    TpeSampler, Tuner,
};
use mobula_core::Resources;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use std::fmt;

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SweepFile {
    pub(crate) name: String,
    pub(crate) command: Vec<String>,
    #[serde(default)]
    method: Method,
    metric: Metric,
    #[serde(deserialize_with = "in_order")]
    parameters: Vec<(String, ParameterSpec)>,
    #[serde(alias = "early_terminate")]
    scheduler: Option<SchedulerSpec>,
    /// How many trials. Default 16, or the whole grid.
    run_cap: Option<usize>,
    /// Random trials before TPE's model takes over.
    startup_trials: Option<usize>,
    #[serde(default)]
    seed: u64,
    max_concurrent: Option<usize>,
    #[serde(default)]
    max_retries: u32,
    #[serde(default)]
    pub(crate) resources: ResourceSpec,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Method {
    Grid,
    Random,
    #[default]
    Tpe,
}

/// One parameter; which fields belong together is checked in [`ParameterSpec::domain`].
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ParameterSpec {
    distribution: Option<Distribution>,
    min: Option<ParamValue>,
    max: Option<ParamValue>,
    value: Option<ParamValue>,
    values: Option<Vec<ParamValue>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Distribution {
    Constant,
    Categorical,
    Uniform,
    LogUniformValues,
    IntUniform,
    LogIntUniformValues,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct SchedulerSpec {
    #[serde(rename = "type")]
    kind: SchedulerKind,
    #[serde(default)]
    #[allow(dead_code, reason = "there is one mode; others are refused by name")]
    mode: crate::scheduler::AshaMode,
    max_t: u64,
    grace_period: Option<u64>,
    reduction_factor: Option<f64>,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum SchedulerKind {
    Asha,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct ResourceSpec {
    #[serde(alias = "cpus")]
    cpu: f64,
    #[serde(alias = "gpus")]
    gpu: f64,
}

impl Default for ResourceSpec {
    fn default() -> Self {
        Self { cpu: 1.0, gpu: 0.0 }
    }
}

impl ResourceSpec {
    fn resources(&self) -> Resources {
        Resources::cpus(self.cpu).with_gpus(self.gpu)
    }

    pub(crate) fn threads(&self) -> usize {
        self.resources().threads()
    }
}

impl SweepFile {
    pub(crate) fn space(&self) -> Result<SearchSpace, Error> {
        self.parameters.iter().try_fold(SearchSpace::new(), |space, (name, spec)| {
            let wrong =
                |problem| Error::SweepField { field: format!("parameters.{name}"), problem };
            Ok(space.with(name, spec.domain().map_err(wrong)?))
        })
    }

    pub(crate) fn tuner(&self, space: SearchSpace) -> Result<Tuner, Error> {
        let all = if self.method == Method::Grid { usize::MAX } else { 16 };
        let mut tuner = Tuner::new(space, self.metric.clone())
            .with_trials(self.run_cap.unwrap_or(all))
            .with_seed(self.seed)
            .with_max_concurrent(self.max_concurrent)
            .with_max_retries(self.max_retries)
            .with_resources(self.resources.resources());
        tuner = match self.method {
            Method::Grid => tuner.with_sampler(GridSampler),
            Method::Random => tuner.with_sampler(RandomSampler),
            Method::Tpe => tuner.with_sampler(self.tpe()),
        };
        Ok(match &self.scheduler {
            Some(spec) => tuner.with_scheduler(spec.asha()),
            None => tuner,
        })
    }

    fn tpe(&self) -> TpeSampler {
        let default = TpeSampler::default();
        default.with_startup_trials(self.startup_trials.unwrap_or(default.n_startup_trials))
    }
}

impl SchedulerSpec {
    fn asha(&self) -> AshaScheduler {
        let SchedulerKind::Asha = self.kind;
        let asha = AshaScheduler::new(self.max_t);
        let (grace_period, reduction_factor) = (asha.grace_period, asha.reduction_factor);
        asha.with_grace_period(self.grace_period.unwrap_or(grace_period))
            .with_reduction_factor(self.reduction_factor.unwrap_or(reduction_factor))
    }
}

impl ParameterSpec {
    /// What the fields mean together; without a distribution, as in W&B: `value` is a constant,
    /// `values` a choice, and a range is of integers if both its ends are.
    fn domain(&self) -> Result<Domain, String> {
        use Distribution::*;
        let given = (&self.value, &self.values, &self.min, &self.max);
        match (self.distribution, given) {
            (None | Some(Constant), (Some(value), None, None, None)) => {
                Ok(Domain::Choice { values: vec![value.clone()] })
            }
            (None | Some(Categorical), (None, Some(values), None, None)) => {
                Ok(Domain::Choice { values: values.clone() })
            }
            (distribution, (None, None, Some(min), Some(max))) => range(distribution, min, max),
            _ => Err(format!(
                "has {}; expected `value`, or `values`, or `min` and `max`, as its distribution asks",
                self.fields()
            )),
        }
    }

    fn fields(&self) -> String {
        let distribution = self.distribution.map(|d| format!("distribution {d:?}"));
        let given = [
            ("value", self.value.is_some()),
            ("values", self.values.is_some()),
            ("min", self.min.is_some()),
            ("max", self.max.is_some()),
        ];
        let names = given.iter().filter(|(_, given)| *given).map(|(name, _)| (*name).to_owned());
        let all: Vec<String> = distribution.into_iter().chain(names).collect();
        if all.is_empty() { "no fields".to_owned() } else { all.join(", ") }
    }
}

fn range(
    distribution: Option<Distribution>,
    min: &ParamValue,
    max: &ParamValue,
) -> Result<Domain, String> {
    use Distribution::*;
    let integers = match (min, max) {
        (ParamValue::Int(low), ParamValue::Int(high)) => Some((*low, *high)),
        _ => None,
    };
    let int = |log| {
        let (low, high) = integers.ok_or_else(|| format!("has the integer range {min}..{max}"))?;
        Ok(Domain::Int { low, high, log })
    };
    let float = |log| match (number(min), number(max)) {
        (Some(low), Some(high)) => Ok(Domain::Float { low, high, log }),
        _ => Err(format!("has the range {min:?}..{max:?}, expected numbers")),
    };
    match distribution {
        None if integers.is_some() => int(false),
        None | Some(Uniform) => float(false),
        Some(LogUniformValues) => float(true),
        Some(IntUniform) => int(false),
        Some(LogIntUniformValues) => int(true),
        Some(Constant) => Err("is constant: give `value`, not a range".to_owned()),
        Some(Categorical) => Err("is categorical: give `values`, not a range".to_owned()),
    }
}

fn number(value: &ParamValue) -> Option<f64> {
    match value {
        ParamValue::Float(x) => Some(*x),
        ParamValue::Int(x) => Some(*x as f64),
        _ => None,
    }
}

/// A map in the order of the file: the grid's order, and that of `${args}`.
fn in_order<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Vec<(String, ParameterSpec)>, D::Error> {
    struct InOrder;
    impl<'de> Visitor<'de> for InOrder {
        type Value = Vec<(String, ParameterSpec)>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a map of parameters, such as lr: {min: 0.001, max: 0.1}")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut entries = Vec::new();
            while let Some(entry) = map.next_entry()? {
                entries.push(entry);
            }
            Ok(entries)
        }
    }
    deserializer.deserialize_map(InOrder)
}
