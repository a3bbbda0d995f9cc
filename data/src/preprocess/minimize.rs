//! The minimum of a function of one number.

/// Brent's method between two bounds (*Algorithms for Minimization without Derivatives*, 1973, ch.
/// 5): golden sections, and steps to the vertex of a parabola where these are safe. To a tolerance
/// of 1.48e-8, SciPy's, in at most 500 calls.
pub(super) fn minimize(mut function: impl FnMut(f64) -> f64, mut low: f64, mut high: f64) -> f64 {
    let golden = 0.5 * (3.0 - 5f64.sqrt());
    // The best place, the second best, and the one before; the value at each.
    let mut x = low + golden * (high - low);
    let (mut w, mut v, mut fx) = (x, x, function(x));
    let (mut fw, mut fv) = (fx, fx);
    let (mut step, mut before) = (0.0f64, 0.0f64);
    for _ in 0..500 {
        let middle = 0.5 * (low + high);
        let least = f64::EPSILON.sqrt() * x.abs() + 1.48e-8 / 3.0;
        if (x - middle).abs() <= 2.0 * least - 0.5 * (high - low) {
            break;
        }
        let parabola = vertex([x, w, v], [fx, fw, fv]).filter(|to| {
            let inside = low < x + to && x + to < high;
            before.abs() > least && inside && to.abs() < (0.5 * before).abs()
        });
        (before, step) = match parabola {
            Some(to) => (step, stay_inside(x, to, low, high, middle, 2.0 * least)),
            None => {
                let side = if x >= middle { low - x } else { high - x };
                (side, golden * side)
            }
        };
        let u = x + step.abs().max(least).copysign(step);
        let fu = function(u);
        if fu <= fx {
            *(if u >= x { &mut low } else { &mut high }) = x;
            (v, w, x) = (w, x, u);
            (fv, fw, fx) = (fw, fx, fu);
            continue;
        }
        *(if u < x { &mut low } else { &mut high }) = u;
        if fu <= fw || w == x {
            (v, w, fv, fw) = (w, u, fw, fu);
        } else if fu <= fv || v == x || v == w {
            (v, fv) = (u, fu);
        }
    }
    x
}

/// How far it is from the first place to the vertex of the parabola through all three.
fn vertex([x, w, v]: [f64; 3], [fx, fw, fv]: [f64; 3]) -> Option<f64> {
    let r = (x - w) * (fx - fv);
    let q = (x - v) * (fx - fw);
    let (p, q) = ((x - v) * q - (x - w) * r, 2.0 * (q - r));
    let to = -p / q;
    to.is_finite().then_some(to)
}

/// Never closer to a bound than `least`: there is nothing to learn.
fn stay_inside(x: f64, to: f64, low: f64, high: f64, middle: f64, least: f64) -> f64 {
    let near = (x + to - low) < least || (high - (x + to)) < least;
    if near { (0.5 * least).copysign(middle - x) } else { to }
}

#[cfg(test)]
mod tests {
    use super::minimize;

    #[test]
    fn finds_minima_inside_and_at_the_bounds() {
        let close = |got: f64, expected: f64| assert!((got - expected).abs() < 1e-7, "{got}");
        close(minimize(|x| (x - 0.7).powi(2), -2.0, 2.0), 0.7);
        close(minimize(|x| (x - 1.3).powi(4) + x, -9.0, 40.0), 1.3 - 0.25f64.cbrt());
        close(minimize(|x| x.cosh() - x, -50.0, 50.0), 1f64.asinh());
        close(minimize(|x| x, 1.0, 3.0), 1.0);
        assert!(minimize(|_| f64::INFINITY, 0.0, 1.0).is_finite());
    }
}
