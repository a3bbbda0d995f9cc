//! Other devices against this crate's kernels: values and gradients of every layer and loss, and a
//! training step of every architecture.
//!
//! On other devices all of them are composed of candle's operations. That is checked on the CPU
//! always, and on the first CUDA device with the feature `cuda`.

mod layers;
mod losses;
mod models;
mod precision;

use crate::layers::{BatchNorm, BatchNormOptions, Linear};
use crate::{Gradients, Model, Module, Params, Pass, Precision, Registry, Result, SyncSum, loss};
use candle_core::{DType, Device, Tensor, Var};
use layers::{Build, LAYERS};
use losses::LOSSES;
use mobula_core::BoxError;
use models::{MODELS, Sample};
use std::cell::Cell;
use std::sync::{Arc, Mutex};

thread_local! {
    static IS_COMPOSED: Cell<bool> = const { Cell::new(false) };
}

/// Whether this thread's layers run on the CPU as they do on devices without kernels.
pub(crate) fn is_composed() -> bool {
    IS_COMPOSED.get()
}

fn composed<R>(f: impl FnOnce() -> R) -> R {
    IS_COMPOSED.set(true);
    let result = f();
    IS_COMPOSED.set(false);
    result
}

/// Numbers by what they are of.
type Numbers = Vec<(String, Vec<f64>)>;

#[test]
fn candles_operations_agree_with_the_kernels() {
    assert_agreement(1e-9, |build| composed(|| evaluate(build, &Device::Cpu)));
}

#[test]
fn so_does_a_training_step_of_every_architecture() {
    let mut names: Vec<_> = MODELS.iter().map(|model| model.name.to_owned()).collect();
    names.dedup();
    assert_eq!(Registry::builtin().names(), names);
    assert_agreement_of_steps(1e-4, |model| composed(|| train(model, &Device::Cpu)));
}

/// Kernels keep nothing for a backward pass in `no_grad`; candle's operations do.
#[test]
fn composing_runs_no_kernels() {
    let is_tracked = || {
        let params = Params::new(1, &Device::Cpu);
        let y = crate::no_grad(|| (LAYERS[0].1)(&params)).expect("y");
        y.track_op()
    };
    assert!(!is_tracked() && composed(is_tracked));
}

/// Over two passes, with a parameter that only the second one needs: where gradients are, and that of all
/// there is, does not depend on who computes them. They may also stay where the parameters are.
#[test]
fn gradients_elsewhere_are_the_same() {
    let params = Params::new(1, &Device::Cpu);
    let layers = ["a", "b"].map(|name| Linear::new(&params.scope(name), 2, 2).expect(name));
    let x = Tensor::new(&[[1f32, -2.0], [0.5, 3.0]], &Device::Cpu).expect("x");
    let passes = |gradients: &mut Gradients| -> Result<()> {
        let y = layers[0].forward(&x, &Pass::eval())?;
        gradients.backward(&y.sqr()?.sum_all()?, 1.0)?;
        assert_eq!(gradients.missing(), ["b.bias", "b.weight"]);
        gradients.add_backward(&layers[1].forward(&y, &Pass::eval())?.sum_all()?, 0.5)
    };
    let mut kernels = Gradients::zeros(&params);
    passes(&mut kernels).expect("kernels");
    let mut elsewhere = Gradients::zeros(&params);
    let heard = Arc::new(Mutex::new(Vec::new()));
    let hears = Arc::clone(&heard);
    elsewhere.set_listener(Some(Box::new(move |at, values: &[f32]| {
        hears.lock().expect("lock").push((at, values.to_vec()));
    })));
    composed(|| passes(&mut elsewhere)).expect("composed");
    let pairs = elsewhere.as_reduced().iter().zip(kernels.as_reduced());
    assert!(pairs.clone().all(|(a, b)| (a - b).abs() < 1e-5), "{:?}", pairs.collect::<Vec<_>>());
    let last = heard.lock().expect("lock").split_off(2);
    let values = elsewhere.values().to_vec();
    let all = kernels.places().iter().map(|(_, place)| values[place.clone()].to_vec());
    assert_eq!(last, all.enumerate().collect::<Vec<_>>());
    // What was done to them between two passes stays done.
    elsewhere.values_mut().fill(0.0);
    let y = composed(|| layers[0].forward(&x, &Pass::eval())).expect("y").sum_all().expect("sum");
    composed(|| elsewhere.add_backward(&y, 0.0)).expect("another pass");
    assert!(elsewhere.values().iter().all(|value| *value == 0.0));

    elsewhere.stay_elsewhere(true);
    elsewhere.clear();
    composed(|| passes(&mut elsewhere)).expect("composed");
    assert!(elsewhere.values().iter().all(|value| *value == 0.0), "they stay");
    assert_eq!(elsewhere.loss(), kernels.loss());
    let stayed = elsewhere.take_elsewhere().expect("taken").to_vec1::<f32>().expect("values");
    assert_eq!(stayed, values);
    elsewhere.start();
    let none = elsewhere.take_elsewhere().expect("none").to_vec1::<f32>().expect("values");
    assert_eq!(none, vec![0.0; stayed.len()]);
}

#[derive(Debug)]
struct Alone;

impl SyncSum for Alone {
    fn sum(&self, _: &mut [f64]) -> std::result::Result<(), BoxError> {
        Ok(())
    }
}

/// Statistics of one worker's rows must not pass for those of all.
#[test]
fn composed_batch_norms_refuse_to_sync() {
    let forward = || {
        let params = Params::new(1, &Device::Cpu);
        let norm = BatchNorm::new(&params, 2, BatchNormOptions::default())?;
        let x = Tensor::zeros((3, 2), DType::F32, &Device::Cpu)?;
        norm.forward(&x, &Pass::train(1, 1).with_sync(Arc::new(Alone)))
    };
    assert!(forward().is_ok(), "the kernel syncs");
    let error = composed(forward).expect_err("refused").to_string();
    assert!(error.contains("on the CPU alone"), "{error}");
}

#[cfg(feature = "cuda")]
mod cuda {
    use super::*;
    use mobula_core::Resources;

    /// The first device, if there is one; then it has to work.
    fn device() -> Option<Device> {
        if Resources::of_this_machine().gpus == 0.0 {
            eprintln!("SKIPPED: this machine has no CUDA device, so nothing ran on one");
            return None;
        }
        Some(Device::new_cuda(0).expect("the first CUDA device"))
    }

    #[test]
    fn a_cuda_device_agrees_with_the_kernels() {
        let Some(device) = device() else { return };
        assert_agreement(1e-8, |build| evaluate(build, &device));
    }

    #[test]
    fn so_does_a_training_step_of_every_architecture() {
        let Some(device) = device() else { return };
        assert_agreement_of_steps(1e-3, |model| train(model, &device));
    }
}

/// Of every layer and loss, with a list of what differs.
fn assert_agreement(tolerance: f64, other: impl Fn(Build) -> Result<Numbers>) {
    let differs = LAYERS.iter().chain(LOSSES).filter_map(|(name, build)| {
        let kernel = evaluate(*build, &Device::Cpu).expect("the kernel's");
        difference(&kernel, other(*build), tolerance).map(|text| format!("{name}: {text}"))
    });
    assert_eq!(differs.collect::<Vec<_>>(), [""; 0]);
}

fn assert_agreement_of_steps(tolerance: f64, other: impl Fn(&Sample) -> Result<Numbers>) {
    let differs = MODELS.iter().filter_map(|model| {
        let kernel = train(model, &Device::Cpu).expect("the kernel's");
        difference(&kernel, other(model), tolerance)
            .map(|text| format!("{} {}: {text}", model.name, model.options))
    });
    assert_eq!(differs.collect::<Vec<_>>(), [""; 0]);
}

/// The value, the gradients of all parameters, and what became of the buffers, in `f64`.
fn evaluate(build: Build, device: &Device) -> Result<Numbers> {
    let params = Params::with_dtype(3, device, DType::F64);
    let y = build(&params)?;
    let weights: Vec<f64> = (0..y.elem_count()).map(|at| (at as f64 + 1.0).sin()).collect();
    let gradients = (&y * Tensor::from_vec(weights, y.shape(), device)?)?.backward()?;
    let mut all = vec![("the value".to_owned(), numbers(&y)?)];
    for (name, var) in params.vars() {
        // None at all shows as a difference in length.
        let gradient = gradients.get(&var).map(numbers).transpose()?;
        all.push((name, gradient.unwrap_or_default()));
    }
    all.extend(read(params.buffers())?);
    Ok(all)
}

/// The gradients of a step, what it makes of the parameters, and what they then predict.
fn train(sample: &Sample, device: &Device) -> Result<Numbers> {
    train_in(Precision::F32, sample, device)
}

fn train_in(precision: Precision, sample: &Sample, device: &Device) -> Result<Numbers> {
    let Sample { name, options, .. } = sample;
    let spec = format!(r#"{{"architecture": {name:?}, "options": {options}}}"#);
    let model = Model::build(&serde_json::from_str(&spec).expect("a spec"), 7, device)?;
    let x = sample.input()?.to_dtype(DType::F32)?.to_device(device)?;
    let logits = model.forward(&x, &Pass::train(7, 0).with_precision(precision))?;
    let shape = &logits.dims()[..logits.rank() - 1];
    let labels = (0..shape.iter().product::<usize>() as u32).map(|at| at % 3).collect();
    let loss = loss::cross_entropy(&logits, &Tensor::from_vec(labels, shape, device)?)?;
    let mut gradients = Gradients::zeros(model.params());
    gradients.backward(&loss, 1.0)?;
    assert_eq!(gradients.missing(), [""; 0]);
    let flat = gradients.as_reduced_mut().iter().copied().map(f64::from).collect();
    let mut all = vec![("the gradients and the loss".to_owned(), flat)];
    for ((_, var), (_, place)) in model.params().vars().iter().zip(gradients.places()) {
        let gradient = &gradients.values()[place.clone()];
        let gradient = Tensor::from_slice(gradient, var.shape(), device)?;
        var.set(&(var.as_tensor() - (gradient * 0.1)?)?)?;
    }
    all.push(("the prediction".to_owned(), numbers(&model.predict(&x)?)?));
    all.extend(read(model.params().state())?);
    Ok(all)
}

fn read(vars: Vec<(String, Var)>) -> Result<Numbers> {
    vars.into_iter().map(|(name, var)| Ok((name, numbers(&var)?))).collect()
}

fn numbers(tensor: &Tensor) -> Result<Vec<f64>> {
    Ok(tensor.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?)
}

/// The first difference that is larger than `tolerance`, absolute and relative.
fn difference(kernel: &Numbers, other: Result<Numbers>, tolerance: f64) -> Option<String> {
    let other = match other {
        Ok(other) => other,
        Err(error) => return Some(error.to_string()),
    };
    for ((name, a), (_, b)) in kernel.iter().zip(&other) {
        if a.len() != b.len() {
            return Some(format!("{name} has {} numbers, the kernel's {}", b.len(), a.len()));
        }
        let is_same = |a: f64, b: f64| {
            (a - b).abs() <= tolerance * a.abs().max(1.0) || (a.is_nan() && b.is_nan())
        };
        if let Some(at) = (0..a.len()).find(|at| !is_same(a[*at], b[*at])) {
            return Some(format!("{name}[{at}] is {}, the kernel's {}", b[at], a[at]));
        }
    }
    None
}
