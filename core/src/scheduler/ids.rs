//! Maps by id: ids count up, and nobody from outside chooses them.

use super::Id;
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

/// What is known of each request.
pub(crate) type IdMap<V> = HashMap<Id, V, BuildHasherDefault<IdHasher>>;

/// Leaves the low bits as they are, so that neighbours lie side by side in memory, and mixes the
/// highest seven, by which the map tells those of one place apart.
#[derive(Default)]
pub(crate) struct IdHasher(u64);

/// 2^64 divided by the golden ratio, as in Fibonacci hashing (Knuth, TAOCP 3, 6.4).
const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;
const LOW: u64 = u64::MAX >> 7;

impl Hasher for IdHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u64(self.0.rotate_left(8) ^ u64::from(*byte)));
    }

    fn write_u64(&mut self, id: u64) {
        self.0 = (id & LOW) | (id.wrapping_mul(GOLDEN) & !LOW);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_put_in_is_found_again() {
        let mut map = IdMap::default();
        let ids = || (0..1000).chain((0..1000).map(|id| u64::MAX - id * (1 << 50)));
        assert!(ids().all(|id| map.insert(id, id).is_none()));
        assert!(ids().all(|id| map.remove(&id) == Some(id)));
        assert!(map.is_empty());
    }
}
