//! Checks gradients against the slope of the function.

use crate::{Error, Result};
use candle_core::{DType, Tensor, Var};
use mobula_core::random::Stream;

/// The distance of the two points of a central difference.
const STEP: f64 = 1e-5;
/// The largest error of a gradient, absolute and relative to its size.
const TOLERANCE: f64 = 1e-5;

/// Compares the gradients of `f` with central differences, for every element of every variable.
///
/// `f` computes a tensor of any shape from the variables (`f64`, which are moved by 10⁻⁵ and set
/// back); its elements are weighted with fixed random numbers and added up. `f` must be a
/// function: dropout needs a fixed [`Pass`](crate::Pass). Errors with the first element that is
/// off by more than 10⁻⁵ of its size, or the first variable that has no gradient.
///
/// ```
/// use candle_core::{Device, Var};
///
/// let x = Var::new(&[0.5f64, -1.5], &Device::Cpu)?;
/// let vars = [("x".to_owned(), x.clone())];
/// mobula_nn::gradcheck::check(&vars, || Ok(x.sqr()?))?;
/// let wrong = mobula_nn::gradcheck::check(&vars, || Ok((x.sqr()? + x.detach().sqr()?)?));
/// assert!(wrong.is_err());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn check(vars: &[(String, Var)], f: impl Fn() -> Result<Tensor>) -> Result<()> {
    let gradients = weighted(&f()?)?.backward()?;
    for (name, var) in vars {
        let fail = |reason| Error::GradientCheck { name: name.clone(), reason };
        if var.dtype() != DType::F64 {
            return Err(fail("finite differences need f64"));
        }
        let gradient = gradients.get(var.as_tensor());
        let gradient = gradient.ok_or_else(|| fail("the backward pass gave it none"))?;
        check_one(name, var, &gradient.flatten_all()?.to_vec1()?, &f)?;
    }
    Ok(())
}

fn check_one(
    name: &str,
    var: &Var,
    gradient: &[f64],
    f: &impl Fn() -> Result<Tensor>,
) -> Result<()> {
    let values: Vec<f64> = var.as_tensor().flatten_all()?.to_vec1()?;
    for (index, got) in gradient.iter().copied().enumerate() {
        let at = |offset: f64| -> Result<f64> {
            let mut moved = values.clone();
            moved[index] += offset;
            set(var, moved)?;
            Ok(weighted(&f()?)?.to_scalar::<f64>()?)
        };
        let expected = (at(STEP)? - at(-STEP)?) / (2.0 * STEP);
        // Written so that a NaN on either side fails.
        let close = (got - expected).abs() <= TOLERANCE * expected.abs().max(1.0);
        if !close {
            set(var, values)?;
            return Err(Error::WrongGradient { name: name.to_owned(), index, expected, got });
        }
    }
    set(var, values)
}

fn set(var: &Var, values: Vec<f64>) -> Result<()> {
    Ok(var.set(&Tensor::from_vec(values, var.shape(), var.device())?)?)
}

/// Σ wᵢ yᵢ with weights in ±[0.5, 1.5): equal ones would hide errors that cancel.
fn weighted(y: &Tensor) -> Result<Tensor> {
    let mut draws = Stream::new(0, "gradcheck").at(0, 0);
    let mut weight = || {
        let sign = if draws.word() & 1 == 0 { 1.0 } else { -1.0 };
        sign * (0.5 + draws.uniform())
    };
    let weights: Vec<f64> = (0..y.elem_count()).map(|_| weight()).collect();
    let weights = Tensor::from_vec(weights, y.shape(), y.device())?;
    Ok((y * weights)?.sum_all()?)
}
