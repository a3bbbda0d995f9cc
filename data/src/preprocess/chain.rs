//! Several preprocessors, one after another.

use super::{Preprocessor, Step, Transform};
use crate::Dataset;
use crate::error::Result;
use arrow::record_batch::RecordBatch;

/// Several steps, one after another.
///
/// ```
/// # use mobula_data::*;
/// # use arrow::array::{ArrayRef, Float64Array, RecordBatch, StringArray};
/// # use std::sync::Arc;
/// # let mass: ArrayRef = Arc::new(Float64Array::from(vec![Some(1.0), None, Some(3.0)]));
/// # let sex: ArrayRef = Arc::new(StringArray::from(vec!["f", "m", "f"]));
/// # let train = Dataset::from_batches([RecordBatch::try_from_iter([("mass", mass), ("sex", sex)])?])?;
/// let chain = Chain::fit(
///     [
///         SimpleImputer::mean(["mass"]),
///         StandardScaler::of(["mass"]),
///         OneHotEncoder::of(["sex"]),
///         Concatenator::of(["mass", "sex"], "features"),
///     ],
///     &train,
/// )?;
/// # assert_eq!(train.preprocess(&chain)?.schema()?.field(0).name(), "features");
/// # Ok::<(), mobula_data::Error>(())
/// ```
#[derive(Debug)]
pub struct Chain;

impl Chain {
    /// Fits each step on what the steps before it make of the rows.
    pub fn fit(steps: impl IntoIterator<Item = Step>, dataset: &Dataset) -> Result<Preprocessor> {
        let (mut dataset, mut fitted) = (dataset.clone(), Vec::new());
        for step in steps {
            let preprocessor = step.fit(&dataset)?;
            dataset = dataset.preprocess(&preprocessor)?;
            fitted.push(preprocessor);
        }
        Ok(Preprocessor::new(fitted))
    }
}

#[typetag::serde(name = "Chain")]
impl Transform for Vec<Preprocessor> {
    fn transform(&self, batch: &RecordBatch) -> Result<RecordBatch> {
        self.iter().try_fold(batch.clone(), |batch, step| step.transform(&batch))
    }

    fn without(&self, column: &str) -> Preprocessor {
        Preprocessor::new(self.iter().map(|step| step.without(column)).collect::<Self>())
    }

    fn classes(&self, column: &str) -> Option<Vec<String>> {
        self.iter().find_map(|step| step.classes(column))
    }
}
