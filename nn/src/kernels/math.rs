//! Scalars, and functions of them that the compiler can turn into vector code.

use candle_core::WithDType;

/// `f32` or `f64`.
///
/// The functions of `f32` are polynomials without branches, right to a few units in the last
/// place (tested below): the standard library's are calls, one element at a time. Those of `f64`
/// are the standard library's, since that type is for checks.
pub(crate) trait Real: WithDType {
    /// `e^x`; 0 below about −87 in `f32`.
    fn exp(self) -> Self;
    /// Hyperbolic tangent.
    fn tanh(self) -> Self;
    /// The error function.
    fn erf(self) -> Self;
    /// Natural logarithm; not vectorised.
    fn ln(self) -> Self;
    /// `ln(1 + self)` for `self` in `[0, 1]`.
    fn ln_1p(self) -> Self;
    fn sqrt(self) -> Self;
    fn abs(self) -> Self;
    /// `self · a + b`, rounded once.
    fn mul_add(self, a: Self, b: Self) -> Self;
    /// The larger one; `other` if `self` is NaN.
    fn larger(self, other: Self) -> Self;

    /// `self` where the condition holds, else 0, without a branch.
    fn when(self, condition: bool) -> Self;
    /// The same slice, if that is its type.
    fn of_f32(values: &mut [f32]) -> Option<&mut [Self]>;
    /// The other way round.
    fn f32s(values: &[Self]) -> Option<&[f32]>;
    /// The other way round.
    fn f32s_mut(values: &mut [Self]) -> Option<&mut [f32]>;

    /// `1 / (1 + e^−x)`.
    #[inline(always)]
    fn sigmoid(self) -> Self {
        Self::one() / (Self::one() + (Self::zero() - self).exp())
    }
}

impl Real for f64 {
    #[inline(always)]
    fn exp(self) -> Self {
        self.exp()
    }

    #[inline(always)]
    fn tanh(self) -> Self {
        self.tanh()
    }

    #[inline(always)]
    fn erf(self) -> Self {
        libm::erf(self)
    }

    #[inline(always)]
    fn when(self, condition: bool) -> Self {
        Self::from_bits(self.to_bits() & u64::from(condition).wrapping_neg())
    }

    fn of_f32(_: &mut [f32]) -> Option<&mut [Self]> {
        None
    }

    fn f32s(_: &[Self]) -> Option<&[f32]> {
        None
    }

    fn f32s_mut(_: &mut [Self]) -> Option<&mut [f32]> {
        None
    }

    #[inline(always)]
    fn ln(self) -> Self {
        self.ln()
    }

    #[inline(always)]
    fn ln_1p(self) -> Self {
        self.ln_1p()
    }

    #[inline(always)]
    fn sqrt(self) -> Self {
        self.sqrt()
    }

    #[inline(always)]
    fn abs(self) -> Self {
        self.abs()
    }

    #[inline(always)]
    fn mul_add(self, a: Self, b: Self) -> Self {
        self.mul_add(a, b)
    }

    #[inline(always)]
    fn larger(self, other: Self) -> Self {
        if self > other { self } else { other }
    }
}

impl Real for f32 {
    /// Cephes' `expf` (Moshier): 2ⁿ times a polynomial of the rest.
    #[inline(always)]
    fn exp(self) -> Self {
        const LN2_HIGH: f32 = 0.693_359_4;
        const LN2_LOW: f32 = -2.121_944_4e-4;
        // Adding it rounds to an integer, which then stands in the lowest bits; 127 is the bias of
        // an exponent.
        const ROUND: f32 = 12_582_912.0 + 127.0;
        // Beyond these, infinity and 0; a NaN stays one, for `clamp` returns it.
        let x = self.clamp(-87.336_54, 88.722_83);
        let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
        let n = shifted - ROUND;
        let r = n.mul_add(-LN2_LOW, n.mul_add(-LN2_HIGH, x));
        let mut p = 1.987_569_1e-4f32;
        for c in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
            p = p.mul_add(r, c);
        }
        let p = p.mul_add(r * r, r) + 1.0;
        // In two factors, for 2¹²⁸ is no `f32`.
        let biased = shifted.to_bits() & 0x1ff;
        let half = (biased + 127) >> 1;
        let y = p * f32::from_bits(half << 23) * f32::from_bits((biased + 127 - half) << 23);
        let y = if self > 88.722_83 { f32::INFINITY } else { y };
        if self < -87.336_54 { 0.0 } else { y }
    }

    /// Eigen's rational approximation of degree 13 over 6.
    #[inline(always)]
    fn tanh(self) -> Self {
        let x = self.clamp(-7.905_311, 7.905_311);
        let x2 = x * x;
        let mut p = -2.760_768_5e-16f32;
        for c in [
            2.000_188e-13,
            -8.604_672e-11,
            5.122_297_1e-8,
            1.485_722_3e-5,
            6.372_619e-4,
            4.893_524_6e-3,
        ] {
            p = p.mul_add(x2, c);
        }
        let mut q = 1.198_258_4e-6f32;
        for c in [1.185_347_1e-4, 2.268_434_6e-3, 4.893_525e-3] {
            q = q.mul_add(x2, c);
        }
        (x * p / q).clamp(-1.0, 1.0)
    }

    /// Eigen's rational approximation of degree 13 over 8.
    #[inline(always)]
    fn erf(self) -> Self {
        let x = self.clamp(-4.0, 4.0);
        let x2 = x * x;
        let mut p = -2.726_142_3e-10f32;
        for c in [
            2.770_681_4e-8,
            -2.101_024e-6,
            -5.692_506_3e-5,
            -7.349_906_5e-4,
            -2.954_6e-3,
            -1.609_603_3e-2,
        ] {
            p = p.mul_add(x2, c);
        }
        let mut q = -1.456_607_2e-5f32;
        for c in [-2.133_740_6e-4, -1.682_827e-3, -7.373_329e-3, -1.426_474e-2] {
            q = q.mul_add(x2, c);
        }
        (x * p / q).clamp(-1.0, 1.0)
    }

    #[inline(always)]
    fn when(self, condition: bool) -> Self {
        Self::from_bits(self.to_bits() & u32::from(condition).wrapping_neg())
    }

    fn of_f32(values: &mut [f32]) -> Option<&mut [Self]> {
        Some(values)
    }

    fn f32s(values: &[Self]) -> Option<&[f32]> {
        Some(values)
    }

    fn f32s_mut(values: &mut [Self]) -> Option<&mut [f32]> {
        Some(values)
    }

    /// 2 · artanh(x / (2 + x)), of whose series eight terms are enough up to a third.
    #[inline(always)]
    fn ln_1p(self) -> Self {
        let s = self / (2.0 + self);
        let s2 = s * s;
        let mut p = 2.0 / 15.0;
        for odd in [13.0, 11.0, 9.0, 7.0, 5.0, 3.0, 1.0f32] {
            p = p.mul_add(s2, 2.0 / odd);
        }
        s * p
    }

    #[inline(always)]
    fn ln(self) -> Self {
        self.ln()
    }

    #[inline(always)]
    fn sqrt(self) -> Self {
        self.sqrt()
    }

    #[inline(always)]
    fn abs(self) -> Self {
        self.abs()
    }

    #[inline(always)]
    fn mul_add(self, a: Self, b: Self) -> Self {
        self.mul_add(a, b)
    }

    #[inline(always)]
    fn larger(self, other: Self) -> Self {
        if self > other { self } else { other }
    }
}

#[cfg(test)]
mod tests {
    use super::Real;

    /// The largest error over a grid, relative to the value or to `floor`.
    fn error(
        range: std::ops::Range<f32>,
        floor: f64,
        ours: fn(f32) -> f32,
        exact: fn(f64) -> f64,
    ) -> f64 {
        let step = (range.end - range.start) / 100_003.0;
        let at = |i: u16, j: u16| range.start + step * (f32::from(i) * 256.0 + f32::from(j));
        let points = (0..390).flat_map(|i| (0..256).map(move |j| (i, j)));
        let errors = points.map(|(i, j)| at(i, j)).map(|x| {
            let exact = exact(f64::from(x));
            (f64::from(ours(x)) - exact).abs() / exact.abs().max(floor)
        });
        errors.fold(0.0, f64::max)
    }

    #[test]
    fn functions_are_right_to_a_few_units_in_the_last_place() {
        const ULP: f64 = f32::EPSILON as f64;
        let exp = error(-87.0..88.7, 0.0, Real::exp, f64::exp);
        assert!(exp < 2.0 * ULP, "exp {exp:e}");
        let tanh = error(-9.0..9.0, 1e-30, Real::tanh, f64::tanh);
        assert!(tanh < 5.0 * ULP, "tanh {tanh:e}");
        let erf = error(-5.0..5.0, 1e-30, Real::erf, libm::erf);
        assert!(erf < 5.0 * ULP, "erf {erf:e}");
        let ln_1p = error(0.0..1.0, 1e-30, Real::ln_1p, f64::ln_1p);
        assert!(ln_1p < 4.0 * ULP, "ln_1p {ln_1p:e}");
        let sigmoid = error(-80.0..80.0, 0.0, Real::sigmoid, |x| 1.0 / (1.0 + (-x).exp()));
        assert!(sigmoid < 4.0 * ULP, "sigmoid {sigmoid:e}");
    }

    #[test]
    fn the_ends_are_what_they_should_be() {
        assert_eq!(Real::exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(Real::exp(-200f32), 0.0);
        assert_eq!(Real::exp(0f32), 1.0);
        assert_eq!(Real::exp(f32::INFINITY), f32::INFINITY);
        assert_eq!(Real::exp(89f32), f32::INFINITY);
        assert_eq!(Real::tanh(0f32), 0.0);
        assert!((Real::tanh(100f32) - 1.0).abs() < 5e-7);
        assert_eq!(Real::sigmoid(-200f32), 0.0);
        assert_eq!(Real::sigmoid(200f32), 1.0);
        for f in [Real::exp, Real::tanh, Real::erf, Real::sigmoid] as [fn(f32) -> f32; 4] {
            assert!(f(f32::NAN).is_nan());
        }
    }
}
