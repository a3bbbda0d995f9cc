//! Queries on a real cluster: a scheduler and two executors, which are this program.

use arrow::array::{ArrayRef, AsArray, Int64Array, StringArray, UInt32Array};
use arrow::compute::concat_batches;
use arrow::datatypes::{DataType, Float64Type, Int64Type, UInt32Type};
use arrow::record_batch::RecordBatch;
use arrow::util::pretty::pretty_format_batches;
use libtest_mimic::{Arguments, Trial};
use mobula_ballista::{
    Ballista, ExecutorProcessConfig, SchedulerConfig, run_executor, run_scheduler,
};
use mobula_core::BoxError;
use mobula_core::world::free_port;
use mobula_data::backend::query_on;
use mobula_data::{
    AggregateFn, Aggregator, BatchFn, CsvOptions, Dataset, FnTypes, ScalarFn, StandardScaler,
    WriteOptions, inventory, query,
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What a process of a cluster is told: its role, and its ports.
const ROLE: &str = "MOBULA_BALLISTA_TEST_ROLE";
const PORTS: &str = "MOBULA_BALLISTA_TEST_PORTS";

const LONG: Duration = Duration::from_secs(60);
const EXECUTORS: usize = 2;

fn main() -> ExitCode {
    match std::env::var(ROLE).as_deref() {
        Ok("scheduler") => ended(run_scheduler(scheduler_config())),
        Ok("executor") => ended(run_executor(executor_config())),
        _ => tests(),
    }
}

fn ended(result: Result<(), mobula_ballista::Error>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}: {:?}", std::error::Error::source(&error));
            ExitCode::FAILURE
        }
    }
}

fn tests() -> ExitCode {
    let cases: [(&str, fn()); 8] = [
        ("datasets_are_read_by_the_executors", datasets),
        ("functions_run_in_the_executors", functions),
        ("files_are_read_by_the_executors", files),
        ("an_order_that_is_asked_for_is_kept", order),
        ("a_killed_executor_loses_nothing", killed),
        ("what_a_function_says_is_told", failing),
        ("other_files_than_were_planned_for_are_refused", changed),
        ("a_scheduler_that_is_not_there_is_named", nobody),
    ];
    let trial = |(name, case): (&str, fn())| {
        Trial::test(name, move || {
            case();
            Ok(())
        })
    };
    let trials = cases.into_iter().map(trial).collect();
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

fn ports() -> Vec<u16> {
    let ports = std::env::var(PORTS).expect("ports");
    ports.split(',').map(|port| port.parse().expect("a port")).collect()
}

fn scheduler_config() -> SchedulerConfig {
    SchedulerConfig {
        bind_host: "127.0.0.1".to_owned(),
        bind_port: ports()[0],
        external_host: "127.0.0.1".to_owned(),
        min_ready_executors: EXECUTORS,
        executor_timeout_seconds: 4,
        expire_dead_executor_interval_seconds: 1,
        ..SchedulerConfig::default()
    }
}

fn executor_config() -> ExecutorProcessConfig {
    let ports = ports();
    ExecutorProcessConfig {
        scheduler_host: "127.0.0.1".to_owned(),
        scheduler_port: ports[0],
        port: ports[1],
        grpc_port: ports[2],
        external_host: Some("127.0.0.1".to_owned()),
        scheduler_connect_timeout_seconds: 30,
        executor_heartbeat_interval_seconds: 1,
        vcores: 2,
        work_dir: std::env::current_dir().ok().and_then(|dir| dir.to_str().map(str::to_owned)),
        ..ExecutorProcessConfig::default()
    }
}

/// Its processes end with it.
struct Cluster {
    scheduler: u16,
    processes: Vec<Child>,
    folder: tempfile::TempDir,
}

impl Cluster {
    fn start() -> Self {
        let ports = (0..1 + 2 * EXECUTORS).map(|_| free_port().expect("a port"));
        let ports: Vec<_> = ports.collect();
        let folder = tempfile::tempdir().expect("a folder");
        let mut cluster = Self { scheduler: ports[0], processes: Vec::new(), folder };
        cluster.spawn("scheduler", &ports[..1]);
        for of in ports[1..].chunks(2) {
            cluster.spawn("executor", &[ports[0], of[0], of[1]]);
        }
        cluster.wait_until_ready();
        cluster
    }

    fn spawn(&mut self, role: &str, ports: &[u16]) {
        let work = self.folder.path().join(format!("{role}-{}", ports[ports.len() - 1]));
        std::fs::create_dir(&work).expect("a folder");
        let log = std::fs::File::create(work.join("log")).expect("a log");
        let ports: Vec<_> = ports.iter().map(u16::to_string).collect();
        let mut command = Command::new(std::env::current_exe().expect("this binary"));
        command.env(ROLE, role).env(PORTS, ports.join(",")).current_dir(&work);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        self.processes.push(command.spawn().expect("starts"));
    }

    /// The scheduler says so once all executors are known to it.
    fn wait_until_ready(&mut self) {
        let deadline = Instant::now() + LONG;
        while !is_ready(self.scheduler) {
            for process in &mut self.processes {
                let status = process.try_wait().expect("a child of ours");
                assert!(status.is_none(), "a process has ended: {}", logs(self.folder.path()));
            }
            assert!(Instant::now() < deadline, "not ready: {}", logs(self.folder.path()));
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn backend(&self) -> Ballista {
        let url = format!("http://127.0.0.1:{}", self.scheduler);
        Ballista::new(&url).expect("an address").with_partitions(4)
    }

    fn query<const N: usize>(&self, sql: &str, tables: [(&str, Dataset); N]) -> RecordBatch {
        match on(&self.backend(), sql, tables) {
            Ok(rows) => rows,
            Err(error) => panic!("{sql}: {}\n{}", told(error), logs(self.folder.path())),
        }
    }

    /// The same rows as here, whatever their order.
    fn must_be_as_here<const N: usize>(&self, sql: &str, tables: [(&str, Dataset); N]) {
        let (there, here) = (self.query(sql, tables.clone()), query(sql, tables).expect("here"));
        assert_eq!(there.schema(), here.schema(), "{sql}");
        assert!(here.num_rows() > 0, "{sql}");
        assert_eq!(sorted_lines(&there), sorted_lines(&here), "{sql}");
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for process in &mut self.processes {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

fn is_ready(port: u16) -> bool {
    let Ok(mut stream) = TcpStream::connect(("127.0.0.1", port)) else { return false };
    let request = b"GET /readyz HTTP/1.1\r\nHost: scheduler\r\nConnection: close\r\n\r\n";
    let mut answer = String::new();
    let _ = stream.set_read_timeout(Some(LONG));
    let read = stream.write_all(request).and_then(|()| stream.read_to_string(&mut answer));
    read.is_ok() && answer.starts_with("HTTP/1.1 200")
}

fn logs(folder: &Path) -> String {
    let mut text = String::new();
    for process in std::fs::read_dir(folder).expect("a folder").flatten() {
        let log = std::fs::read_to_string(process.path().join("log")).unwrap_or_default();
        text += &format!("\n-- {}\n{log}", process.path().display());
    }
    text
}

fn on<const N: usize>(
    backend: &Ballista,
    sql: &str,
    tables: [(&str, Dataset); N],
) -> mobula_data::Result<RecordBatch> {
    let rows = query_on(backend, sql, tables)?;
    let schema = rows.schema();
    Ok(concat_batches(&schema, &rows.collect::<mobula_data::Result<Vec<_>>>()?)?)
}

fn told(error: mobula_data::Error) -> String {
    mobula_core::error::chain(&mobula_core::Error::from(error))
}

fn sorted_lines(rows: &RecordBatch) -> Vec<String> {
    let text = pretty_format_batches(std::slice::from_ref(rows)).expect("a table").to_string();
    let mut lines: Vec<_> = text.lines().map(str::to_owned).collect();
    lines.sort_unstable();
    lines
}

fn one_float(_given: &[DataType]) -> Result<FnTypes, BoxError> {
    Ok(FnTypes::new([DataType::Float64], DataType::Float64))
}

fn halved(columns: &[ArrayRef]) -> Result<ArrayRef, BoxError> {
    let x = columns[0].as_primitive::<Float64Type>();
    if x.iter().flatten().any(|x| x < 0.0) {
        return Err("a number below zero".into());
    }
    Ok(Arc::new(x.unary::<_, Float64Type>(|x| x / 2.0)))
}

fn process_types(_given: &[DataType]) -> Result<FnTypes, BoxError> {
    Ok(FnTypes::new([DataType::Int64], DataType::UInt32))
}

/// The process that computes a row.
fn process(columns: &[ArrayRef]) -> Result<ArrayRef, BoxError> {
    Ok(Arc::new(UInt32Array::from(vec![std::process::id(); columns[0].len()])))
}

fn slowly(batch: &RecordBatch) -> Result<RecordBatch, BoxError> {
    if batch.num_rows() > 0 {
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(batch.clone())
}

fn twice(batch: &RecordBatch) -> Result<RecordBatch, BoxError> {
    Ok(concat_batches(&batch.schema(), [batch, batch])?)
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Largest(Option<i64>);

impl Aggregator for Largest {
    fn types(_given: &[DataType]) -> Result<FnTypes, BoxError> {
        Ok(FnTypes::new([DataType::Int64], DataType::Int64))
    }

    fn update(&mut self, columns: &[ArrayRef]) -> Result<(), BoxError> {
        self.0 = self.0.max(columns[0].as_primitive::<Int64Type>().iter().flatten().max());
        Ok(())
    }

    fn merge(&mut self, other: Self) -> Result<(), BoxError> {
        self.0 = self.0.max(other.0);
        Ok(())
    }

    fn finish(&self) -> Result<ArrayRef, BoxError> {
        Ok(Arc::new(Int64Array::from(vec![self.0])))
    }

    fn size(&self) -> usize {
        size_of::<Self>()
    }
}

inventory::submit! { ScalarFn::new("halved", one_float, halved) }
inventory::submit! { ScalarFn::new("process", process_types, process) }
inventory::submit! { BatchFn::new("slowly", slowly) }
inventory::submit! { BatchFn::new("twice", twice) }
inventory::submit! { AggregateFn::new::<Largest>("largest") }

/// `rows` numbers, in blocks of 50.
fn numbered(rows: i64) -> Dataset {
    let blocks = (0..rows).step_by(50).map(|start| {
        let ids: ArrayRef =
            Arc::new((start..(start + 50).min(rows)).map(Some).collect::<Int64Array>());
        RecordBatch::try_from_iter_with_nullable([("id", ids, true)]).expect("a batch")
    });
    Dataset::from_batches(blocks).expect("a dataset")
}

fn names() -> Dataset {
    let ids: ArrayRef = Arc::new(Int64Array::from_iter_values(0..300));
    let names: ArrayRef =
        Arc::new((0..300).map(|id| Some(format!("n{}", id % 7))).collect::<StringArray>());
    let batch = RecordBatch::try_from_iter([("id", ids), ("name", names)]).expect("a batch");
    Dataset::from_batches([batch]).expect("a dataset")
}

fn datasets() {
    let cluster = Cluster::start();
    let ids = numbered(40_000);
    let scaler = StandardScaler::fit(&ids, ["id"]).expect("fitted");
    let chain = ids.filter("id % 3 <> 1").and_then(|of| of.with_column("half", "halved(id)"));
    let chain = chain.and_then(|of| of.map_batches("twice")).expect("a chain");
    let (train, _) = ids.train_test_split(0.3, 7).expect("sides");
    let scaled = train.preprocess(&scaler).expect("scaled");
    cluster.must_be_as_here("SELECT * FROM chain", [("chain", chain.clone())]);
    cluster.must_be_as_here("SELECT count(*), min(id), max(id) FROM scaled", [("scaled", scaled)]);
    cluster.must_be_as_here(
        "SELECT name, count(*), max(half) FROM chain JOIN names ON chain.id % 300 = names.id GROUP BY name",
        [("chain", chain), ("names", names())],
    );
}

fn functions() {
    let cluster = Cluster::start();
    cluster.must_be_as_here(
        "SELECT name, largest(id), sum(halved(id)) FROM names GROUP BY name",
        [("names", names())],
    );
    cluster.must_be_as_here(
        "SELECT id, row_number() OVER (PARTITION BY halved(id % 5) ORDER BY id) AS n FROM names",
        [("names", names())],
    );
    let none = cluster.query("SELECT count(id) AS n FROM names WHERE 1 = 0", [("names", names())]);
    assert_eq!(none.column(0).as_primitive::<Int64Type>().value(0), 0);
    let none = cluster.query("SELECT name FROM names WHERE 1 = 0", [("names", names())]);
    assert_eq!((none.num_rows(), none.num_columns()), (0, 1));
    // Enough for both, which wait as they compute.
    let slow = numbered(40_000).map_batches("slowly").expect("a plan");
    let rows = cluster.query("SELECT DISTINCT process(id) FROM slow", [("slow", slow)]);
    let found: BTreeSet<u32> =
        rows.column(0).as_primitive::<UInt32Type>().values().iter().copied().collect();
    let executors: BTreeSet<u32> = cluster.processes[1..].iter().map(Child::id).collect();
    assert_eq!(found, executors);
}

fn files() {
    let cluster = Cluster::start();
    let folder = tempfile::tempdir().expect("a folder");
    let (csv, parquet) = (folder.path().join("csv"), folder.path().join("parquet"));
    names().write_csv(&csv, WriteOptions::default()).expect("written");
    names().write_parquet(&parquet, WriteOptions::default()).expect("written");
    let (csv, parquet) = (csv.join("*.csv"), parquet.join("*.parquet"));
    let csv = Dataset::read_csv(csv.to_string_lossy(), CsvOptions::default()).expect("files");
    let parquet = Dataset::read_parquet(parquet.to_string_lossy()).expect("files");
    cluster.must_be_as_here("SELECT name, sum(id) FROM csv GROUP BY name", [("csv", csv.clone())]);
    cluster.must_be_as_here(
        "SELECT csv.name, parquet.id FROM csv JOIN parquet USING (id) WHERE parquet.id > 77",
        [("csv", csv), ("parquet", parquet.clone())],
    );
    // DataFusion's own says 1, by statistics.
    let sql = "SELECT count(DISTINCT id) AS ids, count(DISTINCT name) AS names FROM parquet WHERE id = 7 AND name = 'x'";
    let counts = cluster.query(sql, [("parquet", parquet)]);
    let count = |column: usize| counts.column(column).as_primitive::<Int64Type>().value(0);
    assert_eq!([count(0), count(1)], [0, 0]);
}

fn order() {
    let cluster = Cluster::start();
    let sql = "SELECT id FROM ids ORDER BY id % 10 DESC, id LIMIT 250";
    let there = cluster.query(sql, [("ids", numbered(4000))]);
    assert_eq!(there, query(sql, [("ids", numbered(4000))]).expect("here"));
}

fn killed() {
    let mut cluster = Cluster::start();
    let backend = cluster.backend();
    let slow = numbered(40_000).map_batches("slowly").expect("a plan");
    let sql = "SELECT id % 7 AS k, count(*), sum(id) FROM slow GROUP BY id % 7";
    let asked = {
        let slow = slow.clone();
        std::thread::spawn(move || on(&backend, sql, [("slow", slow)]))
    };
    // 800 blocks of 50 ms, four at a time.
    std::thread::sleep(Duration::from_secs(3));
    assert!(!asked.is_finished(), "it was to take longer");
    cluster.processes[1].kill().expect("kill -9");
    let there = asked.join().expect("no panic");
    let there = there.unwrap_or_else(|e| panic!("{}\n{}", told(e), logs(cluster.folder.path())));
    let here = query(sql, [("slow", numbered(40_000))]).expect("here");
    assert_eq!(sorted_lines(&there), sorted_lines(&here));
}

fn failing() {
    let cluster = Cluster::start();
    let failing = numbered(10).with_column("half", "halved(id - 5)").expect("a plan");
    let error = on(&cluster.backend(), "SELECT sum(half) FROM failing", [("failing", failing)]);
    let error = told(error.expect_err("a number below zero"));
    assert!(error.contains("halved") && error.contains("a number below zero"), "{error}");
}

/// Between the plan and the executors.
fn changed() {
    let cluster = Cluster::start();
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("numbers.csv");
    std::fs::write(&file, "id\n1\n2\n").expect("written");
    let numbers = || Dataset::read_csv(file.to_string_lossy(), CsvOptions::default());
    let sum =
        |numbers| on(&cluster.backend(), "SELECT sum(id) FROM numbers", [("numbers", numbers)]);
    let planned = numbers().expect("a file");
    std::fs::write(&file, "id\n1\n2\n3\n").expect("written");
    let error = told(sum(planned).expect_err("another file"));
    // Ballista tells errors as they are in a debugger.
    assert!(error.contains("numbers.csv") && error.contains("OtherData"), "{error}");
    let rows = sum(numbers().expect("a file")).expect("the file as it is");
    assert_eq!(rows.column(0).as_primitive::<Int64Type>().value(0), 6);
}

fn nobody() {
    let port = free_port().expect("a port");
    let nobody = Ballista::new(&format!("http://127.0.0.1:{port}")).expect("an address");
    let error = on(&nobody, "SELECT * FROM ids", [("ids", numbered(10))]);
    let error = told(error.expect_err("nobody is there"));
    assert!(error.contains(&port.to_string()), "{error}");
}
