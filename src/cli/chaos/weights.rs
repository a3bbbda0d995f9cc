//! Whether two runs ended with the same weights.

use anyhow::Context;
use candle_core::safetensors::BufferedSafetensors;
use candle_core::{DType, Device};
use mobula::{Checkpoint, RunDir};
use serde::Serialize;
use std::collections::BTreeSet;
use std::path::Path;

const FILE: &str = "model.safetensors";

/// What two files of tensors have in common. Steps are those of the checkpoints.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Comparison {
    pub(super) steps: [u64; 2],
    pub(super) tensors: usize,
    pub(super) different: Vec<Difference>,
}

/// A tensor that is not the same in both.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Difference {
    pub(super) tensor: String,
    /// The largest difference of two numbers; none where there are none to compare.
    pub(super) largest: Option<f64>,
    pub(super) reason: String,
}

impl Comparison {
    /// To the bit, and at the same step.
    pub(super) fn is_identical(&self) -> bool {
        self.different.is_empty() && self.steps[0] == self.steps[1]
    }
}

/// Compares the newest checkpoints of two runs, tensor by tensor.
pub(super) fn compare(reference: &RunDir, disturbed: &RunDir) -> anyhow::Result<Comparison> {
    let checkpoints = [newest(reference)?, newest(disturbed)?];
    let files = [read(&checkpoints[0].file(FILE))?, read(&checkpoints[1].file(FILE))?];
    let steps = checkpoints.map(|checkpoint| checkpoint.step());
    let tensors = |file: &BufferedSafetensors| -> BTreeSet<String> {
        file.tensors().into_iter().map(|(name, _)| name).collect()
    };
    let names: BTreeSet<String> = &tensors(&files[0]) | &tensors(&files[1]);
    let different = names.iter().filter_map(|name| difference(name, &files).transpose());
    Ok(Comparison { steps, tensors: names.len(), different: different.collect::<Result<_, _>>()? })
}

fn newest(run: &RunDir) -> anyhow::Result<Checkpoint> {
    let newest = run.checkpoints(1).latest()?;
    newest.with_context(|| {
        let folder = run.path().display();
        format!("{folder} has no checkpoint to compare the weights of: {}", CHECKPOINTS_HINT)
    })
}

const CHECKPOINTS_HINT: &str = "a trainer with a run takes one at the end of each epoch";

fn read(path: &Path) -> anyhow::Result<BufferedSafetensors> {
    let bytes = std::fs::read(path).with_context(|| format!("reading {}", path.display()))?;
    BufferedSafetensors::new(bytes).with_context(|| format!("reading {}", path.display()))
}

fn difference(
    name: &str,
    files: &[BufferedSafetensors; 2],
) -> candle_core::Result<Option<Difference>> {
    let different = |largest, reason: &str| {
        Some(Difference { tensor: name.to_owned(), largest, reason: reason.to_owned() })
    };
    let (a, b) = match (files[0].get(name), files[1].get(name)) {
        (Ok(a), Ok(b)) => (a, b),
        (Ok(_), Err(_)) => return Ok(different(None, "only in the reference")),
        _ => return Ok(different(None, "only in the disturbed run")),
    };
    if a.dtype() != b.dtype() || a.shape() != b.shape() {
        return Ok(different(None, "of another type or shape"));
    }
    if a.data() == b.data() {
        return Ok(None);
    }
    let numbers = |file: &BufferedSafetensors| {
        let tensor = file.load(name, &Device::Cpu)?;
        tensor.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()
    };
    let (a, b) = (numbers(&files[0])?, numbers(&files[1])?);
    Ok(different(Some(largest(&a, &b)), "of other numbers"))
}

/// NaN if a number is NaN in one and not in the other.
fn largest(a: &[f64], b: &[f64]) -> f64 {
    let distances = a.iter().zip(b).map(|(a, b)| match (a.is_nan(), b.is_nan()) {
        (true, true) => 0.0,
        _ if a == b => 0.0,
        _ => (a - b).abs(),
    });
    distances.fold(0.0, |most, distance| match most.is_nan() || distance.is_nan() {
        true => f64::NAN,
        false => most.max(distance),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Tensor;
    use std::collections::HashMap;

    /// A run in its own folder whose newest checkpoint has these tensors.
    fn run(root: &Path, name: &str, step: u64, tensors: &[(&str, &[f32])]) -> RunDir {
        let run = RunDir::create(root, name, 1, &()).expect("a run");
        let tensors: HashMap<String, Tensor> = tensors
            .iter()
            .map(|(name, values)| {
                let tensor = Tensor::from_slice(values, values.len(), &Device::Cpu);
                ((*name).to_owned(), tensor.expect("a tensor"))
            })
            .collect();
        let save = |folder: &Path| {
            candle_core::safetensors::save(&tensors, folder.join(FILE)).expect("saved");
            Ok(())
        };
        run.checkpoints(2).save(step, save).expect("a checkpoint");
        run
    }

    #[test]
    fn every_difference_is_named() {
        let root = tempfile::tempdir().expect("temporary folder");
        let a = [1.0, f32::NAN, 0.0];
        let reference = [("a", &a[..]), ("b", &[1.0, 2.0]), ("c", &[1.0]), ("d", &[5.0])];
        let reference = run(root.path(), "reference", 7, &reference);
        let same = compare(&reference, &reference).expect("checkpoints");
        assert!(same.is_identical(), "{same:?}");
        assert_eq!((same.tensors, same.steps), (4, [7, 7]));

        let disturbed = [("a", &a[..]), ("b", &[1.0, 2.5]), ("c", &[1.0, 1.0]), ("e", &[5.0])];
        let disturbed = run(root.path(), "disturbed", 7, &disturbed);
        let compared = compare(&reference, &disturbed).expect("checkpoints");
        assert!(!compared.is_identical());
        let found: Vec<(&str, Option<f64>)> =
            compared.different.iter().map(|d| (d.tensor.as_str(), d.largest)).collect();
        assert_eq!(found, [("b", Some(0.5)), ("c", None), ("d", None), ("e", None)]);
    }

    #[test]
    fn other_bits_of_the_same_number_differ_and_so_does_another_step() {
        let root = tempfile::tempdir().expect("temporary folder");
        let reference = run(root.path(), "reference", 7, &[("a", &[0.0])]);
        let zero = run(root.path(), "zero", 7, &[("a", &[-0.0])]);
        let compared = compare(&reference, &zero).expect("checkpoints");
        assert_eq!(compared.different[0].largest, Some(0.0));
        let later = run(root.path(), "later", 8, &[("a", &[0.0])]);
        assert!(!compare(&reference, &later).expect("checkpoints").is_identical());
        let empty = RunDir::create(root.path(), "empty", 1, &()).expect("a run");
        let error = compare(&reference, &empty).expect_err("no checkpoint").to_string();
        assert!(error.contains("empty has no checkpoint"), "{error}");
    }

    #[test]
    fn nan_in_one_is_the_largest_difference() {
        assert_eq!(largest(&[f64::NAN, 1.0], &[f64::NAN, 3.0]), 2.0);
        assert!(largest(&[f64::NAN, 1.0], &[1.0, 3.0]).is_nan());
        assert_eq!(largest(&[f64::INFINITY], &[f64::INFINITY]), 0.0);
    }
}
