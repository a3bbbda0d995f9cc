//! PostgreSQL's `numeric` as it comes over the wire: digits of base 10,000.
//!
//! A value is the sum of `digit[i] * 10000^(weight - i)`. Layout, in big-endian 16-bit numbers: how many
//! digits, weight, sign, digits behind the point, the digits.

use arrow::datatypes::i256;

const HEAD: usize = 8;
/// What may be in the place of the sign.
const NEGATIVE: u16 = 0x4000;
const NAN: u16 = 0xc000;
const INFINITY: u16 = 0xd000;
const MINUS_INFINITY: u16 = 0xf000;

/// Digits of base 10,000, and which power of ten the last of them counts.
#[derive(Debug, PartialEq)]
pub(super) enum Numeric {
    Finite {
        is_negative: bool,
        digits: Vec<u16>,
        exponent: i32,
    },
    /// NaN or an infinity.
    Other(f64),
}

impl Numeric {
    /// Nothing if the bytes are no number.
    pub(super) fn of(raw: &[u8]) -> Option<Self> {
        let words: Vec<u16> =
            raw.chunks_exact(2).map(|word| u16::from_be_bytes([word[0], word[1]])).collect();
        let (head, digits) = words.split_at_checked(HEAD / 2)?;
        let (count, weight, sign) = (head[0] as usize, i32::from(head[1] as i16), head[2]);
        let exponent = 4 * (weight - count as i32 + 1);
        match sign {
            0 | NEGATIVE if digits.len() == count => {
                Some(Self::Finite { is_negative: sign != 0, digits: digits.to_vec(), exponent })
            }
            NAN => Some(Self::Other(f64::NAN)),
            INFINITY => Some(Self::Other(f64::INFINITY)),
            MINUS_INFINITY => Some(Self::Other(f64::NEG_INFINITY)),
            _ => None,
        }
    }

    /// The value times `10^scale`; nothing if that is no whole number, or too large.
    pub(super) fn unscaled(&self, scale: i8) -> Option<i256> {
        let Self::Finite { is_negative, digits, exponent } = self else { return None };
        let base = i256::from_i128(10_000);
        let whole = digits.iter().try_fold(i256::ZERO, |sum, digit| {
            sum.checked_mul(base)?.checked_add(i256::from_i128((*digit).into()))
        })?;
        let shift = exponent + i32::from(scale);
        let power = i256::from_i128(10).checked_pow(shift.unsigned_abs())?;
        let value = match shift {
            ..0 if whole % power != i256::ZERO => return None,
            ..0 => whole / power,
            0.. => whole.checked_mul(power)?,
        };
        Some(if *is_negative { value.wrapping_neg() } else { value })
    }

    /// The nearest float.
    pub(super) fn to_f64(&self) -> f64 {
        let Self::Finite { is_negative, digits, exponent } = self else {
            let Self::Other(value) = self else { return f64::NAN };
            return *value;
        };
        let mut text = String::from(if *is_negative { "-0" } else { "0" });
        digits.iter().for_each(|digit| text += &format!("{digit:04}"));
        text += &format!("e{exponent}");
        // Rust's parser rounds correctly, and beyond the largest float gives infinity.
        text.parse().unwrap_or(f64::NAN)
    }
}

/// The bytes of a number written as `-12.50`, `NaN`, `inf` or `-inf`; nothing if it is none.
pub(super) fn encode(text: &str) -> Option<Vec<u8>> {
    let special = match text {
        "NaN" => Some(NAN),
        "inf" => Some(INFINITY),
        "-inf" => Some(MINUS_INFINITY),
        _ => None,
    };
    if let Some(sign) = special {
        return Some(words([0, 0, sign, 0]));
    }
    let plain = text.strip_prefix('-').unwrap_or(text);
    let (whole, fraction) = plain.split_once('.').unwrap_or((plain, ""));
    let are_digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    if !are_digits(whole) || !are_digits(fraction) || plain.is_empty() {
        return None;
    }
    let (digits, weight) = trimmed(whole, fraction);
    let sign = if plain.len() < text.len() && !digits.is_empty() { NEGATIVE } else { 0 };
    let head = [digits.len() as u16, weight as u16, sign, fraction.len() as u16];
    Some(words(head.into_iter().chain(digits)))
}

/// Digits of base 10,000, without zeros at either end, and the power of 10,000 of the first.
fn trimmed(whole: &str, fraction: &str) -> (Vec<u16>, i16) {
    // The point is between two of them.
    let missing = |text: &str| "0".repeat(text.len().next_multiple_of(4) - text.len());
    let padded = format!("{}{whole}{fraction}{}", missing(whole), missing(fraction));
    let number = |four: &[u8]| four.iter().fold(0, |sum, byte| sum * 10 + u16::from(byte - b'0'));
    let mut digits: Vec<u16> = padded.as_bytes().chunks(4).map(number).collect();
    let zeros = digits.iter().take_while(|digit| **digit == 0).count();
    digits.drain(..zeros);
    while digits.last() == Some(&0) {
        digits.pop();
    }
    let weight = whole.len().div_ceil(4) as i16 - 1 - zeros as i16;
    if digits.is_empty() { (digits, 0) } else { (digits, weight) }
}

fn words(words: impl IntoIterator<Item = u16>) -> Vec<u8> {
    words.into_iter().flat_map(u16::to_be_bytes).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn number(text: &str) -> Numeric {
        Numeric::of(&encode(text).expect(text)).expect(text)
    }

    #[test]
    fn numbers_are_those_of_the_wire() {
        // As the server sends 12345.678::numeric(8, 3).
        let sent = words([3, 1, 0, 3, 1, 2345, 6780]);
        assert_eq!(encode("12345.678").expect("a number"), sent);
        let expected =
            Numeric::Finite { is_negative: false, digits: vec![1, 2345, 6780], exponent: -4 };
        assert_eq!(Numeric::of(&sent), Some(expected));
        assert_eq!(encode("-0.00").expect("a number"), words([0, 0, 0, 2]));
        assert_eq!(encode("0.00012").expect("a number"), words([2, 0xffff, 0, 5, 1, 2000]));
        for text in ["", "-", "1e5", "1.2.3", "x"] {
            assert_eq!(encode(text), None, "{text}");
        }
        assert_eq!(Numeric::of(&[0, 1]), None);
    }

    #[test]
    fn what_a_scale_has_not_is_no_number_of_it() {
        assert_eq!(number("1.25").unscaled(2), Some(i256::from_i128(125)));
        assert_eq!(number("1.25").unscaled(1), None);
        assert_eq!(number("1200").unscaled(0), Some(i256::from_i128(1200)));
        assert_eq!(number("NaN").unscaled(0), None);
        assert_eq!(number("-inf").to_f64(), f64::NEG_INFINITY);
        assert!(number("NaN").to_f64().is_nan());
    }

    proptest! {
        #[test]
        fn numbers_come_back(value: i128, scale in 0_i8..40, float: f64) {
            let digits = format!("{:0width$}", value.unsigned_abs(), width = scale as usize + 1);
            let (whole, fraction) = digits.split_at(digits.len() - scale as usize);
            let sign = if value < 0 { "-" } else { "" };
            let read = number(&format!("{sign}{whole}.{fraction}"));
            prop_assert_eq!(read.unscaled(scale), Some(i256::from_i128(value)));
            prop_assert_eq!(number(&format!("{float}")).to_f64(), float);
        }
    }
}
