//! Files of queries and their answers, in the form of SQLite's sqllogictest: records with a blank line
//! between them, which begin with `query TYPES [rowsort]` or `statement error [PART OF THE MESSAGE]`.
//! DuckDB gives the same answers.

use crate::{example, message, numbered};
use arrow::datatypes::DataType;
use arrow::record_batch::RecordBatch;
use mobula_data::{CsvOptions, Dataset, query, rows};

/// Tables of one block, or of so many that queries are worked on in parts.
#[derive(Clone, Copy, Debug)]
enum Tables {
    Whole,
    Cut,
}

fn ask(sql: &str, tables: Tables) -> mobula_data::Result<RecordBatch> {
    let penguins = Dataset::read_csv(example("penguins.csv"), CsvOptions::default())?;
    let (penguins, numbers) = match tables {
        Tables::Whole => (penguins, numbered(1000, &[99])),
        Tables::Cut => (penguins.repartition(1)?, numbered(1000, &[2])),
    };
    query(sql, [("penguins", penguins), ("numbers", numbers)])
}

/// A letter a column: whole numbers, other numbers, and all else.
fn types(answer: &RecordBatch) -> String {
    let letter = |data_type: &DataType| match data_type {
        of if of.is_integer() => 'I',
        of if of.is_numeric() => 'R',
        _ => 'T',
    };
    answer.schema().fields().iter().map(|field| letter(field.data_type())).collect()
}

fn lines(answer: &RecordBatch) -> Vec<String> {
    let cell = |cell: String| match cell.strip_suffix(".0") {
        Some(whole) => whole.to_owned(),
        None if cell == "null" => "NULL".to_owned(),
        None => cell,
    };
    let row = |row: Vec<String>| row.into_iter().map(cell).collect::<Vec<_>>().join(" ");
    rows::text(answer).expect("text").into_iter().map(row).collect()
}

fn check(record: &str, tables: Tables) {
    let (head, body) = record.split_once('\n').expect("a query");
    if let Some(part) = head.strip_prefix("statement error") {
        let text = message(ask(body, tables));
        assert!(text.contains(part.trim()), "{body}\n{text}");
        return;
    }
    let (sql, expected) = body.split_once("----").expect("an answer");
    let answer = ask(sql, tables).unwrap_or_else(|error| panic!("{sql}{error}"));
    let mut words = head.split(' ').skip(1);
    assert_eq!(types(&answer), words.next().expect("types"), "{sql}");
    let (mut got, mut expected) = (lines(&answer), expected.trim().lines().collect::<Vec<_>>());
    if words.next() == Some("rowsort") {
        got.sort();
        expected.sort_unstable();
    }
    assert_eq!(got, expected, "{tables:?}: {sql}");
}

fn run(file: &str) {
    let text = file.lines().filter(|line| !line.starts_with('#')).collect::<Vec<_>>().join("\n");
    let records: Vec<_> = text.split("\n\n").map(str::trim).filter(|r| !r.is_empty()).collect();
    assert!(records.len() > 5, "{records:?}");
    for tables in [Tables::Whole, Tables::Cut] {
        records.iter().for_each(|record| check(record, tables));
    }
}

#[test]
fn select() {
    run(include_str!("../sql/select.slt"));
}

#[test]
fn join() {
    run(include_str!("../sql/join.slt"));
}

#[test]
fn window() {
    run(include_str!("../sql/window.slt"));
}
