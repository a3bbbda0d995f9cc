//! Prints how fast the store is: `cargo test -p mobula-core --lib speed -- --ignored --nocapture`.

use super::*;
use serde::{Deserialize, Serialize};
use std::hint::black_box;
use std::time::{Duration, Instant};

const MIB: usize = 1 << 20;

/// The median time of a run.
fn time<R>(runs: usize, mut run: impl FnMut() -> R) -> Duration {
    let mut times: Vec<_> = (0..runs)
        .map(|_| {
            let start = Instant::now();
            let result = run();
            let took = start.elapsed();
            drop(result);
            took
        })
        .collect();
    times.sort();
    times[runs / 2]
}

/// A reference, released when dropped: outside of the measured time.
struct Put<'a>(&'a Store, ObjectId);

impl Drop for Put<'_> {
    fn drop(&mut self) {
        self.0.release(self.1);
    }
}

fn print(what: &str, bytes: usize, took: Duration) {
    let rate = bytes as f64 / took.as_secs_f64() / 1e9;
    println!("{what:<40} {:>10.1} µs {rate:>8.2} GB/s", took.as_secs_f64() * 1e6);
}

#[derive(Serialize, Deserialize)]
struct Update {
    step: u64,
    name: String,
    weights: Blob,
}

#[test]
#[ignore = "a measurement"]
fn speed() {
    let fixture = Fixture::new(8 << 30);
    let store = &fixture.store;
    for (bytes, runs) in [(MIB, 200), (64 * MIB, 10)] {
        let mib = bytes / MIB;
        let source = vec![1u8; bytes];
        let mut target = vec![0u8; bytes];
        let copied = time(runs, || target.copy_from_slice(black_box(&source)));
        print(&format!("memcpy of {mib} MiB, memory in use"), bytes, copied);
        print(&format!("memcpy of {mib} MiB, new memory"), bytes, time(runs, || source.clone()));
        let blob = Blob::from(source);
        let put = |draft| Put(store, store.put(draft).expect("fits"));
        let put_blob = || put(Draft::new("a blob", &blob).expect("encodes"));
        print(&format!("put a blob of {mib} MiB"), bytes, time(runs, put_blob));
        let tensor = Tensor::zeros(bytes / 4, candle_core::DType::F32, &Device::Cpu).expect("fits");
        let tensor = TensorValue(tensor);
        let put_tensor = || put(Draft::new("a tensor", &tensor).expect("encodes"));
        print(&format!("put a tensor of {mib} MiB"), bytes, time(runs, put_tensor));
        let kept = put_tensor();
        let get =
            || decode::<TensorValue>("t", &store.get(kept.1).expect("is there")).expect("decodes");
        print(&format!("get a tensor of {mib} MiB"), bytes, time(runs, get));
    }
    let id = store.put(draft(1, MIB)).expect("fits");
    let (place, _lease) = store.share(id).expect("is there");
    let Place::Shared(location) = place else { panic!("a large object is shared") };
    let cold = Reader::new(0);
    print("open and map 1 MiB", MIB, time(1000, || cold.open(id, &location).expect("opens")));
    let sum = |e: &Encoded| e.buffers[0].iter().step_by(4096).map(|b| u64::from(*b)).sum::<u64>();
    let read = || black_box(sum(&cold.open(id, &location).expect("opens")));
    print("the same, and touch every page", MIB, time(1000, read));
    let warm = Reader::new(1 << 30);
    warm.open(id, &location).expect("opens");
    print("open 1 MiB again, cached", MIB, time(1000, || warm.open(id, &location).expect("opens")));
    print("get 1 MiB in the store's process", MIB, time(1000, || store.get(id).expect("is there")));
    let kept = store.get(id).expect("is there");
    print("the same, while a value lives", MIB, time(1000, || store.get(id).expect("is there")));
    drop(kept);
    let weights = Blob::from(vec![1; MIB]);
    let update = Update { step: 1, name: "layer.0.weight".to_owned(), weights };
    let both = || {
        let encoded = encode("an update", &update).expect("encodes");
        let decoded: Update = decode("an update", &encoded).expect("decodes");
        (decoded.step, decoded.name, decoded.weights)
    };
    print("encode and decode a struct with 1 MiB", MIB, time(1000, both));
    let small = || store.put(draft(1, 100)).expect("fits");
    print("put 100 bytes", 100, time(1000, small));
    let (tight, bytes) = (Fixture::new(100 * MIB as u64), 64 * MIB);
    let blob = Blob::from(vec![1; bytes]);
    let put = || tight.store.put(Draft::new("a blob", &blob).expect("encodes")).expect("fits");
    let ids: Vec<_> = (0..3).map(|_| put()).collect();
    print("put 64 MiB where 64 MiB must be spilled", bytes, time(6, put));
    let mut next = ids.iter().cycle();
    let get = || tight.store.get(*next.next().expect("a cycle")).expect("is there");
    print("get 64 MiB from disk, spilling as much", bytes, time(6, get));
}
