//! `tf.train.Example`, and what becomes of it.

use arrow::array::{
    ArrayRef, BinaryArray, FixedSizeListArray, Float32Array, Int64Array, ListArray,
    RecordBatchOptions,
};
use arrow::buffer::{NullBuffer, OffsetBuffer};
use arrow::datatypes::{DataType, Field, SchemaRef};
use arrow::error::ArrowError;
use arrow::record_batch::RecordBatch;
use std::collections::BTreeMap;
use std::sync::Arc;

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Example {
    #[prost(message, optional, tag = "1")]
    features: Option<Features>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Features {
    #[prost(btree_map = "string, message", tag = "1")]
    feature: BTreeMap<String, Feature>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Feature {
    #[prost(oneof = "Values", tags = "1, 2, 3")]
    values: Option<Values>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum Values {
    #[prost(message, tag = "1")]
    Bytes(BytesList),
    #[prost(message, tag = "2")]
    Floats(FloatList),
    #[prost(message, tag = "3")]
    Ints(Int64List),
}

#[derive(Clone, PartialEq, prost::Message)]
struct BytesList {
    #[prost(bytes = "vec", repeated, tag = "1")]
    value: Vec<Vec<u8>>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct FloatList {
    #[prost(float, repeated, tag = "1")]
    value: Vec<f32>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Int64List {
    #[prost(int64, repeated, tag = "1")]
    value: Vec<i64>,
}

impl Values {
    fn len(&self) -> usize {
        match self {
            Self::Bytes(list) => list.value.len(),
            Self::Floats(list) => list.value.len(),
            Self::Ints(list) => list.value.len(),
        }
    }

    fn value_type(&self) -> DataType {
        match self {
            Self::Bytes(_) => DataType::Binary,
            Self::Floats(_) => DataType::Float32,
            Self::Ints(_) => DataType::Int64,
        }
    }
}

impl Example {
    /// The features that have values of a type.
    fn features(&self) -> impl Iterator<Item = (&String, &Values)> {
        let features = self.features.iter().flat_map(|features| &features.feature);
        features.filter_map(|(name, feature)| Some((name, feature.values.as_ref()?)))
    }

    fn get(&self, name: &str) -> Option<&Values> {
        self.features.as_ref()?.feature.get(name)?.values.as_ref()
    }
}

/// What the first records have: the type of each feature, and how many values, if always as many.
#[derive(Default)]
pub(super) struct Shapes(BTreeMap<String, (DataType, Option<usize>)>);

impl Shapes {
    pub(super) fn add(&mut self, example: &Example) -> Result<(), String> {
        for (name, values) in example.features() {
            let new = || (values.value_type(), Some(values.len()));
            let (value, length) = self.0.entry(name.clone()).or_insert_with(new);
            if *value != values.value_type() {
                return Err(drift(name, value, &values.value_type()));
            }
            *length = length.filter(|length| *length == values.len());
        }
        Ok(())
    }

    /// In the order of their names: a map has no other.
    pub(super) fn fields(&self) -> Vec<Field> {
        let field = |(name, (value, length)): (&String, &(DataType, Option<usize>))| {
            let item = Arc::new(Field::new_list_field(value.clone(), false));
            let data_type = match length.map(i32::try_from) {
                Some(Ok(1)) => value.clone(),
                Some(Ok(length)) if length > 0 => DataType::FixedSizeList(item, length),
                _ => DataType::List(item),
            };
            Field::new(name, data_type, true)
        };
        self.0.iter().map(field).collect()
    }
}

fn drift(name: &str, expected: &DataType, got: &DataType) -> String {
    format!("feature {name:?} has values of {got}, expected {expected} as the first records have")
}

/// The features at `projection` of some examples as columns.
pub(super) fn batch(
    examples: Vec<Example>,
    schema: &SchemaRef,
    projection: &[usize],
) -> Result<RecordBatch, ArrowError> {
    for (name, _) in examples.iter().flat_map(Example::features) {
        if schema.index_of(name).is_err() {
            let reason = format!("feature {name:?} is not in the first records");
            return Err(ArrowError::ParseError(reason));
        }
    }
    let column = |at: &usize| column(&examples, schema.field(*at));
    let columns = projection.iter().map(column).collect::<Result<Vec<_>, _>>()?;
    let options = RecordBatchOptions::new().with_row_count(Some(examples.len()));
    RecordBatch::try_new_with_options(Arc::new(schema.project(projection)?), columns, &options)
}

fn column(examples: &[Example], field: &Field) -> Result<ArrayRef, ArrowError> {
    let (value, length) = match field.data_type() {
        DataType::FixedSizeList(item, length) => (item.data_type(), Some(*length as usize)),
        DataType::List(item) => (item.data_type(), None),
        value => (value, Some(1)),
    };
    let rows: Vec<_> = examples.iter().map(|example| example.get(field.name())).collect();
    for values in rows.iter().flatten() {
        check(field.name(), values, value, length).map_err(ArrowError::ParseError)?;
    }
    // A missing list has values too, where all have as many.
    let gap = length.unwrap_or(0);
    let flat: ArrayRef = match value {
        DataType::Binary => {
            Arc::new(BinaryArray::from_iter(flat(&rows, gap, |values| match values {
                Values::Bytes(list) => list.value.as_slice(),
                _ => &[],
            })))
        }
        DataType::Float32 => {
            Arc::new(Float32Array::from_iter(flat(&rows, gap, |values| match values {
                Values::Floats(list) => list.value.as_slice(),
                _ => &[],
            })))
        }
        _ => Arc::new(Int64Array::from_iter(flat(&rows, gap, |values| match values {
            Values::Ints(list) => list.value.as_slice(),
            _ => &[],
        }))),
    };
    lists(field.data_type(), &rows, flat)
}

fn check(
    name: &str,
    values: &Values,
    value: &DataType,
    length: Option<usize>,
) -> Result<(), String> {
    if values.value_type() != *value {
        return Err(drift(name, value, &values.value_type()));
    }
    match length {
        Some(length) if length != values.len() => {
            let got = values.len();
            Err(format!(
                "feature {name:?} has {got} values, expected {length} as the first records have"
            ))
        }
        _ => Ok(()),
    }
}

/// The values of all rows, one after another, and `gap` times none for each row that has none.
fn flat<'a, T: Clone + 'a>(
    rows: &[Option<&'a Values>],
    gap: usize,
    values: impl Fn(&'a Values) -> &'a [T],
) -> Vec<Option<T>> {
    let mut all = Vec::new();
    for row in rows {
        match row {
            Some(row) => all.extend(values(row).iter().cloned().map(Some)),
            None => all.resize(all.len() + gap, None),
        }
    }
    all
}

fn lists(
    data_type: &DataType,
    rows: &[Option<&Values>],
    flat: ArrayRef,
) -> Result<ArrayRef, ArrowError> {
    let nulls = || Some(NullBuffer::from_iter(rows.iter().map(Option::is_some)));
    Ok(match data_type {
        DataType::FixedSizeList(item, length) => {
            Arc::new(FixedSizeListArray::try_new(item.clone(), *length, flat, nulls())?)
        }
        DataType::List(item) => {
            let lengths = rows.iter().map(|row| row.map_or(0, Values::len));
            let offsets = OffsetBuffer::from_lengths(lengths);
            Arc::new(ListArray::try_new(item.clone(), offsets, flat, nulls())?)
        }
        _ => flat,
    })
}
