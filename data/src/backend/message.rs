//! Tables and what is read of them, as bytes.

use super::opened::Packed;
use crate::dataset_table::{DatasetTable, Reading, Shape};
use crate::error::{Error, Result};
use datafusion::catalog::TableProvider;
use datafusion::physical_plan::ExecutionPlan;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// What the bytes of ours begin with.
const OURS: &[u8] = b"mobula-data 1\0";

/// All that who plans is to know: only who reads a dataset opens it.
#[derive(Serialize, Deserialize)]
struct Message {
    #[serde(with = "crate::shared")]
    shape: Arc<Shape>,
    #[serde(with = "crate::shared")]
    packed: Arc<Packed>,
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
    match Reading::by(plan)? {
        Some((table, reading)) => encode(table, Some(reading)).map(Some),
        None => Ok(None),
    }
}

fn encode(table: &DatasetTable, reading: Option<Reading>) -> Result<Vec<u8>> {
    let message = Message { shape: table.shape().clone(), packed: table.packed()?, reading };
    let mut bytes = OURS.to_vec();
    match rmp_serde::encode::write_named(&mut bytes, &message) {
        Ok(()) => Ok(bytes),
        Err(error) => Err(untold(&table.shape().title, &error)),
    }
}

pub(super) fn table(bytes: &[u8]) -> Result<Arc<dyn TableProvider>> {
    let message = decode(bytes)?;
    Ok(Arc::new(DatasetTable::elsewhere(message.shape, message.packed)))
}

pub(super) fn plan(bytes: &[u8]) -> Result<Arc<dyn ExecutionPlan>> {
    let Message { shape, packed, reading: Some(reading) } = decode(bytes)? else {
        return Err(Error::Internal("a table stands where a plan is to read one".to_owned()));
    };
    Ok(reading.of(DatasetTable::elsewhere(shape, packed))?)
}

fn decode(bytes: &[u8]) -> Result<Message> {
    let packed = bytes.strip_prefix(OURS).unwrap_or(bytes);
    rmp_serde::from_slice(packed).map_err(|error| untold("a dataset of a plan", &error))
}

/// A description that cannot be written, or is not understood.
pub(super) fn untold(dataset: &str, reason: &dyn std::error::Error) -> Error {
    Error::Untold { dataset: dataset.to_owned(), reason: reason.to_string() }
}
