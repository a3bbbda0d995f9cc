//! The first rows of each partition.

use datafusion::common::Result as EngineResult;
use datafusion::common::tree_node::TreeNodeRecursion;
use datafusion::execution::{SendableRecordBatchStream, TaskContext};
use datafusion::physical_expr::PhysicalExpr;
use datafusion::physical_plan::sorts::sort::SortExec;
use datafusion::physical_plan::{
    DisplayAs, DisplayFormatType, ExecutionPlan, ExecutionPlanProperties, Partitioning,
    PlanProperties,
};
use std::fmt;
use std::sync::Arc;

/// A sort of each partition for itself that gives the first rows alone. The engine's has one bound for all
/// partitions, below which a row is left out: which of the rows that are the same stay, the threads decide.
#[derive(Debug)]
pub(crate) struct TopKExec {
    sort: SortExec,
}

impl TopKExec {
    /// None unless it is a sort of several partitions that has such a bound.
    pub(crate) fn of(sort: &SortExec) -> Option<Self> {
        let is_shared = sort.preserve_partitioning()
            && sort.fetch().is_some()
            && sort.input().output_partitioning().partition_count() > 1;
        is_shared.then(|| Self { sort: sort.clone() })
    }
}

impl ExecutionPlan for TopKExec {
    fn name(&self) -> &str {
        "TopKExec"
    }

    fn properties(&self) -> &Arc<PlanProperties> {
        self.sort.properties()
    }

    fn children(&self) -> Vec<&Arc<dyn ExecutionPlan>> {
        vec![self.sort.input()]
    }

    fn apply_expressions(
        &self,
        f: &mut dyn FnMut(&Arc<dyn PhysicalExpr>) -> EngineResult<TreeNodeRecursion>,
    ) -> EngineResult<TreeNodeRecursion> {
        self.sort.apply_expressions(f)
    }

    fn with_new_children(
        self: Arc<Self>,
        children: Vec<Arc<dyn ExecutionPlan>>,
    ) -> EngineResult<Arc<dyn ExecutionPlan>> {
        let sort = SortExec::new(self.sort.expr().clone(), children[0].clone());
        let sort = sort.with_preserve_partitioning(true).with_fetch(self.sort.fetch());
        Ok(Arc::new(Self { sort }))
    }

    fn execute(
        &self,
        partition: usize,
        context: Arc<TaskContext>,
    ) -> EngineResult<SendableRecordBatchStream> {
        let one = Arc::new(OneExec::new(self.sort.input().clone(), partition));
        let sort = SortExec::new(self.sort.expr().clone(), one).with_fetch(self.sort.fetch());
        sort.execute(0, context)
    }
}

impl DisplayAs for TopKExec {
    fn fmt_as(&self, _: DisplayFormatType, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TopKExec: fetch={}, expr=[{}]", self.sort.fetch().unwrap_or(0), self.sort.expr())
    }
}

/// One of the partitions of a plan.
#[derive(Debug)]
struct OneExec {
    input: Arc<dyn ExecutionPlan>,
    partition: usize,
    properties: Arc<PlanProperties>,
}

impl OneExec {
    fn new(input: Arc<dyn ExecutionPlan>, partition: usize) -> Self {
        let properties = PlanProperties::clone(input.properties());
        let properties = properties.with_partitioning(Partitioning::UnknownPartitioning(1));
        Self { input, partition, properties: Arc::new(properties) }
    }
}

impl ExecutionPlan for OneExec {
    fn name(&self) -> &str {
        "OneExec"
    }

    fn properties(&self) -> &Arc<PlanProperties> {
        &self.properties
    }

    fn children(&self) -> Vec<&Arc<dyn ExecutionPlan>> {
        vec![&self.input]
    }

    fn apply_expressions(
        &self,
        _: &mut dyn FnMut(&Arc<dyn PhysicalExpr>) -> EngineResult<TreeNodeRecursion>,
    ) -> EngineResult<TreeNodeRecursion> {
        Ok(TreeNodeRecursion::Continue)
    }

    fn with_new_children(
        self: Arc<Self>,
        children: Vec<Arc<dyn ExecutionPlan>>,
    ) -> EngineResult<Arc<dyn ExecutionPlan>> {
        Ok(Arc::new(Self::new(children[0].clone(), self.partition)))
    }

    fn execute(
        &self,
        _partition: usize,
        context: Arc<TaskContext>,
    ) -> EngineResult<SendableRecordBatchStream> {
        self.input.execute(self.partition, context)
    }
}

impl DisplayAs for OneExec {
    fn fmt_as(&self, _: DisplayFormatType, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "OneExec: {}", self.partition)
    }
}
