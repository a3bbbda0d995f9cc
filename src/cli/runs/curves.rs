//! The curves of metrics: which points there are, and where a line would lie.

use super::plot::Measured;
use anyhow::{bail, ensure};
use mobula_core::run::MetricsLine;
use std::collections::BTreeSet;

/// What a curve is drawn against.
#[derive(Clone, Copy, Debug, PartialEq, clap::ValueEnum)]
pub(super) enum Axis {
    Step,
    Time,
    Epoch,
}

/// How curves are drawn.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub(super) x: Axis,
    pub(super) smooth: f64,
    pub(super) log: bool,
}

/// A metric of several runs.
#[derive(Debug, PartialEq)]
pub(super) struct Panel {
    pub(super) metric: String,
    /// What the numbers along the x axis are.
    pub(super) x: String,
    /// Those of a run that has not measured it are empty.
    pub(super) curves: Vec<Curve>,
}

/// The pieces of a curve: between them something was measured that is no number.
pub(super) type Curve = Vec<Vec<Point>>;
pub(super) type Point = (f64, f64);

/// A piece with more points than can be seen is thinned out to about so many.
const MOST_POINTS: usize = 4000;

/// The curve of each run. Errors if there is nothing to draw.
pub(super) fn panel(metric: &str, runs: &[Measured], shape: Shape) -> anyhow::Result<Panel> {
    let mut curves =
        runs.iter().map(|run| curve(metric, run, shape)).collect::<Result<Vec<_>, _>>()?;
    if curves.iter().all(Vec::is_empty) {
        let what =
            if shape.log { "above 0: a logarithmic scale has no room for it" } else { "to draw" };
        bail!("{metric:?} has no value {what}");
    }
    let x = match shape.x {
        Axis::Step => "step".to_owned(),
        Axis::Epoch => "epoch".to_owned(),
        Axis::Time => format!("time in {}", scale_time(&mut curves)),
    };
    Ok(Panel { metric: metric.to_owned(), x, curves })
}

fn curve(metric: &str, run: &Measured, shape: Shape) -> anyhow::Result<Curve> {
    let lines = last_told(metric, &run.lines);
    let places = Places::of(shape.x, run)?;
    let mut average = Average { keep: shape.smooth, sum: 0.0, weight: 0.0 };
    let mut point = |line: &MetricsLine| {
        let value = line.values.get(metric).copied().filter(|value| value.is_finite())?;
        let value = average.next(value);
        (!shape.log || value > 0.0).then(|| (places.place(line), value))
    };
    let points: Vec<Option<Point>> = lines.into_iter().map(&mut point).collect();
    let pieces = points.split(Option::is_none).filter(|piece| !piece.is_empty());
    Ok(pieces.map(|piece| thinned(piece.iter().copied().flatten().collect())).collect())
}

/// The lines that have the metric, or would if it were a number: `metrics.jsonl` has no NaN. Of a run
/// that went back to an earlier step, what it has told since.
fn last_told<'a>(metric: &str, lines: &'a [MetricsLine]) -> Vec<&'a MetricsLine> {
    let mut told: Vec<&MetricsLine> = Vec::new();
    for line in alike(metric, lines) {
        let has_it = line.values.contains_key(metric);
        let is_again =
            |last: &&MetricsLine| last.step > line.step || has_it && last.step == line.step;
        while told.last().is_some_and(is_again) {
            told.pop();
        }
        // A step may have a second line, of other metrics.
        if has_it || told.last().is_none_or(|last| last.step < line.step) {
            told.push(line);
        }
    }
    told
}

/// The lines with the metric. Where it stands on most of those that have some of the names that are
/// always beside it, these are all of them: of the others it is missing.
fn alike<'a>(metric: &str, lines: &'a [MetricsLine]) -> Vec<&'a MetricsLine> {
    let names = |line: &'a MetricsLine| -> BTreeSet<&'a str> {
        line.values.keys().map(String::as_str).filter(|name| *name != metric).collect()
    };
    let with: Vec<&MetricsLine> =
        lines.iter().filter(|line| line.values.contains_key(metric)).collect();
    let beside = with.iter().map(|line| names(line)).reduce(|a, b| &a & &b).unwrap_or_default();
    let is_alike = |line: &&'a MetricsLine| {
        let names = names(line);
        line.values.contains_key(metric) || names.is_empty() || !names.is_disjoint(&beside)
    };
    let alike: Vec<&MetricsLine> = lines.iter().filter(is_alike).collect();
    if 2 * with.len() > alike.len() { alike } else { with }
}

/// Where along the x axis a line is.
enum Places {
    Step,
    /// Seconds since 1970.
    Since(f64),
    /// The step and the number of each epoch that ended.
    Epochs(Vec<Point>),
}

impl Places {
    fn of(x: Axis, run: &Measured) -> anyhow::Result<Self> {
        Ok(match x {
            Axis::Step => Self::Step,
            Axis::Time => {
                let times = run.lines.iter().map(|line| line.time);
                Self::Since(times.fold(f64::INFINITY, f64::min))
            }
            Axis::Epoch => {
                let ends = epochs(run);
                let name = &run.name;
                ensure!(!ends.is_empty(), "the run {name} has not told of an epoch: --x step");
                Self::Epochs(ends)
            }
        })
    }

    fn place(&self, line: &MetricsLine) -> f64 {
        match self {
            Self::Step => line.step as f64,
            Self::Since(begun) => line.time - begun,
            Self::Epochs(ends) => epoch_at(ends, line.step as f64),
        }
    }
}

fn epochs(run: &Measured) -> Vec<Point> {
    let told = last_told("epoch", &run.lines);
    let end = |line: &&MetricsLine| Some((line.step as f64, *line.values.get("epoch")?));
    told.iter().filter_map(end).filter(|(step, _)| *step > 0.0).collect()
}

/// The epoch that a step is in, with a fraction; past the last, epochs are as long as that was.
fn epoch_at(ends: &[Point], step: f64) -> f64 {
    let next = ends.partition_point(|(end, _)| *end < step).min(ends.len() - 1);
    let (to, last) = ends[next];
    let (from, first) = next.checked_sub(1).map_or((0.0, 0.0), |before| ends[before]);
    first + (last - first) * (step - from) / (to - from)
}

/// Turns seconds into what is read at a glance, and gives its name.
fn scale_time(curves: &mut [Curve]) -> &'static str {
    let points = curves.iter().flatten().flatten();
    let longest = points.map(|(seconds, _)| *seconds).fold(0.0, f64::max);
    let (unit, name) = match longest {
        ..300.0 => (1.0, "seconds"),
        300.0..18_000.0 => (60.0, "minutes"),
        _ => (3600.0, "hours"),
    };
    curves.iter_mut().flatten().flatten().for_each(|(seconds, _)| *seconds /= unit);
    name
}

/// An exponential moving average without a bias towards 0, as TensorBoard's.
struct Average {
    keep: f64,
    sum: f64,
    weight: f64,
}

impl Average {
    fn next(&mut self, value: f64) -> f64 {
        self.sum = self.keep * self.sum + (1.0 - self.keep) * value;
        self.weight = self.keep * self.weight + (1.0 - self.keep);
        self.sum / self.weight
    }
}

/// Of each of some stretches the lowest and the highest point, so that no spike is lost.
fn thinned(piece: Vec<Point>) -> Vec<Point> {
    if piece.len() <= MOST_POINTS {
        return piece;
    }
    let stretches = piece.chunks(piece.len().div_ceil(MOST_POINTS / 2));
    let ends = |stretch: &[Point]| {
        let low = stretch.iter().copied().min_by(|a, b| a.1.total_cmp(&b.1));
        let high = stretch.iter().copied().max_by(|a, b| a.1.total_cmp(&b.1));
        let mut ends: Vec<Point> = low.into_iter().chain(high).collect();
        ends.sort_by(|a, b| a.0.total_cmp(&b.0));
        ends
    };
    stretches.flat_map(ends).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Shape = Shape { x: Axis::Step, smooth: 0.0, log: false };

    /// Step, time, values.
    type Told<'a> = (u64, f64, &'a [(&'a str, f64)]);

    fn run(lines: &[Told<'_>]) -> Measured {
        let line = |(step, time, values): &Told<'_>| MetricsLine {
            step: *step,
            time: *time,
            values: values.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect(),
        };
        Measured { name: "r".to_owned(), lines: lines.iter().map(line).collect() }
    }

    fn curve_of(metric: &str, run: Measured, shape: Shape) -> Curve {
        panel(metric, &[run], shape).expect("a curve").curves.remove(0)
    }

    #[test]
    fn what_is_no_number_is_a_gap_and_what_is_rare_is_none() {
        let loss = |loss: f64| vec![("epoch", 0.0), ("loss", loss)];
        let (a, b, c) = (loss(3.0), loss(2.0), loss(1.0));
        let nan = [("epoch", 0.0)];
        let other = [("other", 1.0)];
        let (rare, rare_too) =
            ([a.clone(), vec![("rare", 5.0)]].concat(), [("rare", 6.0), ("epoch", 0.0)]);
        let steps = [("step/loss", 9.0)];
        let lines: [Told<'_>; 8] = [
            (1, 0.0, &rare),
            (2, 0.0, &steps),
            (2, 0.0, &b),
            (2, 0.0, &other),
            (3, 0.0, &nan),
            (4, 0.0, &rare_too),
            (5, 0.0, &c),
            (6, 0.0, &a),
        ];
        assert_eq!(
            curve_of("loss", run(&lines), PLAIN),
            [vec![(1.0, 3.0), (2.0, 2.0)], vec![(5.0, 1.0), (6.0, 3.0)]]
        );
        assert_eq!(curve_of("rare", run(&lines), PLAIN), [vec![(1.0, 5.0), (4.0, 6.0)]]);
        assert_eq!(curve_of("step/loss", run(&lines), PLAIN), [vec![(2.0, 9.0)]]);
    }

    #[test]
    fn what_was_made_again_counts() {
        let loss = |loss: f64| [("loss", loss)];
        let lines: [Told<'_>; 5] = [
            (1, 0.0, &loss(5.0)),
            (2, 1.0, &loss(4.0)),
            (3, 2.0, &loss(3.0)),
            (2, 3.0, &loss(40.0)),
            (3, 4.0, &loss(30.0)),
        ];
        assert_eq!(
            curve_of("loss", run(&lines), PLAIN),
            [vec![(1.0, 5.0), (2.0, 40.0), (3.0, 30.0)]]
        );
    }

    #[test]
    fn time_is_since_the_beginning_and_in_fitting_units() {
        let loss = [("loss", 1.0)];
        let lines: [Told<'_>; 2] = [(1, 1000.0, &loss), (2, 1600.0, &loss)];
        let shape = Shape { x: Axis::Time, ..PLAIN };
        let panel = panel("loss", &[run(&lines)], shape).expect("a curve");
        assert_eq!((panel.x.as_str(), &panel.curves[0][0][1]), ("time in minutes", &(10.0, 1.0)));
    }

    #[test]
    fn epochs_of_steps_lie_between_their_ends() {
        let ends = [(10.0, 1.0), (20.0, 2.0), (40.0, 3.0)];
        for (step, epoch) in [(5.0, 0.5), (10.0, 1.0), (15.0, 1.5), (30.0, 2.5), (50.0, 3.5)] {
            assert_eq!(epoch_at(&ends, step), epoch, "{step}");
        }
        let shape = Shape { x: Axis::Epoch, ..PLAIN };
        let loss = [("loss", 1.0)];
        let error = panel("loss", &[run(&[(1, 0.0, &loss)])], shape).expect_err("no epochs");
        assert!(error.to_string().contains("the run r has not told of an epoch"), "{error}");
    }

    #[test]
    fn smoothing_is_that_of_tensorboard_and_a_log_has_no_zero() {
        let (a, b, zero) = ([("x", 1.0)], [("x", 4.0)], [("x", 0.0)]);
        let lines: [Told<'_>; 3] = [(1, 0.0, &a), (2, 0.0, &b), (3, 0.0, &zero)];
        let smooth = curve_of("x", run(&lines), Shape { smooth: 0.5, ..PLAIN });
        // (0.5·1 + 0.5²·… ) / (1 - 0.5²) and so on.
        let expected = [1.0, (0.25 + 2.0) / 0.75, (0.125 + 1.0) / 0.875];
        let found: Vec<f64> = smooth[0].iter().map(|point| point.1).collect();
        assert!(found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-12), "{found:?}");

        let log = Shape { log: true, ..PLAIN };
        assert_eq!(curve_of("x", run(&lines), log), [vec![(1.0, 1.0), (2.0, 4.0)]]);
        let error = panel("x", &[run(&lines[2..])], log).expect_err("nothing").to_string();
        assert!(error.starts_with("\"x\" has no value above 0"), "{error}");
    }

    #[test]
    fn many_points_are_thinned_out_and_spikes_stay() {
        let mut points: Vec<Point> = (0..100_000).map(|i| (f64::from(i), 1.0)).collect();
        points[50_001].1 = 9.0;
        points[70_002].1 = -9.0;
        let thin = thinned(points);
        assert!(thin.len() <= MOST_POINTS);
        assert!(thin.contains(&(50_001.0, 9.0)) && thin.contains(&(70_002.0, -9.0)));
        assert!(thin.is_sorted_by(|a, b| a.0 <= b.0));
    }
}
