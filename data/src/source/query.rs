//! The result of a query over another dataset, computed where it is opened.

use super::{Blocks, Source};
use crate::Dataset;
use crate::error::Result;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Query {
    pub(crate) input: Dataset,
    pub(crate) query: String,
}

#[typetag::serde(name = "query")]
impl Source for Query {
    fn open(&self) -> Result<Arc<dyn Blocks>> {
        Ok(Arc::new(crate::plan::run_query(&self.input, &self.query)?))
    }
}
