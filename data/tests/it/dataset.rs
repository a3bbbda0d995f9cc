//! Operations on rows, splits, and descriptions that travel.

use crate::{batch, digits, failure, ids, message, numbered};
use arrow::array::{ArrayRef, AsArray, StringArray};
use arrow::datatypes::Int64Type;
use arrow::record_batch::RecordBatch;
use mobula_core::BoxError;
use mobula_data::{BatchFn, Dataset, Error};
use std::sync::Arc;

#[test]
fn rows_pass_through_operations_in_order() {
    let dataset = numbered(1000, &[7, 64, 1])
        .filter("id % 3 = 0")
        .and_then(|d| d.with_column("half", "id / 2"))
        .and_then(|d| d.with_column("id", "id + 1"))
        .and_then(|d| d.select(["half", "id"]))
        .expect("plan");
    let rows = dataset.collect().expect("collect");
    assert_eq!(rows.schema().field(0).name(), "half");
    let expected: Vec<i64> = (0..1000).filter(|id| id % 3 == 0).collect();
    let half = rows.column(0).as_primitive::<Int64Type>().values();
    assert!(half.iter().eq(expected.iter().map(|id| id / 2).collect::<Vec<_>>().iter()));
    assert!(ids(&dataset).into_iter().eq(expected.iter().map(|id| id + 1)));
    assert_eq!(dataset.count().expect("count"), expected.len() as u64);
    assert_eq!(dataset.head(5).expect("head"), rows.slice(0, 5));
    assert_eq!(dataset.head(5000).expect("head").num_rows(), expected.len());
}

/// INV-SPLIT: the sides are disjoint and complete, and a row's side depends on its position only.
#[test]
fn a_split_is_exact_and_independent_of_the_blocks() {
    let sides = |dataset: &Dataset| {
        let (train, test) = dataset.train_test_split(0.2, 7).expect("split");
        (ids(&train), ids(&test))
    };
    let (train, test) = sides(&numbered(5000, &[5000]));
    let mut all = [train.clone(), test.clone()].concat();
    all.sort_unstable();
    assert!(all.into_iter().eq(0..5000));
    assert!((900..1100).contains(&test.len()), "about a fifth: {}", test.len());

    assert_eq!(sides(&numbered(5000, &[1, 100, 3])), (train.clone(), test.clone()));
    let longer = sides(&numbered(6000, &[500]));
    assert!(longer.1.starts_with(&test), "appended rows move no row to the other side");
    let even = sides(&numbered(5000, &[5000]).filter("id % 2 = 0").expect("filter"));
    assert!(even.1.into_iter().eq(test.into_iter().filter(|id| id % 2 == 0)));
}

#[test]
fn a_split_of_a_split_draws_again() {
    let (train, _) = numbered(4000, &[100]).train_test_split(0.5, 7).expect("split");
    let (inner, validation) = train.train_test_split(0.5, 7).expect("split");
    let (a, b) = (inner.count().expect("count"), validation.count().expect("count"));
    assert!((800..1200).contains(&a) && (800..1200).contains(&b), "{a} {b}");
    assert_eq!(a + b, train.count().expect("count"));
    assert!(message(train.train_test_split(1.5, 7)).contains("a number from 0 to 1"));
}

#[test]
fn queries_run_over_the_rows_that_are_left() {
    let few = numbered(100, &[9]).filter("id < 10").expect("filter");
    let query = "SELECT id % 2 AS odd, sum(id) AS id FROM dataset GROUP BY odd ORDER BY odd";
    let sums = few.sql(query).expect("query");
    assert_eq!(ids(&sums), [20, 25]);
    assert_eq!(ids(&sums.filter("odd = 1").expect("filter")), [25]);
    assert_eq!(sums.schema().expect("schema").fields().len(), 2);
}

#[test]
fn mistakes_are_found_where_they_are_made() {
    let dataset = digits();
    let missing = message(dataset.select(["pixels"]));
    assert_eq!(missing, "there is no column \"pixels\"; available: image, label");
    for wrong in [
        dataset.filter("labl = 3"),
        dataset.with_column("x", "labl + 3"),
        dataset.sql("SELECT labl FROM dataset"),
    ] {
        assert_eq!(message(wrong), "there is no column \"labl\"; available: image, label");
    }
    assert!(matches!(failure(dataset.filter("label <")), Error::Sql { .. }));
    assert!(matches!(failure(dataset.sql("DROP TABLE dataset")), Error::Sql { .. }));
    let volatile = message(dataset.with_column("key", "uuid()"));
    assert!(
        volatile.contains("uuid() calls uuid()") || volatile.contains("calls uuid()"),
        "{volatile}"
    );
    let volatile = dataset.sql("SELECT * FROM dataset WHERE uuid() < 'a'");
    assert!(matches!(failure(volatile), Error::NotDeterministic { .. }));
}

fn doubled(batch: &RecordBatch) -> Result<RecordBatch, BoxError> {
    Ok(arrow::compute::concat_batches(&batch.schema(), [batch, batch])?)
}

fn failing(batch: &RecordBatch) -> Result<RecordBatch, BoxError> {
    if batch.num_rows() > 0 { Err("this is wrong".into()) } else { Ok(batch.clone()) }
}

fn nested(batch: &RecordBatch) -> Result<RecordBatch, BoxError> {
    if batch.num_rows() > 0 {
        numbered(3, &[1]).collect()?;
    }
    Ok(batch.clone())
}

inventory::submit! { BatchFn::new("doubled", doubled) }
inventory::submit! { BatchFn::new("failing", failing) }
inventory::submit! { BatchFn::new("nested", nested) }

#[test]
fn batch_functions_are_called_by_name() {
    let dataset = numbered(10, &[4]);
    let doubled = dataset.map_batches("doubled").expect("map");
    assert_eq!(doubled.count().expect("count"), 20);
    assert_eq!(ids(&doubled)[..8], [0, 1, 2, 3, 0, 1, 2, 3]);
    let failed = message(dataset.map_batches("failing").expect("map").collect());
    assert!(failed.contains("\"failing\" failed") && failed.contains("this is wrong"), "{failed}");
    let unknown = message(dataset.map_batches("absent"));
    assert!(unknown.contains("doubled") && unknown.contains("inventory::submit!"), "{unknown}");
}

/// On more threads than there are, each of which waits for others.
#[test]
fn a_batch_function_may_read_a_dataset() {
    let nested = numbered(100, &[1]).map_batches("nested").expect("map");
    assert_eq!(ids(&nested), Vec::from_iter(0..100));
    let twice = nested.sql("SELECT * FROM dataset ORDER BY id DESC").and_then(|d| d.limit(1));
    assert_eq!(ids(&twice.and_then(|d| d.map_batches("nested")).expect("map")), [99]);
}

/// A description in another process means the same rows, whatever the encoding.
#[test]
fn a_description_travels() {
    let (train, _) = digits().train_test_split(0.3, 1).expect("split");
    let names: ArrayRef = Arc::new(StringArray::from(vec![Some("a"), None, Some("c")]));
    let memory = Dataset::from_batches([batch([("name", names)])]).expect("dataset");
    let query = digits().sql("SELECT label FROM dataset LIMIT 5").expect("query");
    for dataset in [train.filter("label > 3").expect("filter"), memory, query] {
        let json = serde_json::to_string(&dataset).expect("encode");
        let from_json: Dataset = serde_json::from_str(&json).expect("decode");
        let packed = rmp_serde::to_vec_named(&dataset).expect("encode");
        let from_packed: Dataset = rmp_serde::from_slice(&packed).expect("decode");
        let rows = dataset.collect().expect("collect");
        assert_eq!(from_json.collect().expect("collect"), rows);
        assert_eq!(from_packed.collect().expect("collect"), rows);
        assert_eq!(from_packed.schema().expect("schema"), dataset.schema().expect("schema"));
    }
}

/// Actions wait; tokio forbids its own way of waiting on its threads.
#[test]
fn actions_work_inside_any_runtime() {
    let builders = [
        tokio::runtime::Builder::new_current_thread(),
        tokio::runtime::Builder::new_multi_thread(),
    ];
    for mut builder in builders {
        let runtime = builder.build().expect("runtime");
        assert_eq!(runtime.block_on(async { digits().count().expect("count") }), 1797);
    }
}
