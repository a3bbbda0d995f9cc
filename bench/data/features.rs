//! A chain of preprocessors over twenty columns with missing values.

use crate::cpu;
use anyhow::{Context, Result};
use arrow::array::AsArray;
use arrow::compute::cast;
use arrow::datatypes::{DataType, Float64Type};
use arrow::record_batch::RecordBatch;
use mobula_data::{Chain, Dataset, Norm, Normalizer, SimpleImputer, StandardScaler, WriteOptions};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::time::Instant;

const ROWS: u64 = 1_000_000;
const COLUMNS: usize = 20;

fn folder(lineitem: &str) -> Result<PathBuf> {
    Ok(Path::new(lineitem).parent().context("a folder")?.join("features"))
}

fn names() -> Vec<String> {
    (0..COLUMNS).map(|at| format!("x{at}")).collect()
}

/// Numbers that are a function of their place, a tenth of them missing.
pub(crate) fn write(lineitem: &str) -> Result<Value> {
    let mut rows = Dataset::range(ROWS)?;
    for (at, name) in names().into_iter().enumerate() {
        let value = format!(
            "CASE WHEN (id + {at}) % 10 = 0 THEN NULL ELSE {scale} * sin(id * 0.001 * ({at} + 1)) + {at} END",
            scale = at + 1
        );
        rows = rows.with_column(name, value)?;
    }
    let options = WriteOptions::default().with_overwrite(true);
    rows.select(names())?.write_parquet(folder(lineitem)?, options)?;
    Ok(json!({ "seconds": 0.0, "rows": ROWS }))
}

/// Fits and applies; the rows are in memory before and after.
pub(crate) fn prepare(lineitem: &str) -> Result<Value> {
    let folder = folder(lineitem)?;
    let rows = Dataset::read_parquet(folder.to_str().context("UTF-8")?)?;
    let batches: Vec<RecordBatch> = rows.batches()?.collect::<mobula_data::Result<_>>()?;
    let rows = Dataset::from_batches(batches)?;
    let (start, before) = (Instant::now(), cpu());
    let chain = Chain::fit(
        [
            SimpleImputer::mean(names()),
            StandardScaler::of(names()),
            Normalizer::new(names()).with_norm(Norm::L2).into(),
        ],
        &rows,
    )?;
    let made: Vec<RecordBatch> =
        rows.preprocess(&chain)?.batches()?.collect::<mobula_data::Result<_>>()?;
    let (seconds, cpu) = (start.elapsed().as_secs_f64(), cpu() - before);
    let mut total = 0.0;
    for column in made.iter().flat_map(RecordBatch::columns) {
        let numbers = cast(column, &DataType::Float64)?;
        total +=
            numbers.as_primitive::<Float64Type>().values().iter().map(|x| x.abs()).sum::<f64>();
    }
    let rows: usize = made.iter().map(RecordBatch::num_rows).sum();
    Ok(json!({ "seconds": seconds, "cpu": cpu.as_secs_f64(), "rows": rows, "sum": total }))
}
