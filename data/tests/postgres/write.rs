//! What a table has of a dataset.

use crate::Test;
use crate::failures::said;
use crate::read::{TYPES, collect, make_types, read};
use crate::server::{PASSWORD, Server, poll};
use arrow::array::{
    ArrayRef, Decimal32Array, DictionaryArray, FixedSizeListArray, Float16Array, Int64Array,
    LargeStringArray, NullArray, StringArray, StringViewArray, TimestampNanosecondArray,
    UInt8Array, UInt64Array,
};
use arrow::datatypes::{Int32Type, Int64Type};
use arrow::record_batch::RecordBatch;
use mobula_core::BoxError;
use mobula_data::{BatchFn, Dataset, Error, IfExists, PostgresWriteOptions, inventory};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::Duration;

pub(crate) const TESTS: &[Test] = &[
    ("every_type_goes_back_as_it_came", every_type_goes_back_as_it_came),
    ("types_of_arrow_alone_become_others", types_of_arrow_alone_become_others),
    ("a_hundred_thousand_rows_go_there_and_back", a_hundred_thousand_rows_go_there_and_back),
    (
        "tables_that_exist_are_kept_extended_or_replaced",
        tables_that_exist_are_kept_extended_or_replaced,
    ),
    (
        "what_does_not_fit_is_named_and_nothing_is_written",
        what_does_not_fit_is_named_and_nothing_is_written,
    ),
    (
        "a_write_that_fails_or_is_killed_leaves_nothing",
        a_write_that_fails_or_is_killed_leaves_nothing,
    ),
    (
        "a_table_that_others_hold_is_not_waited_for_for_ever",
        a_table_that_others_hold_is_not_waited_for_for_ever,
    ),
];

/// Tells this program to write a table to the server on a port, which never ends.
pub(crate) const ENDLESS: &str = "MOBULA_TEST_WRITE";

fn write(
    server: &Server,
    dataset: &Dataset,
    table: &str,
    if_exists: IfExists,
) -> Result<u64, Error> {
    let options = PostgresWriteOptions::default().with_if_exists(if_exists);
    dataset.write_postgres(server.url(), table, options)
}

fn one_column(column: ArrayRef) -> Dataset {
    let batch = RecordBatch::try_from_iter_with_nullable([("x", column, true)]).expect("a batch");
    Dataset::from_batches([batch]).expect("a dataset")
}

fn every_type_goes_back_as_it_came(server: &Server) {
    make_types(server, "sent");
    let sent = read(server, "SELECT * FROM sent");
    server.sql("CREATE TABLE back (LIKE sent)");
    assert_eq!(write(server, &sent, "back", IfExists::Append).expect("appends"), 3);
    // Where an array starts is not kept.
    for (at, (of, ..)) in
        TYPES.iter().enumerate().filter(|(_, (_, value, ..))| !value.contains("[5:6]"))
    {
        let [there, back] = ["sent", "back"].map(|table| {
            server.sql(&format!("SELECT quote_nullable(c{at}::text) FROM {table} ORDER BY 1"))
        });
        assert_eq!(back, there, "{of}");
        assert_eq!(
            back.matches("NULL\n").count() + usize::from(back.ends_with("NULL")),
            2,
            "{of}: {back}"
        );
    }
    // A table that is made has types of which the same dataset is read.
    let names = sent.schema().expect("schema");
    let names = names.fields().iter().zip(TYPES).filter(|(_, (of, ..))| *of != "oid");
    let known = sent.select(names.map(|(field, _)| field.name())).expect("select");
    assert_eq!(write(server, &known, "public.made", IfExists::Fail).expect("writes"), 3);
    let made = collect(&read(server, "SELECT * FROM made"));
    assert_eq!(made, collect(&known));
}

fn types_of_arrow_alone_become_others(server: &Server) {
    let nanoseconds = TimestampNanosecondArray::from(vec![Some(-1), Some(1_500)]);
    let fixed = FixedSizeListArray::from_iter_primitive::<Int32Type, _, _>(
        [Some(vec![Some(1), None]), None],
        2,
    );
    let dictionary: DictionaryArray<Int32Type> = vec![Some("a"), None].into_iter().collect();
    let decimals = Decimal32Array::from(vec![Some(-125), None]).with_precision_and_scale(5, 2);
    let cases: Vec<(&str, ArrayRef, &str, &str)> = vec![
        (
            "uint64",
            Arc::new(UInt64Array::from(vec![Some(u64::MAX), None])),
            "numeric",
            "18446744073709551615\n",
        ),
        ("uint8", Arc::new(UInt8Array::from(vec![255, 0])), "smallint", "255\n0"),
        (
            "float16",
            Arc::new(Float16Array::from(vec![half::f16::from_f32(0.5); 2])),
            "real",
            "0.5\n0.5",
        ),
        ("large", Arc::new(LargeStringArray::from(vec!["ä", ""])), "text", "ä\n"),
        (
            "views",
            Arc::new(StringViewArray::from(vec!["longer than twelve bytes", "b"])),
            "text",
            "longer than twelve bytes\nb",
        ),
        ("nulls", Arc::new(NullArray::new(2)), "text", "\n"),
        ("dictionary", Arc::new(dictionary), "text", "a\n"),
        ("decimal", Arc::new(decimals.expect("decimals")), "numeric", "-1.25\n"),
        ("fixed", Arc::new(fixed), "ARRAY", "{1,NULL}\n"),
        (
            "nanoseconds",
            Arc::new(nanoseconds),
            "timestamp without time zone",
            "1970-01-01 00:00:00\n1970-01-01 00:00:00.000001",
        ),
    ];
    for (name, column, of, shown) in cases {
        let table = format!("arrow_{name}");
        assert_eq!(write(server, &one_column(column), &table, IfExists::Fail).expect(name), 2);
        let got = server.sql(&format!("SELECT x FROM {table}"));
        assert_eq!(got, shown.trim(), "{name}");
        let got = server.sql(&format!(
            "SELECT data_type FROM information_schema.columns WHERE table_name = '{table}'"
        ));
        assert_eq!(got, of, "{name}");
    }
}

fn a_hundred_thousand_rows_go_there_and_back(server: &Server) {
    let dataset = Dataset::range(100_000)
        .and_then(|d| d.with_column("x", "CASE WHEN id % 7 <> 0 THEN id * 0.5 END"))
        .and_then(|d| d.with_column("t", "concat('row ', CAST(id AS VARCHAR))"))
        .expect("a dataset");
    assert_eq!(
        write(server, &dataset, "Large \"table\"", IfExists::Fail).expect("writes"),
        100_000
    );
    let back = read(server, "SELECT * FROM \"Large \"\"table\"\"\"");
    assert_eq!(back.count().expect("count"), 100_000);
    let (back, there) = (collect(&back), collect(&dataset));
    assert_eq!(back.columns(), there.columns());
    let none = dataset.filter("id < 0").expect("none");
    assert_eq!(write(server, &none, "empty", IfExists::Fail).expect("writes"), 0);
    assert_eq!(collect(&read(server, "SELECT * FROM empty")).num_columns(), 3);
}

fn tables_that_exist_are_kept_extended_or_replaced(server: &Server) {
    let rows = |count| Dataset::range(count).expect("a dataset");
    let ids = || server.sql("SELECT count(*) || ' ' || sum(id) FROM birds.ids");
    server.sql("CREATE SCHEMA birds");
    write(server, &rows(3), "birds.ids", IfExists::Append).expect("makes it");
    let exists = write(server, &rows(9), "birds.ids", IfExists::Fail);
    assert!(matches!(exists, Err(Error::TableExists { .. })), "{exists:?}");
    let text = said(exists);
    assert!(
        text.contains("has a table \"birds.ids\"") && text.contains("IfExists::Replace"),
        "{text}"
    );
    assert_eq!(ids(), "3 3");
    write(server, &rows(4), "birds.ids", IfExists::Append).expect("appends");
    assert_eq!(ids(), "7 9");
    let named = rows(2).with_column("name", "'b'").expect("a column");
    let text = said(write(server, &named, "birds.ids", IfExists::Append));
    assert!(text.contains("no column \"name\"; available: id"), "{text}");
    write(server, &named, "birds.ids", IfExists::Replace).expect("replaces");
    assert_eq!(
        (ids().as_str(), server.sql("SELECT max(name) FROM birds.ids").as_str()),
        ("2 1", "b")
    );
    // What the dataset has not gets its default, and the columns may be in another order.
    server.sql("CREATE TABLE birds.more (at int DEFAULT 7, name text, id smallint)");
    write(server, &named, "birds.more", IfExists::Append).expect("appends");
    assert_eq!(server.sql("SELECT * FROM birds.more WHERE id = 1"), "7|b|1");
    let text = said(write(server, &rows(1), "fish.ids", IfExists::Fail));
    assert!(text.contains("schema \"fish\" does not exist"), "{text}");
}

fn what_does_not_fit_is_named_and_nothing_is_written(server: &Server) {
    server.sql(
        "CREATE TABLE narrow (x smallint); CREATE TABLE ids (x uuid); CREATE TABLE few (x int[]); \
         CREATE TABLE positive (x bigint CHECK (x > 0)); CREATE TABLE moods (x bytea)",
    );
    let numbers = |rows: Vec<i64>| one_column(Arc::new(Int64Array::from(rows)) as ArrayRef);
    let text = |rows: Vec<&str>| one_column(Arc::new(StringArray::from(rows)) as ArrayRef);
    for (table, dataset, says) in [
        (
            "narrow",
            numbers(vec![1, 70_000]),
            "column \"x\" has 70000 in row 2, expected a value of int2",
        ),
        ("narrow", text(vec!["1"]), "column \"x\" is Utf8, where the table has int2"),
        ("ids", text(vec!["0a0b"]), "has text that is no UUID in row 1"),
        ("few", numbers(vec![1]), "is Int64, where the table has _int4"),
        ("moods", text(vec!["a"]), "is Utf8, where the table has bytea"),
        ("positive", numbers(vec![1, 0]), "violates check constraint"),
        ("absent", text(vec!["zero\0"]), "invalid byte sequence"),
    ] {
        let refused = said(write(server, &dataset, table, IfExists::Append));
        assert!(refused.contains(says), "{refused}");
        let count = server.ask(&format!("SELECT count(*) FROM {table}"));
        assert!(!matches!(&count, Ok(rows) if rows != "0"), "{table}: {count:?}");
        assert_eq!(count.is_err(), table == "absent");
    }
    let lists = vec![Some(vec![Some(1_i64), Some(1 << 40)])];
    let lists = arrow::array::ListArray::from_iter_primitive::<Int64Type, _, _>(lists);
    let refused = said(write(server, &one_column(Arc::new(lists)), "few", IfExists::Append));
    assert!(refused.contains("column \"x\" has [1, 1099511627776] in row 1"), "{refused}");
    let pairs = Dataset::range(1).and_then(|d| d.sql("SELECT struct(id, id) AS pair FROM dataset"));
    let refused = said(write(server, &pairs.expect("pairs"), "pairs", IfExists::Fail));
    assert!(refused.contains("column \"pair\" is Struct"), "{refused}");
}

fn fails_late(batch: &RecordBatch) -> Result<RecordBatch, BoxError> {
    match has(batch, 50_000) {
        true => Err("no such luck".into()),
        false => Ok(batch.clone()),
    }
}

/// Never gives the block that has row 50,000.
fn stops_late(batch: &RecordBatch) -> Result<RecordBatch, BoxError> {
    while has(batch, 50_000) {
        std::thread::park();
    }
    Ok(batch.clone())
}

fn has(batch: &RecordBatch, id: i64) -> bool {
    use arrow::array::AsArray;
    batch.column(0).as_primitive::<Int64Type>().values().contains(&id)
}

inventory::submit! { BatchFn::new("fails_late", fails_late) }
inventory::submit! { BatchFn::new("stops_late", stops_late) }

/// What this program is as another process.
pub(crate) fn endless(port: &str) -> ExitCode {
    let url = format!("postgres://tester@127.0.0.1:{port}/postgres");
    let rows = Dataset::range(100_000).and_then(|d| d.map_batches("stops_late")).expect("rows");
    let options = PostgresWriteOptions::default().with_if_exists(IfExists::Replace);
    rows.write_postgres(url, "cut", options).expect("it does not end");
    ExitCode::FAILURE
}

fn a_write_that_fails_or_is_killed_leaves_nothing(server: &Server) {
    let rows = Dataset::range(100_000).and_then(|d| d.map_batches("fails_late")).expect("rows");
    let text = said(write(server, &rows, "cut", IfExists::Fail));
    assert!(text.contains("no such luck"), "{text}");
    assert!(server.ask("SELECT * FROM cut").is_err(), "there is a table");

    write(server, &Dataset::range(7).expect("rows"), "cut", IfExists::Fail).expect("writes");
    said(write(server, &rows, "cut", IfExists::Replace));
    said(write(server, &rows, "cut", IfExists::Append));
    assert_eq!(server.sql("SELECT count(*) FROM cut"), "7");

    let mut child = Command::new(std::env::current_exe().expect("this program"));
    child.env(ENDLESS, server.port.to_string()).env("PGPASSWORD", PASSWORD).stdin(Stdio::null());
    let mut child = child.spawn().expect("starts");
    // Rows have come, into a table that replaces the other.
    let reached = poll(Duration::from_secs(60), || {
        let copied = server.sql("SELECT max(tuples_processed) FROM pg_stat_progress_copy");
        copied.parse().is_ok_and(|rows: u64| rows > 1000).then_some(())
    });
    child.kill().and_then(|()| child.wait()).expect("killed");
    reached.expect("rows come");
    assert_eq!(server.sql("SELECT count(*) FROM cut"), "7");
}

fn a_table_that_others_hold_is_not_waited_for_for_ever(server: &Server) {
    server.sql("CREATE TABLE taken (id bigint)");
    let hold = "BEGIN; LOCK TABLE taken IN ACCESS EXCLUSIVE MODE; SELECT pg_sleep(120)";
    let mut psql = server.psql().args(["-c", hold]).stdout(Stdio::null()).spawn().expect("psql");
    server.wait_for("SELECT pid FROM pg_locks WHERE mode = 'AccessExclusiveLock' AND relation = 'taken'::regclass AND granted");
    let options = PostgresWriteOptions::default().with_if_exists(IfExists::Append);
    let options = options.with_timeout(Duration::from_secs(1));
    let rows = Dataset::range(10).expect("rows");
    let silent = rows.write_postgres(server.url(), "taken", options);
    psql.kill().and_then(|()| psql.wait()).expect("killed");
    assert!(matches!(silent, Err(Error::DatabaseSilent { .. })), "{silent:?}");
    let text = said(silent);
    assert!(text.contains("cannot ask postgres://tester@127.0.0.1"), "{text}");
}
