//! Parquet files: a block is a row group.

mod chunks;
pub(crate) mod footer;
mod unified;

use super::file::{Opened, Stamped, each};
use super::{BatchIter, Blocks, Source, columns, hash};
use crate::error::{Error, Result};
use crate::remote::is_url;
use crate::runtime::{block_on, joined, threads};
use arrow::datatypes::{DECIMAL64_MAX_PRECISION, DataType, Schema, SchemaRef};
use arrow::record_batch::RecordBatch;
use chunks::Chunks;
use datafusion::parquet::arrow::ProjectionMask;
use datafusion::parquet::arrow::arrow_reader::{
    ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReader,
    ParquetRecordBatchReaderBuilder,
};
use datafusion::parquet::errors::Result as ParquetResult;
use datafusion::parquet::file::reader::ChunkReader;
use futures::{FutureExt, StreamExt, TryStreamExt, stream};
use serde::{Deserialize, Serialize};
use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const BATCH_ROWS: usize = 8192;

/// What is done about Parquet files that are not as they should be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ParquetOptions {
    /// Whether files may have different columns (default: no, it is an error). A file has missing
    /// values in those that it does not have; whole numbers of different types become the widest,
    /// whole numbers and floats `Float64`.
    pub unify: bool,
    /// Whether row groups that cannot be read are left out, with a warning (default: no, they are an
    /// error when they are read). All are read once when the dataset is made, to find out.
    pub skip_corrupt: bool,
}

impl ParquetOptions {
    /// Says whether files may have different columns.
    pub fn with_unify(self, unify: bool) -> Self {
        Self { unify, ..self }
    }

    /// Says whether row groups that cannot be read are left out.
    pub fn with_skip_corrupt(self, skip_corrupt: bool) -> Self {
        Self { skip_corrupt, ..self }
    }
}

/// Files in the order in which they are read.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Parquet {
    files: Vec<PathBuf>,
    options: ParquetOptions,
    /// File and row group of those that are left out.
    skipped: Vec<(usize, usize)>,
}

impl Parquet {
    pub(crate) fn new(files: Vec<PathBuf>, options: ParquetOptions) -> Result<Self> {
        let mut source = Self { files, options, skipped: Vec::new() };
        if options.skip_corrupt {
            source.skipped = ParquetBlocks::open(&source)?.corrupt()?;
        }
        Ok(source)
    }
}

#[typetag::serde(name = "parquet")]
impl Source for Parquet {
    fn open(&self) -> Result<Arc<dyn Blocks>> {
        Ok(Arc::new(ParquetBlocks::open(self)?))
    }

    fn summary(&self) -> String {
        let files = super::paths::listed(&self.files);
        match self.skipped.len() {
            0 => files,
            n => format!("{files}, {n} corrupt row groups left out"),
        }
    }
}

/// Files with their footers read.
#[derive(Debug)]
struct ParquetBlocks {
    schema: SchemaRef,
    files: Vec<ParquetFile>,
    /// File and row group of each block.
    groups: Vec<(usize, usize)>,
    options: ParquetOptions,
    fingerprint: String,
}

#[derive(Debug)]
struct ParquetFile {
    stamped: Stamped,
    metadata: ArrowReaderMetadata,
    /// The same with decimals of one word where that is enough.
    narrow: ArrowReaderMetadata,
    /// Length of the file and checksum of its footer, which has the statistics and offsets.
    identity: String,
}

impl ParquetBlocks {
    fn open(source: &Parquet) -> Result<Self> {
        let files = each(&source.files, |path| is_url(path), |path| ParquetFile::open(path))?;
        let first = files.first().ok_or(Error::Empty { after: "" })?;
        let mut schema = first.schema();
        if source.options.unify {
            for file in &files {
                schema = Arc::new(unified::add(&schema, &file.stamped.path, &file.schema())?);
            }
        } else {
            files.iter().try_for_each(|file| file.must_have(&schema))?;
        }
        let groups_of = |(i, file): (usize, &ParquetFile)| {
            (0..file.metadata.metadata().num_row_groups()).map(move |group| (i, group))
        };
        let groups = files.iter().enumerate().flat_map(groups_of);
        let groups = groups.filter(|group| !source.skipped.contains(group)).collect();
        let skipped = format!("{:?}", source.skipped);
        let parts = files.iter().map(|file| file.identity.as_bytes());
        let parts = parts.chain((!source.skipped.is_empty()).then_some(skipped.as_bytes()));
        let fingerprint = hash(parts);
        Ok(Self { schema, files, groups, options: source.options, fingerprint })
    }

    /// The row groups that cannot be read.
    fn corrupt(self) -> Result<Vec<(usize, usize)>> {
        let blocks = Arc::new(self);
        block_on(async move {
            let read = |block| {
                let blocks = blocks.clone();
                let group = blocks.groups[block];
                tokio::spawn(async move { blocks.corrupt_at(block) }).map(move |found| {
                    match joined(found) {
                        // What a decoder makes of damage that it did not expect.
                        Err(Error::Panicked { message }) => {
                            tracing::warn!(?group, message, "left out a row group");
                            Ok(Some(group))
                        }
                        found => found,
                    }
                })
            };
            let all = stream::iter(0..blocks.groups.len()).map(read).buffered(threads());
            Ok(all.try_collect::<Vec<_>>().await?.into_iter().flatten().collect())
        })
    }

    /// A row group, if it is damaged.
    fn corrupt_at(&self, block: usize) -> Result<Option<(usize, usize)>> {
        let columns: Vec<_> = (0..self.schema.fields().len()).collect();
        let rows = self.read(block, &columns).and_then(|batches| {
            batches.map(|batch| Ok(batch?.num_rows() as u64)).sum::<Result<u64>>()
        });
        let (file, group) = self.groups[block];
        let announced = self.files[file].rows(group);
        let reason = match rows {
            Ok(rows) if rows == announced => return Ok(None),
            Ok(rows) => format!("it has {rows} rows, {announced} announced"),
            Err(Error::Corrupt { reason, .. }) => reason,
            Err(error) => return Err(error),
        };
        tracing::warn!(row_group = self.name(block), %reason, "left out a row group");
        Ok(Some((file, group)))
    }

    /// The rows of a block of a file that may have other columns.
    fn conforming(&self, file: &ParquetFile, group: usize, wanted: &[usize]) -> Result<BatchIter> {
        let own = unified::own(&self.schema, &file.schema(), wanted);
        let schema = Arc::new(self.schema.project(wanted)?);
        let batches = file.read(group, &own, &file.metadata)?;
        Ok(Box::new(batches.map(move |batch| unified::conform(&batch?, &schema))))
    }
}

impl Blocks for ParquetBlocks {
    fn schema(&self) -> SchemaRef {
        self.schema.clone()
    }

    fn rows(&self) -> Vec<u64> {
        self.groups.iter().map(|&(file, group)| self.files[file].rows(group)).collect()
    }

    fn fingerprint(&self) -> Result<String> {
        Ok(self.fingerprint.clone())
    }

    fn waits(&self) -> bool {
        self.files.iter().any(|file| file.stamped.is_remote())
    }

    fn parquet_files(&self) -> Option<Vec<PathBuf>> {
        // It would take the word of a file that its rows are sorted, and read it in another order.
        let is_sorted = |file: &ParquetFile| {
            let groups = file.metadata.metadata().row_groups();
            groups.iter().any(|group| group.sorting_columns().is_some())
        };
        // Of an object store it would not notice that a file changed, or is gone.
        let is_for_us = |file: &ParquetFile| file.stamped.is_remote() || is_sorted(file);
        let as_they_are = self.options == ParquetOptions::default();
        let paths = || self.files.iter().map(|file| file.stamped.path.clone()).collect();
        (as_they_are && !self.files.iter().any(is_for_us)).then(paths)
    }

    fn check_files(&self) -> Result<()> {
        self.files.iter().try_for_each(|file| file.stamped.open().map(drop))
    }

    fn name(&self, block: usize) -> String {
        let (file, group) = self.groups[block];
        format!("{} (row group {group})", self.files[file].stamped.path.display())
    }

    fn file(&self, block: usize) -> Option<usize> {
        Some(self.groups[block].0)
    }

    fn read(&self, block: usize, projection: &[usize]) -> Result<BatchIter> {
        let (file, group) = self.groups[block];
        let file = &self.files[file];
        if self.options.unify {
            return self.conforming(file, group, projection);
        }
        file.read(group, projection, &file.metadata)
    }

    fn read_narrow(&self, block: usize, projection: &[usize]) -> Result<BatchIter> {
        let (file, group) = self.groups[block];
        let file = &self.files[file];
        if self.options.unify {
            return self.conforming(file, group, projection);
        }
        file.read(group, projection, &file.narrow)
    }
}

impl ParquetFile {
    fn open(path: &Path) -> Result<Self> {
        let stamped = Stamped::new(path)?;
        let (metadata, identity) = footer::read(&stamped)?;
        let narrow = narrow(&metadata).unwrap_or_else(|| metadata.clone());
        Ok(Self { stamped, metadata, narrow, identity })
    }

    fn schema(&self) -> SchemaRef {
        schema(&self.metadata)
    }

    fn must_have(&self, expected: &SchemaRef) -> Result<()> {
        let got = self.schema();
        if got == *expected {
            return Ok(());
        }
        let (expected, got) = (columns(expected), columns(&got));
        Err(Error::SchemaDiffers { path: self.stamped.path.clone(), expected, got })
    }

    fn rows(&self, group: usize) -> u64 {
        // A negative count is a corrupt footer: the reader will say so when it reads the group.
        self.metadata.metadata().row_group(group).num_rows().try_into().unwrap_or(0)
    }

    fn read(
        &self,
        group: usize,
        projection: &[usize],
        metadata: &ArrowReaderMetadata,
    ) -> Result<BatchIter> {
        let path = self.stamped.path.clone();
        let mask = ProjectionMask::roots(metadata.parquet_schema(), projection.iter().copied());
        let reader = match self.stamped.open()? {
            Opened::Here(file) => reader(file, group, mask, metadata),
            Opened::Remote(_) => {
                let chunks =
                    Chunks::read(&self.stamped, metadata.metadata().row_group(group), &mask);
                reader(chunks?, group, mask, metadata)
            }
        };
        let reader = reader.map_err(|error| corrupt(&path, error))?;
        let reorder = reorder(projection);
        let schema = Arc::new(schema(metadata).project(projection)?);
        Ok(Box::new(reader.map(move |batch| {
            let batch = batch.map_err(|error| corrupt(&path, error))?;
            let batch = batch.project(&reorder)?;
            let options =
                arrow::array::RecordBatchOptions::new().with_row_count(Some(batch.num_rows()));
            let columns = batch.columns().to_vec();
            Ok(RecordBatch::try_new_with_options(schema.clone(), columns, &options)?)
        })))
    }
}

fn reader(
    file: impl ChunkReader + 'static,
    group: usize,
    mask: ProjectionMask,
    metadata: &ArrowReaderMetadata,
) -> ParquetResult<ParquetRecordBatchReader> {
    ParquetRecordBatchReaderBuilder::new_with_metadata(file, metadata.clone())
        .with_row_groups(vec![group])
        .with_projection(mask)
        .with_batch_size(BATCH_ROWS)
        .build()
}

/// The columns, without the key-value metadata that writers add.
fn schema(metadata: &ArrowReaderMetadata) -> SchemaRef {
    Arc::new(Schema::new(metadata.schema().fields().clone()))
}

/// Decimals of at most 18 digits lie in a file as one word. As such they are read without a copy of
/// two words each.
fn narrow(metadata: &ArrowReaderMetadata) -> Option<ArrowReaderMetadata> {
    let fields = metadata.schema().fields().iter().map(|field| match *field.data_type() {
        DataType::Decimal128(digits, scale) if digits <= DECIMAL64_MAX_PRECISION => {
            Arc::new(field.as_ref().clone().with_data_type(DataType::Decimal64(digits, scale)))
        }
        _ => field.clone(),
    });
    let schema = Arc::new(Schema::new(fields.collect::<Vec<_>>()));
    let options = ArrowReaderOptions::new().with_schema(schema);
    ArrowReaderMetadata::try_new(metadata.metadata().clone(), options).ok()
}

/// The reader gives columns in the file's order: where to find them in the order asked for.
fn reorder(projection: &[usize]) -> Vec<usize> {
    let rank = |column: &usize| projection.iter().filter(|other| *other < column).count();
    projection.iter().map(rank).collect()
}

fn corrupt(path: &Path, reason: impl Display) -> Error {
    Error::Corrupt { path: path.to_owned(), format: "Parquet", reason: reason.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_come_in_the_order_asked_for() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/data/digits-0.parquet");
        let source = Parquet::new(vec![path.into()], ParquetOptions::default()).expect("open");
        let source = ParquetBlocks::open(&source).expect("open");
        let mut batches = source.read(0, &[1, 0]).expect("read");
        let batch = batches.next().expect("a batch").expect("rows");
        assert_eq!(batch.schema().field(0).name(), "label");
        assert_eq!(batch.column(0).data_type(), batch.schema().field(0).data_type());
        let mut none = source.read(0, &[]).expect("read");
        assert_eq!(none.next().expect("a batch").expect("rows").num_rows(), 120);
    }
}
