//! Functions of the program that SQL calls.

use crate::{batch, message, numbered};
use arrow::array::{Array, ArrayRef, AsArray, Float64Array, Int64Array, StringArray};
use arrow::datatypes::{DataType, Float64Type, Int64Type};
use mobula_core::BoxError;
use mobula_data::{AggregateFn, Aggregator, Dataset, FnTypes, ScalarFn, WriteOptions, query};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

fn one_float(given: &[DataType]) -> Result<FnTypes, BoxError> {
    match given {
        [one] if !one.is_numeric() => Err(format!("takes numbers, not {one}").into()),
        _ => Ok(FnTypes::new([DataType::Float64], DataType::Float64)),
    }
}

fn halved(columns: &[ArrayRef]) -> Result<ArrayRef, BoxError> {
    let x = columns[0].as_primitive::<Float64Type>();
    if x.iter().flatten().any(|x| x < 0.0) {
        return Err("a number below zero".into());
    }
    Ok(Arc::new(x.unary::<_, Float64Type>(|x| x / 2.0)))
}

fn too_few(_columns: &[ArrayRef]) -> Result<ArrayRef, BoxError> {
    Ok(Arc::new(Float64Array::from(vec![1.0, 2.0])))
}

mobula_data::inventory::submit! { ScalarFn::new("halved", one_float, halved) }
mobula_data::inventory::submit! { ScalarFn::new("too_few", one_float, too_few) }

/// All values, sorted: its state is of no fixed size.
#[derive(Debug, Default, Serialize, Deserialize)]
struct ExactMedian(Vec<i64>);

impl Aggregator for ExactMedian {
    fn types(_given: &[DataType]) -> Result<FnTypes, BoxError> {
        Ok(FnTypes::new([DataType::Int64], DataType::Int64))
    }

    fn update(&mut self, columns: &[ArrayRef]) -> Result<(), BoxError> {
        self.0.extend(columns[0].as_primitive::<Int64Type>().iter().flatten());
        Ok(())
    }

    fn merge(&mut self, other: Self) -> Result<(), BoxError> {
        self.0.extend(other.0);
        Ok(())
    }

    fn finish(&self) -> Result<ArrayRef, BoxError> {
        let mut all = self.0.clone();
        all.sort_unstable();
        if all == [13] {
            return Err("13 alone has no median".into());
        }
        Ok(Arc::new(Int64Array::from(vec![all.get(all.len() / 2).copied()])))
    }

    fn size(&self) -> usize {
        size_of::<Self>() + self.0.capacity() * 8
    }
}

mobula_data::inventory::submit! { AggregateFn::new::<ExactMedian>("exact_median") }

/// The types it is given, and text.
fn shouted_types(given: &[DataType]) -> Result<FnTypes, BoxError> {
    match given {
        [DataType::Utf8] => Ok(FnTypes::new(given.to_vec(), DataType::Utf8)),
        _ => Err(format!("takes text, not {given:?}").into()),
    }
}

fn shouted(columns: &[ArrayRef]) -> Result<ArrayRef, BoxError> {
    let text = columns[0].as_string::<i32>();
    Ok(Arc::new(text.iter().map(|text| text.map(str::to_uppercase)).collect::<StringArray>()))
}

mobula_data::inventory::submit! { ScalarFn::new("shouted", shouted_types, shouted) }

/// The engine reads text of Parquet in another form.
#[test]
fn text_is_of_one_type_wherever_it_comes_from() {
    let folder = tempfile::tempdir().expect("a folder");
    let text: ArrayRef = Arc::new(StringArray::from(vec![Some("a"), None, Some("b")]));
    let rows = Dataset::from_batches(vec![batch([("text", text)])]).expect("rows");
    let path = folder.path().join("rows");
    rows.write_parquet(&path, WriteOptions::default()).expect("writes");
    let files = Dataset::read_parquet(path.join("*.parquet").to_str().expect("UTF-8"));
    for rows in [rows, files.expect("reads")] {
        let loud = rows.sql("SELECT shouted(text) AS loud FROM dataset ORDER BY loud");
        let loud = loud.and_then(|loud| loud.collect()).expect("rows");
        let loud = loud.column(0).as_string::<i32>();
        assert_eq!(loud.iter().collect::<Vec<_>>(), [Some("A"), Some("B"), None]);
    }
}

#[test]
fn a_function_of_rows_is_in_expressions_filters_and_queries() {
    let data = numbered(10, &[3]);
    let half = data.with_column("half", "halved(id) + 1").expect("a column");
    let rows = half.filter("halved(half) > 2.4").and_then(|rows| rows.collect()).expect("rows");
    assert_eq!(rows.column(1).as_primitive::<Float64Type>().values()[..], [5.0, 5.5]);
    let got = query("SELECT sum(halved(id)) FROM t", [("t", data)]).expect("a sum");
    assert_eq!(got.column(0).as_primitive::<Float64Type>().value(0), 22.5);
    // All of its arguments are constants.
    let got = query::<String>("SELECT halved(5) AS x", []).expect("a row");
    assert_eq!(got.column(0).as_primitive::<Float64Type>().value(0), 2.5);
}

#[test]
fn what_a_function_does_not_do_is_said() {
    let data = numbered(10, &[3]);
    let with = |expression: &str| message(data.with_column("x", expression));
    assert!(with("halved(id, 2)").contains("halved takes 1 arguments, but 2 are given"));
    assert!(with("halved('a')").contains("function halved: takes numbers, not Utf8"));
    assert!(with("halve(id)").contains("halve"));
    let run =
        |expression: &str| message(data.with_column("x", expression).and_then(|d| d.collect()));
    let text = run("halved(id - 5)");
    assert!(text.contains("function halved: a number below zero"), "{text}");
    let text = run("too_few(id)");
    assert!(text.contains("too_few returned 2 values of Float64 for 3 rows"), "{text}");
}

fn groups(sizes: &[i64]) -> Dataset {
    let data = numbered(1000, sizes).with_column("g", "id % 7").expect("groups");
    data.aggregate(["g"], ["exact_median(id) AS m", "count(*) AS n"]).expect("medians")
}

#[test]
fn an_aggregate_is_the_same_however_rows_are_cut() {
    let expected: Vec<i64> = (0..7)
        .map(|g| {
            let rows: Vec<i64> = (0..1000).filter(|id| id % 7 == g).collect();
            rows[rows.len() / 2]
        })
        .collect();
    for sizes in [&[1000][..], &[1], &[7, 500]] {
        let rows = groups(sizes).collect().expect("rows");
        assert_eq!(rows.column(1).as_primitive::<Int64Type>().values()[..], expected, "{sizes:?}");
    }
    // On all processors, where partial ones are merged, and over rows of windows.
    let sql = "SELECT exact_median(id) AS m FROM t GROUP BY id % 7 ORDER BY m";
    let rows = query(sql, [("t", numbered(1000, &[7, 500]))]).expect("rows");
    assert_eq!(rows.column(0).as_primitive::<Int64Type>().values()[..], expected);
    let sql = "SELECT exact_median(id) OVER (ORDER BY id) AS m FROM t ORDER BY id";
    let rows = query(sql, [("t", numbered(5, &[2]))]).expect("rows");
    assert_eq!(rows.column(0).as_primitive::<Int64Type>().values()[..], [0, 1, 1, 2, 2]);
}

/// Counts: of no rows that is 0, which is not missing.
#[derive(Debug, Default, Serialize, Deserialize)]
struct RowsSeen(i64);

impl Aggregator for RowsSeen {
    fn types(given: &[DataType]) -> Result<FnTypes, BoxError> {
        Ok(FnTypes::new(given.to_vec(), DataType::Int64))
    }

    fn update(&mut self, columns: &[ArrayRef]) -> Result<(), BoxError> {
        self.0 += columns[0].len() as i64;
        Ok(())
    }

    fn merge(&mut self, other: Self) -> Result<(), BoxError> {
        self.0 += other.0;
        Ok(())
    }

    fn finish(&self) -> Result<ArrayRef, BoxError> {
        Ok(Arc::new(Int64Array::from(vec![self.0])))
    }
}

mobula_data::inventory::submit! { AggregateFn::new::<RowsSeen>("rows_seen") }

#[test]
fn an_aggregate_of_no_rows_is_its_own_everywhere() {
    let ask = |sql: &str| {
        let tables = [("t", numbered(4, &[3])), ("u", numbered(2, &[2]))];
        let rows = query(sql, tables).expect(sql);
        let column = rows.column(0).as_primitive::<Int64Type>();
        assert_eq!(column.null_count(), 0, "{sql}");
        column.values().to_vec()
    };
    let none = "SELECT rows_seen(id) FROM t WHERE id < 0";
    assert_eq!(ask(none), [0]);
    let correlated =
        "SELECT (SELECT rows_seen(u.id) FROM u WHERE u.id = t.id) AS n FROM t ORDER BY t.id";
    assert_eq!(ask(correlated), [1, 1, 0, 0]);
    let before = "SELECT rows_seen(id) OVER (ORDER BY id ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS n FROM t ORDER BY id";
    assert_eq!(ask(before), [0, 1, 2, 3]);
    let some = "SELECT rows_seen(id) FILTER (WHERE id > 1) AS n FROM t GROUP BY id ORDER BY id";
    assert_eq!(ask(some), [0, 0, 1, 1]);
}

/// No rows are an aggregate too, and values of another type are converted.
#[test]
fn an_aggregate_of_nothing_and_of_text() {
    let none =
        query("SELECT exact_median(id) AS m FROM t WHERE id < 0", [("t", numbered(9, &[4]))]);
    assert!(none.expect("a row").column(0).is_null(0));
    let text: ArrayRef = Arc::new(StringArray::from(vec!["3", "1", "20"]));
    let data = Dataset::from_batches([batch([("x", text)])]).expect("dataset");
    let got = query("SELECT exact_median(x) AS m FROM t", [("t", data)]).expect("a row");
    assert_eq!(got.column(0).as_primitive::<Int64Type>().value(0), 3);
}

#[test]
fn what_an_aggregate_does_not_do_is_said() {
    let ask = |sql: &str| message(query(sql, [("t", numbered(20, &[4]))]));
    let text = ask("SELECT exact_median(id) AS m FROM t WHERE id = 13");
    assert!(text.contains("function exact_median: 13 alone has no median"), "{text}");
    let text = ask("SELECT exact_median(id ORDER BY id DESC) AS m FROM t");
    assert!(text.contains("exact_median with DISTINCT, IGNORE NULLS or ORDER BY"), "{text}");
    let text = ask("SELECT exact_median() AS m FROM t");
    assert!(text.contains("exact_median takes at least one argument"), "{text}");
    let text = ask("SELECT exact_median(id) OVER (ORDER BY id ROWS 1 PRECEDING) AS m FROM t");
    assert!(text.contains("exact_median over a window that does not begin"), "{text}");
    let text = ask("SELECT exact_median(DISTINCT id), count(DISTINCT id % 3) AS m FROM t");
    assert!(text.contains("exact_median with DISTINCT"), "{text}");
}
