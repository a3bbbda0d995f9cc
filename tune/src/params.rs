//! The parameters of one trial.

use crate::Error;
use serde::de::{DeserializeOwned, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;

/// One parameter's value.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum ParamValue {
    /// A choice between booleans.
    Bool(bool),
    /// An integer, or a choice between integers.
    Int(i64),
    /// A real number.
    Float(f64),
    /// A choice between names.
    String(String),
}

impl fmt::Display for ParamValue {
    /// Floats with four significant digits: for people. Programs read the value itself.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bool(v) => write!(f, "{v}"),
            Self::Int(v) => write!(f, "{v}"),
            Self::Float(v) => f.write_str(&short(*v)),
            Self::String(v) => f.write_str(v),
        }
    }
}

/// A number with about four significant digits, without trailing zeros.
pub(crate) fn short(value: f64) -> String {
    let magnitude = value.abs();
    if value == 0.0 || !value.is_finite() {
        return format!("{value}");
    }
    if !(1e-4..1e6).contains(&magnitude) {
        let text = format!("{value:.2e}");
        return text.replace(".00e", "e");
    }
    let decimals = (3 - magnitude.log10().floor() as i32).clamp(0, 8) as usize;
    let text = format!("{value:.decimals$}");
    if text.contains('.') {
        return text.trim_end_matches('0').trim_end_matches('.').to_owned();
    }
    text
}

macro_rules! from_integer {
    ($($t:ty),*) => {$(
        impl From<$t> for ParamValue {
            fn from(value: $t) -> Self {
                Self::Int(i64::try_from(value).unwrap_or(i64::MAX))
            }
        }
    )*};
}
from_integer!(i32, i64, u32, usize);

impl From<f64> for ParamValue {
    fn from(value: f64) -> Self {
        Self::Float(value)
    }
}

impl From<bool> for ParamValue {
    fn from(value: bool) -> Self {
        Self::Bool(value)
    }
}

impl From<&str> for ParamValue {
    fn from(value: &str) -> Self {
        Self::String(value.to_owned())
    }
}

impl From<String> for ParamValue {
    fn from(value: String) -> Self {
        Self::String(value)
    }
}

/// The parameters of one trial, in the order of the search space.
///
/// ```
/// use mobula_tune::Params;
///
/// let params: Params = [("lr", 0.01.into()), ("layers", 2.into())].into_iter().collect();
/// assert_eq!(params.float("lr")?, 0.01);
/// assert_eq!(params.usize("layers")?, 2);
/// assert_eq!(params.to_string(), "lr=0.01 layers=2");
///
/// #[derive(serde::Deserialize)]
/// struct Config { lr: f64, layers: usize }
/// assert_eq!(params.to::<Config>()?.layers, 2);
/// assert!(params.float("momentum").unwrap_err().to_string().contains("available: lr, layers"));
/// # Ok::<(), mobula_tune::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Params {
    entries: Vec<(String, ParamValue)>,
}

impl Params {
    /// The value of a parameter; an error lists the names there are.
    pub fn get(&self, name: &str) -> Result<&ParamValue, Error> {
        let found = self.entries.iter().find(|(key, _)| key == name);
        found.map(|(_, value)| value).ok_or_else(|| Error::NoSuchParameter {
            name: name.to_owned(),
            available: self.entries.iter().map(|(key, _)| key.clone()).collect(),
        })
    }

    /// A number; an integer counts as one.
    pub fn float(&self, name: &str) -> Result<f64, Error> {
        match self.get(name)? {
            ParamValue::Float(value) => Ok(*value),
            ParamValue::Int(value) => Ok(*value as f64),
            other => Err(wrong_type(name, "a number", other)),
        }
    }

    /// An integer.
    pub fn int(&self, name: &str) -> Result<i64, Error> {
        match self.get(name)? {
            ParamValue::Int(value) => Ok(*value),
            other => Err(wrong_type(name, "an integer", other)),
        }
    }

    /// An integer that is not negative, for sizes and counts.
    pub fn usize(&self, name: &str) -> Result<usize, Error> {
        let value = self.int(name)?;
        usize::try_from(value)
            .map_err(|_| wrong_type(name, "an integer of at least 0", &ParamValue::Int(value)))
    }

    /// A boolean.
    pub fn bool(&self, name: &str) -> Result<bool, Error> {
        match self.get(name)? {
            ParamValue::Bool(value) => Ok(*value),
            other => Err(wrong_type(name, "a boolean", other)),
        }
    }

    /// A name.
    pub fn str(&self, name: &str) -> Result<&str, Error> {
        match self.get(name)? {
            ParamValue::String(value) => Ok(value),
            other => Err(wrong_type(name, "a string", other)),
        }
    }

    /// All parameters as the program's own type.
    pub fn to<T: DeserializeOwned>(&self) -> Result<T, Error> {
        let decode = || serde_json::from_value(serde_json::to_value(self)?);
        decode().map_err(|error: serde_json::Error| Error::ParamsDecode {
            params: self.to_string(),
            into: std::any::type_name::<T>(),
            source: error.into(),
        })
    }

    /// Names and values in the order of the search space.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &ParamValue)> {
        self.entries.iter().map(|(name, value)| (name.as_str(), value))
    }
}

fn wrong_type(name: &str, expected: &'static str, got: &ParamValue) -> Error {
    Error::ParameterType { name: name.to_owned(), expected, got: format!("{got:?}") }
}

impl<N: Into<String>> FromIterator<(N, ParamValue)> for Params {
    fn from_iter<I: IntoIterator<Item = (N, ParamValue)>>(iter: I) -> Self {
        let entries = iter.into_iter().map(|(name, value)| (name.into(), value)).collect();
        Self { entries }
    }
}

impl fmt::Display for Params {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts: Vec<String> =
            self.iter().map(|(name, value)| format!("{name}={value}")).collect();
        f.write_str(&parts.join(" "))
    }
}

impl Serialize for Params {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.iter())
    }
}

impl<'de> Deserialize<'de> for Params {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(ParamsVisitor)
    }
}

/// Reads a map and keeps its order, which a `BTreeMap` would lose.
struct ParamsVisitor;

impl<'de> Visitor<'de> for ParamsVisitor {
    type Value = Params;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map of parameter names to values")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Params, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = map.next_entry()? {
            entries.push(entry);
        }
        Ok(Params { entries })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn numbers_are_short_for_people() {
        let check = |value, expected: &str| assert_eq!(short(value), expected);
        check(0.0032, "0.0032");
        check(0.912_345, "0.9123");
        check(64.0, "64");
        check(1200.0, "1200");
        check(1e-5, "1e-5");
        check(f64::NAN, "NaN");
        check(-0.25, "-0.25");
    }

    proptest! {
        /// INV-BITS: parameters survive the journal's JSON bit for bit, in order.
        #[test]
        fn json_keeps_every_bit(x in any::<f64>().prop_filter("finite", |x| x.is_finite()), n in any::<i64>()) {
            let params: Params = [("z", x.into()), ("a", n.into()), ("b", "s".into())].into_iter().collect();
            let text = serde_json::to_string(&params).expect("encode");
            let back: Params = serde_json::from_str(&text).expect("decode");
            prop_assert_eq!(back.float("z").expect("z").to_bits(), x.to_bits());
            prop_assert_eq!(back, params);
        }
    }
}
