//! Plans of the engine whose rows come in the same order each time.
//!
//! That is the order of the inputs, wherever the engine takes what comes first. What is in a partition, and
//! in which order, is then a function of the rows alone, and of how many partitions there are.

use crate::error::Error;
use crate::hash_exchange::HashExchangeExec;
use crate::in_turn::{InOrderExec, KeptExec};
use datafusion::common::config::ConfigOptions;
use datafusion::common::tree_node::{Transformed, TransformedResult, TreeNode};
use datafusion::common::{JoinType, Result as EngineResult};
use datafusion::physical_optimizer::PhysicalOptimizerRule;
use datafusion::physical_plan::coalesce_partitions::CoalescePartitionsExec;
use datafusion::physical_plan::execution_plan::{ChildrenPropertiesMode, ReplaceChildrenOptions};
use datafusion::physical_plan::joins::{HashJoinExec, NestedLoopJoinExec, PartitionMode};
use datafusion::physical_plan::limit::GlobalLimitExec;
use datafusion::physical_plan::repartition::RepartitionExec;
use datafusion::physical_plan::sorts::sort::SortExec;
use datafusion::physical_plan::sorts::sort_preserving_merge::SortPreservingMergeExec;
use datafusion::physical_plan::{ExecutionPlan, ExecutionPlanProperties, Partitioning};
use std::sync::Arc;

/// In place of what takes rows as they come.
#[derive(Debug)]
pub(crate) struct InOrder;

impl PhysicalOptimizerRule for InOrder {
    fn optimize(
        &self,
        plan: Arc<dyn ExecutionPlan>,
        _config: &ConfigOptions,
    ) -> EngineResult<Arc<dyn ExecutionPlan>> {
        let plan = plan.transform_up(in_order).data()?;
        Ok(match plan.output_partitioning().partition_count() {
            0 | 1 => plan,
            _ => Arc::new(InOrderExec::new(plan)),
        })
    }

    fn name(&self) -> &str {
        "in_order"
    }

    fn schema_check(&self) -> bool {
        true
    }
}

fn in_order(node: Arc<dyn ExecutionPlan>) -> EngineResult<Transformed<Arc<dyn ExecutionPlan>>> {
    let instead = if let Some(merge) = node.downcast_ref::<CoalescePartitionsExec>() {
        limited(Arc::new(InOrderExec::new(merge.input().clone())), ExecutionPlan::fetch(merge))
    } else if let Some(exchange) = node.downcast_ref::<RepartitionExec>() {
        by_hash(exchange)?
    } else if let Some(merge) = node.downcast_ref::<SortPreservingMergeExec>() {
        merged(merge)
    } else {
        return Ok(Transformed::no(node));
    };
    Ok(Transformed::yes(instead))
}

fn limited(plan: Arc<dyn ExecutionPlan>, rows: Option<usize>) -> Arc<dyn ExecutionPlan> {
    match rows {
        Some(rows) => Arc::new(GlobalLimitExec::new(plan, 0, Some(rows))),
        None => plan,
    }
}

fn by_hash(exchange: &RepartitionExec) -> EngineResult<Arc<dyn ExecutionPlan>> {
    let Partitioning::Hash(keys, parts) = exchange.partitioning() else {
        let by = exchange.partitioning();
        return Err(Error::Internal(format!("an exchange by {by}, not by hash")).into());
    };
    // The first rows of each input were to save work. Which of the same they are depends on the threads.
    let input = match first_of_each(exchange.input()) {
        Some(sort) => sort.input(),
        None => exchange.input(),
    };
    let by_hash = Arc::new(HashExchangeExec::new(input.clone(), keys.clone(), *parts));
    Ok(match exchange.properties().output_ordering() {
        Some(order) => {
            Arc::new(SortExec::new(order.clone(), by_hash).with_preserve_partitioning(true))
        }
        None => by_hash,
    })
}

/// Of rows that are the same to it, those of the first input come first.
fn merged(merge: &SortPreservingMergeExec) -> Arc<dyn ExecutionPlan> {
    if let Some(sort) = first_of_each(merge.input()) {
        let input = Arc::new(InOrderExec::new(sort.input().clone()));
        return Arc::new(SortExec::new(sort.expr().clone(), input).with_fetch(merge.fetch()));
    }
    let input = Arc::new(KeptExec::new(merge.input().clone()));
    let stable = SortPreservingMergeExec::new(merge.expr().clone(), input);
    Arc::new(stable.with_fetch(merge.fetch()).with_round_robin_repartition(false))
}

/// A sort of each partition that gives the first rows alone. Its partitions tell each other what is not
/// among these.
fn first_of_each(plan: &Arc<dyn ExecutionPlan>) -> Option<&SortExec> {
    let sort = plan.downcast_ref::<SortExec>()?;
    (sort.preserve_partitioning() && sort.fetch().is_some()).then_some(sort)
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
    if other.output_partitioning().partition_count() == 1 {
        return Ok(Transformed::no(node));
    }
    let children = vec![held.clone(), Arc::new(InOrderExec::new(other.clone())) as _];
    let recompute = ReplaceChildrenOptions::new(ChildrenPropertiesMode::Recompute);
    Ok(Transformed::yes(node.replace_children(children, recompute)?))
}

fn gives_held(join: JoinType) -> bool {
    use JoinType as Join;
    matches!(join, Join::Left | Join::LeftAnti | Join::LeftSemi | Join::LeftMark | Join::Full)
}
