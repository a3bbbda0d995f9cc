//! Tables and what is read of them, as bytes.

use crate::Dataset;
use crate::dataset_table::{DatasetTable, Reading};
use crate::error::{Error, Result};
use datafusion::catalog::TableProvider;
use datafusion::physical_plan::ExecutionPlan;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use xxhash_rust::xxh3::xxh3_128;

/// What the bytes of ours begin with.
const OURS: &[u8] = b"mobula-data 1\0";

/// How many datasets stay open for the parts of queries that are still to come.
const OPEN: usize = 16;

#[derive(Serialize, Deserialize)]
struct Message {
    dataset: Dataset,
    parts: usize,
    /// Of the dataset's source where the query was planned.
    fingerprint: String,
    reading: Option<Reading>,
}

/// Whether bytes are those of a table, or of what is read of one.
pub(super) fn is_ours(bytes: &[u8]) -> bool {
    bytes.starts_with(OURS)
}

pub(super) fn of_table(table: &DatasetTable) -> Result<Vec<u8>> {
    encode(table, None)
}

/// None if a plan does not read a dataset.
pub(super) fn of_plan(plan: &dyn ExecutionPlan) -> Result<Option<Vec<u8>>> {
    let read = Reading::by(plan);
    read.map(|(table, reading)| encode(table, Some(reading))).transpose()
}

fn encode(table: &DatasetTable, reading: Option<Reading>) -> Result<Vec<u8>> {
    let dataset = table.dataset().clone();
    let fingerprint = dataset.open()?.fingerprint()?;
    let message = Message { dataset, parts: table.parts(), fingerprint, reading };
    let failed = |error| Error::Internal(format!("a dataset cannot be written as bytes: {error}"));
    let mut bytes = OURS.to_vec();
    rmp_serde::encode::write_named(&mut bytes, &message).map_err(failed)?;
    Ok(bytes)
}

pub(super) fn table(bytes: &[u8]) -> Result<Arc<dyn TableProvider>> {
    let message = decode(bytes)?;
    Ok(Arc::new(DatasetTable::new(message.dataset, message.parts)?))
}

pub(super) fn plan(bytes: &[u8]) -> Result<Arc<dyn ExecutionPlan>> {
    let Message { dataset, parts, reading: Some(reading), .. } = decode(bytes)? else {
        return Err(Error::Internal("a table stands where a plan is to read one".to_owned()));
    };
    Ok(reading.of(DatasetTable::new(dataset, parts)?)?)
}

/// With a dataset that is open, and of the same data as where the query was planned.
fn decode(bytes: &[u8]) -> Result<Message> {
    let failed = |error| {
        Error::Internal(format!(
            "a dataset of a plan cannot be read: {error}; all processes must be of the same program"
        ))
    };
    let packed = bytes.strip_prefix(OURS).unwrap_or(bytes);
    let mut message: Message = rmp_serde::from_slice(packed).map_err(failed)?;
    message.dataset = opened(message.dataset, &message.fingerprint)?;
    Ok(message)
}

/// Datasets by what they are and what data they were of.
static OPENED: LazyLock<Mutex<VecDeque<(u128, Dataset)>>> = LazyLock::new(Mutex::default);

/// The same dataset, open: a query has many parts, and to open it may take as long as reading it once.
fn opened(dataset: Dataset, fingerprint: &str) -> Result<Dataset> {
    let key = key(&dataset, fingerprint)?;
    let known = || OPENED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, dataset)) = known().iter().find(|(of, _)| *of == key) {
        return Ok(dataset.clone());
    }
    if dataset.open()?.fingerprint()? != fingerprint {
        return Err(Error::OtherData { dataset: dataset.title() });
    }
    let mut known = known();
    known.push_back((key, dataset.clone()));
    if known.len() > OPEN {
        known.pop_front();
    }
    Ok(dataset)
}

fn key(dataset: &Dataset, fingerprint: &str) -> Result<u128> {
    let packed = rmp_serde::to_vec(&(dataset, fingerprint));
    let packed = packed.map_err(|error| Error::Internal(error.to_string()))?;
    Ok(xxh3_128(&packed))
}
