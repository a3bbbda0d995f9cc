//! Files of every format, as other programs write them (see `bench/fixtures/data.py`), whole and
//! damaged.

mod images;
mod tfrecord;

pub(crate) use tfrecord::masked;
use tfrecord::record_of;

use crate::{ids, message};
use arrow::array::{Array, AsArray};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Float64Type, Int64Type, Schema, UInt8Type};
use arrow::record_batch::RecordBatch;
use flate2::Compression;
use flate2::write::GzEncoder;
use mobula_core::{BatchSource, Shard};
use mobula_data::{CsvOptions, Dataset, Result, StreamOptions, TensorSource};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

type Reader = fn(String) -> Result<Dataset>;

fn fixture(name: &str) -> String {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name);
    path.to_str().expect("UTF-8").to_owned()
}

/// A folder with these files.
fn folder(files: &[(&str, &[u8])]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("folder");
    files.iter().for_each(|(name, bytes)| fs::write(dir.path().join(name), bytes).expect("write"));
    dir
}

fn at(dir: &tempfile::TempDir, name: &str) -> String {
    dir.path().join(name).to_str().expect("UTF-8").to_owned()
}

fn rows(dataset: Result<Dataset>) -> RecordBatch {
    dataset.and_then(|dataset| dataset.collect()).expect("rows")
}

fn read_csv(pattern: impl AsRef<str>) -> Result<Dataset> {
    Dataset::read_csv(pattern, CsvOptions::default())
}

/// Waits until a file that is written again has another time.
fn change(path: &str, bytes: &[u8]) {
    let before = fs::metadata(path).and_then(|m| m.modified()).expect("time");
    fs::write(path, bytes).expect("write");
    let file = fs::File::options().append(true).open(path).expect("open");
    file.set_modified(before + std::time::Duration::from_secs(1)).expect("time");
}

#[test]
fn tables_of_other_programs() {
    let read: [(&str, Reader); 6] = [
        ("pyarrow.arrow", |path| Dataset::read_ipc(path)),
        ("lz4.feather", |path| Dataset::read_ipc(path)),
        ("polars.arrow", |path| Dataset::read_ipc(path)),
        ("pyarrow.csv", |path| read_csv(path)),
        ("polars.csv", |path| read_csv(path)),
        ("polars.jsonl", |path| Dataset::read_json(path)),
    ];
    for (name, read) in read {
        let table = rows(read(fixture(name)));
        let names: Vec<_> = table.schema().fields().iter().map(|f| f.name().clone()).collect();
        assert_eq!(names, ["id", "weight", "name"], "{name}");
        let id = table.column(0).as_primitive::<Int64Type>();
        assert_eq!(id.values()[..], Vec::from_iter(0..10), "{name}");
        let weight = table.column(1).as_primitive::<Float64Type>();
        let expected = (0..10).map(|i| (i % 3 != 0).then_some(f64::from(i) / 4.0));
        assert!(weight.iter().eq(expected), "{name}");
        let text = cast(table.column(2), &DataType::Utf8).expect("text");
        assert_eq!(text.as_string::<i32>().value(7), "row \"7\",\nü", "{name}");
        // Columns in another order, and none at all.
        let dataset = read(fixture(name)).expect("dataset");
        let some = rows(dataset.select(["name", "id"]));
        assert_eq!(some.column(1).as_primitive::<Int64Type>().value(9), 9, "{name}");
        assert_eq!(dataset.filter("true").and_then(|d| d.count()).expect("count"), 10, "{name}");
    }
}

/// As pandas writes Feather: with a description of its own in the schema.
#[test]
fn ipc_with_metadata_is_read() {
    let dir = folder(&[]);
    let path = at(&dir, "pandas.feather");
    let table = rows(Dataset::range(3));
    let fields = table.schema().fields().clone();
    let metadata = [("pandas".to_owned(), "{}".to_owned())].into();
    let schema = Arc::new(Schema::new(fields).with_metadata(metadata));
    let file = fs::File::create(&path).expect("create");
    let mut writer = arrow::ipc::writer::FileWriter::try_new(file, &schema).expect("writer");
    writer.write(&table.with_schema(schema).expect("more metadata")).expect("write");
    writer.finish().expect("finish");
    assert_eq!(ids(&Dataset::read_ipc(&path).expect("dataset")), [0, 1, 2]);
}

#[test]
fn ipc_blocks_are_record_batches() {
    let dataset = Dataset::read_ipc(fixture("pyarrow.arrow")).expect("dataset");
    let options = StreamOptions::unlabelled(["id"]).with_batch_size(10).with_shuffle(1);
    let source = dataset.stream(options).expect("stream");
    let mut stream = source.open(Shard::ALL).expect("open");
    let batch = stream.next_batch().expect("batch").expect("rows");
    let mut ids = batch.get("id").and_then(|t| Ok(t.to_vec1::<f32>()?)).expect("ids");
    ids.sort_by(f32::total_cmp);
    assert_eq!(ids, Vec::from_iter((0..10_u8).map(f32::from)));
}

#[test]
fn damaged_ipc_is_named() {
    let whole = fs::read(fixture("pyarrow.arrow")).expect("read");
    let stream = [0xff, 0xff, 0xff, 0xff, 8, 0, 0, 0];
    let dir = folder(&[
        ("cut.arrow", &whole[..whole.len() / 2]),
        ("empty.arrow", b""),
        ("short.arrow", b"ARROW1"),
        ("stream.arrow", &stream),
    ]);
    for name in ["cut.arrow", "empty.arrow", "short.arrow", "stream.arrow"] {
        let text = message(Dataset::read_ipc(at(&dir, name)));
        assert!(text.contains(&format!("{name} is not a valid Arrow IPC file")), "{text}");
    }
    let text = message(Dataset::read_ipc(fixture("version_1.feather")));
    assert!(text.contains("write it again as version 2"), "{text}");

    // Any byte may be another: an error or other values, but no panic and no endless allocation.
    let path = at(&dir, "flipped.arrow");
    for flip in 0..whole.len() {
        let mut bytes = whole.clone();
        bytes[flip] ^= 0xff;
        fs::write(&path, bytes).expect("write");
        if let Err(error) = Dataset::read_ipc(&path).and_then(|d| d.collect()) {
            assert!(!error.to_string().contains("panicked"), "byte {flip}: {error}");
        }
    }
}

#[test]
fn schemas_that_differ_are_named() {
    let dir = folder(&[
        ("a.npy", &fs::read(fixture("f4.npy")).expect("read")),
        ("b.npy", &fs::read(fixture("f8.npy")).expect("read")),
        ("a.arrow", &fs::read(fixture("pyarrow.arrow")).expect("read")),
        ("a.csv", b"x,y\n1,2\n"),
        ("b.csv", b"x,z\n1,2\n"),
        ("a.jsonl", b"{\"x\": [1]}\n"),
        ("b.jsonl", b"{\"x\": 2}\n"),
    ]);
    let table = Dataset::range(3).expect("range");
    table.write_ipc(dir.path().join("b"), Default::default()).expect("write");
    fs::rename(dir.path().join("b/part-00000.arrow"), dir.path().join("b.arrow")).expect("move");
    for (text, file, says) in [
        (message(Dataset::read_npy(at(&dir, "?.npy"))), "b.npy", "Float64"),
        (message(Dataset::read_ipc(at(&dir, "?.arrow"))), "b.arrow", "[id: Int64], expected"),
        (message(read_csv(at(&dir, "?.csv"))), "b.csv", "z: Int64], expected [x: Int64, y"),
        (message(Dataset::read_json(at(&dir, "?.jsonl"))), "b.jsonl", "\"x\": a number where it"),
    ] {
        assert!(text.contains(file) && text.contains(says), "{text}");
    }
}

#[test]
fn json_lines_widen() {
    let dir = folder(&[
        ("a.jsonl", b"{\"b\": 1, \"a\": [1, 2]}\r\n\n  \n{\"b\": null, \"a\": []}\n"),
        ("b.jsonl", b"{\"c\": {\"d\": true}, \"b\": 2.5}\n{\"c\": null, \"t\": \"x\"}\n{\"t\": 7}"),
    ]);
    let table = rows(Dataset::read_json(dir.path().to_str().expect("UTF-8")));
    let columns: Vec<_> = table.schema().fields().iter().map(|f| f.name().clone()).collect();
    assert_eq!(columns, ["b", "a", "c", "t"]);
    assert_eq!(table.num_rows(), 5);
    let b = table.column(0).as_primitive::<Float64Type>();
    assert!(b.iter().eq([Some(1.0), None, Some(2.5), None, None]));
    assert_eq!(table.column(1).as_list::<i32>().value(0).len(), 2);
    assert!(table.column(2).as_struct().column(0).as_boolean().value(2));
    assert_eq!(table.column(3).as_string::<i32>().value(4), "7");
}

#[test]
fn damaged_json_names_the_line() {
    for (bytes, says) in [
        (&b"{\"a\": 1}\n\n{\"a\": \n"[..], "line 3: \"a\": EOF while parsing a value"),
        (b"[1, 2]\n", "line 1: expected an object"),
        (b"{\"a\": 1}\n{\"a\": \"\xff\"}\n", "line 2: "),
    ] {
        let dir = folder(&[("bad.jsonl", bytes)]);
        let text = message(Dataset::read_json(at(&dir, "bad.jsonl")));
        assert!(text.contains("bad.jsonl is not a valid JSON lines file"), "{text}");
        assert!(text.contains(says), "{text}");
    }
    let dir = folder(&[("none.jsonl", b"\n\n"), ("none.csv", b"")]);
    assert!(message(Dataset::read_json(at(&dir, "none.jsonl"))).contains("has no rows"));
    assert!(message(read_csv(at(&dir, "none.csv"))).contains("none.csv is not a valid CSV file"));
}

#[test]
fn text_has_a_row_a_line() {
    let long: String = (0..10_000).map(|i| format!("line {i}\n")).collect();
    let dir = folder(&[("a.txt", b"one\r\n\ntwo"), ("b.txt", long.as_bytes()), ("c.txt", b"")]);
    let table = rows(Dataset::read_text(dir.path().to_str().expect("UTF-8")));
    let text = table.column(0).as_string::<i32>();
    assert_eq!([text.value(0), text.value(1), text.value(2)], ["one", "", "two"]);
    assert_eq!((text.len(), text.value(10_002)), (10_003, "line 9999"));

    let dir = folder(&[("latin.txt", b"fine\nf\xfcr\n")]);
    let text = message(Dataset::read_text(at(&dir, "latin.txt")));
    assert!(text.contains("latin.txt is not a valid UTF-8 text file: line 2"), "{text}");
}

#[test]
fn gzipped_text_is_read() {
    let mut zipped = GzEncoder::new(Vec::new(), Compression::fast());
    zipped.write_all(b"id\n0\n1\n2\n").expect("write");
    let zipped = zipped.finish().expect("gzip");
    let dir = folder(&[("a.csv", &zipped), ("cut.csv", &zipped[..zipped.len() - 6])]);
    assert_eq!(ids(&read_csv(at(&dir, "a.csv")).expect("dataset")), [0, 1, 2]);
    assert!(message(read_csv(at(&dir, "cut.csv"))).contains("cut.csv"));
}

/// What is before `.gz` says what is in it.
#[test]
fn endings_before_gz_are_known() {
    let zip = |bytes: &[u8]| {
        let mut zipped = GzEncoder::new(Vec::new(), Compression::fast());
        zipped.write_all(bytes).expect("write");
        zipped.finish().expect("gzip")
    };
    let (csv, json) = (zip(b"id\n0\n1\n"), zip(b"{\"id\": 0}\n{\"id\": 1}\n"));
    let tar = zip(&fs::read(fixture("samples.tar")).expect("read"));
    let avro = zip(&fs::read(fixture("avro/null.avro")).expect("read"));
    let records = zip(&fs::read(fixture("examples.tfrecord")).expect("read"));
    let dir = folder(&[
        ("a.csv.gz", &csv),
        ("b.CSV.GZ", &csv),
        ("a.jsonl.gz", &json),
        ("a.json.gz", &json),
        ("a.txt.gz", &csv),
        ("a.tar.gz", &tar),
        ("a.avro.gz", &avro),
        ("a.tfrecord.gz", &records),
        ("a.parquet.gz", &csv),
        ("a.gz", &csv),
    ]);
    let read = |name: &str| Dataset::read(at(&dir, name));
    for name in ["a.csv.gz", "b.CSV.GZ", "a*.csv.gz", "a.jsonl.gz", "a.json.gz"] {
        assert_eq!(ids(&read(name).expect(name)), [0, 1], "{name}");
    }
    for (name, rows) in [("a.txt.gz", 3), ("a.tar.gz", 4), ("a.avro.gz", 10), ("a.tfrecord.gz", 5)]
    {
        assert_eq!(read(name).and_then(|d| d.count()).expect(name), rows, "{name}");
    }
    for name in ["a.parquet.gz", "a.gz"] {
        assert!(message(read(name)).contains("known endings"), "{name}");
    }
    let info = mobula_data::inspect::inspect(at(&dir, "a.csv.gz")).expect("inspect");
    assert_eq!((info.format.as_str(), info.rows), ("csv", 2));
}

/// A record of TFRecord may be as long as gzip's magic number says.
#[test]
fn a_length_is_not_taken_for_gzip() {
    let record = record_of(&vec![0_u8; 0x8b1f]);
    assert_eq!(record[..2], [0x1f, 0x8b]);
    let dir = folder(&[("long.tfrecord", &record)]);
    let text = message(Dataset::read_tfrecord(at(&dir, "long.tfrecord")));
    assert!(!text.contains("unzipped"), "{text}");
}

/// A folder may be called like a pattern.
#[test]
fn a_folder_is_no_pattern() {
    let dir = tempfile::tempdir().expect("folder");
    for (name, rows) in [("exp[12]", "id\n7\n"), ("exp1", "id\n1\n")] {
        fs::create_dir(dir.path().join(name)).expect("folder");
        fs::write(dir.path().join(name).join("a.csv"), rows).expect("write");
    }
    assert_eq!(ids(&read_csv(at(&dir, "exp[12]")).expect("dataset")), [7]);
    assert_eq!(ids(&read_csv(at(&dir, "exp[1]/*.csv")).expect("dataset")), [1]);
}

/// As files do, on Linux.
#[test]
fn a_pattern_tells_cases_apart() {
    let dir = folder(&[("a.csv", b"id\n1\n"), ("A.csv", b"id\n2\n"), ("b.CSV", b"id\n3\n")]);
    let read = |pattern: &str| ids(&read_csv(at(&dir, pattern)).expect("dataset"));
    assert_eq!(
        (read("*.csv"), read("a*"), read("*.[cC][sS][vV]")),
        (vec![2, 1], vec![1], vec![2, 1, 3])
    );
    assert!(message(read_csv(at(&dir, "*.Csv"))).contains("no file"));
    // A folder has them all.
    assert_eq!(read(""), [2, 1, 3]);
}

#[test]
fn csv_streams_in_blocks() {
    let text: String = (0..20_000).map(|i| format!("{i},\"a\n{i}\"\n")).collect();
    let dir = folder(&[("a.csv", format!("id,text\n{text}").as_bytes())]);
    let dataset = read_csv(at(&dir, "a.csv")).expect("dataset");
    assert_eq!(ids(&dataset), Vec::from_iter(0..20_000));
    let last = rows(dataset.filter("id = 19999"));
    assert_eq!(last.column(1).as_string::<i32>().value(0), "a\n19999");
    // The head is read without the rest.
    assert_eq!(dataset.head(3).expect("head").num_rows(), 3);
}

#[test]
fn files_that_change_are_named() {
    let npy = fs::read(fixture("f4.npy")).expect("read");
    let arrow = fs::read(fixture("pyarrow.arrow")).expect("read");
    let png = fs::read(fixture("halves.png")).expect("read");
    let parquet = fs::read(crate::example("digits-0.parquet")).expect("read");
    let read: [(&str, &[u8], Reader); 7] = [
        ("a.csv", b"id\n1\n2\n", |path| read_csv(path)),
        ("a.jsonl", b"{\"id\": 1}\n", |path| Dataset::read_json(path)),
        ("a.txt", b"one\ntwo\n", |path| Dataset::read_text(path)),
        ("a.npy", &npy, |path| Dataset::read_npy(path)),
        ("a.arrow", &arrow, |path| Dataset::read_ipc(path)),
        ("a.png", &png, |path| Dataset::read_images(path, [2, 2])),
        ("a.parquet", &parquet, |path| Dataset::read_parquet(path)),
    ];
    for (name, bytes, read) in read {
        let dir = folder(&[(name, bytes)]);
        let dataset = read(at(&dir, name)).expect("dataset");
        dataset.collect().expect("rows");
        let mut other = bytes.to_vec();
        *other.last_mut().expect("a byte") ^= 1;
        change(&at(&dir, name), &other);
        let text = message(dataset.collect());
        assert!(text.contains(&format!("{name} changed since the dataset was opened")), "{text}");
        // A stream that was begun on the old file does not go on with the new one.
        let stream = |dataset: &Dataset| {
            let columns = [dataset.schema().expect("schema").field(0).name().clone()];
            dataset.stream(StreamOptions::unlabelled(columns))
        };
        if let Ok(source) = read(at(&dir, name)).and_then(|again| stream(&again)) {
            change(&at(&dir, name), bytes);
            let json = serde_json::to_string(&source).expect("JSON");
            let travelled: TensorSource = serde_json::from_str(&json).expect("JSON");
            assert!(message(travelled.open(Shard::ALL)).contains("the files as they are now"));
        }
    }
}

/// The numbers 0 to 11 as floats, whatever their type is.
fn npy_values(name: &str) -> Vec<f64> {
    let table = rows(Dataset::read_npy(fixture(name)));
    let lists = table.column_by_name("data").expect("data").as_fixed_size_list();
    assert_eq!((lists.len(), lists.value_length()), (3, 4), "{name}");
    let values = cast(lists.values(), &DataType::Float64).expect("numbers");
    values.as_primitive::<Float64Type>().values().to_vec()
}

#[test]
fn numpy_arrays_of_every_type() {
    let expected: Vec<_> = (0..12).map(f64::from).collect();
    for name in ["f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "big_endian"] {
        assert_eq!(npy_values(&format!("{name}.npy")), expected, "{name}");
    }
    let flags = rows(Dataset::read_npy(fixture("bool.npy")));
    assert_eq!(Vec::from_iter(flags.column(0).as_boolean()), [Some(true), Some(false), Some(true)]);
    let text = message(Dataset::read_npy(fixture("fortran.npy")));
    assert!(text.contains("fortran.npy") && text.contains("np.ascontiguousarray"), "{text}");

    let two = rows(Dataset::read_npz(fixture("two.npz")));
    assert_eq!(two.column_by_name("x").expect("x").as_fixed_size_list().value_length(), 4);
    let y = two.column_by_name("y").expect("y").as_primitive::<Int64Type>();
    assert_eq!(y.values()[..], [5, 6, 7]);
}

#[test]
fn damaged_numpy_is_named() {
    let npy = fs::read(fixture("f4.npy")).expect("read");
    let npz = fs::read(fixture("two.npz")).expect("read");
    let dir = folder(&[
        ("cut.npy", &npy[..npy.len() - 1]),
        ("empty.npy", b""),
        ("magic.npy", b"not numpy at all"),
        ("cut.npz", &npz[..npz.len() / 2]),
        ("empty.npz", b""),
    ]);
    for (name, says) in [
        ("cut.npy", "it has 175 bytes, by its header it should have 176"),
        ("empty.npy", "shorter than a header"),
        ("magic.npy", "it starts with"),
    ] {
        let text = message(Dataset::read_npy(at(&dir, name)));
        assert!(text.contains(name) && text.contains(says), "{text}");
    }
    // A shape of nothing, beyond all measure.
    let header = "{'descr': '<f4', 'fortran_order': False, 'shape': (9223372036854775807, 0), }\n";
    let none = [&b"\x93NUMPY\x01\x00"[..], &[header.len() as u8, 0], header.as_bytes()].concat();
    fs::write(at(&dir, "none.npy"), none).expect("write");
    let text = message(Dataset::read_npy(at(&dir, "none.npy")));
    assert!(text.contains("has no values in a row"), "{text}");
    assert!(message(Dataset::range(u64::MAX)).contains("at most 4294967296"));
    for name in ["cut.npz", "empty.npz"] {
        let text = message(Dataset::read_npz(at(&dir, name)));
        assert!(text.contains(&format!("{name} is not a valid NumPy file")), "{text}");
    }
}

#[test]
fn samples_of_webdataset() {
    let dataset = Dataset::read_webdataset(fixture("samples.tar")).expect("dataset");
    let table = rows(Ok(dataset.clone()));
    let schema = table.schema();
    let names: Vec<_> = schema.fields().iter().map(|f| f.name().as_str()).collect();
    assert_eq!(names, ["__key__", "cls", "json", "seg.txt"]);
    assert_eq!(table.column(0).as_string::<i32>().value(3), "train/003");
    let json: Vec<_> = table.column(2).as_binary::<i32>().iter().map(|v| v.is_some()).collect();
    assert_eq!(json, [false, false, true, false]);
    assert_eq!(table.column(3).as_binary::<i32>().value(1), b"sample 1");
    let classes = dataset.with_column("label", "CAST(CAST(cls AS VARCHAR) AS INT)");
    let labels = rows(classes.and_then(|d| d.select(["label"])));
    let labels = cast(labels.column(0), &DataType::Int64).expect("numbers");
    assert_eq!(labels.as_primitive::<Int64Type>().values()[..], [0, 1, 0, 1]);
}

#[test]
fn damaged_webdataset_is_named() {
    let whole = fs::read(fixture("samples.tar")).expect("read");
    let dir = folder(&[("cut.tar", &whole[..600]), ("text.tar", &[b'x'; 2000])]);
    for name in ["cut.tar", "text.tar"] {
        let text = message(Dataset::read_webdataset(at(&dir, name)));
        assert!(text.contains(&format!("{name} is not a valid WebDataset tar file")), "{text}");
    }
    let twice = at(&dir, "twice.tar");
    let mut tar = tar::Builder::new(fs::File::create(&twice).expect("create"));
    for text in [&b"one"[..], b"two"] {
        let mut head = tar::Header::new_gnu();
        head.set_size(text.len() as u64);
        head.set_mode(0o644);
        tar.append_data(&mut head, "a.txt", text).expect("append");
    }
    tar.finish().expect("finish");
    let text = message(Dataset::read_webdataset(&twice).and_then(|d| d.collect()));
    assert!(text.contains("the sample \"a\" has two members .txt"), "{text}");
    let path = at(&dir, "flipped.tar");
    for flip in (0..whole.len()).step_by(37) {
        let mut bytes = whole.clone();
        bytes[flip] ^= 0xff;
        fs::write(&path, bytes).expect("write");
        if let Err(error) = Dataset::read_webdataset(&path).and_then(|d| d.collect()) {
            assert!(!error.to_string().contains("panicked"), "byte {flip}: {error}");
        }
    }
}
