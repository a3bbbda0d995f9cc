//! One pass over a dataset: a statistic per column, computed per block and merged in block order,
//! so that its bits depend on the data alone and not on how many threads computed it.

use super::columns::index_of;
use crate::Dataset;
use crate::error::Result;
use arrow::array::ArrayRef;

/// Something that rows can be added to, and that can be merged.
pub(crate) trait Statistic: Default + Send + 'static {
    fn add(&mut self, column: &str, array: &ArrayRef) -> Result<()>;
    fn merge(&mut self, later: Self);
}

/// The statistic of each column over all rows.
pub(crate) fn compute<S: Statistic>(dataset: &Dataset, columns: &[String]) -> Result<Vec<S>> {
    let schema = dataset.schema()?;
    for column in columns {
        index_of(&schema, column)?;
    }
    let names = columns.to_vec();
    let of_block = move |_, batches: Vec<arrow::record_batch::RecordBatch>| {
        let mut statistics: Vec<S> = names.iter().map(|_| S::default()).collect();
        for batch in &batches {
            for ((index, name), statistic) in names.iter().enumerate().zip(&mut statistics) {
                statistic.add(name, batch.column(index))?;
            }
        }
        Ok(statistics)
    };
    let mut total: Vec<S> = columns.iter().map(|_| S::default()).collect();
    for block in dataset.select(columns.iter().cloned())?.map_blocks(of_block)? {
        total.iter_mut().zip(block).for_each(|(sum, part)| sum.merge(part));
    }
    Ok(total)
}
