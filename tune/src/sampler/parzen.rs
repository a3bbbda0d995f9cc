//! Parzen estimators: a density over the search space from a group of trials.
//!
//! Watanabe, *Tree-structured Parzen Estimator* (arXiv 2304.11127), with the bandwidths and
//! weights of Optuna 5: one kernel per trial plus a broad prior, each a product over parameters.

use super::bells::{Bells, Group};
use super::normal::{LN_SQRT_TAU, log_mass};
use crate::history::History;
use crate::space::{Domain, SearchSpace};
use mobula_core::random::Philox;

/// Kernels this far (in log) below the largest one cannot change a sum of doubles.
const NEGLIGIBLE: f64 = -45.0;
/// Products of so many scales (each at least 1e-2 of a range) stay far from underflow.
const SCALES_PER_LOG: usize = 32;

/// A mixture of products of one-dimensional kernels.
pub(crate) struct Parzen<'a> {
    /// Per kernel; the last one is the prior. Sums to 1.
    weights: Vec<f64>,
    /// Per kernel: ln weight − Σ ln normaliser of its continuous and integer factors.
    base: Vec<f64>,
    factors: Vec<Factor<'a>>,
}

/// One parameter's part of every kernel.
enum Factor<'a> {
    Continuous(Bells),
    Integer { bells: Bells, domain: &'a Domain, log: bool },
    Categorical { choices: Vec<usize>, n: usize },
}

impl<'a> Parzen<'a> {
    /// The density of `group` over the parameters `dims` of the space.
    pub(crate) fn new(
        space: &'a SearchSpace,
        history: &History,
        group: &Group,
        dims: &[usize],
    ) -> Self {
        let weights = weights(group.members.len());
        let factor = |d: &usize| Factor::new(&space.parameters()[*d].domain, history, group, *d);
        let factors: Vec<Factor<'a>> = dims.iter().map(factor).collect();
        let base = normalisers(&weights, &factors);
        Self { weights, base, factors }
    }

    /// A draw: internal coordinates, one per parameter of `dims`.
    pub(crate) fn sample(&self, rng: &mut Philox) -> Vec<f64> {
        let mut u = rng.uniform();
        let below = |w: &f64| {
            u -= w;
            u < 0.0
        };
        let kernel = self.weights.iter().position(below).unwrap_or(self.weights.len() - 1);
        self.factors.iter().map(|factor| factor.sample(kernel, rng)).collect()
    }

    /// The log densities at some points.
    pub(crate) fn log_densities(&self, points: &[Vec<f64>]) -> Vec<f64> {
        let mut terms = vec![0.0; self.weights.len()];
        points.iter().map(|point| self.log_density(point, &mut terms)).collect()
    }

    /// Masses of integers are dear, and most kernels of a long study are far away. So first every
    /// kernel gets an upper bound, then only those that can count get their exact value.
    fn log_density(&self, point: &[f64], terms: &mut [f64]) -> f64 {
        terms.copy_from_slice(&self.base);
        for (factor, x) in self.factors.iter().zip(point) {
            factor.add_bound(terms, *x);
        }
        if !self.factors.iter().any(|factor| matches!(factor, Factor::Integer { .. })) {
            return log_sum_exp(terms);
        }
        let exact = |kernel: usize, bound: f64| {
            let gap = |(factor, x): (&Factor<'_>, &f64)| factor.above_exact(kernel, *x);
            bound - self.factors.iter().zip(point).map(gap).sum::<f64>()
        };
        let prior = terms.len() - 1;
        let likely = (0..prior).fold(prior, |a, b| if terms[b] > terms[a] { b } else { a });
        let floor = exact(prior, terms[prior]).max(exact(likely, terms[likely])) + NEGLIGIBLE;
        for (kernel, term) in terms.iter_mut().enumerate() {
            if *term > floor {
                *term = exact(kernel, *term);
            }
        }
        log_sum_exp(terms)
    }
}

/// Older trials count less: 1 for each of the newest 25, a ramp from 1/n before them, and 1 for
/// the prior; normalised.
fn weights(n: usize) -> Vec<f64> {
    let ramp = n.saturating_sub(25);
    let first = 1.0 / n.max(1) as f64;
    let slope = (1.0 - first) / ramp.saturating_sub(1).max(1) as f64;
    let mut weights: Vec<f64> =
        (0..n).map(|i| if i < ramp { first + slope * i as f64 } else { 1.0 }).collect();
    weights.push(1.0);
    let total: f64 = weights.iter().sum();
    weights.iter_mut().for_each(|w| *w /= total);
    weights
}

/// Logarithms are dear: the scales of a kernel are multiplied first.
fn normalisers(weights: &[f64], factors: &[Factor<'_>]) -> Vec<f64> {
    let mut base = vec![0.0; weights.len()];
    let mut product = weights.to_vec();
    for (d, factor) in factors.iter().enumerate() {
        if d % SCALES_PER_LOG == SCALES_PER_LOG - 1 {
            base.iter_mut()
                .zip(&mut product)
                .for_each(|(b, p)| *b += std::mem::replace(p, 1.0).ln());
        }
        factor.divide_by_scale(&mut product);
    }
    let constant: f64 = factors.iter().map(Factor::log_constant).sum();
    base.iter_mut().zip(&product).for_each(|(b, p)| *b += p.ln() - constant);
    base
}

impl<'a> Factor<'a> {
    fn new(domain: &'a Domain, history: &History, group: &Group, d: usize) -> Self {
        let observed = group.members.iter().map(|m| history.column(d)[*m as usize]);
        match domain {
            Domain::Choice { values } => {
                let choices = observed.map(|x| x as usize).collect();
                Self::Categorical { choices, n: values.len() }
            }
            Domain::Float { .. } => Self::Continuous(Bells::new(domain, history, group, d)),
            Domain::Int { log, .. } => {
                Self::Integer { bells: Bells::new(domain, history, group, d), domain, log: *log }
            }
        }
    }

    fn sample(&self, kernel: usize, rng: &mut Philox) -> f64 {
        match self {
            Self::Continuous(bells) => bells.sample(kernel, rng),
            Self::Integer { bells, domain, .. } => {
                let value = domain.decode(bells.sample(kernel, rng));
                domain.encode(&value).unwrap_or(bells.low)
            }
            Self::Categorical { choices, n } => {
                let mut u = rng.uniform();
                let hit = |c: &usize| {
                    u -= choice_probability(choices, kernel, *c, *n);
                    u < 0.0
                };
                (0..*n).find(hit).unwrap_or(n - 1) as f64
            }
        }
    }

    /// ln of what every kernel's normaliser has in common.
    fn log_constant(&self) -> f64 {
        match self {
            Self::Continuous(bells) => LN_SQRT_TAU + (bells.high - bells.low).ln(),
            _ => 0.0,
        }
    }

    /// Divides by each kernel's normaliser: the mass inside the range, and for a density its
    /// width as a part of the range.
    fn divide_by_scale(&self, product: &mut [f64]) {
        match self {
            Self::Continuous(bells) => {
                let range = bells.high - bells.low;
                for (k, p) in product.iter_mut().enumerate() {
                    *p /= bells.mass(k) * (bells.sigma[k] / range);
                }
            }
            Self::Integer { bells, .. } => {
                product.iter_mut().enumerate().for_each(|(k, p)| *p /= bells.mass(k));
            }
            Self::Categorical { .. } => {}
        }
    }

    /// Adds to each kernel's term the log of its density at `x`; for an integer an upper bound.
    fn add_bound(&self, terms: &mut [f64], x: f64) {
        match self {
            Self::Continuous(bells) => {
                for ((term, mu), inverse) in terms.iter_mut().zip(&bells.mu).zip(&bells.inverse) {
                    let z = (x - mu) * inverse;
                    *term -= 0.5 * z * z;
                }
            }
            Self::Integer { bells, log, .. } => {
                let edges = edges(x, *log);
                let kernels = bells.mu.iter().zip(&bells.inverse);
                for (term, (mu, inverse)) in terms.iter_mut().zip(kernels) {
                    *term += log_mass_bound(edges, *mu, *inverse);
                }
            }
            Self::Categorical { choices, n } => {
                let (hit, miss, prior) = categorical_logs(choices.len(), *n);
                let last = terms.len() - 1;
                for (term, choice) in terms.iter_mut().zip(choices) {
                    *term += if *choice == x as usize { hit } else { miss };
                }
                terms[last] += prior;
            }
        }
    }

    /// By how much the bound of [`Factor::add_bound`] is above the exact value.
    fn above_exact(&self, kernel: usize, x: f64) -> f64 {
        let Self::Integer { bells, log, .. } = self else {
            return 0.0;
        };
        let (left, right) = edges(x, *log);
        let (mu, inverse) = (bells.mu[kernel], bells.inverse[kernel]);
        let mass = log_mass((left - mu) * inverse, (right - mu) * inverse);
        log_mass_bound((left, right), mu, inverse) - mass
    }
}

/// The interval of coordinates that belongs to the integer at coordinate `x`.
fn edges(x: f64, log: bool) -> (f64, f64) {
    if log {
        let value = x.exp().round();
        return ((value - 0.5).ln(), (value + 0.5).ln());
    }
    (x.round() - 0.5, x.round() + 0.5)
}

/// No interval holds more than the tail from its nearer edge on, and that is below e^(−z²/2).
fn log_mass_bound((left, right): (f64, f64), mu: f64, inverse: f64) -> f64 {
    let z = (left - mu).max(mu - right).max(0.0) * inverse;
    -0.5 * z * z
}

/// The kernel of an observed choice: `1/(kernels)` for every choice and 1 more for its own,
/// normalised. The prior's is uniform.
fn choice_probability(choices: &[usize], kernel: usize, choice: usize, n: usize) -> f64 {
    let each = 1.0 / (choices.len() + 1) as f64;
    match choices.get(kernel) {
        Some(own) => (each + f64::from(u8::from(*own == choice))) / (1.0 + each * n as f64),
        None => 1.0 / n as f64,
    }
}

/// ln of [`choice_probability`] for a kernel's own choice, another one, and the prior.
fn categorical_logs(observed: usize, n: usize) -> (f64, f64, f64) {
    let each = 1.0 / (observed + 1) as f64;
    let total = 1.0 + each * n as f64;
    (((each + 1.0) / total).ln(), (each / total).ln(), -(n as f64).ln())
}

fn log_sum_exp(terms: &[f64]) -> f64 {
    let largest = terms.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if largest == f64::NEG_INFINITY {
        return largest;
    }
    let near = terms.iter().map(|t| t - largest).filter(|t| *t > NEGLIGIBLE);
    near.map(f64::exp).sum::<f64>().ln() + largest
}

#[cfg(test)]
#[path = "parzen_tests.rs"]
mod tests;
