//! SQLite databases, as files that another program has written.

use crate::{failure, message};
use arrow::array::{Array, AsArray, RecordBatch};
use arrow::datatypes::{DataType, Int64Type};
use arrow::util::display::array_value_to_string;
use mobula_core::{BatchSource, BoxError, Shard};
use mobula_data::{BatchFn, Dataset, Error, IfExists, StorageLevel, StreamOptions, TensorSource};
use rusqlite::Connection;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// A database in which `sql` was run.
struct Database {
    folder: TempDir,
    connection: Connection,
}

impl Database {
    fn new(sql: &str) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let connection = Connection::open(folder.path().join("birds.db")).expect("a database");
        connection.execute_batch(sql).expect(sql);
        Self { folder, connection }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("birds.db")
    }

    fn run(&self, sql: &str) {
        self.connection.execute_batch(sql).expect(sql);
    }

    fn read(&self, query: &str) -> mobula_data::Result<Dataset> {
        Dataset::read_sqlite(self.path(), query)
    }

    fn rows(&self, query: &str) -> RecordBatch {
        self.read(query).and_then(|dataset| dataset.collect()).expect(query)
    }
}

fn numbers(rows: i64) -> Database {
    Database::new(&format!(
        "CREATE TABLE numbers (id INTEGER, x REAL, t TEXT);
         WITH RECURSIVE i(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM i WHERE i < {rows})
         INSERT INTO numbers SELECT i, i * 0.5, 'row ' || i FROM i;"
    ))
}

#[test]
fn columns_have_the_types_of_their_declaration_or_of_their_values() {
    // Declaration, value, type, and how it prints.
    let cases = [
        ("BOOLEAN", "1", DataType::Boolean, "true"),
        ("INTEGER", "-9223372036854775808", DataType::Int64, "-9223372036854775808"),
        ("VARCHAR(9)", "'ä ''9'''", DataType::Utf8, "ä '9'"),
        ("TEXT", "12", DataType::Utf8, "12"),
        ("BLOB", "x'00ff'", DataType::Binary, "00ff"),
        ("DOUBLE PRECISION", "7", DataType::Float64, "7.0"),
        ("FLOAT", "-9e999", DataType::Float64, "-inf"),
        ("DECIMAL(10, 2)", "1.25", DataType::Float64, "1.25"),
        ("DECIMAL(10, 2)", "1", DataType::Int64, "1"),
        ("DATE", "'2000-01-01'", DataType::Utf8, "2000-01-01"),
        ("", "x'07'", DataType::Binary, "07"),
        ("", "2.5", DataType::Float64, "2.5"),
        ("", "NULL", DataType::Null, ""),
    ];
    let columns: Vec<_> =
        cases.iter().enumerate().map(|(at, (of, ..))| format!("c{at} {of}")).collect();
    let values: Vec<_> = cases.iter().map(|(_, value, ..)| *value).collect();
    let (columns, values) = (columns.join(", "), values.join(", "));
    let database = Database::new(&format!(
        "CREATE TABLE types ({columns}); INSERT INTO types DEFAULT VALUES; \
         INSERT INTO types VALUES ({values}); INSERT INTO types DEFAULT VALUES;"
    ));
    let rows = database.rows("SELECT * FROM types");
    assert_eq!(rows.num_rows(), 3);
    for (at, (of, value, expected, shown)) in cases.iter().enumerate() {
        let column = rows.column(at);
        assert_eq!(column.data_type(), expected, "{of} {value}");
        assert_eq!(array_value_to_string(column, 1).expect("text"), *shown, "{of} {value}");
        assert!(column.is_null(0) || *expected == DataType::Null, "{of} {value}");
    }
    let mixed = database.rows("SELECT column1 AS x FROM (VALUES (1), (2.5), (NULL))");
    assert_eq!(mixed.column(0).data_type(), &DataType::Float64);
    assert_eq!(mixed.column(0).null_count(), 1);
    assert_eq!(database.rows("SELECT * FROM types WHERE false").num_rows(), 0);
}

#[test]
fn values_that_do_not_fit_are_named() {
    let database = numbers(3000);
    database.run("UPDATE numbers SET id = 'many' WHERE id = 2000");
    for (query, says) in [
        (
            "SELECT id FROM numbers",
            "column \"id\" has the text \"many\" in row 2000, expected an integer",
        ),
        ("SELECT x, id AS n FROM numbers WHERE id > 1999", "column \"n\" has the text"),
        (
            "SELECT CASE id WHEN 7 THEN x'00' ELSE 1 END AS b FROM numbers",
            "column \"b\" has a blob of 1 bytes in row 7",
        ),
        (
            "SELECT 9007199254740993 AS x UNION ALL SELECT 0.5",
            "the integer 9007199254740993 in row 1, expected a float",
        ),
        ("SELECT CAST(x'ff' AS TEXT) AS t", "text that is not UTF-8"),
    ] {
        let text = message(database.read(query).and_then(|d| d.collect()));
        assert!(text.contains(says), "{text}");
        assert!(text.contains("CAST(column AS TEXT)"), "{text}");
    }
    let cast = database.rows("SELECT CAST(id AS TEXT) AS id FROM numbers");
    assert_eq!(cast.column(0).as_string::<i32>().value(1999), "many");
    database.run("CREATE TABLE flags (b BOOLEAN); INSERT INTO flags VALUES (0), (2)");
    let text = message(database.read("SELECT b FROM flags").and_then(|d| d.collect()));
    assert!(text.contains("the integer 2 in row 2, expected a boolean, 0 or 1"), "{text}");
}

#[test]
fn queries_that_fail_say_where() {
    let database = numbers(3);
    for (query, says) in [
        ("SELEC 1", "birds.db, on \"SELEC 1\" (line 1, column 1): near \"SELEC\": syntax error"),
        ("SELECT id,\n  bird FROM numbers", "(line 2, column 3): no such column: bird"),
        ("SELECT * FROM birds", "no such table: birds"),
        ("SELECT ?", "parameters such as ?"),
        ("SELECT 1; SELECT 2", "Multiple statements"),
        ("DELETE FROM numbers", "gives no columns"),
        ("SELECT id, x AS id FROM numbers", "two columns \"id\""),
        ("DELETE FROM numbers RETURNING id", "readonly"),
    ] {
        let text = message(database.read(query).and_then(|d| d.collect()));
        assert!(text.contains(says), "{text}");
    }
    assert_eq!(database.rows("SELECT * FROM numbers").num_rows(), 3);
    let absent = Dataset::read_sqlite(database.path().with_extension("sqlite"), "SELECT 1");
    assert!(matches!(failure(absent), Error::NoFiles { .. }));
    let text = database.folder.path().join("text.db");
    std::fs::write(&text, "no database".repeat(100)).expect("write");
    assert!(matches!(
        failure(Dataset::read_sqlite(text, "SELECT 1 FROM t")),
        Error::Corrupt { .. }
    ));
}

fn stream(dataset: &Dataset) -> TensorSource {
    let options = StreamOptions::unlabelled(["id", "x"]).with_batch_size(64).with_shuffle(3);
    dataset.stream(options).expect("a stream")
}

/// The ids of an epoch, in order.
fn epoch(source: &TensorSource) -> Result<Vec<f32>, mobula_core::Error> {
    let (mut stream, mut ids) = (source.open(Shard::ALL)?, Vec::new());
    while let Some(batch) = stream.next_batch()? {
        ids.extend(batch.get("id")?.to_vec1::<f32>().expect("floats"));
    }
    Ok(ids)
}

/// As another process has it.
fn sent<T: serde::Serialize + serde::de::DeserializeOwned>(of: &T) -> T {
    rmp_serde::from_slice(&rmp_serde::to_vec_named(of).expect("MessagePack")).expect("MessagePack")
}

#[test]
fn rows_are_streamed_and_the_same_in_every_process() {
    let database = numbers(100_000);
    let dataset = database.read("SELECT * FROM numbers").expect("a dataset");
    let source = stream(&dataset);
    let ids = epoch(&source).expect("an epoch");
    let mut sorted = ids.clone();
    sorted.sort_unstable_by(f32::total_cmp);
    assert!(sorted.iter().copied().eq((1..=100_000).map(|id| id as f32)));
    assert_eq!(epoch(&sent(&source)).expect("an epoch"), ids);
    assert!(dataset.explain().expect("explain").contains("SELECT * FROM numbers of /"));

    let kept = dataset.persist(StorageLevel::Disk).expect("kept");
    let sum = dataset.sql("SELECT sum(id) AS id FROM dataset").and_then(|d| d.collect());
    assert_eq!(sum.expect("sum").column(0).as_primitive::<Int64Type>().value(0), 5_000_050_000);
    database.run("UPDATE numbers SET x = 0 WHERE id = 77777");
    let text = message(epoch(&sent(&source)));
    assert!(text.contains("manifest"), "{text}");
    assert_eq!(epoch(&sent(&stream(&kept))).expect("an epoch"), ids);
    database.run("ALTER TABLE numbers RENAME COLUMN t TO text");
    let text = message(epoch(&sent(&source)));
    assert!(text.contains("[id: Int64, x: Float64, text: Utf8] now"), "{text}");
}

fn fails_late(batch: &RecordBatch) -> Result<RecordBatch, BoxError> {
    match has(batch, 50_000) {
        true => Err("no such luck".into()),
        false => Ok(batch.clone()),
    }
}

/// Says when it has the block with row 50,000, and never gives it.
fn stops_late(batch: &RecordBatch) -> Result<RecordBatch, BoxError> {
    if has(batch, 50_000) {
        std::fs::write(PathBuf::from(std::env::var(WRITE)?).with_extension("stopped"), "")?;
        loop {
            std::thread::park();
        }
    }
    Ok(batch.clone())
}

fn has(batch: &RecordBatch, id: i64) -> bool {
    batch.column(0).as_primitive::<Int64Type>().values().contains(&id)
}

mobula_data::inventory::submit! { BatchFn::new("sqlite_fails_late", fails_late) }
mobula_data::inventory::submit! { BatchFn::new("sqlite_stops_late", stops_late) }

#[test]
fn tables_are_written_kept_extended_or_replaced() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("new.db");
    let rows = |count| Dataset::range(count).expect("rows");
    let ids = || {
        let ids = Dataset::read_sqlite(&path, "SELECT id FROM \"all ids\"");
        crate::ids(&ids.expect("a dataset"))
    };
    assert_eq!(rows(3).write_sqlite(&path, "all ids", IfExists::Fail).expect("writes"), 3);
    let exists = failure(rows(5).write_sqlite(&path, "All IDs", IfExists::Fail));
    assert!(matches!(exists, Error::TableExists { .. }), "{exists}");
    assert_eq!(rows(2).write_sqlite(&path, "all ids", IfExists::Append).expect("appends"), 2);
    assert_eq!(ids(), [0, 1, 2, 0, 1]);
    let other = rows(1).rename("id", "number").expect("rename");
    let text = message(other.write_sqlite(&path, "all ids", IfExists::Append));
    assert!(text.contains("no column named number"), "{text}");
    rows(1).write_sqlite(&path, "all ids", IfExists::Replace).expect("replaces");
    assert_eq!(ids(), [0]);
    let absent = folder.path().join("absent").join("new.db");
    let text = message(rows(1).write_sqlite(absent, "ids", IfExists::Fail));
    assert!(text.contains("unable to open database file"), "{text}");
}

#[test]
fn what_is_written_is_read_back() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("new.db");
    let rows = Dataset::range(100_000)
        .and_then(|d| d.with_column("x", "CASE WHEN id % 7 <> 0 THEN id * 0.5 END"))
        .and_then(|d| d.with_column("t", "concat('row ', CAST(id AS VARCHAR))"))
        .and_then(|d| d.with_column("even", "id % 2 = 0"))
        .and_then(|d| d.with_column("bytes", "CAST(concat('b', CAST(id AS VARCHAR)) AS BYTEA)"))
        .expect("rows");
    assert_eq!(rows.write_sqlite(&path, "rows", IfExists::Fail).expect("writes"), 100_000);
    let back = Dataset::read_sqlite(&path, "SELECT * FROM rows").and_then(|d| d.collect());
    let (back, there) = (back.expect("rows"), rows.collect().expect("rows"));
    assert_eq!(back.columns(), there.columns());

    let query = "SELECT CAST(1.25 AS DECIMAL(5, 2)) AS d, CAST('2000-12-31' AS DATE) AS day, \
                 CAST('2000-12-31T23:59:59' AS TIMESTAMP) AS time FROM dataset LIMIT 1";
    let others = rows.sql(query).expect("rows");
    others.write_sqlite(&path, "others", IfExists::Fail).expect("writes");
    let back = Dataset::read_sqlite(&path, "SELECT * FROM others").and_then(|d| d.collect());
    let shown = |at: usize| array_value_to_string(back.as_ref().expect("rows").column(at), 0);
    let shown = [0, 1, 2].map(|at| shown(at).expect("text"));
    assert_eq!(shown, ["1.25", "2000-12-31", "2000-12-31T23:59:59"]);

    for (column, says) in [
        ("CAST('NaN' AS DOUBLE) AS x", "column \"x\" has NaN in row 1"),
        ("CAST(18446744073709551615 AS BIGINT UNSIGNED) AS x", "has 18446744073709551615 in row 1"),
        ("make_array(1) AS x", "column \"x\" is List(Int64)"),
    ] {
        let rows = rows.sql(format!("SELECT {column} FROM dataset LIMIT 1")).expect("rows");
        let text = message(rows.write_sqlite(&path, "bad", IfExists::Fail));
        assert!(text.contains(says), "{text}");
        let text = message(Dataset::read_sqlite(&path, "SELECT * FROM bad"));
        assert!(text.contains("no such table"), "{text}");
    }
}

/// Tells a process of these tests what to write and never end.
const WRITE: &str = "MOBULA_TEST_SQLITE";

/// What the process is that gets killed; otherwise nothing.
#[test]
fn writes_for_ever_if_told_to() {
    let Ok(path) = std::env::var(WRITE) else { return };
    // More than SQLite keeps in memory, so that a part is in the file.
    let rows = Dataset::range(100_000).and_then(|d| d.with_column("t", "repeat('wide', 100)"));
    let rows = rows.and_then(|d| d.map_batches("sqlite_stops_late"));
    rows.and_then(|rows| rows.write_sqlite(path, "numbers", IfExists::Replace)).expect("no end");
}

#[test]
fn a_write_that_fails_or_is_killed_leaves_what_was() {
    let database = numbers(7);
    let count = || database.rows("SELECT * FROM numbers").num_rows();
    let rows = Dataset::range(100_000).and_then(|d| d.map_batches("sqlite_fails_late"));
    let rows = rows.expect("rows");
    for (table, if_exists) in [("new", IfExists::Fail), ("numbers", IfExists::Replace)] {
        let text = message(rows.write_sqlite(database.path(), table, if_exists));
        assert!(text.contains("no such luck"), "{text}");
    }
    assert_eq!(count(), 7);
    assert!(message(database.read("SELECT * FROM new")).contains("no such table"));

    let mut child = Command::new(std::env::current_exe().expect("this program"));
    child.args(["--exact", "sqlite::writes_for_ever_if_told_to"]).env(WRITE, database.path());
    let mut child = child.stdout(Stdio::null()).spawn().expect("starts");
    let (stopped, end) =
        (database.path().with_extension("stopped"), Instant::now() + Duration::from_secs(60));
    while !stopped.exists() && Instant::now() < end {
        std::thread::park_timeout(Duration::from_millis(10));
    }
    // It holds the database, and has written to it.
    let other = Dataset::range(1).expect("rows");
    child.kill().and_then(|()| child.wait()).expect("killed");
    assert!(stopped.exists(), "it came as far");
    assert_eq!(count(), 7);
    other.write_sqlite(database.path(), "other", IfExists::Fail).expect("nobody holds it");
}
