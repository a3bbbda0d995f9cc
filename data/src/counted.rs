//! How many rows a table has: which side of a join is held in memory depends on it.

use crate::operator::Operator;
use datafusion::common::Result as EngineResult;
use datafusion::execution::{SendableRecordBatchStream, TaskContext};
use datafusion::physical_plan::{ExecutionPlan, PlanProperties};
use std::sync::Arc;

/// Passes on all rows, which are about so many.
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
        input.execute(partition, context)
    }
}
