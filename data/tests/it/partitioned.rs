//! Folders named `column=value`.

use crate::{batch, failure, ids, message, numbered};
use arrow::array::{
    Array, ArrayRef, AsArray, BooleanArray, Date32Array, DictionaryArray, Float64Array, Int8Array,
    Int64Array,
};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Int32Type, Int64Type};
use arrow::record_batch::RecordBatch;
use mobula_data::{
    CsvOptions, Dataset, Error, ParquetOptions, Result, StreamOptions, WriteOptions,
};
use std::fs;
use std::path::Path;
use std::sync::Arc;

const MISSING: &str = "__HIVE_DEFAULT_PARTITION__";

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

fn read(folder: &Path) -> Dataset {
    Dataset::read_parquet(text(folder)).expect("dataset")
}

fn by<const N: usize>(columns: [&str; N]) -> WriteOptions {
    WriteOptions::default().with_partition_by(columns)
}

fn rows(dataset: &Dataset) -> RecordBatch {
    dataset.collect().expect("rows")
}

/// Text of any kind, or numbers as text.
fn column(rows: &RecordBatch, name: &str) -> Vec<Option<String>> {
    let column = cast(rows.column_by_name(name).expect(name), &DataType::Utf8).expect("text");
    column.as_string::<i32>().iter().map(|value| value.map(str::to_owned)).collect()
}

/// The ids 0 to 99, of which `year` and `city` change from row to row.
fn visits() -> Dataset {
    numbered(100, &[7, 30])
        .with_column("year", "2020 + id % 3")
        .and_then(|d| {
            d.with_column(
                "city",
                "CASE id % 4 WHEN 0 THEN 'a/b' WHEN 1 THEN 'Köln' WHEN 2 THEN '' END",
            )
        })
        .expect("dataset")
}

#[test]
fn rows_of_a_folder_keep_their_order_and_come_back() {
    for (write, read) in FORMATS {
        let dir = tempfile::tempdir().expect("folder");
        let folder = dir.path().join("out");
        let written = write(&visits(), &folder, by(["year", "city"])).expect("write");
        assert_eq!((written.files.len(), written.rows()), (12, 100));
        let first = &written.files[0].name;
        assert!(first.starts_with("year=2020/city=") && folder.join(first).is_file(), "{first:?}");
        let names: Vec<_> = fs::read_dir(folder.join("year=2021"))
            .expect("list")
            .map(|entry| entry.expect("entry").file_name().into_string().expect("UTF-8"))
            .collect();
        for name in ["city=a%2Fb", "city=Köln", "city=", &format!("city={MISSING}")] {
            assert!(names.iter().any(|known| known == name), "{names:?}");
        }

        let again = read(text(&folder)).expect("dataset");
        let schema = again.schema().expect("schema");
        assert_eq!(schema.field_with_name("year").expect("year").data_type(), &DataType::Int64);
        for (city, predicate) in [("= 'a/b'", 0), ("= 'Köln'", 1), ("= ''", 2), ("IS NULL", 3)] {
            let rows = again.filter(format!("city {city} AND year = 2021")).expect("filter");
            let expected: Vec<_> =
                (0..100).filter(|id| id % 4 == predicate && id % 3 == 1).collect();
            assert_eq!(ids(&rows), expected, "{city}");
        }
        let sorted = again.sort(["id"]).and_then(|d| d.select(["id", "year", "city"]));
        let (got, expected) = (rows(&sorted.expect("sort")), rows(&visits()));
        for name in ["id", "year", "city"] {
            assert_eq!(column(&got, name), column(&expected, name));
        }
    }
}

type Writer = fn(&Dataset, &Path, WriteOptions) -> Result<mobula_data::Written>;
type Reader = fn(&str) -> Result<Dataset>;

const FORMATS: [(Writer, Reader); 4] = [
    (|d, path, o| d.write_parquet(path, o), |path| Dataset::read_parquet(path)),
    (|d, path, o| d.write_csv(path, o), |path| Dataset::read_csv(path, CsvOptions::default())),
    (|d, path, o| d.write_json(path, o), |path| Dataset::read_json(path)),
    (|d, path, o| d.write_ipc(path, o), |path| Dataset::read_ipc(path)),
];

/// See `bench/fixtures/data.py`.
#[test]
fn folders_of_other_programs() {
    for program in ["pyarrow", "polars", "duckdb"] {
        let folder =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/hive").join(program);
        let all = rows(&read(&folder).sort(["id"]).expect("sort"));
        let cities =
            [Some("New York"), Some("a/b=c"), Some("Köln"), None, Some("New York"), Some("Köln")];
        let cities: Vec<_> = cities.iter().map(|city| city.map(str::to_owned)).collect();
        assert_eq!(column(&all, "city"), cities, "{program}");
        let years = all.column_by_name("year").expect("year").as_primitive::<Int64Type>();
        assert_eq!(years.values()[..], [2023, 2023, 2024, 2024, 2024, 2024], "{program}");
        assert_eq!(all.num_columns(), 3, "{program}");
    }
}

#[test]
fn values_of_every_allowed_type_name_folders() {
    let columns: [(&str, ArrayRef); 5] = [
        ("id", Arc::new(Int64Array::from(vec![0, 1]))),
        ("small", Arc::new(Int8Array::from(vec![Some(-1), None]))),
        ("flag", Arc::new(BooleanArray::from(vec![true, false]))),
        ("day", Arc::new(Date32Array::from(vec![19_000, 19_001]))),
        ("word", Arc::new(vec!["x", "y"].into_iter().collect::<DictionaryArray<Int32Type>>())),
    ];
    let dataset = Dataset::from_batches([batch(columns)]).expect("dataset");
    let dir = tempfile::tempdir().expect("folder");
    let folder = dir.path().join("out");
    dataset.write_parquet(&folder, by(["small", "flag", "day", "word"])).expect("write");
    let path = "small=-1/flag=true/day=2022-01-08/word=x/part-00000.parquet";
    assert!(folder.join(path).is_file());
    let again = rows(&read(&folder).sort(["id"]).expect("sort"));
    let one = |column: &str| self::column(&again, column);
    assert_eq!(one("small"), [Some("-1".to_owned()), None]);
    assert_eq!(again.column_by_name("small").expect("small").data_type(), &DataType::Int64);
    assert_eq!(one("day"), ["2022-01-08", "2022-01-09"].map(|day| Some(day.to_owned())));
    assert_eq!(one("word"), ["x", "y"].map(|word| Some(word.to_owned())));
}

#[test]
fn columns_that_name_no_folder_are_refused() {
    let floats: ArrayRef = Arc::new(Float64Array::from(vec![0.5]));
    let ids: ArrayRef = Arc::new(Int64Array::from(vec![1]));
    let lists = crate::lists(1, vec![1]);
    let dataset = Dataset::from_batches([batch([("id", ids), ("x", floats), ("list", lists)])]);
    let dataset = dataset.expect("dataset");
    let dir = tempfile::tempdir().expect("folder");
    let write = |columns: &[&str]| {
        let options = WriteOptions::default().with_partition_by(columns.iter().copied());
        failure(dataset.write_parquet(dir.path().join("out"), options))
    };
    assert!(matches!(write(&["y"]), Error::NoSuchColumn { column, .. } if column == "y"));
    assert!(matches!(write(&["x"]), Error::ColumnType { column, .. } if column == "x"));
    assert!(matches!(write(&["list"]), Error::ColumnType { column, .. } if column == "list"));
    assert!(matches!(write(&["id", "id"]), Error::ColumnTwice { column } if column == "id"));
    let one = dataset.select(["id"]).expect("select");
    let all = failure(one.write_parquet(dir.path().join("out"), by(["id"])));
    assert!(matches!(all, Error::InvalidOption { option: "partition_by", .. }), "{all}");
    // A CSV file may have the rest.
    dataset
        .select(["id", "x"])
        .and_then(|d| d.write_csv(dir.path().join("out"), by(["id"])))
        .expect("write");
    assert_eq!(fs::read_dir(dir.path()).expect("list").count(), 1);
}

#[test]
fn files_of_a_folder_are_numbered_and_cut() {
    let dir = tempfile::tempdir().expect("folder");
    let folder = dir.path().join("out");
    let options = by(["year"]).with_rows_per_file(10);
    let written = visits().write_parquet(&folder, options.clone()).expect("write");
    assert!(written.files.iter().all(|file| (1..=10).contains(&file.rows)), "{written:?}");
    for file in &written.files {
        assert!(folder.join(&file.name).is_file(), "{file:?}");
    }
    let of_2021 = read(&folder).filter("year = 2021").expect("filter");
    assert_eq!(ids(&of_2021), Vec::from_iter((0..100).filter(|id| id % 3 == 1)));
    // Again, over what is there.
    visits().write_parquet(&folder, options.with_overwrite(true)).expect("overwrite");
    assert_eq!(read(&folder).count().expect("count"), 100);
}

#[test]
fn no_rows_have_all_columns() {
    let dir = tempfile::tempdir().expect("folder");
    let folder = dir.path().join("out");
    let none = visits().filter("id < 0").expect("filter");
    let written = none.write_parquet(&folder, by(["year"])).expect("write");
    assert_eq!((written.files.len(), written.rows()), (1, 0));
    let again = rows(&read(&folder));
    assert_eq!((again.num_rows(), again.num_columns()), (0, 3));
}

/// Files with one column, in folders.
fn tree(files: &[&str]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("folder");
    for (at, path) in files.iter().enumerate() {
        let path = dir.path().join(path);
        fs::create_dir_all(path.parent().expect("parent")).expect("folder");
        fs::write(path, format!("id\n{at}\n")).expect("write");
    }
    dir
}

fn csv(pattern: &Path) -> Result<Dataset> {
    Dataset::read_csv(text(pattern), CsvOptions::default())
}

#[test]
fn patterns_give_the_columns_that_they_leave_open() {
    let dir = tree(&["y=1/m=01/a.csv", "y=1/m=x/a.csv", "y=2/m=03/b.csv"]);
    let names = |pattern: &str| {
        let schema = csv(&dir.path().join(pattern)).and_then(|d| d.schema()).expect("schema");
        schema.fields().iter().map(|field| field.name().clone()).collect::<Vec<_>>()
    };
    assert_eq!(names(""), ["id", "y", "m"]);
    assert_eq!(names("**/*.csv"), ["id", "y", "m"]);
    assert_eq!(names("y=*/m=*/*.csv"), ["id", "y", "m"]);
    assert_eq!(names("y=1/**/*.csv"), ["id", "m"]);
    assert_eq!(names("y=1"), ["id", "m"]);
    assert_eq!(names("y=1/m=01"), ["id"]);
    assert_eq!(names("y=1/m=01/a.csv"), ["id"]);
    assert_eq!(names("y=1/m=01/*.csv"), ["id"]);
    let months = |pattern: &str| column(&rows(&csv(&dir.path().join(pattern)).expect("read")), "m");
    assert_eq!(months("y=1"), ["01", "x"].map(|month| Some(month.to_owned())));
    assert_eq!(months("*/m=0*/*.csv"), ["1", "3"].map(|month| Some(month.to_owned())));
    let any = Dataset::read(text(&dir.path().join("**/*.csv"))).expect("read");
    assert_eq!(any.filter("y = 2").map(|d| ids(&d)).expect("filter"), [2]);
}

#[test]
fn folders_that_differ_are_named() {
    for (files, names) in [
        (["y=1/a.csv", "y=2/m=3/b.csv"], "y=2/m=3/b.csv lies in folders for the columns [y, m]"),
        (["y=1/a.csv", "z=2/b.csv"], "z=2/b.csv lies in folders for the columns [z], expected [y]"),
        (["a.csv", "y=1/b.csv"], "b.csv lies in folders for the columns [y], expected []"),
    ] {
        let error = failure(csv(tree(&files).path()));
        assert!(matches!(error, Error::FoldersDiffer { .. }), "{error}");
        assert!(error.to_string().contains(names), "{error}");
    }
    let twice = failure(csv(tree(&["y=1/y=2/a.csv"]).path()));
    assert!(matches!(twice, Error::ColumnTwice { column } if column == "y"));
    // Another order is the same columns; unfinished and hidden files are no data.
    let dir = tree(&["y=1/z=2/a.csv", "z=4/y=3/b.csv", "_temporary/y=5/c.csv", ".y=5/d.csv"]);
    let both = rows(&csv(dir.path()).expect("read"));
    assert_eq!(column(&both, "y"), ["1", "3"].map(|y| Some(y.to_owned())));
}

#[test]
fn a_column_of_the_files_is_the_file_s() {
    let dir = tree(&["id=7/a.csv", "id=8/b.csv"]);
    let both = csv(dir.path()).expect("read");
    assert_eq!(ids(&both), [0, 1]);
    assert_eq!(both.schema().expect("schema").fields().len(), 1);
}

/// Without looking into the files, which are none any more.
#[test]
fn filters_on_folders_read_no_other_files() {
    let dir = tempfile::tempdir().expect("folder");
    let folder = dir.path().join("out");
    visits().write_parquet(&folder, by(["year"])).expect("write");
    let dataset = read(&folder);
    fs::remove_dir_all(folder.join("year=2020")).expect("remove");
    let later = dataset.filter("year > 2020 AND id < 9").expect("filter");
    assert_eq!(ids(&later), [1, 4, 7, 2, 5, 8]);
    assert_eq!(later.count().expect("count"), 6);
    let sum = dataset.sql("SELECT count(*) AS id FROM dataset WHERE year + 1 IN (2022)");
    assert_eq!(ids(&sum.expect("sql")), [33]);
    // A split goes by where a row is, of whatever is read.
    let (train, test) = later.train_test_split(0.5, 3).expect("split");
    assert_eq!(train.count().expect("count") + test.count().expect("count"), 6);
    let tables = [("visits", dataset.clone())];
    let rows = mobula_data::query("SELECT id FROM visits WHERE year = 2022 LIMIT 2", tables);
    assert_eq!(rows.expect("query").num_rows(), 2);
    assert!(message(dataset.collect()).contains("year=2020"));
}

#[test]
fn columns_of_folders_alone_read_no_values() {
    let dir = tempfile::tempdir().expect("folder");
    let folder = dir.path().join("out");
    visits().write_parquet(&folder, by(["year"])).expect("write");
    // The pages of the only file of a year; its footer stays.
    let path = folder.join("year=2020/part-00000.parquet");
    let (mut bytes, modified) =
        (fs::read(&path).expect("read"), fs::metadata(&path).expect("file"));
    bytes[4..40].fill(0xff);
    fs::write(&path, bytes).expect("write");
    let file = fs::File::options().append(true).open(&path).expect("open");
    file.set_modified(modified.modified().expect("time")).expect("time");
    let years = read(&folder).select(["year"]).expect("select");
    assert_eq!(rows(&years).num_rows(), 100);
    assert!(message(read(&folder).collect()).contains("year=2020"));
}

#[test]
fn partitioned_datasets_travel_and_stream() {
    let dir = tempfile::tempdir().expect("folder");
    let folder = dir.path().join("out");
    visits().write_parquet(&folder, by(["year"])).expect("write");
    let dataset = read(&folder);
    let json = serde_json::to_string(&dataset).expect("JSON");
    let travelled: Dataset = serde_json::from_str(&json).expect("JSON");
    assert_eq!(rows(&travelled), rows(&dataset));
    assert!(dataset.explain().expect("explain").contains("in folders by year"));
    let options = || StreamOptions::unlabelled(["year", "id"]).with_batch_size(100);
    let state = |folder: &Path| {
        use mobula_core::{BatchSource, Shard};
        let source = read(folder).stream(options()).expect("stream");
        source.open(Shard::ALL).expect("open").state().manifest
    };
    let first = state(&folder);
    assert_eq!(state(&folder), first);
    fs::rename(folder.join("year=2022"), folder.join("year=2023")).expect("rename");
    assert_ne!(state(&folder), first);
}

/// The files may differ in what else they have.
#[test]
fn unified_files_have_folders_too() {
    let dir = tempfile::tempdir().expect("folder");
    let folder = dir.path().join("out");
    let first = visits().filter("year = 2020").expect("filter");
    first.write_parquet(&folder, by(["year"])).expect("write");
    let second =
        visits().filter("year = 2021").and_then(|d| d.drop_columns(["city"])).expect("filter");
    second.write_parquet(dir.path().join("other"), by(["year"])).expect("write");
    fs::rename(dir.path().join("other/year=2021"), folder.join("year=2021")).expect("move");
    assert!(message(Dataset::read_parquet(text(&folder))).contains("year=2021"));
    let options = ParquetOptions::default().with_unify(true);
    let both = rows(&Dataset::read_parquet_with(text(&folder), options).expect("read"));
    assert_eq!(
        (both.num_rows(), both.column_by_name("city").expect("city").null_count()),
        (67, 42)
    );
}
