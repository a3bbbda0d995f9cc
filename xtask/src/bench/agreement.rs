//! Whether two sides did the same work: without that, their times mean nothing.
//!
//! Two correct implementations round differently, and soon that is more than rounding: a
//! pre-activation of about 1e-7 is above zero here and below it there, a sample's gradient passes
//! a ReLU on one side only, and Adam, which divides by the size of the gradient, carries that into
//! every weight. So each side is compared with the same steps in `f64`, after few of them, by
//! medians (a flip moves a few elements, a mistake moves a whole tensor), and ours may not be much
//! further from that than PyTorch is in `f32`.

use anyhow::{Context, Result, bail, ensure};
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;

/// Steps after which weights are compared.
pub(super) const STRICT_STEPS: usize = 3;
/// Steps after which losses are compared.
pub(super) const LOSS_STEPS: usize = 10;
/// How many times as far as the peers' our weights may be from those of `f64`.
const WEIGHTS_FACTOR: f64 = 4.0;
/// The same of our loss. By then rounding has grown through more steps.
const LOSS_FACTOR: f64 = 10.0;
/// What weights differ by, in the median, if nothing but the last step rounds.
const ROUNDING: f64 = 2.5e-8;
/// What losses may differ by, as a part of them, however close the peers are.
const LOSS_ROUNDING: f64 = 1e-4;

/// How far two sets of weights are apart.
#[derive(Debug, PartialEq)]
struct Distance {
    /// The tensor whose elements differ most, in the median.
    tensor: String,
    /// That median.
    median: f64,
}

impl std::fmt::Display for Distance {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:.1e} or less in the median (most in {})", self.median, self.tensor)
    }
}

/// What a side has come to.
pub(super) struct Answer {
    /// After [`STRICT_STEPS`], as a safetensors file.
    pub(super) weights: Vec<u8>,
    /// After [`LOSS_STEPS`].
    pub(super) loss: f64,
}

/// How far an answer is from the truth.
#[derive(Debug, PartialEq)]
pub(super) struct Error {
    weights: Distance,
    /// As a part of the true loss.
    loss: f64,
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { weights, loss } = self;
        write!(
            f,
            "weights after {STRICT_STEPS} steps {weights}, loss after {LOSS_STEPS} {loss:.1e}"
        )
    }
}

impl Answer {
    pub(super) fn error(&self, truth: &Self) -> Result<Error> {
        let loss = (self.loss - truth.loss).abs() / truth.loss.abs();
        Ok(Error { weights: distance(&self.weights, &truth.weights)?, loss })
    }
}

impl Error {
    /// For an MLP, rounding gives 1e-8. The smallest mistake that we want to see, weight decay left
    /// out, gives 5e-7 after [`STRICT_STEPS`].
    pub(super) fn check(&self, peers: &[Self]) -> Result<()> {
        let most = |of: fn(&Self) -> f64, least: f64| peers.iter().map(of).fold(least, f64::max);
        let weights = WEIGHTS_FACTOR * most(|error| error.weights.median, ROUNDING);
        let loss = LOSS_FACTOR * most(|error| error.loss, LOSS_ROUNDING);
        ensure!(
            self.weights.median <= weights && self.loss <= loss,
            "ours is too far from the same steps in f64: {self}; weights within {weights:.1e} and \
             the loss within {loss:.1e} would do; the comparison is void"
        );
        Ok(())
    }
}

/// Compares two safetensors files of f32 with the same names and shapes.
fn distance(ours: &[u8], theirs: &[u8]) -> Result<Distance> {
    let (ours, theirs) = (SafeTensors::deserialize(ours)?, SafeTensors::deserialize(theirs)?);
    ensure!(ours.len() == theirs.len(), "ours has {} tensors, theirs {}", ours.len(), theirs.len());
    let mut worst = Distance { tensor: "none".to_owned(), median: 0.0 };
    for (name, a) in ours.tensors() {
        let b = theirs.tensor(&name).with_context(|| format!("theirs has no {name}"))?;
        let median = median_difference(&name, &a, &b)?;
        if median >= worst.median {
            worst = Distance { tensor: name, median };
        }
    }
    Ok(worst)
}

fn median_difference(name: &str, a: &TensorView<'_>, b: &TensorView<'_>) -> Result<f64> {
    if a.shape() != b.shape() || a.dtype() != b.dtype() {
        bail!(
            "{name}: ours is {:?} {:?}, theirs {:?} {:?}",
            a.dtype(),
            a.shape(),
            b.dtype(),
            b.shape()
        );
    }
    let differences: Vec<f64> = floats(a).zip(floats(b)).map(|(a, b)| (a - b).abs()).collect();
    // Sorting would put a NaN out of the median's way.
    ensure!(differences.iter().all(|d| d.is_finite()), "{name} holds values that are not finite");
    Ok(super::median(&differences))
}

fn floats(tensor: &TensorView<'_>) -> impl Iterator<Item = f64> {
    let words = tensor.data().chunks_exact(4);
    words.map(|b| f64::from(f32::from_le_bytes([b[0], b[1], b[2], b[3]])))
}

/// Errors when two losses differ by more than `tolerance` of theirs.
pub(super) fn same_loss(ours: f64, theirs: f64, tolerance: f64) -> Result<()> {
    let good = (ours - theirs).abs() <= tolerance * theirs.abs();
    ensure!(good, "the losses disagree: ours {ours}, theirs {theirs}; the comparison is void");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::Dtype;

    fn file(tensors: &[(&str, &[f32])]) -> Vec<u8> {
        let bytes = tensors.iter().map(|(name, values)| {
            (*name, values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>())
        });
        let bytes: Vec<_> = bytes.collect();
        let views = bytes.iter().map(|(name, bytes)| {
            (
                *name,
                TensorView::new(Dtype::F32, vec![bytes.len() / 4], bytes).expect("four bytes each"),
            )
        });
        safetensors::serialize(views, None).expect("serializes")
    }

    fn weights(weight: f32, bias: f32) -> Vec<u8> {
        file(&[("fc1.weight", &[weight; 1000]), ("fc1.bias", &[bias; 10])])
    }

    fn error(weights: &[u8], loss: f64) -> Error {
        let truth = Answer { weights: self::weights(0.0, 0.0), loss: 1.0 };
        Answer { weights: weights.to_vec(), loss }.error(&truth).expect("comparable")
    }

    #[test]
    fn rounding_passes_and_a_flip_too() {
        assert!(error(&weights(1e-8, 3e-8), 1.0).check(&[]).is_ok());
        let mut flipped = [0.0; 1000];
        flipped[..400].fill(1e-3);
        let flipped = file(&[("fc1.weight", &flipped), ("fc1.bias", &[0.0; 10])]);
        assert!(error(&flipped, 1.0).check(&[]).is_ok());
    }

    #[test]
    fn a_mistake_is_noticed_even_in_a_small_tensor() {
        for (weight, bias, tensor) in [(5e-7, 0.0, "fc1.weight"), (0.0, 1e-3, "fc1.bias")] {
            let error = error(&weights(weight, bias), 1.0);
            assert_eq!(error.weights.tensor, tensor);
            assert!(error.check(&[]).is_err(), "{error}");
        }
        assert!(error(&weights(0.0, 0.0), 1.01).check(&[]).is_err());
        assert!(error(&weights(0.0, 0.0), f64::NAN).check(&[]).is_err());
    }

    #[test]
    fn no_more_is_asked_of_ours_than_peers_reach() {
        let peer = || error(&weights(1e-6, 0.0), 1.01);
        assert!(error(&weights(3e-6, 0.0), 1.05).check(&[peer()]).is_ok());
        assert!(error(&weights(5e-6, 0.0), 1.05).check(&[peer()]).is_err());
        assert!(error(&weights(3e-6, 0.0), 1.2).check(&[peer()]).is_err());
    }

    #[test]
    fn names_shapes_and_nan_are_noticed() {
        let ours = file(&[("a", &[0.0; 2])]);
        assert!(distance(&ours, &file(&[("b", &[0.0; 2])])).is_err());
        assert!(distance(&ours, &file(&[("a", &[0.0; 3])])).is_err());
        assert!(distance(&ours, &file(&[("a", &[0.0, f32::NAN])])).is_err());
        assert!(distance(&ours, &file(&[("a", &[0.0; 2]), ("b", &[0.0])])).is_err());
    }

    #[test]
    fn losses_agree_within_the_tolerance() {
        assert!(same_loss(1.0005, 1.0, 1e-3).is_ok());
        assert!(same_loss(1.002, 1.0, 1e-3).is_err());
        assert!(same_loss(f64::NAN, 1.0, 1e-3).is_err());
    }
}
