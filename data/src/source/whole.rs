//! A row a file: files as bytes, and images.

use super::file::{Stamped, each};
use super::{BatchIter, Blocks, Source, hash};
use crate::error::{Error, Result};
use crate::remote::is_url;
use arrow::array::{ArrayRef, BinaryArray, FixedSizeListArray, StringArray, UInt8Array};
use arrow::array::{RecordBatch, RecordBatchOptions};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use bytes::Bytes;
use image::ImageReader;
use image::imageops::FilterType;
use serde::{Deserialize, Serialize};
use std::fmt::Debug;
use std::io::Cursor;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const BLOCK_FILES: usize = 1024;

/// Most bytes of a block, as the rows have them, unless one row has more.
const BLOCK_BYTES: u64 = 16 << 20;

/// Files as they are.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct BinaryFiles {
    pub(crate) files: Vec<PathBuf>,
}

#[typetag::serde(name = "binary_files")]
impl Source for BinaryFiles {
    fn open(&self) -> Result<Arc<dyn Blocks>> {
        Ok(Arc::new(WholeFiles::new(&self.files, Content::Bytes)?))
    }
}

/// Images, decoded and resized.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Images {
    pub(crate) files: Vec<PathBuf>,
    pub(crate) height: u32,
    pub(crate) width: u32,
}

#[typetag::serde(name = "images")]
impl Source for Images {
    fn open(&self) -> Result<Arc<dyn Blocks>> {
        let content = Content::image(self.height, self.width)?;
        Ok(Arc::new(WholeFiles::new(&self.files, content)?))
    }
}

/// What becomes of a file.
#[derive(Clone, Copy, Debug)]
enum Content {
    Bytes,
    Image { height: u32, width: u32, values: i32 },
}

impl Content {
    fn image(height: u32, width: u32) -> Result<Self> {
        let values = u64::from(height) * u64::from(width) * 3;
        match i32::try_from(values) {
            Ok(values) if values > 0 => Ok(Self::Image { height, width, values }),
            _ => Err(Error::InvalidOption {
                option: "the size of images",
                expected: "a height and a width of at least 1, together at most 2 GiB".to_owned(),
                got: format!("{height} x {width}"),
            }),
        }
    }

    fn field(self) -> Field {
        match self {
            Self::Bytes => Field::new("bytes", DataType::Binary, false),
            Self::Image { values, .. } => {
                Field::new("image", DataType::FixedSizeList(byte(), values), false)
            }
        }
    }

    fn bytes_of(self, file: &Stamped) -> u64 {
        match self {
            Self::Bytes => file.length,
            Self::Image { values, .. } => values as u64,
        }
    }

    fn read(self, files: &[Stamped]) -> Result<ArrayRef> {
        match self {
            Self::Bytes => {
                let all = each(files, Stamped::is_remote, Stamped::read_all)?;
                Ok(Arc::new(BinaryArray::from_iter_values(all)))
            }
            Self::Image { height, width, values } => {
                let image = |file: &Stamped| decode(&file.path, file.read_all()?, height, width);
                let all = each(files, Stamped::is_remote, image)?.concat();
                let all = Arc::new(UInt8Array::from(all));
                Ok(Arc::new(FixedSizeListArray::try_new(byte(), values, all, None)?))
            }
        }
    }
}

fn byte() -> Arc<Field> {
    Arc::new(Field::new("item", DataType::UInt8, false))
}

/// Rows of pixels, each of red, green and blue.
fn decode(path: &Path, bytes: Bytes, height: u32, width: u32) -> Result<Vec<u8>> {
    let corrupt =
        |reason: String| Error::Corrupt { path: path.to_owned(), format: "PNG or JPEG", reason };
    let reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format();
    let decoded = reader.map_err(|error| corrupt(error.to_string()))?.decode();
    let image = decoded.map_err(|error| corrupt(error.to_string()))?.into_rgb8();
    if image.dimensions() == (width, height) {
        return Ok(image.into_raw());
    }
    Ok(image::imageops::resize(&image, width, height, FilterType::Triangle).into_raw())
}

/// Files in groups; a block is one.
#[derive(Debug)]
struct WholeFiles {
    schema: SchemaRef,
    files: Vec<Stamped>,
    groups: Vec<Range<usize>>,
    content: Content,
}

impl WholeFiles {
    fn new(paths: &[PathBuf], content: Content) -> Result<Self> {
        let files = each(paths, |path| is_url(path), |path| Stamped::new(path))?;
        let groups = groups(files.iter().map(|file| content.bytes_of(file)));
        let path = Field::new("path", DataType::Utf8, false);
        let schema = Arc::new(Schema::new(vec![path, content.field()]));
        Ok(Self { schema, files, groups, content })
    }

    fn column(&self, at: usize, files: &[Stamped]) -> Result<ArrayRef> {
        if at > 0 {
            return self.content.read(files);
        }
        let paths = files.iter().map(|file| file.path.to_string_lossy());
        Ok(Arc::new(StringArray::from_iter_values(paths)))
    }
}

/// Neighbours that together are neither too many nor too large.
fn groups(bytes: impl Iterator<Item = u64>) -> Vec<Range<usize>> {
    let (mut groups, mut start, mut sum) = (Vec::new(), 0, 0_u64);
    let mut end = 0;
    for (at, bytes) in bytes.enumerate() {
        if at > start && (at - start == BLOCK_FILES || sum.saturating_add(bytes) > BLOCK_BYTES) {
            groups.push(start..at);
            (start, sum) = (at, 0);
        }
        sum = sum.saturating_add(bytes);
        end = at + 1;
    }
    if end > start {
        groups.push(start..end);
    }
    groups
}

impl WholeFiles {
    /// The deepest folder that has all files.
    fn folder(&self) -> &Path {
        let paths = || self.files.iter().map(|file| file.path.as_path());
        let first = paths().next().unwrap_or(Path::new(""));
        let has_all = |folder: &&Path| paths().all(|path| path.starts_with(folder));
        first.ancestors().skip(1).find(has_all).unwrap_or(Path::new(""))
    }
}

impl Blocks for WholeFiles {
    fn schema(&self) -> SchemaRef {
        self.schema.clone()
    }

    fn rows(&self) -> Vec<u64> {
        self.groups.iter().map(|group| group.len() as u64).collect()
    }

    /// What is made of the files, their paths below the folder of all, and their lengths: to read
    /// all only to know them would take as long as an epoch.
    fn fingerprint(&self) -> Result<String> {
        let above = self.folder();
        let parts = self.files.iter().map(|file| {
            let below = file.path.strip_prefix(above).unwrap_or(&file.path);
            let mut part = below.as_os_str().as_encoded_bytes().to_vec();
            part.extend(file.length.to_le_bytes());
            part
        });
        let parts: Vec<_> = parts.collect();
        let content = format!("{:?}", self.content).into_bytes();
        Ok(hash(parts.iter().map(Vec::as_slice).chain([content.as_slice()])))
    }

    fn name(&self, block: usize) -> String {
        let group = &self.groups[block];
        let (first, last) = (&self.files[group.start], &self.files[group.end - 1]);
        format!("{} to {}", first.path.display(), last.path.display())
    }

    fn read(&self, block: usize, projection: &[usize]) -> Result<BatchIter> {
        let files = &self.files[self.groups[block].clone()];
        let schema = Arc::new(self.schema.project(projection)?);
        let columns = projection.iter().map(|column| self.column(*column, files));
        let columns = columns.collect::<Result<Vec<_>>>()?;
        let options = RecordBatchOptions::new().with_row_count(Some(files.len()));
        let batch = RecordBatch::try_new_with_options(schema, columns, &options)?;
        Ok(Box::new(std::iter::once(Ok(batch))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_neither_long_nor_large() {
        assert!(groups([].into_iter()).is_empty());
        assert_eq!(
            groups([BLOCK_BYTES * 2, 1, BLOCK_BYTES, 5].into_iter()),
            [0..1, 1..2, 2..3, 3..4]
        );
        let small = vec![1; BLOCK_FILES + 1];
        assert_eq!(groups(small.into_iter()), [0..BLOCK_FILES, BLOCK_FILES..BLOCK_FILES + 1]);
    }
}
