//! What is done to batches where they are made.

use crate::{batch, lists, message, numbered};
use arrow::array::{ArrayRef, Int64Array};
use candle_core::{DType, Tensor};
use mobula_core::{Batch, BatchSource, BoxError, Shard};
use mobula_data::{Collate, Dataset, ImageAugment, Rows, StreamOptions, TensorSpec, typetag};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Puts a random number beside each id.
#[derive(Debug, Serialize, Deserialize)]
struct Drawn;

#[typetag::serde]
impl Collate for Drawn {
    fn collate(&self, batch: Batch, rows: &Rows<'_>) -> Result<Batch, BoxError> {
        let one = |row| rows.random("drawn", row).word();
        let one: Vec<u32> = (0..batch.rows()).map(one).collect();
        let all: Vec<u32> = rows.random_of_all("drawn").map(|mut draws| draws.word()).collect();
        assert_eq!(one, all);
        let drawn = Tensor::from_vec(all, batch.rows(), batch.get("id")?.device())?;
        let tensors = batch.tensors().iter().cloned().chain([("drawn".to_owned(), drawn)]);
        Ok(Batch::new(tensors.collect())?)
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct Halves;

#[typetag::serde]
impl Collate for Halves {
    fn collate(&self, batch: Batch, _rows: &Rows<'_>) -> Result<Batch, BoxError> {
        Ok(batch.slice(0, batch.rows() / 2)?)
    }
}

/// The number that each id has, in so many epochs of one rank.
fn drawn(options: &StreamOptions, shard: Shard, epochs: usize) -> Vec<BTreeMap<i64, u32>> {
    let source = numbered(1000, &[99]).stream(options.clone()).expect("stream");
    let mut stream = source.open(shard).expect("open");
    let epoch = |_| {
        let mut all = BTreeMap::new();
        while let Some(batch) = stream.next_batch().expect("batch") {
            let ids = batch.get("id").and_then(|id| Ok(id.to_vec1::<i64>()?)).expect("ids");
            let drawn = batch.get("drawn").and_then(|d| Ok(d.to_vec1::<u32>()?)).expect("draws");
            all.extend(ids.into_iter().zip(drawn));
        }
        all
    };
    (0..epochs).map(epoch).collect()
}

#[test]
fn a_row_has_its_own_random_numbers_in_every_world() {
    let id = TensorSpec::column("id").with_dtype(DType::I64);
    let options = StreamOptions::unlabelled([] as [&str; 0]).with_tensor(id).with_collate(Drawn);
    let options = options.with_batch_size(48).with_shuffle(7);
    let alone = drawn(&options, Shard::ALL, 2);
    assert_eq!(alone[0].len(), 1000);
    assert_ne!(alone[0], alone[1]);
    let mut together = BTreeMap::new();
    for rank in 0..3 {
        together.extend(drawn(&options, Shard { rank, world: 3 }, 1).remove(0));
    }
    assert_eq!(together, alone[0]);
    let other = drawn(&options.clone().with_shuffle(8), Shard::ALL, 1);
    assert_ne!(other[0], alone[0]);
    let distinct: std::collections::BTreeSet<_> = alone[0].values().collect();
    assert!(distinct.len() > 990, "{}", distinct.len());
}

#[test]
fn lost_rows_and_other_functions_are_noticed() {
    let options = StreamOptions::unlabelled(["id"]).with_batch_size(10);
    let halves = numbered(10, &[10]).stream(options.clone().with_collate(Halves)).expect("stream");
    let text = message(halves.open(Shard::ALL).and_then(|mut stream| stream.next_batch()));
    assert!(text.contains("\"Halves\" failed: it made 5 rows of 10"), "{text}");
    let plain = numbered(10, &[10]).stream(options.clone()).expect("stream");
    let state = plain.open(Shard::ALL).expect("open").state();
    let restored = halves.open(Shard::ALL).and_then(|mut stream| stream.restore(&state));
    assert!(message(restored).contains("manifest"));
}

/// Images of 3 × 4 pixels whose values say where they are, two channels of them.
fn images(rows: usize) -> Dataset {
    let pixels = (0..rows).flat_map(|_| (0..24).map(|at| (at * 10) as u8)).collect();
    let ids: ArrayRef = Arc::new(Int64Array::from_iter_values(0..rows as i64));
    Dataset::from_batches([batch([("image", lists(24, pixels)), ("id", ids)])]).expect("dataset")
}

fn augmented(rows: usize, augment: ImageAugment) -> Result<Tensor, mobula_core::Error> {
    let image = TensorSpec::column("image").with_dtype(DType::U8);
    let options = StreamOptions::labelled("id").with_tensor(image).with_batch_size(rows);
    let source = images(rows).stream(options.with_collate(augment))?;
    let batch = source.open(Shard::ALL)?.next_batch()?.expect("a batch");
    batch.get("image").cloned()
}

/// Channel by channel, row by row.
fn pixels(image: &Tensor) -> Vec<Vec<f32>> {
    let rows = image.flatten(0, 2).and_then(|rows| rows.to_vec2::<f32>()).expect("pixels");
    let byte = |value: f32| (value * 255.0).round();
    rows.into_iter().map(|row| row.into_iter().map(byte).collect()).collect()
}

#[test]
fn images_are_scaled_and_put_channel_by_channel() {
    let image = augmented(1, ImageAugment::new("image", [3, 4, 2])).expect("images");
    assert_eq!((image.dims(), image.dtype()), (&[1, 2, 3, 4][..], DType::F32));
    let rows = pixels(&image);
    assert_eq!(rows[0], [0.0, 20.0, 40.0, 60.0]);
    assert_eq!(rows[2], [160.0, 180.0, 200.0, 220.0]);
    assert_eq!(rows[3], [10.0, 30.0, 50.0, 70.0]);
    let augment = ImageAugment::new("image", [3, 4, 2]).with_normalize([0.5, 0.0], [0.25, 1.0]);
    let image = augmented(1, augment).and_then(|i| Ok(i.flatten_all()?.to_vec1::<f32>()?));
    let image = image.expect("images");
    assert_eq!((image[0], image[1]), (-2.0, (20.0 / 255.0 - 0.5) / 0.25));
    assert_eq!(image[12], 10.0 / 255.0);
}

#[test]
fn images_are_mirrored_and_moved_at_random() {
    let flipped = augmented(1000, ImageAugment::new("image", [3, 4, 2]).with_flip(0.3));
    let rows = pixels(&flipped.expect("images"));
    let firsts: Vec<_> = rows.chunks(6).map(|image| image[0].clone()).collect();
    let mirrored = firsts.iter().filter(|row| **row == [60.0, 40.0, 20.0, 0.0]).count();
    let straight = firsts.iter().filter(|row| **row == [0.0, 20.0, 40.0, 60.0]).count();
    assert_eq!(mirrored + straight, 1000);
    assert!((240..360).contains(&mirrored), "{mirrored}");

    let moved = augmented(1000, ImageAugment::new("image", [3, 4, 2]).with_crop(1));
    let rows = pixels(&moved.expect("images"));
    let mut seen = BTreeMap::new();
    for image in rows.chunks(6) {
        *seen.entry(format!("{:?}", &image[..3])).or_insert(0) += 1;
    }
    // Nine places, each about as often.
    assert_eq!(seen.len(), 9);
    assert!(seen.values().all(|times| (70..155).contains(times)), "{seen:?}");
    let corner = [vec![100.0, 120.0, 140.0, 0.0], vec![180.0, 200.0, 220.0, 0.0], vec![0.0; 4]];
    assert!(seen.contains_key(&format!("{corner:?}")), "{seen:?}");
}

#[test]
fn images_of_another_shape_are_errors() {
    let text = message(augmented(2, ImageAugment::new("image", [4, 4, 2])));
    assert!(text.contains("u8, [2, 24], expected u8, [rows, 32]"), "{text}");
    let wrong = ImageAugment::new("image", [3, 4, 2]).with_normalize([0.5], [0.5]);
    assert!(message(augmented(2, wrong)).contains("2 numbers, one a channel"));
}
