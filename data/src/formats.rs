//! Files whose name says what they are.

use crate::Dataset;
use crate::error::{Error, Result};
use crate::source::csv::CsvOptions;
use std::path::Path;

type Reader = fn(&str) -> Result<Dataset>;

/// The endings of names, and what reads such files.
const FORMATS: &[(&str, Reader)] = &[
    ("parquet", |pattern| Dataset::read_parquet(pattern)),
    ("csv", |pattern| Dataset::read_csv(pattern, CsvOptions::default())),
    ("jsonl", |pattern| Dataset::read_json(pattern)),
    ("json", |pattern| Dataset::read_json(pattern)),
    ("arrow", |pattern| Dataset::read_ipc(pattern)),
    ("feather", |pattern| Dataset::read_ipc(pattern)),
    ("txt", |pattern| Dataset::read_text(pattern)),
    ("npy", |pattern| Dataset::read_npy(pattern)),
    ("npz", |pattern| Dataset::read_npz(pattern)),
    ("tfrecord", |pattern| Dataset::read_tfrecord(pattern)),
    ("tar", |pattern| Dataset::read_webdataset(pattern)),
];

impl Dataset {
    /// A file or a pattern whose ending says what it is: `.parquet`, `.csv`, `.json` and `.jsonl` (a row
    /// a line), `.arrow`, `.feather`, `.txt`, `.npy`, `.npz`, `.tfrecord`, `.tar` (WebDataset). CSV is
    /// read with the default options.
    pub fn read(pattern: impl AsRef<str>) -> Result<Self> {
        let pattern = pattern.as_ref();
        let ending = Path::new(pattern).extension().unwrap_or_default();
        match FORMATS.iter().find(|(known, _)| ending.eq_ignore_ascii_case(known)) {
            Some((_, read)) => read(pattern),
            None => Err(Error::UnknownFormat {
                path: pattern.into(),
                known: FORMATS.iter().map(|(known, _)| *known).collect(),
            }),
        }
    }
}
