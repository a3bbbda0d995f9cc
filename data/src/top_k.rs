//! The first rows of each partition.

use crate::operator::{Exec, Operator};
use datafusion::common::Result as EngineResult;
use datafusion::execution::{SendableRecordBatchStream, TaskContext};
use datafusion::physical_expr::{LexOrdering, PhysicalExpr};
use datafusion::physical_plan::sorts::sort::SortExec;
use datafusion::physical_plan::{
    ExecutionPlan, ExecutionPlanProperties, Partitioning, PlanProperties,
};
use std::sync::Arc;

/// A sort of each partition for itself that gives the first rows alone. The engine's has one bound for all
/// partitions, below which a row is left out: which of the rows that are the same stay, the threads decide.
#[derive(Clone, Debug)]
pub(crate) struct TopK {
    order: LexOrdering,
    rows: usize,
}

impl TopK {
    /// None unless it is a sort of several partitions that has such a bound.
    pub(crate) fn instead_of(sort: &SortExec) -> Option<Exec<Self>> {
        let parts = sort.input().output_partitioning().partition_count();
        let rows = sort.fetch().filter(|_| sort.preserve_partitioning() && parts > 1)?;
        Some(Exec::new(Self { order: sort.expr().clone(), rows }, sort.input().clone()))
    }

    fn sort(&self, input: &Arc<dyn ExecutionPlan>) -> SortExec {
        SortExec::new(self.order.clone(), input.clone()).with_fetch(Some(self.rows))
    }
}

impl Operator for TopK {
    const NAME: &'static str = "TopKExec";
    type Run = ();

    fn properties(&self, input: &Arc<dyn ExecutionPlan>) -> PlanProperties {
        let sort = self.sort(input).with_preserve_partitioning(true);
        PlanProperties::clone(sort.properties())
    }

    fn expressions(&self) -> Vec<Arc<dyn PhysicalExpr>> {
        self.order.iter().map(|by| by.expr.clone()).collect()
    }

    fn details(&self) -> Option<String> {
        Some(format!("fetch={}, expr=[{}]", self.rows, self.order))
    }

    fn execute(
        &self,
        (): &(),
        input: &Arc<dyn ExecutionPlan>,
        partition: usize,
        context: Arc<TaskContext>,
    ) -> EngineResult<SendableRecordBatchStream> {
        let one: Arc<dyn ExecutionPlan> = Arc::new(Exec::new(One { partition }, input.clone()));
        self.sort(&one).execute(0, context)
    }
}

/// One of the partitions of a plan.
#[derive(Clone, Debug)]
struct One {
    partition: usize,
}

impl Operator for One {
    const NAME: &'static str = "OneExec";
    type Run = ();

    fn properties(&self, input: &Arc<dyn ExecutionPlan>) -> PlanProperties {
        let properties = PlanProperties::clone(input.properties());
        properties.with_partitioning(Partitioning::UnknownPartitioning(1))
    }

    fn keeps_order(&self) -> bool {
        true
    }

    fn execute(
        &self,
        (): &(),
        input: &Arc<dyn ExecutionPlan>,
        _partition: usize,
        context: Arc<TaskContext>,
    ) -> EngineResult<SendableRecordBatchStream> {
        input.execute(self.partition, context)
    }
}
