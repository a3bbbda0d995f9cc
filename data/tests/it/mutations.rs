//! Files of other programs, changed at random: whatever a reader makes of them, it is rows or an error,
//! soon, and within the memory that files of their size need.

use crate::formats::masked;
use crate::message;
use arrow::record_batch::RecordBatch;
use mobula_data::{Dataset, Result};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

type Reader = fn(&str) -> Result<Dataset>;

/// Says that a process is one that [`with_little_memory`] has started.
const CHILD: &str = "MOBULA_DATA_TEST_CHILD";

/// What a process may need beyond what it has when it begins. No file here has 64 KiB; threads have
/// their stacks, and a decoder of Zstandard a window.
const MEMORY: u64 = 512 << 20;

/// Of one file; it takes a millisecond.
const SOON: Duration = Duration::from_secs(5);

/// Runs `body`, of the test of this name, in a process that ends where it needs more.
fn with_little_memory(test: &str, body: fn()) {
    if std::env::var_os(CHILD).is_some() {
        let has = fs::read_to_string("/proc/self/statm").expect("sizes of this process");
        let pages: u64 = has.split(' ').next().and_then(|n| n.parse().ok()).expect("pages");
        let most = Some(pages * 4096 + MEMORY);
        let limit = getrlimit(Resource::As);
        setrlimit(Resource::As, Rlimit { current: most, ..limit }).expect("a limit");
        return body();
    }
    let mut command = Command::new(std::env::current_exe().expect("a path"));
    command.args(["--exact", &format!("mutations::{test}"), "--nocapture"]).env(CHILD, "1");
    let output = command.output().expect("starts");
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}

/// What happens to a file. Places are parts of its length, of 2^16.
#[derive(Clone, Debug)]
enum Mutation {
    Flip {
        at: u16,
        mask: u8,
    },
    /// Lengths, as formats have them: all bits of so many bytes.
    Fill {
        at: u16,
        bytes: u8,
        value: u8,
    },
    Cut {
        at: u16,
    },
    Remove {
        at: u16,
        bytes: u8,
    },
    Copy {
        from: u16,
        bytes: u8,
        to: u16,
    },
    /// In front, behind, or in between.
    Insert {
        at: u16,
        bytes: Vec<u8>,
    },
}

fn mutation() -> impl Strategy<Value = Mutation> {
    use Mutation::{Copy, Cut, Fill, Flip, Insert, Remove};
    let values =
        prop_oneof![Just(0xff_u8), Just(0x7f), Just(0x80), Just(0), Just(b'9'), any::<u8>()];
    prop_oneof![
        4 => (any::<u16>(), 1_u8..).prop_map(|(at, mask)| Flip { at, mask }),
        4 => (any::<u16>(), 1_u8..12, values).prop_map(|(at, bytes, value)| Fill { at, bytes, value }),
        1 => any::<u16>().prop_map(|at| Cut { at }),
        1 => (any::<u16>(), any::<u8>()).prop_map(|(at, bytes)| Remove { at, bytes }),
        2 => any::<(u16, u8, u16)>().prop_map(|(from, bytes, to)| Copy { from, bytes, to }),
        1 => (any::<u16>(), any::<Vec<u8>>()).prop_map(|(at, bytes)| Insert { at, bytes }),
    ]
}

fn mutate(mut file: Vec<u8>, mutation: &Mutation) -> Vec<u8> {
    let length = file.len();
    let place = |at: u16| (length * usize::from(at)) >> 16;
    let range = |at: u16, bytes: u8| place(at)..(place(at) + usize::from(bytes)).min(length);
    match mutation {
        Mutation::Flip { at, mask } => {
            if let Some(byte) = file.get_mut(place(*at)) {
                *byte ^= mask;
            }
        }
        Mutation::Fill { at, bytes, value } => file[range(*at, *bytes)].fill(*value),
        Mutation::Cut { at } => file.truncate(place(*at)),
        Mutation::Remove { at, bytes } => drop(file.drain(range(*at, *bytes))),
        Mutation::Copy { from, bytes, to } => {
            let copied = file[range(*from, *bytes)].to_vec();
            file.splice(place(*to)..place(*to), copied);
        }
        Mutation::Insert { at, bytes } => drop(file.splice(place(*at)..place(*at), bytes.clone())),
    }
    file
}

/// Reads all, and some columns, as whatever it is.
fn look(path: &Path, read: Reader) -> Result<RecordBatch> {
    let dataset = read(path.to_str().expect("UTF-8"))?;
    let schema = dataset.schema()?;
    dataset.count()?;
    if let Some(last) = schema.fields().last() {
        // Two columns may have one name now, which is an error as good as any.
        drop(dataset.select([last.name()]).and_then(|dataset| dataset.collect()));
    }
    dataset.collect()
}

fn must_end_well(name: &str, read: Reader, cases: u32) {
    mutated(&fixture(name), name, read, as_it_is, cases);
}

fn fixture(name: &str) -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name);
    fs::read(path).expect("read")
}

/// What makes the checksums of a file right again, so that a reader believes the rest.
type Repair = fn(&mut [u8]);

fn as_it_is(_file: &mut [u8]) {}

/// Those of lengths and records, as far as the lengths lead.
fn repair_tfrecord(mut file: &mut [u8]) {
    while let Some((head, rest)) = file.split_first_chunk_mut::<12>() {
        let length = u64::from_le_bytes(std::array::from_fn(|at| head[at]));
        let crc = masked(&head[..8]);
        head[8..].copy_from_slice(&crc);
        let Ok(length) = usize::try_from(length) else { return };
        let Some((record, rest)) = rest.split_at_mut_checked(length) else { return };
        let Some((crc, rest)) = rest.split_first_chunk_mut::<4>() else { return };
        *crc = masked(record);
        file = rest;
    }
}

/// Those of the heads of members.
fn repair_tar(file: &mut [u8]) {
    for head in file.chunks_exact_mut(512).filter(|head| head[257..].starts_with(b"ustar")) {
        head[148..156].fill(b' ');
        let sum: u32 = head.iter().map(|byte| u32::from(*byte)).sum();
        head[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    }
}

fn mutated(whole: &[u8], name: &str, read: Reader, repair: Repair, cases: u32) {
    let dir = tempfile::tempdir().expect("folder");
    let path = dir.path().join(Path::new(name).file_name().expect("a name"));
    fs::write(&path, whole).expect("write");
    look(&path, read).expect("the file as it was");
    let config =
        Config { cases, failure_persistence: None, max_shrink_time: 10_000, ..Config::default() };
    let mut runner = TestRunner::new(config);
    let mutations = prop::collection::vec(mutation(), 1..4);
    let run = runner.run(&mutations, |mutations| {
        let mut file = mutations.iter().fold(whole.to_vec(), mutate);
        repair(&mut file);
        fs::write(&path, file).expect("write");
        let start = Instant::now();
        let read = look(&path, read);
        if read.is_err() {
            let text = message(read);
            prop_assert!(!text.contains("panicked"), "{}", text);
        }
        prop_assert!(start.elapsed() < SOON, "it took {:?}", start.elapsed());
        Ok(())
    });
    run.unwrap_or_else(|error| panic!("{name}: {error}"));
}

#[test]
fn numpy() {
    with_little_memory("numpy", || {
        for name in ["f4.npy", "big_endian.npy", "bool.npy"] {
            must_end_well(name, |path| Dataset::read_npy(path), 300);
        }
        must_end_well("two.npz", |path| Dataset::read_npz(path), 300);
    });
}

#[test]
fn tfrecord() {
    with_little_memory("tfrecord", || {
        let read: Reader = |path| Dataset::read_tfrecord(path);
        must_end_well("examples.tfrecord", read, 300);
        let whole = fixture("examples.tfrecord");
        mutated(&whole, "examples.tfrecord", read, repair_tfrecord, 300);
    });
}

#[test]
fn webdataset() {
    with_little_memory("webdataset", || {
        let read: Reader = |path| Dataset::read_webdataset(path);
        must_end_well("samples.tar", read, 300);
        mutated(&fixture("samples.tar"), "samples.tar", read, repair_tar, 300);
        // With names beyond the hundred bytes that a head has room for, and a size in binary.
        mutated(&long_names(), "long.tar", read, repair_tar, 300);
    });
}

fn long_names() -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for name in ["a", "b"] {
        let mut head = tar::Header::new_gnu();
        head.set_size(3);
        let size = &mut head.as_old_mut().size;
        size.fill(0);
        (size[0], size[11]) = (0x80, 3);
        tar.append_data(&mut head, format!("{}/{name}.txt", "x".repeat(120)), &b"one"[..])
            .expect("append");
    }
    tar.into_inner().expect("finish")
}

#[test]
fn avro() {
    with_little_memory("avro", || {
        for name in ["null", "deflate", "snappy", "zstandard", "types"] {
            let name = format!("avro/{name}.avro");
            must_end_well(&name, |path| Dataset::read_avro(path), 300);
        }
    });
}

/// The images are changed, and are the labels, too.
#[test]
fn idx() {
    with_little_memory("idx", || {
        let mut images = vec![0, 0, 8, 3, 0, 0, 0, 4, 0, 0, 0, 2, 0, 0, 0, 3];
        images.extend(0..24);
        let labels: Reader = |path| {
            let labels = Path::new(path).with_extension("labels");
            fs::write(&labels, [0, 0, 8, 1, 0, 0, 0, 4, 3, 1, 4, 1]).expect("write");
            drop(Dataset::read_idx(&labels, path));
            Dataset::read_idx(path, labels)
        };
        mutated(&images, "images.idx", labels, as_it_is, 500);
    });
}
