//! Queries, joins, groups and order: what works on all rows together.

use crate::{batch, example, failure, ids, message, numbered};
use arrow::array::{ArrayRef, AsArray, Float64Array, Int64Array, RecordBatch, StringArray};
use arrow::datatypes::Int64Type;
use mobula_core::{BatchSource, BoxError, Shard};
use mobula_data::{BatchFn, CsvOptions, Dataset, Error, JoinType, StreamOptions};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, LazyLock, Mutex};

fn table(keys: &[Option<i64>], name: &str, values: &[&str]) -> Dataset {
    let keys: ArrayRef = Arc::new(Int64Array::from(keys.to_vec()));
    let values: ArrayRef = Arc::new(StringArray::from(values.to_vec()));
    Dataset::from_batches([batch([("id", keys), (name, values)])]).expect("dataset")
}

/// Rows as text, in order.
fn rows(dataset: &Dataset) -> Vec<String> {
    let rows = dataset.collect().expect("collect");
    let text = mobula_data::rows::text(&rows).expect("text");
    text.into_iter().map(|row| row.join(" ")).collect()
}

#[test]
fn joins_pair_rows_of_the_same_key() {
    let left = table(&[Some(1), Some(2), Some(2), None], "left", &["a", "b", "c", "d"]);
    let right = table(&[Some(2), Some(3), None], "right", &["x", "y", "z"]);
    let join = |how| {
        let mut rows = rows(&left.join(&right, ["id"], how).expect("join"));
        rows.sort();
        rows
    };
    assert_eq!(join(JoinType::Inner), ["2 b x", "2 c x"]);
    assert_eq!(join(JoinType::Left), ["1 a null", "2 b x", "2 c x", "null d null"]);
    assert_eq!(join(JoinType::Right), ["2 b x", "2 c x", "3 null y", "null null z"]);
    let full = ["1 a null", "2 b x", "2 c x", "3 null y", "null d null", "null null z"];
    assert_eq!(join(JoinType::Full), full);
    assert_eq!(join(JoinType::LeftSemi), ["2 b", "2 c"]);
    assert_eq!(join(JoinType::LeftAnti), ["1 a", "null d"]);
    let none = right.drop_columns(["id"]).expect("drop");
    let pairs = left.join(&none, [] as [&str; 0], JoinType::Cross).expect("join");
    assert_eq!(pairs.count().expect("count"), 12);
}

#[test]
fn mistakes_in_joins_are_named() {
    let left = table(&[Some(1)], "value", &["a"]);
    let twice = left.join(&left, ["id"], JoinType::Inner);
    assert!(matches!(failure(twice), Error::ColumnTwice { column } if column == "value"));
    let renamed = left.rename("value", "other value").expect("rename");
    assert_eq!(rows(&left.join(&renamed, ["id"], JoinType::Inner).expect("join")), ["1 a a"]);
    let unknown = message(left.join(&renamed, ["key"], JoinType::Inner));
    assert_eq!(unknown, "there is no column \"key\"; available: id, value");
    let unknown = message(left.join(&renamed, ["value"], JoinType::Inner));
    assert_eq!(unknown, "there is no column \"value\"; available: id, other value");
    assert!(message(left.join(&renamed, [] as [&str; 0], JoinType::Left)).contains("at least one"));
    assert!(message(left.rename("value", "id")).contains("two columns \"id\""));
    assert!(message(left.rename("values", "id")).contains("no column \"values\""));
    assert!(message(left.drop_columns(["id", "id"])).contains("no column \"id\""));
    assert!(message(left.sample(1.5, 0)).contains("fraction is 1.5"));
}

#[test]
fn any_name_can_be_a_key() {
    let odd = "a \"b\". C";
    let left = table(&[Some(1)], "value", &["a"]).rename("id", odd).expect("rename");
    let right = left.rename("value", "SELECT").expect("rename");
    assert_eq!(rows(&left.join(&right, [odd], JoinType::Full).expect("join")), ["1 a a"]);
    let counts = left.aggregate([odd], ["count(*) AS n"]).expect("aggregate");
    assert_eq!(rows(&counts), ["1 1"]);
    assert_eq!(rows(&left.unique([odd]).expect("unique")), ["1"]);
    assert_eq!(rows(&left.frequencies(odd).expect("frequencies")), ["1 1"]);
    assert_eq!(rows(&right.top_k("SELECT", 3).expect("top")), ["1 a"]);
}

#[test]
fn groups_and_order() {
    let penguins =
        Dataset::read_csv(example("penguins.csv"), CsvOptions::default()).expect("penguins");
    let species = penguins.frequencies("species").expect("frequencies");
    assert_eq!(rows(&species), ["Adelie 152", "Gentoo 124", "Chinstrap 68"]);
    let by_island = penguins
        .aggregate(["species", "island"], ["count(*) AS n", "max(body_mass_g) AS most"])
        .expect("aggregate");
    assert_eq!(rows(&by_island)[0], "Adelie Biscoe 44 4775");
    assert_eq!(by_island.count().expect("count"), 5);
    let all = penguins.aggregate([] as [&str; 0], ["count(sex) AS n"]).expect("aggregate");
    assert_eq!(rows(&all), ["333"]);
    let heaviest = penguins.top_k("body_mass_g", 2).and_then(|d| d.select(["body_mass_g"]));
    assert_eq!(rows(&heaviest.expect("top")), ["6300", "6050"]);
    let sorted = penguins.sort(["island", "body_mass_g DESC NULLS LAST"]).expect("sort");
    let first = sorted.limit(1).and_then(|d| d.select(["island", "body_mass_g"])).expect("limit");
    assert_eq!(rows(&first), ["Biscoe 6300"]);
    assert_eq!(penguins.unique(["island"]).and_then(|d| d.count()).expect("count"), 3);
}

#[test]
fn queries_join_what_they_are_given() {
    let (left, right) = (numbered(10, &[3]), numbered(4, &[4]));
    let sum = "SELECT sum(id) AS id FROM dataset JOIN few USING (id)";
    assert_eq!(ids(&left.sql_with(sum, [("few", &right)]).expect("query")), [6]);
    assert!(message(left.sql(sum)).contains("few"));
}

/// The engine would take them from whichever branch comes first.
#[test]
fn unions_in_queries_keep_their_order_and_what_may_be_missing() {
    let (left, right) = (numbered(20_000, &[999]), numbered(20_000, &[500]));
    let sql = "SELECT id FROM dataset UNION ALL SELECT id + 20000 FROM other";
    for _ in 0..5 {
        let union = left.sql_with(sql, [("other", &right)]).expect("union");
        assert_eq!(ids(&union), Vec::from_iter(0..40_000));
    }
    let nulls = table(&[None, Some(7)], "name", &["a", "b"]);
    let sql = "SELECT id FROM dataset UNION ALL SELECT id FROM other";
    let union =
        Dataset::range(3).and_then(|d| d.sql_with(sql, [("other", &nulls)])).expect("union");
    assert_eq!(rows(&union), ["0", "1", "2", "null", "7"]);
    let first =
        mobula_data::query("SELECT 1 AS a UNION ALL SELECT NULL", [] as [(&str, Dataset); 0]);
    assert_eq!(first.expect("rows").num_rows(), 2);
    let wide = mobula_data::query("SELECT 1 AS a UNION ALL SELECT 2.5", [] as [(&str, Dataset); 0]);
    assert_eq!(mobula_data::rows::text(&wide.expect("rows")).expect("text"), [["1.0"], ["2.5"]]);
    let either =
        left.limit(3).and_then(|d| d.with_column("w", "CASE WHEN id > 1 THEN 1 ELSE 0.5 END"));
    let either = either.expect("column");
    let sorted = either.sort(["w DESC"]).and_then(|d| d.select(["w"])).expect("sort");
    assert_eq!(rows(&sorted), ["1.0", "0.5", "0.5"]);
    let queried = either.sql("SELECT CASE WHEN id > 1 THEN 1 ELSE 0.5 END AS w FROM dataset");
    assert_eq!(rows(&queried.expect("query")), ["0.5", "0.5", "1.0"]);
    let empty = message(left.sort([] as [&str; 0]));
    assert!(empty.contains("the expressions of a sort is none, expected at least one"), "{empty}");
    let unknown = message(left.sort(["ids DESC"]));
    assert_eq!(unknown, "there is no column \"ids\"; available: id");
    assert!(message(left.sort(["id LIMIT 3"])).contains("the order of a sort"));
    assert!(message(left.sort(["random()"])).contains("random()"));
}

/// More than a part, and more of one key than a part has.
#[test]
fn sorts_are_stable() {
    let all = Dataset::range(200_000)
        .and_then(|d| d.with_column("key", "(id * 7919) % 3"))
        .expect("rows");
    let sorted = all.sort(["key DESC", "id > 100000"]).expect("sort");
    let mut expected = Vec::from_iter(0..200_000_i64);
    expected.sort_by_key(|id| (-((id * 7919) % 3), *id > 100_000));
    assert_eq!(ids(&sorted), expected);
    assert!(sorted.count().expect("count") == 200_000);
    let floats = table(&[Some(3), None, Some(1), Some(2)], "x", &["a", "b", "c", "d"])
        .with_column("f", "CASE WHEN id = 2 THEN 'NaN'::double ELSE -id END")
        .expect("floats");
    assert_eq!(
        rows(&floats.sort(["f"]).and_then(|d| d.select(["x"])).expect("sort")),
        ["a", "c", "d", "b"]
    );
    let first = floats.sort(["f DESC NULLS FIRST"]).and_then(|d| d.select(["x"])).expect("sort");
    assert_eq!(rows(&first), ["b", "d", "c", "a"]);
    // All rows in blocks that nobody looks at first.
    let late = Dataset::range(2_000_000).and_then(|d| d.filter("id > 1990000")).expect("late");
    let late = late.sort(["id DESC"]).expect("sort");
    assert_eq!(ids(&late.limit(2).expect("limit")), [1_999_999, 1_999_998]);
    assert_eq!(late.count().expect("count"), 9_999);
    let dictionary = "arrow_cast('v' || (id % 5), 'Dictionary(Int32, Utf8)')";
    let names = numbered(5000, &[999]).with_column("name", dictionary).expect("names");
    let by_name = names.sort(["name DESC", "id"]).expect("sort");
    assert_eq!(by_name.schema().expect("schema"), names.schema().expect("schema"));
    assert_eq!(rows(&by_name.limit(2).expect("limit")), ["4 v4", "9 v4"]);
    let none = numbered(5, &[5]).filter("id > 9").and_then(|d| d.sort(["id"])).expect("none");
    assert_eq!(none.count().expect("count"), 0);
}

/// Whatever the blocks, and after filters, of which the rows have to be counted.
#[test]
fn rows_by_their_position() {
    for sizes in [vec![100], vec![1], vec![7, 1, 30]] {
        let dataset = numbered(100, &sizes).filter("id % 2 = 0").expect("filter");
        let all: Vec<i64> = (0..100).step_by(2).collect();
        let part = |d: mobula_data::Result<Dataset>| ids(&d.expect("dataset"));
        assert_eq!(part(dataset.limit(7)), all[..7]);
        assert_eq!(part(dataset.limit(700)), all);
        assert_eq!(part(dataset.skip(7)), all[7..]);
        assert_eq!(part(dataset.skip(70)), [] as [i64; 0]);
        assert_eq!(part(dataset.skip(5).and_then(|d| d.limit(10))), all[5..15]);
        assert_eq!(part(dataset.repartition(8)), all);
        let pieces = dataset.split(7).expect("split");
        let lengths: Vec<_> = pieces.iter().map(|d| d.count().expect("count")).collect();
        assert!(lengths.iter().all(|rows| *rows == 7 || *rows == 8), "{lengths:?}");
        assert_eq!(pieces.iter().flat_map(ids).collect::<Vec<_>>(), all);
        let doubled = dataset.union(&dataset.limit(3).expect("limit")).expect("union");
        assert_eq!(ids(&doubled), [&all[..], &all[..3]].concat());
    }
    assert!(message(numbered(1, &[1]).repartition(0)).contains("at least 1"));
    let names = table(&[Some(1)], "name", &["a"]);
    let text = message(numbered(1, &[1]).union(&names));
    assert!(
        text.contains("dataset 2 of a union has the columns [id: Int64, name: Utf8]"),
        "{text}"
    );
}

#[test]
fn rows_side_by_side() {
    let (left, right) = (numbered(100, &[7, 1, 30]), numbered(100, &[13]));
    let right = right.with_column("square", "id * id").and_then(|d| d.select(["square"]));
    let zipped = left.zip(&right.expect("right")).expect("zip");
    let rows = zipped.collect().expect("collect");
    let squares = rows.column(1).as_primitive::<Int64Type>().values();
    assert!(squares.iter().copied().eq((0..100).map(|id| id * id)));
    assert!(matches!(failure(left.zip(&left)), Error::ColumnTwice { .. }));
    let few = left.limit(9).and_then(|d| d.rename("id", "other")).expect("few");
    let text = message(left.zip(&few));
    assert!(text.contains("is 9, expected 100, as the left side has"), "{text}");
}

#[test]
fn a_random_shuffle_is_the_same_again() {
    let all = numbered(10_000, &[999]);
    let shuffled = ids(&all.random_shuffle(7).expect("shuffle"));
    let mut sorted = shuffled.clone();
    sorted.sort_unstable();
    assert_eq!(sorted, Vec::from_iter(0..10_000));
    assert_eq!(ids(&numbered(10_000, &[5000]).random_shuffle(7).expect("shuffle")), shuffled);
    assert_ne!(ids(&all.random_shuffle(8).expect("shuffle")), shuffled);
    // Each tenth has about as many of each tenth: 100, with a standard deviation of 9.
    for tenth in shuffled.chunks(1000) {
        let low = tenth.iter().filter(|id| **id < 1000).count();
        assert!((55..145).contains(&low), "{low}");
    }
    let (sample, test) = (all.sample(0.1, 7), all.train_test_split(0.1, 7));
    let (sample, test) = (ids(&sample.expect("sample")), ids(&test.expect("split").1));
    assert!((800..1200).contains(&sample.len()), "{}", sample.len());
    assert_ne!(sample, test);
}

/// The largest value of a group, and how many there are: a row a group.
fn largest(group: &RecordBatch) -> Result<RecordBatch, BoxError> {
    let key = group.column_by_name("key").ok_or("no key")?.slice(0, group.num_rows().min(1));
    let ids = group.column_by_name("id").ok_or("no id")?.as_primitive::<Int64Type>();
    let largest = arrow::compute::max(ids);
    let rows = largest.map(|_| group.num_rows() as f64);
    let (ids, rows) = (Int64Array::from_iter(largest), Float64Array::from_iter(rows));
    let columns = [("key", key), ("id", Arc::new(ids) as ArrayRef), ("rows", Arc::new(rows))];
    Ok(batch(columns))
}

/// Other columns for one of the groups.
fn uneven(group: &RecordBatch) -> Result<RecordBatch, BoxError> {
    let odd = group.num_rows() > 0 && group.column(1).as_primitive::<Int64Type>().value(0) == 3;
    Ok(if odd { group.project(&[1, 0])? } else { group.clone() })
}

mobula_data::inventory::submit! { BatchFn::new("largest", largest) }
mobula_data::inventory::submit! { BatchFn::new("uneven", uneven) }

#[test]
fn functions_of_groups_see_each_as_a_whole() {
    let keyed = numbered(50_000, &[999]).with_column("key", "id % 7").expect("key");
    let groups = keyed.map_groups(["key"], "largest").expect("groups");
    let expected: Vec<_> = (0..7).map(|key| (0..50_000).rev().find(|id| id % 7 == key)).collect();
    assert_eq!(ids(&groups), expected.into_iter().flatten().collect::<Vec<i64>>());
    assert_eq!(rows(&groups)[0], "0 49994 7143.0");
    // A group that is longer than any batch.
    let one = keyed.with_column("key", "0").and_then(|d| d.map_groups(["key"], "largest"));
    assert_eq!(rows(&one.expect("groups")), ["0 49999 50000.0"]);
    let text = message(keyed.map_groups(["key"], "uneven").and_then(|d| d.collect()));
    assert!(text.contains("a batch from a batch function has the columns [key"), "{text}");
    assert!(message(keyed.map_groups(["kex"], "largest")).contains("no column \"kex\""));
    assert!(message(keyed.map_groups([] as [&str; 0], "largest")).contains("at least one column"));
    assert!(message(keyed.map_groups(["key"], "largst")).contains("\"largst\""));
}

/// What was made of all rows is a source like any other, in any process.
#[test]
fn results_travel_and_stream() {
    let (left, right) = (numbered(100, &[9]), numbered(50, &[50]));
    let right = right.with_column("square", "id * id").expect("squares");
    let dataset = left
        .join(&right, ["id"], JoinType::Inner)
        .and_then(|d| d.random_shuffle(1))
        .and_then(|d| d.union(&d.limit(14)?))
        .and_then(|d| d.repartition(10))
        .and_then(|d| d.zip(&d.rename("id", "i")?.rename("square", "s")?))
        .expect("dataset");
    let json = serde_json::to_string(&dataset).expect("JSON");
    let again: Dataset = serde_json::from_str(&json).expect("JSON");
    assert_eq!(rows(&again), rows(&dataset));
    let source = dataset.stream(StreamOptions::new(["square"], "id").with_batch_size(32));
    let source = source.expect("stream");
    let bytes = serde_json::to_string(&source).expect("JSON");
    let again: mobula_data::TensorSource = serde_json::from_str(&bytes).expect("JSON");
    let mut stream = again.open(Shard::ALL).expect("the same data");
    let first = stream.next_batch().expect("batch").expect("rows");
    assert_eq!((first.rows(), again.rows()), (32, 64));
}

/// Every step is named, from the last to the files, and nothing runs.
#[test]
fn analysis_says_what_each_stage_did() {
    let rows = numbered(1000, &[100]).filter("id % 4 = 0").and_then(|rows| rows.sort(["id DESC"]));
    let rows = rows.and_then(|rows| rows.filter("id > 100")).expect("dataset");
    let text = rows.explain_analyze().expect("analysis");
    let line = |start: &str| {
        let line = text.lines().find(|line| line.starts_with(start));
        line.unwrap_or_else(|| panic!("no {start:?} in\n{text}"))
    };
    let first = line("batches → filter id % 4 = 0 → select id: ");
    assert!(first.contains(": 10 of 10 blocks, 250 rows, 0.0 MB, "), "{text}");
    assert!(line("sorted: by id DESC → filter id > 100: ").contains(" 224 rows"), "{text}");
    let filter = text.lines().find(|line| line.contains("FilterExec: id")).expect("a filter");
    assert!(filter.contains("output_rows=224"), "{text}");
}

/// What the function `waits` waits for.
static RELEASE: LazyLock<(Sender<()>, Mutex<Receiver<()>>)> = LazyLock::new(|| {
    let (release, released) = channel();
    (release, released.into())
});

mobula_data::inventory::submit! { BatchFn::new("waits", waits) }

fn waits(batch: &RecordBatch) -> Result<RecordBatch, BoxError> {
    if batch.column(0).as_primitive::<Int64Type>().values().contains(&10) {
        RELEASE.1.lock().expect("a lock").recv()?;
    }
    Ok(batch.clone())
}

#[test]
fn a_block_that_nothing_comes_of_is_named() {
    let rows = numbered(30, &[10]).map_batches("waits").expect("dataset");
    let counted = std::thread::spawn(move || rows.collect().expect("rows").num_rows());
    // Only that one, once the others are done.
    let stalled = || {
        let stages = mobula_data::stages();
        let stage = stages.into_iter().rfind(|stage| stage.name.contains("waits"));
        stage.filter(|stage| stage.blocks == 2).and_then(|stage| stage.waiting)
    };
    let stall = std::iter::repeat_with(stalled).find_map(|stall| stall).expect("a stall");
    assert_eq!(stall.block, "rows 10 to 19");
    RELEASE.0.send(()).expect("a reader");
    assert_eq!(counted.join().expect("a count"), 30);
}

#[test]
fn explain_shows_our_steps_and_the_engines_plans() {
    let digits = crate::digits();
    let few = digits.filter("label < 5").and_then(|d| d.rename("label", "class")).expect("few");
    let counts = few
        .map_batches("failing")
        .and_then(|d| d.aggregate(["class"], ["count(*) AS n"]))
        .and_then(|d| d.filter("n > 1"))
        .and_then(|d| d.random_shuffle(3)?.limit(2)?.union(&d))
        .expect("dataset");
    let text = counts.explain().expect("explain");
    let lines: Vec<_> = text.lines().map(str::trim).collect();
    for line in [
        "source union",
        "source slice: 2 rows from row 0",
        "source shuffled: by seed 3",
        "filter n > 1",
        "map_batches \"failing\"",
        "rename label to class",
        "filter label < 5",
    ] {
        assert!(lines.contains(&line), "{line:?} is not in\n{text}");
    }
    let query = "source query: SELECT \"class\", count(*) AS n FROM dataset GROUP BY \"class\"";
    assert!(lines.iter().any(|line| line.starts_with(query)), "{text}");
    assert!(lines.iter().any(|line| line.starts_with("AggregateExec")), "{text}");
    let parquet = lines.iter().find(|line| line.starts_with("source parquet")).expect("a source");
    assert!(parquet.ends_with("digits-0.parquet on (16 blocks, 1797 rows)"), "{parquet}");
    let kept = digits.materialize().and_then(|d| d.explain()).expect("explain");
    assert!(kept.starts_with("source persisted: 16 blocks, 0 of them on disk"), "{kept}");
}

/// What was counted of a source outlives it, the source itself does not.
#[test]
fn stages_keep_no_source() {
    let rows: ArrayRef = Arc::new(Int64Array::from_iter_values(0..1000));
    let alive = Arc::downgrade(&rows);
    let dataset = Dataset::from_batches([batch([("kept", rows)])]).expect("dataset");
    assert_eq!(dataset.filter("kept > 10").and_then(|some| some.count()).expect("count"), 989);
    drop(dataset);
    assert!(alive.upgrade().is_none());
    assert!(mobula_data::stages().iter().any(|stage| stage.name.contains("kept > 10")));
}
