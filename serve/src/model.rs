//! What a model is to the server: named tensors in, named tensors out, and a description.

use candle_core::DType;
use mobula_core::{Batch, BoxError};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::sync::Arc;

/// Something that computes outputs from inputs. It lives on one thread and is never shared.
pub trait Model: Send {
    /// Computes the outputs for `batch`: tensors with the same first dimension, the rows, as the
    /// inputs. The rows come from several requests, so each must be computed on its own.
    fn infer(&mut self, batch: &Batch) -> Result<Batch, BoxError>;
}

/// A closure is a model.
impl<F> Model for F
where
    F: FnMut(&Batch) -> Result<Batch, BoxError> + Send,
{
    fn infer(&mut self, batch: &Batch) -> Result<Batch, BoxError> {
        self(batch)
    }
}

/// Makes a model: called once on each replica's own thread, and again after a panic.
pub type Loader = Arc<dyn Fn() -> Result<Box<dyn Model>, BoxError> + Send + Sync>;

/// The type of a tensor's elements, by its name in the Open Inference Protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
#[non_exhaustive]
pub enum Datatype {
    /// Unsigned bytes; candle's `U8`.
    Uint8,
    /// Unsigned 32-bit integers; candle's `U32`.
    Uint32,
    /// Signed 32-bit integers; candle's `I32`.
    Int32,
    /// Signed 64-bit integers; candle's `I64`.
    Int64,
    /// Single precision; candle's `F32`.
    Fp32,
    /// Double precision; candle's `F64`.
    Fp64,
}

impl Datatype {
    /// Every datatype that can be served.
    pub const ALL: [Self; 6] =
        [Self::Uint8, Self::Uint32, Self::Int32, Self::Int64, Self::Fp32, Self::Fp64];

    /// The protocol's name, such as `FP32`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Uint8 => "UINT8",
            Self::Uint32 => "UINT32",
            Self::Int32 => "INT32",
            Self::Int64 => "INT64",
            Self::Fp32 => "FP32",
            Self::Fp64 => "FP64",
        }
    }

    /// candle's type of the same elements.
    pub fn dtype(self) -> DType {
        match self {
            Self::Uint8 => DType::U8,
            Self::Uint32 => DType::U32,
            Self::Int32 => DType::I32,
            Self::Int64 => DType::I64,
            Self::Fp32 => DType::F32,
            Self::Fp64 => DType::F64,
        }
    }

    /// The datatype of candle's `dtype`, where the protocol's JSON form has one.
    pub fn of(dtype: DType) -> Option<Self> {
        Self::ALL.into_iter().find(|datatype| datatype.dtype() == dtype)
    }
}

impl fmt::Display for Datatype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One input or output of a model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorSpec {
    /// Its name in requests and answers.
    pub name: String,
    /// The type of its elements.
    pub datatype: Datatype,
    /// The shape of one row, without the leading dimension of rows; -1 leaves a size open.
    pub shape: Vec<i64>,
}

impl TensorSpec {
    /// A tensor of this name, type and shape per row.
    pub fn new(name: impl Into<String>, datatype: Datatype, shape: impl Into<Vec<i64>>) -> Self {
        Self { name: name.into(), datatype, shape: shape.into() }
    }

    /// The shape with its rows: -1, then the shape of one row.
    pub fn batched_shape(&self) -> Vec<i64> {
        std::iter::once(-1).chain(self.shape.iter().copied()).collect()
    }

    /// Whether `dims`, rows first, is a shape of this tensor.
    pub(crate) fn accepts(&self, dims: &[usize]) -> bool {
        let fits = |(spec, got): (&i64, &usize)| *spec == -1 || usize::try_from(*spec) == Ok(*got);
        dims.len() == self.shape.len() + 1 && self.shape.iter().zip(&dims[1..]).all(fits)
    }
}

/// What a server tells about a model, and checks requests against.
///
/// ```
/// use mobula_serve::{Datatype, ModelMetadata, TensorSpec};
///
/// let digits = ModelMetadata::new("digits")
///     .with_input(TensorSpec::new("image", Datatype::Fp32, [64]))
///     .with_output(TensorSpec::new("logits", Datatype::Fp32, [10]));
/// assert_eq!(digits.inputs[0].batched_shape(), [-1, 64]);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelMetadata {
    /// The name in the URL.
    pub name: String,
    /// The version that is served. Default "1".
    pub version: String,
    /// The inputs, all of which a request must have.
    pub inputs: Vec<TensorSpec>,
    /// The outputs, of which a request may choose some.
    pub outputs: Vec<TensorSpec>,
}

impl ModelMetadata {
    /// Version 1 of a model, without inputs and outputs yet.
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), version: "1".to_owned(), inputs: Vec::new(), outputs: Vec::new() }
    }

    /// The same as another version.
    pub fn with_version(self, version: impl Into<String>) -> Self {
        Self { version: version.into(), ..self }
    }

    /// The same with one more input.
    pub fn with_input(mut self, input: TensorSpec) -> Self {
        self.inputs.push(input);
        self
    }

    /// The same with one more output.
    pub fn with_output(mut self, output: TensorSpec) -> Self {
        self.outputs.push(output);
        self
    }
}

pub(crate) fn names(specs: &[TensorSpec]) -> Vec<String> {
    specs.iter().map(|spec| spec.name.clone()).collect()
}
