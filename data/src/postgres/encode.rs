//! Arrow's types as PostgreSQL's, and values as a binary `COPY` takes them.

use super::numeric;
use super::types::{EPOCH_DAYS, EPOCH_MICROSECONDS, Misfit, misfit};
use crate::database::fitted;
use crate::error::{Error, Result};
use arrow::array::{Array, ArrayRef, AsArray, PrimitiveArray, StringArray};
use arrow::datatypes::{
    ArrowPrimitiveType, DataType, Date32Type, Field, Float32Type, Float64Type, Int16Type,
    Int32Type, Int64Type, Time64MicrosecondType, TimeUnit, TimestampMicrosecondType, UInt32Type,
};
use std::sync::Arc;
use tokio_postgres::types::{Kind, Type};

/// The type of a new table's column.
pub(super) fn created(field: &Field) -> Result<String> {
    name_of(field.data_type()).ok_or_else(|| Error::ColumnType {
        column: field.name().clone(),
        expected: "a type of Arrow that PostgreSQL has as well",
        got: field.data_type().to_string(),
        hint: "; take it apart, or cast it, with with_column",
    })
}

fn name_of(of: &DataType) -> Option<String> {
    let name = match of {
        DataType::Boolean => "boolean",
        DataType::Int8 | DataType::UInt8 | DataType::Int16 => "smallint",
        DataType::UInt16 | DataType::Int32 => "integer",
        DataType::UInt32 | DataType::Int64 => "bigint",
        DataType::UInt64 => "numeric(20, 0)",
        DataType::Float16 | DataType::Float32 => "real",
        DataType::Float64 => "double precision",
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View | DataType::Null => "text",
        of if of.is_binary() || matches!(of, DataType::FixedSizeBinary(_)) => "bytea",
        DataType::Date32 | DataType::Date64 => "date",
        DataType::Time32(_) | DataType::Time64(_) => "time",
        DataType::Timestamp(_, None) => "timestamp",
        DataType::Timestamp(_, Some(_)) => "timestamptz",
        DataType::Dictionary(_, values) => return name_of(values),
        DataType::List(item) | DataType::LargeList(item) | DataType::FixedSizeList(item, _) => {
            // Arrays of arrays are something else.
            let item = name_of(item.data_type()).filter(|item| !item.ends_with(']'))?;
            return Some(format!("{item}[]"));
        }
        DataType::Decimal32(digits, scale)
        | DataType::Decimal64(digits, scale)
        | DataType::Decimal128(digits, scale)
        | DataType::Decimal256(digits, scale) => {
            let (digits, scale) = (i32::from(*digits), i32::from(*scale));
            return Some(format!("numeric({}, {})", digits - scale.min(0), scale.max(0)));
        }
        _ => return None,
    };
    Some(name.to_owned())
}

/// A column of a table that values go to.
pub(super) struct Target {
    name: String,
    of: Type,
    /// The type from which its values are made.
    from: DataType,
}

impl Target {
    /// A column `of` a type, for values of `field`; an error if it does not take such values.
    pub(super) fn new(field: &Field, of: Type) -> Result<Self> {
        let name = field.name().clone();
        match canonical(&of, field.data_type()) {
            Some(from) => Ok(Self { name, of, from }),
            None => Err(Error::ColumnType {
                column: name,
                expected: "a type that the table's column takes",
                got: format!("{}, where the table has {}", field.data_type(), of.name()),
                hint: "; cast it with with_column",
            }),
        }
    }

    /// What writes the values of a column, of which the first is in row `first`.
    pub(super) fn values(&self, column: &ArrayRef, first: u64) -> Result<Values<'_>> {
        let made = fitted(column, &self.from)?.map_err(|(row, got)| {
            let of = format!("a value of {}", self.of.name());
            self.error(first + row, got, of, "; cast it with with_column")
        })?;
        let lost = || Error::Internal(format!("{} is not made of {}", self.of, self.from));
        let put = put(&made, &self.of).ok_or_else(lost)?;
        Ok(Values { target: self, made, put, first })
    }

    fn error(&self, row: u64, got: String, expected: String, hint: &'static str) -> Error {
        Error::ColumnValue { column: self.name.clone(), row, got, expected, hint }
    }
}

/// The values of a column that are to be written.
pub(super) struct Values<'a> {
    target: &'a Target,
    made: ArrayRef,
    put: Put,
    first: u64,
}

impl Values<'_> {
    /// Appends the value of a row: its length, and its bytes.
    pub(super) fn write(&self, row: usize, out: &mut Vec<u8>) -> Result<()> {
        write_sized(self.made.is_valid(row), out, |out| (self.put)(row, out)).map_err(|misfit| {
            let Misfit { got, expected, hint } = misfit;
            self.target.error(self.first + row as u64, got.to_owned(), expected.to_owned(), hint)
        })
    }
}

/// Writes the bytes of a value behind their length; -1 is for one that is missing.
fn write_sized(
    is_there: bool,
    out: &mut Vec<u8>,
    put: impl FnOnce(&mut Vec<u8>) -> Result<(), Misfit>,
) -> Result<(), Misfit> {
    let start = out.len();
    out.extend((-1_i32).to_be_bytes());
    if is_there {
        put(out)?;
        let length = i32::try_from(out.len() - start - 4).map_err(|_| TOO_LONG)?;
        out[start..start + 4].copy_from_slice(&length.to_be_bytes());
    }
    Ok(())
}

const TOO_LONG: Misfit = misfit("a value of more than 2 GiB", "less", "");

/// The type of Arrow that values of `from` are cast to, so that a column `of` PostgreSQL is made of them;
/// nothing if they mean something else, or would lose more than digits.
fn canonical(of: &Type, from: &DataType) -> Option<DataType> {
    if let DataType::Dictionary(_, values) = from {
        return canonical(of, values);
    }
    let takes = |is_taken: bool, to: DataType| (is_taken || from.is_null()).then_some(to);
    match *of {
        Type::BOOL => takes(*from == DataType::Boolean, DataType::Boolean),
        Type::INT2 => takes(from.is_integer(), DataType::Int16),
        Type::INT4 => takes(from.is_integer(), DataType::Int32),
        Type::INT8 => takes(from.is_integer(), DataType::Int64),
        Type::OID => takes(from.is_integer(), DataType::UInt32),
        Type::FLOAT4 => takes(from.is_numeric(), DataType::Float32),
        Type::FLOAT8 => takes(from.is_numeric(), DataType::Float64),
        Type::NUMERIC if from.is_floating() => Some(DataType::Float64),
        Type::NUMERIC => takes(from.is_numeric(), DataType::Utf8),
        Type::BYTEA => {
            let is_fixed = matches!(from, DataType::FixedSizeBinary(_));
            takes(from.is_binary() || is_fixed, DataType::Binary)
        }
        Type::DATE => takes(matches!(from, DataType::Date32 | DataType::Date64), DataType::Date32),
        Type::TIME => {
            let is_time = matches!(from, DataType::Time32(_) | DataType::Time64(_));
            takes(is_time, DataType::Time64(TimeUnit::Microsecond))
        }
        Type::TIMESTAMP => {
            let is_local = matches!(from, DataType::Timestamp(_, None));
            takes(is_local, DataType::Timestamp(TimeUnit::Microsecond, None))
        }
        Type::TIMESTAMPTZ => {
            let is_global = matches!(from, DataType::Timestamp(_, Some(_)));
            takes(is_global, DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into())))
        }
        _ if is_text(of) => takes(from.is_string(), DataType::Utf8),
        _ => list_of(of, from),
    }
}

fn is_text(of: &Type) -> bool {
    let is_plain = matches!(
        *of,
        Type::TEXT
            | Type::VARCHAR
            | Type::BPCHAR
            | Type::NAME
            | Type::JSON
            | Type::JSONB
            | Type::XML
            | Type::UUID
    );
    is_plain || matches!(of.kind(), Kind::Enum(_)) || of.name() == "citext"
}

fn list_of(of: &Type, from: &DataType) -> Option<DataType> {
    let Kind::Array(item) = of.kind() else { return None };
    let from = match from {
        DataType::List(from) | DataType::LargeList(from) | DataType::FixedSizeList(from, _) => {
            from.data_type()
        }
        DataType::Null => from,
        _ => return None,
    };
    Some(DataType::List(Arc::new(Field::new_list_field(canonical(item, from)?, true))))
}

/// Appends the bytes of a row's value, which is there.
type Put = Box<dyn Fn(usize, &mut Vec<u8>) -> Result<(), Misfit> + Send>;

/// What writes values of `made`, of the type that [`canonical`] says, for a column `of` PostgreSQL.
fn put(made: &ArrayRef, of: &Type) -> Option<Put> {
    if let Kind::Array(item) = of.kind() {
        return put_lists(made, item);
    }
    let text = || made.as_string_opt::<i32>().cloned();
    Some(match *of {
        Type::BOOL => {
            let values = made.as_boolean_opt()?.clone();
            Box::new(move |row, out| write(out, [u8::from(values.value(row))]))
        }
        Type::INT2 => plain::<Int16Type, 2>(made, i16::to_be_bytes)?,
        Type::INT4 => plain::<Int32Type, 4>(made, i32::to_be_bytes)?,
        Type::INT8 => plain::<Int64Type, 8>(made, i64::to_be_bytes)?,
        Type::OID => plain::<UInt32Type, 4>(made, u32::to_be_bytes)?,
        Type::FLOAT4 => plain::<Float32Type, 4>(made, f32::to_be_bytes)?,
        Type::FLOAT8 => plain::<Float64Type, 8>(made, f64::to_be_bytes)?,
        Type::NUMERIC => put_numbers(made)?,
        Type::BYTEA => {
            let values = made.as_binary_opt::<i32>()?.clone();
            Box::new(move |row, out| write(out, values.value(row).iter().copied()))
        }
        Type::DATE | Type::TIMESTAMP | Type::TIMESTAMPTZ => put_days(made)?,
        Type::TIME => plain::<Time64MicrosecondType, 8>(made, i64::to_be_bytes)?,
        Type::UUID => {
            let values = text()?;
            Box::new(move |row, out| write(out, uuid(values.value(row))?))
        }
        Type::JSONB => put_text(text()?, &[1]),
        _ => put_text(text()?, &[]),
    })
}

fn write(out: &mut Vec<u8>, bytes: impl IntoIterator<Item = u8>) -> Result<(), Misfit> {
    out.extend(bytes);
    Ok(())
}

fn plain<T: ArrowPrimitiveType, const N: usize>(
    made: &ArrayRef,
    bytes: fn(T::Native) -> [u8; N],
) -> Option<Put> {
    let values: PrimitiveArray<T> = made.as_primitive_opt::<T>()?.clone();
    Some(Box::new(move |row, out| write(out, bytes(values.value(row)))))
}

/// Days, or moments, which are counted from another day.
fn put_days(made: &ArrayRef) -> Option<Put> {
    const NO_TIME: Misfit = misfit("a time that PostgreSQL has not", "one from 4713 BC on", "");
    if let Some(days) = made.as_primitive_opt::<Date32Type>().cloned() {
        return Some(Box::new(move |row, out| {
            // The least of all numbers is not a day, but minus infinity.
            let days = days.value(row).checked_sub(EPOCH_DAYS).filter(|days| *days > i32::MIN);
            write(out, days.ok_or(NO_TIME)?.to_be_bytes())
        }));
    }
    let times = made.as_primitive_opt::<TimestampMicrosecondType>()?.clone();
    Some(Box::new(move |row, out| {
        let time = times.value(row).checked_sub(EPOCH_MICROSECONDS);
        let time = time.filter(|time| *time > i64::MIN);
        write(out, time.ok_or(NO_TIME)?.to_be_bytes())
    }))
}

fn put_text(values: StringArray, before: &'static [u8]) -> Put {
    Box::new(move |row, out| {
        let text = values.value(row).bytes();
        write(out, before.iter().copied().chain(text))
    })
}

fn put_numbers(made: &ArrayRef) -> Option<Put> {
    const NO_NUMBER: Misfit = misfit("no number", "one", "");
    if let Some(floats) = made.as_primitive_opt::<Float64Type>().cloned() {
        return Some(Box::new(move |row, out| {
            write(out, numeric::encode(&floats.value(row).to_string()).ok_or(NO_NUMBER)?)
        }));
    }
    let text = made.as_string_opt::<i32>()?.clone();
    Some(Box::new(move |row, out| write(out, numeric::encode(text.value(row)).ok_or(NO_NUMBER)?)))
}

fn uuid(text: &str) -> Result<[u8; 16], Misfit> {
    let wrong = misfit("text that is no UUID", "hexadecimal digits as 8-4-4-4-12", "");
    let hex: String = text.chars().filter(|c| *c != '-').collect();
    match (hex.len(), u128::from_str_radix(&hex, 16)) {
        (32, Ok(value)) => Ok(value.to_be_bytes()),
        _ => Err(wrong),
    }
}

/// As [`List`](super::types) reads them.
fn put_lists(made: &ArrayRef, item: &Type) -> Option<Put> {
    let lists = made.as_list_opt::<i32>()?.clone();
    let (put, oid) = (put(lists.values(), item)?, item.oid());
    Some(Box::new(move |row, out| {
        let (first, last) =
            (lists.value_offsets()[row] as usize, lists.value_offsets()[row + 1] as usize);
        let has_nulls = (first..last).any(|at| lists.values().is_null(at));
        let dimensions = i32::from(first < last);
        for word in [dimensions, has_nulls.into(), oid as i32] {
            out.extend(word.to_be_bytes());
        }
        if first < last {
            for word in [(last - first) as i32, 1] {
                out.extend(word.to_be_bytes());
            }
        }
        (first..last)
            .try_for_each(|at| write_sized(lists.values().is_valid(at), out, |out| put(at, out)))
    }))
}
