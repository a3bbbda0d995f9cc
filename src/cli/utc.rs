//! Seconds since 1970 as a date.

/// What four digits of a year can show.
const END_OF_9999: f64 = 253_402_300_799.0;

/// `2026-11-22 16:30:00`, in UTC.
pub(crate) fn utc(seconds: f64) -> String {
    let seconds = seconds.clamp(0.0, END_OF_9999) as i64;
    let (year, month, day) = date(seconds / 86_400);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}")
}

/// Year, month and day of a number of days since 1970.
fn date(mut days: i64) -> (i64, usize, i64) {
    let leap = |year: i64| year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let mut year = 1970;
    while days >= 365 + i64::from(leap(year)) {
        days -= 365 + i64::from(leap(year));
        year += 1;
    }
    let february = 28 + i64::from(leap(year));
    let months = [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 0;
    while days >= months[month] {
        days -= months[month];
        month += 1;
    }
    (year, month + 1, days + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        let check = |seconds: f64, expected: &str| assert_eq!(utc(seconds), expected);
        check(0.0, "1970-01-01 00:00:00");
        check(951_782_400.0, "2000-02-29 00:00:00");
        check(1_709_251_199.9, "2024-02-29 23:59:59");
        check(1_767_225_600.0, "2026-01-01 00:00:00");
        check(1e300, "9999-12-31 23:59:59");
    }
}
