//! Queries over tables that are long enough to be worked on in parts.

use crate::{batch, failure, ids, message};
use arrow::array::{ArrayRef, AsArray, DictionaryArray, Float64Array, Int64Array, StringArray};
use arrow::datatypes::{Int32Type, Int64Type};
use arrow::record_batch::RecordBatch;
use datafusion::parquet::arrow::ArrowWriter;
use datafusion::parquet::file::metadata::SortingColumn;
use datafusion::parquet::file::properties::WriterProperties;
use mobula_core::BoxError;
use mobula_data::{BatchFn, Dataset, Error, JoinType, ParquetSink, WriteOptions, rows};
use std::process::Command;
use std::sync::{Arc, LazyLock};

/// Rows in blocks of `block_rows`: the numbers are of all sizes, so that their sum depends on the order.
fn table(count: i64, block_rows: u64) -> Dataset {
    let key = |row: i64| (row % 11 != 3).then_some(row * row % 97);
    let keys: ArrayRef = Arc::new((0..count).map(key).collect::<Int64Array>());
    let value = |row: i64| (row as f64 * 0.37).sin() * 10_f64.powi((row * 7 % 23) as i32 - 11);
    let values: ArrayRef =
        Arc::new((0..count).map(|row| Some(value(row))).collect::<Float64Array>());
    let text = |row: i64| (row % 7 != 2).then(|| format!("a name of some length {}", row % 31));
    let texts: ArrayRef = Arc::new((0..count).map(text).collect::<StringArray>());
    let kinds: ArrayRef = Arc::new(
        (0..count)
            .map(|row| Some(["one", "two", "three"][(row % 3) as usize]))
            .collect::<DictionaryArray<Int32Type>>(),
    );
    let ids: ArrayRef = Arc::new((0..count).map(Some).collect::<Int64Array>());
    let all = batch([("id", ids), ("k", keys), ("x", values), ("name", texts), ("kind", kinds)]);
    let cut = |at: u64| {
        all.slice(
            (at * block_rows) as usize,
            block_rows.min(count as u64 - at * block_rows) as usize,
        )
    };
    let blocks = (0..(count as u64).div_ceil(block_rows)).map(cut).collect::<Vec<RecordBatch>>();
    Dataset::from_batches(blocks).expect("a table")
}

/// Where rows come from: one block, so many that a query is done in parts, or the same in files that
/// the engine reads itself.
#[derive(Clone, Copy, Debug)]
enum Rows {
    Whole,
    Cut,
    Parquet,
}

impl Rows {
    fn of(self, count: i64, block_rows: u64) -> Dataset {
        match self {
            Self::Whole => table(count, count as u64),
            Self::Cut => table(count, block_rows),
            Self::Parquet => {
                let written = FILES.path().join(count.to_string());
                Dataset::read_parquet(written.join("*.parquet").to_str().expect("UTF-8"))
                    .expect("reads")
            }
        }
    }
}

/// Tables of these lengths as Parquet, in small row groups.
static FILES: LazyLock<tempfile::TempDir> = LazyLock::new(|| {
    let folder = tempfile::tempdir().expect("a folder");
    for (count, group) in [(1500, 10), (400, 3)] {
        let options = WriteOptions::default().with_rows_per_file(count as u64 / 10);
        let sink = ParquetSink::default().with_row_group_rows(group);
        table(count, 100)
            .write(folder.path().join(count.to_string()), sink, options)
            .expect("writes");
    }
    folder
});

fn ask(sql: &str, rows: Rows) -> mobula_data::Result<RecordBatch> {
    let (t, u) = (rows.of(1500, 3), rows.of(400, 2));
    // What is done to rows before goes by other ways.
    let v = u.filter("id % 5 <> 1")?;
    // A table of one part beside those of several.
    let w = table(50, 50);
    t.sql_with(sql, [("t", &t), ("u", &u), ("v", &v), ("w", &w)])?.collect()
}

fn lines(rows: &RecordBatch) -> Vec<String> {
    let row = |row: Vec<String>| row.join(" | ");
    rows::text(rows).expect("text").into_iter().map(row).collect()
}

/// One for each kind of operator that the engine has, and some that go together.
const QUERIES: &[&str] = &[
    "SELECT k, count(*), min(x), max(name) FROM t GROUP BY k",
    "SELECT name, kind, count(x) FROM t GROUP BY name, kind",
    "SELECT DISTINCT kind FROM t",
    "SELECT k, count(DISTINCT name) FROM t GROUP BY k",
    "SELECT k, count(*) FROM t GROUP BY ROLLUP (k, kind)",
    "SELECT k, array_agg(id ORDER BY id) FROM t GROUP BY k",
    "SELECT count(*), min(id), max(x) FROM t",
    "SELECT t.id, u.id AS other, t.name, u.kind FROM t JOIN u ON t.k = u.k",
    "SELECT t.id, u.id AS other FROM t LEFT JOIN u ON t.id = u.id AND t.kind = u.kind",
    "SELECT t.id, u.id AS other FROM u RIGHT JOIN t ON t.name = u.name AND t.id < u.id",
    "SELECT t.id, u.id AS other FROM t FULL JOIN u ON t.id = u.id + 1000",
    "SELECT t.id, v.id AS other FROM v LEFT JOIN t ON t.id = v.k",
    "SELECT * FROM t WHERE EXISTS (SELECT 1 FROM u WHERE u.k = t.k AND u.id > 350)",
    "SELECT * FROM t WHERE NOT EXISTS (SELECT 1 FROM v WHERE v.k = t.k)",
    "SELECT id FROM t WHERE id < 5 OR EXISTS (SELECT 1 FROM u WHERE u.k = t.k AND u.id > 390)",
    "SELECT id FROM t WHERE k NOT IN (SELECT k FROM u WHERE k > 50)",
    "SELECT id FROM t WHERE k NOT IN (SELECT k FROM u)",
    "SELECT t.id, u.id AS other FROM t LEFT JOIN u ON t.id < u.id AND u.id < 7",
    "SELECT t.id, u.id AS other FROM t FULL JOIN u ON t.id + u.id = 1234 AND t.id > u.id * 5",
    "SELECT count(*), sum(t.id + w.id) FROM t, w",
    "SELECT id, kind FROM t UNION ALL SELECT id, kind FROM u",
    "SELECT k FROM t UNION SELECT k FROM u",
    "SELECT k, sum(n) FROM (SELECT k, count(*) AS n FROM t GROUP BY k UNION ALL SELECT k, count(*) FROM v GROUP BY k) GROUP BY k",
    "SELECT k FROM t INTERSECT SELECT k FROM u WHERE k > 20",
    "SELECT k FROM t EXCEPT SELECT k FROM u WHERE k > 20",
    "SELECT id, k, row_number() OVER (PARTITION BY k ORDER BY x) FROM t",
    "SELECT id, sum(id) OVER (ORDER BY id ROWS 3 PRECEDING) FROM t",
    "SELECT id, lag(id) OVER (PARTITION BY kind ORDER BY id) FROM t",
    "SELECT * FROM (SELECT id, k, rank() OVER (PARTITION BY k ORDER BY id) AS r FROM t) WHERE r <= 2",
    "SELECT id FROM t WHERE x > (SELECT avg(x) FROM u) AND id IN (SELECT max(id) FROM t GROUP BY k)",
    "SELECT u.kind, count(*) FROM (SELECT k, max(id) AS id FROM t GROUP BY k) m JOIN u ON u.id = m.id - 1200 GROUP BY u.kind",
    "WITH RECURSIVE up AS (SELECT 1 AS id UNION ALL SELECT t.id * 2 FROM up JOIN t ON t.id = up.id WHERE t.id < 1000) SELECT id FROM up",
    "SELECT w.id, m.k FROM w LEFT JOIN (SELECT k, count(*) AS n FROM t GROUP BY k) m ON w.id < m.n AND w.id < 20",
    "SELECT w.id, m.k FROM w FULL JOIN (SELECT k, max(id) AS n FROM t GROUP BY k) m ON w.id = m.n - 1450",
    "SELECT id FROM w WHERE id NOT IN (SELECT k FROM t WHERE k IS NOT NULL)",
    "SELECT id FROM w WHERE EXISTS (SELECT 1 FROM t WHERE t.id > w.id * 40)",
    "SELECT id FROM t WHERE id > 100000",
    "SELECT k, count(*) FROM t WHERE id > 100000 GROUP BY k",
];

#[test]
fn parts_have_the_rows_of_the_whole() {
    for sql in QUERIES {
        let fail = |error| panic!("{sql}\n{error}");
        let [whole, cut, files] = [Rows::Whole, Rows::Cut, Rows::Parquet].map(|rows| {
            let mut lines = lines(&ask(sql, rows).unwrap_or_else(fail));
            lines.sort();
            lines
        });
        assert_eq!(cut, whole, "{sql}");
        assert_eq!(files, whole, "{sql}");
    }
}

/// No row has the value that a filter asks for.
#[test]
fn nothing_has_no_different_values() {
    let none = "t WHERE k = 7 AND kind = 'absent'";
    for sql in [
        format!("SELECT count(DISTINCT k), count(DISTINCT kind) FROM {none}"),
        format!(
            "SELECT count(DISTINCT a.k), count(DISTINCT a.kind) FROM (SELECT * FROM {none}) a JOIN u USING (k)"
        ),
    ] {
        for rows in [Rows::Whole, Rows::Cut, Rows::Parquet] {
            assert_eq!(lines(&ask(&sql, rows).expect("rows")), ["0 | 0"], "{rows:?} {sql}");
        }
    }
    let sql = format!(
        "SELECT count(*), count(k), min(k) IS NULL AND max(kind) IS NULL AND sum(k) IS NULL FROM {none}"
    );
    for rows in [Rows::Whole, Rows::Cut, Rows::Parquet] {
        assert_eq!(lines(&ask(&sql, rows).expect("rows")), ["0 | 0 | true"], "{rows:?}");
    }
}

/// Orders that a query asks for, with rows that are the same by them; and firsts.
const ORDERED: &[&str] = &[
    "SELECT id FROM t ORDER BY x DESC",
    "SELECT kind, id FROM t ORDER BY kind, id DESC LIMIT 20 OFFSET 490",
    "SELECT k, count(*) AS n FROM t GROUP BY k ORDER BY n DESC, k LIMIT 7",
    "SELECT id FROM t LIMIT 9 OFFSET 700",
    "SELECT id FROM t WHERE kind = 'two'",
    "SELECT id FROM u UNION ALL SELECT id FROM t LIMIT 600",
    "SELECT id, x * 2 FROM v",
];

#[test]
fn parts_have_the_order_of_the_whole() {
    for sql in ORDERED {
        let of = |rows| lines(&ask(sql, rows).expect(sql));
        let whole = of(Rows::Whole);
        assert_eq!(of(Rows::Cut), whole, "{sql}");
        assert_eq!(of(Rows::Parquet), whole, "{sql}");
    }
}

/// Whatever comes in whichever order, and sums whose last digits tell of it.
const SAME: &[&str] = &[
    "SELECT sum(x), avg(x), stddev(x) FROM t",
    "SELECT k, sum(x) FROM t GROUP BY k",
    "SELECT sum(t.x * u.x) FROM t JOIN u ON t.k = u.k",
    "SELECT kind FROM t ORDER BY kind LIMIT 5",
    "SELECT id FROM t ORDER BY kind LIMIT 40",
    "SELECT id FROM t ORDER BY kind",
    "SELECT id, row_number() OVER (PARTITION BY k ORDER BY kind) FROM t",
    "SELECT k, first_value(id), array_agg(name) FROM t GROUP BY k",
    "SELECT DISTINCT k FROM t LIMIT 10",
    "SELECT id, sum(id) OVER (PARTITION BY k ORDER BY kind ROWS 3 PRECEDING) FROM t LIMIT 10",
    "SELECT id, row_number() OVER (PARTITION BY kind ORDER BY k) FROM t LIMIT 7",
    "SELECT t.id, u.id AS other FROM t JOIN u ON t.k < u.k LIMIT 12",
];

/// In the order they came, with all digits.
fn answers() -> Vec<String> {
    let all = QUERIES.iter().chain(ORDERED).chain(SAME);
    let answer = |sql, rows| format!("{sql}: {:?}", lines(&ask(sql, rows).expect(sql)));
    all.flat_map(|sql| [Rows::Cut, Rows::Parquet].map(|rows| answer(sql, rows))).collect()
}

const CHILD: &str = "MOBULA_DATA_TEST_ONE_PROCESSOR";

/// Of those that this process may use.
fn first_processor() -> String {
    let status = std::fs::read_to_string("/proc/self/status").expect("a status");
    let allowed = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    let first = allowed.expect("processors").trim().split(['-', ',']).next();
    first.expect("a processor").to_owned()
}

/// A process that may use one processor has the same rows in the same order, to the last digit.
#[test]
fn the_number_of_processors_makes_no_difference() {
    if let Some(file) = std::env::var_os(CHILD) {
        return std::fs::write(file, answers().join("\n")).expect("writes");
    }
    let file = tempfile::NamedTempFile::new().expect("a file");
    let mut child = Command::new("taskset");
    child.args(["-c", &first_processor()]).arg(std::env::current_exe().expect("a path"));
    child.args(["--exact", "parts::the_number_of_processors_makes_no_difference"]);
    let output = child.env(CHILD, file.path()).output().expect("taskset, of util-linux");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    let theirs = std::fs::read_to_string(file.path()).expect("answers");
    let ours = answers();
    assert_eq!(theirs.lines().count(), ours.len());
    for (theirs, ours) in theirs.lines().zip(&ours) {
        assert_eq!(ours, theirs);
    }
}

/// What fails in one part is the error of the query, as it is.
#[test]
fn an_error_in_a_part_is_that_of_the_query() {
    let sql = "SELECT k, sum(CAST(name AS INT)) FROM t GROUP BY k";
    let text = message(ask(sql, Rows::Cut));
    assert!(text.contains("a name of some length"), "{text}");
    let text = message(ask("SELECT t.id, u.id FROM t JOIN u USING (k)", Rows::Cut));
    assert!(text.contains("two columns \"id\""), "{text}");
    let lost = table(1500, 3).map_batches("parts_lost_last").expect("a plan");
    for sql in [
        "SELECT a.id FROM dataset a JOIN dataset b ON a.k = b.k",
        // The engine has several learn of these in a way of its own.
        "SELECT a.n, b.id FROM (SELECT k, count(*) AS n FROM dataset GROUP BY k) a, dataset b",
        "SELECT id FROM dataset WHERE id = (SELECT max(n) FROM (SELECT count(*) AS n FROM dataset GROUP BY k))",
    ] {
        let error = failure(lost.sql(sql).and_then(|rows| rows.collect()));
        assert!(matches!(error, Error::BatchFn { .. }), "{sql}\n{error:?}");
    }
}

fn lost_last(rows: &RecordBatch) -> Result<RecordBatch, BoxError> {
    let is_last = rows.column(0).as_primitive::<Int64Type>().values().contains(&1499);
    if is_last { Err("the last rows are gone".into()) } else { Ok(rows.clone()) }
}

mobula_data::inventory::submit! { BatchFn::new("parts_lost_last", lost_last) }

/// The engine reads Parquet files itself, and would not notice.
#[test]
fn a_file_that_changes_is_an_error() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("rows");
    let write = |rows: i64| {
        let options = WriteOptions::default().with_overwrite(true);
        table(rows, 100).write_parquet(&path, options).expect("writes");
    };
    write(1000);
    let rows =
        Dataset::read_parquet(path.join("*.parquet").to_str().expect("UTF-8")).expect("reads");
    let sum = rows.sql("SELECT sum(id) AS id FROM dataset").expect("a plan");
    assert_eq!(rows.count().expect("rows"), 1000);
    write(1200);
    assert!(matches!(failure(sum.collect()), Error::FileChanged { .. }));
}

/// A file under two names is read twice, one whose name the engine does not take is read, and one that
/// says that its rows are sorted is not believed.
#[test]
fn files_are_read_as_they_are() {
    let folder = tempfile::tempdir().expect("a folder");
    let ids = |rows: &str, sql: &str| {
        let rows = Dataset::read_parquet(folder.path().join(rows).to_str().expect("UTF-8"));
        ids(&rows.and_then(|rows| rows.sql(sql)).expect("a plan"))
    };
    let all = "SELECT id FROM dataset WHERE id >= 0";
    table(3, 3).write_parquet(folder.path().join("a 1%"), WriteOptions::default()).expect("writes");
    assert_eq!(ids("a 1%/*.parquet", all), [0, 1, 2]);
    let written = std::fs::read_dir(folder.path().join("a 1%")).expect("a folder");
    let written = written.map(|file| file.expect("a file").path());
    let written = written.filter(|path| path.extension().is_some_and(|of| of == "parquet"));
    let written = written.collect::<Vec<_>>().remove(0);
    for name in ["sharp#1", "a question?", "linked-1.parquet"] {
        std::fs::copy(&written, folder.path().join(name)).expect("copies");
        assert_eq!(ids(name, all), [0, 1, 2], "{name}");
    }
    let linked = |at| folder.path().join(format!("linked-{at}.parquet"));
    std::os::unix::fs::symlink(linked(1), linked(2)).expect("links");
    assert_eq!(ids("linked-*.parquet", all), [0, 1, 2, 0, 1, 2]);
    let file = std::fs::File::create(folder.path().join("sorted.parquet")).expect("a file");
    let sorting = SortingColumn { column_idx: 0, descending: false, nulls_first: false };
    let properties = WriterProperties::builder().set_sorting_columns(Some(vec![sorting])).build();
    let rows = batch([("id", Arc::new(Int64Array::from(vec![3, 1, 2])) as ArrayRef)]);
    let writer = ArrowWriter::try_new(file, rows.schema(), Some(properties));
    let mut writer = writer.expect("a writer");
    writer.write(&rows).expect("writes");
    writer.close().expect("writes");
    assert_eq!(ids("sorted.parquet", &format!("{all} ORDER BY id")), [1, 2, 3]);
}

#[test]
fn explain_shows_the_parts() {
    let t = table(1500, 3);
    t.count().expect("rows");
    let plan = t
        .sql("SELECT k, count(*) FROM dataset GROUP BY k")
        .and_then(|d| d.explain())
        .expect("a plan");
    assert!(plan.contains("HashExchangeExec: Hash([k@0], 7)"), "{plan}");
    assert!(plan.contains("InOrderExec"), "{plan}");
    // A merge reads all partitions, which are computed before, in their turn.
    let sorted = t.sql("SELECT k, count(*) AS n FROM dataset GROUP BY k ORDER BY n");
    let plan = sorted.and_then(|sorted| sorted.explain()).expect("a plan");
    let merge = plan.find("SortPreservingMergeExec").expect("a merge");
    assert!(plan[merge..].lines().nth(1).is_some_and(|below| below.contains("KeptExec")), "{plan}");
    let files = Rows::Parquet.of(1500, 3);
    files.count().expect("rows");
    let joined = files.sql("SELECT a.id FROM dataset a JOIN dataset b ON a.k = b.k AND b.x > 0");
    let plan = joined.and_then(|joined| joined.explain()).expect("a plan");
    // It would leave out rows of the other side while the engine still finds out which.
    assert!(plan.contains("HashJoinExec") && !plan.contains("DynamicFilter"), "{plan}");
}

/// Whichever is named first, and though operations of ours are done to it.
#[test]
fn joins_hold_the_side_with_fewer_rows() {
    let (many, few) = (table(1500, 3), table(100, 1).select(["k"]).expect("a plan"));
    many.count().and_then(|_| few.count()).expect("rows");
    for (one, other) in [(&many, &few), (&few, &many)] {
        let joined = one.join(other, ["k"], JoinType::Inner);
        let plan = joined.and_then(|joined| joined.explain()).expect("a plan");
        let join = plan.find("HashJoinExec").expect("a join by hash");
        // A part at a time: few rows may be wide.
        assert!(plan[join..].starts_with("HashJoinExec: mode=Partitioned"), "{plan}");
        let leaves = plan[join..].lines().filter(|line| line.contains("file_type=dataset"));
        let rows: Vec<_> = leaves
            .filter_map(|line| line.split([',', ' ']).find_map(|of| of.strip_prefix("rows=")))
            .collect();
        assert_eq!(rows, ["100", "1500"], "{plan}");
    }
}
