//! Samplers: which parameters to try next.

mod bells;
mod normal;
mod parzen;
mod tpe;

pub use tpe::TpeSampler;

use crate::history::History;
use crate::space::Domain;
use crate::{Error, Params, SearchSpace};
use mobula_core::random::Stream;
use serde_json::{Value, json};
use std::fmt::Debug;

/// Chooses the parameters of trials.
///
/// Sampling is a pure function of its arguments: a study that is resumed from its journal draws
/// bit for bit what it would have drawn without the interruption.
pub trait Sampler: Debug + Send + Sync {
    /// The parameters of trial `number`, given every trial before it.
    fn sample(&self, space: &SearchSpace, history: &History, seed: u64, number: usize) -> Params;

    /// Name and options, for the journal: a study is resumed only under the same.
    fn config(&self) -> Value;

    /// How many different trials there are, if there is an end to them. Errors when the sampler
    /// cannot search this space, or its options make no sense.
    fn trials(&self, _space: &SearchSpace) -> Result<Option<usize>, Error> {
        Ok(None)
    }
}

/// Independent uniform draws.
#[derive(Clone, Copy, Debug, Default)]
pub struct RandomSampler;

impl Sampler for RandomSampler {
    fn sample(&self, space: &SearchSpace, _: &History, seed: u64, number: usize) -> Params {
        let stream = Stream::new(seed, "tune/random");
        let draw = |(i, domain): (usize, &Domain)| {
            let mut rng = stream.at(number as u64, i as u32);
            match domain.bounds() {
                Some((low, high)) => low + rng.uniform() * (high - low),
                None => rng.below(domain.len().unwrap_or(1) as u64) as f64,
            }
        };
        let domains = space.parameters().iter().map(|p| &p.domain);
        let coordinates: Vec<f64> = domains.enumerate().map(draw).collect();
        space.decode(&coordinates)
    }

    fn config(&self) -> Value {
        json!({"random": {}})
    }
}

/// Every combination of choices and integers once, the last parameter changing fastest.
#[derive(Clone, Copy, Debug, Default)]
pub struct GridSampler;

impl Sampler for GridSampler {
    fn sample(&self, space: &SearchSpace, _: &History, _: u64, number: usize) -> Params {
        let mut rest = number;
        let mut coordinates: Vec<f64> = Vec::new();
        for parameter in space.parameters().iter().rev() {
            let n = parameter.domain.len().unwrap_or(1);
            coordinates.push(grid_coordinate(&parameter.domain, rest % n));
            rest /= n;
        }
        coordinates.reverse();
        space.decode(&coordinates)
    }

    fn config(&self) -> Value {
        json!({"grid": {}})
    }

    fn trials(&self, space: &SearchSpace) -> Result<Option<usize>, Error> {
        let mut total = 1usize;
        for parameter in space.parameters() {
            let name = || parameter.name.clone();
            let n = parameter.domain.len().ok_or_else(|| Error::NoGrid { name: name() })?;
            total = total.saturating_mul(n);
        }
        Ok(Some(total))
    }
}

fn grid_coordinate(domain: &Domain, index: usize) -> f64 {
    match domain {
        Domain::Int { low, log: true, .. } => (*low as f64 + index as f64).ln(),
        Domain::Int { low, .. } => *low as f64 + index as f64,
        _ => index as f64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grid_has_every_combination_once() {
        let space = SearchSpace::new().choice("opt", ["a", "b"]).int("n", 1, 3).log_int("m", 2, 3);
        let total = GridSampler.trials(&space).expect("finite").expect("finite");
        let sample = |i| GridSampler.sample(&space, &History::new(3), 0, i).to_string();
        let all: std::collections::BTreeSet<String> = (0..total).map(sample).collect();
        assert_eq!((total, all.len()), (12, 12), "{all:?}");
        assert_eq!(sample(1), "opt=a n=1 m=3");
        let endless = SearchSpace::new().uniform("x", 0.0, 1.0);
        assert!(
            GridSampler.trials(&endless).expect_err("continuous").to_string().contains("\"x\"")
        );
    }

    /// Each draw is uniform on its own scale: ten bins of every parameter stay within five
    /// standard deviations of their expected count.
    #[test]
    fn random_draws_are_uniform_on_their_scales() {
        let space = SearchSpace::new()
            .uniform("u", -1.0, 1.0)
            .log_uniform("l", 1e-5, 1.0)
            .int("i", 0, 9)
            .choice("c", (0..10).collect::<Vec<i64>>());
        let (n, history) = (10_000, History::new(4));
        let mut bins = [[0u32; 10]; 4];
        for number in 0..n {
            let p = RandomSampler.sample(&space, &history, 3, number);
            let bin = |x: f64| ((x * 10.0) as usize).min(9);
            bins[0][bin((p.float("u").expect("u") + 1.0) / 2.0)] += 1;
            bins[1][bin(p.float("l").expect("l").ln() / 1e-5f64.ln())] += 1;
            bins[2][p.usize("i").expect("i")] += 1;
            bins[3][p.usize("c").expect("c")] += 1;
        }
        assert!(bins.iter().flatten().all(|count| count.abs_diff(1000) < 150), "{bins:?}");
    }
}
