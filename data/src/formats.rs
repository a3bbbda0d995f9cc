//! Files whose name says what they are.

use crate::Dataset;
use crate::error::{Error, Result};
use crate::remote;
use crate::source::csv::CsvOptions;
use std::path::Path;

/// Those that may be gzipped, and then have `.gz` behind.
const ZIPPED: [&str; 7] = ["csv", "jsonl", "json", "avro", "txt", "tfrecord", "tar"];

type Reader = fn(&str) -> Result<Dataset>;

/// The endings of names, and what reads such files.
const FORMATS: &[(&str, Reader)] = &[
    ("parquet", |pattern| Dataset::read_parquet(pattern)),
    ("csv", |pattern| Dataset::read_csv(pattern, CsvOptions::default())),
    ("jsonl", |pattern| Dataset::read_json(pattern)),
    ("json", |pattern| Dataset::read_json(pattern)),
    ("arrow", |pattern| Dataset::read_ipc(pattern)),
    ("feather", |pattern| Dataset::read_ipc(pattern)),
    ("avro", |pattern| Dataset::read_avro(pattern)),
    ("txt", |pattern| Dataset::read_text(pattern)),
    ("npy", |pattern| Dataset::read_npy(pattern)),
    ("npz", |pattern| Dataset::read_npz(pattern)),
    ("tfrecord", |pattern| Dataset::read_tfrecord(pattern)),
    ("tar", |pattern| Dataset::read_webdataset(pattern)),
];

impl Dataset {
    /// A file or a pattern whose ending says what it is: `.parquet`, `.csv`, `.json` and `.jsonl` (a row
    /// a line), `.arrow`, `.feather`, `.avro`, `.txt`, `.npy`, `.npz`, `.tfrecord`, `.tar` (WebDataset).
    /// Where `.gz` stands behind it, it is the ending before that. CSV is read with the default options.
    pub fn read(pattern: impl AsRef<str>) -> Result<Self> {
        let pattern = pattern.as_ref();
        let ending = ending(Path::new(pattern));
        // Before its ending is looked at: one with a query has another.
        remote::check(Path::new(pattern))?;
        match FORMATS.iter().find(|(known, _)| *known == ending) {
            Some((_, read)) => read(pattern),
            None => Err(Error::UnknownFormat {
                path: pattern.into(),
                known: FORMATS.iter().map(|(known, _)| *known).collect(),
            }),
        }
    }
}

/// What a name ends in, in small letters: of `a.csv.gz` it is `csv`, since that may be gzipped.
pub(crate) fn ending(path: &Path) -> String {
    let of = |path: &Path| path.extension().unwrap_or_default().to_string_lossy().to_lowercase();
    let last = of(path);
    let before = path.file_stem().map(|stem| of(Path::new(stem))).unwrap_or_default();
    if last == "gz" && ZIPPED.contains(&before.as_str()) { before } else { last }
}
