//! Avro files, as fastavro and polars write them (see `bench/fixtures/data.py`), whole and damaged.

use crate::{failure, message};
use arrow::array::{Array, AsArray};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Date32Type, Float64Type, Int64Type, TimestampMicrosecondType};
use arrow::record_batch::RecordBatch;
use mobula_core::{BatchSource, Shard};
use mobula_data::{Dataset, Error, Result, StreamOptions};
use std::fs;
use std::path::{Path, PathBuf};

const CODECS: [&str; 4] = ["null", "deflate", "snappy", "zstandard"];

fn fixture(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/avro");
    folder.join(format!("{name}.avro"))
}

fn read(path: &Path) -> Result<Dataset> {
    Dataset::read_avro(path.to_str().expect("UTF-8"))
}

fn rows(path: &Path) -> RecordBatch {
    read(path).and_then(|dataset| dataset.collect()).expect("rows")
}

fn bytes(name: &str) -> Vec<u8> {
    fs::read(fixture(name)).expect("read")
}

/// A file of this content, and its folder.
fn file(bytes: &[u8]) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().expect("folder");
    let path = dir.path().join("some.avro");
    fs::write(&path, bytes).expect("write");
    (dir, path)
}

/// A number as Avro has it.
fn long(number: i64) -> Vec<u8> {
    let mut rest = ((number << 1) ^ (number >> 63)) as u64;
    let mut coded = Vec::new();
    while rest > 127 {
        coded.push(rest as u8 | 128);
        rest >>= 7;
    }
    coded.push(rest as u8);
    coded
}

const MARK: &[u8; 16] = b"0123456789abcdef";

/// A file of this schema, whose blocks have so many records and these bytes, not compressed.
fn container(schema: &str, blocks: &[(i64, &[u8])]) -> Vec<u8> {
    let mut file = b"Obj\x01".to_vec();
    file.extend(long(1));
    for text in ["avro.schema", schema] {
        file.extend(long(text.len() as i64));
        file.extend(text.as_bytes());
    }
    file.push(0);
    file.extend(MARK);
    for (rows, bytes) in blocks {
        file.extend(long(*rows));
        file.extend(long(bytes.len() as i64));
        file.extend(*bytes);
        file.extend(MARK);
    }
    file
}

const IDS: &str =
    r#"{"type": "record", "name": "Row", "fields": [{"name": "id", "type": "long"}]}"#;

/// Blocks of these ids.
fn ids(blocks: &[std::ops::Range<i64>]) -> Vec<u8> {
    let bytes: Vec<Vec<u8>> =
        blocks.iter().map(|ids| ids.clone().flat_map(long).collect()).collect();
    let blocks = blocks.iter().zip(&bytes);
    let blocks: Vec<_> = blocks.map(|(ids, bytes)| (ids.end - ids.start, &bytes[..])).collect();
    container(IDS, &blocks)
}

#[test]
fn every_codec_is_read() {
    for name in CODECS.iter().chain(&["polars"]) {
        let table = rows(&fixture(name));
        let id = table.column_by_name("id").expect("id").as_primitive::<Int64Type>();
        assert_eq!(id.values()[..], Vec::from_iter(0..10), "{name}");
        let weight = table.column_by_name("weight").expect("weight").as_primitive::<Float64Type>();
        let expected = (0..10).map(|i| (i % 3 != 0).then_some(f64::from(i) / 4.0));
        assert!(weight.iter().eq(expected), "{name}");
        let text =
            cast(table.column_by_name("name").expect("name"), &DataType::Utf8).expect("text");
        assert_eq!(text.as_string::<i32>().value(7), "row \"7\",\nü", "{name}");
        // Columns in another order, one, and none.
        let dataset = read(&fixture(name)).expect("dataset");
        let some = dataset.select(["name", "id"]).and_then(|d| d.collect()).expect("rows");
        assert_eq!(some.column(1).as_primitive::<Int64Type>().value(9), 9, "{name}");
        assert_eq!(dataset.filter("true").and_then(|d| d.count()).expect("count"), 10, "{name}");
        let any = Dataset::read(fixture(name).to_str().expect("UTF-8")).expect("by its ending");
        assert_eq!(any.count().expect("count"), 10);
    }
}

#[test]
fn types_are_those_of_arrow() {
    let table = rows(&fixture("types"));
    let column = |name: &str| table.column_by_name(name).expect(name);
    let from = column("from").as_struct().column(0).as_primitive::<Float64Type>();
    assert_eq!(from.values()[..], [0.0, 0.5, 1.0, 1.5, 2.0]);
    let to = column("to").as_struct();
    let missing: Vec<_> = (0..5).map(|row| to.is_null(row)).collect();
    assert_eq!(missing, [true, false, true, false, true]);
    let tags: Vec<_> = column("tags").as_list::<i32>().iter().flatten().map(|t| t.len()).collect();
    assert_eq!(tags, [0, 1, 2, 3, 4]);
    let kinds = cast(column("kind"), &DataType::Utf8).expect("text");
    assert_eq!(
        Vec::from_iter(kinds.as_string::<i32>().iter().flatten()),
        ["a", "b", "a", "b", "a"]
    );
    assert_eq!(column("day").as_primitive::<Date32Type>().value(0), 19_723);
    let time = column("time").as_primitive::<TimestampMicrosecondType>();
    assert_eq!(time.value(4) - time.value(0), 4_000_000);
    let price = cast(column("price"), &DataType::Float64).expect("numbers");
    assert_eq!(price.as_primitive::<Float64Type>().values()[..], [0.0, 0.25, 0.5, 0.75, 1.0]);
    assert_eq!(column("counts").as_map().value(3).len(), 1);
    assert!(matches!(column("either").data_type(), DataType::Union(..)));

    // The type of `to` is defined in `from`, which is not asked for.
    let to = read(&fixture("types")).and_then(|d| d.select(["to", "kind"])).expect("select");
    let to = to.collect().expect("rows");
    let y = to.column(0).as_struct().column(1).as_primitive::<Float64Type>();
    assert_eq!((y.value(3), to.num_columns()), (3.0, 2));
}

#[test]
fn small_blocks_make_one_and_large_ones_stay() {
    let blocks: Vec<_> = (0..1000).map(|at| at * 10..at * 10 + 10).collect();
    let large = 10_000..30_000;
    let (_dir, path) = file(&ids(&[&blocks[..], &[large]].concat()));
    let dataset = read(&path).expect("dataset");
    assert_eq!(crate::ids(&dataset), Vec::from_iter(0..30_000));
    assert_eq!(dataset.head(3).expect("head").num_rows(), 3);
    // Whole blocks are shuffled: 4090 rows, 4090, 1820 and 20000.
    let options = StreamOptions::unlabelled(["id"]).with_batch_size(30_000).with_shuffle(1);
    let mut stream = dataset.stream(options).expect("stream").open(Shard::ALL).expect("open");
    let batch = stream.next_batch().expect("batch").expect("rows");
    let mut all = batch.get("id").and_then(|ids| Ok(ids.to_vec1::<f32>()?)).expect("ids");
    all.sort_by(f32::total_cmp);
    assert!(all.iter().zip(0_u16..).all(|(id, at)| *id == f32::from(at)));
}

#[test]
fn blocks_without_records_are_passed_over() {
    let (_dir, path) = file(&container(IDS, &[(0, b""), (2, b"\x02\x04"), (0, b""), (1, b"\x06")]));
    assert_eq!(crate::ids(&read(&path).expect("dataset")), [1, 2, 3]);
    let (_dir, path) = file(&container(IDS, &[]));
    assert_eq!(rows(&path).num_rows(), 0);
}

#[test]
fn damaged_files_are_named_with_the_block() {
    let whole = ids(&[0..3, 3..6, 6..9]);
    let last = whole.len();
    let cut = |bytes: usize| whole[..last - bytes].to_vec();
    let changed = |from_end: usize| {
        let mut bytes = whole.clone();
        bytes[last - from_end] ^= 1;
        bytes
    };
    let blocks = |blocks: &[(i64, &[u8])]| container(IDS, blocks);
    for (bytes, says) in [
        (b"".to_vec(), "EOF"),
        (b"no Avro at all".to_vec(), "magic"),
        (whole[..20].to_vec(), "EOF"),
        (cut(1), "block 2 is cut off"),
        (cut(17), "block 2 is cut off"),
        (cut(20), "block 2 does not begin with a number"),
        (changed(1), "block 2 does not end with the file's mark"),
        (changed(22), "block 1 does not end with the file's mark"),
        (blocks(&[(-3, b"\x00\x00\x00")]), "block 0 does not begin with a number"),
        (blocks(&[(i64::MAX >> 2, b"\x00")]), "block 0 has another number of records"),
        (blocks(&[(0, b"\x00")]), "block 0 has another number of records"),
        (blocks(&[(4, b"\x00\x00")]), "(rows 0 to 3)"),
        (container("{\"type\": ", &[]), "schema"),
        (container("\"string\"", &[]), "Record"),
    ] {
        let (_dir, path) = file(&bytes);
        let error = failure(read(&path).and_then(|d| d.collect()));
        assert!(matches!(error, Error::Corrupt { format: "Avro", .. }), "{error}");
        let text = error.to_string();
        assert!(text.contains("some.avro") && text.contains(says), "{says}: {text}");
    }
}

/// Which Arrow's reader would look at for ever.
#[test]
fn bytes_behind_the_last_record_are_no_trap() {
    let (_dir, path) = file(&container(IDS, &[(2, b"\x02\x04\x06"), (1, b"\x08")]));
    assert_eq!(crate::ids(&read(&path).expect("dataset")), [1, 2, 4]);
}

/// Snappy's blocks end with a checksum.
#[test]
fn checksums_are_checked() {
    let whole = bytes("snappy");
    let text = whole.windows(4).position(|bytes| bytes == b"row ").expect("some text");
    let mut other = whole;
    other[text] ^= 1;
    let (_dir, path) = file(&other);
    assert!(message(read(&path).and_then(|d| d.collect())).contains("CRC"));
    assert_eq!(read(&path).and_then(|d| d.count()).expect("blocks are counted"), 10);
}

#[test]
fn files_of_other_columns_are_refused() {
    let dir = tempfile::tempdir().expect("folder");
    fs::copy(fixture("null"), dir.path().join("a.avro")).expect("copy");
    fs::copy(fixture("deflate"), dir.path().join("b.avro")).expect("copy");
    // Two codecs, and a mark of its own each.
    let both = read(dir.path()).expect("dataset");
    assert_eq!(both.collect().expect("rows").num_rows(), 20);
    fs::write(dir.path().join("c.avro"), ids(&[0..3, 3..6])).expect("write");
    let error = failure(read(dir.path()));
    assert!(
        matches!(&error, Error::SchemaDiffers { path, .. } if path.ends_with("c.avro")),
        "{error}"
    );
}

/// A record that has itself within.
#[test]
fn types_without_end_are_an_error() {
    let node = r#"{"type": "record", "name": "Node", "fields": [
        {"name": "id", "type": "long"}, {"name": "next", "type": ["null", "Node"]}]}"#;
    let (_dir, path) = file(&container(node, &[(1, b"\x02\x00")]));
    let error = failure(read(&path).and_then(|d| d.collect()));
    assert!(matches!(error, Error::Corrupt { format: "Avro", .. }), "{error}");
}
