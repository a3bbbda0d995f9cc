//! Which blocks share a file, and the files of some blocks.

use super::{Sink, SinkFile};
use crate::error::Result;
use arrow::datatypes::SchemaRef;
use arrow::record_batch::RecordBatch;
use mobula_core::error::AtPath;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Neighbouring blocks that are written one after another.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Part {
    pub(super) number: usize,
    pub(super) blocks: Range<usize>,
}

/// Cuts blocks of so many rows into parts of at most `most` rows, where a block has not more.
pub(super) fn parts(rows: &[u64], most: u64) -> Vec<Part> {
    let (mut parts, mut start, mut sum) = (Vec::new(), 0, 0_u64);
    let mut add = |blocks: Range<usize>| {
        if !blocks.is_empty() {
            parts.push(Part { number: parts.len(), blocks });
        }
    };
    for (block, rows) in rows.iter().enumerate() {
        if sum.saturating_add(*rows) > most {
            add(start..block);
            (start, sum) = (block, 0);
        }
        sum = sum.saturating_add(*rows);
    }
    add(start..rows.len());
    parts
}

/// Writes the rows of a part, into several files where they are too many for one.
pub(super) struct PartWriter {
    folder: Arc<Path>,
    part: usize,
    sink: Arc<dyn Sink>,
    schema: SchemaRef,
    most: u64,
    current: Option<Current>,
    done: Vec<(PathBuf, u64)>,
}

struct Current {
    file: Box<dyn SinkFile>,
    path: PathBuf,
    rows: u64,
}

impl PartWriter {
    pub(super) fn new(
        folder: Arc<Path>,
        part: usize,
        sink: Arc<dyn Sink>,
        schema: SchemaRef,
        most: u64,
    ) -> Self {
        Self { folder, part, sink, schema, most, current: None, done: Vec::new() }
    }

    pub(super) fn write(&mut self, batch: &RecordBatch) -> Result<()> {
        let mut rest = batch.clone();
        while rest.num_rows() > 0 {
            let mut current = match self.current.take() {
                Some(current) => current,
                None => self.begin()?,
            };
            let room = usize::try_from(self.most - current.rows).unwrap_or(usize::MAX);
            let now = rest.num_rows().min(room);
            current.file.write(&rest.slice(0, now))?;
            current.rows += now as u64;
            rest = rest.slice(now, rest.num_rows() - now);
            match current.rows == self.most {
                true => self.end(current)?,
                false => self.current = Some(current),
            }
        }
        Ok(())
    }

    pub(super) fn finish(mut self) -> Result<Vec<(PathBuf, u64)>> {
        if let Some(current) = self.current.take() {
            self.end(current)?;
        }
        Ok(self.done)
    }

    /// A file without rows, that says which columns there are.
    pub(super) fn finish_empty(mut self) -> Result<Vec<(PathBuf, u64)>> {
        self.current = Some(self.begin()?);
        self.finish()
    }

    /// A file whose name is nothing that a reader would look for.
    fn begin(&self) -> Result<Current> {
        let path = self.folder.join(format!("{}-{}.unfinished", self.part, self.done.len()));
        let file = File::create_new(&path).at("create", &path)?;
        Ok(Current { file: self.sink.begin(file, &self.schema)?, path, rows: 0 })
    }

    fn end(&mut self, current: Current) -> Result<()> {
        let Current { file, path, rows } = current;
        file.finish()?;
        self.done.push((path, rows));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_share_files_while_they_fit() {
        let blocks = |rows: &[u64], most| -> Vec<_> {
            parts(rows, most).into_iter().map(|part| part.blocks).collect()
        };
        assert!(parts(&[], 5).is_empty());
        assert_eq!(blocks(&[2, 2, 2, 9, 1, 4], 5), [0..2, 2..3, 3..4, 4..6]);
        assert_eq!(blocks(&[7], 5), vec![0..1]);
        assert_eq!(parts(&[5, 5], 5)[1].number, 1);
    }
}
