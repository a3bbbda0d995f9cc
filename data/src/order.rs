//! Orders of rows, as SQL says them.

use crate::error::{Error, Result};
use crate::exchange::Keys;
use crate::frame::quoted;
use crate::plan::must_be_deterministic;
use crate::query::{self, TABLE};
use crate::runtime::block_on;
use crate::session::{Mode, session};
use arrow::array::ArrayRef;
use arrow::compute::{SortOptions, cast};
use arrow::datatypes::{DataType, SchemaRef};
use arrow::record_batch::RecordBatch;
use arrow::row::SortField;
use datafusion::common::{DFSchema, TableReference};
use datafusion::datasource::empty::EmptyTable;
use datafusion::logical_expr::expr_rewriter::unnormalize_col;
use datafusion::logical_expr::{LogicalPlan, SortExpr};
use std::collections::BTreeSet;
use std::sync::Arc;

/// What follows `ORDER BY`, over the columns of a dataset.
#[derive(Debug)]
pub(crate) struct OrderBy {
    by: String,
    expressions: Vec<SortExpr>,
    types: Vec<DataType>,
    is_kept_together: bool,
}

impl OrderBy {
    pub(crate) fn new(schema: &SchemaRef, by: &str) -> Result<Self> {
        let (schema, by) = (schema.clone(), by.to_owned());
        block_on(async move {
            let table = Arc::new(EmptyTable::new(schema.clone())) as _;
            let tables = vec![(TableReference::bare(TABLE), table)];
            let query = format!("SELECT * FROM {TABLE} ORDER BY {by}");
            let frame = query::frame(tables, &query, Mode::HashJoin(1)).await?;
            let LogicalPlan::Sort(sort) = frame.logical_plan() else {
                return Err(Error::InvalidOption {
                    option: "the order of a sort",
                    expected: "SQL expressions, each with DESC and NULLS LAST where wanted"
                        .to_owned(),
                    got: by,
                });
            };
            let unnormalized = |of: &SortExpr| {
                SortExpr::new(unnormalize_col(of.expr.clone()), of.asc, of.nulls_first)
            };
            let expressions: Vec<_> = sort.expr.iter().map(unnormalized).collect();
            expressions.iter().try_for_each(|of| must_be_deterministic(&of.expr, &by))?;
            let mut order = Self { by, expressions, types: Vec::new(), is_kept_together: false };
            let keys = order.of(&RecordBatch::new_empty(schema))?;
            order.types = keys.iter().map(|key| key.data_type().clone()).collect();
            Ok(order)
        })
    }

    /// The order of these columns, in which rows that are the same in all are to stay together.
    pub(crate) fn of_groups(schema: &SchemaRef, keys: &[String]) -> Result<Self> {
        let keys: Vec<_> = keys.iter().map(|key| quoted(key)).collect();
        Ok(Self { is_kept_together: true, ..Self::new(schema, &keys.join(", "))? })
    }

    /// The columns that it looks at.
    pub(crate) fn columns(&self) -> BTreeSet<String> {
        let columns = self.expressions.iter().flat_map(|of| of.expr.column_refs());
        columns.map(|column| column.name.clone()).collect()
    }
}

impl Keys for OrderBy {
    fn fields(&self) -> Vec<SortField> {
        let field = |(of, data_type): (&SortExpr, &DataType)| {
            let options = SortOptions { descending: !of.asc, nulls_first: of.nulls_first };
            SortField::new_with_options(data_type.clone(), options)
        };
        self.expressions.iter().zip(&self.types).map(field).collect()
    }

    fn of(&self, batch: &RecordBatch) -> Result<Vec<ArrayRef>> {
        let failed = Error::sql(&self.by);
        let schema = DFSchema::try_from(batch.schema()).map_err(&failed)?;
        let key = |of: &SortExpr| {
            let expression = session().create_physical_expr(of.expr.clone(), &schema)?;
            let key = expression.evaluate(batch)?.into_array(batch.num_rows())?;
            match key.data_type() {
                DataType::Dictionary(_, values) => Ok(cast(&key, values)?),
                _ => Ok(key),
            }
        };
        self.expressions.iter().map(|of| key(of).map_err(&failed)).collect::<Result<_>>()
    }

    fn is_kept_together(&self) -> bool {
        self.is_kept_together
    }
}
