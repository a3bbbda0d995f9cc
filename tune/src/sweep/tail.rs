//! Reading a file that another process is writing, line by line.

use serde_json::Value;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::PathBuf;

/// A lines' reader that goes on where it was.
#[derive(Debug)]
pub(crate) struct Tail {
    path: PathBuf,
    offset: u64,
    partial: Vec<u8>,
}

impl Tail {
    pub(crate) fn new(path: PathBuf) -> Self {
        Self { path, offset: 0, partial: Vec::new() }
    }

    /// The whole lines that have been added since the last call; none of a file that is not there.
    pub(crate) fn lines(&mut self) -> Vec<String> {
        // A file that cannot be read now may be there the next time: metrics appear when they do.
        let Ok(added) = self.added() else {
            return Vec::new();
        };
        self.partial.extend(added);
        let whole = self.partial.iter().rposition(|b| *b == b'\n').map_or(0, |at| at + 1);
        let rest = self.partial.split_off(whole);
        let text = std::mem::replace(&mut self.partial, rest);
        String::from_utf8_lossy(&text).lines().map(str::to_owned).collect()
    }

    fn added(&mut self) -> std::io::Result<Vec<u8>> {
        let mut file = File::open(&self.path)?;
        let length = file.metadata()?.len();
        if length < self.offset {
            // A writer that was started again cut off its torn last line.
            self.offset = length;
            self.partial.clear();
        }
        file.seek(SeekFrom::Start(self.offset))?;
        let mut added = Vec::new();
        let read = file.take(length - self.offset).read_to_end(&mut added)?;
        self.offset += read as u64;
        Ok(added)
    }
}

/// Step and metric of a line of JSON, which may follow other text on its line: stdout and stderr
/// share a log. A line without a step counts as the one after `last`.
pub(crate) fn measurement(line: &str, metric: &str, last: Option<u64>) -> Option<(u64, f64)> {
    let start = line.find('{')?;
    let object = parse(&line[start..])?;
    let value = match object.get(metric)? {
        Value::Null => f64::NAN,
        value => value.as_f64()?,
    };
    let step = match object.get("step") {
        Some(step) => step.as_u64().or_else(|| step.as_f64().map(|x| x as u64))?,
        None => last.map_or(1, |last| last + 1),
    };
    Some((step, value))
}

/// Python's `json` writes NaN and Infinity, which JSON does not have.
fn parse(text: &str) -> Option<Value> {
    let parsed = serde_json::from_str(text);
    parsed
        .or_else(|_| {
            serde_json::from_str(
                &text
                    .replace("-Infinity", "null")
                    .replace("Infinity", "null")
                    .replace("NaN", "null"),
            )
        })
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn measurements_are_found_in_what_programs_print() {
        let check = |line: &str, expected: Option<(u64, f64)>| {
            assert_eq!(measurement(line, "loss", Some(4)), expected, "{line}");
        };
        check(r#"{"step": 3, "time": 1.5, "loss": 0.25, "note": "x"}"#, Some((3, 0.25)));
        check(r#"epoch 3: 100% {"step": 3.0, "loss": 1}"#, Some((3, 1.0)));
        check(r#"{"loss": 0.5}"#, Some((5, 0.5)));
        check(r#"{"step": 3, "accuracy": 0.5}"#, None);
        check(r#"{"step": 3, "loss": "low"}"#, None);
        check("{not json}", None);
        check("", None);
        let nan = measurement(r#"{"step": 3, "loss": NaN}"#, "loss", None);
        assert!(nan.is_some_and(|(step, loss)| step == 3 && loss.is_nan()));
    }

    #[test]
    fn only_whole_lines_are_read_once() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let path = folder.path().join("log");
        let mut tail = Tail::new(path.clone());
        assert!(tail.lines().is_empty());
        let mut file = File::create(&path).expect("create");
        file.write_all(b"one\ntw").expect("write");
        assert_eq!(tail.lines(), ["one"]);
        file.write_all(b"o\nthree\nfo").expect("write");
        assert_eq!(tail.lines(), ["two", "three"]);
        // The writer is started again and drops its torn line.
        file.set_len(14).expect("truncate");
        file.seek(SeekFrom::End(0)).expect("seek");
        assert!(tail.lines().is_empty());
        file.write_all(b"four\n").expect("write");
        assert_eq!(tail.lines(), ["four"]);
    }
}
