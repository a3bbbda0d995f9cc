//! Every layer, model and loss against finite differences in `f64`.

use crate::{CNN, CPU, GRU, LSTM, MLP, build, normal, spec};
use candle_core::{CpuStorage, CustomOp1, DType, Layout, Shape, Tensor, Var};
use mobula_nn::layers::{Activation, Conv2d, Conv2dOptions, Dropout, Linear, max_pool2d};
use mobula_nn::{Error, Module, Params, Pass, Registry, gradcheck, loss};

const ACTIVATIONS: [Activation; 11] = [
    Activation::Identity,
    Activation::Relu,
    Activation::Relu6,
    Activation::LeakyRelu,
    Activation::Elu,
    Activation::Gelu,
    Activation::GeluTanh,
    Activation::Silu,
    Activation::Sigmoid,
    Activation::Tanh,
    Activation::Softplus,
];

fn input(shape: &[usize]) -> (String, Var) {
    ("x".to_owned(), Var::from_tensor(&normal("input", shape)).expect("var"))
}

fn params() -> Params {
    Params::with_dtype(3, &CPU, DType::F64)
}

/// Checks a module with respect to its input and its parameters.
fn check(module: &dyn Module, params: &Params, shape: &[usize]) {
    let (name, x) = input(shape);
    let mut vars = params.vars();
    vars.push((name, x.clone()));
    let pass = Pass::train(5, 2);
    gradcheck::check(&vars, || module.forward(&x, &pass)).expect("right gradients");
}

#[test]
fn linear() {
    let params = params();
    let layer = Linear::new(&params, 4, 3).expect("layer");
    check(&layer, &params, &[5, 4]);
    check(&layer, &params, &[2, 3, 4]);
    for activation in ACTIVATIONS {
        check(&layer.clone().with_activation(activation), &params, &[5, 4]);
    }
}

#[test]
fn convolutions() {
    for (kernel, stride, padding) in
        [(3, 1, 1), (3, 1, 0), (2, 2, 0), (3, 2, 1), (1, 1, 0), (3, 3, 2)]
    {
        let params = params();
        let options = Conv2dOptions { stride, padding, ..Conv2dOptions::default() };
        let layer = Conv2d::new(&params, 2, 3, kernel, options).expect("layer");
        check(&layer, &params, &[2, 2, 5, 6]);
    }
}

#[test]
fn pooling_and_activations() {
    let (name, x) = input(&[2, 3, 7, 5]);
    let vars = [(name, x.clone())];
    for kernel in [1, 2, 3] {
        gradcheck::check(&vars, || max_pool2d(&x, kernel)).expect("max_pool2d");
    }
    for activation in ACTIVATIONS {
        gradcheck::check(&vars, || activation.forward(&x)).expect("activation");
    }
}

#[test]
fn dropout() {
    let params = params();
    let layer = Dropout::new(&params.scope("d"), 0.4).expect("layer");
    check(&layer, &params, &[5, 7]);
}

#[test]
fn losses() {
    let (name, x) = input(&[4, 3]);
    let vars = [(name, x.clone())];
    let labels = Tensor::new(&[2u32, 0, 1, 1], &CPU).expect("labels");
    gradcheck::check(&vars, || loss::cross_entropy(&x, &labels)).expect("mean");
    gradcheck::check(&vars, || loss::cross_entropy_sum(&x, &labels)).expect("sum");
    gradcheck::check(&vars, || Ok((loss::cross_entropy(&x, &labels)? * 3.0)?)).expect("scaled");
}

#[test]
fn whole_models() {
    for (json, shape) in
        [(MLP, [3, 6].as_slice()), (CNN, &[2, 2, 7, 6]), (LSTM, &[2, 4, 3]), (GRU, &[2, 4, 3])]
    {
        let model = Registry::builtin().build_in(&spec(json), params()).expect("model");
        let (_, x) = input(shape);
        let pass = Pass::train(5, 2);
        gradcheck::check(&model.params().vars(), || model.forward(&x, &pass)).expect("gradients");
    }
}

#[test]
fn every_parameter_of_a_model_gets_a_gradient() {
    for (json, shape) in
        [(MLP, [3, 6].as_slice()), (CNN, &[2, 2, 7, 6]), (LSTM, &[2, 4, 3]), (GRU, &[2, 4, 3])]
    {
        let model = build(json).expect("model");
        let x = crate::normal_f32("input", shape);
        let y = model.forward(&x, &Pass::train(5, 2)).expect("forward");
        let gradients = y.sum_all().expect("sum").backward().expect("backward");
        assert_eq!(model.params().without_gradient(&gradients), [""; 0]);
        let cut = y.detach().sum_all().expect("sum").backward().expect("backward");
        assert_eq!(model.params().without_gradient(&cut), model.params().names());
    }
}

/// `x²` whose backward pass is off by `factor`, or missing.
struct Square {
    factor: f64,
    drops: bool,
}

impl CustomOp1 for Square {
    fn name(&self) -> &'static str {
        "square"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let squares = x.as_slice::<f64>()?.iter().map(|x| x * x).collect();
        Ok((CpuStorage::F64(squares), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, grad: &Tensor) -> candle_core::Result<Option<Tensor>> {
        if self.drops {
            return Ok(None);
        }
        ((x * grad)? * (2.0 * self.factor)).map(Some)
    }
}

/// The negative controls: the checker fails what is wrong, by little or altogether.
#[test]
fn the_checker_refuses_wrong_gradients() {
    let (name, x) = input(&[3]);
    let vars = [(name, x.clone())];
    let check =
        |factor, drops| gradcheck::check(&vars, || Ok(x.apply_op1(Square { factor, drops })?));
    check(1.0, false).expect("the right one passes");
    for factor in [1.0001, 0.5, 0.0, -1.0, f64::NAN] {
        assert!(matches!(check(factor, false), Err(Error::WrongGradient { .. })), "{factor}");
    }
    assert!(matches!(check(1.0, true), Err(Error::GradientCheck { .. })));
}

#[test]
fn the_checker_leaves_the_values_as_they_were() {
    let (name, x) = input(&[3]);
    let before: Vec<f64> = x.to_vec1().expect("values");
    gradcheck::check(&[(name, x.clone())], || Ok(x.sqr()?)).expect("right");
    assert_eq!(x.to_vec1::<f64>().expect("values"), before);
}

/// PyTorch's rule for ties: the first maximum gets all of the gradient, the others none.
#[test]
fn pooling_gives_ties_to_the_first() {
    let x = Var::new(&[[[[1f32, 1.0, 0.0], [1.0, 1.0, 0.0]]]], &CPU).expect("var");
    let y = max_pool2d(&x, 2).expect("pool");
    assert_eq!(y.dims(), [1, 1, 1, 1]);
    let gradients = (y * 3.0).expect("scale").backward().expect("backward");
    let gradient = gradients.get(x.as_tensor()).expect("gradient").flatten_all().expect("flat");
    assert_eq!(gradient.to_vec1::<f32>().expect("values"), [3.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
}

#[test]
fn pooling_does_not_hide_a_nan() {
    let x = Tensor::new(&[[[[1f32, f32::NAN], [9.0, 1.0]]]], &CPU).expect("tensor");
    let y = max_pool2d(&x, 2).expect("pool").flatten_all().expect("flat");
    assert!(y.to_vec1::<f32>().expect("values")[0].is_nan());
}
