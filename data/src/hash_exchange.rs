//! Rows of the engine's plans, parted by the hashes of keys.
//!
//! The engine's own exchange gives the rows of a part in the order in which its threads come by, and
//! hangs where it waits for memory (DataFusion issue 24883). Here all rows are routed first, and kept
//! within the budget; a part then has those of the first input before those of the second. So it has
//! the same rows in the same order, however many threads there are, and waits for nobody.

use crate::kept_parts::KeptParts;
use crate::operator::{Operator, unordered};
use crate::parts::{PartsWriter, Routed, retyped};
use crate::runtime::in_turn;
use crate::store::Kept;
use arrow::record_batch::RecordBatch;
use datafusion::common::Result as EngineResult;
use datafusion::common::hash_utils::create_hashes;
use datafusion::execution::{SendableRecordBatchStream, TaskContext};
use datafusion::physical_expr::PhysicalExpr;
use datafusion::physical_expr_common::utils::evaluate_expressions_to_arrays;
use datafusion::physical_plan::coop::make_cooperative;
use datafusion::physical_plan::repartition::REPARTITION_RANDOM_STATE;
use datafusion::physical_plan::stream::RecordBatchStreamAdapter;
use datafusion::physical_plan::{
    ExecutionPlan, ExecutionPlanProperties, Partitioning, PlanProperties,
};
use futures::{TryFutureExt, TryStreamExt, stream};
use std::sync::Arc;

type Keys = Arc<[Arc<dyn PhysicalExpr>]>;

/// Each row to the part that the hash of its keys says.
#[derive(Clone, Debug)]
pub(crate) struct HashExchange {
    keys: Keys,
    parts: usize,
}

impl HashExchange {
    pub(crate) fn new(keys: &[Arc<dyn PhysicalExpr>], parts: usize) -> Self {
        Self { keys: keys.into(), parts }
    }

    fn partitioning(&self) -> Partitioning {
        Partitioning::Hash(self.keys.to_vec(), self.parts)
    }
}

impl Operator for HashExchange {
    const NAME: &'static str = "HashExchangeExec";
    type Run = KeptParts;

    fn properties(&self, input: &Arc<dyn ExecutionPlan>) -> PlanProperties {
        unordered(input, self.partitioning())
    }

    fn expressions(&self) -> Vec<Arc<dyn PhysicalExpr>> {
        self.keys.to_vec()
    }

    fn details(&self) -> Option<String> {
        Some(self.partitioning().to_string())
    }

    fn execute(
        &self,
        routed: &KeptParts,
        input: &Arc<dyn ExecutionPlan>,
        partition: usize,
        context: Arc<TaskContext>,
    ) -> EngineResult<SendableRecordBatchStream> {
        let schema = input.schema();
        let begin = || route_all(input.clone(), self.keys.clone(), self.parts, context);
        let of = schema.clone();
        let read = move |piece: Kept| Ok(retyped(&piece.read()?, &of)?);
        let rows = routed.take(partition, begin);
        let rows = rows.map_ok(move |pieces| stream::iter(pieces.into_iter().map(read)));
        let rows = rows.try_flatten_stream();
        Ok(make_cooperative(Box::pin(RecordBatchStreamAdapter::new(schema, rows))))
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
