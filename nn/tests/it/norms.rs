//! Normalisations: gradients, statistics, and workers that share a batch.

use crate::{CPU, normal};
use candle_core::{DType, Tensor, Var};
use mobula_core::BoxError;
use mobula_nn::layers::{Activation, BatchNorm, BatchNormOptions, GroupNorm, LayerNorm, RmsNorm};
use mobula_nn::{Gradients, Init, Module, Params, Pass, SyncSum, gradcheck};
use std::sync::{Arc, Barrier, Mutex};

fn params() -> Params {
    Params::with_dtype(3, &CPU, DType::F64)
}

/// Weights that are not all 1, so that a gradient which forgets them is wrong.
fn stir(params: &Params) {
    for (name, var) in params.vars() {
        let noise = normal(&name, var.dims());
        var.set(&(var.as_tensor() + noise * 0.3).expect("sum").detach()).expect("set");
    }
}

fn check(module: &dyn Module, params: &Params, shape: &[usize], pass: &Pass) {
    stir(params);
    let x = Var::from_tensor(&normal("x", shape)).expect("x");
    let mut vars = params.vars();
    vars.push(("x".to_owned(), x.clone()));
    gradcheck::check(&vars, || module.forward(&x, pass)).expect("right gradients");
}

#[test]
fn rows() {
    for shape in [[3, 5].as_slice(), &[2, 3, 17], &[1, 1], &[40, 33]] {
        let (layer, rms) = (params(), params());
        let features = shape[shape.len() - 1];
        let module = LayerNorm::new(&layer, features).expect("layer norm").with_eps(1e-2);
        check(&module, &layer, shape, &Pass::eval());
        let module = RmsNorm::new(&rms, features).expect("RMS norm").with_eps(1e-2);
        check(&module, &rms, shape, &Pass::eval());
    }
}

#[test]
fn groups() {
    for (groups, shape) in
        [(1, [2, 4, 3].as_slice()), (2, &[3, 4, 3, 2]), (4, &[2, 4, 5]), (2, &[3, 6])]
    {
        let params = params();
        let module = GroupNorm::new(&params, groups, shape[1]).expect("group norm").with_eps(1e-2);
        check(&module, &params, shape, &Pass::eval());
    }
}

#[test]
fn batches_in_training_and_evaluation() {
    for activation in [Activation::Identity, Activation::Tanh, Activation::Gelu] {
        for shape in [[4, 3].as_slice(), &[3, 2, 5], &[2, 3, 2, 3]] {
            let params = params();
            let options = BatchNormOptions { momentum: 0.0, eps: 1e-2 };
            let module = BatchNorm::new(&params, shape[1], options).expect("batch norm");
            let module = module.with_activation(activation);
            check(&module, &params, shape, &Pass::train(1, 1));
            check(&module, &params, shape, &Pass::eval());
        }
    }
}

#[test]
fn residuals_get_their_gradient() {
    let params = params();
    let options = BatchNormOptions { momentum: 0.0, eps: 1e-2 };
    let module = BatchNorm::new(&params, 2, options).expect("batch norm");
    let module = module.with_activation(Activation::Tanh);
    let init = Init::Normal { mean: 0.0, std: 1.0 };
    let skip = params.get((3, 2, 5), "skip", init).expect("skip");
    let x = params.get((3, 2, 5), "x", init).expect("x");
    let pass = Pass::train(1, 1);
    gradcheck::check(&params.vars(), || module.forward_residual(&x, &skip, &pass)).expect("right");
    let narrow = skip.narrow(2, 0, 4).expect("narrow");
    let error = module.forward_residual(&x, &narrow, &pass).expect_err("shape").to_string();
    assert!(error.contains("must have shape [3, 2, 5], got [3, 2, 4]"), "{error}");
}

/// The statistics of PyTorch's documentation: unbiased variance, momentum 0.1.
#[test]
fn running_statistics_follow_the_batches() {
    let params = params();
    let module = BatchNorm::new(&params, 1, BatchNormOptions::default()).expect("batch norm");
    let x = Tensor::new(&[[1.0f64], [2.0], [3.0], [6.0]], &CPU).expect("x");
    module.forward(&x, &Pass::train(1, 1)).expect("forward");
    let buffers: Vec<(String, Vec<f64>)> =
        params.buffers().iter().map(|(n, v)| (n.clone(), v.to_vec1().expect("values"))).collect();
    assert_eq!(buffers[0].0, "running_mean");
    assert!((buffers[0].1[0] - 0.3).abs() < 1e-12, "{buffers:?}");
    // Σ (x − 3)² = 4 + 1 + 0 + 9, by 3.
    assert!((buffers[1].1[0] - (0.9 + 0.1 * 14.0 / 3.0)).abs() < 1e-12, "{buffers:?}");
    let y = module.forward(&x, &Pass::eval()).expect("forward").flatten_all().expect("flat");
    let y: Vec<f64> = y.to_vec1().expect("values");
    assert!((y[3] - (6.0 - 0.3) / (buffers[1].1[0] + 1e-5).sqrt()).abs() < 1e-12);
    assert_eq!(params.names(), ["bias", "weight"], "statistics are not trained");
    let saved = tempfile::tempdir().expect("folder");
    let path = saved.path().join("weights.safetensors");
    params.save(&path).expect("save");
    let other = self::params();
    BatchNorm::new(&other, 1, BatchNormOptions::default()).expect("batch norm");
    other.load(&path).expect("load");
    assert_eq!(other.buffers()[1].1.to_vec1::<f64>().expect("values"), buffers[1].1);
}

/// One number says nothing of a variance: it must not pull the running one to 0.
#[test]
fn a_row_alone_moves_no_running_statistics() {
    let params = params();
    let module = BatchNorm::new(&params, 2, BatchNormOptions::default()).expect("batch norm");
    let x = Tensor::new(&[[5.0f64, -3.0]], &CPU).expect("x");
    let y = module.forward(&x, &Pass::train(1, 1)).expect("forward");
    assert_eq!(y.to_vec2::<f64>().expect("values"), [[0.0, 0.0]], "its own mean");
    let buffers: Vec<Vec<f64>> =
        params.buffers().iter().map(|(_, v)| v.to_vec1().expect("values")).collect();
    assert_eq!(buffers, [[0.0, 0.0], [1.0, 1.0]]);
}

/// Threads in the place of workers.
#[derive(Debug)]
struct Shared {
    barrier: Barrier,
    sums: Mutex<Vec<f64>>,
}

impl SyncSum for Shared {
    fn sum(&self, values: &mut [f64]) -> Result<(), BoxError> {
        let add = |sums: &mut Vec<f64>| {
            sums.resize(values.len(), 0.0);
            sums.iter_mut().zip(&*values).for_each(|(sum, value)| *sum += value);
        };
        add(&mut self.sums.lock().expect("lock"));
        self.barrier.wait();
        values.copy_from_slice(&self.sums.lock().expect("lock"));
        if self.barrier.wait().is_leader() {
            self.sums.lock().expect("lock").clear();
        }
        self.barrier.wait();
        Ok(())
    }
}

/// What a worker with some of the rows computes: outputs, gradients of weight and bias (to be
/// added up), gradient of the input.
fn share(rows: &Tensor, offset: usize, sync: Option<Arc<dyn SyncSum>>) -> [Vec<f64>; 3] {
    let params = params();
    let module = BatchNorm::new(&params, 3, BatchNormOptions::default()).expect("batch norm");
    stir(&params);
    let x = Var::from_tensor(rows).expect("x");
    let pass = Pass::train(1, 1);
    let pass = match sync {
        Some(sync) => pass.with_sync(sync),
        None => pass,
    };
    let y = module.forward(&x, &pass).expect("forward");
    let weights = normal("weights", &[6, 3, 4]).narrow(0, offset, rows.dims()[0]).expect("rows");
    let loss = (&y * weights).and_then(|y| y.sum_all()).expect("loss");
    let store = loss.backward().expect("backward");
    let flat = |t: &Tensor| t.flatten_all().expect("flat").to_vec1::<f64>().expect("values");
    let vars = params.vars();
    let own = vars.iter().flat_map(|(_, var)| flat(store.get(var).expect("gradient"))).collect();
    [flat(&y), own, flat(store.get(&x).expect("gradient"))]
}

#[test]
fn workers_that_sync_are_one_batch() {
    let x = normal("batch", &[6, 3, 4]);
    let whole = share(&x, 0, None);
    let shared: Arc<dyn SyncSum> =
        Arc::new(Shared { barrier: Barrier::new(2), sums: Mutex::default() });
    let part = |start: usize, len: usize| {
        let (x, shared) = (
            x.narrow(0, start, len).expect("rows").contiguous().expect("copy"),
            Arc::clone(&shared),
        );
        std::thread::spawn(move || share(&x, start, Some(shared)))
    };
    let (a, b) = (part(0, 2), part(2, 4));
    let (a, b) = (a.join().expect("a"), b.join().expect("b"));
    let sum: Vec<f64> = a[1].iter().zip(&b[1]).map(|(a, b)| a + b).collect();
    let both = [[&a[0][..], &b[0]].concat(), sum, [&a[2][..], &b[2]].concat()];
    for (both, whole) in both.iter().zip(&whole) {
        assert!(both.iter().zip(whole).all(|(a, b)| (a - b).abs() < 1e-10), "{both:?} {whole:?}");
    }
    // The control: without, each has a batch of its own.
    let alone = share(&x.narrow(0, 0, 2).expect("rows").contiguous().expect("copy"), 0, None);
    assert!(alone[0].iter().zip(&whole[0]).any(|(a, b)| (a - b).abs() > 1e-2));
}

#[test]
fn exempt_parameters_may_go_without_a_gradient() {
    let params = Params::new(1, &CPU);
    let used = params.get(2, "used", Init::Ones).expect("parameter");
    params.scope("a").get(2, "unused", Init::Ones).expect("parameter");
    let mut gradients = Gradients::zeros(&params);
    gradients.backward(&used.sum_all().expect("sum"), 1.0).expect("backward");
    assert_eq!(gradients.missing(), ["a.unused"]);
    params.scope("a").exempt("unused");
    let mut gradients = Gradients::zeros(&params);
    gradients.backward(&used.sum_all().expect("sum"), 1.0).expect("backward");
    assert!(gradients.missing().is_empty());
}
