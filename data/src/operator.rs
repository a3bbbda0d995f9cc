//! Operators of our own in the engine's plans.

use datafusion::common::Result as EngineResult;
use datafusion::common::tree_node::TreeNodeRecursion;
use datafusion::execution::{SendableRecordBatchStream, TaskContext};
use datafusion::physical_expr::PhysicalExpr;
use datafusion::physical_plan::{
    DisplayAs, DisplayFormatType, ExecutionPlan, ExecutionPlanProperties, Partitioning,
    PlanProperties,
};
use std::fmt::{self, Debug};
use std::sync::Arc;

/// What is done to the partitions of one input.
pub(crate) trait Operator: Clone + Debug + Send + Sync + 'static {
    /// What plans call it.
    const NAME: &'static str;

    /// What one run has computed so far.
    type Run: Default + Send + Sync;

    /// Its partitions and their order.
    fn properties(&self, input: &Arc<dyn ExecutionPlan>) -> PlanProperties;

    /// Whether the rows of a partition have the order of those of the same of the input.
    fn keeps_order(&self) -> bool {
        false
    }

    fn expressions(&self) -> Vec<Arc<dyn PhysicalExpr>> {
        Vec::new()
    }

    /// What plans say of it behind its name.
    fn details(&self) -> Option<String> {
        None
    }

    fn execute(
        &self,
        run: &Self::Run,
        input: &Arc<dyn ExecutionPlan>,
        partition: usize,
        context: Arc<TaskContext>,
    ) -> EngineResult<SendableRecordBatchStream>;
}

/// The properties of rows that have no order.
pub(crate) fn unordered(
    input: &Arc<dyn ExecutionPlan>,
    partitioning: Partitioning,
) -> PlanProperties {
    let mut equivalences = input.equivalence_properties().clone();
    equivalences.clear_orderings();
    equivalences.clear_per_partition_constants();
    let (behavior, boundedness) = (input.pipeline_behavior(), input.boundedness());
    PlanProperties::new(equivalences, partitioning, behavior, boundedness)
}

/// An operator in a plan.
pub(crate) struct Exec<O: Operator> {
    operator: O,
    input: Arc<dyn ExecutionPlan>,
    properties: Arc<PlanProperties>,
    run: O::Run,
}

impl<O: Operator> Exec<O> {
    pub(crate) fn new(operator: O, input: Arc<dyn ExecutionPlan>) -> Self {
        let properties = Arc::new(operator.properties(&input));
        Self { operator, input, properties, run: O::Run::default() }
    }

    pub(crate) fn input(&self) -> &Arc<dyn ExecutionPlan> {
        &self.input
    }
}

impl<O: Operator> ExecutionPlan for Exec<O> {
    fn name(&self) -> &str {
        O::NAME
    }

    fn properties(&self) -> &Arc<PlanProperties> {
        &self.properties
    }

    fn children(&self) -> Vec<&Arc<dyn ExecutionPlan>> {
        vec![&self.input]
    }

    fn maintains_input_order(&self) -> Vec<bool> {
        vec![self.operator.keeps_order()]
    }

    fn apply_expressions(
        &self,
        f: &mut dyn FnMut(&Arc<dyn PhysicalExpr>) -> EngineResult<TreeNodeRecursion>,
    ) -> EngineResult<TreeNodeRecursion> {
        let mut recursion = TreeNodeRecursion::Continue;
        for expression in self.operator.expressions() {
            recursion = recursion.visit_sibling(|| f(&expression))?;
        }
        Ok(recursion)
    }

    /// Nothing is computed of it yet.
    fn with_new_children(
        self: Arc<Self>,
        children: Vec<Arc<dyn ExecutionPlan>>,
    ) -> EngineResult<Arc<dyn ExecutionPlan>> {
        Ok(Arc::new(Self::new(self.operator.clone(), children[0].clone())))
    }

    fn execute(
        &self,
        partition: usize,
        context: Arc<TaskContext>,
    ) -> EngineResult<SendableRecordBatchStream> {
        self.operator.execute(&self.run, &self.input, partition, context)
    }
}

impl<O: Operator> DisplayAs for Exec<O> {
    fn fmt_as(&self, _: DisplayFormatType, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.operator.details() {
            Some(details) => write!(f, "{}: {details}", O::NAME),
            None => f.write_str(O::NAME),
        }
    }
}

impl<O: Operator> Debug for Exec<O> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct(O::NAME).field("operator", &self.operator).finish_non_exhaustive()
    }
}
