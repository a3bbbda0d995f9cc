//! The context of one forward pass: evaluation, or a training step.

use mobula_core::BoxError;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// What a layer must know about the pass that it takes part in.
///
/// Everything random in a pass is a pure function of the seed, the step, the layer's name, the
/// row's index in the global batch and the feature's index. Hence a resumed run draws the same
/// numbers, and where each worker's rows lie next to each other in the global batch, a result does
/// not depend on how many workers share them.
///
/// ```
/// use mobula_nn::Pass;
///
/// assert!(Pass::eval().training().is_none());
/// // Step 12 on a worker whose rows are numbers 32 and up of the global batch.
/// let pass = Pass::train(7, 12).with_row_offset(32);
/// assert_eq!(pass.training().map(|t| t.row_offset), Some(32));
/// ```
#[derive(Clone, Debug, Default)]
pub struct Pass {
    training: Option<Training>,
    precision: Precision,
    sync: Option<Arc<dyn SyncSum>>,
}

/// What the matrix products of `f32` models are computed in, forwards and backwards.
///
/// A layer takes it from the [`Pass`] of its forward pass and keeps to it in its backward pass.
/// Everything else is `f32`: parameters, gradients, what layers give, norms, losses. `f64` models
/// take no notice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Precision {
    /// Numbers as they are.
    #[default]
    F32,
    /// Numbers rounded to `bf16`, 8 bits of them, where a product begins; products and sums in `f32`.
    ///
    /// On the CPU that needs AVX-512 with BF16 (AMD since Zen 4, Intel since Cooper Lake); products
    /// stay `f32` without, so they are never less exact than asked. So do those of up to 16 rows that
    /// take longer to read than to compute, such as a linear layer's. Denormal numbers become 0, and
    /// numbers beyond 3.39 · 10³⁸ infinite; what is infinite or no number stays so.
    Bf16,
}

/// Sums over the workers that train together, for statistics of the whole batch.
pub trait SyncSum: std::fmt::Debug + Send + Sync {
    /// Replaces `values` on every worker by their sums. All workers call it alike.
    fn sum(&self, values: &mut [f64]) -> Result<(), BoxError>;
}

/// The keys of the random numbers of a training step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Training {
    /// The run's seed.
    pub seed: u64,
    /// The global step.
    pub step: u64,
    /// The index in the global batch of this pass's first row.
    pub row_offset: u64,
}

impl Pass {
    /// Evaluation: nothing random.
    pub fn eval() -> Self {
        Self::default()
    }

    /// The training step `step` of a run seeded with `seed`.
    pub fn train(seed: u64, step: u64) -> Self {
        let training = Training { seed, step, row_offset: 0 };
        Self { training: Some(training), ..Self::default() }
    }

    /// Says that the first row of this pass is row `rows` of the step's global batch. No effect
    /// in evaluation.
    pub fn with_row_offset(self, rows: u64) -> Self {
        let training = self.training.map(|training| Training { row_offset: rows, ..training });
        Self { training, ..self }
    }

    /// Has layers with statistics of the batch, such as [`BatchNorm`](crate::layers::BatchNorm),
    /// take them over the rows of all workers. No effect in evaluation.
    pub fn with_sync(self, sync: Arc<dyn SyncSum>) -> Self {
        Self { sync: Some(sync), ..self }
    }

    /// Computes matrix products in `precision`. Default [`Precision::F32`].
    ///
    /// ```
    /// use mobula_nn::{Pass, Precision};
    ///
    /// let pass = Pass::train(7, 12).with_precision(Precision::Bf16);
    /// assert_eq!(pass.precision(), Precision::Bf16);
    /// ```
    pub fn with_precision(self, precision: Precision) -> Self {
        Self { precision, ..self }
    }

    /// What matrix products are computed in.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// What sums over the workers, if asked for.
    pub fn sync(&self) -> Option<&Arc<dyn SyncSum>> {
        self.sync.as_ref()
    }

    /// The keys of this training step, or `None` in evaluation.
    pub fn training(&self) -> Option<Training> {
        self.training
    }
}
