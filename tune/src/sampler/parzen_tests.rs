use super::*;
use mobula_core::random::Stream;
use serde::Deserialize;
use std::collections::BTreeMap;

#[derive(Deserialize)]
struct Case {
    observations: BTreeMap<String, Vec<f64>>,
    points: BTreeMap<String, Vec<f64>>,
    weights: Vec<f64>,
    mu: Vec<Vec<f64>>,
    sigma: Vec<Vec<f64>>,
    log_pdf: Vec<f64>,
}

fn space() -> SearchSpace {
    SearchSpace::new()
        .uniform("x", -1.0, 3.0)
        .log_uniform("lr", 1e-5, 1e-1)
        .int("layers", 1, 500)
        .log_int("width", 1, 1000)
        .choice("opt", ["a", "b", "c"])
}

fn coordinates(columns: &BTreeMap<String, Vec<f64>>) -> Vec<Vec<f64>> {
    let at = |name: &str, i: usize| columns[name][i];
    let row =
        |i| vec![at("x", i), at("lr", i).ln(), at("layers", i), at("width", i).ln(), at("opt", i)];
    (0..columns["x"].len()).map(row).collect()
}

fn history(rows: &[Vec<f64>]) -> History {
    let mut history = History::new(5);
    rows.iter().for_each(|row| history.push(row));
    history
}

fn close(what: &str, got: &[f64], expected: &[f64]) {
    assert_eq!(got.len(), expected.len(), "{what}");
    for (g, e) in got.iter().zip(expected) {
        assert!((g - e).abs() <= 1e-10 * e.abs().max(1.0), "{what}: {g} != {e}");
    }
}

fn bells<'a>(factor: &'a Factor<'_>) -> Option<&'a Bells> {
    match factor {
        Factor::Continuous(bells) | Factor::Integer { bells, .. } => Some(bells),
        Factor::Categorical { .. } => None,
    }
}

/// Means, bandwidths, weights and log densities as Optuna 5.0.0 computes them.
#[test]
fn densities_match_optuna() {
    let text = include_str!("../../tests/fixtures/optuna_tpe.json");
    let cases: Vec<Case> = serde_json::from_str(text).expect("the fixture");
    let space = space();
    for case in &cases {
        let rows = coordinates(&case.observations);
        let group = Group::new((0..rows.len() as u32).collect(), rows.len());
        let parzen = Parzen::new(&space, &history(&rows), &group, &[0, 1, 2, 3, 4]);
        close("weights", &parzen.weights, &case.weights);
        let numeric: Vec<&Bells> = parzen.factors.iter().filter_map(bells).collect();
        for (d, bells) in numeric.iter().enumerate() {
            close("mu", &bells.mu, &case.mu[d]);
            close("sigma", &bells.sigma, &case.sigma[d]);
        }
        close("log pdf", &parzen.log_densities(&coordinates(&case.points)), &case.log_pdf);
    }
}

/// A group skips the trials that are not in it: the same density as a history of its own.
#[test]
fn a_group_is_its_members_alone() {
    let (mut rng, space) = (Stream::new(5, "rows").at(0, 0), space());
    let prior = Parzen::new(&space, &History::new(5), &Group::new(Vec::new(), 0), &[0, 1, 2, 3, 4]);
    let rows: Vec<Vec<f64>> = (0..60).map(|_| prior.sample(&mut rng)).collect();
    let odd: Vec<Vec<f64>> = rows.iter().skip(1).step_by(2).cloned().collect();
    let part = Group::new((0..60).filter(|i| i % 2 == 1).collect(), 60);
    let whole = Group::new((0..30).collect(), 30);
    let a = Parzen::new(&space, &history(&rows), &part, &[0, 1, 2, 3, 4]).log_densities(&rows);
    let b = Parzen::new(&space, &history(&odd), &whole, &[0, 1, 2, 3, 4]).log_densities(&rows);
    assert_eq!(a, b);
}

/// Draws follow the density: the share of draws in each of ten bins is the density's integral.
#[test]
fn samples_follow_the_density() {
    let space = SearchSpace::new().uniform("x", 0.0, 1.0);
    let mut history = History::new(1);
    [0.1, 0.15, 0.8].iter().for_each(|x| history.push(&[*x]));
    let parzen = Parzen::new(&space, &history, &Group::new(vec![0, 1, 2], 3), &[0]);
    let (n, mut counts) = (20_000, [0.0; 10]);
    for i in 0..n {
        let x = parzen.sample(&mut Stream::new(1, "draws").at(i, 0))[0];
        counts[(x * 10.0) as usize % 10] += 1.0 / n as f64;
    }
    for (bin, share) in counts.iter().enumerate() {
        let grid: Vec<Vec<f64>> =
            (0..200).map(|i| vec![(bin as f64 + (i as f64 + 0.5) / 200.0) / 10.0]).collect();
        let expected = parzen.log_densities(&grid).iter().map(|l| l.exp()).sum::<f64>() / 2000.0;
        assert!((share - expected).abs() < 0.015, "bin {bin}: {share} != {expected}");
    }
}
