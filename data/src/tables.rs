//! Datasets as tables of the engine.

use crate::Dataset;
use crate::dataset_table::DatasetTable;
use crate::error::{Error, Result};
use crate::session::Mode;
use crate::source::OpenSource;
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use datafusion::catalog::TableProvider;
use datafusion::common::TableReference;
use datafusion::datasource::file_format::parquet::ParquetFormat;
use datafusion::datasource::listing::{
    ListingOptions, ListingTable, ListingTableConfig, ListingTableUrl,
};
use mobula_core::error::AtPath;
use std::path::PathBuf;
use std::sync::Arc;
use url::Url;

/// A table and its name.
pub(crate) type Table = (TableReference, Arc<dyn TableProvider>);

/// Rows and blocks that are worth a part of a query, and how many parts there are at most.
const PART_ROWS: u64 = 1 << 18;
const PART_BLOCKS: u64 = 64;
const MOST_PARTS: u64 = 64;

/// Parts of a query over a table: a function of the table alone, as is then the order of the result.
fn parts(table: &OpenSource) -> usize {
    let rows: u64 = table.blocks().iter().map(|block| block.rows).sum();
    let blocks = table.blocks().len() as u64;
    (rows / PART_ROWS).max(blocks / PART_BLOCKS).clamp(1, MOST_PARTS) as usize
}

/// How a query over datasets runs that has memory enough. Opens them.
pub(crate) fn mode(inputs: &[(TableReference, Dataset)]) -> Result<Mode> {
    let parts = inputs.iter().map(|(_, input)| Ok(parts(&*input.open()?)));
    Ok(Mode::HashJoin(parts.collect::<Result<Vec<_>>>()?.into_iter().max().unwrap_or(1)))
}

/// Tables with the columns of datasets, and no rows.
pub(crate) fn empty(inputs: &[(TableReference, Dataset)]) -> Result<Vec<Table>> {
    let empty = |(name, input): &(TableReference, Dataset)| {
        Ok((name.clone(), Arc::new(DatasetTable::unopened(input)?) as _))
    };
    inputs.iter().map(empty).collect()
}

/// Datasets as tables.
pub(crate) fn all(inputs: &[(TableReference, Dataset)], mode: Mode) -> Result<Vec<Table>> {
    all_in(inputs, |source| mode.parts().min(parts(source)))
}

/// The same for another engine, which works on so many parts at the same time.
#[cfg(feature = "backend")]
pub(crate) fn elsewhere(
    inputs: &[(TableReference, Dataset)],
    at_once: usize,
) -> Result<Vec<Table>> {
    all_in(inputs, |source| parts(source).max(at_once))
}

fn all_in(
    inputs: &[(TableReference, Dataset)],
    parts: impl Fn(&OpenSource) -> usize,
) -> Result<Vec<Table>> {
    let table = |(name, input): &(TableReference, Dataset)| {
        Ok((name.clone(), table(input, parts(&*input.open()?))?))
    };
    inputs.iter().map(table).collect()
}

/// The engine reads Parquet files itself, as it knows which of their pages a query needs. What else
/// nothing is done to gives only the columns that are asked for.
fn table(dataset: &Dataset, parts: usize) -> Result<Arc<dyn TableProvider>> {
    let source = dataset.open()?;
    if dataset.ops().is_empty()
        && let Some(files) = source.parquet_files()
        && let Some(table) = parquet(&files, source.schema())?
    {
        return Ok(table);
    }
    Ok(Arc::new(DatasetTable::new(dataset, parts)?))
}

/// None where the engine would not read the files as they are given.
fn parquet(files: &[PathBuf], schema: &Schema) -> Result<Option<Arc<dyn TableProvider>>> {
    let failed = Error::engine("read Parquet files");
    let mut urls = Vec::new();
    for path in files {
        // The engine knows no `..`.
        let path = path.canonicalize().at("resolve", path)?;
        // Nor names that are no text, or that its store takes for those of half-written files.
        let name = path.to_str().filter(|name| !name.contains('#'));
        let Some(url) = name.and_then(|_| Url::from_file_path(&path).ok()) else {
            return Ok(None);
        };
        urls.push(ListingTableUrl::try_new(url, None).map_err(&failed)?);
    }
    // It reads them by name, each once.
    if !urls.is_sorted_by(|one, next| one.prefix() < next.prefix()) {
        return Ok(None);
    }
    let options = ListingOptions::new(Arc::new(ParquetFormat::default())).with_file_extension("");
    let config = ListingTableConfig::new_with_multi_paths(urls)
        .with_listing_options(options)
        .with_schema(with_views(schema));
    Ok(Some(Arc::new(ListingTable::try_new(config).map_err(failed)?)))
}

/// Text as the engine is fastest with it.
fn with_views(schema: &Schema) -> SchemaRef {
    let field = |field: &Arc<Field>| {
        let data_type = match field.data_type() {
            DataType::Utf8 => DataType::Utf8View,
            DataType::Binary => DataType::BinaryView,
            other => other.clone(),
        };
        field.as_ref().clone().with_data_type(data_type)
    };
    Arc::new(Schema::new(schema.fields().iter().map(field).collect::<Vec<_>>()))
}

/// The columns of a schema with the types of those of another.
pub(crate) fn with_types(schema: &Schema, types: &Schema) -> SchemaRef {
    let fields = schema.fields().iter().zip(types.fields());
    let field = |(field, of): (&Arc<Field>, &Arc<Field>)| {
        field.as_ref().clone().with_data_type(of.data_type().clone())
    };
    Arc::new(Schema::new(fields.map(field).collect::<Vec<_>>()))
}
