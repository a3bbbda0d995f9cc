//! One pass over a dataset: a statistic per column, computed per block and merged in block order,
//! so that its bits depend on the data alone and not on how many threads computed it.

use super::columns::index_of;
use crate::Dataset;
use crate::error::Result;
use arrow::array::ArrayRef;
use arrow::record_batch::RecordBatch;

/// Something that rows can be added to, and that can be merged.
pub(crate) trait Statistic: Clone + Send + Sync + 'static {
    fn add(&mut self, column: &str, array: &ArrayRef) -> Result<()>;
    fn merge(&mut self, later: Self);
}

/// The statistic of each column over all rows.
pub(crate) fn compute<S: Statistic + Default>(
    dataset: &Dataset,
    columns: &[String],
) -> Result<Vec<S>> {
    compute_from(dataset, columns, S::default())
}

/// The same, from a statistic of no rows.
pub(crate) fn compute_from<S: Statistic>(
    dataset: &Dataset,
    columns: &[String],
    none: S,
) -> Result<Vec<S>> {
    let schema = dataset.schema()?;
    for column in columns {
        index_of(&schema, column)?;
    }
    let total = vec![none; columns.len()];
    let (names, empty) = (columns.to_vec(), total.clone());
    let of_block = move |_, batches: Vec<RecordBatch>| {
        let mut statistics = empty.clone();
        for batch in &batches {
            for ((index, name), statistic) in names.iter().enumerate().zip(&mut statistics) {
                statistic.add(name, batch.column(index))?;
            }
        }
        Ok(statistics)
    };
    let merge = |total: &mut Vec<S>, block: Vec<S>| {
        total.iter_mut().zip(block).for_each(|(sum, part)| sum.merge(part));
    };
    dataset.select(columns.iter().cloned())?.fold_blocks(of_block, total, merge)
}
