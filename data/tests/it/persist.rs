//! Blocks that are kept, lost and computed again.

use crate::{batch, digits, failure, ids, message, numbered};
use arrow::array::{ArrayRef, Int64Array};
use arrow::record_batch::RecordBatch;
use mobula_core::{BatchSource, BoxError, Shard};
use mobula_data::{BatchFn, Dataset, Error, StorageLevel, StreamOptions};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

static CALLS: AtomicUsize = AtomicUsize::new(0);
static NOISE: AtomicI64 = AtomicI64::new(0);

/// For tests that count calls, where tests are threads of one process.
static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn counted(batch: &RecordBatch) -> Result<RecordBatch, BoxError> {
    CALLS.fetch_add(usize::from(batch.num_rows() > 0), Ordering::SeqCst);
    Ok(batch.clone())
}

fn noisy(rows: &RecordBatch) -> Result<RecordBatch, BoxError> {
    let noise = |_| NOISE.fetch_add(1, Ordering::SeqCst);
    let ids: ArrayRef = Arc::new((0..rows.num_rows()).map(noise).collect::<Int64Array>());
    Ok(batch([("id", ids)]))
}

fn slept(batch: &RecordBatch) -> Result<RecordBatch, BoxError> {
    // Another value after the blocks were kept, as a file has that was replaced.
    let offset = NOISE.load(Ordering::SeqCst);
    let ids = numbered(batch.num_rows() as i64 + offset, &[1 << 20]).collect()?;
    Ok(ids.slice(offset as usize, batch.num_rows()))
}

mobula_data::inventory::submit! { BatchFn::new("counted", counted) }
mobula_data::inventory::submit! { BatchFn::new("noisy", noisy) }
mobula_data::inventory::submit! { BatchFn::new("slept", slept) }

fn files(dataset: &Dataset) -> Vec<PathBuf> {
    let blocks = dataset.block_refs().expect("it was persisted");
    blocks.iter().filter_map(|block| block.path.clone()).collect()
}

/// A dataset whose description went through a process boundary.
fn sent(dataset: &Dataset) -> Dataset {
    serde_json::from_str(&serde_json::to_string(dataset).expect("JSON")).expect("JSON")
}

#[test]
fn what_is_kept_is_not_computed_again() {
    let _alone = alone();
    for level in [StorageLevel::Memory, StorageLevel::Disk, StorageLevel::MemoryThenDisk] {
        let input = numbered(100, &[10]).map_batches("counted").expect("map");
        let kept = input.persist(level).expect("persist");
        let calls = CALLS.load(Ordering::SeqCst);
        assert_eq!(ids(&kept), ids(&numbered(100, &[10])));
        let evens = kept.filter("id % 2 = 0").expect("filter");
        assert_eq!((evens.count().expect("count"), kept.count().expect("count")), (50, 100));
        let options = StreamOptions::unlabelled(["id"]).with_batch_size(16).with_shuffle(1);
        let mut stream = kept.stream(options).expect("stream").open(Shard::ALL).expect("open");
        while stream.next_batch().expect("batch").is_some() {}
        assert_eq!(CALLS.load(Ordering::SeqCst), calls, "{level:?}");

        let blocks = kept.block_refs().expect("blocks");
        assert_eq!(blocks.len(), 10);
        assert!(blocks.iter().enumerate().all(|(at, b)| b.partition == at && b.rows == 10));
        assert!(blocks.iter().all(|block| block.path.is_some() == (level == StorageLevel::Disk)));
        assert!(evens.block_refs().is_none());
    }
}

#[test]
fn another_process_reads_the_files_and_computes_what_was_in_memory() {
    let _alone = alone();
    let input = numbered(100, &[10]).map_batches("counted").expect("map");
    let on_disk = input.persist(StorageLevel::Disk).expect("persist");
    let in_memory = input.materialize().expect("persist");
    let calls = || CALLS.load(Ordering::SeqCst);
    let before = calls();
    assert_eq!(ids(&sent(&on_disk)), ids(&on_disk));
    assert_eq!(calls(), before);
    let there = sent(&in_memory);
    assert_eq!(ids(&there), ids(&in_memory));
    assert_eq!(calls(), before + 10);
    assert_eq!(ids(&there), ids(&in_memory));
    assert_eq!(calls(), before + 10, "it keeps them");
}

#[test]
fn lost_and_damaged_blocks_are_computed_again() {
    let _alone = alone();
    let input = numbered(100, &[10]).map_batches("counted").expect("map");
    let kept = input.persist(StorageLevel::Disk).expect("persist");
    let options = StreamOptions::unlabelled(["id"]).with_batch_size(16).with_shuffle(1);
    let mut stream = kept.stream(options).expect("stream").open(Shard::ALL).expect("open");
    stream.next_batch().expect("batch");
    let (paths, calls) = (files(&kept), CALLS.load(Ordering::SeqCst));
    std::fs::remove_file(&paths[2]).expect("lost");
    std::fs::write(&paths[5], b"ARROW1").expect("cut");
    let mut bytes = std::fs::read(&paths[7]).expect("read");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&paths[7], bytes).expect("damaged");

    assert_eq!(ids(&kept), Vec::from_iter(0..100));
    assert_eq!(CALLS.load(Ordering::SeqCst), calls + 3);
    assert_eq!(ids(&sent(&kept)), Vec::from_iter(0..100));
    assert_eq!(CALLS.load(Ordering::SeqCst), calls + 3, "they are in their places again");
    let mut rows = 0;
    while let Some(batch) = stream.next_batch().expect("the epoch goes on") {
        rows += batch.rows();
    }
    assert_eq!(rows, 100 - 16);
}

#[test]
fn files_go_with_the_dataset() {
    let kept = digits().persist(StorageLevel::Disk).expect("persist");
    let folder = files(&kept)[0].parent().map(Path::to_owned).expect("a folder");
    let clone = kept.clone();
    drop(kept);
    assert!(folder.is_dir());
    let there = sent(&clone);
    drop(clone);
    assert!(!folder.exists());
    assert_eq!(there.collect().expect("from the beginning"), digits().collect().expect("digits"));
}

#[test]
fn plans_that_give_other_rows_each_time_are_refused() {
    let refused = numbered(10, &[10]).map_batches("noisy").and_then(|d| d.materialize());
    let text = message(refused);
    assert!(text.contains("gives other rows when it is computed again"), "{text}");
    assert!(text.contains("\"noisy\" may draw random numbers"), "{text}");
    // It is found out late if it changes late: when a block has to be replaced.
    let kept = numbered(10, &[10]).map_batches("slept").expect("map");
    let kept = kept.persist(StorageLevel::Disk).expect("persist");
    std::fs::remove_file(&files(&kept)[0]).expect("lost");
    NOISE.fetch_add(5, Ordering::SeqCst);
    assert!(matches!(failure(kept.collect()), Error::NotRepeatable { .. }));
}

#[test]
fn queries_and_empty_datasets_are_kept_too() {
    let sums = numbered(10_000, &[999]).sql("SELECT id / 3 AS id FROM dataset").expect("sql");
    let kept = sums.persist(StorageLevel::Disk).expect("persist");
    assert_eq!(kept.block_refs().expect("blocks").len(), 3);
    std::fs::remove_file(&files(&kept)[1]).expect("lost");
    assert_eq!(ids(&kept), (0..10_000).map(|id| id / 3).collect::<Vec<i64>>());
    let none = numbered(10, &[5]).filter("id > 10").and_then(|d| d.materialize()).expect("none");
    assert_eq!(
        (none.count().expect("count"), none.schema().expect("schema").fields().len()),
        (0, 1)
    );
}
