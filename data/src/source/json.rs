//! JSON lines: an object a line.

mod kind;

use super::file::Pieces;
use super::records::{Decode, RecordBlocks, cut_lines};
use super::{Blocks, Source};
use crate::error::{Error, Result};
use arrow::datatypes::{DataType, Schema, SchemaRef};
use arrow::error::ArrowError;
use arrow::json::ReaderBuilder;
use arrow::record_batch::{RecordBatch, RecordBatchOptions};
use kind::Kind;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::sync::Arc;

const FORMAT: &str = "JSON lines";

/// Files in the order in which they are read.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Json {
    pub(crate) files: Vec<PathBuf>,
}

#[typetag::serde(name = "json")]
impl Source for Json {
    /// The columns are those of any object, in the order in which they are first seen.
    fn open(&self) -> Result<Arc<dyn Blocks>> {
        let (mut kind, mut files) = (Kind::Unknown, Vec::new());
        for path in &self.files {
            let file = Pieces::open(path, FORMAT)?;
            let spans = cut_lines(&file, |number, line| add(&mut kind, path, number, line));
            let spans = file.blame(spans)?;
            files.push((file, spans));
        }
        let DataType::Struct(fields) = kind.data_type() else {
            return Err(Error::Empty { after: "" });
        };
        let schema = Arc::new(Schema::new(fields));
        Ok(Arc::new(RecordBlocks::new(schema, files, Arc::new(JsonDecode))))
    }

    fn summary(&self) -> String {
        super::paths::listed(&self.files)
    }
}

/// Whether a line has an object, which widens `kind`; an error if it has something else.
fn add(kind: &mut Kind, path: &Path, number: u64, line: &[u8]) -> Result<bool> {
    let line = line.trim_ascii();
    if line.is_empty() {
        return Ok(false);
    }
    let added = match line[0] {
        b'{' => kind.widen(line),
        _ => Err("expected an object, {...}, in each line".to_owned()),
    };
    let corrupt = |reason| Error::Corrupt {
        path: path.to_owned(),
        format: FORMAT,
        reason: format!("line {number}: {reason}"),
    };
    added.map(|()| true).map_err(corrupt)
}

#[derive(Debug)]
struct JsonDecode;

impl Decode for JsonDecode {
    fn format(&self) -> &'static str {
        FORMAT
    }

    fn decode(
        &self,
        bytes: &[u8],
        rows: usize,
        schema: &SchemaRef,
        projection: &[usize],
    ) -> Result<Vec<RecordBatch>, ArrowError> {
        let schema = Arc::new(schema.project(projection)?);
        if projection.is_empty() {
            let options = RecordBatchOptions::new().with_row_count(Some(rows));
            return Ok(vec![RecordBatch::try_new_with_options(schema, Vec::new(), &options)?]);
        }
        // A column of text may have numbers in some lines.
        let builder = ReaderBuilder::new(schema).with_coerce_primitive(true);
        builder.with_batch_size(rows).build(bytes)?.collect()
    }
}
