//! Rows as NumPy's arrays, a file each.

use crate::error::{Error, Result};
use arrow::array::{Array, ArrayRef, AsArray};
use arrow::datatypes::DataType;

/// The header ends at a multiple of this, as NumPy has it.
const ALIGNED: usize = 64;

/// Whether a value is an array: a number, or a list of numbers or of lists of fixed length of them.
pub(super) fn holds(of: &DataType) -> bool {
    match of {
        DataType::List(item) | DataType::LargeList(item) => fixed(item.data_type()).is_some(),
        other => fixed(other).is_some(),
    }
}

/// The axes of a list of fixed length, and what its values are called.
fn fixed(of: &DataType) -> Option<(Vec<usize>, &'static str)> {
    use DataType::*;
    let code = match of {
        FixedSizeList(item, length) => {
            let (mut axes, code) = fixed(item.data_type())?;
            axes.insert(0, usize::try_from(*length).ok()?);
            return Some((axes, code));
        }
        Boolean => "|b1",
        Int8 => "|i1",
        Int16 => "<i2",
        Int32 => "<i4",
        Int64 => "<i8",
        UInt8 => "|u1",
        UInt16 => "<u2",
        UInt32 => "<u4",
        UInt64 => "<u8",
        Float16 => "<f2",
        Float32 => "<f4",
        Float64 => "<f8",
        _ => return None,
    };
    Some((Vec::new(), code))
}

/// The file of each row; none where it has no value.
pub(super) fn files(name: &str, column: &ArrayRef) -> Result<Vec<Option<Vec<u8>>>> {
    let file = |row| (!column.is_null(row)).then(|| file(name, &column.slice(row, 1))).transpose();
    (0..column.len()).map(file).collect()
}

/// The only row of `value`.
fn file(name: &str, value: &ArrayRef) -> Result<Vec<u8>> {
    let (mut axes, mut values) = (Vec::new(), value.clone());
    if matches!(value.data_type(), DataType::List(_) | DataType::LargeList(_)) {
        values = flat(name, value)?;
        axes.push(values.len());
    }
    let internal = || Error::Internal(format!("column {name:?} is no array"));
    let (inner, code) = fixed(values.data_type()).ok_or_else(internal)?;
    for _ in &inner {
        values = flat(name, &values)?;
    }
    axes.extend(inner);
    let mut file = header(code, &axes);
    file.extend(bytes(&values)?);
    Ok(file)
}

/// The items of all lists.
fn flat(name: &str, lists: &ArrayRef) -> Result<ArrayRef> {
    let items = match lists.data_type() {
        DataType::List(_) => lists.as_list::<i32>().value(0),
        DataType::LargeList(_) => lists.as_list::<i64>().value(0),
        _ => {
            let lists = lists.as_fixed_size_list();
            let length = lists.value_length() as usize;
            lists.values().slice(lists.value_offset(0) as usize, length * lists.len())
        }
    };
    match items.null_count() {
        0 => Ok(items),
        rows => {
            Err(Error::Nulls { column: name.to_owned(), rows, place: "a list of it".to_owned() })
        }
    }
}

fn header(code: &str, axes: &[usize]) -> Vec<u8> {
    let axes: String = axes.iter().map(|axis| format!("{axis}, ")).collect();
    let text =
        format!("{{'descr': '{code}', 'fortran_order': False, 'shape': ({}), }}", axes.trim_end());
    // Magic, version and length come before it, and a newline behind.
    let length = (10 + text.len() + 1).next_multiple_of(ALIGNED) - 10;
    let mut header = b"\x93NUMPY\x01\x00".to_vec();
    header.extend((length as u16).to_le_bytes());
    header.extend(format!("{text:<width$}\n", width = length - 1).into_bytes());
    header
}

/// Little-endian, as Arrow has them.
fn bytes(values: &ArrayRef) -> Result<Vec<u8>> {
    if *values.data_type() == DataType::Boolean {
        let flags = values.as_boolean().iter();
        return Ok(flags.map(|flag| u8::from(flag == Some(true))).collect());
    }
    let data = values.to_data();
    let width = data.data_type().primitive_width();
    let width = width.ok_or_else(|| Error::Internal("an array of no numbers".to_owned()))?;
    Ok(data.buffers()[0].as_slice()[data.offset() * width..][..data.len() * width].to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_numpy_s() {
        let header = header("<f4", &[3, 4]);
        assert_eq!(header.len(), 128);
        assert_eq!(&header[..10], b"\x93NUMPY\x01\x00\x76\x00");
        let text = str::from_utf8(&header[10..]).expect("text");
        assert_eq!(text.trim_end(), "{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4,), }");
        assert!(text.ends_with(" \n"));
    }
}
