//! What an array of NumPy says of itself, and the Arrow array that it becomes.
//!
//! A file is `\x93NUMPY`, two bytes of version, the length of the header (two bytes, from version
//! 2 on four), the header, then the values. The header is a Python dictionary:
//! `{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), }`.

use crate::error::Result;
use arrow::array::{ArrayRef, BooleanArray, FixedSizeListArray, make_array};
use arrow::buffer::Buffer;
use arrow::datatypes::{DataType, Field};
use std::io::Read;
use std::sync::Arc;

const MAGIC: &[u8; 6] = b"\x93NUMPY";

/// More than this is no header: NumPy itself refuses 10,000 characters.
const HEADER_BYTES: usize = 1 << 16;

#[derive(Clone, Debug, PartialEq)]
pub(super) struct Header {
    /// Where the values begin.
    pub(super) start: u64,
    pub(super) rows: usize,
    /// Values of a row, if it is more than a number.
    width: Option<i32>,
    value: DataType,
    value_bytes: usize,
    big_endian: bool,
}

impl Header {
    pub(super) fn read(reader: &mut impl Read) -> Result<Self, String> {
        let mut head = [0; 8];
        reader.read_exact(&mut head).map_err(|_| "it is shorter than a header".to_owned())?;
        if head[..6] != *MAGIC {
            return Err(format!("it starts with {:?}, expected {MAGIC:?}", &head[..6]));
        }
        let length_bytes = if head[6] == 1 { 2 } else { 4 };
        let mut length = [0; 4];
        let cut = |_| "its header is cut off".to_owned();
        reader.read_exact(&mut length[..length_bytes]).map_err(cut)?;
        let length = u32::from_le_bytes(length) as usize;
        if length > HEADER_BYTES {
            return Err(format!("its header has {length} bytes, expected at most {HEADER_BYTES}"));
        }
        let mut text = vec![0; length];
        reader.read_exact(&mut text).map_err(cut)?;
        let start = (8 + length_bytes + length) as u64;
        Self::parse(&String::from_utf8_lossy(&text), start)
    }

    fn parse(text: &str, start: u64) -> Result<Self, String> {
        if entry(text, "fortran_order")?.starts_with("True") {
            let way_out = "write np.ascontiguousarray(array)";
            return Err(format!("its order is Fortran's, column by column; {way_out}"));
        }
        let (value, value_bytes, big_endian) = value_type(entry(text, "descr")?)?;
        let shape = shape(entry(text, "shape")?)?;
        let (rows, row) = shape.split_first().ok_or("it is one number, without rows")?;
        let width = row.iter().try_fold(1_usize, |width, axis| width.checked_mul(*axis));
        let too_large = || format!("its shape {shape:?} is too large");
        let width = width.and_then(|width| i32::try_from(width).ok()).ok_or_else(too_large)?;
        if width == 0 {
            return Err(format!("its shape {shape:?} has no values in a row"));
        }
        let bytes = rows.checked_mul(width as usize).and_then(|n| n.checked_mul(value_bytes));
        bytes.filter(|bytes| isize::try_from(*bytes).is_ok()).ok_or_else(too_large)?;
        let width = (!row.is_empty()).then_some(width);
        Ok(Self { start, rows: *rows, width, value, value_bytes, big_endian })
    }

    pub(super) fn row_bytes(&self) -> usize {
        self.width.unwrap_or(1) as usize * self.value_bytes
    }

    pub(super) fn data_type(&self) -> DataType {
        match self.width {
            None => self.value.clone(),
            Some(width) => DataType::FixedSizeList(self.item(), width),
        }
    }

    fn item(&self) -> Arc<Field> {
        Arc::new(Field::new("item", self.value.clone(), false))
    }

    /// The values of `rows` rows.
    pub(super) fn array(&self, mut bytes: Vec<u8>, rows: usize) -> Result<ArrayRef> {
        if self.big_endian {
            bytes.chunks_exact_mut(self.value_bytes).for_each(<[u8]>::reverse);
        }
        let values: ArrayRef = if self.value == DataType::Boolean {
            Arc::new(bytes.iter().map(|byte| Some(*byte != 0)).collect::<BooleanArray>())
        } else {
            let data = arrow::array::ArrayData::builder(self.value.clone())
                .len(bytes.len() / self.value_bytes)
                .add_buffer(Buffer::from_vec(bytes))
                .align_buffers(true);
            make_array(data.build()?)
        };
        let Some(width) = self.width else { return Ok(values) };
        let lists = FixedSizeListArray::try_new_with_length(self.item(), width, values, None, rows);
        Ok(Arc::new(lists?))
    }
}

/// What stands behind a key of the dictionary.
fn entry<'a>(text: &'a str, key: &str) -> Result<&'a str, String> {
    let quoted = [format!("'{key}'"), format!("\"{key}\"")];
    let found = quoted.iter().find_map(|key| text.split_once(key.as_str()));
    let value = found.and_then(|(_, rest)| rest.trim_start().strip_prefix(':'));
    value.map(str::trim_start).ok_or_else(|| format!("its header has no {key:?}: {text:?}"))
}

/// Arrow's type, bytes of a value, and whether they are big-endian.
fn value_type(descr: &str) -> Result<(DataType, usize, bool), String> {
    let quote = descr.chars().next().filter(|c| matches!(c, '\'' | '"'));
    let code = quote.and_then(|quote| descr[1..].split(quote).next()).unwrap_or(descr);
    let big_endian = code.starts_with('>');
    use DataType::*;
    let (value, bytes) = match code.trim_start_matches(['<', '>', '|', '=']) {
        "f2" => (Float16, 2),
        "f4" => (Float32, 4),
        "f8" => (Float64, 8),
        "i1" => (Int8, 1),
        "i2" => (Int16, 2),
        "i4" => (Int32, 4),
        "i8" => (Int64, 8),
        "u1" => (UInt8, 1),
        "u2" => (UInt16, 2),
        "u4" => (UInt32, 4),
        "u8" => (UInt64, 8),
        "b1" => (Boolean, 1),
        _ => {
            let known = "numbers of up to 8 bytes and booleans";
            return Err(format!("its values are {code:?}, expected {known}; use array.astype(…)"));
        }
    };
    Ok((value, bytes, big_endian))
}

/// `(3, 4)`, `(3,)` or `()`.
fn shape(text: &str) -> Result<Vec<usize>, String> {
    let inner = text.strip_prefix('(').and_then(|rest| rest.split_once(')'));
    let (inner, _) = inner.ok_or_else(|| format!("its shape is {text:?}"))?;
    let axes = inner.split(',').map(str::trim).filter(|axis| !axis.is_empty());
    axes.map(|axis| axis.parse().map_err(|_| format!("its shape is ({inner})"))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header(text: &str) -> Result<Header, String> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend([1, 0]);
        bytes.extend((text.len() as u16).to_le_bytes());
        bytes.extend(text.as_bytes());
        Header::read(&mut &bytes[..])
    }

    #[test]
    fn headers_are_understood() {
        let cube = header("{'descr': '>f4', 'fortran_order': False, 'shape': (3, 4, 2), }\n");
        let cube = cube.expect("a header");
        assert_eq!((cube.rows, cube.row_bytes(), cube.big_endian), (3, 32, true));
        let list = header("{'shape': (7,), 'fortran_order': False, 'descr': '|u1'}").expect("list");
        assert_eq!((list.rows, list.data_type()), (7, DataType::UInt8));
        for (text, says) in [
            ("{'descr': '<c8', 'fortran_order': False, 'shape': (3,)}", "\"<c8\""),
            ("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (3,)}", "astype"),
            ("{'descr': '<f4', 'fortran_order': True, 'shape': (3, 4)}", "ascontiguousarray"),
            ("{'descr': '<f4', 'fortran_order': False, 'shape': ()}", "without rows"),
            ("{'descr': '<f4', 'fortran_order': False, 'shape': (9999999999, 9999999999)}", "too"),
            ("{'descr': '<f4', 'fortran_order': False}", "no \"shape\""),
        ] {
            let error = header(text).expect_err(text);
            assert!(error.contains(says), "{error}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes: Vec<u8>, text in "[{}'a-z0-9:(), <>]{0,40}") {
            let mut whole = MAGIC.to_vec();
            whole.extend(&bytes);
            let _ = Header::read(&mut &whole[..]);
            let _ = Header::read(&mut &bytes[..]);
            let _ = header(&text);
            let _ = header(&format!("{{'fortran_order': False, 'descr': '<f4', 'shape': {text}"));
            let _ = header(&format!("{{'fortran_order': False, 'descr': {text}, 'shape': (1,)}}"));
        }
    }
}
