//! Blocks that no row of passes the filters of a query, as their constants tell.

use arrow::array::AsArray;
use arrow::record_batch::RecordBatch;
use datafusion::catalog::Session;
use datafusion::common::{DFSchema, Result as EngineResult};
use datafusion::logical_expr::expr_rewriter::unnormalize_col;
use datafusion::logical_expr::{Expr, TableProviderFilterPushDown};
use serde::{Deserialize, Serialize};

/// Whether each block is left out; those behind the last are not.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct LeftOut(Vec<bool>);

impl LeftOut {
    pub(crate) fn has(&self, block: usize) -> bool {
        self.0.get(block).is_some_and(|out| *out)
    }

    /// Those by filters over the columns that have one value in all rows of a block.
    pub(crate) fn by(
        constants: Option<&RecordBatch>,
        state: &dyn Session,
        filters: &[Expr],
    ) -> EngineResult<Self> {
        let Some(constants) = constants else { return Ok(Self::default()) };
        let schema = DFSchema::try_from(constants.schema())?;
        let mut out = vec![false; constants.num_rows()];
        for filter in filters.iter().filter(|filter| is_of(filter, constants)) {
            let passes = state
                .create_physical_expr(unnormalize_col(filter.clone()), &schema)
                .and_then(|filter| filter.evaluate(constants)?.into_array(out.len()));
            // What fails here fails again for the rows that it fails for.
            let Some(passes) = passes.as_ref().ok().and_then(|passes| passes.as_boolean_opt())
            else {
                continue;
            };
            for (out, passes) in out.iter_mut().zip(passes) {
                *out |= passes != Some(true);
            }
        }
        Ok(Self(out))
    }

    /// Which filters help. The engine filters what comes, too.
    pub(crate) fn pushdown(
        constants: Option<&RecordBatch>,
        filters: &[&Expr],
    ) -> Vec<TableProviderFilterPushDown> {
        let is_known = |filter: &Expr| constants.is_some_and(|of| is_of(filter, of));
        let kind = |filter: &&Expr| match is_known(filter) {
            true => TableProviderFilterPushDown::Inexact,
            false => TableProviderFilterPushDown::Unsupported,
        };
        filters.iter().map(kind).collect()
    }
}

/// Whether a filter asks for these columns alone.
fn is_of(filter: &Expr, constants: &RecordBatch) -> bool {
    filter.column_refs().iter().all(|column| constants.column_by_name(&column.name).is_some())
}
