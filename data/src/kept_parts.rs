//! Parts of a plan that are all computed before one of them is read.

use crate::store::Kept;
use datafusion::common::{Result as EngineResult, resources_datafusion_err};
use datafusion::error::DataFusionError;
use futures::FutureExt;
use futures::future::{BoxFuture, Shared};
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

/// What the parts are, once they are computed.
type Parts = Shared<BoxFuture<'static, Result<Arc<[Part]>, OneError>>>;

/// The pieces of a part, in order, until they are read.
type Part = Mutex<Option<Vec<Kept>>>;

/// Parts that each are read once, so that their memory is free then.
#[derive(Default)]
pub(crate) struct KeptParts(Mutex<Option<Parts>>);

impl KeptParts {
    /// The pieces of a part. Who asks first begins to compute all.
    pub(crate) fn take<F: Future<Output = EngineResult<Vec<Vec<Kept>>>> + Send + 'static>(
        &self,
        part: usize,
        begin: impl FnOnce() -> F,
    ) -> BoxFuture<'static, EngineResult<Vec<Kept>>> {
        let computed = || {
            let parts = begin().map(|parts| parts.map(unread).map_err(OneError::new));
            parts.boxed().shared()
        };
        let mut parts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let parts = parts.get_or_insert_with(computed).clone();
        let take = async move {
            let pieces = parts.await?[part].lock().unwrap_or_else(PoisonError::into_inner).take();
            // By a join of the engine that had too little memory to keep it.
            let again = || resources_datafusion_err!("a part of a plan would be read again");
            pieces.ok_or_else(again)
        };
        take.boxed()
    }
}

fn unread(parts: Vec<Vec<Kept>>) -> Arc<[Part]> {
    parts.into_iter().map(|pieces| Mutex::new(Some(pieces))).collect()
}

/// One error that several learn of, as all of them read what was to be. Who comes first has it as it is.
#[derive(Clone)]
pub(crate) struct OneError {
    text: Arc<str>,
    error: Arc<Mutex<Option<DataFusionError>>>,
}

impl OneError {
    fn new(error: DataFusionError) -> Self {
        Self { text: error.to_string().into(), error: Arc::new(Mutex::new(Some(error))) }
    }

    pub(crate) fn take(&self) -> Option<DataFusionError> {
        self.error.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl fmt::Display for OneError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for OneError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "OneError({})", self.text)
    }
}

impl std::error::Error for OneError {}

impl From<OneError> for DataFusionError {
    fn from(error: OneError) -> Self {
        Self::External(Box::new(error))
    }
}
