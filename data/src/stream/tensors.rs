//! The tensors of a stream: what a user asks for, and how it is made from the columns there are.

use super::values::{Misfit, Part, Pick, Place, Values};
use crate::error::{Error, Result};
use crate::preprocess::numbers;
use arrow::array::RecordBatch;
use arrow::datatypes::{DataType, Schema};
use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};

/// A tensor that a stream makes of columns.
///
/// ```
/// # use mobula_data::{StreamOptions, TensorSpec};
/// // [rows, 3], with missing ages as -1.
/// let x = TensorSpec::stack("x", ["age", "height", "weight"]).with_fill(-1.0);
/// let options = StreamOptions::new(["image"], "label").with_tensor(x);
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TensorSpec {
    name: String,
    columns: Vec<String>,
    is_stack: bool,
    #[serde(with = "as_text")]
    dtype: Option<DType>,
    fill: Option<f64>,
    length: Option<usize>,
    /// Not written where it is not, so that what was written before is the same.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    truncates: bool,
}

impl TensorSpec {
    /// The tensor of one column, named as the column is: `[rows]`, or `[rows, n]` for lists of n
    /// numbers, `[rows, m, n]` for m such lists, and so on.
    pub fn column(name: impl Into<String>) -> Self {
        let name = name.into();
        Self { is_stack: false, ..Self::stack(name.clone(), [name]) }
    }

    /// The columns side by side: `[rows, n]`, where a list of n numbers counts as n columns.
    pub fn stack<S: Into<String>>(
        name: impl Into<String>,
        columns: impl IntoIterator<Item = S>,
    ) -> Self {
        Self {
            name: name.into(),
            columns: columns.into_iter().map(Into::into).collect(),
            is_stack: true,
            dtype: None,
            fill: None,
            length: None,
            truncates: false,
        }
    }

    /// Sets the type of the elements. Values that it does not have are an error: too large ones, and
    /// fractions in a type of whole numbers. Default: `f32`.
    pub fn with_dtype(self, dtype: DType) -> Self {
        Self { dtype: Some(dtype), ..self }
    }

    /// Sets what stands for missing values, and behind the ends of short lists. Default: missing
    /// values are an error, and 0 is behind the ends.
    pub fn with_fill(self, value: f64) -> Self {
        Self { fill: Some(value), ..self }
    }

    /// Sets how many numbers a list that has no fixed size becomes. Shorter ones are padded, longer
    /// ones are an error. Without it such lists are an error.
    pub fn with_length(self, length: usize) -> Self {
        Self { length: Some(length), ..self }
    }

    /// Whether of a list that is longer than [`with_length`](Self::with_length) says the first numbers
    /// are taken. Default: no, it is an error.
    pub fn with_truncation(self, truncates: bool) -> Self {
        Self { truncates, ..self }
    }

    /// A label: class numbers as `u32` if it is whole.
    pub(super) fn label(name: String, schema: &Schema) -> Self {
        let is_whole =
            |data_type: &DataType| data_type.is_integer() || *data_type == DataType::Boolean;
        let spec = Self::column(name);
        match schema.field_with_name(&spec.name) {
            Ok(field) if is_whole(field.data_type()) => spec.with_dtype(DType::U32),
            _ => spec,
        }
    }
}

/// The types of tensors by their names.
mod as_text {
    use candle_core::DType;
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(super) fn serialize<S: Serializer>(
        dtype: &Option<DType>,
        to: S,
    ) -> Result<S::Ok, S::Error> {
        dtype.map(|dtype| dtype.as_str()).serialize(to)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        from: D,
    ) -> Result<Option<DType>, D::Error> {
        let text = Option::<String>::deserialize(from)?;
        text.map(|text| text.parse()).transpose().map_err(D::Error::custom)
    }
}

/// The tensors of a stream, and the columns that they are made of.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Layout {
    pub(super) columns: Vec<String>,
    pub(super) tensors: Vec<TensorLayout>,
}

/// How the rows of one tensor are made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct TensorLayout {
    spec: TensorSpec,
    parts: Vec<Piece>,
    /// Of one row.
    dims: Vec<usize>,
    /// Elements of one row.
    width: usize,
    /// Whether rows are kept as bytes until they are gathered: images stay as small as they are.
    is_bytes: bool,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Piece {
    /// Its place among the columns of the layout.
    column: usize,
    offset: usize,
    width: usize,
}

impl Layout {
    /// Of tensors with different names, if the columns can be tensors.
    pub(super) fn new(schema: &Schema, specs: Vec<TensorSpec>) -> Result<Self> {
        let (mut columns, mut tensors) = (Vec::new(), Vec::<TensorLayout>::new());
        for spec in specs {
            if tensors.iter().any(|other| other.spec.name == spec.name) {
                return Err(Error::InvalidOption {
                    option: "the list of features and label",
                    expected: "each tensor once".to_owned(),
                    got: format!("{:?} twice", spec.name),
                });
            }
            tensors.push(TensorLayout::new(schema, spec, &mut columns)?);
        }
        Ok(Self { columns, tensors })
    }

    /// Room for the rows of a block.
    pub(super) fn room(&self, rows: usize) -> Result<Vec<Values>> {
        self.tensors.iter().map(|tensor| tensor.room(rows)).collect()
    }

    /// The same in the place of the rows of another block, which need not be zeroed: rows are put there
    /// before anybody sees them.
    pub(super) fn room_in(&self, mut used: Vec<Values>, rows: usize) -> Vec<Values> {
        for (tensor, values) in self.tensors.iter().zip(&mut used) {
            values.resize(rows * tensor.width);
        }
        used
    }

    /// Bytes of a row of a block.
    pub(super) fn row_bytes(&self) -> usize {
        self.tensors.iter().map(|tensor| tensor.width * tensor.stored().size_in_bytes()).sum()
    }

    /// Puts rows of the layout's columns behind those that are there. `place` names the block.
    pub(super) fn put(
        &self,
        batch: &RecordBatch,
        row: usize,
        all: &mut [Values],
        place: &str,
    ) -> Result<()> {
        let tensors = self.tensors.iter().zip(all);
        tensors
            .into_iter()
            .try_for_each(|(tensor, values)| tensor.put(self, batch, row, values, place))
    }
}

impl TensorLayout {
    fn new(schema: &Schema, spec: TensorSpec, columns: &mut Vec<String>) -> Result<Self> {
        if spec.columns.is_empty() {
            return Err(Error::InvalidOption {
                option: "the columns of a tensor",
                expected: "at least one".to_owned(),
                got: format!("none for {:?}", spec.name),
            });
        }
        let (mut parts, mut dims, mut is_bytes, mut offset) = (Vec::new(), Vec::new(), true, 0);
        for name in &spec.columns {
            let field =
                schema.field_with_name(name).map_err(|_| Error::no_such_column(name, schema))?;
            let shape = Shape::of(field.data_type(), spec.length)
                .ok_or_else(|| numbers::not_numeric(name, field.data_type()))?;
            let at = columns.iter().position(|column| column == name).unwrap_or_else(|| {
                columns.push(name.clone());
                columns.len() - 1
            });
            let width = shape.dims.iter().product();
            is_bytes &= shape.is_bytes;
            parts.push(Piece { column: at, offset, width });
            (offset, dims) = (offset + width, shape.dims);
        }
        if spec.is_stack {
            dims = vec![offset];
        }
        if offset == 0 {
            return Err(Error::InvalidOption {
                option: "the width of a tensor",
                expected: "at least one value a row".to_owned(),
                got: format!("0 for {:?}", spec.name),
            });
        }
        is_bytes &= spec.dtype().is_float() && spec.fill.is_none();
        Ok(Self { spec, parts, dims, width: offset, is_bytes })
    }

    pub(super) fn name(&self) -> &str {
        &self.spec.name
    }

    /// Of what is kept.
    fn stored(&self) -> DType {
        if self.is_bytes { DType::U8 } else { self.spec.dtype() }
    }

    fn room(&self, rows: usize) -> Result<Values> {
        let zeros = Values::zeros(self.spec.dtype(), 0)
            .and_then(|_| Values::zeros(self.stored(), rows * self.width));
        zeros.ok_or_else(|| Error::InvalidOption {
            option: "the dtype of a tensor",
            expected: "one of u8, u32, i16, i32, i64, bf16, f16, f32, f64".to_owned(),
            got: format!("{} for {:?}", self.spec.dtype().as_str(), self.spec.name),
        })
    }

    fn put(
        &self,
        layout: &Layout,
        batch: &RecordBatch,
        row: usize,
        values: &mut Values,
        place: &str,
    ) -> Result<()> {
        for part in &self.parts {
            let array = batch.column(part.column);
            let TensorSpec { fill, truncates, .. } = self.spec;
            let from = Part { array, width: part.width, fill, truncates };
            let to = Place { row, stride: self.width, offset: part.offset };
            let column = &layout.columns[part.column];
            values.put(&from, &to).map_err(|misfit| self.misfit(misfit, column, part, place))?;
        }
        Ok(())
    }

    fn misfit(&self, misfit: Misfit, column: &str, part: &Piece, place: &str) -> Error {
        let (column, place) = (column.to_owned(), place.to_owned());
        match misfit {
            Misfit::Missing(rows) => Error::Nulls { column, rows, place },
            Misfit::Range(value) => {
                let dtype = self.spec.dtype().as_str();
                Error::ElementRange { column, value, dtype, place }
            }
            Misfit::Length(got) => Error::ListLength { column, got, expected: part.width, place },
            Misfit::Cast(error) => error.into(),
        }
    }

    /// The tensor of some rows of decoded blocks.
    pub(super) fn gather(&self, rows: usize, from: &[&Values], picks: &[Pick]) -> Result<Tensor> {
        let mut shape = vec![rows];
        shape.extend(&self.dims);
        Ok(Values::gather(self.spec.dtype(), shape, self.width, from, picks)?)
    }
}

impl TensorSpec {
    fn dtype(&self) -> DType {
        self.dtype.unwrap_or(DType::F32)
    }
}

/// What a column's type says of its rows.
struct Shape {
    dims: Vec<usize>,
    is_bytes: bool,
}

impl Shape {
    fn of(data_type: &DataType, length: Option<usize>) -> Option<Self> {
        match (data_type, length) {
            (DataType::FixedSizeList(item, width), _) => {
                let mut inner = Self::of(item.data_type(), None)?;
                inner.dims.insert(0, usize::try_from(*width).ok()?);
                Some(inner)
            }
            (DataType::List(item) | DataType::LargeList(item), Some(length)) => {
                let inner = Self::of(item.data_type(), None)?;
                inner.dims.is_empty().then(|| Self { dims: vec![length], is_bytes: false })
            }
            (other, _) => {
                let is_bytes = *other == DataType::UInt8;
                numbers::is_number(other).then(|| Self { dims: Vec::new(), is_bytes })
            }
        }
    }
}
