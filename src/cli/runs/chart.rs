//! Draws panels of curves, and the names of the runs above them.

use super::curves::{Panel, Point};
use plotters::coord::Shift;
use plotters::coord::combinators::BindKeyPoints;
use plotters::coord::ranged1d::{AsRangedCoord, ValueFormatter};
use plotters::prelude::*;
use std::ops::Range;

/// Of a panel. Coordinates in the file are whole numbers, so it is drawn large.
const PANEL: (u32, u32) = (900, 560);
const LEGEND_LINE: u32 = 34;
const FONT: &str = "sans-serif";

/// Ten colours that are told apart (Tableau's); further runs begin again.
const COLOURS: [RGBColor; 10] = [
    RGBColor(31, 119, 180),
    RGBColor(255, 127, 14),
    RGBColor(44, 160, 44),
    RGBColor(214, 39, 40),
    RGBColor(148, 103, 189),
    RGBColor(140, 86, 75),
    RGBColor(227, 119, 194),
    RGBColor(127, 127, 127),
    RGBColor(188, 189, 34),
    RGBColor(23, 190, 207),
];

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// The text of the file. A panel has a curve for each run.
pub(super) fn svg(panels: &[Panel], runs: &[&str], log: bool) -> anyhow::Result<String> {
    let columns = if panels.len() > 1 { 2 } else { 1 };
    let rows = panels.len().div_ceil(columns);
    let legend = LEGEND_LINE * (runs.len() as u32) + 20;
    let size = (PANEL.0 * columns as u32, PANEL.1 * rows as u32 + legend);
    let mut text = String::new();
    {
        let all = SVGBackend::with_string(&mut text, size).into_drawing_area();
        all.fill(&WHITE)?;
        let (top, below) = all.split_vertically(legend);
        draw_legend(&top, runs)?;
        for (area, panel) in below.split_evenly((rows, columns)).iter().zip(panels) {
            let x = padded(range(panel, |point| point.0), 0.0);
            let y = range(panel, |point| point.1);
            match log {
                false => draw(area, panel, x, padded(y, 0.05))?,
                true => {
                    let ticks = log_ticks(y);
                    let (low, high) = (ticks[0], ticks[ticks.len() - 1]);
                    draw(area, panel, x, (low..high).log_scale().with_key_points(ticks))?;
                }
            }
        }
        all.present()?;
    }
    Ok(text)
}

/// A little of what is below shows through.
fn colour(run: usize) -> RGBAColor {
    COLOURS[run % COLOURS.len()].mix(0.8)
}

fn draw_legend(area: &Area<'_>, runs: &[&str]) -> anyhow::Result<()> {
    for (number, run) in runs.iter().enumerate() {
        let y = (LEGEND_LINE * number as u32) as i32 + 20;
        let line = [(40, y + 10), (90, y + 10)];
        area.draw(&Rectangle::new([line[0], (line[1].0, y + 14)], colour(number).filled()))?;
        area.draw(&Text::new((*run).to_owned(), (104, y), (FONT, 24)))?;
    }
    Ok(())
}

fn draw<Y>(area: &Area<'_>, panel: &Panel, x: Range<f64>, y: Y) -> anyhow::Result<()>
where
    Y: AsRangedCoord<Value = f64>,
    Y::CoordDescType: ValueFormatter<f64>,
{
    let mut chart = ChartBuilder::on(area)
        .margin(20)
        .caption(&panel.metric, (FONT, 28))
        .x_label_area_size(72)
        .y_label_area_size(110)
        .build_cartesian_2d(x, y)?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(BLACK.mix(0.12))
        .x_labels(9)
        .y_labels(9)
        .x_desc(&panel.x)
        .y_desc(&panel.metric)
        .label_style((FONT, 20))
        .axis_desc_style((FONT, 22))
        .x_label_formatter(&|value| number(*value))
        .y_label_formatter(&|value| number(*value))
        .draw()?;
    for (run, curve) in panel.curves.iter().enumerate() {
        for piece in curve {
            let colour = colour(run);
            match &piece[..] {
                [point] => chart.draw_series([Circle::new(*point, 4, colour.filled())])?,
                points => {
                    let path = PathElement::new(points.to_vec(), colour.stroke_width(3));
                    chart.draw_series([path])?
                }
            };
        }
    }
    Ok(())
}

/// From the least to the greatest. A panel has points.
fn range(panel: &Panel, coordinate: impl Fn(&Point) -> f64) -> Range<f64> {
    let numbers = || panel.curves.iter().flatten().flatten().map(&coordinate);
    numbers().fold(f64::INFINITY, f64::min)..numbers().fold(f64::NEG_INFINITY, f64::max)
}

/// With room around it; one that is a single number gets some.
fn padded(range: Range<f64>, share: f64) -> Range<f64> {
    let room = match range.end - range.start {
        0.0 => range.start.abs().max(1.0) * 0.1,
        width => width * share,
    };
    range.start - room..range.end + room
}

/// 1, 2, 5, 10 and so on around the range; beyond three decades, powers of 10 alone.
fn log_ticks(range: Range<f64>) -> Vec<f64> {
    let decades = range.start.log10().floor() as i32..=range.end.log10().ceil() as i32;
    let digits: &[f64] = if decades.clone().count() > 4 { &[1.0] } else { &[1.0, 2.0, 5.0] };
    let all: Vec<f64> = decades
        .flat_map(|decade| digits.iter().map(move |digit| digit * 10f64.powi(decade)))
        .collect();
    let first = all.iter().rposition(|tick| *tick <= range.start).unwrap_or(0);
    let last = all.iter().position(|tick| *tick >= range.end).unwrap_or(all.len() - 1);
    // A single number that is a tick itself.
    let last = last.max(first + 1).min(all.len() - 1);
    all[first.min(last - 1)..=last].to_vec()
}

/// As short as it can be told from its neighbours on an axis.
fn number(value: f64) -> String {
    let plain = |places: usize| {
        let text = format!("{value:.places$}");
        text.trim_end_matches('0').trim_end_matches('.').to_owned()
    };
    match value.abs() {
        ..1e-12 => "0".to_owned(),
        1e-3..1.0 => plain(5),
        1.0..1e6 => format!("{}", (value * 1e3).round() / 1e3),
        _ => format!("{:.3e}", value).replace(".000e", "e").replace("00e", "e").replace("0e", "e"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_of_a_logarithmic_axis_include_the_range() {
        assert_eq!(log_ticks(0.3..0.9), [0.2, 0.5, 1.0]);
        assert_eq!(log_ticks(1.0..1.0), [1.0, 2.0]);
        assert_eq!(log_ticks(0.5..30.0), [0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0]);
        let wide = log_ticks(3e-9..2.0);
        assert_eq!(wide.len(), 11, "{wide:?}");
        assert!(wide[0] <= 3e-9 && wide[10] >= 2.0);
    }

    #[test]
    fn numbers_are_short() {
        let check = |value, expected: &str| assert_eq!(number(value), expected);
        check(0.30000000000000004, "0.3");
        check(1e-17, "0");
        check(-0.25, "-0.25");
        check(2000.0, "2000");
        check(12.5, "12.5");
        check(2e6, "2e6");
        check(1.5e-5, "1.5e-5");
    }
}
