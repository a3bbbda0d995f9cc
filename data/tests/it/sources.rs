//! Files: whole, damaged, missing.

use crate::{batch, digits, example, ids, message};
use arrow::array::{Array, ArrayRef, AsArray, Float32Array, Int32Array, Int64Array, StringArray};
use arrow::datatypes::{DataType, Float64Type, UInt8Type};
use flate2::Compression;
use flate2::write::GzEncoder;
use mobula_data::{CsvOptions, Dataset, ParquetOptions, query};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

#[test]
fn parquet_rows_come_in_the_files_order() {
    let digits = digits();
    assert_eq!(digits.count().expect("count"), 1797);
    let head = digits.head(12).expect("head");
    let labels = head.column(1).as_primitive::<UInt8Type>().values();
    assert_eq!(labels[..], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]);
    let first = head.column(0).as_fixed_size_list().value(0);
    assert_eq!(first.as_primitive::<UInt8Type>().values()[..8], [0, 0, 5, 13, 9, 1, 0, 0]);
    let folder = Dataset::read_parquet(example("")).expect("a folder");
    assert_eq!(folder.count().expect("count"), 1797);
}

#[test]
fn missing_files_are_named() {
    let text = message(Dataset::read_parquet("no/such/part-*.parquet"));
    assert!(text.contains("no/such/part-*.parquet") && text.starts_with("no file matches /"));
    assert!(message(Dataset::read_csv("absent.csv", CsvOptions::default())).contains("absent.csv"));
    assert!(message(Dataset::read_idx("absent.gz", "absent.gz")).contains("absent.gz"));
    assert!(message(Dataset::read_parquet("a/[")).contains("wildcards"));
}

#[test]
fn damaged_parquet_is_named() {
    let dir = tempfile::tempdir().expect("folder");
    let whole = fs::read(example("digits-0.parquet")).expect("read");
    let path = dir.path().join("cut.parquet");
    for half in [&whole[..whole.len() / 2], b"PAR1", b""] {
        fs::write(&path, half).expect("write");
        let text = message(Dataset::read_parquet(path.to_str().expect("UTF-8")));
        assert!(text.contains("cut.parquet is not a valid Parquet file"), "{text}");
    }
    // A damaged page is found when it is read, by every way of reading.
    let mut bytes = whole.clone();
    bytes[4..2000].fill(0xff);
    fs::write(&path, bytes).expect("write");
    let dataset = Dataset::read_parquet(path.to_str().expect("UTF-8")).expect("a good footer");
    for text in
        [message(dataset.collect()), message(dataset.sort(["label"]).and_then(|d| d.collect()))]
    {
        assert!(text.contains("cut.parquet is not a valid Parquet file"), "{text}");
    }
}

#[test]
fn files_of_other_columns_are_refused() {
    let dir = tempfile::tempdir().expect("folder");
    fs::copy(example("digits-0.parquet"), dir.path().join("a.parquet")).expect("copy");
    let other = digits().select(["label"]).and_then(|d| d.head(3)).expect("rows");
    write_parquet(&dir.path().join("b.parquet"), &other);
    let text = message(Dataset::read_parquet(dir.path().to_str().expect("UTF-8")));
    assert!(text.contains("b.parquet has the columns [label: UInt8], expected [image"), "{text}");
}

#[test]
fn files_of_other_columns_are_unified_if_asked() {
    let dir = tempfile::tempdir().expect("folder");
    let text = |values: &[&str]| Arc::new(StringArray::from(values.to_vec())) as ArrayRef;
    let a = batch([
        ("id", Arc::new(Int32Array::from(vec![1, 2])) as ArrayRef),
        ("a", text(&["x", "y"])),
    ]);
    let b =
        batch([("b", text(&["z"])), ("id", Arc::new(Float32Array::from(vec![2.5])) as ArrayRef)]);
    write_parquet(&dir.path().join("a.parquet"), &a);
    write_parquet(&dir.path().join("b.parquet"), &b);
    let folder = dir.path().to_str().expect("UTF-8");
    let options = ParquetOptions::default().with_unify(true);
    let both = Dataset::read_parquet_with(folder, options).expect("dataset");
    let rows = |d: &Dataset| mobula_data::rows::text(&d.collect().expect("rows")).expect("text");
    let expected = [["1.0", "x", "null"], ["2.0", "y", "null"], ["2.5", "null", "z"]];
    assert_eq!(rows(&both), expected.map(|row| row.map(str::to_owned)));
    let b = both.select(["b"]).expect("select");
    assert_eq!(rows(&b), [["null"], ["null"], ["z"]].map(|row| row.map(str::to_owned)));
    assert_eq!(
        rows(&both.sql("SELECT sum(id), count(a) FROM dataset").expect("sql")),
        [["5.5", "2"]]
    );
    assert_eq!(both.count().expect("count"), 3);
    let sent: Dataset =
        serde_json::from_str(&serde_json::to_string(&both).expect("JSON")).expect("JSON");
    assert_eq!(rows(&sent), rows(&both));

    let c = batch([("id", text(&["three"]))]);
    write_parquet(&dir.path().join("c.parquet"), &c);
    let text = message(Dataset::read_parquet_with(folder, options));
    assert!(text.contains("c.parquet has the columns [id: Utf8], expected [id: Float64"), "{text}");
}

#[test]
fn corrupt_row_groups_are_left_out_if_asked() {
    let dir = tempfile::tempdir().expect("folder");
    let mut bytes = fs::read(example("digits-0.parquet")).expect("read");
    bytes[4..2000].fill(0xff);
    fs::write(dir.path().join("a.parquet"), bytes).expect("write");
    fs::copy(example("digits-1.parquet"), dir.path().join("b.parquet")).expect("copy");
    let folder = dir.path().to_str().expect("UTF-8");
    let text = message(Dataset::read_parquet(folder).and_then(|d| d.collect()));
    assert!(text.contains("a.parquet is not a valid Parquet file"), "{text}");
    let options = ParquetOptions::default().with_skip_corrupt(true);
    let left = Dataset::read_parquet_with(folder, options).expect("dataset");
    let all = Dataset::read_parquet(folder).and_then(|d| d.count()).expect("count");
    assert_eq!(left.count().expect("count"), all - 120);
    assert_eq!(left.collect().expect("rows").num_rows() as u64, all - 120);
    assert!(left.explain().expect("explain").contains("1 corrupt row groups left out"));
    let sent: Dataset =
        serde_json::from_str(&serde_json::to_string(&left).expect("JSON")).expect("JSON");
    assert_eq!(sent.count().expect("count"), all - 120);
}

fn write_parquet(path: &Path, rows: &arrow::record_batch::RecordBatch) {
    use datafusion::parquet::arrow::ArrowWriter;
    let file = fs::File::create(path).expect("create");
    let mut writer = ArrowWriter::try_new(file, rows.schema(), None).expect("writer");
    writer.write(rows).expect("write");
    writer.close().expect("close");
}

#[test]
fn a_query_without_order_has_that_of_the_files() {
    let dir = tempfile::tempdir().expect("folder");
    for id in 0..400_i64 {
        // By name `2-` comes before `2/`, as a path after.
        let folder = dir.path().join(format!("{}{}", id / 8, if id % 8 < 4 { "" } else { "-" }));
        fs::create_dir_all(&folder).expect("folder");
        let path = folder.join(format!("{id}.parquet"));
        write_parquet(&path, &batch([("id", Arc::new(Int64Array::from(vec![id])) as _)]));
    }
    let files = dir.path().join("*/*.parquet");
    let files = Dataset::read_parquet(files.to_str().expect("UTF-8")).expect("dataset");
    let expected = ids(&files);
    for rows in [1, 7, 400] {
        let few = query(&format!("SELECT id FROM t LIMIT {rows}"), [("t", files.clone())]);
        let few = Dataset::from_batches([few.expect("query")]).expect("dataset");
        assert_eq!(ids(&few), expected[..rows], "{rows}");
    }
}

#[test]
fn csv_has_types_and_missing_values() {
    let penguins =
        Dataset::read_csv(example("penguins.csv"), CsvOptions::default()).expect("penguins");
    let schema = penguins.schema().expect("schema");
    let types: Vec<_> = schema.fields().iter().map(|f| f.data_type().clone()).collect();
    use DataType::{Float64, Int64, Utf8};
    assert_eq!(types, [Utf8, Utf8, Float64, Float64, Int64, Int64, Utf8, Int64]);
    let rows = penguins.collect().expect("collect");
    let nulls: usize = rows.columns().iter().map(|column| column.null_count()).sum();
    assert_eq!((rows.num_rows(), nulls), (344, 19));

    let heaviest = penguins
        .sql(
            "SELECT species, avg(body_mass_g) AS mass, count(*) AS n FROM dataset \
             WHERE sex = 'male' GROUP BY species ORDER BY mass DESC",
        )
        .and_then(|d| d.collect())
        .expect("query");
    assert_eq!(heaviest.column(0).as_string::<i32>().value(0), "Gentoo");
    let mass = heaviest.column(1).as_primitive::<Float64Type>().value(0);
    assert!((mass - 5_484.836_065_573_77).abs() < 1e-9, "{mass}");
}

#[test]
fn csv_options_and_errors() {
    let dir = tempfile::tempdir().expect("folder");
    let path = dir.path().join("part.txt");
    fs::write(&path, "1;?\n2;b\n").expect("write");
    let options =
        CsvOptions::default().with_header(false).with_delimiter(b';').with_null_values(["?"]);
    let rows = Dataset::read_csv(path.to_str().expect("UTF-8"), options)
        .and_then(|d| d.collect())
        .expect("rows");
    assert_eq!(rows.column(0).data_type(), &DataType::Int64);
    assert!(rows.column(1).is_null(0) && rows.column(1).is_valid(1));

    // One file has whole numbers, the next has not: the column has floats.
    let parts = tempfile::tempdir().expect("folder");
    fs::write(parts.path().join("a.csv"), "x\n1\n").expect("write");
    fs::write(parts.path().join("b.csv"), "x\n2.5\n").expect("write");
    let parts = Dataset::read_csv(parts.path().to_str().expect("UTF-8"), CsvOptions::default());
    let rows = parts.and_then(|d| d.collect()).expect("rows");
    assert_eq!(rows.column(0).as_primitive::<Float64Type>().values()[..], [1.0, 2.5]);

    fs::write(&path, "a,b\n1,2\n3\n").expect("write");
    let text = message(Dataset::read_csv(path.to_str().expect("UTF-8"), CsvOptions::default()));
    assert!(text.contains("part.txt is not a valid CSV file"), "{text}");
}

/// An IDX file: magic, dimensions, values.
fn idx(dir: &Path, name: &str, dims: &[u32], values: &[u8]) -> PathBuf {
    let mut bytes = vec![0, 0, 8, dims.len() as u8];
    dims.iter().for_each(|dim| bytes.extend(dim.to_be_bytes()));
    bytes.extend(values);
    let path = dir.join(name);
    let mut file = GzEncoder::new(fs::File::create(&path).expect("create"), Compression::fast());
    file.write_all(&bytes).and_then(|()| file.finish().map(|_| ())).expect("write");
    path
}

#[test]
fn idx_round_trip() {
    let dir = tempfile::tempdir().expect("folder");
    let pixels: Vec<u8> = (0..5 * 6).collect();
    let images = idx(dir.path(), "images.gz", &[5, 2, 3], &pixels);
    let labels = idx(dir.path(), "labels.gz", &[5], &[3, 1, 4, 1, 5]);
    let rows = Dataset::read_idx(&images, &labels).and_then(|d| d.collect()).expect("rows");
    let image = rows.column_by_name("image").expect("image").as_fixed_size_list();
    assert_eq!(image.value_length(), 6);
    assert_eq!(image.values().as_primitive::<UInt8Type>().values()[..], pixels);
    let label = rows.column_by_name("label").expect("label").as_primitive::<UInt8Type>();
    assert_eq!(label.values()[..], [3, 1, 4, 1, 5]);
}

#[test]
fn damaged_idx_is_named() {
    let dir = tempfile::tempdir().expect("folder");
    let images = idx(dir.path(), "images.gz", &[2, 1, 1], &[1, 2]);
    let labels = idx(dir.path(), "labels.gz", &[2], &[1, 2]);
    let short = idx(dir.path(), "short.gz", &[3], &[1, 2]);
    let many = idx(dir.path(), "many.gz", &[3], &[1, 2, 3]);
    let swapped = message(Dataset::read_idx(&labels, &images));
    assert!(
        swapped.contains("labels.gz") && swapped.contains("[0, 0, 8, 1], expected [0, 0, 8, 3]")
    );
    assert!(message(Dataset::read_idx(&images, &short)).contains("short.gz is not a valid IDX"));
    assert!(message(Dataset::read_idx(&images, &many)).contains("it has 3 labels"));
    let whole = fs::read(&images).expect("read");
    fs::write(&images, &whole[..whole.len() - 9]).expect("write");
    assert!(message(Dataset::read_idx(&images, &labels)).contains("cannot be unzipped"));
}
