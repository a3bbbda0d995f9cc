//! The formats of the built-in sinks.

use super::{Sink, SinkFile};
use crate::error::{Error, Result};
use arrow::array::RecordBatchOptions;
use arrow::compute::cast;
use arrow::datatypes::{DataType, FieldRef, Schema, SchemaRef};
use arrow::error::ArrowError;
use arrow::ipc::writer::FileWriter;
use arrow::json::LineDelimitedWriter;
use arrow::record_batch::RecordBatch;
use datafusion::parquet::arrow::ArrowWriter;
use datafusion::parquet::basic::{Compression, ZstdLevel};
use datafusion::parquet::errors::ParquetError;
use datafusion::parquet::file::properties::WriterProperties;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::sync::Arc;

/// Writes Parquet files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ParquetSink {
    /// How values are compressed (default: ZSTD).
    pub compression: ParquetCompression,
    /// Rows of a row group (default: 8192). A row group is a block when the file is read: a
    /// shuffle mixes whole ones, and readers of single columns like larger ones.
    pub row_group_rows: usize,
}

/// How the values of a Parquet file are compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ParquetCompression {
    /// Not at all.
    None,
    /// Fast, and little smaller.
    Snappy,
    /// As fast as Snappy, and as small.
    Lz4,
    /// At level 3: small, and fast to read.
    #[default]
    Zstd,
}

impl ParquetCompression {
    fn resolve(self) -> Result<Compression, ParquetError> {
        Ok(match self {
            Self::None => Compression::UNCOMPRESSED,
            Self::Snappy => Compression::SNAPPY,
            Self::Lz4 => Compression::LZ4_RAW,
            Self::Zstd => Compression::ZSTD(ZstdLevel::try_new(3)?),
        })
    }
}

impl Default for ParquetSink {
    fn default() -> Self {
        Self { compression: ParquetCompression::default(), row_group_rows: 8192 }
    }
}

impl ParquetSink {
    /// Sets how values are compressed.
    pub fn with_compression(self, compression: ParquetCompression) -> Self {
        Self { compression, ..self }
    }

    /// Sets the rows of a row group.
    pub fn with_row_group_rows(self, row_group_rows: usize) -> Self {
        Self { row_group_rows, ..self }
    }
}

impl Sink for ParquetSink {
    fn extension(&self) -> &str {
        "parquet"
    }

    fn check(&self, _schema: &SchemaRef) -> Result<()> {
        if self.row_group_rows > 0 {
            return Ok(());
        }
        let (option, expected) = ("row_group_rows", "at least 1".to_owned());
        Err(Error::InvalidOption { option, expected, got: "0".to_owned() })
    }

    fn begin(&self, file: File, schema: &SchemaRef) -> Result<Box<dyn SinkFile>> {
        let properties = WriterProperties::builder()
            .set_compression(self.compression.resolve().map_err(parquet)?)
            .set_max_row_group_row_count(Some(self.row_group_rows))
            .build();
        let writer = ArrowWriter::try_new(file, schema.clone(), Some(properties));
        Ok(Box::new(writer.map_err(parquet)?))
    }
}

impl SinkFile for ArrowWriter<File> {
    fn write(&mut self, batch: &RecordBatch) -> Result<()> {
        Self::write(self, batch).map_err(parquet)
    }

    fn finish(self: Box<Self>) -> Result<()> {
        self.close().map(drop).map_err(parquet)
    }
}

/// Writes CSV files with a header.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CsvSink {}

impl Sink for CsvSink {
    fn extension(&self) -> &str {
        "csv"
    }

    fn check(&self, schema: &SchemaRef) -> Result<()> {
        let nested = schema.fields().iter().find(|field| field.data_type().is_nested());
        nested.map_or(Ok(()), |field| {
            Err(Error::ColumnType {
                column: field.name().clone(),
                expected: "a simple type, to write it as CSV",
                got: field.data_type().to_string(),
                hint: "; write Parquet, Arrow IPC or JSON",
            })
        })
    }

    fn begin(&self, file: File, schema: &SchemaRef) -> Result<Box<dyn SinkFile>> {
        let mut writer = arrow::csv::Writer::new(BufWriter::new(file));
        // The header, in a file without rows too.
        writer.write(&RecordBatch::new_empty(schema.clone())).map_err(failed)?;
        Ok(Box::new(CsvFile(writer)))
    }
}

struct CsvFile(arrow::csv::Writer<BufWriter<File>>);

impl SinkFile for CsvFile {
    fn write(&mut self, batch: &RecordBatch) -> Result<()> {
        self.0.write(batch).map_err(failed)
    }

    fn finish(self: Box<Self>) -> Result<()> {
        self.0.into_inner().flush().map_err(|error| failed(error.into()))
    }
}

/// Writes files of JSON lines.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct JsonSink {}

impl Sink for JsonSink {
    fn extension(&self) -> &str {
        "jsonl"
    }

    fn begin(&self, file: File, _schema: &SchemaRef) -> Result<Box<dyn SinkFile>> {
        // A column of which all values are missing is a column still.
        let builder = arrow::json::WriterBuilder::new().with_explicit_nulls(true);
        Ok(Box::new(JsonFile(builder.build(BufWriter::new(file)))))
    }
}

struct JsonFile(LineDelimitedWriter<BufWriter<File>>);

impl SinkFile for JsonFile {
    fn write(&mut self, batch: &RecordBatch) -> Result<()> {
        self.0.write(batch).map_err(failed)
    }

    fn finish(mut self: Box<Self>) -> Result<()> {
        self.0.finish().map_err(failed)?;
        self.0.into_inner().flush().map_err(|error| failed(error.into()))
    }
}

/// Writes Arrow IPC files.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IpcSink {}

impl Sink for IpcSink {
    fn extension(&self) -> &str {
        "arrow"
    }

    fn begin(&self, file: File, schema: &SchemaRef) -> Result<Box<dyn SinkFile>> {
        let fields = schema.fields().iter().map(plain);
        let schema = Arc::new(Schema::new(fields.collect::<Vec<_>>()));
        let writer = FileWriter::try_new(BufWriter::new(file), &schema).map_err(failed)?;
        Ok(Box::new(IpcFile { writer, schema }))
    }
}

/// Dictionary columns as what their values are: a file may have one dictionary, and each batch has its
/// own.
fn plain(field: &FieldRef) -> FieldRef {
    match field.data_type() {
        DataType::Dictionary(_, values) => {
            Arc::new(field.as_ref().clone().with_data_type(values.as_ref().clone()))
        }
        _ => field.clone(),
    }
}

struct IpcFile {
    writer: FileWriter<BufWriter<File>>,
    schema: SchemaRef,
}

impl SinkFile for IpcFile {
    fn write(&mut self, batch: &RecordBatch) -> Result<()> {
        let columns = batch.columns().iter().zip(self.schema.fields());
        let columns = columns.map(|(column, field)| cast(column, field.data_type()));
        let columns = columns.collect::<Result<Vec<_>, _>>()?;
        let options = RecordBatchOptions::new().with_row_count(Some(batch.num_rows()));
        let batch = RecordBatch::try_new_with_options(self.schema.clone(), columns, &options)?;
        self.writer.write(&batch).map_err(failed)
    }

    fn finish(mut self: Box<Self>) -> Result<()> {
        self.writer.finish().map_err(failed)?;
        self.writer.into_inner().and_then(|mut file| Ok(file.flush()?)).map_err(failed)
    }
}

fn failed(error: ArrowError) -> Error {
    Error::Engine { action: "write rows", source: error.into() }
}

fn parquet(error: ParquetError) -> Error {
    Error::Engine { action: "write rows", source: error.into() }
}
