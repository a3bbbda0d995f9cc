//! PostgreSQL's types as Arrow's, and values as the server sends them.

use super::numeric::Numeric;
use crate::error::{Error, Result};
use arrow::array::{
    ArrayRef, BinaryBuilder, BooleanBuilder, ListArray, NullBufferBuilder, PrimitiveBuilder,
    StringBuilder,
};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::{
    ArrowPrimitiveType, DataType, Date32Type, Decimal128Type, Decimal256Type, Field, Float32Type,
    Float64Type, Int16Type, Int32Type, Int64Type, Time64MicrosecondType, TimestampMicrosecondType,
    UInt32Type, i256,
};
use std::borrow::Cow;
use std::sync::Arc;
use tokio_postgres::types::{Kind, Type};

/// Days and microseconds from 1970 to 2000, where PostgreSQL counts from.
pub(super) const EPOCH_DAYS: i32 = 10_957;
pub(super) const EPOCH_MICROSECONDS: i64 = EPOCH_DAYS as i64 * 86_400_000_000;

/// Most digits of Arrow's decimals of 128 and of 256 bits.
const DIGITS_128: i32 = 38;
const DIGITS_256: i32 = 76;

/// Collects values of a column.
pub(super) trait Column: Send {
    /// Adds a value as the server sends it, or none.
    fn push(&mut self, raw: Option<&[u8]>) -> Result<(), Misfit>;

    /// All values since the last time.
    fn finish(&mut self) -> Result<ArrayRef>;
}

/// A value that its column cannot take.
#[derive(Debug)]
pub(super) struct Misfit {
    pub(super) got: &'static str,
    pub(super) expected: &'static str,
    pub(super) hint: &'static str,
}

pub(super) const fn misfit(
    got: &'static str,
    expected: &'static str,
    hint: &'static str,
) -> Misfit {
    Misfit { got, expected, hint }
}

/// What is not even a value of its own type.
const GARBLED: Misfit = misfit("bytes that are no value of its type", "what PostgreSQL sends", "");

/// The column of a result. `modifier` says what a type has in parentheses, such as a precision.
pub(super) fn column(name: &str, of: &Type, modifier: i32) -> Result<Box<dyn Column>> {
    let found = match of.kind() {
        Kind::Array(item) => match scalar(item, modifier) {
            Some(item) => Some(Box::new(List::new(item)?) as Box<dyn Column>),
            None => None,
        },
        _ => scalar(of, modifier),
    };
    found.ok_or_else(|| Error::ColumnType {
        column: name.to_owned(),
        expected: "a type of PostgreSQL that Arrow has as well",
        got: described(of, modifier),
        hint: "; cast it in the query, such as CAST(column AS text) or EXTRACT(epoch FROM column)",
    })
}

/// The type as messages call it.
fn described(of: &Type, modifier: i32) -> String {
    match (of, digits(modifier)) {
        (&Type::NUMERIC, Some((precision, scale))) => format!("numeric({precision}, {scale})"),
        _ => of.name().to_owned(),
    }
}

fn scalar(of: &Type, modifier: i32) -> Option<Box<dyn Column>> {
    if matches!(of.kind(), Kind::Enum(_)) {
        return Some(text(utf8));
    }
    Some(match *of {
        Type::BOOL => Box::new(Booleans(BooleanBuilder::new())),
        Type::INT2 => plain::<Int16Type, 2>(i16::from_be_bytes),
        Type::INT4 => plain::<Int32Type, 4>(i32::from_be_bytes),
        Type::INT8 => plain::<Int64Type, 8>(i64::from_be_bytes),
        Type::OID => plain::<UInt32Type, 4>(u32::from_be_bytes),
        Type::FLOAT4 => plain::<Float32Type, 4>(f32::from_be_bytes),
        Type::FLOAT8 => plain::<Float64Type, 8>(f64::from_be_bytes),
        Type::NUMERIC => return numeric(modifier),
        Type::TEXT | Type::VARCHAR | Type::BPCHAR | Type::NAME | Type::JSON | Type::XML => {
            text(utf8)
        }
        Type::JSONB => text(jsonb),
        Type::UUID => text(uuid),
        Type::BYTEA => Box::new(Bytes(BinaryBuilder::new())),
        Type::DATE => primitive(PrimitiveBuilder::<Date32Type>::new(), date),
        Type::TIME => plain::<Time64MicrosecondType, 8>(i64::from_be_bytes),
        Type::TIMESTAMP => {
            primitive(PrimitiveBuilder::<TimestampMicrosecondType>::new(), timestamp)
        }
        Type::TIMESTAMPTZ => {
            let values = PrimitiveBuilder::<TimestampMicrosecondType>::new();
            primitive(values.with_timezone("UTC"), timestamp)
        }
        // Extensions, such as citext, that are text of another name.
        _ if of.name() == "citext" => text(utf8),
        _ => return None,
    })
}

fn plain<T: ArrowPrimitiveType, const N: usize>(
    decode: fn([u8; N]) -> T::Native,
) -> Box<dyn Column> {
    primitive(PrimitiveBuilder::<T>::new(), move |raw: &[u8]| Ok(decode(fixed(raw)?)))
}

fn primitive<T: ArrowPrimitiveType>(
    values: PrimitiveBuilder<T>,
    decode: impl Fn(&[u8]) -> Result<T::Native, Misfit> + Send + 'static,
) -> Box<dyn Column> {
    Box::new(Primitive { values, decode })
}

/// Precision and scale of a `numeric`, if it has been declared with them.
fn digits(modifier: i32) -> Option<(i32, i32)> {
    let packed = modifier.checked_sub(4).filter(|packed| *packed >= 0)?;
    // The scale is a signed number of 11 bits.
    let scale = ((packed & 0x7ff) ^ 0x400) - 0x400;
    Some((packed >> 16 & 0xffff, scale))
}

/// Decimals of the digits that were declared. Without any, a column may have values of any: these are
/// floats.
fn numeric(modifier: i32) -> Option<Box<dyn Column>> {
    let Some((precision, scale)) = digits(modifier) else {
        let decode = |raw: &[u8]| Numeric::of(raw).map(|value| value.to_f64()).ok_or(GARBLED);
        return Some(primitive(PrimitiveBuilder::<Float64Type>::new(), decode));
    };
    // numeric(3, -2) has five digits before the point, numeric(2, 4) four behind it.
    let (precision, scale) = ((precision - scale.min(0)).max(scale), scale.max(0));
    let (digits, places) = (u8::try_from(precision).ok()?, i8::try_from(scale).ok()?);
    if precision <= DIGITS_128 {
        let values = PrimitiveBuilder::<Decimal128Type>::new();
        let values = values.with_data_type(DataType::Decimal128(digits, places));
        let decode = move |raw: &[u8]| unscaled(raw, places)?.to_i128().ok_or(GARBLED);
        return Some(primitive(values, decode));
    }
    let values = PrimitiveBuilder::<Decimal256Type>::new();
    let values = values.with_data_type(DataType::Decimal256(digits, places));
    (precision <= DIGITS_256).then(|| primitive(values, move |raw: &[u8]| unscaled(raw, places)))
}

fn unscaled(raw: &[u8], scale: i8) -> Result<i256, Misfit> {
    match Numeric::of(raw).ok_or(GARBLED)? {
        Numeric::Other(_) => {
            let hint = "; leave such rows out, or cast the column to double precision";
            Err(misfit("NaN or infinity", "a decimal number", hint))
        }
        number => number.unscaled(scale).ok_or(GARBLED),
    }
}

fn fixed<const N: usize>(raw: &[u8]) -> Result<[u8; N], Misfit> {
    raw.try_into().map_err(|_| GARBLED)
}

fn date(raw: &[u8]) -> Result<i32, Misfit> {
    match i32::from_be_bytes(fixed(raw)?) {
        i32::MIN | i32::MAX => Err(INFINITE),
        days => days.checked_add(EPOCH_DAYS).ok_or(INFINITE),
    }
}

fn timestamp(raw: &[u8]) -> Result<i64, Misfit> {
    match i64::from_be_bytes(fixed(raw)?) {
        i64::MIN | i64::MAX => Err(INFINITE),
        microseconds => microseconds.checked_add(EPOCH_MICROSECONDS).ok_or(INFINITE),
    }
}

const INFINITE: Misfit = misfit(
    "infinity, or a time near it",
    "a time that Arrow has",
    "; leave such rows out, or give them another value with NULLIF",
);

fn utf8(raw: &[u8]) -> Result<Cow<'_, str>, Misfit> {
    std::str::from_utf8(raw).map(Cow::Borrowed).map_err(|_| GARBLED)
}

fn jsonb(raw: &[u8]) -> Result<Cow<'_, str>, Misfit> {
    match raw.split_first() {
        Some((1, text)) => utf8(text),
        _ => Err(GARBLED),
    }
}

fn uuid(raw: &[u8]) -> Result<Cow<'_, str>, Misfit> {
    let hex = format!("{:032x}", u128::from_be_bytes(fixed(raw)?));
    let parts = [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]];
    Ok(Cow::Owned(parts.join("-")))
}

struct Primitive<T: ArrowPrimitiveType, F> {
    values: PrimitiveBuilder<T>,
    decode: F,
}

impl<T, F> Column for Primitive<T, F>
where
    T: ArrowPrimitiveType,
    F: Fn(&[u8]) -> Result<T::Native, Misfit> + Send,
{
    fn push(&mut self, raw: Option<&[u8]>) -> Result<(), Misfit> {
        self.values.append_option(raw.map(&self.decode).transpose()?);
        Ok(())
    }

    fn finish(&mut self) -> Result<ArrayRef> {
        Ok(Arc::new(self.values.finish()))
    }
}

struct Booleans(BooleanBuilder);

impl Column for Booleans {
    fn push(&mut self, raw: Option<&[u8]>) -> Result<(), Misfit> {
        let value = raw.map(|raw| Ok::<_, Misfit>(fixed::<1>(raw)? != [0])).transpose()?;
        self.0.append_option(value);
        Ok(())
    }

    fn finish(&mut self) -> Result<ArrayRef> {
        Ok(Arc::new(self.0.finish()))
    }
}

type Decode = fn(&[u8]) -> Result<Cow<'_, str>, Misfit>;

fn text(decode: Decode) -> Box<dyn Column> {
    Box::new(Text { values: StringBuilder::new(), decode })
}

struct Text {
    values: StringBuilder,
    decode: Decode,
}

impl Column for Text {
    fn push(&mut self, raw: Option<&[u8]>) -> Result<(), Misfit> {
        self.values.append_option(raw.map(self.decode).transpose()?);
        Ok(())
    }

    fn finish(&mut self) -> Result<ArrayRef> {
        Ok(Arc::new(self.values.finish()))
    }
}

struct Bytes(BinaryBuilder);

impl Column for Bytes {
    fn push(&mut self, raw: Option<&[u8]>) -> Result<(), Misfit> {
        self.0.append_option(raw);
        Ok(())
    }

    fn finish(&mut self) -> Result<ArrayRef> {
        Ok(Arc::new(self.0.finish()))
    }
}

/// Arrays of one dimension.
struct List {
    item: Box<dyn Column>,
    field: Arc<Field>,
    lengths: Vec<usize>,
    nulls: NullBufferBuilder,
}

impl List {
    fn new(mut item: Box<dyn Column>) -> Result<Self> {
        let of = item.finish()?.data_type().clone();
        let field = Arc::new(Field::new_list_field(of, true));
        Ok(Self { item, field, lengths: Vec::new(), nulls: NullBufferBuilder::new(0) })
    }

    /// Adds the values of an array, and says how many they are. Layout, in big-endian numbers of 32
    /// bits: dimensions, whether any is missing, the type, length and first index of each dimension,
    /// and for each value its length, or -1, and its bytes.
    fn push_items(&mut self, raw: &[u8]) -> Result<usize, Misfit> {
        let mut rest = raw;
        let (dimensions, ..) = (word(&mut rest)?, word(&mut rest)?, word(&mut rest)?);
        if dimensions > 1 {
            let hint = "; take it apart in the query, such as with unnest(column)";
            return Err(misfit("an array of more than one dimension", "a list", hint));
        }
        if dimensions == 0 {
            return Ok(0);
        }
        let (length, _) = (word(&mut rest)?, word(&mut rest)?);
        for _ in 0..length {
            let value = match usize::try_from(word(&mut rest)?) {
                Ok(bytes) => Some(take(&mut rest, bytes)?),
                Err(_) => None,
            };
            self.item.push(value)?;
        }
        usize::try_from(length).map_err(|_| GARBLED)
    }
}

fn take<'a>(rest: &mut &'a [u8], bytes: usize) -> Result<&'a [u8], Misfit> {
    let (taken, left) = rest.split_at_checked(bytes).ok_or(GARBLED)?;
    *rest = left;
    Ok(taken)
}

fn word(rest: &mut &[u8]) -> Result<i32, Misfit> {
    Ok(i32::from_be_bytes(fixed(take(rest, 4)?)?))
}

impl Column for List {
    fn push(&mut self, raw: Option<&[u8]>) -> Result<(), Misfit> {
        let length = raw.map(|raw| self.push_items(raw)).transpose()?;
        self.lengths.push(length.unwrap_or(0));
        self.nulls.append(length.is_some());
        Ok(())
    }

    fn finish(&mut self) -> Result<ArrayRef> {
        let offsets = OffsetBuffer::from_lengths(std::mem::take(&mut self.lengths));
        let (field, items, nulls) = (self.field.clone(), self.item.finish()?, self.nulls.finish());
        Ok(Arc::new(ListArray::try_new(field, offsets, items, nulls)?))
    }
}
