use crate::program::{Finished, mobula};
use mobula::RunDir;
use std::collections::BTreeMap;
use std::path::Path;

/// A run of some epochs of ten steps; the loss of epoch `nan` is no number.
fn make_run(root: &Path, name: &str, epochs: u64, nan: Option<u64>) -> RunDir {
    let run = RunDir::create(root, name, 7, &()).expect("a run");
    let mut metrics = run.metrics_writer().expect("metrics");
    let mut log = |step: u64, values: &[(&str, f64)]| {
        let values = values.iter().map(|(name, value)| ((*name).to_owned(), *value));
        metrics.log(step, &values.collect::<BTreeMap<_, _>>()).expect("a line");
    };
    for epoch in 1..=epochs {
        log(epoch * 10 - 5, &[("step/loss", 1.5 / epoch as f64), ("step/lr", 0.1)]);
        let loss = if nan == Some(epoch) { f64::NAN } else { 1.0 / epoch as f64 };
        let accuracy = 1.0 - 0.5 / epoch as f64;
        log(
            epoch * 10,
            &[
                ("epoch", epoch as f64),
                ("loss", loss),
                ("accuracy", accuracy),
                ("samples_per_second", 100.0),
            ],
        );
    }
    run
}

/// `mobula runs plot` of the runs in a folder into `plot.svg` there.
fn plot(root: &Path, more: &[&str]) -> Finished {
    let out = root.join("plot.svg");
    let place = ["--root", root.to_str().expect("UTF-8"), "--out", out.to_str().expect("UTF-8")];
    mobula(&[&["runs", "plot"], &place[..], more].concat())
}

/// The file that was written; every element of it is closed.
fn svg(root: &Path, more: &[&str]) -> String {
    let plotted = plot(root, more);
    assert_eq!(plotted.code, Some(0), "{plotted:?}");
    let svg = std::fs::read_to_string(root.join("plot.svg")).expect("the file");
    let opened = svg.matches('<').count();
    assert_eq!(opened, svg.matches('>').count());
    let closing = svg.matches("</").count();
    assert_eq!(opened, svg.matches("/>").count() + 2 * closing, "{svg}");
    assert!(svg.starts_with("<svg ") && svg.trim_end().ends_with("</svg>"));
    assert!(!svg.contains("NaN") && !svg.contains("inf"));
    svg
}

/// The points of each curve; axes and grids are thinner.
fn curves(svg: &str) -> Vec<Vec<(i32, i32)>> {
    let lines =
        svg.lines().filter(|l| l.starts_with("<polyline") && l.contains("stroke-width=\"3\""));
    let point = |point: &str| {
        let (x, y) = point.split_once(',').expect("two coordinates");
        (x.parse().expect("a number"), y.parse().expect("a number"))
    };
    let points = lines.map(|line| line.split("points=\"").nth(1).expect("points"));
    let points = points.map(|points| points.split('"').next().expect("an end").split_whitespace());
    points.map(|points| points.map(point).collect()).collect()
}

fn has_text(svg: &str, text: &str) -> bool {
    // Each text stands on a line of its own.
    svg.lines().any(|line| line == text)
}

#[test]
fn each_metric_has_a_panel_and_each_run_a_curve() {
    let root = tempfile::tempdir().expect("temporary folder");
    make_run(root.path(), "small", 4, None);
    make_run(root.path(), "large", 6, None);
    let svg = svg(root.path(), &["small", "large"]);
    let curves = curves(&svg);
    let lengths: Vec<usize> = curves.iter().map(Vec::len).collect();
    assert_eq!(lengths, [4, 6, 4, 6], "the loss, and then the accuracy");
    for text in ["small", "large", "loss", "accuracy", "step"] {
        assert!(has_text(&svg, text), "{text}: {svg}");
    }
    for text in ["samples_per_second", "step/loss", "epoch"] {
        assert!(!has_text(&svg, text), "{text}: {svg}");
    }
    // Pixels count downwards: the loss falls, the accuracy rises, both to the right.
    assert!(curves[0].is_sorted_by(|a, b| a.0 < b.0 && a.1 < b.1), "{curves:?}");
    assert!(curves[2].is_sorted_by(|a, b| a.0 < b.0 && a.1 > b.1), "{curves:?}");
}

#[test]
fn what_is_no_number_is_a_gap() {
    let root = tempfile::tempdir().expect("temporary folder");
    make_run(root.path(), "r", 7, Some(4));
    let svg = svg(root.path(), &["r", "--metric", "loss"]);
    let lengths: Vec<usize> = curves(&svg).iter().map(Vec::len).collect();
    assert_eq!(lengths, [3, 3]);
}

#[test]
fn a_run_that_was_rewound_is_drawn_once() {
    let root = tempfile::tempdir().expect("temporary folder");
    let run = make_run(root.path(), "r", 5, None);
    run.rewind_metrics(30, u64::MAX).expect("rewound");
    let mut metrics = run.metrics_writer().expect("metrics");
    for step in [40, 50, 60] {
        metrics.log(step, &BTreeMap::from([("loss".to_owned(), 0.1)])).expect("a line");
    }
    let svg = svg(root.path(), &["r", "--metric", "loss"]);
    let curves = curves(&svg);
    assert_eq!(curves.iter().map(Vec::len).collect::<Vec<_>>(), [6]);
    assert!(curves[0].is_sorted_by(|a, b| a.0 < b.0), "{curves:?}");
}

#[test]
fn curves_are_drawn_as_they_were_asked_for() {
    let root = tempfile::tempdir().expect("temporary folder");
    let run = make_run(root.path(), "a<b>&c", 6, None);
    let path = run.path().to_str().expect("UTF-8");
    let asked = ["--metric", "step/loss", "--x", "epoch", "--log", "--smooth", "0.5"];
    let drawn = svg(root.path(), &[&[path], &asked[..]].concat());
    assert_eq!(curves(&drawn).len(), 1);
    assert!(has_text(&drawn, "epoch") && has_text(&drawn, "a&lt;b&gt;&amp;c"), "{drawn}");
    let plain = svg(root.path(), &[path, "--metric", "step/loss", "--x", "time"]);
    assert!(has_text(&plain, "time in seconds"), "{plain}");
    assert_ne!(curves(&plain), curves(&drawn));
}

#[test]
fn what_cannot_be_drawn_is_one_line() {
    let root = tempfile::tempdir().expect("temporary folder");
    make_run(root.path(), "digits", 2, None);
    RunDir::create(root.path(), "young", 1, &()).expect("a run");
    let refused = |more: &[&str]| plot(root.path(), more).error().to_owned();
    let unknown = refused(&["digit"]);
    assert!(unknown.ends_with("there are: digits, young"), "{unknown}");
    let metric = refused(&["digits", "--metric", "f1"]);
    let expected = "there is no metric \"f1\"; there are: accuracy, epoch, loss, samples_per_second, \
                    step/loss, step/lr";
    assert_eq!(metric, expected);
    let young = refused(&["digits", "young"]);
    assert!(young.ends_with("young has no metrics yet"), "{young}");
    let smooth = refused(&["digits", "--smooth", "1"]);
    assert!(smooth.starts_with("--smooth is 1: expected 0 or more"), "{smooth}");
    assert!(!root.path().join("plot.svg").exists());
}
