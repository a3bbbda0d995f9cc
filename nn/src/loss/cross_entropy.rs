//! Cross-entropy with class labels.

use super::LossSum;
use super::classes::{Costs, cost};
use super::weights::{repeated, to_f64};
use crate::{Error, Result};
use candle_core::{DType, Tensor};

/// How labels cost in [`cross_entropy_with`] and [`nll_with`]; as in PyTorch, apart from the
/// default of `ignored_label`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CrossEntropyOptions {
    /// The share of each label that is spread evenly over all classes, in `[0, 1]`. Default 0.
    ///
    /// Szegedy et al.: *Rethinking the Inception Architecture for Computer Vision* (CVPR 2016).
    pub label_smoothing: f64,
    /// What a label of each class counts, also in [`LossSum::weight`]: one finite number of at
    /// least 0 per class. Default: all 1.
    pub class_weights: Option<Vec<f64>>,
    /// The label of rows that do not count, such as padding; any number, a class or not. Default
    /// none: each label must be a class. (PyTorch's is −100.)
    pub ignored_label: Option<i64>,
}

/// The mean over the rows of [`cross_entropy_sum`]. Errors for 0 rows, where it is undefined.
///
/// ```
/// use candle_core::{Device, Tensor};
///
/// let logits = Tensor::new(&[[0f32, 0.0], [0.0, 0.0]], &Device::Cpu)?;
/// let labels = Tensor::new(&[0u32, 1], &Device::Cpu)?;
/// let loss = mobula_nn::loss::cross_entropy(&logits, &labels)?.to_scalar::<f32>()?;
/// assert!((loss - 2f32.ln()).abs() < 1e-6);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn cross_entropy(logits: &Tensor, labels: &Tensor) -> Result<Tensor> {
    cross_entropy_with(logits, labels, None, &CrossEntropyOptions::default())?.mean()
}

/// −Σ log softmax(logits)\[row, label\] in nats, a scalar of the logits' type.
///
/// `logits` are `[rows, .., classes]`, the classes last (PyTorch has them second), `labels` integers
/// `[rows, ..]` in `0..classes`, which is checked before anything is computed: a language model
/// gives `[rows, length, vocabulary]` and `[rows, length]`. The order of all sums depends on the
/// shape alone, so the bits do not depend on the number of threads. The loss of 0 rows is 0.
/// Workers with unequal shares divide the sum by the rows of all of them, which gives the gradient
/// of the global mean.
pub fn cross_entropy_sum(logits: &Tensor, labels: &Tensor) -> Result<Tensor> {
    Ok(cross_entropy_with(logits, labels, None, &CrossEntropyOptions::default())?.sum)
}

/// [`cross_entropy_sum`] with options and weights, and what to divide it by: the sum of each row's
/// weight times its label's class weight, of the rows that count.
///
/// `weights` have the labels' shape, or its first axes; they are constants. Rows of weight 0 are
/// not looked at.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use mobula_nn::loss::{CrossEntropyOptions, cross_entropy_with};
///
/// // Two sentences of a vocabulary of two; 9 pads the shorter one.
/// let logits = Tensor::new(&[[[0f32, 0.0], [0.0, 0.0]], [[0.0, 0.0], [7.0, 0.0]]], &Device::Cpu)?;
/// let labels = Tensor::new(&[[0u32, 1], [1, 9]], &Device::Cpu)?;
/// let options = CrossEntropyOptions { ignored_label: Some(9), ..Default::default() };
/// let loss = cross_entropy_with(&logits, &labels, None, &options)?;
/// assert_eq!(loss.weight, 3.0);
/// assert!((loss.mean()?.to_scalar::<f32>()? - 2f32.ln()).abs() < 1e-6);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn cross_entropy_with(
    logits: &Tensor,
    labels: &Tensor,
    weights: Option<&Tensor>,
    options: &CrossEntropyOptions,
) -> Result<LossSum> {
    let costs = options.costs(logits, labels, weights)?;
    let weight = costs.weight();
    Ok(LossSum { sum: cost(logits, costs, false)?, weight })
}

/// The mean of −log_probabilities\[row, label\], shapes as for [`cross_entropy_sum`]. Errors for 0
/// rows.
pub fn nll(log_probabilities: &Tensor, labels: &Tensor) -> Result<Tensor> {
    nll_with(log_probabilities, labels, None, &CrossEntropyOptions::default())?.mean()
}

/// The sum for [`nll`]: what [`cross_entropy_with`] gives for logits that are log-probabilities
/// already.
pub fn nll_with(
    log_probabilities: &Tensor,
    labels: &Tensor,
    weights: Option<&Tensor>,
    options: &CrossEntropyOptions,
) -> Result<LossSum> {
    let costs = options.costs(log_probabilities, labels, weights)?;
    let weight = costs.weight();
    Ok(LossSum { sum: cost(log_probabilities, costs, true)?, weight })
}

impl CrossEntropyOptions {
    fn costs(&self, logits: &Tensor, labels: &Tensor, weights: Option<&Tensor>) -> Result<Costs> {
        let smoothing = self.label_smoothing;
        if !(0.0..=1.0).contains(&smoothing) {
            return Err(Error::option("label_smoothing", smoothing, "a number from 0 to 1"));
        }
        let found = class_numbers(logits, labels, self.ignored_label)?;
        let classes = logits.dims()[logits.rank() - 1];
        let class_weights = self.class_weights.clone();
        if let Some(weights) = &class_weights {
            check_class_weights(weights, classes)?;
        }
        let mut rows = match weights {
            Some(weights) => to_f64(&repeated(weights, labels.dims())?)?,
            None => vec![1.0; found.len()],
        };
        for (weight, _) in rows.iter_mut().zip(&found).filter(|(_, label)| label.is_none()) {
            *weight = 0.0;
        }
        let labels = found.into_iter().map(Option::unwrap_or_default).collect();
        Ok(Costs { classes, labels, rows, class_weights, smoothing })
    }
}

fn check_class_weights(weights: &[f64], classes: usize) -> Result<()> {
    if weights.len() != classes {
        let expected = format!("[{classes}] as the logits have classes");
        return Err(Error::shape("class_weights", expected, &[weights.len()]));
    }
    match weights.iter().find(|weight| !(weight.is_finite() && **weight >= 0.0)) {
        Some(weight) => Err(Error::option("class_weights", weight, "finite numbers of at least 0")),
        None => Ok(()),
    }
}

/// The labels as class numbers, after every check of both shapes and of every label.
pub(crate) fn checked_labels(logits: &Tensor, labels: &Tensor) -> Result<Vec<u32>> {
    Ok(class_numbers(logits, labels, None)?.into_iter().flatten().collect())
}

/// The same; `None` for those that are ignored.
fn class_numbers(
    logits: &Tensor,
    labels: &Tensor,
    ignored: Option<i64>,
) -> Result<Vec<Option<u32>>> {
    let (rows, classes) = match logits.dims() {
        [rows @ .., classes] if !rows.is_empty() => (rows, *classes),
        dims => return Err(Error::shape("logits", "[rows, .., classes]", dims)),
    };
    if labels.dims() != rows {
        let expected = format!("{rows:?} as the logits have rows");
        return Err(Error::shape("labels", expected, labels.dims()));
    }
    if !matches!(labels.dtype(), DType::U8 | DType::U32 | DType::I64) {
        return Err(Error::LabelType { got: labels.dtype().as_str() });
    }
    let labels: Vec<i64> = labels.to_dtype(DType::I64)?.flatten_all()?.to_vec1()?;
    let number = |(row, label): (usize, i64)| match label {
        label if Some(label) == ignored => Ok(None),
        label if (0..classes as i64).contains(&label) => Ok(Some(label as u32)),
        label => Err(Error::LabelOutOfRange { label, row, classes }),
    };
    labels.into_iter().enumerate().map(number).collect()
}
