//! How parameters start: seeded, and independent of the order in which they are created.

mod orthogonal;

use crate::{Error, Result};
use mobula_core::random::Stream;
use std::f64::consts::SQRT_2;

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
    /// Uniform within ±gain · √(3 / fan), for layers with a rectifier.
    ///
    /// He, Zhang, Ren, Sun: *Delving Deep into Rectifiers* (ICCV 2015), equation 15.
    KaimingUniform {
        /// [`Fan::In`] keeps the variance from layer to layer forward, [`Fan::Out`] backward.
        fan: Fan,
        /// That of the activation: [`Activation::gain`](crate::layers::Activation::gain), or
        /// [`rectifier_gain`](Init::rectifier_gain).
        gain: f64,
    },
    /// The same, normal with a standard deviation of gain / √fan.
    KaimingNormal {
        /// [`Fan::In`] keeps the variance from layer to layer forward, [`Fan::Out`] backward.
        fan: Fan,
        /// That of the activation.
        gain: f64,
    },
    /// Uniform within ±gain · √(6 / (fan_in + fan_out)).
    ///
    /// Glorot, Bengio: *Understanding the difficulty of training deep feedforward neural
    /// networks* (AISTATS 2010), equation 16.
    XavierUniform {
        /// 1 for linear layers; else that of the activation.
        gain: f64,
    },
    /// The same, normal with a standard deviation of gain · √(2 / (fan_in + fan_out)).
    XavierNormal {
        /// 1 for linear layers; else that of the activation.
        gain: f64,
    },
    /// Normal, drawn again until within `[low, high]`, which must hold 1 % of the distribution.
    TruncatedNormal {
        /// The mean, before anything is cut off.
        mean: f64,
        /// The standard deviation, before anything is cut off.
        std: f64,
        /// The least value. PyTorch's default is −2, whatever the standard deviation.
        low: f64,
        /// The greatest value.
        high: f64,
    },
    /// `gain` times a random matrix with orthonormal rows, or columns where it has fewer of them:
    /// the first dimension against all others. For two dimensions or more.
    ///
    /// Saxe, McClelland, Ganguli: *Exact solutions to the nonlinear dynamics of learning in deep
    /// linear neural networks* (ICLR 2014).
    Orthogonal {
        /// The length of each row or column.
        gain: f64,
    },
}

/// Which connections of a weight are counted: see [`Init`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fan {
    /// `fan_in`.
    #[default]
    In,
    /// `fan_out`.
    Out,
}

impl Init {
    /// What PyTorch gives the weights of `Linear` and `Conv2d`: Kaiming with a = √5, which is
    /// uniform within ±1/√fan_in.
    pub fn default_weight() -> Self {
        Self::KaimingUniform { fan: Fan::In, gain: Self::rectifier_gain(5f64.sqrt()) }
    }

    /// √(2 / (1 + a²)), the gain for a leaky ReLU of slope `a` below 0.
    pub fn rectifier_gain(negative_slope: f64) -> f64 {
        (2.0 / (1.0 + negative_slope * negative_slope)).sqrt()
    }

    /// What PyTorch gives their biases: uniform within ±1/√fan_in of the weight.
    pub fn default_bias(fan_in: usize) -> Self {
        Self::symmetric(1.0 / (fan_in as f64).sqrt())
    }

    /// The values of the parameter `name` under `seed`, a pure function of these arguments.
    pub(crate) fn values(self, seed: u64, name: &str, shape: &[usize]) -> Result<Vec<f64>> {
        let mut draws = Stream::new(seed, &format!("init {name}")).at(0, 0);
        let mut values = vec![0.0; shape.iter().product()];
        match self.checked(name, shape)?.resolve(name, shape)? {
            Self::Uniform { low, high } => {
                values.fill_with(|| low + (high - low) * draws.uniform());
            }
            Self::Normal { mean, std } => values.fill_with(|| mean + std * draws.normal()),
            Self::TruncatedNormal { mean, std, low, high } => values.fill_with(|| {
                loop {
                    let value = mean + std * draws.normal();
                    if (low..=high).contains(&value) {
                        break value;
                    }
                }
            }),
            Self::Orthogonal { gain } => {
                values.fill_with(|| draws.normal());
                orthogonal::orthogonalise(&mut values, shape[0]);
                values.iter_mut().for_each(|value| *value *= gain);
            }
            Self::Ones => values.fill(1.0),
            Self::Const(value) => values.fill(value),
            _ => {}
        }
        Ok(values)
    }

    /// Errors where there is nothing to draw, or hardly anything.
    fn checked(self, name: &str, shape: &[usize]) -> Result<Self> {
        let (name, shape) = (name.to_owned(), shape.to_owned());
        match self {
            Self::TruncatedNormal { mean, std, low, high } => {
                let below = |x: f64| 0.5 * libm::erfc((mean - x) / (std * SQRT_2));
                // Written so that a NaN fails.
                if std > 0.0 && below(high) - below(low) >= 0.01 {
                    return Ok(self);
                }
                let reason = "a truncated normal distribution needs a positive standard deviation, \
                    and bounds with 1 % of it between them";
                Err(Error::Initialiser { name, shape, reason })
            }
            Self::Orthogonal { .. } if shape.len() < 2 => {
                let reason = "an orthogonal matrix needs two dimensions or more";
                Err(Error::Initialiser { name, shape, reason })
            }
            _ => Ok(self),
        }
    }

    /// Turns what depends on the fans into a plain uniform or normal distribution.
    fn resolve(self, name: &str, shape: &[usize]) -> Result<Self> {
        Ok(match self {
            Self::KaimingUniform { fan, gain } => {
                Self::symmetric(gain * (3.0 / fan.of(fans(name, shape)?)).sqrt())
            }
            Self::KaimingNormal { fan, gain } => {
                Self::Normal { mean: 0.0, std: gain / fan.of(fans(name, shape)?).sqrt() }
            }
            Self::XavierUniform { gain } => {
                let (fan_in, fan_out) = fans(name, shape)?;
                Self::symmetric(gain * (6.0 / (fan_in + fan_out)).sqrt())
            }
            Self::XavierNormal { gain } => {
                let (fan_in, fan_out) = fans(name, shape)?;
                Self::Normal { mean: 0.0, std: gain * (2.0 / (fan_in + fan_out)).sqrt() }
            }
            plain => plain,
        })
    }

    fn symmetric(bound: f64) -> Self {
        Self::Uniform { low: -bound, high: bound }
    }
}

impl Fan {
    fn of(self, (fan_in, fan_out): (f64, f64)) -> f64 {
        match self {
            Self::In => fan_in,
            Self::Out => fan_out,
        }
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
