//! Adafactor.

use super::pass::{CHUNK, SquareSum, check_gradient, for_each, lerp, sum_of_squares};
use super::state::{ParamState, Slot};
use super::{Now, Optimizer, check};
use crate::Result;
use pulp::NullaryFnOnce;
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// Columns whose squares one thread adds up at a time.
const COLUMNS: usize = 64;

/// Settings of [`Adafactor`]; the defaults are PyTorch's.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdafactorOptions {
    /// The largest relative step. Default 0.01.
    pub lr: f64,
    /// At step t the variance is replaced by the new one to a share of t to this power.
    /// Default -0.8.
    pub beta2_decay: f64,
    /// Keeps the denominator away from 0. Default 1.1920929e-7, what `f32` resolves at 1.
    pub eps1: f64,
    /// The least root mean square of a parameter that a relative step is taken of. Default 0.001.
    pub eps2: f64,
    /// An update whose root mean square is above this is scaled down to it. Default 1.
    pub d: f64,
    /// Decoupled weight decay. Default 0.
    pub weight_decay: f64,
}

impl Default for AdafactorOptions {
    fn default() -> Self {
        Self {
            lr: 1e-2,
            beta2_decay: -0.8,
            eps1: f64::from(f32::EPSILON),
            eps2: 1e-3,
            d: 1.0,
            weight_decay: 0.0,
        }
    }
}

/// Adafactor (Shazeer & Stern 2018, arXiv 1804.04235), as PyTorch's `torch.optim.Adafactor`
/// computes it: for parameters of two and more dimensions it remembers a sum per row and one per
/// column of the last two dimensions, a square root of what Adam remembers.
///
/// R ← R + tᵝ·(row means of g² − R), C likewise of columns; u = g / √(R·C / mean R);
/// p ← p·(1 − lr·λ) − max(ε₂, rms p)·min(lr, 1/√t) / max(1, rms u / d) · u
///
/// State: `row_var` (R) and `col_var` (C), or `variance` where there are no rows and columns.
#[derive(Clone, Debug)]
pub struct Adafactor(AdafactorOptions);

impl Adafactor {
    /// Errors when an option is out of its range.
    pub fn new(options: AdafactorOptions) -> Result<Self> {
        check::positive("lr", options.lr)?;
        let decay = options.beta2_decay;
        let good = decay.is_finite() && decay <= 0.0;
        check::option("beta2_decay", decay, good, "a finite number, 0 or below")?;
        check::positive("eps1", options.eps1)?;
        check::not_negative("eps2", options.eps2)?;
        let good = options.d.is_finite() && options.d >= 1.0;
        check::option("d", options.d, good, "a finite number, 1 or above")?;
        check::not_negative("weight_decay", options.weight_decay)?;
        Ok(Self(options))
    }
}

impl Optimizer for Adafactor {
    fn name(&self) -> &str {
        "adafactor"
    }

    fn options(&self) -> serde_json::Value {
        serde_json::json!(self.0)
    }

    fn lr(&self) -> f64 {
        self.0.lr
    }

    fn weight_decay(&self) -> f64 {
        self.0.weight_decay
    }

    fn slots(&self, shape: &[usize]) -> Vec<Slot> {
        let [outer @ .., rows, cols] = shape else {
            return vec![Slot::zeros("variance", shape)];
        };
        let row_shape = [outer, &[*rows, 1]].concat();
        let col_shape = [outer, &[1, *cols]].concat();
        vec![Slot::zeros("row_var", &row_shape), Slot::zeros("col_var", &col_shape)]
    }

    fn update_param(
        &self,
        now: Now,
        values: &mut [f32],
        gradient: &[f32],
        state: &mut ParamState,
    ) -> Result<()> {
        check_gradient(values, gradient)?;
        if values.is_empty() {
            return Ok(());
        }
        let AdafactorOptions { beta2_decay, eps1, eps2, d, .. } = self.0;
        let (t, count) = (state.steps as f64, values.len() as f64);
        let root_mean_square = |squares: f64| (squares / count).sqrt();
        let step = eps2.max(root_mean_square(sum_of_squares(values))) * now.lr.min(t.powf(-0.5));
        let weight = t.powf(beta2_decay) as f32;
        let means = learn(gradient, state, weight, eps1 as f32)?;

        let lines = lines(values, gradient, state, &means)?;
        let floor = (eps1 * eps1) as f32;
        let (mut blocks, mut sums) = blocks(lines);
        let work = blocks.iter_mut().zip(&mut sums).collect();
        for_each(work, |(lines, sum): (&mut Vec<Line<'_>>, &mut f64)| {
            *sum = pulp::Arch::new().dispatch(UpdateSquares { lines, floor });
        });
        let denominator = (root_mean_square(sums.iter().sum()) / d).max(1.0);
        let decay = (1.0 - now.lr * now.weight_decay) as f32;
        let step = (step / denominator) as f32;
        for_each(blocks, |lines| pulp::Arch::new().dispatch(Apply { lines, floor, decay, step }));
        Ok(())
    }
}

/// Moves the variances towards the squares of the gradient. Gives the mean of each matrix's rows.
fn learn(gradient: &[f32], state: &mut ParamState, weight: f32, eps1: f32) -> Result<Vec<f32>> {
    let Some((rows, cols)) = matrix(&state.shape) else {
        let [variance] = state.tensors([gradient.len()])?;
        let work = variance.values.chunks_mut(CHUNK).zip(gradient.chunks(CHUNK)).collect();
        for_each(work, |(variance, gradient): (&mut [f32], &[f32])| {
            let learn = |(v, g): (&mut f32, &f32)| *v = lerp(*v, g * g, weight);
            pulp::Arch::new().dispatch(|| variance.iter_mut().zip(gradient).for_each(learn));
        });
        return Ok(Vec::new());
    };
    let [row_var, col_var] = state.tensors([gradient.len() / cols, gradient.len() / rows])?;
    learn_rows(gradient, &mut row_var.values, cols, weight);
    learn_columns(gradient, &mut col_var.values, rows, cols, weight);
    let mean = |rows: &[f32]| {
        let sum: f64 = rows.iter().map(|row| f64::from(*row)).sum();
        ((sum / rows.len() as f64) as f32).max(eps1)
    };
    Ok(row_var.values.chunks(rows).map(mean).collect())
}

/// Rows and columns of the last two dimensions, where there are two.
fn matrix(shape: &[usize]) -> Option<(usize, usize)> {
    match shape {
        [.., rows, cols] => Some((*rows, *cols)),
        _ => None,
    }
}

fn learn_rows(gradient: &[f32], row_var: &mut [f32], cols: usize, weight: f32) {
    let per_block = CHUNK.div_ceil(cols);
    let rows = row_var.chunks_mut(per_block).zip(gradient.chunks(per_block * cols));
    for_each(rows.collect(), |(row_var, gradient): (&mut [f32], &[f32])| {
        for (v, row) in row_var.iter_mut().zip(gradient.chunks(cols)) {
            let mean = pulp::Arch::new().dispatch(SquareSum(row)) / cols as f64;
            *v = lerp(*v, mean as f32, weight);
        }
    });
}

fn learn_columns(gradient: &[f32], col_var: &mut [f32], rows: usize, cols: usize, weight: f32) {
    let matrices = gradient.chunks(rows * cols).zip(col_var.chunks_mut(cols));
    let blocks = matrices.flat_map(|(matrix, col_var)| {
        let blocks = col_var.chunks_mut(COLUMNS).enumerate();
        blocks.map(move |(block, col_var)| (matrix, block * COLUMNS, col_var))
    });
    for_each(blocks.collect(), |(matrix, first, col_var): (&[f32], usize, &mut [f32])| {
        let columns = first..first + col_var.len();
        let sums = pulp::Arch::new().dispatch(ColumnSquares { matrix, cols, columns });
        for (v, sum) in col_var.iter_mut().zip(sums) {
            *v = lerp(*v, (sum / rows as f64) as f32, weight);
        }
    });
}

/// A piece of a parameter whose variance is `row` · `cols` / `mean`.
struct Line<'a> {
    values: &'a mut [f32],
    gradient: &'a [f32],
    row: f32,
    cols: &'a [f32],
    mean: f32,
}

fn lines<'a>(
    values: &'a mut [f32],
    gradient: &'a [f32],
    state: &'a mut ParamState,
    means: &[f32],
) -> Result<Vec<Line<'a>>> {
    let Some((rows, cols)) = matrix(&state.shape) else {
        let [variance] = state.tensors([gradient.len()])?;
        let pieces = values.chunks_mut(CHUNK).zip(gradient.chunks(CHUNK));
        let pieces = pieces.zip(variance.values.chunks(CHUNK));
        let line =
            |((values, gradient), cols)| Line { values, gradient, row: 1.0, cols, mean: 1.0 };
        return Ok(pieces.map(line).collect());
    };
    let [row_var, col_var] = state.tensors([gradient.len() / cols, gradient.len() / rows])?;
    let line = |(at, (values, gradient))| {
        let (row, matrix) = (row_var.values[at], at / rows);
        let columns = &col_var.values[matrix * cols..(matrix + 1) * cols];
        Line { values, gradient, row, cols: columns, mean: means[matrix] }
    };
    let pieces = values.chunks_mut(cols).zip(gradient.chunks(cols)).enumerate();
    Ok(pieces.map(line).collect())
}

/// The lines in groups that are worth a thread, and a place for a sum of each.
fn blocks(lines: Vec<Line<'_>>) -> (Vec<Vec<Line<'_>>>, Vec<f64>) {
    let per_block = CHUNK.div_ceil(lines.first().map_or(1, |line| line.values.len()).max(1));
    let mut blocks: Vec<Vec<Line<'_>>> = Vec::with_capacity(lines.len().div_ceil(per_block));
    for line in lines {
        match blocks.last_mut() {
            Some(block) if block.len() < per_block => block.push(line),
            _ => blocks.push(vec![line]),
        }
    }
    let sums = vec![0.0; blocks.len()];
    (blocks, sums)
}

#[inline(always)]
fn direction(gradient: f32, row: f32, col: f32, mean: f32, floor: f32) -> f32 {
    let variance = row * col / mean;
    // Not `max`, whose care for NaN costs two instructions: a NaN stays one.
    let variance = if variance < floor { floor } else { variance };
    gradient * (1.0 / variance.sqrt())
}

/// The sum of squares of each of some columns.
struct ColumnSquares<'a> {
    matrix: &'a [f32],
    cols: usize,
    columns: Range<usize>,
}

impl NullaryFnOnce for ColumnSquares<'_> {
    type Output = [f64; COLUMNS];

    #[inline(always)]
    fn call(self) -> [f64; COLUMNS] {
        let mut sums = [0.0; COLUMNS];
        for row in self.matrix.chunks(self.cols) {
            for (sum, g) in sums.iter_mut().zip(&row[self.columns.clone()]) {
                *sum += f64::from(*g) * f64::from(*g);
            }
        }
        sums
    }
}

struct UpdateSquares<'a, 'b> {
    lines: &'a [Line<'b>],
    floor: f32,
}

impl NullaryFnOnce for UpdateSquares<'_, '_> {
    type Output = f64;

    #[inline(always)]
    fn call(self) -> f64 {
        let mut sums = [0.0f64; 16];
        for line in self.lines {
            for (gradient, cols) in line.gradient.chunks(16).zip(line.cols.chunks(16)) {
                for ((sum, g), col) in sums.iter_mut().zip(gradient).zip(cols) {
                    let u = f64::from(direction(*g, line.row, *col, line.mean, self.floor));
                    *sum += u * u;
                }
            }
        }
        sums.iter().sum()
    }
}

struct Apply<'a> {
    lines: Vec<Line<'a>>,
    floor: f32,
    decay: f32,
    step: f32,
}

impl NullaryFnOnce for Apply<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        for Line { values, gradient, row, cols, mean } in self.lines {
            for ((p, g), col) in values.iter_mut().zip(gradient).zip(cols) {
                let u = direction(*g, row, *col, mean, self.floor);
                *p = *p * self.decay - self.step * u;
            }
        }
    }
}
