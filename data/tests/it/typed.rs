//! Rows of the program's own types.

use crate::{failure, ids, message, numbered};
use arrow::record_batch::RecordBatch;
use mobula_data::{Dataset, Error};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
enum Kind {
    Near,
    Far,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Place {
    name: String,
    height: Option<f32>,
    tags: Vec<String>,
    at: (f64, f64),
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Id {
    id: i64,
}

fn places(rows: usize) -> Vec<Place> {
    let place = |i: usize| Place {
        name: format!("place {i}"),
        height: (!i.is_multiple_of(3)).then_some(i as f32 / 4.0),
        tags: vec!["a".to_owned(); i % 4],
        at: (i as f64, -(i as f64)),
    };
    (0..rows).map(place).collect()
}

#[test]
fn rows_come_back_as_they_were() {
    let rows = places(10_000);
    let dataset = Dataset::from_rows(rows.clone()).expect("dataset");
    let back: Vec<Place> = dataset.rows().expect("rows").collect::<Result<_, _>>().expect("rows");
    assert_eq!(back, rows);
    let few = dataset.filter("height > 2000").and_then(|d| d.count()).expect("count");
    assert_eq!(few, rows.iter().filter(|row| row.height > Some(2000.0)).count() as u64);
    let none = Dataset::from_rows(Vec::<Place>::new()).expect("no rows");
    assert_eq!(
        (none.count().expect("count"), none.schema().expect("schema").fields().len()),
        (0, 4)
    );
}

#[test]
fn closures_see_every_row_in_order() {
    let all = numbered(10_000, &[999, 1]);
    let halves = all.map(|row: Id| Id { id: row.id / 2 }).expect("map");
    assert_eq!(ids(&halves), (0..10_000).map(|id| id / 2).collect::<Vec<i64>>());
    let some = all
        .filter("id < 4")
        .and_then(|d| d.flat_map(|row: Id| (0..row.id).map(|id| Id { id }).collect::<Vec<_>>()))
        .expect("flat map");
    assert_eq!(ids(&some), [0, 0, 1, 0, 1, 2]);
    let odd = all.filter_rows(|row: &Id| row.id % 2 == 1).expect("filter");
    assert_eq!(odd.count().expect("count"), 5000);
    let sum = odd.fold(0, |sum, row: Id| sum + row.id).expect("fold");
    assert_eq!(sum, 25_000_000);
    let first = |batch: &RecordBatch| Ok(batch.slice(0, batch.num_rows().min(1)));
    assert_eq!(ids(&numbered(10, &[4]).map_batches_with(first).expect("map")), [0, 4, 8]);
}

#[test]
fn rows_of_another_shape_are_errors() {
    let dataset = numbered(3, &[3]);
    let text = message(dataset.rows::<Place>().expect("lazy").collect::<Result<Vec<_>, _>>());
    assert!(text.contains("Place") && text.contains("name"), "{text}");
    #[derive(Debug, Serialize, Deserialize)]
    struct Small {
        id: u8,
    }
    let large = dataset.with_column("id", "id + 254").expect("large");
    let text = message(large.fold(0, |sum, row: Small| sum + u64::from(row.id)));
    assert!(text.contains("Small"), "{text}");
    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Wide {
        id: Option<f64>,
    }
    let wide: Vec<Wide> = dataset.rows().expect("rows").collect::<Result<_, _>>().expect("rows");
    assert_eq!(wide[2], Wide { id: Some(2.0) });
    let halves = dataset.with_column("id", "id + 0.5").expect("halves");
    let text = message(halves.rows::<Id>().expect("lazy").collect::<Result<Vec<_>, _>>());
    assert!(text.contains("Id"), "no fraction is cut off: {text}");
    let text = message(Dataset::from_rows([BTreeMap::from([("a".to_owned(), 1)])]));
    assert!(text.contains("rows of"), "{text}");
    let kinds = [(Kind::Near, 1), (Kind::Far, 2)].map(|(kind, id)| Kinds { kind, id });
    let dataset = Dataset::from_rows(kinds.clone()).expect("enums without data are text");
    let back: Vec<Kinds> = dataset.rows().expect("rows").collect::<Result<_, _>>().expect("rows");
    assert_eq!(back, kinds);
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Kinds {
    kind: Kind,
    id: i64,
}

#[test]
fn a_closure_that_panics_is_quoted() {
    let text = message(
        numbered(3, &[3])
            .map(|row: Id| if row.id < 2 { row } else { panic!("too much: {}", row.id) }),
    );
    assert!(text.contains("panicked: too much: 2"), "{text}");
}

#[test]
fn a_lost_block_of_a_closure_is_named() {
    let dataset = numbered(3, &[3]).map(|row: Id| row).expect("map");
    let path = dataset.block_refs().expect("blocks")[0].path.clone().expect("a file");
    std::fs::remove_file(path).expect("lost");
    assert!(matches!(failure(dataset.collect()), Error::BlockLost { .. }));
    let text = message(dataset.collect());
    assert!(text.contains("register the function as a BatchFn"), "{text}");
}
