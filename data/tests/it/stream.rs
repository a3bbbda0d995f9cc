//! Streams: every row once, the same steps for every world, and resumed anywhere.

use crate::{batch, digits, lists, message, numbered};
use arrow::array::{ArrayRef, Int64Array};
use arrow::record_batch::RecordBatch;
use mobula_core::{BatchSource, BatchStream, Shard, StreamState};
use mobula_data::{Dataset, StandardScaler, StreamOptions, TensorSource};
use proptest::prelude::*;
use std::sync::Arc;

/// The ids of a rank's next step, and how many rows all ranks have; `None` ends an epoch.
fn step(stream: &mut dyn BatchStream) -> Option<(Vec<u32>, usize)> {
    let batch = stream.next_batch().expect("read")?;
    let ids = batch.get("id").and_then(|t| Ok(t.to_vec1::<u32>()?)).expect("ids");
    assert_eq!(ids.len(), batch.rows());
    Some((ids, batch.global_rows()))
}

fn open(source: &TensorSource, world: usize) -> Vec<Box<dyn BatchStream>> {
    let shard = |rank| source.open(Shard { rank, world }).expect("open");
    (0..world).map(shard).collect()
}

/// One step of all ranks: its rows, sorted, since ranks have them in the order of their lanes.
fn global_step(ranks: &mut [Box<dyn BatchStream>]) -> Option<Vec<u32>> {
    let parts: Vec<_> = ranks.iter_mut().map(|rank| step(rank.as_mut())).collect();
    let ended = parts.iter().filter(|part| part.is_none()).count();
    assert!(ended == 0 || ended == parts.len(), "all ranks end an epoch together");
    let mut ids: Vec<u32> = Vec::new();
    for (part, global_rows) in parts.iter().flatten() {
        ids.extend(part);
        let total: usize = parts.iter().flatten().map(|(part, _)| part.len()).sum();
        assert_eq!(*global_rows, total);
    }
    ids.sort_unstable();
    (ended == 0).then_some(ids)
}

fn epoch(ranks: &mut [Box<dyn BatchStream>]) -> Vec<Vec<u32>> {
    std::iter::from_fn(|| global_step(ranks)).collect()
}

fn source(rows: i64, sizes: &[i64], options: StreamOptions) -> TensorSource {
    numbered(rows, sizes).stream(options).expect("stream")
}

fn by_id() -> StreamOptions {
    StreamOptions::new([] as [&str; 0], "id")
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    /// INV-WORLD: an epoch has every row once, in steps that do not depend on the world, and a
    /// stream resumed at any step in any other world goes on as if nothing had happened.
    #[test]
    fn every_world_sees_the_same_steps(
        rows in 1i64..400,
        sizes in prop::collection::vec(1i64..90, 1..5),
        per_lane in 1usize..7,
        shuffle in prop::option::of(any::<u64>()),
        cut in any::<prop::sample::Index>(),
        prefetch in 0usize..4,
    ) {
        let options = by_id().with_batch_size(5 * per_lane).with_lanes(5).with_prefetch(prefetch);
        let options = match shuffle {
            Some(seed) => options.with_shuffle(seed),
            None => options,
        };
        let source = source(rows, &sizes, options);
        let mut alone = open(&source, 1);
        let epochs = [epoch(&mut alone), epoch(&mut alone)];
        for steps in &epochs {
            prop_assert_eq!(steps.len() as u64, source.steps_per_epoch());
            let mut all = steps.concat();
            all.sort_unstable();
            prop_assert!(all.into_iter().eq(0..rows as u32));
        }
        for world in [2, 3, 5] {
            prop_assert_eq!(&epoch(&mut open(&source, world)), &epochs[0]);
        }

        // The world changes 1 → 3 → 2 at some step of the first epoch.
        let at = cut.index(epochs[0].len() + 1);
        let mut ranks = open(&source, 1);
        for expected in &epochs[0][..at] {
            let got = global_step(&mut ranks);
            prop_assert_eq!(got.as_ref(), Some(expected));
        }
        let mut rest = Vec::new();
        for world in [3, 2] {
            let state = ranks[0].state();
            ranks = open(&source, world);
            for rank in &mut ranks {
                rank.restore(&state).expect("restore");
            }
            if world == 3 {
                rest.extend(global_step(&mut ranks));
            }
        }
        // At the end of the epoch the step in between was its `None`: what follows is epoch 1.
        let ended = at == epochs[0].len();
        rest.extend(epoch(&mut ranks));
        let expected = if ended { &epochs[1][..] } else { &epochs[0][at..] };
        prop_assert_eq!(&rest[..], expected);
    }
}

#[test]
fn epochs_are_shuffled_and_seeds_differ() {
    let steps = |seed| {
        let mut ranks =
            open(&source(300, &[30], by_id().with_batch_size(30).with_shuffle(seed)), 1);
        [epoch(&mut ranks), epoch(&mut ranks)]
    };
    let [first, second] = steps(1);
    assert_ne!(first, second);
    assert_eq!(steps(1), [first.clone(), second]);
    assert_ne!(steps(2)[0], first);
    // A step draws from all over the data, not from one block.
    let spread = first[0].iter().max().expect("rows") - first[0].iter().min().expect("rows");
    assert!(spread > 150, "{spread}");
}

#[test]
fn a_stream_resumes_in_a_later_epoch() {
    let source = source(100, &[20], by_id().with_batch_size(10).with_shuffle(1));
    let mut whole = open(&source, 1);
    let (_, second) = (epoch(&mut whole), epoch(&mut whole));
    let mut ranks = open(&source, 1);
    epoch(&mut ranks);
    for expected in &second[..4] {
        assert_eq!(global_step(&mut ranks).as_ref(), Some(expected));
    }
    let state = ranks[0].state();
    assert_eq!((state.epoch, state.step), (1, 4));
    let mut resumed = open(&source, 2);
    for rank in &mut resumed {
        rank.restore(&state).expect("restore");
    }
    assert_eq!(epoch(&mut resumed), second[4..]);
}

#[test]
fn without_a_shuffle_the_order_is_that_of_the_rows() {
    let mut ranks = open(&source(23, &[4, 9], by_id().with_batch_size(6)), 1);
    let rows: Vec<u32> =
        std::iter::from_fn(|| step(ranks[0].as_mut())).flat_map(|(ids, _)| ids).collect();
    assert!(rows.into_iter().eq(0..23));
}

#[test]
fn a_rank_without_rows_still_takes_the_step() {
    let mut ranks = open(&source(9, &[9], by_id().with_batch_size(8).with_lanes(4)), 4);
    let last: Vec<_> = ranks
        .iter_mut()
        .map(|rank| {
            step(rank.as_mut()).expect("a full step");
            step(rank.as_mut()).expect("a last step")
        })
        .collect();
    assert_eq!(last.iter().map(|(ids, _)| ids.len()).collect::<Vec<_>>(), [1, 0, 0, 0]);
    assert!(last.iter().all(|(_, global_rows)| *global_rows == 1));
}

fn images(values: Vec<u8>, labels: Vec<i64>) -> RecordBatch {
    let label: ArrayRef = Arc::new(Int64Array::from(labels));
    batch([("image", lists(2, values)), ("label", label)])
}

#[test]
fn columns_become_tensors() {
    let data =
        Dataset::from_batches([images(vec![1, 2, 3, 4, 5, 6], vec![7, 0, 9])]).expect("data");
    let data = data.with_column("half", "label / 2.0").expect("column");
    let options = StreamOptions::new(["image", "half"], "label").with_batch_size(3);
    let source = data.stream(options).expect("stream");
    let batch = open(&source, 1)[0].next_batch().expect("read").expect("a batch");
    let image = batch.get("image").and_then(|t| Ok(t.to_vec2::<f32>()?)).expect("image");
    assert_eq!(image, [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]);
    let half = batch.get("half").and_then(|t| Ok(t.to_vec1::<f32>()?)).expect("half");
    assert_eq!(half, [3.5, 0.0, 4.5]);
    let label = batch.get("label").and_then(|t| Ok(t.to_vec1::<u32>()?)).expect("label");
    assert_eq!(label, [7, 0, 9]);
}

#[test]
fn the_digits_stream_after_split_and_scaler() {
    let (train, test) = digits().train_test_split(0.2, 1).expect("split");
    let scaler = StandardScaler::fit(&train, ["image"]).expect("fit");
    let options = StreamOptions::new(["image"], "label").with_batch_size(64).with_shuffle(1);
    let scaled = train.preprocess(&scaler).expect("preprocess");
    let source = scaled.stream(options).expect("stream");
    assert_eq!(source.rows() + test.count().expect("count"), 1797);
    let (mut sum, mut squares, mut rows) = (0.0f64, 0.0f64, 0);
    let mut ranks = open(&source, 2);
    for rank in &mut ranks {
        while let Some(batch) = rank.next_batch().expect("read") {
            rows += batch.rows();
            let image = batch.get("image").and_then(|t| Ok(t.flatten_all()?.to_vec1::<f32>()?));
            for x in image.expect("image") {
                (sum, squares) = (sum + f64::from(x), squares + f64::from(x * x));
            }
        }
    }
    assert_eq!(rows as u64, source.rows());
    // Three pixels are always 0 in the digits; all others have variance 1.
    assert!(sum.abs() < 1e-1, "{sum}");
    let variance = squares / (64.0 * rows as f64);
    assert!(variance > 0.9 && variance < 1.0, "{variance}");
}

/// What a worker process gets: the description, as bytes.
#[test]
fn a_stream_that_travelled_is_the_same_stream() {
    let (train, _) = digits().train_test_split(0.2, 1).expect("split");
    let scaler = StandardScaler::fit(&train, ["image"]).expect("fit");
    let options = StreamOptions::new(["image"], "label").with_shuffle(9);
    let here = train.preprocess(&scaler).and_then(|d| d.stream(options)).expect("stream");
    let bytes = rmp_serde::to_vec_named(&here).expect("encode");
    let there: TensorSource = rmp_serde::from_slice(&bytes).expect("decode");
    let values = |source: &TensorSource| {
        let mut stream = source.open(Shard { rank: 1, world: 3 }).expect("open");
        let batch = stream.next_batch().expect("read").expect("a batch");
        let image = batch.get("image").and_then(|t| Ok(t.to_vec2::<f32>()?)).expect("image");
        (image, stream.state())
    };
    assert_eq!(values(&there), values(&here));
}

#[test]
fn other_data_or_options_cannot_be_resumed() {
    let state_of = |source: &TensorSource| open(source, 1)[0].state();
    let original = source(100, &[10], by_id().with_shuffle(1));
    let refused = |other: TensorSource| {
        let mut stream = other.open(Shard::ALL).expect("open");
        message(stream.restore(&state_of(&original)))
    };
    let changed = numbered(100, &[10]).with_column("id", "99 - id").expect("column");
    let reversed = Dataset::from_batches([changed.collect().expect("rows")]).expect("dataset");
    for text in [
        refused(source(101, &[10], by_id().with_shuffle(1))),
        refused(reversed.stream(by_id().with_shuffle(1)).expect("stream")),
        refused(changed.stream(by_id().with_shuffle(1)).expect("stream")),
        refused(source(100, &[10], by_id().with_batch_size(8).with_shuffle(1))),
        refused(source(100, &[10], by_id())),
    ] {
        assert!(text.starts_with("cannot resume the stream: its "), "{text}");
    }
    let seed = refused(source(100, &[10], by_id().with_shuffle(2)));
    assert_eq!(seed, "cannot resume the stream: its seed is 2, the checkpoint has 1");
    let mut again = open(&source(100, &[10], by_id().with_shuffle(1)), 1);
    let state = state_of(&original);
    again[0].restore(&state).expect("the same data resumes");
    let beyond = StreamState { step: 5, ..state };
    assert!(message(again[0].restore(&beyond)).contains("step is at most 4"));
}

/// Files replaced between the driver's count and a worker's read.
#[test]
fn changed_files_are_found_when_a_shard_is_opened() {
    let dir = tempfile::tempdir().expect("folder");
    let path = dir.path().join("rows.csv");
    std::fs::write(&path, "id\n1\n2\n").expect("write");
    let data = Dataset::read_csv(path.to_str().expect("UTF-8"), Default::default()).expect("CSV");
    let bytes = serde_json::to_vec(&data.stream(by_id()).expect("stream")).expect("encode");
    std::fs::write(&path, "id\n1\n3\n").expect("write");
    let there: TensorSource = serde_json::from_slice(&bytes).expect("decode");
    assert!(message(there.open(Shard::ALL)).contains("the files as they are now"));
}

#[test]
fn bad_requests_are_named() {
    let data = digits();
    let stream = |options: StreamOptions| message(data.stream(options));
    let image = || StreamOptions::new(["image"], "label");
    assert!(stream(StreamOptions::new(["pixels"], "label")).contains("available: image, label"));
    assert!(stream(StreamOptions::new(["label"], "label")).contains("\"label\" twice"));
    assert!(stream(image().with_batch_size(0)).contains("batch_size is 0"));
    assert!(
        stream(image().with_batch_size(64).with_lanes(5))
            .contains("a divisor of the batch size 64")
    );
    let none = data.filter("label > 99").expect("filter");
    assert!(message(none.stream(image())).contains("no rows after its filters"));
    let source = data.stream(image().with_batch_size(6)).expect("stream");
    assert!(message(source.open(Shard { rank: 0, world: 7 })).contains("a world of at most 6"));

    let negative = Dataset::from_batches([images(vec![1, 2], vec![-1])]).expect("data");
    let source = negative.stream(image()).expect("stream");
    let text = message(source.open(Shard::ALL).and_then(|mut s| s.next_batch()));
    assert!(
        text.contains("column \"label\" has the value -1 in rows 0 to 0, which u32 has not"),
        "{text}"
    );
    let words = data.with_column("word", "'a'").expect("column");
    let text = message(words.stream(StreamOptions::new(["word"], "label")));
    assert!(text.contains("OneHotEncoder"), "{text}");
}
