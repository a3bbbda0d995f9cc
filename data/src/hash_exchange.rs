//! Rows of the engine's plans, parted by the hashes of keys.
//!
//! The engine's own exchange gives the rows of a part in the order in which its threads come by, and
//! hangs where it waits for memory (DataFusion issue 24883). Here all rows are routed first, and kept
//! within the budget; a part then has those of the first input before those of the second. So it has
//! the same rows in the same order, however many threads there are, and waits for nobody.

use crate::kept_parts::KeptParts;
use crate::parts::{PartsWriter, Routed, retyped};
use crate::runtime::in_turn;
use crate::store::Kept;
use arrow::record_batch::RecordBatch;
use datafusion::common::Result as EngineResult;
use datafusion::common::hash_utils::create_hashes;
use datafusion::common::tree_node::TreeNodeRecursion;
use datafusion::execution::{SendableRecordBatchStream, TaskContext};
use datafusion::physical_expr::PhysicalExpr;
use datafusion::physical_expr_common::utils::evaluate_expressions_to_arrays;
use datafusion::physical_plan::coop::make_cooperative;
use datafusion::physical_plan::metrics::{
    BaselineMetrics, ExecutionPlanMetricsSet, MetricsSet, RecordOutput,
};
use datafusion::physical_plan::repartition::REPARTITION_RANDOM_STATE;
use datafusion::physical_plan::stream::RecordBatchStreamAdapter;
use datafusion::physical_plan::{
    DisplayAs, DisplayFormatType, ExecutionPlan, ExecutionPlanProperties, Partitioning,
    PlanProperties,
};
use futures::{TryFutureExt, TryStreamExt, stream};
use std::fmt;
use std::sync::Arc;

type Keys = Arc<[Arc<dyn PhysicalExpr>]>;

pub(crate) struct HashExchangeExec {
    input: Arc<dyn ExecutionPlan>,
    keys: Keys,
    properties: Arc<PlanProperties>,
    metrics: ExecutionPlanMetricsSet,
    routed: KeptParts,
}

impl HashExchangeExec {
    pub(crate) fn new(
        input: Arc<dyn ExecutionPlan>,
        keys: Vec<Arc<dyn PhysicalExpr>>,
        parts: usize,
    ) -> Self {
        let mut equivalences = input.equivalence_properties().clone();
        equivalences.clear_orderings();
        equivalences.clear_per_partition_constants();
        let properties = PlanProperties::new(
            equivalences,
            Partitioning::Hash(keys.clone(), parts),
            input.pipeline_behavior(),
            input.boundedness(),
        );
        Self {
            input,
            keys: keys.into(),
            properties: Arc::new(properties),
            metrics: ExecutionPlanMetricsSet::new(),
            routed: KeptParts::default(),
        }
    }

    fn parts(&self) -> usize {
        self.properties.partitioning.partition_count()
    }
}

async fn route_all(
    input: Arc<dyn ExecutionPlan>,
    keys: Keys,
    parts: usize,
    context: Arc<TaskContext>,
) -> EngineResult<Vec<Vec<Kept>>> {
    let inputs = input.output_partitioning().partition_count();
    let route = |partition| {
        let (input, keys, context) = (input.clone(), keys.clone(), context.clone());
        async move {
            let mut batches = input.execute(partition, context)?;
            let mut writer = None;
            while let Some(batch) = batches.try_next().await? {
                // Not before: until now it waited for those below.
                let writer = match &mut writer {
                    Some(writer) => writer,
                    none => none.insert(PartsWriter::beside_others(parts)?),
                };
                let of = parts_of(&batch, &keys, parts)?;
                writer.push(Routed::new(&batch, &of, parts)?).await?;
            }
            match writer {
                Some(writer) => Ok(writer.finish().await?.0),
                None => Ok(Vec::new()),
            }
        }
    };
    let mut routed = std::pin::pin!(in_turn(inputs, context.clone(), route));
    let mut all: Vec<Vec<Kept>> = (0..parts).map(|_| Vec::new()).collect();
    while let Some(parts) = routed.try_next().await? {
        all.iter_mut().zip(parts).for_each(|(all, pieces)| all.extend(pieces));
    }
    Ok(all)
}

/// The part of each row.
fn parts_of(
    rows: &RecordBatch,
    keys: &[Arc<dyn PhysicalExpr>],
    parts: usize,
) -> EngineResult<Vec<u32>> {
    let keys = evaluate_expressions_to_arrays(keys, rows)?;
    let mut hashes = vec![0; rows.num_rows()];
    create_hashes(&keys, REPARTITION_RANDOM_STATE.random_state(), &mut hashes)?;
    // As Lemire, Fast Random Integer Generation in an Interval, 2019: a product instead of a remainder.
    let part = |hash| ((u128::from(hash) * parts as u128) >> 64) as u32;
    Ok(hashes.into_iter().map(part).collect())
}

impl DisplayAs for HashExchangeExec {
    fn fmt_as(&self, _: DisplayFormatType, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HashExchangeExec: {}", self.properties.partitioning)
    }
}

impl fmt::Debug for HashExchangeExec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HashExchangeExec({})", self.properties.partitioning)
    }
}

impl ExecutionPlan for HashExchangeExec {
    fn name(&self) -> &str {
        "HashExchangeExec"
    }

    fn properties(&self) -> &Arc<PlanProperties> {
        &self.properties
    }

    fn children(&self) -> Vec<&Arc<dyn ExecutionPlan>> {
        vec![&self.input]
    }

    fn apply_expressions(
        &self,
        f: &mut dyn FnMut(&Arc<dyn PhysicalExpr>) -> EngineResult<TreeNodeRecursion>,
    ) -> EngineResult<TreeNodeRecursion> {
        let mut recursion = TreeNodeRecursion::Continue;
        for key in self.keys.iter() {
            recursion = recursion.visit_sibling(|| f(key))?;
        }
        Ok(recursion)
    }

    fn with_new_children(
        self: Arc<Self>,
        children: Vec<Arc<dyn ExecutionPlan>>,
    ) -> EngineResult<Arc<dyn ExecutionPlan>> {
        Ok(Arc::new(Self::new(children[0].clone(), self.keys.to_vec(), self.parts())))
    }

    fn execute(
        &self,
        partition: usize,
        context: Arc<TaskContext>,
    ) -> EngineResult<SendableRecordBatchStream> {
        let schema = self.schema();
        let begin = || route_all(self.input.clone(), self.keys.clone(), self.parts(), context);
        let pieces = self.routed.take(partition, begin);
        let (metrics, of) = (BaselineMetrics::new(&self.metrics, partition), schema.clone());
        let read = move |piece: Kept| Ok(retyped(&piece.read()?, &of)?.record_output(&metrics));
        let rows = pieces.map_ok(move |pieces| stream::iter(pieces.into_iter().map(read)));
        let rows = rows.try_flatten_stream();
        Ok(make_cooperative(Box::pin(RecordBatchStreamAdapter::new(schema, rows))))
    }

    fn metrics(&self) -> Option<MetricsSet> {
        Some(self.metrics.clone_inner())
    }
}
