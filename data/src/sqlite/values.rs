//! Values of SQLite, each of which has a type of its own, as columns of one.

use arrow::array::{
    ArrayRef, BinaryBuilder, BooleanBuilder, Float64Builder, Int64Builder, NullArray, StringBuilder,
};
use arrow::datatypes::DataType;
use rusqlite::types::ValueRef;
use std::sync::Arc;

/// The type that a column was declared with, if that says what its values are. The rules are SQLite's for
/// a column's affinity, and `BOOL`, which SQLite takes for a number.
pub(super) fn declared(of: Option<&str>) -> Option<DataType> {
    let of = of?.to_uppercase();
    let has = |parts: &[&str]| parts.iter().any(|part| of.contains(part));
    Some(match () {
        () if has(&["BOOL"]) => DataType::Boolean,
        () if has(&["INT"]) => DataType::Int64,
        () if has(&["CHAR", "CLOB", "TEXT"]) => DataType::Utf8,
        () if has(&["BLOB"]) => DataType::Binary,
        () if has(&["REAL", "FLOA", "DOUB"]) => DataType::Float64,
        () => return None,
    })
}

/// The type of a column that had values of `known`, if any, and now has this one as well. What does not
/// fit shows when the values are read.
pub(super) fn widened(known: DataType, value: ValueRef<'_>) -> DataType {
    match (known, value) {
        (known, ValueRef::Null) => known,
        (DataType::Int64, ValueRef::Real(_)) => DataType::Float64,
        (DataType::Null, ValueRef::Integer(_)) => DataType::Int64,
        (DataType::Null, ValueRef::Real(_)) => DataType::Float64,
        (DataType::Null, ValueRef::Text(_)) => DataType::Utf8,
        (DataType::Null, ValueRef::Blob(_)) => DataType::Binary,
        (known, _) => known,
    }
}

/// Values of a column.
pub(super) enum Values {
    Booleans(BooleanBuilder),
    Integers(Int64Builder),
    Floats(Float64Builder),
    Text(StringBuilder),
    Bytes(BinaryBuilder),
    /// So many rows, none of which has a value.
    Missing(usize),
}

impl Values {
    pub(super) fn new(of: &DataType) -> Self {
        match of {
            DataType::Boolean => Self::Booleans(BooleanBuilder::new()),
            DataType::Int64 => Self::Integers(Int64Builder::new()),
            DataType::Float64 => Self::Floats(Float64Builder::new()),
            DataType::Utf8 => Self::Text(StringBuilder::new()),
            DataType::Binary => Self::Bytes(BinaryBuilder::new()),
            _ => Self::Missing(0),
        }
    }

    /// Adds a value, or says what it is if it is none of this column.
    pub(super) fn push(&mut self, value: ValueRef<'_>) -> Result<(), String> {
        match (self, value) {
            (Self::Missing(rows), ValueRef::Null) => *rows += 1,
            (Self::Booleans(values), ValueRef::Null) => values.append_null(),
            (Self::Integers(values), ValueRef::Null) => values.append_null(),
            (Self::Floats(values), ValueRef::Null) => values.append_null(),
            (Self::Text(values), ValueRef::Null) => values.append_null(),
            (Self::Bytes(values), ValueRef::Null) => values.append_null(),
            (Self::Booleans(values), ValueRef::Integer(bit @ (0 | 1))) => {
                values.append_value(bit == 1);
            }
            (Self::Integers(values), ValueRef::Integer(value)) => values.append_value(value),
            (Self::Floats(values), ValueRef::Real(value)) => values.append_value(value),
            (Self::Floats(values), ValueRef::Integer(value)) if is_float(value) => {
                values.append_value(value as f64);
            }
            (Self::Text(values), ValueRef::Text(text)) => match std::str::from_utf8(text) {
                Ok(text) => values.append_value(text),
                Err(_) => return Err("text that is not UTF-8".to_owned()),
            },
            (Self::Bytes(values), ValueRef::Blob(bytes)) => values.append_value(bytes),
            (_, other) => return Err(shown(other)),
        }
        Ok(())
    }

    /// What it takes, for messages.
    pub(super) fn expected(&self) -> &'static str {
        match self {
            Self::Booleans(_) => "a boolean, 0 or 1",
            Self::Integers(_) => "an integer",
            Self::Floats(_) => "a float, or an integer that is one",
            Self::Text(_) => "text",
            Self::Bytes(_) => "a blob",
            Self::Missing(_) => "none, as there were none when the dataset was made",
        }
    }

    /// All values since the last time.
    pub(super) fn finish(&mut self) -> ArrayRef {
        match self {
            Self::Booleans(values) => Arc::new(values.finish()),
            Self::Integers(values) => Arc::new(values.finish()),
            Self::Floats(values) => Arc::new(values.finish()),
            Self::Text(values) => Arc::new(values.finish()),
            Self::Bytes(values) => Arc::new(values.finish()),
            Self::Missing(rows) => Arc::new(NullArray::new(std::mem::take(rows))),
        }
    }
}

/// Whether a float has room for all its bits.
fn is_float(value: i64) -> bool {
    let bits = value.unsigned_abs();
    bits == 0 || 64 - bits.leading_zeros() - bits.trailing_zeros() <= f64::MANTISSA_DIGITS
}

fn shown(value: ValueRef<'_>) -> String {
    match value {
        ValueRef::Null => "no value".to_owned(),
        ValueRef::Integer(value) => format!("the integer {value}"),
        ValueRef::Real(value) => format!("the float {value}"),
        ValueRef::Text(text) => {
            let text: String = String::from_utf8_lossy(text).chars().take(40).collect();
            format!("the text {text:?}")
        }
        ValueRef::Blob(bytes) => format!("a blob of {} bytes", bytes.len()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_are_those_of_the_declaration() {
        for (of, expected) in [
            ("INTEGER", Some(DataType::Int64)),
            ("unsigned big int", Some(DataType::Int64)),
            ("VARCHAR(255)", Some(DataType::Utf8)),
            ("Blob", Some(DataType::Binary)),
            ("DOUBLE PRECISION", Some(DataType::Float64)),
            ("boolean", Some(DataType::Boolean)),
            ("DECIMAL(10, 5)", None),
            ("DATETIME", None),
            ("", None),
        ] {
            assert_eq!(declared(Some(of)), expected, "{of}");
        }
    }

    #[test]
    fn floats_take_the_integers_that_they_have() {
        let most = 1 << f64::MANTISSA_DIGITS;
        for (value, fits) in [
            (0, true),
            (most, true),
            (most + 1, false),
            (most + 2, true),
            (i64::MIN, true),
            (i64::MAX, false),
        ] {
            let pushed = Values::new(&DataType::Float64).push(ValueRef::Integer(value));
            assert_eq!(pushed.is_ok(), fits, "{value}");
        }
    }
}
