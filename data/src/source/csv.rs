//! CSV files.

use super::file::Pieces;
use super::records::{BLOCK_ROWS, Cutter, Decode, RecordBlocks, Span};
use super::{Blocks, Source, columns};
use crate::error::{Error, Result};
use arrow::csv::ReaderBuilder;
use arrow::csv::reader::Format;
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use arrow::error::ArrowError;
use arrow::record_batch::RecordBatch;
use csv_core::ReadRecordResult;
use regex::Regex;
use serde::{Deserialize, Serialize};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const FORMAT: &str = "CSV";

/// How to read CSV.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CsvOptions {
    /// Whether the first line names the columns (default: yes; otherwise `column_1`, …).
    pub has_header: bool,
    /// The byte between two values (default: `,`).
    pub delimiter: u8,
    /// Values that mean "missing" (default: the empty one and `NA`).
    pub null_values: Vec<String>,
}

impl Default for CsvOptions {
    fn default() -> Self {
        let null_values = vec![String::new(), "NA".to_owned()];
        Self { has_header: true, delimiter: b',', null_values }
    }
}

impl CsvOptions {
    /// Says whether the first line names the columns.
    pub fn with_header(self, has_header: bool) -> Self {
        Self { has_header, ..self }
    }

    /// Sets the byte between two values, such as `b';'`.
    pub fn with_delimiter(self, delimiter: u8) -> Self {
        Self { delimiter, ..self }
    }

    /// Sets the values that mean "missing".
    pub fn with_null_values<S: Into<String>>(self, values: impl IntoIterator<Item = S>) -> Self {
        Self { null_values: values.into_iter().map(Into::into).collect(), ..self }
    }

    fn format(&self) -> Result<Format> {
        let values: Vec<String> = self.null_values.iter().map(|v| regex::escape(v)).collect();
        let nulls = Regex::new(&format!("^({})$", values.join("|")))
            .map_err(|error| Error::Internal(error.to_string()))?;
        let format = Format::default().with_header(self.has_header);
        Ok(format.with_delimiter(self.delimiter).with_null_regex(nulls))
    }
}

/// Files in the order in which they are read.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Csv {
    pub(crate) files: Vec<PathBuf>,
    pub(crate) options: CsvOptions,
}

#[typetag::serde(name = "csv")]
impl Source for Csv {
    /// The columns' types are those that hold all rows of all files.
    fn open(&self) -> Result<Arc<dyn Blocks>> {
        let format = self.options.format()?;
        let (mut schema, mut files) = (None, Vec::new());
        for path in &self.files {
            let file = Pieces::open(path, FORMAT)?;
            let (found, spans) = file.blame(scan(&file, &format, &self.options))?;
            schema = Some(match schema {
                None => found,
                Some(known) => widen(&known, &found, path)?,
            });
            files.push((file, spans));
        }
        let schema = Arc::new(schema.ok_or(Error::Empty { after: "" })?);
        let format = format.with_header(false);
        Ok(Arc::new(RecordBlocks::new(schema, files, Arc::new(CsvDecode { format }))))
    }

    fn summary(&self) -> String {
        super::paths::listed(&self.files)
    }
}

/// Types and bounds, in one pass.
fn scan(file: &Pieces, format: &Format, options: &CsvOptions) -> Result<(Schema, Vec<Span>)> {
    let mut records = Records::new(file.reader()?, options, BLOCK_ROWS);
    let (schema, _) = format.infer_schema(&mut records, None).map_err(corrupt(file.path()))?;
    if schema.fields().is_empty() {
        let reason = "it is empty, expected a line at least".to_owned();
        return Err(Error::Corrupt { path: file.path().to_owned(), format: FORMAT, reason });
    }
    Ok((schema, records.finish()))
}

/// Passes bytes on, and notes where records end: not at every line, since quoted values may have
/// several.
struct Records<R> {
    inner: R,
    parser: csv_core::Reader,
    cutter: Cutter,
}

impl<R: Read> Records<R> {
    fn new(inner: R, options: &CsvOptions, block_rows: u64) -> Self {
        let parser = csv_core::ReaderBuilder::new().delimiter(options.delimiter).build();
        Self { inner, parser, cutter: Cutter::new(block_rows, options.has_header.into()) }
    }

    fn follow(&mut self, mut bytes: &[u8]) {
        // The parser copies values out, which nobody looks at.
        let (mut values, mut ends) = ([0; 4096], [0; 256]);
        loop {
            let (result, read, ..) = self.parser.read_record(bytes, &mut values, &mut ends);
            self.cutter.bytes(&bytes[..read]);
            bytes = &bytes[read..];
            match result {
                ReadRecordResult::Record => self.cutter.record(),
                ReadRecordResult::InputEmpty | ReadRecordResult::End => return,
                ReadRecordResult::OutputFull | ReadRecordResult::OutputEndsFull => {}
            }
            if bytes.is_empty() {
                return;
            }
        }
    }

    fn finish(mut self) -> Vec<Span> {
        // No bytes are the end: of the last record, where no newline ended it.
        self.follow(&[]);
        self.cutter.finish()
    }
}

impl<R: Read> Read for Records<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let read = self.inner.read(buffer)?;
        if read > 0 {
            self.follow(&buffer[..read]);
        }
        Ok(read)
    }
}

#[derive(Debug)]
struct CsvDecode {
    format: Format,
}

impl Decode for CsvDecode {
    fn format(&self) -> &'static str {
        FORMAT
    }

    fn decode(
        &self,
        bytes: &[u8],
        rows: usize,
        schema: &SchemaRef,
        projection: &[usize],
    ) -> Result<Vec<RecordBatch>, ArrowError> {
        let builder = ReaderBuilder::new(schema.clone()).with_format(self.format.clone());
        let builder = builder.with_batch_size(rows).with_projection(projection.to_vec());
        builder.build(bytes)?.collect()
    }
}

/// The types that can hold the values of both.
fn widen(known: &Schema, found: &Schema, path: &Path) -> Result<Schema> {
    let names =
        |schema: &Schema| schema.fields().iter().map(|f| f.name().clone()).collect::<Vec<_>>();
    if names(known) != names(found) {
        let text = |schema: &Schema| columns(&Arc::new(schema.clone()));
        let (expected, got) = (text(known), text(found));
        return Err(Error::SchemaDiffers { path: path.to_owned(), expected, got });
    }
    let fields = known.fields().iter().zip(found.fields());
    let both = |(a, b): (&Arc<Field>, &Arc<Field>)| {
        Field::new(a.name(), wider(a.data_type(), b.data_type()), true)
    };
    Ok(Schema::new(fields.map(both).collect::<Vec<_>>()))
}

fn wider(a: &DataType, b: &DataType) -> DataType {
    use DataType::{Float64, Int64, Null, Utf8};
    match (a, b) {
        (a, b) if a == b => a.clone(),
        (Null, other) | (other, Null) => other.clone(),
        (Int64, Float64) | (Float64, Int64) => Float64,
        _ => Utf8,
    }
}

fn corrupt(path: &Path) -> impl Fn(ArrowError) -> Error + '_ {
    move |error| Error::Corrupt { path: path.to_owned(), format: FORMAT, reason: error.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn rows(batches: Vec<RecordBatch>, schema: &Schema) -> RecordBatch {
        arrow::compute::concat_batches(&Arc::new(schema.clone()), &batches).expect("rows")
    }

    /// Bytes that come a few at a time.
    struct Drip<'a>(&'a [u8], usize);

    impl Read for Drip<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
            let length = self.1.min(buffer.len());
            (&mut self.0).take(length as u64).read(buffer)
        }
    }

    proptest! {
        /// Quotes, newlines in quotes, blank lines, carriage returns: the blocks have the rows
        /// that reading the file as a whole has.
        #[test]
        fn blocks_are_the_whole(
            text in "([ab1,\"\n\r;]|\"[a,\n\"]*\"|1,2\n|\"x\ny\",3\r\n){0,60}",
            block_rows in 1_u64..5,
            drip in 1_usize..40,
            has_header: bool,
        ) {
            let options = CsvOptions::default().with_header(has_header);
            // Lines of unequal width are an error, on which both ways agree: let them pass.
            let format = options.format().expect("format").with_truncated_rows(true);
            let mut records = Records::new(Drip(text.as_bytes(), drip), &options, block_rows);
            let Ok((schema, count)) = format.infer_schema(&mut records, None) else {
                return Ok(());
            };
            prop_assume!(!schema.fields().is_empty());
            let spans = records.finish();
            prop_assert_eq!(spans.iter().map(|s| s.rows).sum::<u64>(), count as u64);
            prop_assert!(spans.iter().rev().skip(1).all(|span| span.rows == block_rows));

            let schema = Arc::new(schema);
            let whole = ReaderBuilder::new(schema.clone()).with_format(format.clone());
            let whole = whole.build(text.as_bytes()).expect("reader");
            let Ok(whole) = whole.collect::<Result<Vec<_>, _>>() else { return Ok(()) };
            let decode = CsvDecode { format: format.with_header(false) };
            let all: Vec<_> = (0..schema.fields().len()).collect();
            let blocks = spans.iter().flat_map(|span| {
                let bytes = &text.as_bytes()[span.start as usize..][..span.length];
                decode.decode(bytes, span.rows as usize, &schema, &all).expect("a block")
            });
            prop_assert_eq!(rows(blocks.collect(), &schema), rows(whole, &schema));
        }
    }
}
