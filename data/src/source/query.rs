//! The result of a query over other datasets, computed where it is opened.

use super::{Blocks, Source};
use crate::Dataset;
use crate::error::Result;
use crate::query::{bare, query_schema, run};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Query {
    /// With the names that the query calls them by.
    pub(crate) inputs: Vec<(String, Dataset)>,
    pub(crate) query: String,
}

#[typetag::serde(name = "query")]
impl Source for Query {
    fn open(&self) -> Result<Arc<dyn Blocks>> {
        let inputs = bare(&self.inputs);
        let schema = query_schema(&inputs, &self.query)?;
        Ok(Arc::new(run(&inputs, &self.query, &schema)?))
    }

    fn summary(&self) -> String {
        self.query.clone()
    }

    fn inputs(&self) -> Vec<(String, &Dataset)> {
        self.inputs.iter().map(|(name, input)| (name.clone(), input)).collect()
    }

    fn plans(&self) -> Result<Option<String>> {
        crate::explain::query_plans(&self.inputs, &self.query).map(Some)
    }
}
