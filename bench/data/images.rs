//! Fashion-MNIST as batches of augmented images.

use crate::cpu;
use anyhow::Result;
use candle_core::DType;
use mobula_core::{BatchSource, Shard};
use mobula_data::{Dataset, ImageAugment, StreamOptions, TensorSpec};
use serde_json::{Value, json};
use std::time::Instant;

/// Two epochs, of which the second is measured: the files are read and decoded in the first.
pub(crate) fn epoch(folder: &str) -> Result<Value> {
    let file = |name: &str| format!("{folder}/{name}.gz");
    let rows = Dataset::read_idx(file("train-images-idx3-ubyte"), file("train-labels-idx1-ubyte"))?;
    let image = TensorSpec::column("image").with_dtype(DType::U8);
    let augment = ImageAugment::new("image", [28, 28, 1])
        .with_crop(2)
        .with_flip(0.5)
        .with_normalize([0.2860], [0.3530]);
    let options = StreamOptions::labelled("label").with_tensor(image).with_collate(augment);
    let source = rows.stream(options.with_batch_size(256).with_shuffle(7))?;
    let mut stream = source.open(Shard::ALL)?;
    while stream.next_batch()?.is_some() {}
    let (start, before) = (Instant::now(), cpu());
    let mut count = 0;
    while let Some(batch) = stream.next_batch()? {
        count += batch.get("image")?.dim(0)?;
    }
    let (seconds, cpu) = (start.elapsed().as_secs_f64(), cpu() - before);
    Ok(json!({ "seconds": seconds, "cpu": cpu.as_secs_f64(), "rows": count }))
}
