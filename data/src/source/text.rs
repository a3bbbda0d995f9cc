//! Text files: a row is a line.

use super::file::Pieces;
use super::records::{Decode, RecordBlocks, cut_lines, without_end};
use super::{Blocks, Source};
use crate::error::{Error, Result};
use arrow::array::{ArrayRef, StringArray};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use arrow::error::ArrowError;
use arrow::record_batch::RecordBatch;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::str;
use std::sync::Arc;

const FORMAT: &str = "UTF-8 text";

/// Files in the order in which they are read.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Text {
    pub(crate) files: Vec<PathBuf>,
}

#[typetag::serde(name = "text")]
impl Source for Text {
    fn open(&self) -> Result<Arc<dyn Blocks>> {
        let open = |path: &PathBuf| {
            let file = Pieces::open(path, FORMAT)?;
            let spans = file.blame(cut_lines(&file, |number, line| check(path, number, line)))?;
            Ok((file, spans))
        };
        let files = self.files.iter().map(open).collect::<Result<Vec<_>>>()?;
        let schema = Arc::new(Schema::new(vec![Field::new("text", DataType::Utf8, false)]));
        Ok(Arc::new(RecordBlocks::new(schema, files, Arc::new(TextDecode))))
    }

    fn summary(&self) -> String {
        super::paths::listed(&self.files)
    }
}

/// Every line is a row, if it is UTF-8.
fn check(path: &Path, number: u64, line: &[u8]) -> Result<bool> {
    let corrupt = |error: str::Utf8Error| Error::Corrupt {
        path: path.to_owned(),
        format: FORMAT,
        reason: format!("line {number}: {error}"),
    };
    str::from_utf8(line).map(|_| true).map_err(corrupt)
}

#[derive(Debug)]
struct TextDecode;

impl Decode for TextDecode {
    fn format(&self) -> &'static str {
        FORMAT
    }

    fn decode(
        &self,
        bytes: &[u8],
        _rows: usize,
        schema: &SchemaRef,
        projection: &[usize],
    ) -> Result<Vec<RecordBatch>, ArrowError> {
        let lines = bytes.split_inclusive(|byte| *byte == b'\n').map(without_end);
        let lines = lines.map(|line| str::from_utf8(line).map_err(ArrowError::from));
        let lines: ArrayRef =
            Arc::new(StringArray::from_iter_values(lines.collect::<Result<Vec<_>, _>>()?));
        Ok(vec![RecordBatch::try_new(schema.clone(), vec![lines])?.project(projection)?])
    }
}
