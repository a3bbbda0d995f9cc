//! Writing, and reading what was written.

use crate::{batch, digits, ids, message, numbered};
use arrow::array::{ArrayRef, AsArray, DictionaryArray, Float64Array, Int64Array, StringArray};
use arrow::datatypes::{DataType, Int32Type, SchemaRef, UInt32Type};
use arrow::record_batch::RecordBatch;
use mobula_data::{
    CsvOptions, Dataset, Error, OrdinalEncoder, ParquetCompression, ParquetSink, Result, Sink,
    SinkFile, WriteOptions, Written,
};
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

type Writer = fn(&Dataset, &Path, WriteOptions) -> Result<Written>;
type Reader = fn(&str) -> Result<Dataset>;

const FORMATS: [(&str, Writer, Reader); 4] = [
    ("parquet", |d, path, o| d.write_parquet(path, o), |path| Dataset::read_parquet(path)),
    (
        "csv",
        |d, path, o| d.write_csv(path, o),
        |path| Dataset::read_csv(path, CsvOptions::default()),
    ),
    ("jsonl", |d, path, o| d.write_json(path, o), |path| Dataset::read_json(path)),
    ("arrow", |d, path, o| d.write_ipc(path, o), |path| Dataset::read_ipc(path)),
];

/// The names in a folder, sorted.
fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).expect("list");
    let name = |entry: std::io::Result<fs::DirEntry>| entry.expect("entry").file_name();
    let mut names: Vec<_> = entries.map(name).map(|n| n.into_string().expect("UTF-8")).collect();
    names.sort();
    names
}

#[test]
fn what_is_written_is_read_back() {
    let columns: [(&str, ArrayRef); 3] = [
        ("id", Arc::new(Int64Array::from_iter_values(0..5))),
        ("x", Arc::new(Float64Array::from(vec![Some(0.1), None, Some(1e300), Some(-0.5), None]))),
        ("s", Arc::new(StringArray::from(vec!["a,b", "\"c\"", "d\ne", "ü", "NAN"]))),
    ];
    let table = batch(columns);
    let dataset = Dataset::from_batches([table.clone()]).expect("dataset");
    for (extension, write, read) in FORMATS {
        let dir = tempfile::tempdir().expect("folder");
        let folder = dir.path().join("new/out");
        let written = write(&dataset, &folder, WriteOptions::default()).expect("write");
        assert_eq!(names(&folder), ["_written.json", &format!("part-00000.{extension}")]);
        assert_eq!(names(folder.parent().expect("parent")), ["out"]);
        let length = fs::metadata(folder.join(&written.files[0].name)).expect("file").len();
        assert_eq!((written.rows(), written.bytes()), (5, length), "{extension}");
        let again = read(folder.to_str().expect("UTF-8")).and_then(|d| d.collect()).expect("rows");
        assert_eq!(again, table, "{extension}");
    }
}

#[test]
fn files_have_the_rows_asked_for_in_order() {
    // Blocks of 3, 9 and 1 rows, over and over.
    let dataset = numbered(100, &[3, 9, 1]).filter("id % 10 <> 0").expect("dataset");
    for (_, write, read) in FORMATS {
        let dir = tempfile::tempdir().expect("folder");
        let folder = dir.path().join("out");
        let options = WriteOptions::default().with_rows_per_file(5);
        let written = write(&dataset, &folder, options).expect("write");
        assert!(written.files.iter().all(|file| (1..=5).contains(&file.rows)), "{written:?}");
        assert_eq!(written.rows(), 90);
        let again = read(folder.to_str().expect("UTF-8")).expect("read");
        assert_eq!(ids(&again), ids(&dataset));
    }
}

#[test]
fn lists_survive_where_the_format_has_them() {
    let dir = tempfile::tempdir().expect("folder");
    let expected = digits().collect().expect("rows");
    for compression in [
        ParquetCompression::None,
        ParquetCompression::Snappy,
        ParquetCompression::Lz4,
        ParquetCompression::Zstd,
    ] {
        let sink = ParquetSink::default().with_compression(compression).with_row_group_rows(100);
        let folder = dir.path().join(format!("{compression:?}"));
        digits().write(&folder, sink, WriteOptions::default()).expect("write");
        let again = Dataset::read_parquet(folder.to_str().expect("UTF-8")).expect("read");
        assert_eq!(again.collect().expect("rows"), expected);
    }
    let text = message(digits().write_csv(dir.path().join("csv"), WriteOptions::default()));
    assert!(text.contains("column \"image\" is FixedSizeList"), "{text}");
    assert!(text.contains("; write Parquet, Arrow IPC or JSON"), "{text}");
    let sink = ParquetSink::default().with_row_group_rows(0);
    assert!(
        message(digits().write(dir.path(), sink, WriteOptions::default())).contains("at least")
    );
}

/// Each batch has a dictionary of its own, which a file of Arrow IPC cannot.
#[test]
fn categories_are_written_everywhere() {
    let words = |words: [&str; 2]| -> ArrayRef {
        Arc::new(words.into_iter().collect::<DictionaryArray<Int32Type>>())
    };
    let batches = [["a", "b"], ["c", "a"]].map(|pair| batch([("word", words(pair))]));
    let dataset = Dataset::from_batches(batches).expect("dataset");
    for (extension, write, read) in FORMATS {
        let dir = tempfile::tempdir().expect("folder");
        write(&dataset, &dir.path().join("out"), WriteOptions::default()).expect(extension);
        let out = dir.path().join("out");
        let again = read(out.to_str().expect("UTF-8")).and_then(|d| d.collect()).expect("rows");
        let text = arrow::compute::cast(again.column(0), &DataType::Utf8).expect("text");
        let text: Vec<_> = text.as_string::<i32>().iter().flatten().collect();
        assert_eq!(text, ["a", "b", "c", "a"], "{extension}");
    }
    let encoder = OrdinalEncoder::fit(&dataset, ["word"]).expect("fit");
    let codes = dataset.preprocess(&encoder).and_then(|d| d.collect()).expect("codes");
    let codes = codes.column(0).as_primitive::<UInt32Type>();
    assert_eq!(codes.values()[..], [0, 1, 2, 0]);
}

#[test]
fn no_rows_are_a_file_with_columns() {
    let none = Dataset::range(10).and_then(|d| d.filter("id > 10")).expect("dataset");
    for (extension, write, read) in FORMATS {
        let dir = tempfile::tempdir().expect("folder");
        let folder = dir.path().join("out");
        let written = write(&none, &folder, WriteOptions::default()).expect("write");
        assert_eq!((written.files.len(), written.rows()), (1, 0));
        let again = read(folder.to_str().expect("UTF-8"));
        match extension {
            "jsonl" => assert!(message(again).contains("no rows")),
            _ => {
                let rows = again.and_then(|d| d.collect()).expect("rows");
                assert_eq!((rows.num_rows(), rows.schema().field(0).name().as_str()), (0, "id"));
            }
        }
    }
}

#[test]
fn only_what_was_written_is_replaced() {
    let dir = tempfile::tempdir().expect("folder");
    let (folder, range) = (dir.path().join("out"), |rows| Dataset::range(rows).expect("range"));
    let read = || Dataset::read_ipc(folder.to_str().expect("UTF-8")).expect("read");
    range(3).write_ipc(&folder, WriteOptions::default()).expect("write");
    let text = message(range(4).write_ipc(&folder, WriteOptions::default()));
    assert!(text.contains("out exists; write elsewhere, or overwrite it"), "{text}");
    assert_eq!(ids(&read()), [0, 1, 2]);

    // Into the folder that is read.
    let overwrite = || WriteOptions::default().with_overwrite(true);
    let larger = read().with_column("id", "id + 5").expect("dataset");
    larger.write_ipc(&folder, overwrite()).expect("overwrite");
    assert_eq!(ids(&read()), [5, 6, 7]);
    assert_eq!(names(dir.path()), ["out"]);

    let precious = dir.path().join("precious");
    fs::create_dir(&precious).expect("folder");
    range(1).write_ipc(&precious, overwrite()).expect("an empty folder");
    fs::remove_file(precious.join("_written.json")).expect("remove");
    let text = message(range(1).write_ipc(&precious, overwrite()));
    assert!(text.contains("precious exists; it has no _written.json"), "{text}");
    let text = message(range(1).write_ipc(precious.join("part-00000.arrow"), overwrite()));
    assert!(text.contains("part-00000.arrow exists"), "{text}");
}

/// Ids as text, until there is one that it cannot write.
#[derive(Debug)]
struct Lines {
    limit: i64,
}

impl Sink for Lines {
    fn extension(&self) -> &str {
        "txt"
    }

    fn begin(&self, file: File, _schema: &SchemaRef) -> Result<Box<dyn SinkFile>> {
        Ok(Box::new(LinesFile { file, limit: self.limit }))
    }
}

struct LinesFile {
    file: File,
    limit: i64,
}

impl SinkFile for LinesFile {
    fn write(&mut self, batch: &RecordBatch) -> Result<()> {
        use arrow::datatypes::Int64Type;
        for id in batch.column(0).as_primitive::<Int64Type>().values() {
            if *id == self.limit {
                return Err(Error::Internal(format!("{id} is too much")));
            }
            writeln!(self.file, "{id}").expect("write");
        }
        Ok(())
    }

    fn finish(self: Box<Self>) -> Result<()> {
        Ok(())
    }
}

#[test]
fn own_sinks_write_what_built_in_ones_do() {
    let dir = tempfile::tempdir().expect("folder");
    let (dataset, folder) = (numbered(10, &[4]), dir.path().join("out"));
    let options = || WriteOptions::default().with_rows_per_file(4);
    dataset.write(&folder, Lines { limit: 99 }, options()).expect("write");
    assert_eq!(fs::read_to_string(folder.join("part-00001.txt")).expect("read"), "4\n5\n6\n7\n");
    let lines = Dataset::read_text(folder.to_str().expect("UTF-8")).expect("read");
    assert_eq!(lines.count().expect("count"), 10);

    // A write that fails leaves what was there, and nothing else.
    let text = message(dataset.write(&folder, Lines { limit: 7 }, options().with_overwrite(true)));
    assert!(text.contains("7 is too much"), "{text}");
    assert_eq!(names(dir.path()), ["out"]);
    assert_eq!(names(&folder).len(), 4);
    let failed = dir.path().join("failed");
    dataset.write(&failed, Lines { limit: 0 }, options()).expect_err("it fails");
    assert_eq!(names(dir.path()), ["out"]);
}
