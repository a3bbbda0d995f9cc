//! The query engine as this crate uses it.

use crate::error::Result;
use crate::functions;
use crate::in_order::{HeldOnce, NotAsItComes};
use crate::memory;
use crate::runtime::{Tasks, threads};
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
    LazyLock::new(|| with_functions(SessionContext::new_with_config(config())));

/// For plans whose partitions are run alone. They hold no memory: row by row, there is none to take.
pub(crate) fn session() -> &'static SessionContext {
    &SESSION
}

/// How a query runs: in at most so many parts, as many at the same time as there are threads, and in the
/// same order of rows each time, which is that of the tables where there is one part. It spills, and then
/// groups come in another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// By joins that hold one side of a part in memory.
    HashJoin(usize),
    /// By joins that spill: the engine's hash join does not.
    SortMerge(usize),
}

impl Mode {
    /// What to do instead where there was too little memory.
    pub(crate) fn with_less_memory(self) -> Option<Self> {
        match self {
            Self::HashJoin(parts) => Some(Self::SortMerge(parts)),
            Self::SortMerge(1) => None,
            // What each of them takes at least is too much.
            Self::SortMerge(_) => Some(Self::SortMerge(1)),
        }
    }

    /// Partitions of a table at most.
    pub(crate) fn parts(self) -> usize {
        match self {
            Self::HashJoin(parts) | Self::SortMerge(parts) => parts,
        }
    }
}

/// For queries, which take their memory from the budget.
pub(crate) fn new_session(mode: Mode) -> Result<SessionContext> {
    functions::check()?;
    let parts = mode.parts();
    let aside = (memory::budget()? / 8 / parts.min(threads())).min(MERGE_BYTES);
    let state = SessionStateBuilder::new().with_default_features();
    let config = config()
        .with_target_partitions(parts)
        .with_sort_spill_reservation_bytes(aside)
        .with_extension(Arc::new(Tasks::default()));
    let state = state.with_config(config).with_runtime_env(memory::engine()?);
    let mut rules = PhysicalOptimizer::new().rules;
    // It takes for exact what statistics only say about: that there is a row behind a filter for one value,
    // or that nothing is larger than the largest of Parquet's, which know no NaN.
    rules.retain(|rule| rule.name() != "aggregate_statistics");
    if matches!(mode, Mode::SortMerge(_)) {
        // First, so that the others see to it that its inputs are sorted.
        rules.insert(0, Arc::new(SortMergeJoins));
    }
    // Behind what chooses the kind of a join, before what sees to its inputs.
    let chosen = rules.iter().position(|rule| rule.name() == "join_selection");
    rules.insert(chosen.map_or(0, |at| at + 1), Arc::new(HeldOnce));
    rules.push(Arc::new(NotAsItComes));
    let state = state.with_physical_optimizer_rules(rules);
    Ok(with_functions(SessionContext::new_with_state(state.build())))
}

fn with_functions(mut session: SessionContext) -> SessionContext {
    functions::register(&mut session).expect("a session takes any function");
    session
}

fn config() -> SessionConfig {
    let off = false;
    SessionConfig::new()
        .with_target_partitions(1)
        .with_round_robin_repartition(off)
        // Branches of a union one behind the other, not as they come.
        .set_bool("datafusion.optimizer.prefer_existing_union", true)
        // Files are listed in their order: of those listed first a limit chooses.
        .set_usize("datafusion.execution.meta_fetch_concurrency", 1)
        .set_bool("datafusion.execution.enable_file_stream_work_stealing", off)
        // A join would wait for all of its partitions to say what they hold: not all run at a time.
        .set_bool("datafusion.optimizer.enable_dynamic_filter_pushdown", off)
        // Rows may be of any width: where only their number is known, no side is held as a whole.
        .set_usize("datafusion.optimizer.hash_join_single_partition_threshold_rows", 0)
        .set_bool("datafusion.sql_parser.map_string_types_to_utf8view", off)
}

/// Joins of sorted inputs, which spill, in place of those by hash, which hold one side.
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
