//! Fashion-MNIST in small: files of its names and format, with pictures that are easy to tell apart.

use std::path::Path;

const SIDE: usize = 28;
const CLASSES: usize = 10;

/// Writes the four files, not zipped: readers go by the content, not by the name.
pub(crate) fn write_dataset(folder: &Path, train: usize, test: usize) {
    for (part, rows) in [("train", train), ("t10k", test)] {
        let labels: Vec<u8> = (0..rows).map(|row| (row % CLASSES) as u8).collect();
        let images: Vec<u8> = (0..rows).flat_map(image).collect();
        write(&folder.join(format!("{part}-labels-idx1-ubyte.gz")), &[rows], &labels);
        write(&folder.join(format!("{part}-images-idx3-ubyte.gz")), &[rows, SIDE, SIDE], &images);
    }
}

/// A bright bar at the height that stands for the class, over a pattern that changes from row to
/// row and says nothing.
fn image(row: usize) -> impl Iterator<Item = u8> {
    let top = 2 * (row % CLASSES) + 4;
    (0..SIDE * SIDE).map(move |pixel| match (top..top + 3).contains(&(pixel / SIDE)) {
        true => 200,
        false => ((row * 31 + pixel * (row % 7 + 3)) % 60) as u8,
    })
}

/// Two zero bytes, the type (8: bytes), the number of dimensions, the dimensions, the values.
fn write(path: &Path, dims: &[usize], values: &[u8]) {
    let mut bytes = vec![0, 0, 8, dims.len() as u8];
    dims.iter().for_each(|dim| bytes.extend((*dim as u32).to_be_bytes()));
    bytes.extend(values);
    std::fs::write(path, bytes).expect("write");
}
