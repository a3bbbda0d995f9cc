//! What a dataset has of a query.

use crate::Test;
use crate::server::{PASSWORD, Server};
use arrow::array::{Array, AsArray, RecordBatch};
use arrow::datatypes::Int32Type;
use arrow::util::display::array_value_to_string;
use mobula_core::{BatchSource, Shard};
use mobula_data::{Dataset, PostgresOptions, StorageLevel, StreamOptions, TensorSource};
use std::ffi::OsStr;
use std::path::Path;
use std::process::{Command, ExitCode};

pub(crate) const TESTS: &[Test] = &[
    ("every_type_comes_as_it_is", every_type_comes_as_it_is),
    ("rows_come_in_blocks_that_are_read_again", rows_come_in_blocks_that_are_read_again),
    (
        "partitions_have_each_row_once_as_of_one_moment",
        partitions_have_each_row_once_as_of_one_moment,
    ),
    ("partitions_are_by_any_whole_numbers", partitions_are_by_any_whole_numbers),
    ("processes_have_the_same_epoch_or_none", processes_have_the_same_epoch_or_none),
    ("results_beyond_memory_are_kept_on_disk", results_beyond_memory_are_kept_on_disk),
    ("descriptions_have_no_password", descriptions_have_no_password),
    ("the_environment_says_what_the_url_does_not", the_environment_says_what_the_url_does_not),
];

/// Tells this program to read an epoch of the stream in a file.
pub(crate) const STREAM: &str = "MOBULA_TEST_STREAM";

pub(crate) fn read(server: &Server, query: &str) -> Dataset {
    Dataset::read_postgres(server.url(), query).unwrap_or_else(|error| panic!("{query}: {error}"))
}

pub(crate) fn collect(dataset: &Dataset) -> RecordBatch {
    dataset.collect().expect("rows")
}

/// A type, a value of it in SQL, the type that it has in Arrow, and how that prints the value.
pub(crate) const TYPES: &[(&str, &str, &str, &str)] = &[
    ("boolean", "true", "Boolean", "true"),
    ("smallint", "-32768", "Int16", "-32768"),
    ("integer", "2147483647", "Int32", "2147483647"),
    ("bigint", "-9223372036854775808", "Int64", "-9223372036854775808"),
    ("oid", "4294967295", "UInt32", "4294967295"),
    ("real", "1.5", "Float32", "1.5"),
    ("double precision", "'-Infinity'", "Float64", "-inf"),
    ("numeric(10, 3)", "-1234567.891", "Decimal128(10, 3)", "-1234567.891"),
    (
        "numeric(38, 0)",
        "99999999999999999999999999999999999999",
        "Decimal128(38, 0)",
        "99999999999999999999999999999999999999",
    ),
    (
        "numeric(38, 19)",
        "9999999999999999999.0000000000000000001",
        "Decimal128(38, 19)",
        "9999999999999999999.0000000000000000001",
    ),
    (
        "numeric(50, 2)",
        "123456789012345678901234567890123456789012345678.25",
        "Decimal256(50, 2)",
        "123456789012345678901234567890123456789012345678.25",
    ),
    ("numeric(3, -2)", "12300", "Decimal128(5, 0)", "12300"),
    ("numeric(2, 4)", "0.0012", "Decimal128(4, 4)", "0.0012"),
    ("numeric", "0.1", "Float64", "0.1"),
    ("text", "'ä\n\"'", "Utf8", "ä\n\""),
    ("varchar(5)", "'five5'", "Utf8", "five5"),
    ("char(4)", "'ab'", "Utf8", "ab  "),
    ("name", "'a name'", "Utf8", "a name"),
    ("json", "'{\"a\":  1}'", "Utf8", "{\"a\":  1}"),
    ("jsonb", "'{\"a\":  1}'", "Utf8", "{\"a\": 1}"),
    (
        "uuid",
        "'0a0b0c0d-0000-4000-8000-00000000000f'",
        "Utf8",
        "0a0b0c0d-0000-4000-8000-00000000000f",
    ),
    ("mood", "'happy'", "Utf8", "happy"),
    ("year", "1999", "Int32", "1999"),
    ("bytea", "'\\x00ff'", "Binary", "00ff"),
    ("date", "'1969-12-31'", "Date32", "1969-12-31"),
    ("date", "'4713-01-01 BC'", "Date32", "-4712-01-01"),
    ("time", "'23:59:59.123456'", "Time64(µs)", "23:59:59.123456"),
    ("timestamp", "'1999-12-31 23:59:59.000001'", "Timestamp(µs)", "1999-12-31T23:59:59.000001"),
    ("timestamptz", "'2000-01-01 00:00:00+02'", "Timestamp(µs, \"UTC\")", "1999-12-31T22:00:00Z"),
    ("integer[]", "'{1, NULL, 3}'", "List(Int32)", "[1, , 3]"),
    ("text[]", "'{a, \"\", NULL}'", "List(Utf8)", "[a, , ]"),
    ("double precision[]", "'{}'", "List(Float64)", "[]"),
    ("numeric(6, 2)[]", "'{1.25, 9999.99}'", "List(Decimal128(6, 2))", "[1.25, 9999.99]"),
    ("boolean[]", "'{t, f}'", "List(Boolean)", "[true, false]"),
    ("date[]", "'{2000-01-01}'", "List(Date32)", "[2000-01-01]"),
    ("integer[]", "'[5:6]={7, 8}'", "List(Int32)", "[7, 8]"),
];

/// Makes a table with a column, and its only value, for each of [`TYPES`], between rows without values.
pub(crate) fn make_types(server: &Server, table: &str) {
    // Others may have made them.
    let _ = server.ask("CREATE TYPE mood AS ENUM ('sad', 'happy')");
    let _ = server.ask("CREATE DOMAIN year AS integer CHECK (VALUE > 1900)");
    let columns = TYPES.iter().enumerate().map(|(at, (of, ..))| format!("c{at} {of}"));
    let columns: Vec<_> = columns.collect();
    let values: Vec<_> = TYPES.iter().map(|(_, value, ..)| *value).collect();
    server.sql(&format!(
        "CREATE TABLE {table} ({}); INSERT INTO {table} DEFAULT VALUES; INSERT INTO {table} VALUES ({}); \
         INSERT INTO {table} DEFAULT VALUES",
        columns.join(", "),
        values.join(", ")
    ));
}

fn every_type_comes_as_it_is(server: &Server) {
    make_types(server, "types");
    let rows = collect(&read(server, "SELECT * FROM types"));
    assert_eq!(rows.num_rows(), 3);
    for (at, (sql, _, arrow, shown)) in TYPES.iter().enumerate() {
        let column = rows.column(at);
        assert_eq!(column.data_type().to_string(), *arrow, "{sql}");
        assert_eq!(array_value_to_string(column, 1).expect("text"), *shown, "{sql}");
        assert_eq!([0, 1, 2].map(|row| column.is_null(row)), [true, false, true], "{sql}");
    }
    let none = collect(&read(server, "SELECT * FROM types WHERE false"));
    assert_eq!((none.num_rows(), none.schema()), (0, rows.schema()));
}

fn numbers(server: &Server, table: &str, rows: u32) -> Dataset {
    server.sql(&format!(
        "CREATE TABLE {table} AS SELECT i AS id, (i * 7919 % 100003)::real AS x, 'row ' || i AS t \
         FROM generate_series(1, {rows}) AS i"
    ));
    read(server, &format!("SELECT id, x, t FROM {table}"))
}

fn rows_come_in_blocks_that_are_read_again(server: &Server) {
    let dataset = numbers(server, "blocks", 100_000);
    assert_eq!(dataset.count().expect("count"), 100_000);
    let mut expected = 0;
    for batch in dataset.batches().expect("batches") {
        let batch = batch.expect("a batch");
        assert!(batch.num_rows() <= 4096);
        for (row, id) in batch.column(0).as_primitive::<Int32Type>().values().iter().enumerate() {
            expected += 1;
            assert_eq!(*id, expected);
            assert_eq!(batch.column(2).as_string::<i32>().value(row), format!("row {expected}"));
        }
    }
    assert_eq!(expected, 100_000);
    // The columns of others have to be read for that, and are there.
    let evens = dataset.filter("id % 2 = 0 AND t LIKE '%8'").expect("filter").select(["x"]);
    assert_eq!(evens.and_then(|d| d.count()).expect("count"), 10_000);
    let explained = dataset.explain().expect("explain");
    assert!(explained.contains("SELECT id, x, t FROM blocks of postgres://tester@127.0.0.1"));
    assert!(explained.contains("(25 blocks, 100000 rows)"), "{explained}");
    // Where and by how many processes a table is read is not left to chance.
    let query = "SELECT current_setting('synchronize_seqscans') AS a, \
                 current_setting('max_parallel_workers_per_gather') AS b, k \
                 FROM generate_series(1, 2) AS k";
    for options in [PostgresOptions::default(), PostgresOptions::default().with_partitions("k", 2)]
    {
        let settings = Dataset::read_postgres_with(server.url(), query, options).expect("settings");
        let settings = collect(&settings);
        for row in 0..2 {
            let [a, b] = [0, 1].map(|at| settings.column(at).as_string::<i32>().value(row));
            assert_eq!((a, b), ("off", "0"));
        }
    }
    // What was read is what there was, whatever the table has now.
    server.sql("DROP TABLE blocks");
    assert_eq!(collect(&dataset).num_rows(), 100_000);
}

fn partitions_have_each_row_once_as_of_one_moment(server: &Server) {
    server.sql(
        "CREATE TABLE parts AS SELECT CASE WHEN i % 10 <> 0 THEN i END AS k, i AS id \
         FROM generate_series(-500, 12000) AS i",
    );
    // Somebody changes the database all the time.
    server.sql("CREATE TABLE enough (x int); CREATE TABLE busy (x int)");
    let work = "DO $$ BEGIN LOOP INSERT INTO busy VALUES (1); COMMIT; \
                EXIT WHEN EXISTS (SELECT FROM enough); END LOOP; END $$";
    let mut worker = server.psql().args(["-c", work]).spawn().expect("psql");
    server.wait_for("SELECT 'some' WHERE EXISTS (SELECT FROM busy)");
    let query = "SELECT k, id, pg_current_snapshot()::text AS moment, pg_backend_pid() AS pid \
                 FROM parts ORDER BY id -- all of them";
    let options = PostgresOptions::default().with_partitions("k", 4);
    let rows = Dataset::read_postgres_with(server.url(), query, options);
    let rows = collect(&rows.expect("a dataset"));
    server.sql("INSERT INTO enough VALUES (1)");
    worker.wait().expect("it has ended");
    let mut ids = rows.column(1).as_primitive::<Int32Type>().values().to_vec();
    ids.sort_unstable();
    assert_eq!(ids, (-500..=12000).collect::<Vec<_>>());
    let kinds = |column: usize| {
        let column = rows.column(column);
        let all = (0..column.len()).map(|row| array_value_to_string(column, row).expect("text"));
        all.collect::<std::collections::BTreeSet<_>>().len()
    };
    assert_eq!((kinds(2), kinds(3)), (1, 4), "moments and connections");
    let keys = rows.column(0).as_primitive::<Int32Type>();
    assert!(keys.iter().flatten().is_sorted(), "range by range");
}

fn partitions_are_by_any_whole_numbers(server: &Server) {
    server.sql(
        "CREATE TABLE pieces AS SELECT CASE WHEN i % 10 <> 0 THEN i END AS k, 'row' AS t \
         FROM generate_series(-500, 12000) AS i",
    );
    let parted = |query: &str, column: &str, count| {
        let options = PostgresOptions::default().with_partitions(column, count);
        Dataset::read_postgres_with(server.url(), query, options)
    };
    // All values the same, no row, no value, all with one.
    for (rows, filter) in
        [(1, "k = 7"), (0, "false"), (1251, "k IS NULL"), (11_250, "k IS NOT NULL")]
    {
        let query = format!("SELECT * FROM pieces WHERE {filter};");
        assert_eq!(
            parted(&query, "k", 3).and_then(|d| d.count()).expect("count"),
            rows,
            "{filter}"
        );
    }
    for (column, count, says) in [
        ("t", 2, "column \"t\" is Utf8, expected whole numbers"),
        ("kk", 2, "no column \"kk\"; available: k, t"),
        ("k", 0, "the number of partitions is 0, expected at least 1"),
    ] {
        let text = parted("SELECT * FROM pieces", column, count).expect_err(says).to_string();
        assert!(text.contains(says), "{text}");
    }
}

fn stream(dataset: &Dataset) -> TensorSource {
    let options = StreamOptions::unlabelled(["id", "x"]).with_batch_size(64).with_shuffle(7);
    dataset.stream(options).expect("a stream")
}

/// The rows of an epoch in their order, as a number.
fn epoch_of(source: &TensorSource) -> Result<String, mobula_core::Error> {
    let (mut stream, mut hash, mut rows) = (source.open(Shard::ALL)?, crc32fast::Hasher::new(), 0);
    while let Some(batch) = stream.next_batch()? {
        for name in ["id", "x"] {
            let values = batch.get(name)?.flatten_all().and_then(|v| v.to_vec1::<f32>());
            values.expect("floats").iter().for_each(|value| hash.update(&value.to_le_bytes()));
        }
        rows += batch.rows();
    }
    Ok(format!("{rows} rows, {:08x}", hash.finalize()))
}

/// What this program is as another process.
pub(crate) fn epoch(path: &OsStr) -> ExitCode {
    let bytes = std::fs::read(path).expect("a description");
    let source: TensorSource = match Path::new(path).extension().is_some_and(|of| of == "json") {
        true => serde_json::from_slice(&bytes).expect("JSON"),
        false => rmp_serde::from_slice(&bytes).expect("MessagePack"),
    };
    match epoch_of(&source) {
        Ok(epoch) => println!("{epoch}"),
        Err(error) => println!("{}", mobula_core::error::chain(&error)),
    }
    ExitCode::SUCCESS
}

/// An epoch in another process, or why there is none.
fn elsewhere(source: &TensorSource, ending: &str, password: Option<&str>) -> String {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join(format!("stream.{ending}"));
    let bytes = match ending {
        "json" => serde_json::to_vec(source).expect("JSON"),
        _ => rmp_serde::to_vec_named(source).expect("MessagePack"),
    };
    std::fs::write(&path, bytes).expect("write");
    let mut child = Command::new(std::env::current_exe().expect("this program"));
    child.env(STREAM, &path).env_remove("PGPASSWORD");
    child.envs(password.map(|password| ("PGPASSWORD", password)));
    let output = child.output().expect("runs");
    assert!(output.status.success(), "{output:?}");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

fn processes_have_the_same_epoch_or_none(server: &Server) {
    let dataset = numbers(server, "epochs", 20_000);
    let source = stream(&dataset);
    let here = epoch_of(&source).expect("an epoch");
    assert!(here.starts_with("20000 rows, "), "{here}");
    assert_eq!(elsewhere(&source, "rmp", None), here);
    // In JSON there is no password.
    assert_eq!(elsewhere(&source, "json", Some(PASSWORD)), here);
    let refused = elsewhere(&source, "json", None);
    assert!(refused.contains("password missing; give user and password"), "{refused}");

    // What is kept is for other processes as well, which need no server then.
    let kept = stream(&dataset.persist(StorageLevel::Disk).expect("kept"));
    server.sql("UPDATE epochs SET x = x + 1 WHERE id = 77");
    assert_eq!(elsewhere(&kept, "rmp", None), here);
    let changed = elsewhere(&source, "rmp", None);
    assert!(changed.contains("manifest"), "{changed}");
    assert_eq!(epoch_of(&source).expect("an epoch"), here, "here nothing has changed");
    server.sql("ALTER TABLE epochs ALTER COLUMN id TYPE bigint");
    let changed = elsewhere(&source, "rmp", None);
    assert!(changed.contains("[id: Int64, x: Float32, t: Utf8] now"), "{changed}");
}

fn descriptions_have_no_password(server: &Server) {
    let dataset = read(server, "SELECT 1 AS one");
    let json = serde_json::to_string(&dataset).expect("JSON");
    for text in [json.clone(), format!("{dataset:?}"), dataset.explain().expect("explain")] {
        assert!(text.contains("postgres://tester@127.0.0.1") && !text.contains("s3cr"), "{text}");
    }
    assert_eq!(collect(&dataset).column(0).as_primitive::<Int32Type>().values(), &[1]);
    let packed = rmp_serde::to_vec_named(&dataset).expect("MessagePack");
    let there: Dataset = rmp_serde::from_slice(&packed).expect("MessagePack");
    assert_eq!(collect(&there), collect(&dataset));
    let there: Dataset = serde_json::from_str(&json).expect("JSON");
    let text = there.collect().expect_err("no password").to_string();
    assert!(text.contains("PGPASSWORD"), "{text}");
}

fn the_environment_says_what_the_url_does_not(server: &Server) {
    // A process of its own, as its environment is all threads'.
    let dataset =
        Dataset::read_postgres(server.url(), "SELECT id FROM generate_series(1, 64) AS id");
    let source =
        dataset.and_then(|d| d.with_column("x", "id")).map(|d| stream(&d)).expect("stream");
    let expected = elsewhere(&source, "rmp", None);
    assert!(expected.starts_with("64 rows"), "{expected}");
    let json = serde_json::to_string(&source).expect("JSON");
    let place = format!("postgres://tester@127.0.0.1:{}/postgres", server.port);
    assert!(json.contains(&place), "{json}");
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("stream.json");
    std::fs::write(&path, json.replace(&place, "postgres:///")).expect("write");
    let socket = server.folder().to_str().expect("UTF-8");
    for host in ["127.0.0.1", socket] {
        let mut child = Command::new(std::env::current_exe().expect("this program"));
        child.env(STREAM, &path).env("PGHOST", host).env("PGPORT", server.port.to_string());
        child.env("PGUSER", "tester").env("PGPASSWORD", PASSWORD).env("PGDATABASE", "postgres");
        let said = |child: &mut Command| {
            let output = child.output().expect("runs");
            String::from_utf8_lossy(&output.stdout).trim().to_owned()
        };
        assert_eq!(said(&mut child), expected);
        let text = said(child.env("PGSSLMODE", "require"));
        assert!(text.contains("sslmode=require asks for TLS"), "{text}");
    }
}

/// Tells this program to read more from the server on a port than it may keep in memory.
pub(crate) const LARGE: &str = "MOBULA_TEST_LARGE";

/// What this program is as another process: how much memory it had at most, in KiB.
pub(crate) fn large(port: &str) -> ExitCode {
    let url = format!("postgres://tester@127.0.0.1:{port}/postgres");
    let query = "SELECT i, repeat('wide', 250) AS t FROM generate_series(1, 300000) AS i";
    let rows = Dataset::read_postgres(url, query).and_then(|rows| rows.count()).expect("rows");
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a peak");
    println!("{rows} {}", peak.trim_end_matches("kB").trim());
    ExitCode::SUCCESS
}

/// 300 MB, in a process that may keep 16.
fn results_beyond_memory_are_kept_on_disk(server: &Server) {
    let mut child = Command::new(std::env::current_exe().expect("this program"));
    child.env(LARGE, server.port.to_string()).env("PGPASSWORD", PASSWORD);
    let output = child.env("MOBULA_DATA_BYTES", "32000000").output().expect("runs");
    let text = String::from_utf8_lossy(&output.stdout);
    let (rows, peak) = text.trim().split_once(' ').unwrap_or_else(|| panic!("{output:?}"));
    assert_eq!(rows, "300000");
    let peak: u64 = peak.parse().expect("a number");
    assert!(peak < 150 << 10, "{peak} KiB");
}
