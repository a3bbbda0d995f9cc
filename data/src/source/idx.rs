//! The IDX format of MNIST and its relatives, gzipped or not, read whole when opened.
//!
//! A file is two zero bytes, a type byte (8: unsigned bytes), the number of dimensions, each
//! dimension as a big-endian `u32`, then the values.

use super::file::read_unzipped;
use super::memory::MemoryBlocks;
use super::{Blocks, Source};
use crate::error::{Error, Result};
use arrow::array::{ArrayRef, FixedSizeListArray, UInt8Array};
use arrow::datatypes::{DataType, Field, Schema};
use arrow::record_batch::RecordBatch;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::sync::Arc;

const UNSIGNED_BYTES: u8 = 8;

/// A file of images and one of their labels.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Idx {
    pub(crate) images: PathBuf,
    pub(crate) labels: PathBuf,
}

#[typetag::serde(name = "idx")]
impl Source for Idx {
    fn open(&self) -> Result<Arc<dyn Blocks>> {
        Ok(Arc::new(read(&self.images, &self.labels)?))
    }
}

/// Columns `image` (the pixels of a row, row by row) and `label`.
fn read(images: &Path, labels: &Path) -> Result<MemoryBlocks> {
    let (image_dims, pixels) = read_file(images, 3)?;
    let (label_dims, classes) = read_file(labels, 1)?;
    if image_dims[0] != label_dims[0] {
        let reason = format!(
            "it has {} labels, but {} has {} images",
            label_dims[0],
            images.display(),
            image_dims[0]
        );
        return Err(corrupt(labels, reason));
    }
    let width = image_dims[1] * image_dims[2];
    let width = i32::try_from(width).map_err(|error| corrupt(images, error.to_string()))?;
    let item = Arc::new(Field::new("item", DataType::UInt8, false));
    let pixels = Arc::new(UInt8Array::from(pixels));
    let image = FixedSizeListArray::try_new(item, width, pixels, None)?;
    let columns: [ArrayRef; 2] = [Arc::new(image), Arc::new(UInt8Array::from(classes))];
    let fields = [("image", &columns[0]), ("label", &columns[1])]
        .map(|(name, column)| Field::new(name, column.data_type().clone(), false));
    let schema = Arc::new(Schema::new(fields.to_vec()));
    let batch = RecordBatch::try_new(schema.clone(), columns.to_vec())?;
    Ok(MemoryBlocks::new(schema, vec![batch]))
}

fn read_file(path: &Path, dimensions: usize) -> Result<(Vec<usize>, Vec<u8>)> {
    let bytes = read_unzipped(path, "IDX")?;
    let head = 4 + 4 * dimensions;
    let magic = [0, 0, UNSIGNED_BYTES, dimensions as u8];
    if bytes.len() < head || bytes[..4] != magic {
        let got = &bytes[..bytes.len().min(4)];
        return Err(corrupt(path, format!("it starts with {got:?}, expected {magic:?}")));
    }
    let dims: Vec<usize> = bytes[4..head]
        .chunks_exact(4)
        .map(|b| u32::from_be_bytes([b[0], b[1], b[2], b[3]]) as usize)
        .collect();
    let expected = dims.iter().try_fold(1usize, |product, dim| product.checked_mul(*dim));
    let values = bytes[head..].to_vec();
    if expected != Some(values.len()) || expected == Some(0) {
        let got = values.len();
        return Err(corrupt(path, format!("it has {got} values, its header says {dims:?}")));
    }
    Ok((dims, values))
}

fn corrupt(path: &Path, reason: String) -> Error {
    Error::Corrupt { path: path.to_owned(), format: "IDX", reason }
}
