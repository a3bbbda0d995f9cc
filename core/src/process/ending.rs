//! How a process ended, in words.

use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

/// `peak` is the most memory that it was seen to hold, in bytes; 0 if it was never seen.
pub(super) fn describe(status: ExitStatus, peak: u64) -> String {
    with_peak(format!("its process {}", how(status)), peak)
}

/// What a process did in the end.
pub(super) fn how(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exited with code {code}"),
        (_, Some(signal)) => format!("was killed by signal {signal}{}", bracketed_name(signal)),
        _ => "ended".to_owned(),
    }
}

/// The same with the most memory that the process was seen to hold.
pub(super) fn with_peak(how: String, peak: u64) -> String {
    match peak {
        // Not seen since it began.
        0..1_000_000 => how,
        peak => format!("{how}, peak resident memory {}", amount(peak)),
    }
}

fn amount(bytes: u64) -> String {
    let bytes = bytes as f64;
    if bytes >= 1e9 { format!("{:.1} GB", bytes / 1e9) } else { format!("{:.0} MB", bytes / 1e6) }
}

fn bracketed_name(signal: i32) -> String {
    const NAMES: &[(i32, &str)] = &[
        (1, "HUP"),
        (2, "INT"),
        (3, "QUIT"),
        (4, "ILL"),
        (5, "TRAP"),
        (6, "ABRT"),
        (7, "BUS"),
        (8, "FPE"),
        (9, "KILL"),
        (10, "USR1"),
        (11, "SEGV"),
        (12, "USR2"),
        (13, "PIPE"),
        (14, "ALRM"),
        (15, "TERM"),
        (24, "XCPU"),
        (25, "XFSZ"),
        (31, "SYS"),
    ];
    let known = NAMES.iter().find(|(number, _)| *number == signal);
    known.map(|(_, name)| format!(" (SIG{name})")).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_names_the_signal_and_the_peak() {
        let cases = [
            (9, 3_100_000_000, "killed by signal 9 (SIGKILL), peak resident memory 3.1 GB"),
            (11, 12_345_678, "killed by signal 11 (SIGSEGV), peak resident memory 12 MB"),
            (40, 0, "killed by signal 40"),
            (3 << 8, 0, "exited with code 3"),
        ];
        for (raw, peak, expected) in cases {
            let text = describe(ExitStatus::from_raw(raw), peak);
            assert!(text.starts_with("its process ") && text.ends_with(expected), "{text}");
        }
    }
}
