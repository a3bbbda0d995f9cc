//! The queries of TPC-H, over the files of a folder.

use crate::cpu;
use anyhow::{Context, Result};
use arrow::array::AsArray;
use arrow::compute::{cast, concat_batches, sum};
use arrow::datatypes::{DataType, Float64Type};
use arrow::record_batch::RecordBatch;
use datafusion::prelude::{ParquetReadOptions, SessionContext};
use mobula_data::Dataset;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::time::Instant;

const TABLES: [&str; 8] =
    ["customer", "lineitem", "nation", "orders", "part", "partsupp", "region", "supplier"];

fn query(number: usize) -> Result<&'static str> {
    let all = include_str!("tpch.sql");
    // Without the remark at the head.
    let all = all.split_once("\n\n").context("a head")?.1;
    all.split(';').nth(number - 1).context("there are 22 queries")
}

/// `lineitem` is one of the files.
fn files(lineitem: &str) -> Result<Vec<(&'static str, PathBuf)>> {
    let folder = Path::new(lineitem).parent().context("a folder")?;
    Ok(TABLES.map(|table| (table, folder.join(format!("{table}.parquet")))).into())
}

fn tables(lineitem: &str) -> Result<Vec<(&'static str, Dataset)>> {
    let table = |(name, file): (_, PathBuf)| {
        Ok((name, Dataset::read_parquet(file.to_str().context("UTF-8")?)?))
    };
    files(lineitem)?.into_iter().map(table).collect()
}

pub(crate) fn ours(lineitem: &str, number: usize) -> Result<Value> {
    let (start, before) = (Instant::now(), cpu());
    let rows = mobula_data::query(query(number)?, tables(lineitem)?)?;
    answer(start, before, &rows)
}

/// The query engine as it comes.
pub(crate) fn plain(lineitem: &str, number: usize) -> Result<Value> {
    let runtime = tokio::runtime::Runtime::new()?;
    let (start, before) = (Instant::now(), cpu());
    let rows = runtime.block_on(async {
        let session = SessionContext::new();
        for (name, file) in files(lineitem)? {
            let file = file.to_str().context("UTF-8")?;
            session.register_parquet(name, file, ParquetReadOptions::default()).await?;
        }
        let frame = session.sql(query(number)?).await?;
        let schema = frame.schema().as_arrow().clone();
        let batches = frame.collect().await?;
        let schema = batches.first().map_or(schema.into(), RecordBatch::schema);
        anyhow::Ok(concat_batches(&schema, &batches)?)
    })?;
    answer(start, before, &rows)
}

fn answer(start: Instant, before: std::time::Duration, rows: &RecordBatch) -> Result<Value> {
    let (seconds, cpu) = (start.elapsed().as_secs_f64(), cpu() - before);
    let mut total = 0.0;
    for column in rows.columns() {
        if column.data_type().is_numeric() {
            let numbers = cast(column, &DataType::Float64)?;
            total += sum(numbers.as_primitive::<Float64Type>()).unwrap_or(0.0);
        }
    }
    let rows = rows.num_rows();
    Ok(json!({ "seconds": seconds, "cpu": cpu.as_secs_f64(), "rows": rows, "sum": total }))
}
