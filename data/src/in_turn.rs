//! Partitions of a plan that are computed in their turn: as many at the same time as there are threads, each
//! to its end. More at the same time would share the memory, and none would be done sooner.

use crate::kept_parts::KeptParts;
use crate::operator::{Operator, unordered};
use crate::runtime::in_turn;
use crate::store::{BlockStore, Kept};
use arrow::record_batch::RecordBatch;
use datafusion::common::Result as EngineResult;
use datafusion::error::DataFusionError;
use datafusion::execution::{SendableRecordBatchStream, TaskContext};
use datafusion::physical_plan::coop::make_cooperative;
use datafusion::physical_plan::stream::RecordBatchStreamAdapter;
use datafusion::physical_plan::{
    ExecutionPlan, ExecutionPlanProperties, Partitioning, PlanProperties,
};
use futures::{Stream, TryFutureExt, TryStreamExt, stream};
use std::sync::Arc;

/// The partitions of a plan one after another.
#[derive(Clone, Debug)]
pub(crate) struct InOrder;

impl Operator for InOrder {
    const NAME: &'static str = "InOrderExec";
    type Run = ();

    fn properties(&self, input: &Arc<dyn ExecutionPlan>) -> PlanProperties {
        unordered(input, Partitioning::UnknownPartitioning(1))
    }

    fn execute(
        &self,
        (): &(),
        input: &Arc<dyn ExecutionPlan>,
        _partition: usize,
        context: Arc<TaskContext>,
    ) -> EngineResult<SendableRecordBatchStream> {
        if input.output_partitioning().partition_count() == 1 {
            return input.execute(0, context);
        }
        let blocks = keep_all(input.clone(), context).map_ok(read).try_flatten();
        Ok(make_cooperative(Box::pin(RecordBatchStreamAdapter::new(input.schema(), blocks))))
    }
}

/// The partitions of a plan, for who reads all of them at the same time.
#[derive(Clone, Debug)]
pub(crate) struct KeepAll;

impl Operator for KeepAll {
    const NAME: &'static str = "KeptExec";
    type Run = KeptParts;

    fn properties(&self, input: &Arc<dyn ExecutionPlan>) -> PlanProperties {
        PlanProperties::clone(input.properties())
    }

    fn keeps_order(&self) -> bool {
        true
    }

    fn execute(
        &self,
        kept: &KeptParts,
        input: &Arc<dyn ExecutionPlan>,
        partition: usize,
        context: Arc<TaskContext>,
    ) -> EngineResult<SendableRecordBatchStream> {
        let begin = || keep_all(input.clone(), context).try_collect();
        let blocks = kept.take(partition, begin).map_ok(read).try_flatten_stream();
        Ok(make_cooperative(Box::pin(RecordBatchStreamAdapter::new(input.schema(), blocks))))
    }
}

/// The blocks of each partition.
fn keep_all(
    input: Arc<dyn ExecutionPlan>,
    context: Arc<TaskContext>,
) -> impl Stream<Item = EngineResult<Vec<Kept>>> {
    let partitions = input.output_partitioning().partition_count();
    in_turn(partitions, context.clone(), move |partition| {
        let (input, context) = (input.clone(), context.clone());
        async move {
            let kept = BlockStore::collect(input.schema(), input.execute(partition, context)?);
            Ok(kept.await?.into_iter().collect())
        }
    })
}

fn read(blocks: Vec<Kept>) -> impl Stream<Item = EngineResult<RecordBatch>> {
    stream::iter(blocks.into_iter().map(|block| block.read().map_err(DataFusionError::from)))
}
