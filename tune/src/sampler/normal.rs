//! The normal distribution cut to an interval around its mean.

use std::f64::consts::{FRAC_1_SQRT_2, PI};

/// ln √(2π).
pub(crate) const LN_SQRT_TAU: f64 = 0.918_938_533_204_672_8;

/// Φ(x), accurate in the lower tail.
fn cdf(x: f64) -> f64 {
    0.5 * libm::erfc(-x * FRAC_1_SQRT_2)
}

/// Φ(high) − Φ(low) where `low <= 0 <= high`: no cancellation there.
pub(crate) fn central_mass(low: f64, high: f64) -> f64 {
    // erf is ±1 to the last bit beyond 6: most kernels of a long study are that far from a bound.
    let erf = |x: f64| {
        if x.abs() > 6.0 { x.signum() } else { libm::erf(x) }
    };
    0.5 * (erf(high * FRAC_1_SQRT_2) - erf(low * FRAC_1_SQRT_2))
}

/// ln(Φ(high) − Φ(low)) for any interval, also far out in a tail.
pub(crate) fn log_mass(low: f64, high: f64) -> f64 {
    if low <= 0.0 && high >= 0.0 {
        return central_mass(low, high).ln();
    }
    // By symmetry look at the lower tail, where Φ is small and exact.
    let (low, high) = if low > 0.0 { (-high, -low) } else { (low, high) };
    let (log_low, log_high) = (log_cdf(low), log_cdf(high));
    log_high + (-(log_low - log_high).exp()).ln_1p()
}

/// ln Φ(x) for x ≤ 0.
fn log_cdf(x: f64) -> f64 {
    if x > -30.0 {
        return cdf(x).ln();
    }
    // Mills' ratio as an asymptotic series: its next term is below 1e-11 here.
    let y = 1.0 / (x * x);
    let series = 1.0 - y * (1.0 - y * (3.0 - y * (15.0 - y * (105.0 - y * 945.0))));
    -0.5 * x * x - (-x).ln() - LN_SQRT_TAU + series.ln()
}

/// The quantile of `u` in `[0, 1)` of N(`mean`, `sigma`²) cut to `low..=high`, which hold `mean`.
pub(crate) fn truncated_quantile(u: f64, mean: f64, sigma: f64, low: f64, high: f64) -> f64 {
    let (a, b) = ((low - mean) / sigma, (high - mean) / sigma);
    let p = cdf(a) + u * central_mass(a, b);
    (mean + sigma * quantile(p)).clamp(low, high)
}

/// Φ⁻¹(p): a rational start (Abramowitz and Stegun 26.2.23), then Halley's method.
fn quantile(p: f64) -> f64 {
    if p > 0.5 {
        return -quantile(1.0 - p);
    }
    if p <= 0.0 {
        return f64::NEG_INFINITY;
    }
    let t = (-2.0 * p.ln()).sqrt();
    let top = 2.515_517 + t * (0.802_853 + t * 0.010_328);
    let bottom = 1.0 + t * (1.432_788 + t * (0.189_269 + t * 0.001_308));
    let mut x = top / bottom - t;
    for _ in 0..3 {
        let step = (cdf(x) - p) * (2.0 * PI).sqrt() * (0.5 * x * x).exp();
        x -= step / (1.0 + 0.5 * x * step);
    }
    x
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(got: f64, expected: f64, tolerance: f64) {
        assert!(
            (got - expected).abs() <= tolerance * expected.abs().max(1.0),
            "{got} != {expected}"
        );
    }

    /// Expected values from mpmath with 50 digits.
    #[test]
    fn masses_match_known_values() {
        close(central_mass(-1.0, 1.0), 0.682_689_492_137_085_9, 1e-15);
        close(central_mass(-9.0, 9.0), 1.0, 1e-15);
        close(log_mass(-2.0, -1.0), (0.135_905_121_983_277_87f64).ln(), 1e-14);
        close(log_mass(1.0, 2.0), log_mass(-2.0, -1.0), 1e-15);
        close(log_cdf(-40.0), -804.608_442_013_753_9, 1e-13);
        close(log_cdf(-29.999_999), log_cdf(-30.000_001), 1e-6);
    }

    #[test]
    fn quantiles_invert_the_distribution() {
        for i in 1..2000 {
            let p = f64::from(i) / 2000.0;
            close(cdf(quantile(p)), p, 1e-14);
        }
        close(quantile(1e-12), -7.034_483_825_301_131, 1e-12);
        for u in [0.0, 0.25, 0.5, 0.999_999] {
            let x = truncated_quantile(u, 0.1, 0.3, 0.0, 1.0);
            let expected = cdf((0.0 - 0.1) / 0.3) + u * central_mass(-0.1 / 0.3, 3.0);
            close(cdf((x - 0.1) / 0.3), expected, 1e-13);
        }
    }
}
