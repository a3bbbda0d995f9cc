//! Avro's object container files.
//!
//! A file is `Obj\x01`, a map of metadata that has the schema and the codec, and 16 bytes that mark the
//! ends of its blocks. A block is a number of records, a number of bytes, these bytes, and the mark.
//! Numbers are zigzag-coded and as long as they need to be.

use super::file::Pieces;
use super::records::{Decode, Packer, RecordBlocks, Span};
use super::{Blocks, Source, columns};
use crate::error::{Error, Result};
use arrow::array::RecordBatchOptions;
use arrow::datatypes::{Field, Schema, SchemaRef};
use arrow::error::ArrowError;
use arrow::record_batch::RecordBatch;
use arrow_avro::compression::CompressionCodec;
use arrow_avro::reader::{ReaderBuilder, read_header_info};
use mobula_core::error::AtPath;
use serde::{Deserialize, Serialize};
use std::io::{BufReader, Read};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;

const FORMAT: &str = "Avro";

/// What marks the end of a block.
type Mark = [u8; 16];

/// The most records that a byte of a block stands for. Zstandard packs a byte for each of 32,768 into
/// one; more is a damaged number, for which a decoder would work through the night.
const RECORDS_OF_BYTE: u64 = 1 << 16;

/// The same for bytes of Snappy, which packs 64 into three.
const SNAPPY_RATIO: u64 = 64;

/// Files in the order in which they are read.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Avro {
    pub(crate) files: Vec<PathBuf>,
}

#[typetag::serde(name = "avro")]
impl Source for Avro {
    fn open(&self) -> Result<Arc<dyn Blocks>> {
        let (mut schema, mut files) = (None::<SchemaRef>, Vec::new());
        for path in &self.files {
            let corrupt = |reason| Error::Corrupt { path: path.clone(), format: FORMAT, reason };
            let file = Pieces::open(path, FORMAT)?;
            let mut reader = BufReader::new(file.reader()?);
            let container = Container::read(&mut reader, &file);
            let container = file.blame(container.and_then(|read| read.map_err(corrupt)))?;
            let spans = container.scan(&mut reader, file.length());
            let spans = spans.at("read", path).map_err(Error::from);
            let spans = file.blame(spans.and_then(|spans| spans.map_err(corrupt)))?;
            drop(reader);
            let found = container.schema().map_err(|error| corrupt(error.to_string()))?;
            let expected = schema.get_or_insert_with(|| found.clone());
            if *expected != found {
                let (expected, got) = (columns(expected), columns(&found));
                return Err(Error::SchemaDiffers { path: path.clone(), expected, got });
            }
            files.push((file, spans, Arc::new(container) as Arc<dyn Decode>));
        }
        let schema = schema.ok_or(Error::Empty { after: "" })?;
        Ok(Arc::new(RecordBlocks::of_files(schema, files)))
    }

    fn summary(&self) -> String {
        super::paths::listed(&self.files)
    }
}

/// What the head of a file says of its blocks.
#[derive(Debug)]
struct Container {
    head: Vec<u8>,
    mark: Mark,
    is_snappy: bool,
}

impl Container {
    /// Reads as far as the first block.
    fn read(reader: &mut impl std::io::BufRead, file: &Pieces) -> Result<Result<Self, String>> {
        let info = match guarded(|| Ok(read_header_info(reader)?)) {
            Ok(info) => info,
            Err(error) => return Ok(Err(error.to_string())),
        };
        let codec = match info.compression() {
            Ok(codec) => codec,
            Err(error) => return Ok(Err(error.to_string())),
        };
        let (mut head, length) = (Vec::new(), info.header_len());
        file.reader()?.take(length).read_to_end(&mut head).at("read", file.path())?;
        let is_snappy = matches!(codec, Some(CompressionCodec::Snappy));
        Ok(Ok(Self { head, mark: info.sync(), is_snappy }))
    }

    /// The columns.
    fn schema(&self) -> Result<SchemaRef, ArrowError> {
        let schema = guarded(|| Ok(ReaderBuilder::new().build(&self.head[..])?.schema()))?;
        // Without the names that Avro has for types.
        let plain = |field: &Arc<Field>| field.as_ref().clone().with_metadata(Default::default());
        Ok(Arc::new(Schema::new(schema.fields().iter().map(plain).collect::<Vec<_>>())))
    }

    /// Goes from block to block, without decoding them.
    fn scan(
        &self,
        reader: &mut BufReader<impl Read + std::io::Seek>,
        length: u64,
    ) -> std::io::Result<Result<Vec<Span>, String>> {
        let (mut packer, mut start) = (Packer::default(), self.head.len() as u64);
        for number in 0.. {
            if start == length {
                break;
            }
            let wrong = |reason: &str| Ok(Err(format!("block {number} {reason}")));
            let Some(block) = BlockHead::read(reader)? else {
                return wrong("does not begin with a number of records and one of bytes");
            };
            let marked = (block.length as u64).checked_add(block.bytes);
            let end = marked.and_then(|at| at.checked_add(start + size_of::<Mark>() as u64));
            let Some(end) = end.filter(|end| *end <= length) else { return wrong("is cut off") };
            if block.rows / RECORDS_OF_BYTE > block.bytes || (block.rows == 0) != (block.bytes == 0)
            {
                return wrong("has another number of records than its bytes can have");
            }
            reader.seek_relative(block.bytes as i64)?;
            let mut mark = Mark::default();
            reader.read_exact(&mut mark)?;
            if mark != self.mark {
                return wrong("does not end with the file's mark");
            }
            if block.rows > 0 {
                packer.records(start..end, block.rows);
            }
            start = end;
        }
        Ok(Ok(packer.finish()))
    }

    /// The rows of one block.
    ///
    /// Arrow's reader is given one at a time, and asked once: with bytes left over behind the last
    /// record of a block it would go on for ever.
    fn rows(
        &self,
        block: &[u8],
        rows: usize,
        projection: Option<&[usize]>,
    ) -> Result<RecordBatch, ArrowError> {
        let file = self.head.chain(block);
        let mut builder = ReaderBuilder::new().with_batch_size(rows);
        if let Some(columns) = projection {
            builder = builder.with_projection(columns.to_vec());
        }
        let batch = guarded(|| builder.build(file)?.next().transpose())?;
        let batch = batch.filter(|batch| batch.num_rows() == rows);
        batch.ok_or_else(|| invalid("a block has fewer records than it says"))
    }

    fn projected(
        &self,
        block: &[u8],
        rows: usize,
        schema: &SchemaRef,
        projection: &[usize],
    ) -> Result<RecordBatch, ArrowError> {
        let schema = Arc::new(schema.project(projection)?);
        let with_schema = |batch: RecordBatch| {
            let options = RecordBatchOptions::new().with_row_count(Some(rows));
            RecordBatch::try_new_with_options(schema.clone(), batch.columns().to_vec(), &options)
        };
        // Left out columns may have the definition of a type that others go by the name of.
        self.rows(block, rows, Some(projection))
            .and_then(with_schema)
            .or_else(|_| with_schema(self.rows(block, rows, None)?.project(projection)?))
    }

    /// A block that says it is more than it can be would be given the memory for it.
    fn check_snappy(&self, bytes: &[u8]) -> Result<(), ArrowError> {
        let too_short = || invalid("a block is shorter than its checksum");
        let packed = bytes.len().checked_sub(4).ok_or_else(too_short)?;
        let (mut length, mut shift) = (0_u64, 0);
        for byte in bytes.iter().take(5) {
            length |= u64::from(byte & 0x7f) << shift;
            shift += 7;
            if byte & 0x80 == 0 {
                break;
            }
        }
        match length <= SNAPPY_RATIO * packed as u64 {
            true => Ok(()),
            false => Err(invalid("a block says it has more bytes than Snappy can pack")),
        }
    }
}

impl Decode for Container {
    fn format(&self) -> &'static str {
        FORMAT
    }

    fn decode(
        &self,
        mut bytes: &[u8],
        rows: usize,
        schema: &SchemaRef,
        projection: &[usize],
    ) -> Result<Vec<RecordBatch>, ArrowError> {
        if projection.is_empty() {
            let options = RecordBatchOptions::new().with_row_count(Some(rows));
            let none = Arc::new(Schema::empty());
            return Ok(vec![RecordBatch::try_new_with_options(none, Vec::new(), &options)?]);
        }
        let mut batches = Vec::new();
        while !bytes.is_empty() {
            let cut = || invalid("a block is cut off");
            let head = BlockHead::read(&mut &bytes[..])?.ok_or_else(cut)?;
            let length = head.length + head.bytes as usize + size_of::<Mark>();
            let (block, rest) = bytes.split_at_checked(length).ok_or_else(cut)?;
            bytes = rest;
            if head.rows == 0 {
                continue;
            }
            if self.is_snappy {
                self.check_snappy(&block[head.length..][..head.bytes as usize])?;
            }
            batches.push(self.projected(block, head.rows as usize, schema, projection)?);
        }
        Ok(batches)
    }
}

/// What stands in front of a block.
#[derive(Debug, PartialEq)]
struct BlockHead {
    rows: u64,
    bytes: u64,
    /// Of these two themselves.
    length: usize,
}

impl BlockHead {
    /// None if there are no such numbers.
    fn read(reader: &mut impl Read) -> std::io::Result<Option<Self>> {
        let mut length = 0;
        let mut number = || -> std::io::Result<Option<u64>> {
            let mut coded = 0_u64;
            for shift in (0..63).step_by(7) {
                let mut byte = [0];
                if reader.read(&mut byte)? == 0 {
                    return Ok(None);
                }
                length += 1;
                coded |= u64::from(byte[0] & 0x7f) << shift;
                if byte[0] & 0x80 == 0 {
                    // Zigzag: odd ones are below zero.
                    return Ok((coded & 1 == 0).then_some(coded >> 1));
                }
            }
            Ok(None)
        };
        let (rows, bytes) = (number()?, number()?);
        Ok(rows.zip(bytes).map(|(rows, bytes)| Self { rows, bytes, length }))
    }
}

/// What Arrow's reader makes of some bytes. It trusts the numbers in them in places, and panics.
fn guarded<T>(read: impl FnOnce() -> Result<T, ArrowError>) -> Result<T, ArrowError> {
    // Nothing that a panic may have left half done is used again.
    catch_unwind(AssertUnwindSafe(read))
        .unwrap_or_else(|_| Err(invalid("its schema or a record contradicts itself")))
}

fn invalid(reason: &str) -> ArrowError {
    ArrowError::AvroError(reason.to_owned())
}
