//! Preprocessors against scikit-learn's, from a file that `bench/fixtures/preprocess.py` writes.

use arrow::array::{
    Array, ArrayRef, AsArray, Float64Array, ListBuilder, StringArray, StringBuilder,
};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Float64Type};
use arrow::record_batch::RecordBatch;
use mobula_data::{Dataset, Preprocessor, Step};
use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::sync::Arc;

/// More than one part in a million is another answer.
const TOLERANCE: f64 = 1e-6;

#[derive(Deserialize)]
struct Case {
    name: String,
    step: Step,
    fit: Columns,
    apply: Option<Columns>,
    expected: BTreeMap<String, Value>,
    lambdas: Option<Vec<f64>>,
    classes: Option<BTreeMap<String, Vec<String>>>,
}

#[derive(Deserialize)]
struct Columns(BTreeMap<String, Column>);

#[derive(Deserialize)]
#[serde(untagged)]
enum Column {
    Numbers(Vec<Option<f64>>),
    Text(Vec<Option<String>>),
    Lists(Vec<Vec<String>>),
}

impl Column {
    fn array(&self) -> ArrayRef {
        match self {
            Self::Numbers(values) => Arc::new(Float64Array::from(values.clone())),
            Self::Text(values) => Arc::new(StringArray::from(values.clone())),
            Self::Lists(rows) => {
                let mut lists = ListBuilder::new(StringBuilder::new());
                for row in rows {
                    row.iter().for_each(|word| lists.values().append_value(word));
                    lists.append(true);
                }
                Arc::new(lists.finish())
            }
        }
    }
}

impl Columns {
    fn batch(&self) -> RecordBatch {
        let columns = self.0.iter().map(|(name, column)| (name, column.array(), true));
        RecordBatch::try_from_iter_with_nullable(columns).expect("a batch")
    }

    /// In blocks of so many rows.
    fn dataset(&self, rows: usize) -> Dataset {
        let whole = self.batch();
        let block = |start| whole.slice(start, rows.min(whole.num_rows() - start));
        Dataset::from_batches((0..whole.num_rows()).step_by(rows).map(block)).expect("dataset")
    }
}

fn cases() -> Vec<Case> {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/preprocess.json");
    serde_json::from_slice(&std::fs::read(file).expect("the file")).expect("cases")
}

/// The numbers of JSON, however deep, and those of a column.
fn leaves(value: &Value, into: &mut Vec<Option<f64>>) {
    match value {
        Value::Array(items) => items.iter().for_each(|item| leaves(item, into)),
        other => into.push(other.as_f64()),
    }
}

fn numbers(array: &ArrayRef) -> Vec<Option<f64>> {
    let values = match array.data_type() {
        DataType::FixedSizeList(..) => array.as_fixed_size_list().values(),
        _ => array,
    };
    let values = cast(values, &DataType::Float64).expect("numbers");
    values.as_primitive::<Float64Type>().iter().collect()
}

fn words(array: &ArrayRef) -> Vec<Vec<String>> {
    let row = |row: ArrayRef| row.as_string::<i32>().iter().flatten().map(str::to_owned).collect();
    array.as_list::<i32>().iter().flatten().map(row).collect()
}

fn compare(case: &Case, rows: &RecordBatch) {
    for (column, expected) in &case.expected {
        let (place, array) = (format!("{}: {column}", case.name), rows.column_by_name(column));
        let array = array.expect(&place);
        if matches!(array.data_type(), DataType::List(_)) {
            assert_eq!(serde_json::json!(words(array)), *expected, "{place}");
            continue;
        }
        let (mut wanted, got) = (Vec::new(), numbers(array));
        leaves(expected, &mut wanted);
        assert_eq!(got.len(), wanted.len(), "{place}");
        for (row, (got, wanted)) in got.iter().zip(wanted).enumerate() {
            assert!(close(*got, wanted), "{place}, value {row}: {got:?}, expected {wanted:?}");
        }
    }
}

fn close(got: Option<f64>, wanted: Option<f64>) -> bool {
    match (got, wanted) {
        (Some(got), Some(wanted)) => (got - wanted).abs() <= TOLERANCE * wanted.abs().max(1.0),
        (got, wanted) => got == wanted,
    }
}

fn fit(case: &Case, block_rows: usize) -> Preprocessor {
    case.step.fit(&case.fit.dataset(block_rows)).expect(&case.name)
}

#[test]
fn the_numbers_are_those_of_sklearn() {
    let cases = cases();
    assert!(cases.len() > 30, "only {} cases", cases.len());
    for case in &cases {
        let rows = case.apply.as_ref().unwrap_or(&case.fit).batch();
        let fitted = fit(case, 1000);
        compare(case, &fitted.transform(&rows).expect(&case.name));
        for (column, classes) in case.classes.iter().flatten() {
            assert_eq!(fitted.classes(column).as_ref(), Some(classes), "{}", case.name);
        }
    }
}

#[test]
fn powers_are_those_of_sklearn() {
    for case in cases() {
        let Some(expected) = &case.lambdas else { continue };
        let json = serde_json::to_value(fit(&case, 1000)).expect("JSON");
        let columns = json["PowerTransformer"].as_array().expect("columns");
        assert_eq!(columns.len(), expected.len());
        for (column, expected) in columns.iter().zip(expected) {
            let got = column["lambdas"][0].as_f64();
            assert!(close(got, Some(*expected)), "{}: {got:?}, expected {expected}", case.name);
        }
    }
}

/// INV-FIT: what is fitted does not depend on how the rows are cut.
#[test]
fn blocks_do_not_matter_and_json_keeps_every_bit() {
    for case in cases() {
        let rows = case.apply.as_ref().unwrap_or(&case.fit).batch();
        for block_rows in [1, 2, 7] {
            let fitted = fit(&case, block_rows);
            let rows = fitted.transform(&rows).expect(&case.name);
            compare(&case, &rows);
            assert_eq!(fit(&case, block_rows), fitted, "the same cut gives the same bits");
        }
        let fitted = fit(&case, 7);
        let text = serde_json::to_string(&fitted).expect("JSON");
        let again: Preprocessor = serde_json::from_str(&text).expect(&case.name);
        let bytes = rmp_serde::to_vec_named(&fitted).expect("MessagePack");
        let sent: Preprocessor = rmp_serde::from_slice(&bytes).expect(&case.name);
        let expected = fitted.transform(&rows).expect(&case.name);
        for other in [again, sent] {
            assert_eq!(other.transform(&rows).expect(&case.name), expected, "{}", case.name);
            assert_eq!(serde_json::to_string(&other).expect("JSON"), text);
        }
    }
}

/// A row in serving gets what it got among others, whatever part of a batch it is.
#[test]
fn a_row_alone_gets_what_it_gets_among_others() {
    for case in cases() {
        let rows = case.apply.as_ref().unwrap_or(&case.fit).batch();
        let fitted = fit(&case, 1000);
        let whole = fitted.transform(&rows).expect(&case.name);
        for row in 0..rows.num_rows() {
            let alone = fitted.transform(&rows.slice(row, 1)).expect(&case.name);
            assert_eq!(alone, whole.slice(row, 1), "{}: row {row}", case.name);
        }
    }
}

#[test]
fn without_a_column_the_others_are_left() {
    for case in cases() {
        let (fitted, batch) = (fit(&case, 1000), case.fit.batch());
        let names: Vec<_> = case.fit.0.keys().collect();
        let rest = fitted.without(names[0]);
        assert!(rest != fitted, "{}: it still has {}", case.name, names[0]);
        let others: Vec<_> = (1..names.len()).collect();
        let others = batch.project(&others).expect("columns");
        assert!(others.num_columns() == 0 || rest.transform(&others).is_ok(), "{}", case.name);
    }
}
