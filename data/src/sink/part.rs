//! Which blocks share a file, and the files of some blocks.

use super::{SinkFile, Target};
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

/// A file that was written, under a name that is nothing a reader would look for.
#[derive(Clone, Debug)]
pub(super) struct WrittenPart {
    pub(super) path: PathBuf,
    /// Where it belongs in the folder.
    pub(super) folder: PathBuf,
    pub(super) rows: u64,
    /// Its length, once that is known.
    pub(super) bytes: u64,
}

/// Writes the rows of a part, into several files where they are too many for one, or belong into
/// several folders.
pub(super) struct PartWriter {
    to: Arc<Target>,
    part: usize,
    current: Option<Current>,
    done: Vec<WrittenPart>,
}

struct Current {
    file: Box<dyn SinkFile>,
    written: WrittenPart,
}

impl PartWriter {
    pub(super) fn new(to: Arc<Target>, part: usize) -> Self {
        Self { to, part, current: None, done: Vec::new() }
    }

    pub(super) fn write(&mut self, batch: &RecordBatch) -> Result<()> {
        let to = self.to.clone();
        let pieces = to.partitioning.cut(batch)?;
        pieces.into_iter().try_for_each(|(folder, rows)| self.write_to(&folder, rows))
    }

    fn write_to(&mut self, folder: &Path, mut rest: RecordBatch) -> Result<()> {
        while rest.num_rows() > 0 {
            let mut current = self.file_in(folder)?;
            let room = self.to.most - current.written.rows;
            let now = rest.num_rows().min(usize::try_from(room).unwrap_or(usize::MAX));
            current.file.write(&rest.slice(0, now))?;
            current.written.rows += now as u64;
            rest = rest.slice(now, rest.num_rows() - now);
            match current.written.rows == self.to.most {
                true => self.end(current)?,
                false => self.current = Some(current),
            }
        }
        Ok(())
    }

    pub(super) fn finish(mut self) -> Result<Vec<WrittenPart>> {
        if let Some(current) = self.current.take() {
            self.end(current)?;
        }
        Ok(self.done)
    }

    /// A file without rows, that says which columns there are.
    pub(super) fn finish_empty(mut self) -> Result<Vec<WrittenPart>> {
        self.current = Some(self.begin(Path::new(""), self.to.partitioning.schema())?);
        self.finish()
    }

    /// The file that is being written, if it belongs into this folder; another one otherwise.
    fn file_in(&mut self, folder: &Path) -> Result<Current> {
        match self.current.take() {
            Some(current) if current.written.folder == folder => return Ok(current),
            Some(other) => self.end(other)?,
            None => {}
        }
        self.begin(folder, self.to.partitioning.schema_of_files())
    }

    fn begin(&self, folder: &Path, schema: &SchemaRef) -> Result<Current> {
        let path = self.to.folder.join(format!("{}-{}.unfinished", self.part, self.done.len()));
        let file = File::create_new(&path).at("create", &path)?;
        let file = self.to.sink.begin(file, schema)?;
        let written = WrittenPart { path, folder: folder.to_owned(), rows: 0, bytes: 0 };
        Ok(Current { file, written })
    }

    fn end(&mut self, current: Current) -> Result<()> {
        current.file.finish()?;
        let written = match &self.to.remote {
            None => current.written,
            Some(remote) => {
                let name = format!("{:08}-{:08}", self.part, self.done.len());
                remote.send(current.written, &name, self.to.sink.extension())?
            }
        };
        self.done.push(written);
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
