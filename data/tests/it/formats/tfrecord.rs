//! TFRecord files.

use super::*;

#[test]
fn examples_of_tfrecord() {
    let table = rows(Dataset::read_tfrecord(fixture("examples.tfrecord")));
    let schema = table.schema();
    let names: Vec<_> = schema.fields().iter().map(|f| f.name().as_str()).collect();
    assert_eq!(names, ["id", "name", "pair", "tags"]);
    assert_eq!(table.column(0).as_primitive::<Int64Type>().values()[..], [0, 1, 2, 3, 4]);
    let names: Vec<_> = table.column(1).as_binary::<i32>().iter().collect();
    assert_eq!(names, [None, Some(&b"row 1"[..]), None, Some(b"row 3"), None]);
    let pairs = table.column(2).as_fixed_size_list();
    let pair = pairs.value(3);
    assert_eq!(pair.as_primitive::<arrow::datatypes::Float32Type>().values()[..], [1.5, -1.5]);
    let tags: Vec<_> = table.column(3).as_list::<i32>().iter().flatten().map(|t| t.len()).collect();
    assert_eq!(tags, [0, 1, 2, 3, 4]);
}

#[test]
fn damaged_tfrecord_is_named() {
    let whole = fs::read(fixture("examples.tfrecord")).expect("read");
    let dir = folder(&[]);
    let path = at(&dir, "bad.tfrecord");
    // Every byte is under a checksum.
    for flip in 0..whole.len() {
        let mut bytes = whole.clone();
        bytes[flip] ^= 1;
        fs::write(&path, bytes).expect("write");
        let text = message(Dataset::read_tfrecord(&path).and_then(|d| d.collect()));
        assert!(text.contains("bad.tfrecord") && text.contains("checksum"), "{flip}: {text}");
    }
    fs::write(&path, &whole[..whole.len() - 1]).expect("write");
    assert!(message(Dataset::read_tfrecord(&path)).contains("record 4 is cut off"));
    fs::write(&path, b"").expect("write");
    assert!(message(Dataset::read_tfrecord(&path)).contains("no rows"));
}

/// A record of one feature, which is a byte list of these values, as TFRecord frames it.
fn record(name: &str, values: &[&str]) -> Vec<u8> {
    let field = |bytes: &[u8]| [&[0x0a, bytes.len() as u8], bytes].concat();
    let list: Vec<u8> = values.iter().flat_map(|value| field(value.as_bytes())).collect();
    let mut entry = field(name.as_bytes());
    let feature = field(&list);
    entry.extend([0x12, feature.len() as u8]);
    entry.extend(&feature);
    record_of(&field(&field(&entry)))
}

/// Some bytes, as TFRecord frames them.
pub(super) fn record_of(bytes: &[u8]) -> Vec<u8> {
    let length = (bytes.len() as u64).to_le_bytes();
    [&length[..], &masked(&length), bytes, &masked(bytes)].concat()
}

/// CRC-32C, bit by bit, masked.
pub(crate) fn masked(bytes: &[u8]) -> [u8; 4] {
    let crc = bytes.iter().fold(!0_u32, |crc, byte| {
        let step = |crc: u32, _| (crc >> 1) ^ (0x82f6_3b78 & 0_u32.wrapping_sub(crc & 1));
        (0..8).fold(crc ^ u32::from(*byte), step)
    });
    (!crc).rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes()
}

#[test]
fn tfrecord_that_drifts_is_named() {
    let first = record("a", &["x"]).repeat(100);
    for (late, says) in [
        (record("b", &["x"]), "feature \"b\" is not in the first records"),
        (record("a", &["x", "y"]), "feature \"a\" has 2 values, expected 1"),
    ] {
        let dir = folder(&[("late.tfrecord", &[first.clone(), late].concat())]);
        let text =
            message(Dataset::read_tfrecord(at(&dir, "late.tfrecord")).and_then(|d| d.collect()));
        assert!(text.contains("late.tfrecord (rows 0 to 100)") && text.contains(says), "{text}");
    }
}

/// The types come from the first hundred records, however large they are.
#[test]
fn tfrecord_is_typed_beyond_its_first_block() {
    // 9 MiB: two do not fit into a block. A field of protobuf that nobody knows has the bytes.
    let padding = 9 << 20;
    let field = |key: u8, bytes: &[u8]| {
        let (mut head, mut rest) = (vec![key], bytes.len());
        while rest > 127 {
            head.push(rest as u8 | 128);
            rest >>= 7;
        }
        head.push(rest as u8);
        [&head, bytes].concat()
    };
    let example = |name: &str| {
        let small = record(name, &["x"]);
        let (example, pad) = (&small[12..small.len() - 4], vec![0; padding]);
        record_of(&[example, &field(0x7a, &pad)].concat())
    };
    let dir = folder(&[("large.tfrecord", &[example("a"), example("b")].concat())]);
    let table = rows(Dataset::read_tfrecord(at(&dir, "large.tfrecord")));
    assert_eq!((table.num_rows(), table.num_columns()), (2, 2));
}
