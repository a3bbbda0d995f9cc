//! The losses that are compared.

use super::layers::{Build, extremes, input};
use crate::loss::{self, CrossEntropyOptions};
use crate::{Init, Params, Result};
use candle_core::Tensor;

/// Every loss, with every option.
pub(super) const LOSSES: &[(&str, Build)] = &[
    ("mse", |p| loss::mse(&input(p, "x", &[4, 3])?, &input(p, "target", &[4, 3])?)),
    ("l1", |p| loss::l1(&input(p, "x", &[4, 3])?, &input(p, "target", &[4, 3])?)),
    ("huber", |p| loss::huber(&input(p, "x", &[4, 3])?, &input(p, "target", &[4, 3])?, 0.5)),
    ("smooth l1", |p| {
        loss::smooth_l1(&input(p, "x", &[4, 3])?, &input(p, "target", &[4, 3])?, 0.5)
    }),
    ("weighted mse", |p| {
        let (x, target) = (input(p, "x", &[4, 3])?, input(p, "target", &[4, 3])?);
        loss::mse_sum(&x, &target, Some(&weights(p)?))?.mean()
    }),
    ("weighted l1", |p| {
        let (x, target) = (input(p, "x", &[4, 3])?, input(p, "target", &[4, 3])?);
        loss::l1_sum(&x, &target, Some(&weights(p)?))?.mean()
    }),
    ("weighted huber", |p| {
        let (x, target) = (input(p, "x", &[4, 3])?, input(p, "target", &[4, 3])?);
        loss::huber_sum(&x, &target, 0.5, Some(&weights(p)?))?.mean()
    }),
    ("weighted smooth l1", |p| {
        let (x, target) = (input(p, "x", &[4, 3])?, input(p, "target", &[4, 3])?);
        loss::smooth_l1_sum(&x, &target, 0.5, Some(&weights(p)?))?.mean()
    }),
    ("l1 of equals", |p| {
        let x = input(p, "x", &[4, 3])?;
        loss::l1(&x, &x.detach())
    }),
    ("binary cross-entropy", |p| {
        let positive = Tensor::new(&[1.0, 2.0, 0.5], p.device())?;
        let targets = input(p, "target", &[4, 3])?.detach().gt(0.0)?;
        let (logits, targets) = (extremes(p, &[4, 3])?, targets.to_dtype(p.dtype())?);
        loss::bce_with_logits_sum(&logits, &targets, Some(&positive), None)?.mean()
    }),
    ("weighted binary cross-entropy of probabilities", |p| {
        let targets = p.get((4, 3), "target", Init::Uniform { low: 0.0, high: 1.0 })?;
        let (x, weights) = (input(p, "x", &[4, 3])?, weights(p)?);
        loss::bce_with_logits_sum(&x, &targets, None, Some(&weights))?.mean()
    }),
    ("divergence", |p| {
        let probabilities = p.get((4, 3), "target", Init::Uniform { low: 0.0, high: 1.0 })?;
        loss::kl_div(&input(p, "x", &[4, 3])?, &probabilities)
    }),
    ("weighted divergence of a certainty", |p| {
        let certain = Tensor::new(&[[1.0, 0.0, 0.0]], p.device())?.broadcast_as((4, 3))?;
        let (x, weights) = (input(p, "x", &[4, 3])?, weights(p)?);
        loss::kl_div_sum(&x, &certain.contiguous()?, Some(&weights))?.mean()
    }),
    ("cross-entropy", |p| loss::cross_entropy(&input(p, "x", &[4, 3])?, &labels(p, [2, 0, 1, 1])?)),
    ("cross-entropy with options", |p| {
        let options = CrossEntropyOptions {
            label_smoothing: 0.1,
            class_weights: Some(vec![1.0, 0.5, 2.0]),
            ignored_label: Some(9),
        };
        let (x, labels) = (input(p, "x", &[4, 3])?, labels(p, [2, 9, 1, 1])?);
        loss::cross_entropy_with(&x, &labels, None, &options)?.mean()
    }),
    ("weighted cross-entropy of large logits", |p| {
        let (x, labels) = (extremes(p, &[4, 3])?, labels(p, [2, 0, 1, 1])?);
        let options = CrossEntropyOptions::default();
        loss::cross_entropy_with(&x, &labels, Some(&weights(p)?), &options)?.mean()
    }),
    ("cross-entropy of places", |p| {
        let labels = labels(p, [2, 0, 1, 1])?.reshape((2, 2))?;
        loss::cross_entropy(&input(p, "x", &[2, 2, 3])?, &labels)
    }),
    ("cross-entropy of nothing", |p| {
        let options = CrossEntropyOptions { ignored_label: Some(9), ..Default::default() };
        let (x, labels) = (input(p, "x", &[4, 3])?, labels(p, [9; 4])?);
        Ok(loss::cross_entropy_with(&x, &labels, None, &options)?.sum)
    }),
    ("negative log-likelihood", |p| loss::nll(&input(p, "x", &[4, 3])?, &labels(p, [2, 0, 1, 1])?)),
    ("negative log-likelihood with options", |p| {
        let options = CrossEntropyOptions {
            label_smoothing: 0.1,
            class_weights: Some(vec![1.0, 0.5, 2.0]),
            ignored_label: Some(9),
        };
        let (x, labels) = (input(p, "x", &[4, 3])?, labels(p, [2, 9, 1, 1])?);
        loss::nll_with(&x, &labels, Some(&weights(p)?), &options)?.mean()
    }),
];

/// Of rows.
fn weights(params: &Params) -> Result<Tensor> {
    Ok(Tensor::new(&[1.0, 0.5, 2.0, 0.0], params.device())?)
}

fn labels(params: &Params, labels: [u32; 4]) -> Result<Tensor> {
    Ok(Tensor::new(&labels, params.device())?)
}
