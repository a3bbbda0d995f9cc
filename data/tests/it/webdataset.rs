//! WebDataset shards that are written, and read back.

use crate::{batch, failure, lists, numbered};
use arrow::array::{
    ArrayRef, AsArray, BinaryArray, BooleanArray, Date32Array, DictionaryArray,
    FixedSizeBinaryArray, Float32Array, Float64Array, Int64Array, ListArray, StringArray,
};
use arrow::datatypes::{Int32Type, UInt8Type};
use arrow::record_batch::RecordBatch;
use mobula_data::{Dataset, Error, Result, WebDatasetSink, WriteOptions, Written};
use std::fs;
use std::path::Path;
use std::sync::Arc;

fn write(dataset: &Dataset, folder: &Path) -> Result<Written> {
    dataset.write_webdataset(folder, WriteOptions::default())
}

fn read(folder: &Path) -> RecordBatch {
    let dataset = Dataset::read_webdataset(folder.to_str().expect("UTF-8"));
    dataset.and_then(|d| d.collect()).expect("rows")
}

fn dataset<const N: usize>(columns: [(&str, ArrayRef); N]) -> Dataset {
    Dataset::from_batches([batch(columns)]).expect("dataset")
}

fn texts(values: &[&str]) -> ArrayRef {
    Arc::new(StringArray::from(values.to_vec()))
}

fn numbers(values: &[i64]) -> ArrayRef {
    Arc::new(Int64Array::from(values.to_vec()))
}

/// The members of a column.
fn members(rows: &RecordBatch, column: &str) -> Vec<Option<String>> {
    let column = rows.column_by_name(column).expect(column).as_binary::<i32>();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    column.iter().map(|bytes| bytes.map(text)).collect()
}

fn some<const N: usize>(texts: [&str; N]) -> [Option<String>; N] {
    texts.map(|text| Some(text.to_owned()))
}

#[test]
fn samples_come_back() {
    let dir = tempfile::tempdir().expect("folder");
    let folder = dir.path().join("out");
    let jpg: Vec<Option<&[u8]>> = vec![Some(b"\xff\xd8\x00"), None, Some(b"")];
    let list = |values: [i32; 2]| Some(values.map(Some).to_vec());
    let lists =
        ListArray::from_iter_primitive::<Int32Type, _, _>([list([1, 2]), Some(vec![]), None]);
    let data = dataset([
        ("__key__", texts(&["train/a", "train/b", "c"])),
        ("jpg", Arc::new(BinaryArray::from(jpg))),
        ("cls", numbers(&[7, -1, 0])),
        ("seg.txt", texts(&["ü", "", "two\nlines"])),
        ("json", Arc::new(lists)),
        ("score", Arc::new(Float64Array::from(vec![Some(0.5), None, Some(1e300)]))),
        ("flag", Arc::new(BooleanArray::from(vec![true, false, true]))),
    ]);
    let written = write(&data, &folder).expect("write");
    assert_eq!((written.rows(), written.files[0].name.to_str()), (3, Some("part-00000.tar")));
    let again = read(&folder);
    let keys: Vec<_> = again.column(0).as_string::<i32>().iter().flatten().collect();
    assert_eq!(keys, ["train/a", "train/b", "c"]);
    let bytes: Vec<_> =
        again.column_by_name("jpg").expect("jpg").as_binary::<i32>().iter().collect();
    assert_eq!(bytes, [Some(&b"\xff\xd8\x00"[..]), None, Some(b"")]);
    assert_eq!(members(&again, "cls"), some(["7", "-1", "0"]));
    assert_eq!(members(&again, "seg.txt"), some(["ü", "", "two\nlines"]));
    assert_eq!(members(&again, "json"), [Some("[1,2]".to_owned()), Some("[]".to_owned()), None]);
    assert_eq!(
        members(&again, "score"),
        [Some("0.5".to_owned()), None, Some("1.0e300".to_owned())]
    );
    assert_eq!(members(&again, "flag"), some(["true", "false", "true"]));
    // As it was read, it is written again.
    let once = Dataset::read_webdataset(folder.to_str().expect("UTF-8")).expect("dataset");
    write(&once, &dir.path().join("twice")).expect("write");
    assert_eq!(read(&dir.path().join("twice")), again);
    let file =
        |folder: &str| fs::read(dir.path().join(folder).join("part-00000.tar")).expect("read");
    write(&once, &dir.path().join("thrice")).expect("write");
    assert_eq!(file("twice"), file("thrice"));
}

#[test]
fn rows_without_keys_are_named_by_their_position() {
    let dir = tempfile::tempdir().expect("folder");
    let folder = dir.path().join("out");
    let even = numbered(100, &[7, 30]).filter("id % 2 = 0").expect("filter");
    let even = even.rename("id", "cls").expect("rename");
    let options = WriteOptions::default().with_rows_per_file(20);
    let written = even.write_webdataset(&folder, options).expect("write");
    assert_eq!(written.rows(), 50);
    assert!(written.files.len() >= 3);
    let again = read(&folder);
    let keys: Vec<_> = again.column(0).as_string::<i32>().iter().flatten().collect();
    let expected: Vec<_> = (0..50).map(|row| format!("{row:06}")).collect();
    assert_eq!(keys, expected);
    let expected: Vec<_> = (0..50).map(|row| Some((row * 2).to_string())).collect();
    assert_eq!(members(&again, "cls"), expected);
}

/// By our reader of NumPy's files, and by NumPy's own bytes.
#[test]
fn arrays_are_numpy_s() {
    let dir = tempfile::tempdir().expect("folder");
    let folder = dir.path().join("out");
    let list = |values: Vec<Option<i32>>| Some(values);
    let any = [list(vec![Some(5), Some(-6)]), list(vec![])];
    let any = ListArray::from_iter_primitive::<Int32Type, _, _>(any);
    let floats: ArrayRef = Arc::new(Float32Array::from(vec![1.5, 2.5]));
    let data = dataset([
        ("pixels.npy", lists(3, vec![1, 2, 3, 4, 5, 6])),
        ("any.npy", Arc::new(any)),
        ("one.npy", floats),
    ]);
    // Not from the first row on.
    write(&data.skip(1).and_then(|d| d.union(&data)).expect("union"), &folder).expect("write");
    let again = read(&folder);
    let npy = |column: &str, row: usize| {
        let bytes = again.column_by_name(column).expect(column).as_binary::<i32>().value(row);
        let path = dir.path().join("some.npy");
        fs::write(&path, bytes).expect("write");
        Dataset::read_npy(path.to_str().expect("UTF-8")).and_then(|d| d.collect())
    };
    for (row, pixels) in [[4, 5, 6], [1, 2, 3], [4, 5, 6]].iter().enumerate() {
        let read = npy("pixels.npy", row).expect("an array");
        assert_eq!(read.column(0).as_primitive::<UInt8Type>().values()[..], pixels[..]);
    }
    let read = npy("any.npy", 1).expect("an array");
    assert_eq!(read.column(0).as_primitive::<Int32Type>().values()[..], [5, -6]);
    assert_eq!(npy("any.npy", 0).expect("an array").num_rows(), 0);
    let one = again.column_by_name("one.npy").expect("one").as_binary::<i32>().value(0);
    let expected = "\u{1}\0v\0{'descr': '<f4', 'fortran_order': False, 'shape': (), }";
    assert_eq!(&one[6..6 + expected.len()], expected.as_bytes());
    assert_eq!((one.len(), &one[128..]), (132, &2.5_f32.to_le_bytes()[..]));
}

#[test]
fn text_and_bytes_of_any_kind_are_members() {
    let dir = tempfile::tempdir().expect("folder");
    let folder = dir.path().join("out");
    let words: DictionaryArray<Int32Type> = ["a", "a"].into_iter().collect();
    let fixed = FixedSizeBinaryArray::try_from_iter([b"12", b"34"].iter()).expect("bytes");
    let data = dataset([("word.txt", Arc::new(words) as ArrayRef), ("bin", Arc::new(fixed))]);
    write(&data, &folder).expect("write");
    let again = read(&folder);
    assert_eq!(members(&again, "word.txt"), some(["a", "a"]));
    assert_eq!(members(&again, "bin"), some(["12", "34"]));
}

#[test]
fn long_names_and_many_columns_come_back() {
    let dir = tempfile::tempdir().expect("folder");
    let folder = dir.path().join("out");
    let long = |end: &str| format!("{}/{end}", "ä".repeat(120));
    let (one, two) = (long("one"), long("two"));
    write(&dataset([("__key__", texts(&[&one, &two])), ("cls", numbers(&[1, 2]))]), &folder)
        .expect("write");
    let again = read(&folder);
    assert_eq!(again.column(0).as_string::<i32>().value(1), two);
    assert_eq!(members(&again, "cls"), some(["1", "2"]));
}

#[test]
fn what_is_no_sample_is_refused() {
    let dir = tempfile::tempdir().expect("folder");
    let folder = dir.path().join("out");
    let of = |columns| failure(write(&dataset::<2>(columns), &folder));
    let key = |keys: &[&str]| ("__key__", texts(keys));
    for keys in [["a.b", "c"], ["", "c"], ["/a", "c"], ["a/../../b", "c"], ["a/", "c"], ["d", "d"]]
    {
        let error = of([key(&keys), ("cls", numbers(&[1, 2]))]);
        assert!(
            matches!(&error, Error::Sample { key, .. } if keys.contains(&key.as_str())),
            "{error}"
        );
    }
    let no_value: ArrayRef = Arc::new(Int64Array::from(vec![Some(1), None]));
    let error = of([key(&["a", "b"]), ("cls", no_value)]);
    assert!(error.to_string().contains("\"b\" cannot be written: it has no value"), "{error}");
    let days: ArrayRef = Arc::new(Date32Array::from(vec![1]));
    let floats: ArrayRef = Arc::new(Float64Array::from(vec![0.5]));
    let mixed = ListArray::from_iter_primitive::<Int32Type, _, _>([Some(vec![None])]);
    for (name, column) in
        [("day", days), ("cls", floats), ("npy", texts(&["a"])), ("a/b", numbers(&[1]))]
    {
        let error = of([key(&["a"]), (name, column)]);
        let is_named = match &error {
            Error::ColumnType { column, .. } => column == name,
            Error::InvalidOption { got, .. } => got.contains(name),
            _ => false,
        };
        assert!(is_named, "{name}: {error}");
    }
    let error = of([key(&["a"]), ("x.npy", Arc::new(mixed))]);
    assert!(matches!(&error, Error::Nulls { column, .. } if column == "x.npy"), "{error}");
    let error = of([("__key__", numbers(&[1])), ("cls", numbers(&[1]))]);
    assert!(matches!(&error, Error::ColumnType { column, .. } if column == "__key__"), "{error}");
    let alone = dataset([key(&["a"])]);
    assert!(matches!(failure(write(&alone, &folder)), Error::InvalidOption { .. }));
    let keyless = dataset([("cls", numbers(&[1]))]);
    let error = failure(keyless.write(&folder, WebDatasetSink::default(), WriteOptions::default()));
    assert!(matches!(error, Error::NoSuchColumn { column, .. } if column == "__key__"));
    assert_eq!(fs::read_dir(dir.path()).expect("list").count(), 0, "nothing is left behind");
}
