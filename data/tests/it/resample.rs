//! Rows more often or less often than they are.

use crate::{example, ids, message, numbered};
use mobula_data::{CsvOptions, Dataset, rows};
use std::collections::BTreeMap;

/// How often each value of the only column is there.
fn counts(dataset: &Dataset, column: &str) -> BTreeMap<String, u64> {
    let rows = dataset.frequencies(column).and_then(|d| d.collect()).expect("counts");
    let texts = rows::text(&rows).expect("text");
    texts.into_iter().map(|row| (row[0].clone(), row[1].parse().expect("a count"))).collect()
}

#[test]
fn rows_come_as_often_as_they_are_asked_for() {
    let all = numbered(10_000, &[999]);
    let twice = all.resample("2", 7).expect("resample");
    assert!(ids(&twice).into_iter().eq((0..20_000).map(|i| i / 2)));
    let some =
        ids(&all.resample("CASE WHEN id < 5000 THEN 1.5 ELSE 0.25 END", 7).expect("resample"));
    let low = some.iter().filter(|id| **id < 5000).count();
    // Standard deviations of 35 and 31.
    assert!((7350..7650).contains(&low), "{low}");
    assert!((1120..1380).contains(&(some.len() - low)), "{}", some.len() - low);
    let again = all.resample("CASE WHEN id < 5000 THEN 1.5 ELSE 0.25 END", 7).expect("resample");
    assert_eq!(ids(&again), some);
    assert_eq!(again.count().expect("count"), some.len() as u64);
    let other = all.resample("CASE WHEN id < 5000 THEN 1.5 ELSE 0.25 END", 8).expect("resample");
    assert_ne!(ids(&other), some);
    let half = all.resample("0.5", 7).and_then(|d| d.resample("0.5", 7)).expect("twice");
    assert!((2300..2700).contains(&half.count().expect("count")), "it draws again");
}

#[test]
fn copies_that_are_no_number_are_named() {
    for copies in ["-1", "NULL", "1001", "0.0 / 0.0"] {
        let text = message(numbered(3, &[3]).resample(copies, 0).and_then(|d| d.collect()));
        assert!(text.contains("expected a number of copies from 0 to 1000"), "{copies}: {text}");
    }
    assert!(message(numbered(3, &[3]).resample("absent", 0)).contains("no column \"absent\""));
}

/// Else the copies that the sides have would not be those that the whole has.
#[test]
fn a_split_comes_before() {
    let resampled = numbered(10, &[10]).resample("0.5", 1).expect("resample");
    assert!(message(resampled.train_test_split(0.5, 1)).contains("split first"));
    assert!(message(resampled.sample(0.5, 1)).contains("split first"));
}

#[test]
fn a_balanced_dataset_has_as_many_rows_of_each_value() {
    let penguins =
        Dataset::read_csv(example("penguins.csv"), CsvOptions::default()).expect("penguins");
    let balanced = counts(&penguins.balance("species", 7).expect("balance"), "species");
    assert_eq!(balanced.len(), 3);
    assert!(balanced.values().all(|rows| (100..130).contains(rows)), "{balanced:?}");
    let missing = counts(&penguins.balance("sex", 7).expect("balance"), "sex");
    assert!(missing.len() == 3 && missing["null"] > 90, "{missing:?}");
    assert_eq!(counts(&penguins.balance("year", 7).expect("balance"), "year").len(), 3);
    let text = message(penguins.balance("bill_length_mm", 7));
    assert!(text.contains("is Float64, expected whole numbers, booleans, text or dates"), "{text}");
    let rare = numbered(5000, &[5000]).with_column("rare", "id = 0").expect("rare");
    assert!(message(rare.balance("rare", 7)).contains("more than 1000 times"));
    assert!(
        message(numbered(3, &[3]).filter("id > 5").and_then(|d| d.balance("id", 7)))
            .contains("no rows")
    );
}

#[test]
fn a_stratified_split_has_the_same_share_of_each_value() {
    let penguins =
        Dataset::read_csv(example("penguins.csv"), CsvOptions::default()).expect("penguins");
    let (train, test) = penguins.stratified_split("species", 0.25, 7).expect("split");
    let test = counts(&test, "species");
    assert_eq!(
        test,
        [("Adelie", 38), ("Chinstrap", 17), ("Gentoo", 31)].map(|(k, n)| (k.to_owned(), n)).into()
    );
    assert_eq!(counts(&train, "species").values().sum::<u64>(), 344 - 86);
    assert_eq!(train.schema().expect("schema"), penguins.schema().expect("schema"));
    assert!(message(penguins.stratified_split("species", 2.0, 7)).contains("test_fraction is 2"));
}

#[test]
fn mixtures_have_the_shares_asked_for() {
    let (few, many) = (numbered(100, &[100]), numbered(10_000, &[1000]));
    let [few, many] = [(few, "few"), (many, "many")]
        .map(|(d, of)| d.with_column("of", format!("'{of}'")).expect("name"));
    let mixed = Dataset::mix([(&few, 1.0), (&many, 3.0)], 4000, 7).expect("mix");
    let shares = counts(&mixed, "of");
    assert_eq!(shares["few"], 1000);
    assert!((2850..3150).contains(&shares["many"]), "{shares:?}");
    let text = message(Dataset::mix([(&few, 1.0), (&many, -0.5)], 100, 7));
    assert!(text.contains("-0.5 for dataset 2"), "{text}");
    assert!(message(Dataset::mix([(&few, 1.0)], 1_000_000, 7)).contains("at most 1000 times"));
}
