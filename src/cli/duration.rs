//! Durations as people write them.

use std::time::Duration;

/// `5s`, `500ms`, `1.5m`, `2h`; a number alone is seconds.
pub(crate) fn parse(text: &str) -> Result<Duration, String> {
    let unit_at = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
    let (number, unit) = text.split_at(unit_at);
    let seconds = match unit {
        "ms" => 1e-3,
        "s" | "" => 1.0,
        "m" | "min" => 60.0,
        "h" => 3600.0,
        _ => return Err(format!("{unit:?} is no unit of time: expected ms, s, m or h")),
    };
    let number: f64 = number
        .trim()
        .parse()
        .map_err(|_| "expected a number and a unit, such as 5s, 500ms, 2m or 1h".to_owned())?;
    match Duration::try_from_secs_f64(number * seconds) {
        Ok(duration) if !duration.is_zero() => Ok(duration),
        _ => Err("expected more than no time, and less than for ever".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::parse;
    use std::time::Duration;

    #[test]
    fn durations_have_a_number_and_a_unit() {
        let check = |text, ms| assert_eq!(parse(text), Ok(Duration::from_millis(ms)), "{text}");
        check("5s", 5_000);
        check("500ms", 500);
        check("1.5m", 90_000);
        check("2 h", 7_200_000);
        check("7", 7_000);
        for text in ["", "s", "5 days", "-1s", "0s", "1e300h", "NaN"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
