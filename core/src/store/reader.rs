//! The reading side in another process: opens an object once, and keeps it mapped while it is
//! likely to be read again.

use super::ObjectId;
use super::segment::{Location, Mapping, Segment};
use crate::Error;
use crate::value::Encoded;
use bytes::Bytes;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// Mappings by object. A value that still lives is found again at no cost, however old; beyond
/// that, the most recently used ones stay mapped, up to a limit. Those keep the memory of objects
/// that their store has dropped or spilled.
#[derive(Debug)]
pub(crate) struct Reader {
    limit: u64,
    cache: Mutex<Cache>,
}

#[derive(Debug, Default)]
struct Cache {
    open: HashMap<ObjectId, Open>,
    /// What is kept mapped, by the time of its last use.
    kept: BTreeMap<u64, (ObjectId, Arc<Mapping>)>,
    kept_bytes: u64,
    time: u64,
    /// When to look for dead entries again.
    sweep_at: usize,
}

#[derive(Debug)]
struct Open {
    mapping: Weak<Mapping>,
    used_at: u64,
}

impl Reader {
    /// Keeps at most so many bytes mapped that nobody uses.
    pub(crate) fn new(limit: u64) -> Self {
        Self { limit, cache: Mutex::default() }
    }

    /// The object at `location`; its payloads are shared memory.
    pub(crate) fn open(&self, id: ObjectId, location: &Location) -> Result<Encoded, Error> {
        let mapping = match self.find(id) {
            Some(mapping) => mapping,
            // Two threads may both get here: each has a mapping then, and the later one is kept.
            None => Arc::new(Segment::open(location)?.map()?),
        };
        // What falls out of the cache is unmapped here, after the lock.
        let _evicted = self.keep(id, &mapping);
        Encoded::from_flat("an object", &Bytes::from_owner(Shared(mapping)))
    }

    fn find(&self, id: ObjectId) -> Option<Arc<Mapping>> {
        self.lock().open.get(&id)?.mapping.upgrade()
    }

    fn keep(&self, id: ObjectId, mapping: &Arc<Mapping>) -> Vec<Arc<Mapping>> {
        let mut cache = self.lock();
        cache.time += 1;
        let used_at = cache.time;
        let open = Open { mapping: Arc::downgrade(mapping), used_at };
        let before = cache.open.insert(id, open);
        let mut evicted = Vec::new();
        evicted.extend(before.and_then(|before| cache.unkeep(before.used_at)));
        cache.kept_bytes += bytes(mapping);
        cache.kept.insert(used_at, (id, Arc::clone(mapping)));
        while cache.kept_bytes > self.limit
            && let Some(oldest) = cache.kept.keys().next().copied()
        {
            evicted.extend(cache.unkeep(oldest));
        }
        cache.sweep();
        evicted
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Cache> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Cache {
    fn unkeep(&mut self, time: u64) -> Option<Arc<Mapping>> {
        let (_, mapping) = self.kept.remove(&time)?;
        self.kept_bytes -= bytes(&mapping);
        Some(mapping)
    }

    /// Forgets what is unmapped, each time that the entries have doubled.
    fn sweep(&mut self) {
        if self.open.len() > self.sweep_at {
            self.open.retain(|_, open| open.mapping.strong_count() > 0);
            self.sweep_at = (2 * self.open.len()).max(64);
        }
    }
}

fn bytes(mapping: &Mapping) -> u64 {
    mapping.as_ref().len() as u64
}

/// A mapping as the owner of [`Bytes`].
#[derive(Debug)]
pub(super) struct Shared(pub(super) Arc<Mapping>);

impl AsRef<[u8]> for Shared {
    fn as_ref(&self) -> &[u8] {
        (*self.0).as_ref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::value::{Blob, Draft, decode};

    const LARGE: usize = 100_000;

    fn segment(byte: u8) -> Segment {
        let draft = Draft::new("a blob", &Blob::from(vec![byte; LARGE])).expect("encodes");
        let layout = draft.layout().expect("fits");
        let made = Segment::create(layout.bytes() as u64, |out| draft.write_to(&layout, out));
        made.expect("memory for a test")
    }

    fn blob(encoded: &Encoded) -> Blob {
        decode("a blob", encoded).expect("decodes")
    }

    fn mapped(reader: &Reader, n: u64) -> bool {
        reader.find(ObjectId(n)).is_some()
    }

    #[test]
    fn an_object_is_opened_once_and_decoded_in_place() {
        let reader = Reader::new(1 << 20);
        let segment = segment(7);
        let location = segment.location();
        let first = reader.open(ObjectId(1), &location).expect("opens");
        // Its keeper is gone: a second opening would fail.
        drop(segment);
        let second = reader.open(ObjectId(1), &location).expect("cached");
        assert_eq!(first.buffers[0].as_ptr(), second.buffers[0].as_ptr());
        assert_eq!(blob(&first).0.as_ptr(), first.buffers[0].as_ptr());
        assert_eq!(blob(&second).0, vec![7; LARGE]);
        assert!((first.buffers[0].as_ptr() as usize).is_multiple_of(64));
    }

    #[test]
    fn the_least_recently_used_is_unmapped_but_never_what_lives() {
        let reader = Reader::new(250_000);
        let segments: Vec<_> = (1..=3).map(segment).collect();
        let open = |n: u64| {
            let segment = &segments[n as usize - 1];
            blob(&reader.open(ObjectId(n), &segment.location()).expect("opens"))
        };
        let live = open(1);
        open(2);
        open(3);
        assert!(mapped(&reader, 1) && mapped(&reader, 2) && mapped(&reader, 3));
        open(1);
        open(3);
        assert!(!mapped(&reader, 2), "the oldest went");
        open(2);
        assert!(mapped(&reader, 1), "out of the cache, but a value lives in it");
        assert_eq!(live.0, vec![1; LARGE]);
        drop(live);
        assert!(!mapped(&reader, 1));
    }

    #[test]
    fn entries_of_unmapped_objects_do_not_pile_up() {
        let reader = Reader::new(0);
        for n in 0..1000 {
            reader.open(ObjectId(n), &segment(1).location()).expect("opens");
        }
        assert!(reader.lock().open.len() <= 128);
    }
}
