//! TFRecord files of `tf.train.Example`.
//!
//! A record is its length (eight bytes, little-endian), the length's checksum, the bytes, and
//! their checksum. The checksums are CRC-32C, masked.

mod example;

use super::file::Pieces;
use super::records::{Decode, Packer, RecordBlocks, Span};
use super::{Blocks, Source};
use crate::error::{Error, Result};
use arrow::datatypes::{Schema, SchemaRef};
use arrow::error::ArrowError;
use arrow::record_batch::RecordBatch;
use example::{Example, Shapes, batch};
use mobula_core::error::AtPath;
use prost::Message;
use serde::{Deserialize, Serialize};
use std::io::{BufReader, Read};
use std::path::PathBuf;
use std::sync::Arc;

const FORMAT: &str = "TFRecord";
const HEAD: usize = 12;
const TAIL: usize = 4;

/// Records of which the columns' types are taken.
const TYPED: u64 = 100;

/// Files in the order in which they are read.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct TfRecord {
    pub(crate) files: Vec<PathBuf>,
}

#[typetag::serde(name = "tfrecord")]
impl Source for TfRecord {
    fn open(&self) -> Result<Arc<dyn Blocks>> {
        let (mut shapes, mut typed, mut files) = (Shapes::default(), 0, Vec::new());
        for path in &self.files {
            let corrupt = |reason| Error::Corrupt { path: path.clone(), format: FORMAT, reason };
            let file = Pieces::open(path, FORMAT)?;
            let spans = scan(&file).and_then(|spans| spans.map_err(corrupt));
            let spans = file.blame(spans)?;
            for span in &spans {
                if typed == TYPED {
                    break;
                }
                let bytes = file.read(span.start, span.length, None)?;
                for record in Records(&bytes).take((TYPED - typed) as usize) {
                    shapes.add(&record.and_then(decode).map_err(corrupt)?).map_err(corrupt)?;
                    typed += 1;
                }
            }
            files.push((file, spans));
        }
        if typed == 0 {
            return Err(Error::Empty { after: "" });
        }
        let schema = Arc::new(Schema::new(shapes.fields()));
        Ok(Arc::new(RecordBlocks::new(schema, files, Arc::new(TfDecode))))
    }

    fn summary(&self) -> String {
        super::paths::listed(&self.files)
    }
}

/// Goes from length to length, without reading the records.
fn scan(file: &Pieces) -> Result<Result<Vec<Span>, String>> {
    let (mut reader, mut packer) = (BufReader::new(file.reader()?), Packer::default());
    let (mut start, mut head) = (0_u64, [0; HEAD]);
    for number in 0.. {
        let rest = file.length() - start;
        if rest == 0 {
            break;
        }
        if rest < HEAD as u64 {
            return Ok(Err(format!("record {number} is cut off")));
        }
        reader.read_exact(&mut head).at("read", file.path())?;
        let length = match record_length(&head) {
            Ok(length) => length,
            Err(reason) => return Ok(Err(format!("record {number}: {reason}"))),
        };
        let skip = length.saturating_add(TAIL as u64);
        if skip > rest - HEAD as u64 {
            return Ok(Err(format!("record {number} is cut off")));
        }
        reader.seek_relative(skip as i64).at("read", file.path())?;
        let end = start + HEAD as u64 + skip;
        packer.record(start..end);
        start = end;
    }
    Ok(Ok(packer.finish()))
}

fn record_length(head: &[u8; HEAD]) -> Result<u64, String> {
    let (length, crc) = head.split_at(8);
    must_match(length, crc, "the length")?;
    Ok(u64::from_le_bytes(std::array::from_fn(|at| length[at])))
}

fn must_match(bytes: &[u8], crc: &[u8], what: &str) -> Result<(), String> {
    let masked = crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8);
    if masked.to_le_bytes() == *crc {
        Ok(())
    } else {
        Err(format!("the checksum of {what} is wrong"))
    }
}

fn decode(bytes: &[u8]) -> Result<Example, String> {
    Example::decode(bytes).map_err(|error| format!("it is no tf.train.Example: {error}"))
}

/// The records in some bytes, checked.
struct Records<'a>(&'a [u8]);

impl<'a> Iterator for Records<'a> {
    type Item = Result<&'a [u8], String>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let record = self.record();
        if record.is_err() {
            self.0 = &[];
        }
        Some(record)
    }
}

impl<'a> Records<'a> {
    fn record(&mut self) -> Result<&'a [u8], String> {
        let cut = || "a record is cut off".to_owned();
        let (head, rest) = self.0.split_first_chunk::<HEAD>().ok_or_else(cut)?;
        let length = usize::try_from(record_length(head)?).map_err(|error| error.to_string())?;
        let (record, rest) = rest.split_at_checked(length).ok_or_else(cut)?;
        let (crc, rest) = rest.split_first_chunk::<TAIL>().ok_or_else(cut)?;
        must_match(record, crc, "a record")?;
        self.0 = rest;
        Ok(record)
    }
}

#[derive(Debug)]
struct TfDecode;

impl Decode for TfDecode {
    fn format(&self) -> &'static str {
        FORMAT
    }

    fn decode(
        &self,
        bytes: &[u8],
        _rows: usize,
        schema: &SchemaRef,
        projection: &[usize],
    ) -> Result<Vec<RecordBatch>, ArrowError> {
        let examples = Records(bytes).map(|record| record.and_then(decode));
        let examples = examples.collect::<Result<Vec<_>, _>>().map_err(ArrowError::ParseError)?;
        Ok(vec![batch(examples, schema, projection)?])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn frame(record: &[u8]) -> Vec<u8> {
        let masked =
            |bytes| crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes();
        let length = (record.len() as u64).to_le_bytes();
        [&length[..], &masked(&length[..]), record, &masked(record)].concat()
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes: Vec<u8>, cut in 0_usize..40) {
            let framed = frame(&bytes);
            prop_assert_eq!(Records(&framed).collect::<Result<Vec<_>, _>>(), Ok(vec![&bytes[..]]));
            let cut = &framed[..cut.min(framed.len() - 1)];
            prop_assert_eq!(Records(cut).any(|record| record.is_err()), !cut.is_empty());
            for record in [Records(&bytes).collect(), Ok::<_, String>(vec![&bytes[..]])] {
                let examples = record.iter().flatten().map(|record| decode(record));
                let Ok(examples) = examples.collect::<Result<Vec<_>, _>>() else { continue };
                let mut shapes = Shapes::default();
                if examples.iter().try_for_each(|example| shapes.add(example)).is_ok() {
                    let schema = Arc::new(Schema::new(shapes.fields()));
                    let all: Vec<_> = (0..schema.fields().len()).collect();
                    let rows = examples.len();
                    prop_assert_eq!(batch(examples, &schema, &all).expect("rows").num_rows(), rows);
                }
            }
        }
    }
}
