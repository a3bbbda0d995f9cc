//! Servers and queries that do not do what they are asked.

use crate::Test;
use crate::read::{collect, read};
use crate::server::{Server, signal};
use mobula_data::{Dataset, Error, PostgresOptions};
use std::net::TcpListener;
use std::process::{Child, Stdio};
use std::thread;
use std::time::{Duration, Instant};

pub(crate) const TESTS: &[Test] = &[
    ("logins_that_fail_say_why", logins_that_fail_say_why),
    ("queries_that_fail_say_where", queries_that_fail_say_where),
    (
        "values_and_types_that_arrow_has_not_are_named",
        values_and_types_that_arrow_has_not_are_named,
    ),
    (
        "a_server_that_dies_while_it_is_read_is_an_error",
        a_server_that_dies_while_it_is_read_is_an_error,
    ),
    ("a_server_that_stops_is_not_waited_for", a_server_that_stops_is_not_waited_for),
    ("a_reader_can_change_nothing", a_reader_can_change_nothing),
];

/// What is said, which must not be the password.
pub(crate) fn said<T>(result: Result<T, Error>) -> String {
    let error = result.err().expect("an error");
    for text in [mobula_core::error::chain(&error), format!("{error:?}")] {
        assert!(!text.contains("s3cr") && !text.contains("wr0ng"), "{text}");
    }
    mobula_core::error::chain(&error)
}

fn logins_that_fail_say_why(server: &Server) {
    let one = |url: &str| Dataset::read_postgres(url, "SELECT 1 AS one");
    let (url, port) = (server.url(), server.port);
    let refused = |url: &str, says: &[&str]| {
        let result = one(url);
        assert!(matches!(result, Err(Error::DatabaseRefused { .. })), "{result:?}");
        let text = said(result);
        assert!(says.iter().all(|says| text.contains(says)), "{text}");
    };
    refused(
        &format!("postgres://tester:wr0ng@127.0.0.1:{port}/postgres"),
        &[
            &format!("postgres://tester@127.0.0.1:{port}/postgres cannot be used"),
            "password authentication failed for user \"tester\" (SQLSTATE 28P01)",
            "PGPASSWORD",
        ],
    );
    let birds = url.replace("/postgres", "/birds");
    refused(&birds, &["database \"birds\" does not exist", "behind the last /"]);
    refused(&format!("{url}?sslmode=require"), &["sslmode=require asks for TLS", "tunnel of ssh"]);

    let free =
        TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("a port");
    let gone = one(&format!("postgres://tester:s3cret@{free}/postgres"));
    assert!(matches!(gone, Err(Error::DatabaseGone { .. })), "{gone:?}");
    let text = said(gone);
    assert!(
        text.contains(&format!("cannot connect to postgres://tester@{free}/postgres")),
        "{text}"
    );
    assert!(text.contains("refused") && text.contains("check that the server runs"), "{text}");
    let text = said(one("postgres://tester:s3cret@nowhere.invalid/postgres"));
    assert!(text.contains("nowhere.invalid"), "{text}");

    // One that accepts, and says nothing.
    let mute = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = mute.local_addr().expect("an address");
    let start = Instant::now();
    let silent = one(&format!("postgres://tester:s3cret@{address}/postgres?connect_timeout=1"));
    assert!(matches!(silent, Err(Error::DatabaseSilent { .. })), "{silent:?}");
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    let text = said(silent);
    assert!(text.contains("said nothing for 1s"), "{text}");
}

fn queries_that_fail_say_where(server: &Server) {
    for (query, says) in [
        ("SELEC 1", "(line 1, column 1): syntax error at or near \"SELEC\" (SQLSTATE 42601)"),
        (
            "SELECT 'ä',\n  bird FROM birds",
            "(line 2, column 13): relation \"birds\" does not exist",
        ),
        ("SELECT 1; SELECT 2", "cannot insert multiple commands"),
        ("SELECT $1::int AS x", "parameters such as $1"),
        ("CREATE TABLE made (x int)", "gives no columns"),
        ("SELECT 1 AS x, 2 AS x", "two columns \"x\""),
        ("SELECT length(1)", "hint: No function matches"),
    ] {
        let text = said(Dataset::read_postgres(server.url(), query));
        assert!(text.contains(says), "{text}");
    }
    // Found out while rows come.
    let late = read(server, "SELECT 10 / (9 - i) AS x FROM generate_series(1, 20) AS i");
    let text = said(late.collect());
    assert!(text.contains("division by zero (SQLSTATE 22012)"), "{text}");
    assert!(text.contains("SELECT 10 / (9 - i)"), "{text}");
}

fn values_and_types_that_arrow_has_not_are_named(server: &Server) {
    for (of, got) in [
        ("interval '1 day'", "interval"),
        ("point '(1, 2)'", "point"),
        ("1::numeric(80, 2)", "numeric(80, 2)"),
        ("'{1 day}'::interval[]", "_interval"),
    ] {
        let result = Dataset::read_postgres(server.url(), format!("SELECT 1 AS a, {of} AS b"));
        assert!(matches!(result, Err(Error::ColumnType { .. })), "{result:?}");
        let text = said(result);
        assert!(text.contains(&format!("column \"b\" is {got}, expected")), "{text}");
        assert!(text.contains("CAST(column AS text)"), "{text}");
    }
    for (of, got) in [
        ("date 'infinity'", "infinity"),
        ("timestamptz '-infinity'", "infinity"),
        ("'NaN'::numeric(5, 2)", "NaN"),
        ("'{{1, 2}, {3, 4}}'::int[]", "more than one dimension"),
    ] {
        let query = format!(
            "SELECT i, CASE i WHEN 2000 THEN {of} END AS b FROM generate_series(1, 3000) i"
        );
        let query = match of.contains("numeric") {
            true => format!("SELECT i, b::numeric(5, 2) FROM ({query}) AS q"),
            false => query,
        };
        let result = read(server, &query).collect();
        assert!(matches!(result, Err(Error::ColumnValue { .. })), "{result:?}");
        let text = said(result);
        assert!(text.contains("column \"b\" has ") && text.contains(got), "{text}");
        assert!(text.contains("in row 2000, expected"), "{text}");
    }
}

/// A `psql` whose session holds a lock; the server sleeps in it until it ends itself.
struct Lock {
    psql: Child,
}

impl Lock {
    fn take(server: &Server, key: u32) -> Self {
        let hold = format!("SELECT pg_advisory_lock({key}); SELECT pg_sleep(120)");
        let psql =
            server.psql().args(["-c", &hold]).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let lock = Self { psql: psql.expect("psql") };
        server.wait_for(&format!(
            "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND objid = {key} AND granted"
        ));
        lock
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        let _ = self.psql.kill();
        let _ = self.psql.wait();
    }
}

/// Which process of the server waits for the lock.
fn waiting(server: &Server, key: u32) -> String {
    server.wait_for(&format!(
        "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND objid = {key} AND NOT granted"
    ))
}

/// Rows, of which one in the middle does not come while somebody holds the lock.
fn held(server: &Server, key: u32, timeout: Duration) -> Dataset {
    let query = format!(
        "SELECT i, CASE i WHEN 50000 THEN pg_advisory_lock({key})::text END AS t \
         FROM generate_series(1, 100000) AS i"
    );
    let options = PostgresOptions::default().with_timeout(timeout);
    Dataset::read_postgres_with(server.url(), query, options).expect("a dataset")
}

fn a_server_that_dies_while_it_is_read_is_an_error(server: &Server) {
    let long = Duration::from_secs(300);
    // Told to end, it says so.
    let lock = Lock::take(server, 1);
    let rows = held(server, 1, long);
    let reader = thread::spawn(move || rows.collect());
    let pid = waiting(server, 1);
    server.sql(&format!("SELECT pg_terminate_backend({pid})"));
    let result = reader.join().expect("no panic");
    assert!(matches!(result, Err(Error::DatabaseGone { .. })), "{result:?}");
    let text = said(result);
    assert!(text.contains("cannot read from postgres://tester@127.0.0.1"), "{text}");
    assert!(text.contains("terminating connection"), "{text}");
    drop(lock);

    // Killed, it says nothing. All of a server restarts then, so it is another one.
    let other = Server::start().expect("a server");
    let _lock = Lock::take(&other, 2);
    let rows = held(&other, 2, long);
    let reader = thread::spawn(move || rows.collect());
    let start = Instant::now();
    signal("KILL", &waiting(&other, 2));
    let result = reader.join().expect("no panic");
    assert!(matches!(result, Err(Error::DatabaseGone { .. })), "{result:?}");
    said(result);
    assert!(start.elapsed() < Duration::from_secs(30), "{:?}", start.elapsed());
}

fn a_server_that_stops_is_not_waited_for(server: &Server) {
    let _lock = Lock::take(server, 3);
    let start = Instant::now();
    let result = held(server, 3, Duration::from_secs(1)).collect();
    assert!(matches!(result, Err(Error::DatabaseSilent { .. })), "{result:?}");
    let text = said(result);
    assert!(text.contains("said nothing for 1s") && text.contains("with_timeout"), "{text}");
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    // What nobody waits for any more is given up.
    server.wait_for(
        "SELECT 'none' WHERE NOT EXISTS (SELECT 1 FROM pg_locks \
         WHERE locktype = 'advisory' AND objid = 3 AND NOT granted)",
    );
}

fn a_reader_can_change_nothing(server: &Server) {
    server.sql("CREATE TABLE still (x int); INSERT INTO still VALUES (1); CREATE SEQUENCE counter");
    server.sql(
        "CREATE FUNCTION change() RETURNS int AS 'DELETE FROM still RETURNING x' LANGUAGE sql VOLATILE",
    );
    let text = said(read(server, "SELECT change() AS x").collect());
    assert!(text.contains("cannot execute DELETE in a read-only transaction"), "{text}");
    assert_eq!(collect(&read(server, "SELECT x FROM still")).num_rows(), 1);
}
