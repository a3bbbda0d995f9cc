//! Truncated normals around the trials of a group, and their bandwidths.

use super::normal::{central_mass, truncated_quantile};
use crate::history::History;
use crate::space::Domain;
use mobula_core::random::Philox;

/// Not a member of the group, in [`Group::position`].
const OUTSIDE: u32 = u32::MAX;

/// Some of the trials, in order of their numbers.
pub(crate) struct Group {
    pub(crate) members: Vec<u32>,
    position: Vec<u32>,
}

impl Group {
    pub(crate) fn new(members: Vec<u32>, trials: usize) -> Self {
        let mut position = vec![OUTSIDE; trials];
        for (at, member) in members.iter().enumerate() {
            position[*member as usize] = at as u32;
        }
        Self { members, position }
    }
}

/// Truncated normals, one per kernel.
pub(crate) struct Bells {
    pub(crate) mu: Vec<f64>,
    pub(crate) sigma: Vec<f64>,
    pub(crate) inverse: Vec<f64>,
    pub(crate) low: f64,
    pub(crate) high: f64,
}

impl Bells {
    pub(crate) fn new(domain: &Domain, history: &History, group: &Group, d: usize) -> Self {
        let (low, high) = domain.bounds().unwrap_or((0.0, 1.0));
        let column = history.column(d);
        let mut mu: Vec<f64> = group.members.iter().map(|m| column[*m as usize]).collect();
        let mut sigma = bandwidths(history, group, d, low, high);
        mu.push(0.5 * (low + high));
        sigma.push(high - low);
        let inverse = sigma.iter().map(|s| 1.0 / s).collect();
        Self { mu, sigma, inverse, low, high }
    }

    pub(crate) fn mass(&self, kernel: usize) -> f64 {
        let (mu, inverse) = (self.mu[kernel], self.inverse[kernel]);
        central_mass((self.low - mu) * inverse, (self.high - mu) * inverse)
    }

    pub(crate) fn sample(&self, kernel: usize, rng: &mut Philox) -> f64 {
        truncated_quantile(rng.uniform(), self.mu[kernel], self.sigma[kernel], self.low, self.high)
    }
}

/// σ of each member: the larger gap to its neighbours, where the outermost two have only one,
/// kept within range/min(100, n + 2) and the range.
fn bandwidths(history: &History, group: &Group, d: usize, low: f64, high: f64) -> Vec<f64> {
    let column = history.column(d);
    let members = history.sorted(d).iter().filter(|t| group.position[**t as usize] != OUTSIDE);
    let walk: Vec<(usize, f64)> =
        members.map(|t| (group.position[*t as usize] as usize, column[*t as usize])).collect();
    let n = walk.len();
    let smallest = (high - low) / (n as f64 + 2.0).min(100.0);
    let mut sigma = vec![0.0; n];
    for (i, (position, mu)) in walk.iter().enumerate() {
        let left = if i > 0 {
            mu - walk[i - 1].1
        } else if n > 1 {
            0.0
        } else {
            mu - low
        };
        let right = if i + 1 < n {
            walk[i + 1].1 - mu
        } else if n > 1 {
            0.0
        } else {
            high - mu
        };
        sigma[*position] = left.max(right).clamp(smallest, high - low);
    }
    sigma
}
