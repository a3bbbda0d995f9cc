//! Tensors as the Open Inference Protocol writes them in JSON: flat or nested numbers.

use crate::{Datatype, Error};
use candle_core::{Device, Tensor};
use serde::de::{DeserializeSeed, Deserializer, Error as _, SeqAccess, Visitor};
use serde::{Deserialize, Serialize, Serializer};
use std::fmt;

/// The `data` of a tensor as it was sent: all numbers in row-major order, and the nesting.
#[derive(Debug, Default)]
pub(crate) struct Data {
    numbers: Numbers,
    /// Length of each level of nesting; one level for flat data.
    dims: Vec<usize>,
}

/// Integers until the first number that is none.
#[derive(Debug)]
enum Numbers {
    Ints(Vec<i64>),
    Floats(Vec<f64>),
}

impl Default for Numbers {
    fn default() -> Self {
        Self::Ints(Vec::new())
    }
}

impl Numbers {
    fn len(&self) -> usize {
        match self {
            Self::Ints(values) => values.len(),
            Self::Floats(values) => values.len(),
        }
    }

    fn push_int(&mut self, value: i64) {
        match self {
            Self::Ints(values) => values.push(value),
            Self::Floats(values) => values.push(value as f64),
        }
    }

    fn push_float(&mut self, value: f64) {
        if let Self::Ints(values) = self {
            *self = Self::Floats(values.iter().map(|v| *v as f64).collect());
        }
        if let Self::Floats(values) = self {
            values.push(value);
        }
    }

    fn floats(self) -> Vec<f64> {
        match self {
            Self::Ints(values) => values.into_iter().map(|v| v as f64).collect(),
            Self::Floats(values) => values,
        }
    }

    /// The numbers in single precision, or the first that is too large for it.
    fn singles(self) -> Result<Vec<f32>, f64> {
        let cast = |v: f64| (!v.is_finite() || (v as f32).is_finite()).then_some(v as f32).ok_or(v);
        self.floats().into_iter().map(cast).collect()
    }

    /// The numbers as an integer type, or the first that is none.
    fn ints<T: TryFrom<i64>>(self) -> Result<Vec<T>, f64> {
        match self {
            Self::Ints(values) => {
                values.into_iter().map(|v| T::try_from(v).map_err(|_| v as f64)).collect()
            }
            Self::Floats(values) => {
                let exact = |v: f64| (v.fract() == 0.0 && v.abs() < 9e15).then_some(v as i64);
                let cast = |v: f64| exact(v).and_then(|i| T::try_from(i).ok()).ok_or(v);
                values.into_iter().map(cast).collect()
            }
        }
    }
}

impl Data {
    /// Makes the tensor `name` of these numbers, `shape` and `datatype`.
    pub(crate) fn tensor(
        self,
        name: &str,
        shape: &[usize],
        datatype: Datatype,
    ) -> Result<Tensor, Error> {
        self.check_shape(name, shape)?;
        let invalid = |value: f64| Error::InvalidInput {
            input: name.to_owned(),
            what: "data",
            expected: format!("numbers that fit {datatype}"),
            got: if value.is_nan() { "null".to_owned() } else { format!("{value:?}") },
        };
        let device = &Device::Cpu;
        let numbers = self.numbers;
        let tensor = match datatype {
            Datatype::Uint8 => {
                Tensor::from_vec(numbers.ints::<u8>().map_err(invalid)?, shape, device)
            }
            Datatype::Uint32 => {
                Tensor::from_vec(numbers.ints::<u32>().map_err(invalid)?, shape, device)
            }
            Datatype::Int32 => {
                Tensor::from_vec(numbers.ints::<i32>().map_err(invalid)?, shape, device)
            }
            Datatype::Int64 => {
                Tensor::from_vec(numbers.ints::<i64>().map_err(invalid)?, shape, device)
            }
            Datatype::Fp32 => Tensor::from_vec(numbers.singles().map_err(invalid)?, shape, device),
            Datatype::Fp64 => Tensor::from_vec(numbers.floats(), shape, device),
        };
        tensor.map_err(|error| Error::Core(error.into()))
    }

    fn check_shape(&self, name: &str, shape: &[usize]) -> Result<(), Error> {
        let invalid = |expected, got| Error::InvalidInput {
            input: name.to_owned(),
            what: "data",
            expected,
            got,
        };
        let count = shape.iter().try_fold(1usize, |n, dim| n.checked_mul(*dim));
        if count != Some(self.numbers.len()) {
            let expected = match count {
                Some(count) => format!("{count} for shape {shape:?}"),
                None => format!("a sane shape instead of {shape:?}"),
            };
            return Err(invalid(expected, format!("of {} numbers", self.numbers.len())));
        }
        if self.dims.len() > 1 && self.dims != shape {
            let got = format!("nested as {:?}", self.dims);
            return Err(invalid(format!("flat numbers or nesting as {shape:?}"), got));
        }
        Ok(())
    }
}

impl<'de> Deserialize<'de> for Data {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut nest = Nest::default();
        Level { nest: &mut nest, depth: 0 }.deserialize(deserializer)?;
        Ok(Self { numbers: nest.numbers, dims: nest.dims.into_iter().flatten().collect() })
    }
}

#[derive(Default)]
struct Nest {
    numbers: Numbers,
    /// Known once the first array of that level has ended.
    dims: Vec<Option<usize>>,
    /// The level that numbers are on.
    leaf: Option<usize>,
}

/// Reads a number, or an array of the next level.
struct Level<'a> {
    nest: &'a mut Nest,
    depth: usize,
}

impl Level<'_> {
    fn number<E: serde::de::Error>(self, push: impl FnOnce(&mut Numbers)) -> Result<(), E> {
        if self.depth == 0 {
            return Err(E::custom("data must be an array of numbers"));
        }
        if *self.nest.leaf.get_or_insert(self.depth) != self.depth {
            return Err(E::custom("data has numbers on different levels of nesting"));
        }
        push(&mut self.nest.numbers);
        Ok(())
    }
}

impl<'de> DeserializeSeed<'de> for Level<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Level<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a number, null, or an array of them")
    }

    fn visit_i64<E: serde::de::Error>(self, value: i64) -> Result<(), E> {
        self.number(|numbers| numbers.push_int(value))
    }

    fn visit_u64<E: serde::de::Error>(self, value: u64) -> Result<(), E> {
        self.number(|numbers| match i64::try_from(value) {
            Ok(value) => numbers.push_int(value),
            Err(_) => numbers.push_float(value as f64),
        })
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<(), E> {
        self.number(|numbers| numbers.push_float(value))
    }

    /// JSON has no NaN; this protocol's clients send and read `null`.
    fn visit_unit<E: serde::de::Error>(self) -> Result<(), E> {
        self.number(|numbers| numbers.push_float(f64::NAN))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        let Self { nest, depth } = self;
        if nest.dims.len() <= depth {
            nest.dims.push(None);
        }
        let mut len = 0;
        while seq.next_element_seed(Level { nest, depth: depth + 1 })?.is_some() {
            len += 1;
        }
        let expected = *nest.dims[depth].get_or_insert(len);
        if expected != len {
            let text = format!("data is ragged: an array has {len} elements, another {expected}");
            return Err(A::Error::custom(text));
        }
        Ok(())
    }
}

/// A tensor's elements on their way out, flat and in row-major order.
#[derive(Debug)]
pub(crate) enum Elements {
    Uint8(Vec<u8>),
    Uint32(Vec<u32>),
    Int32(Vec<i32>),
    Int64(Vec<i64>),
    Fp32(Vec<f32>),
    Fp64(Vec<f64>),
}

impl Elements {
    pub(crate) fn of(tensor: &Tensor, datatype: Datatype) -> candle_core::Result<Self> {
        let flat = tensor.flatten_all()?;
        Ok(match datatype {
            Datatype::Uint8 => Self::Uint8(flat.to_vec1()?),
            Datatype::Uint32 => Self::Uint32(flat.to_vec1()?),
            Datatype::Int32 => Self::Int32(flat.to_vec1()?),
            Datatype::Int64 => Self::Int64(flat.to_vec1()?),
            Datatype::Fp32 => Self::Fp32(flat.to_vec1()?),
            Datatype::Fp64 => Self::Fp64(flat.to_vec1()?),
        })
    }
}

impl Serialize for Elements {
    /// serde_json writes NaN and infinities as `null`, which is what clients can read.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Uint8(values) => values.serialize(serializer),
            Self::Uint32(values) => values.serialize(serializer),
            Self::Int32(values) => values.serialize(serializer),
            Self::Int64(values) => values.serialize(serializer),
            Self::Fp32(values) => values.serialize(serializer),
            Self::Fp64(values) => values.serialize(serializer),
        }
    }
}

/// A tensor that was received.
#[derive(Debug, Deserialize)]
pub(crate) struct TensorIn {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    pub(crate) datatype: String,
    #[serde(default)]
    pub(crate) parameters: serde_json::Map<String, serde_json::Value>,
    pub(crate) data: Option<Data>,
}

/// A tensor to be sent.
#[derive(Debug, Serialize)]
pub(crate) struct TensorOut<'a> {
    pub(crate) name: &'a str,
    pub(crate) shape: &'a [usize],
    pub(crate) datatype: &'static str,
    pub(crate) data: Elements,
}

impl<'a> TensorOut<'a> {
    pub(crate) fn new(name: &'a str, tensor: &'a Tensor) -> Result<Self, Error> {
        let datatype = Datatype::of(tensor.dtype()).ok_or_else(|| Error::InvalidInput {
            input: name.to_owned(),
            what: "datatype",
            expected: format!("one of {}", Datatype::ALL.map(Datatype::name).join(", ")),
            got: tensor.dtype().as_str().to_owned(),
        })?;
        let data = Elements::of(tensor, datatype).map_err(|error| Error::Core(error.into()))?;
        Ok(Self { name, shape: tensor.dims(), datatype: datatype.name(), data })
    }
}
