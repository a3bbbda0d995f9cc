//! Gradients that do not get too large.

use super::check;
use super::pass::{CHUNK, for_each, scale, sums_of_squares};
use crate::Result;
use mobula_nn::Gradients;
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// How gradients are kept small, after they have been averaged over all rows of all ranks.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Clip {
    /// Scales all gradients so that their Euclidean norm, taken over all parameters together, is
    /// at most this, as PyTorch's `clip_grad_norm_` does.
    Norm(f64),
    /// Limits each element to between minus this and this, as PyTorch's `clip_grad_value_` does.
    Value(f64),
}

impl Clip {
    pub(super) fn validate(&self) -> Result<()> {
        match *self {
            Self::Norm(most) => check::positive("clip.norm", most),
            Self::Value(most) => check::positive("clip.value", most),
        }
    }

    /// What gradients of this norm are multiplied by, if it is less than 1.
    pub(super) fn factor(most: f64, norm: f64) -> f64 {
        // PyTorch's epsilon.
        most / (norm + 1e-6)
    }

    /// Clips the gradients in place, which have to be on the CPU ([`Gradients::bring_here`]). Gives their norm as it was, where that is taken.
    pub fn apply(&self, gradients: &mut Gradients) -> Option<f64> {
        let ranges: Vec<_> = gradients.places().iter().map(|(_, range)| range.clone()).collect();
        let squares = self.squares(gradients.values(), &ranges, 0..gradients.values().len());
        self.apply_to(gradients.values_mut(), &ranges, squares.as_deref())
    }

    /// Sums of squares, block by block, of the gradients of some parameters, if they are clipped by their
    /// norm: zeros for those that are not in `own`.
    pub(super) fn squares(
        &self,
        values: &[f32],
        ranges: &[Range<usize>],
        own: Range<usize>,
    ) -> Option<Vec<f64>> {
        let counts = |range: &Range<usize>| own.start <= range.start && range.end <= own.end;
        let pieces = ranges.iter().map(|range| (&values[range.clone()], counts(range)));
        matches!(self, Self::Norm(_)).then(|| sums_of_squares(pieces))
    }

    /// The same for the gradients of some parameters with these squares.
    pub(super) fn apply_to(
        &self,
        values: &mut [f32],
        ranges: &[Range<usize>],
        squares: Option<&[f64]>,
    ) -> Option<f64> {
        match *self {
            Self::Norm(most) => {
                let norm = squares?.iter().sum::<f64>().sqrt();
                let factor = Self::factor(most, norm);
                if factor < 1.0 {
                    ranges.iter().for_each(|at| scale(&mut values[at.clone()], factor as f32));
                }
                Some(norm)
            }
            Self::Value(most) => {
                ranges.iter().for_each(|range| limit(&mut values[range.clone()], most as f32));
                None
            }
        }
    }
}

fn limit(values: &mut [f32], most: f32) {
    for_each(values.chunks_mut(CHUNK).collect(), |chunk: &mut [f32]| {
        let limit = |value: &mut f32| *value = value.clamp(-most, most);
        pulp::Arch::new().dispatch(|| chunk.iter_mut().for_each(limit));
    });
}
