//! Plans of the engine whose rows come in the same order each time.
//!
//! That is the order of the inputs, wherever the engine takes what comes first. What is in a partition, and
//! in which order, is then a function of the rows alone, and of how many partitions there are.

use crate::error::Error;
use crate::hash_exchange::HashExchange;
use crate::in_turn::{InOrder, KeepAll};
use crate::operator::Exec;
use crate::top_k::TopK;
use datafusion::common::config::ConfigOptions;
use datafusion::common::tree_node::{Transformed, TransformedResult, TreeNode};
use datafusion::common::{JoinType, Result as EngineResult};
use datafusion::physical_optimizer::PhysicalOptimizerRule;
use datafusion::physical_plan::coalesce_partitions::CoalescePartitionsExec;
use datafusion::physical_plan::execution_plan::{ChildrenPropertiesMode, ReplaceChildrenOptions};
use datafusion::physical_plan::joins::{HashJoinExec, NestedLoopJoinExec, PartitionMode};
use datafusion::physical_plan::limit::{GlobalLimitExec, LocalLimitExec};
use datafusion::physical_plan::repartition::RepartitionExec;
use datafusion::physical_plan::sorts::sort::SortExec;
use datafusion::physical_plan::sorts::sort_preserving_merge::SortPreservingMergeExec;
use datafusion::physical_plan::{ExecutionPlan, ExecutionPlanProperties, Partitioning};
use std::sync::Arc;

/// In place of what takes rows as they come.
#[derive(Debug)]
pub(crate) struct NotAsItComes;

impl PhysicalOptimizerRule for NotAsItComes {
    fn optimize(
        &self,
        plan: Arc<dyn ExecutionPlan>,
        _config: &ConfigOptions,
    ) -> EngineResult<Arc<dyn ExecutionPlan>> {
        let plan = plan.transform_up(in_order).data()?;
        Ok(match plan.output_partitioning().partition_count() {
            0 | 1 => plan,
            _ => Arc::new(Exec::new(InOrder, plan)),
        })
    }

    fn name(&self) -> &str {
        "not_as_it_comes"
    }

    fn schema_check(&self) -> bool {
        true
    }
}

fn in_order(node: Arc<dyn ExecutionPlan>) -> EngineResult<Transformed<Arc<dyn ExecutionPlan>>> {
    let instead = if let Some(merge) = node.downcast_ref::<CoalescePartitionsExec>() {
        coalesced(merge)
    } else if let Some(exchange) = node.downcast_ref::<RepartitionExec>() {
        by_hash(exchange)?
    } else if let Some(merge) = node.downcast_ref::<SortPreservingMergeExec>() {
        merged(merge)
    } else if let Some(sort) = node.downcast_ref::<SortExec>().and_then(TopK::instead_of) {
        Arc::new(sort)
    } else {
        return Ok(Transformed::no(node));
    };
    Ok(Transformed::yes(instead))
}

fn coalesced(merge: &CoalescePartitionsExec) -> Arc<dyn ExecutionPlan> {
    let fetch = ExecutionPlan::fetch(merge);
    let all = Arc::new(Exec::new(InOrder, first(merge.input(), fetch)));
    match fetch {
        Some(rows) => Arc::new(GlobalLimitExec::new(all, 0, Some(rows))),
        None => all,
    }
}

/// No more of each partition than is needed of all: each is computed to its end.
fn first(plan: &Arc<dyn ExecutionPlan>, fetch: Option<usize>) -> Arc<dyn ExecutionPlan> {
    match fetch {
        Some(rows) => Arc::new(LocalLimitExec::new(plan.clone(), rows)),
        None => plan.clone(),
    }
}

fn by_hash(exchange: &RepartitionExec) -> EngineResult<Arc<dyn ExecutionPlan>> {
    let Partitioning::Hash(keys, parts) = exchange.partitioning() else {
        let by = exchange.partitioning();
        return Err(Error::Internal(format!("an exchange by {by}, not by hash")).into());
    };
    let by_hash = Exec::new(HashExchange::new(keys, *parts), exchange.input().clone());
    Ok(match exchange.properties().output_ordering() {
        Some(order) => {
            let sort = SortExec::new(order.clone(), Arc::new(by_hash));
            Arc::new(sort.with_preserve_partitioning(true))
        }
        None => Arc::new(by_hash),
    })
}

/// Of rows that are the same to it, those of the first input come first.
fn merged(merge: &SortPreservingMergeExec) -> Arc<dyn ExecutionPlan> {
    let input = Arc::new(Exec::new(KeepAll, first(merge.input(), merge.fetch())));
    let stable = SortPreservingMergeExec::new(merge.expr().clone(), input);
    Arc::new(stable.with_fetch(merge.fetch()).with_round_robin_repartition(false))
}

/// Joins that give rows of the side that they hold, once the other side has ended. Where all partitions of
/// the other side share what is held, the last of them gives these: which one is that?
#[derive(Debug)]
pub(crate) struct HeldOnce;

impl PhysicalOptimizerRule for HeldOnce {
    fn optimize(
        &self,
        plan: Arc<dyn ExecutionPlan>,
        _config: &ConfigOptions,
    ) -> EngineResult<Arc<dyn ExecutionPlan>> {
        // It is not known yet how many partitions there will be.
        plan.transform_up(held_once).data()
    }

    fn name(&self) -> &str {
        "held_once"
    }

    fn schema_check(&self) -> bool {
        true
    }
}

fn held_once(node: Arc<dyn ExecutionPlan>) -> EngineResult<Transformed<Arc<dyn ExecutionPlan>>> {
    if let Some(join) = node.downcast_ref::<HashJoinExec>() {
        if *join.partition_mode() != PartitionMode::CollectLeft || !gives_held(*join.join_type()) {
            return Ok(Transformed::no(node));
        }
        if !join.null_aware {
            let parted =
                join.builder().with_partition_mode(PartitionMode::Partitioned).build_exec()?;
            return Ok(Transformed::yes(parted));
        }
    } else if let Some(join) = node.downcast_ref::<NestedLoopJoinExec>() {
        if !gives_held(*join.join_type()) {
            return Ok(Transformed::no(node));
        }
    } else {
        return Ok(Transformed::no(node));
    }
    let [held, other] = node.children()[..] else { return Ok(Transformed::no(node)) };
    let children = vec![held.clone(), Arc::new(Exec::new(InOrder, other.clone())) as _];
    let recompute = ReplaceChildrenOptions::new(ChildrenPropertiesMode::Recompute);
    Ok(Transformed::yes(node.replace_children(children, recompute)?))
}

fn gives_held(join: JoinType) -> bool {
    use JoinType as Join;
    matches!(join, Join::Left | Join::LeftAnti | Join::LeftSemi | Join::LeftMark | Join::Full)
}
