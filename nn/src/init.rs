//! How parameters start: seeded, and independent of the order in which they are created.

use crate::{Error, Result};
use mobula_core::random::Stream;

/// The distribution of a new parameter's values.
///
/// `fan_in` is the number of inputs of one output: the product of all dimensions but the first
/// (`[out, in]` for a linear layer, `[out, in, height, width]` for a convolution). `fan_out` is
/// the first dimension times the product of those after the second.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Init {
    /// All 0.
    Zeros,
    /// All 1.
    Ones,
    /// All the same.
    Const(f64),
    /// Uniform in `[low, high)`.
    Uniform {
        /// The least value.
        low: f64,
        /// The bound above all values.
        high: f64,
    },
    /// Normal.
    Normal {
        /// The mean.
        mean: f64,
        /// The standard deviation.
        std: f64,
    },
    /// Uniform within ±√(6 / ((1 + a²) · fan_in)), for layers before a leaky ReLU of slope `a`.
    ///
    /// He, Zhang, Ren, Sun: *Delving Deep into Rectifiers* (ICCV 2015), equation 15.
    KaimingUniform {
        /// The slope of the rectifier below 0; 0 for ReLU.
        negative_slope: f64,
    },
    /// Uniform within ±gain · √(6 / (fan_in + fan_out)).
    ///
    /// Glorot, Bengio: *Understanding the difficulty of training deep feedforward neural
    /// networks* (AISTATS 2010), equation 16.
    XavierUniform {
        /// 1 for linear and tanh layers.
        gain: f64,
    },
}

impl Init {
    /// What PyTorch gives the weights of `Linear` and `Conv2d`: Kaiming with a = √5, which is
    /// uniform within ±1/√fan_in.
    pub fn default_weight() -> Self {
        Self::KaimingUniform { negative_slope: 5f64.sqrt() }
    }

    /// What PyTorch gives their biases: uniform within ±1/√fan_in of the weight.
    pub fn default_bias(fan_in: usize) -> Self {
        Self::symmetric(1.0 / (fan_in as f64).sqrt())
    }

    /// The values of the parameter `name` under `seed`, a pure function of these arguments.
    pub(crate) fn values(self, seed: u64, name: &str, shape: &[usize]) -> Result<Vec<f64>> {
        let mut draws = Stream::new(seed, &format!("init {name}")).at(0, 0);
        let mut values = vec![0.0; shape.iter().product()];
        match self.resolve(name, shape)? {
            Self::Uniform { low, high } => {
                values.fill_with(|| low + (high - low) * draws.uniform());
            }
            Self::Normal { mean, std } => values.fill_with(|| mean + std * draws.normal()),
            Self::Ones => values.fill(1.0),
            Self::Const(value) => values.fill(value),
            _ => {}
        }
        Ok(values)
    }

    /// Turns what depends on the fans into a plain uniform distribution.
    fn resolve(self, name: &str, shape: &[usize]) -> Result<Self> {
        Ok(match self {
            Self::KaimingUniform { negative_slope } => {
                let (fan_in, _) = fans(name, shape)?;
                Self::symmetric((6.0 / ((1.0 + negative_slope * negative_slope) * fan_in)).sqrt())
            }
            Self::XavierUniform { gain } => {
                let (fan_in, fan_out) = fans(name, shape)?;
                Self::symmetric(gain * (6.0 / (fan_in + fan_out)).sqrt())
            }
            plain => plain,
        })
    }

    fn symmetric(bound: f64) -> Self {
        Self::Uniform { low: -bound, high: bound }
    }
}

fn fans(name: &str, shape: &[usize]) -> Result<(f64, f64)> {
    match shape {
        [out, rest @ ..] if !rest.is_empty() && !shape.contains(&0) => {
            let fan_in: usize = rest.iter().product();
            Ok((fan_in as f64, (out * fan_in / rest[0]) as f64))
        }
        _ => Err(Error::Initialiser {
            name: name.to_owned(),
            shape: shape.to_owned(),
            reason: "Kaiming and Xavier need two dimensions or more, none of them 0",
        }),
    }
}
