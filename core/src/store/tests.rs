use super::inner::State;
use super::*;
use crate::value::{Blob, TensorValue, decode, encode};
use candle_core::{Device, Tensor};
use std::fs::File;
use std::path::PathBuf;

const LARGE: usize = 100_000;
/// Room for two large objects, not three.
const BUDGET: u64 = 250_000;

struct Fixture {
    store: Store,
    folder: tempfile::TempDir,
}

impl Fixture {
    fn new(budget: u64) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        Self { store: Store::new(budget, folder.path()).expect("a store"), folder }
    }

    fn put(&self, byte: u8) -> ObjectId {
        self.store.put(draft(byte, LARGE)).expect("fits")
    }

    fn get(&self, id: ObjectId) -> Result<Blob, StoreError> {
        Ok(decode("a blob", &self.store.get(id)?)?)
    }

    fn check(&self, id: ObjectId, byte: u8) {
        assert_eq!(self.get(id).expect("is there").0, vec![byte; LARGE]);
    }

    /// Waits for the mover.
    fn until(&self, ready: impl Fn(&State) -> bool) {
        let waited = self.store.inner.wait("the mover", |state| ready(state).then_some(Ok(())));
        waited.expect("in time");
    }

    fn is_spilled(&self, id: ObjectId) -> bool {
        self.store.inner.lock().slots[&id].memory.is_none()
    }

    fn spill_folder(&self) -> PathBuf {
        let mut folders = std::fs::read_dir(self.folder.path()).expect("reads");
        folders.next().expect("one").expect("reads").path()
    }

    fn files(&self) -> usize {
        // There is none before anything was spilled.
        let folders = std::fs::read_dir(self.folder.path()).expect("reads");
        folders
            .map(|folder| std::fs::read_dir(folder.expect("reads").path()).expect("reads").count())
            .sum()
    }
}

fn draft(byte: u8, bytes: usize) -> Draft {
    Draft::new("a blob", &Blob::from(vec![byte; bytes])).expect("encodes")
}

#[test]
fn a_value_comes_back_in_place_and_goes_with_its_last_reference() {
    let fixture = Fixture::new(BUDGET);
    let id = fixture.put(1);
    let (first, second) = (fixture.get(id).expect("is there"), fixture.get(id).expect("is there"));
    assert_eq!(first.0, vec![1; LARGE]);
    assert_eq!(first.0.as_ptr(), second.0.as_ptr(), "both in the same shared memory");
    fixture.check(id, 1);
    fixture.store.release(id);
    assert_eq!(fixture.store.stats().objects, 1, "values live in it");
    drop(first);
    drop(second);
    assert_eq!(fixture.store.stats(), Stats::default());
    assert!(matches!(fixture.get(id), Err(StoreError::Gone { .. })));
}

#[test]
fn tensors_and_small_values() {
    let fixture = Fixture::new(BUDGET);
    let tensor = Tensor::arange(0f32, 20_000., &Device::Cpu).expect("a range");
    let (tensor, row) = (tensor.reshape((100, 200)).expect("its size"), 3usize);
    let id = fixture.store.put(Draft::new("t", &TensorValue(tensor.clone())).expect("encodes"));
    let back: TensorValue =
        decode("t", &fixture.store.get(id.expect("fits")).expect("is there")).expect("decodes");
    let values = |t: &Tensor| t.get(row).and_then(|row| row.to_vec1::<f32>()).expect("a row");
    assert_eq!(values(&back.0), values(&tensor));
    let small = fixture.store.put(encode("()", &()).expect("encodes")).expect("fits");
    assert!(matches!(fixture.store.share(small).expect("is there").0, Place::Inline(_)));
    decode::<()>("()", &fixture.store.get(small).expect("is there")).expect("decodes");
}

#[test]
fn over_budget_the_oldest_is_spilled_and_read_back_when_asked_for() {
    let fixture = Fixture::new(BUDGET);
    let ids: Vec<_> = (0..5).map(|n| fixture.put(n)).collect();
    let spilled: Vec<_> = ids.iter().map(|id| fixture.is_spilled(*id)).collect();
    assert_eq!(spilled, [true, true, true, false, false]);
    let stats = fixture.store.stats();
    assert_eq!(stats.objects, 5);
    assert!(stats.bytes_in_memory <= BUDGET && stats.bytes_spilled > 3 * LARGE as u64);
    let mut inodes = Vec::new();
    for (id, byte) in ids.iter().zip(0u8..5).rev() {
        fixture.check(*id, byte);
        let (place, _lease) = fixture.store.share(*id).expect("is there");
        let Place::Shared(location) = place else { panic!("a large object is shared") };
        inodes.push(location.inode);
        assert!(fixture.store.stats().bytes_in_memory <= BUDGET);
    }
    ids.iter().for_each(|id| fixture.store.release(*id));
    assert_eq!(fixture.store.stats(), Stats::default());
    let held = |inode: &u64| super::segment::tests::holders(*inode) > 0;
    assert!(!inodes.iter().any(held), "a descriptor or a mapping is left");
    // The mover works in order: when the first of these is on disk, the old files are gone.
    let new: Vec<_> = (0..3).map(|n| fixture.put(n)).collect();
    assert!(fixture.is_spilled(new[0]));
    assert_eq!(fixture.files(), 1);
    drop(fixture.store);
    assert_eq!(std::fs::read_dir(fixture.folder.path()).expect("reads").count(), 0);
}

#[test]
fn small_objects_are_spilled_too() {
    let fixture = Fixture::new(50_000);
    let put = |byte| fixture.store.put(draft(byte, 20_000)).expect("fits");
    let ids: Vec<_> = (0..6).map(put).collect();
    assert!(fixture.is_spilled(ids[0]) && !fixture.is_spilled(ids[5]));
    for (id, byte) in ids.iter().zip(0..) {
        assert_eq!(fixture.get(*id).expect("is there").0, vec![byte; 20_000]);
    }
}

#[test]
fn what_is_in_use_stays_in_memory_and_the_rest_is_refused() {
    let fixture = Fixture::new(BUDGET);
    let (first, second) = (fixture.put(1), fixture.put(2));
    let value = fixture.get(first).expect("is there");
    let (_, lease) = fixture.store.share(second).expect("is there");
    let error = fixture.store.put(draft(3, LARGE)).expect_err("both are in use");
    assert!(matches!(error, StoreError::Full { budget: BUDGET, .. }), "{error}");
    assert_eq!((fixture.store.stats().objects, fixture.files()), (2, 0));
    drop(lease);
    fixture.put(3);
    assert!(fixture.is_spilled(second) && !fixture.is_spilled(first));
    assert_eq!(value.0, vec![1; LARGE]);
    // What must be read is read, over the budget, which is kept again when it can be.
    let other = fixture.get(second).expect("is there");
    assert_eq!(other.0[0], 2);
    drop((value, other));
    fixture.until(|state| state.budget.used() <= BUDGET);
}

#[test]
fn a_damaged_file_is_a_lost_object_with_its_reason() {
    let fixture = Fixture::new(BUDGET);
    let ids: Vec<_> = (0..4).map(|n| fixture.put(n)).collect();
    let file = |n: usize| fixture.spill_folder().join(ids[n].0.to_string());
    File::options().write(true).open(file(0)).and_then(|f| f.set_len(5)).expect("truncates");
    std::fs::remove_file(file(1)).expect("removes");
    for (n, expected) in [(0, "got 5"), (1, "cannot read")] {
        for _again in 0..2 {
            let error = fixture.get(ids[n]).expect_err("damaged");
            assert!(matches!(&error, StoreError::Lost { .. }), "{error}");
            assert!(error.to_string().contains(expected), "{error}");
        }
        fixture.store.release(ids[n]);
        assert!(matches!(fixture.get(ids[n]), Err(StoreError::Gone { .. })));
    }
    fixture.check(ids[3], 3);
    assert_eq!(fixture.store.stats().objects, 2);
}

#[test]
fn a_small_object_with_a_damaged_file_is_lost_too() {
    let fixture = Fixture::new(50_000);
    let put = |byte| fixture.store.put(draft(byte, 20_000)).expect("fits");
    let ids: Vec<_> = (0..4).map(put).collect();
    let file = fixture.spill_folder().join(ids[0].0.to_string());
    File::options().write(true).open(file).and_then(|f| f.set_len(5)).expect("truncates");
    assert!(matches!(fixture.get(ids[0]), Err(StoreError::Lost { .. })));
}

#[test]
fn a_disk_that_takes_nothing_refuses_new_objects_until_it_does() {
    let fixture = Fixture::new(BUDGET);
    let (first, second) = (fixture.put(1), fixture.put(2));
    let folder = fixture.folder.path();
    let aside = folder.with_extension("aside");
    std::fs::rename(folder, &aside)
        .and_then(|()| std::fs::write(folder, ""))
        .expect("in its place");
    let error = fixture.store.put(draft(3, LARGE)).expect_err("no room, no disk");
    assert!(matches!(error, StoreError::Full { .. }), "{error}");
    fixture.check(first, 1);
    fixture.check(second, 2);
    std::fs::remove_file(folder).and_then(|()| std::fs::rename(&aside, folder)).expect("back");
    fixture.put(3);
    fixture.check(first, 1);
}

#[test]
fn another_process_reads_what_is_leased_and_the_store_takes_over_what_it_makes() {
    // The same process here, but by the same path: /proc/PID/fd/N.
    let fixture = Fixture::new(BUDGET);
    let (reader, id) = (Reader::new(0), fixture.put(1));
    let (place, lease) = fixture.store.share(id).expect("is there");
    let Place::Shared(location) = place else { panic!("a large object is shared") };
    let seen: Blob =
        decode("a blob", &reader.open(id, &location).expect("opens")).expect("decodes");
    drop(lease);
    fixture.store.release(id);
    assert_eq!(seen.0, vec![1; LARGE], "its memory lives for as long as the value");
    assert!(Segment::open(&location).is_err(), "its owner has let go of it");

    let theirs = Offer::new(draft(7, LARGE)).expect("memory for a test");
    let (Place::Shared(location), reader) = (theirs.place(), Reader::new(0)) else {
        panic!("it is large");
    };
    let read: Blob =
        decode("a blob", &reader.open(ObjectId(9), &location).expect("opens")).expect("in place");
    assert_eq!(read.0, vec![7; LARGE]);
    let _others = [fixture.put(0), fixture.put(1)];
    let id = fixture.store.adopt(&theirs.place()).expect("takes over");
    drop(theirs);
    fixture.check(id, 7);
    fixture.until(|state| state.budget.used() <= BUDGET);
    let arrived = fixture.store.flat(id).expect("is there");
    let id = fixture.store.adopt(&Place::Inline(arrived)).expect("as from another host");
    assert!(matches!(fixture.store.share(id).expect("is there").0, Place::Shared(_)));
    fixture.check(id, 7);
    let inline = Bytes::from_static(b"not in the flat form");
    let id = fixture.store.adopt(&Place::Inline(inline)).expect("takes anything");
    assert!(matches!(fixture.get(id), Err(StoreError::Failed(Error::Codec { .. }))));
}

#[test]
fn many_threads_put_get_and_release() {
    let fixture = Fixture::new(BUDGET);
    let shared: Vec<_> = (0..8).map(|n| fixture.put(n)).collect();
    std::thread::scope(|scope| {
        for thread in 0..4u8 {
            let (fixture, shared) = (&fixture, &shared);
            scope.spawn(move || {
                for round in 0..50u8 {
                    let index = (usize::from(round) * 3 + usize::from(thread)) % shared.len();
                    fixture.check(shared[index], index as u8);
                    // What the other threads use may leave no room.
                    if let Ok(own) = fixture.store.put(draft(100 + thread, LARGE)) {
                        fixture.check(own, 100 + thread);
                        fixture.store.release(own);
                    }
                }
            });
        }
    });
    shared.iter().for_each(|id| fixture.store.release(*id));
    // One that is just being spilled goes when that is done.
    fixture.until(|state| state.budget.objects() == 0);
    let state = fixture.store.inner.lock();
    assert!(state.slots.is_empty() && state.lost.is_empty());
    assert_eq!((state.budget.used(), state.budget.objects()), (0, 0));
    drop(state);
    let inner = Arc::downgrade(&fixture.store.inner);
    drop(fixture.store);
    assert_eq!(inner.strong_count(), 0, "no lease, no thread is left");
}
