//! A leaf of which it is known how many rows it has: which side of a join is held in memory depends on it.

use crate::kept_parts::OneError;
use crate::operator::Operator;
use datafusion::common::Result as EngineResult;
use datafusion::execution::{SendableRecordBatchStream, TaskContext};
use datafusion::physical_plan::stream::RecordBatchStreamAdapter;
use datafusion::physical_plan::{ExecutionPlan, PlanProperties};
use futures::TryStreamExt;
use std::sync::Arc;

/// Passes on about so many rows.
#[derive(Clone, Debug)]
pub(crate) struct Counted {
    pub(crate) rows: usize,
}

impl Operator for Counted {
    const NAME: &'static str = "CountedExec";
    type Run = ();

    fn properties(&self, input: &Arc<dyn ExecutionPlan>) -> PlanProperties {
        PlanProperties::clone(input.properties())
    }

    fn keeps_order(&self) -> bool {
        true
    }

    fn details(&self) -> Option<String> {
        Some(format!("about {} rows", self.rows))
    }

    fn rows(&self) -> Option<usize> {
        Some(self.rows)
    }

    fn execute(
        &self,
        (): &(),
        input: &Arc<dyn ExecutionPlan>,
        partition: usize,
        context: Arc<TaskContext>,
    ) -> EngineResult<SendableRecordBatchStream> {
        // As several may learn of an error, if what is held is for all parts of a join.
        let rows = input.execute(partition, context)?.map_err(|error| OneError::new(error).into());
        Ok(Box::pin(RecordBatchStreamAdapter::new(input.schema(), rows)))
    }
}
