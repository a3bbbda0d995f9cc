//! Datasets of plans from elsewhere, opened where they are read.

use super::message::untold;
use crate::Dataset;
use crate::dataset_table::{Opened, Shape};
use crate::error::{Error, Result};
use crate::runtime::on_our_threads;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};
use xxhash_rust::xxh3::xxh3_128;

/// How long a dataset is taken as it was opened, for the parts of a query that are still to come. One that was
/// opened before a file changed is not to be in the way of the next query for ever.
const OPEN: Duration = Duration::from_secs(60);

/// A dataset as bytes.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Packed {
    dataset: Bytes,
    /// Of its source where the query was planned.
    fingerprint: String,
}

impl Packed {
    pub(crate) fn new(dataset: &Dataset) -> Result<Self> {
        let fingerprint = dataset.open()?.fingerprint()?;
        let packed = rmp_serde::to_vec_named(dataset);
        let dataset = packed.map_err(|error| untold(&dataset.title(), &error))?.into();
        Ok(Self { dataset, fingerprint })
    }

    /// Tells it from other datasets, and from itself of other data.
    fn key(&self) -> u128 {
        xxh3_128(&[&self.dataset, self.fingerprint.as_bytes()].concat())
    }

    fn open(&self, shape: &Shape) -> Result<Opened> {
        let dataset: Dataset =
            rmp_serde::from_slice(&self.dataset).map_err(|error| untold(&shape.title, &error))?;
        let source = dataset.open()?;
        let blocks = source.blocks().iter().map(|block| block.rows);
        if source.fingerprint()? != self.fingerprint || !blocks.eq(shape.blocks.iter().copied()) {
            return Err(Error::OtherData { dataset: shape.title.clone() });
        }
        Opened::new(&dataset)
    }
}

/// The dataset, once it is open. It may take as long as reading it once, which happens on the crate's own
/// threads: those of the engine have others to answer.
pub(crate) async fn opened(packed: Arc<Packed>, shape: Arc<Shape>) -> Result<Opened> {
    on_our_threads(move || {
        let slot = slot(packed.key());
        // Whoever comes meanwhile waits for the first.
        let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, opened)) = slot.as_ref().filter(is_fresh) {
            return Ok(opened.clone());
        }
        let opened = packed.open(&shape)?;
        *slot = Some((Instant::now(), opened.clone()));
        Ok(opened)
    })
    .await
}

/// Since when it is open.
type Slot = Arc<Mutex<Option<(Instant, Opened)>>>;

fn is_fresh((since, _): &&(Instant, Opened)) -> bool {
    since.elapsed() < OPEN
}

/// Of a dataset. Those that nobody uses any more are closed.
fn slot(key: u128) -> Slot {
    static SLOTS: LazyLock<Mutex<HashMap<u128, Slot>>> = LazyLock::new(Mutex::default);
    let mut slots = SLOTS.lock().unwrap_or_else(PoisonError::into_inner);
    slots.retain(|_, slot| match slot.try_lock() {
        Ok(slot) => slot.as_ref().filter(is_fresh).is_some(),
        Err(_) => true,
    });
    slots.entry(key).or_default().clone()
}
