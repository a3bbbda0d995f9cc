//! The query engine as this crate uses it.

use crate::error::Result;
use crate::memory;
use arrow::compute::SortOptions;
use datafusion::common::Result as EngineResult;
use datafusion::common::config::ConfigOptions;
use datafusion::common::tree_node::{Transformed, TransformedResult, TreeNode};
use datafusion::execution::SessionStateBuilder;
use datafusion::physical_optimizer::PhysicalOptimizerRule;
use datafusion::physical_optimizer::optimizer::PhysicalOptimizer;
use datafusion::physical_plan::ExecutionPlan;
use datafusion::physical_plan::joins::{HashJoinExec, SortMergeJoinExec};
use datafusion::prelude::{SessionConfig, SessionContext};
use std::sync::{Arc, LazyLock};

/// What a sort sets aside at most to merge what it spilled: the engine's own default.
const MERGE_BYTES: usize = 10 << 20;

static SESSION: LazyLock<SessionContext> =
    LazyLock::new(|| SessionContext::new_with_config(config()));

/// For plans whose partitions are run alone. They hold no memory: row by row, there is none to take.
pub(crate) fn session() -> &'static SessionContext {
    &SESSION
}

/// How a query joins.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Joins {
    /// By a table of one side, which must have room in memory.
    Hash,
    /// By sorting both sides, which spills.
    SortMerge,
}

/// For queries, which take their memory from the budget and spill beyond it.
pub(crate) fn new_session(joins: Joins) -> Result<SessionContext> {
    let aside = (memory::budget()? / 8).min(MERGE_BYTES);
    let state = SessionStateBuilder::new()
        .with_config(config().with_sort_spill_reservation_bytes(aside))
        .with_runtime_env(memory::engine()?)
        .with_default_features();
    let state = match joins {
        Joins::Hash => state,
        Joins::SortMerge => {
            let mut rules = PhysicalOptimizer::new().rules;
            // First, so that the others see to it that its inputs are sorted.
            rules.insert(0, Arc::new(SortMergeJoins));
            state.with_physical_optimizer_rules(rules)
        }
    };
    Ok(SessionContext::new_with_state(state.build()))
}

fn config() -> SessionConfig {
    let off = false;
    SessionConfig::new()
        // One partition of a query's result is one order of its rows.
        .with_target_partitions(1)
        .with_round_robin_repartition(off)
        .set_bool("datafusion.execution.enable_file_stream_work_stealing", off)
        .set_bool("datafusion.optimizer.enable_dynamic_filter_pushdown", off)
        .set_bool("datafusion.sql_parser.map_string_types_to_utf8view", off)
}

/// The engine joins by hash alone where it has one partition, and its hash join does not spill.
#[derive(Debug)]
struct SortMergeJoins;

impl PhysicalOptimizerRule for SortMergeJoins {
    fn optimize(
        &self,
        plan: Arc<dyn ExecutionPlan>,
        _config: &ConfigOptions,
    ) -> EngineResult<Arc<dyn ExecutionPlan>> {
        plan.transform_up(|node| {
            let join = node.downcast_ref::<HashJoinExec>();
            // A sort-merge join knows nothing of `NOT IN` with missing values.
            let Some(join) = join.filter(|join| !join.null_aware) else {
                return Ok(Transformed::no(node));
            };
            let merged = SortMergeJoinExec::try_new(
                join.left().clone(),
                join.right().clone(),
                join.on().to_vec(),
                join.filter().cloned(),
                *join.join_type(),
                vec![SortOptions::default(); join.on().len()],
                join.null_equality(),
            )?;
            Ok(Transformed::yes(Arc::new(merged) as _))
        })
        .data()
    }

    fn name(&self) -> &str {
        "sort_merge_joins"
    }

    fn schema_check(&self) -> bool {
        true
    }
}
