//! The search space: which parameters there are, and which values each can take.

use crate::{Error, ParamValue, Params};
use serde::{Deserialize, Serialize};
use std::fmt;

/// The values that one parameter can take.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum Domain {
    /// Real numbers in `low..=high`.
    Float {
        /// Low end.
        low: f64,
        /// High end.
        high: f64,
        /// Whether the logarithm is uniform.
        log: bool,
    },
    /// Integers in `low..=high`: both ends can be drawn.
    Int {
        /// Low end.
        low: i64,
        /// High end, inclusive.
        high: i64,
        /// Whether the logarithm is uniform.
        log: bool,
    },
    /// One of these, without an order between them.
    Choice {
        /// The values.
        values: Vec<ParamValue>,
    },
}

/// A named parameter of a search space.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Parameter {
    /// Its name.
    pub name: String,
    /// Its values.
    pub domain: Domain,
}

/// The parameters of a study. Ranges include both ends.
///
/// ```
/// use mobula_tune::SearchSpace;
///
/// let space = SearchSpace::new()
///     .log_uniform("lr", 1e-4, 3e-2)
///     .uniform("dropout", 0.0, 0.5)
///     .int("layers", 1, 4)
///     .choice("width", [32, 64, 128]);
/// space.validate()?;
/// assert!(SearchSpace::new().uniform("x", 1.0, 0.0).validate().is_err());
/// # Ok::<(), mobula_tune::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SearchSpace {
    parameters: Vec<Parameter>,
}

impl SearchSpace {
    /// A space without parameters.
    pub fn new() -> Self {
        Self::default()
    }

    /// With a real parameter, uniform in `low..=high`.
    pub fn uniform(self, name: impl Into<String>, low: f64, high: f64) -> Self {
        self.with(name, Domain::Float { low, high, log: false })
    }

    /// With a real parameter whose logarithm is uniform; `low` must be above 0.
    pub fn log_uniform(self, name: impl Into<String>, low: f64, high: f64) -> Self {
        self.with(name, Domain::Float { low, high, log: true })
    }

    /// With an integer parameter in `low..=high`.
    pub fn int(self, name: impl Into<String>, low: i64, high: i64) -> Self {
        self.with(name, Domain::Int { low, high, log: false })
    }

    /// With an integer parameter whose logarithm is uniform; `low` must be at least 1.
    pub fn log_int(self, name: impl Into<String>, low: i64, high: i64) -> Self {
        self.with(name, Domain::Int { low, high, log: true })
    }

    /// With one of the given values: integers, floats, booleans or names.
    pub fn choice<V: Into<ParamValue>>(
        self,
        name: impl Into<String>,
        values: impl IntoIterator<Item = V>,
    ) -> Self {
        let values = values.into_iter().map(Into::into).collect();
        self.with(name, Domain::Choice { values })
    }

    /// With a parameter that is the same in every trial.
    pub fn constant(self, name: impl Into<String>, value: impl Into<ParamValue>) -> Self {
        self.choice(name, [value.into()])
    }

    /// With a parameter of any domain.
    pub fn with(mut self, name: impl Into<String>, domain: Domain) -> Self {
        let name = name.into();
        self.parameters.push(Parameter { name, domain });
        self
    }

    /// The parameters in the order they were added.
    pub fn parameters(&self) -> &[Parameter] {
        &self.parameters
    }

    /// The first thing that is wrong with the space, if anything is.
    pub fn validate(&self) -> Result<(), Error> {
        if self.parameters.is_empty() {
            return Err(Error::EmptySpace);
        }
        for (i, parameter) in self.parameters.iter().enumerate() {
            let name = parameter.name.clone();
            if self.parameters[..i].iter().any(|earlier| earlier.name == name) {
                return Err(Error::DuplicateParameter { name });
            }
            parameter.validate()?;
        }
        Ok(())
    }

    /// The parameters at the given internal coordinates, one per parameter.
    pub(crate) fn decode(&self, coordinates: &[f64]) -> Params {
        let values = self.parameters.iter().zip(coordinates);
        values.map(|(p, x)| (p.name.clone(), p.domain.decode(*x))).collect()
    }

    /// The internal coordinates of parameters; errors name what is missing or out of range.
    pub(crate) fn encode(&self, params: &Params) -> Result<Vec<f64>, Error> {
        let encode = |p: &Parameter| {
            let value = params.get(&p.name)?;
            p.domain.encode(value).ok_or_else(|| Error::ParameterType {
                name: p.name.clone(),
                expected: "a value of its domain",
                got: format!("{value:?}"),
            })
        };
        self.parameters.iter().map(encode).collect()
    }

    /// What differs from another space, parameter by parameter.
    pub(crate) fn difference(&self, other: &Self) -> Option<(String, String)> {
        let describe =
            |p: Option<&Parameter>| p.map_or("no further parameter".into(), Parameter::to_string);
        let n = self.parameters.len().max(other.parameters.len());
        let pair = |i| (self.parameters.get(i), other.parameters.get(i));
        let (a, b) = (0..n).map(pair).find(|(a, b)| a != b)?;
        Some((describe(a), describe(b)))
    }
}

impl Parameter {
    fn validate(&self) -> Result<(), Error> {
        match &self.domain {
            Domain::Float { low, high, log } => {
                self.check_range(*low, *high, *log, f64::MIN_POSITIVE)
            }
            Domain::Int { low, high, log } => {
                const EXACT: u64 = 1 << 53;
                if low.unsigned_abs() > EXACT || high.unsigned_abs() > EXACT {
                    return Err(Error::IntRange { name: self.name.clone() });
                }
                self.check_range(*low as f64, *high as f64, *log, 1.0)
            }
            Domain::Choice { values } => self.check_choices(values),
        }
    }

    fn check_range(&self, low: f64, high: f64, log: bool, log_from: f64) -> Result<(), Error> {
        let name = self.name.clone();
        // The width must be finite too: -1e308..1e308 is not a range that can be drawn from.
        if low >= high || !(high - low).is_finite() {
            return Err(Error::EmptyRange { name, low, high });
        }
        if log && low < log_from {
            return Err(Error::LogRange { name, low });
        }
        Ok(())
    }

    fn check_choices(&self, values: &[ParamValue]) -> Result<(), Error> {
        let problem = if values.is_empty() {
            "is a choice of no values; give at least one"
        } else if values.iter().any(|v| matches!(v, ParamValue::Float(x) if !x.is_finite())) {
            "has a choice that is not a finite number"
        } else if (1..values.len()).any(|i| values[..i].contains(&values[i])) {
            "has the same choice twice"
        } else {
            return Ok(());
        };
        Err(Error::Choices { name: self.name.clone(), problem })
    }
}

/// Internal coordinates: the value, its logarithm for a logarithmic range, the index of a choice.
impl Domain {
    pub(crate) fn decode(&self, x: f64) -> ParamValue {
        match self {
            Self::Float { low, high, log } => {
                let value = if *log { x.exp() } else { x };
                ParamValue::Float(value.clamp(*low, *high))
            }
            Self::Int { low, high, log } => {
                let value = if *log { x.exp() } else { x };
                ParamValue::Int((value.round() as i64).clamp(*low, *high))
            }
            Self::Choice { values } => values[(x as usize).min(values.len() - 1)].clone(),
        }
    }

    pub(crate) fn encode(&self, value: &ParamValue) -> Option<f64> {
        let inside = |x: f64, low: f64, high: f64, log: bool| {
            (low..=high).contains(&x).then(|| if log { x.ln() } else { x })
        };
        match (self, value) {
            (Self::Float { low, high, log }, ParamValue::Float(x)) => inside(*x, *low, *high, *log),
            (Self::Float { low, high, log }, ParamValue::Int(x)) => {
                inside(*x as f64, *low, *high, *log)
            }
            (Self::Int { low, high, log }, ParamValue::Int(x)) => {
                inside(*x as f64, *low as f64, *high as f64, *log)
            }
            (Self::Choice { values }, value) => {
                values.iter().position(|v| v == value).map(|i| i as f64)
            }
            _ => None,
        }
    }

    /// The range of the internal coordinate from which densities are drawn: integers own half a
    /// unit on either side. A choice has none.
    pub(crate) fn bounds(&self) -> Option<(f64, f64)> {
        let scale = |x: f64, log: bool| if log { x.ln() } else { x };
        match self {
            Self::Float { low, high, log } => Some((scale(*low, *log), scale(*high, *log))),
            Self::Int { low, high, log } => {
                Some((scale(*low as f64 - 0.5, *log), scale(*high as f64 + 0.5, *log)))
            }
            Self::Choice { .. } => None,
        }
    }

    /// How many values there are; none for real numbers.
    pub(crate) fn len(&self) -> Option<usize> {
        match self {
            Self::Float { .. } => None,
            Self::Int { low, high, .. } => usize::try_from(high - low + 1).ok(),
            Self::Choice { values } => Some(values.len()),
        }
    }
}

impl fmt::Display for Parameter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let log = |log: &bool| if *log { "log " } else { "" };
        match &self.domain {
            Domain::Float { low, high, log: l } => {
                write!(f, "{} in {}{low}..{high}", self.name, log(l))
            }
            Domain::Int { low, high, log: l } => {
                write!(f, "{} in {}integers {low}..{high}", self.name, log(l))
            }
            Domain::Choice { values } => {
                let values: Vec<String> = values.iter().map(ToString::to_string).collect();
                write!(f, "{} of [{}]", self.name, values.join(", "))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bad_space_is_refused_with_the_parameter_named() {
        let check = |space: SearchSpace, expected: &str| {
            let text = space.validate().expect_err("a bad space").to_string();
            assert!(text.contains(expected), "{text}");
        };
        check(SearchSpace::new(), "no parameters");
        check(SearchSpace::new().uniform("x", 1.0, 1.0), "\"x\" has the range 1..1");
        check(SearchSpace::new().uniform("x", f64::NAN, 1.0), "NaN");
        check(SearchSpace::new().uniform("x", 0.0, f64::INFINITY), "inf");
        check(SearchSpace::new().log_uniform("lr", 0.0, 1.0), "\"lr\" is logarithmic from 0");
        check(SearchSpace::new().log_int("n", 0, 8), "\"n\" is logarithmic from 0");
        check(SearchSpace::new().int("n", 0, i64::MAX), "2^53");
        check(SearchSpace::new().choice("w", Vec::<i64>::new()), "\"w\" is a choice of no values");
        check(SearchSpace::new().choice("w", [1, 2, 1]), "same choice twice");
        check(
            SearchSpace::new().int("n", 0, 1).int("n", 0, 1),
            "\"n\" is in the search space twice",
        );
    }

    #[test]
    fn coordinates_and_values_agree() {
        let space = SearchSpace::new()
            .log_uniform("lr", 1e-4, 1e-1)
            .log_int("width", 1, 512)
            .int("layers", -2, 4)
            .choice("opt", ["adam", "sgd"])
            .constant("flag", true);
        let params = space.decode(&[(1e-2f64).ln(), 64f64.ln(), -2.0, 1.0, 0.0]);
        assert_eq!(params.to_string(), "lr=0.01 width=64 layers=-2 opt=sgd flag=true");
        let again = space.decode(&space.encode(&params).expect("in the space"));
        assert_eq!(again.int("width").expect("width"), 64);
        let text = serde_json::to_string(&space).expect("encode");
        assert_eq!(serde_json::from_str::<SearchSpace>(&text).expect("decode"), space);
        let outside: Params = params
            .iter()
            .map(|(n, v)| (n, if n == "layers" { 9.into() } else { v.clone() }))
            .collect();
        assert!(space.encode(&outside).expect_err("9 > 4").to_string().contains("layers"));
    }
}
