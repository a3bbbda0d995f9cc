//! Queries by another engine: as one that gets plans as bytes.

use crate::{batch, digits, message, numbered};
use arrow::array::{ArrayRef, AsArray, Float64Array, Int64Array, StringArray};
use arrow::compute::concat_batches;
use arrow::datatypes::{DataType, Field, Int64Type, Schema, SchemaRef};
use arrow::record_batch::RecordBatch;
use arrow::util::pretty::pretty_format_batches;
use async_trait::async_trait;
use datafusion::catalog::Session;
use datafusion::common::Result as EngineResult;
use datafusion::common::tree_node::{Transformed, TransformedResult, TreeNode};
use datafusion::datasource::physical_plan::{FileGroup, FileScanConfig, FileScanConfigBuilder};
use datafusion::datasource::source::DataSourceExec;
use datafusion::execution::context::QueryPlanner;
use datafusion::execution::{SessionStateBuilder, TaskContext};
use datafusion::logical_expr::LogicalPlan;
use datafusion::physical_plan::ExecutionPlan;
use datafusion::physical_plan::union::UnionExec;
use datafusion::physical_planner::{DefaultPhysicalPlanner, PhysicalPlanner};
use datafusion::prelude::{SessionConfig, SessionContext};
use datafusion_proto::bytes::{
    logical_plan_from_bytes_with_extension_codec, logical_plan_to_bytes_with_extension_codec,
    physical_plan_from_bytes_with_extension_codec, physical_plan_to_bytes_with_extension_codec,
};
use mobula_data::backend::{Backend, LogicalCodec, PhysicalCodec, query_on, session_state};
use mobula_data::{
    BatchIter, Blocks, CsvOptions, Dataset, Result, Source, StandardScaler, WriteOptions, query,
    typetag,
};
use serde::{Deserialize, Serialize};
use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// What happens to the plan of a query on its way.
type OnTheWay = fn();

/// An engine whose scheduler gets the logical plan as bytes, and whose executors the physical one.
#[derive(Clone, Debug)]
struct Wire {
    on_the_way: OnTheWay,
    bytes: Arc<AtomicUsize>,
}

impl Wire {
    fn new(on_the_way: OnTheWay) -> Self {
        Self { on_the_way, bytes: Arc::default() }
    }
}

impl Backend for Wire {
    fn session(&self) -> EngineResult<SessionContext> {
        let state = SessionStateBuilder::new_from_existing(elsewhere()?.state());
        let state = state.with_query_planner(Arc::new(self.clone()));
        Ok(SessionContext::new_with_state(state.build()))
    }
}

fn elsewhere() -> EngineResult<SessionContext> {
    let config = SessionConfig::new().with_target_partitions(3);
    let state = session_state(SessionContext::new_with_config(config).state())?;
    Ok(SessionContext::new_with_state(state))
}

#[async_trait]
impl QueryPlanner for Wire {
    async fn create_physical_plan(
        &self,
        plan: &LogicalPlan,
        _state: &dyn Session,
    ) -> EngineResult<Arc<dyn ExecutionPlan>> {
        let (logical, physical) = (LogicalCodec::default(), PhysicalCodec::default());
        let bytes = logical_plan_to_bytes_with_extension_codec(plan, &logical)?;
        (self.on_the_way)();
        let scheduler = elsewhere()?;
        let context = scheduler.task_ctx();
        let plan = logical_plan_from_bytes_with_extension_codec(&bytes, &context, &logical)?;
        let state = scheduler.state();
        let plan = DefaultPhysicalPlanner::default().create_physical_plan(&plan, &state).await?;
        let sent = physical_plan_to_bytes_with_extension_codec(plan, &physical)?;
        self.bytes.fetch_add(bytes.len() + sent.len(), Ordering::Relaxed);
        let plan = physical_plan_from_bytes_with_extension_codec(&sent, &stranger(), &physical)?;
        let divided = plan.transform_up(|node| divided(node, &physical)).data()?;
        Ok(divided)
    }
}

/// An executor: the engine's own functions are all that it knows.
fn stranger() -> Arc<TaskContext> {
    SessionContext::new().task_ctx()
}

/// A scan as a union of scans of a part each, as of tasks that were sent one by one.
fn divided(
    node: Arc<dyn ExecutionPlan>,
    codec: &PhysicalCodec,
) -> EngineResult<Transformed<Arc<dyn ExecutionPlan>>> {
    let scan = node.downcast_ref::<DataSourceExec>().map(|exec| exec.data_source().as_ref());
    let scan = scan.and_then(|of| {
        let of: &dyn Any = of;
        of.downcast_ref::<FileScanConfig>().cloned()
    });
    let Some(scan) = scan.filter(|scan| scan.file_groups.len() > 1) else {
        return Ok(Transformed::no(node));
    };
    let task = |part: &FileGroup| -> EngineResult<Arc<dyn ExecutionPlan>> {
        let scan = FileScanConfigBuilder::from(scan.clone()).with_file_groups(vec![part.clone()]);
        let plan = DataSourceExec::from_data_source(scan.build());
        let sent = physical_plan_to_bytes_with_extension_codec(plan, codec)?;
        physical_plan_from_bytes_with_extension_codec(&sent, &stranger(), codec)
    };
    let tasks = scan.file_groups.iter().map(task).collect::<EngineResult<_>>()?;
    Ok(Transformed::yes(UnionExec::try_new(tasks)?))
}

fn on(
    backend: &Wire,
    sql: &str,
    tables: impl IntoIterator<Item = (&'static str, Dataset)>,
) -> Result<RecordBatch> {
    let rows = query_on(backend, sql, tables)?;
    let schema = rows.schema();
    Ok(concat_batches(&schema, &rows.collect::<Result<Vec<_>>>()?)?)
}

/// The same rows as here, whatever their order.
fn must_be_as_here<const N: usize>(sql: &str, tables: [(&'static str, Dataset); N]) {
    let wire = Wire::new(|| {});
    let there = on(&wire, sql, tables.clone()).expect("by the wire");
    let here = query(sql, tables).expect("here");
    assert_eq!(there.schema(), here.schema(), "{sql}");
    assert!(here.num_rows() > 0, "{sql}");
    assert_eq!(sorted_lines(&there), sorted_lines(&here), "{sql}");
    assert!(wire.bytes.load(Ordering::Relaxed) > 0, "nothing went by the wire");
}

fn sorted_lines(rows: &RecordBatch) -> Vec<String> {
    let text = pretty_format_batches(std::slice::from_ref(rows)).expect("a table").to_string();
    let mut lines: Vec<_> = text.lines().map(str::to_owned).collect();
    lines.sort_unstable();
    lines
}

fn names() -> Dataset {
    let ids: ArrayRef = Arc::new(Int64Array::from_iter_values(0..40));
    let names: ArrayRef =
        Arc::new((0..40).map(|id| Some(format!("n{}", id % 7))).collect::<StringArray>());
    Dataset::from_batches([batch([("id", ids), ("name", names)])]).expect("a dataset")
}

#[test]
fn operations_of_datasets_are_done_there() {
    let ids = numbered(1000, &[70, 30]);
    let scaler = StandardScaler::fit(&ids, ["id"]).expect("fitted");
    let chain = ids.filter("id % 3 <> 1").and_then(|of| of.with_column("half", "halved(id)"));
    let chain = chain.and_then(|of| of.map_batches("doubled")).expect("a chain");
    let (train, _) = ids.train_test_split(0.3, 7).expect("sides");
    let scaled = train.preprocess(&scaler).expect("scaled");
    must_be_as_here("SELECT * FROM chain", [("chain", chain.clone())]);
    must_be_as_here("SELECT count(*), sum(id) FROM scaled", [("scaled", scaled)]);
    must_be_as_here(
        "SELECT name, count(*), max(half) FROM chain JOIN names USING (id) GROUP BY name",
        [("chain", chain), ("names", names())],
    );
}

/// Whatever of a table a query needs, and whichever parts it is read in.
#[test]
fn parts_are_read_there_each_once() {
    let table = |rows: i64| {
        let ids = numbered(rows, &[13, 40]);
        ids.with_column("text", "concat('t', id % 11)").expect("a plan")
    };
    let plain = numbered(3000, &[13, 40]);
    for sql in [
        "SELECT count(*) AS n FROM a",
        "SELECT text, id FROM a WHERE id > 1500",
        "SELECT sum(id), text FROM a GROUP BY text",
        "SELECT * FROM a UNION ALL SELECT * FROM b",
        "SELECT a.id FROM a JOIN b ON a.id = b.id JOIN plain ON plain.id = a.id",
        "SELECT count(*) FROM (SELECT id FROM plain LIMIT 1700)",
    ] {
        must_be_as_here(sql, [("a", table(3000)), ("b", table(900)), ("plain", plain.clone())]);
    }
}

#[test]
fn folders_named_by_values_are_left_out_there() {
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path().join("by_name");
    let options = WriteOptions::default().with_partition_by(["name"]);
    names().write_csv(&folder, options).expect("written");
    let files = folder.join("**/*.csv");
    let named = Dataset::read_csv(files.to_string_lossy(), CsvOptions::default());
    let named = named.expect("a dataset");
    must_be_as_here(
        "SELECT name, sum(id) FROM named WHERE name > 'n3' GROUP BY name",
        [("named", named)],
    );
}

/// Statistics know no NaN, say that the least of 0 is -0, and order text as the numbers that it was.
#[test]
fn aggregates_are_computed_there() {
    let ids: ArrayRef = Arc::new(Int64Array::from(vec![1, 2, 1000, 9]));
    let xs: ArrayRef = Arc::new(Float64Array::from(vec![0.0, 1.5, f64::NAN, 2.5]));
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path().join("table");
    let rows = Dataset::from_batches([batch([("id", ids), ("x", xs)])]).expect("a dataset");
    rows.write_parquet(&folder, WriteOptions::default()).expect("written");
    let file =
        Dataset::read_parquet(folder.join("*.parquet").to_string_lossy()).expect("a dataset");
    for sql in [
        "SELECT max(x) AS x, 1 / min(x) AS inverse FROM t",
        "SELECT max(CAST(id AS VARCHAR)), min(CAST(id AS VARCHAR)) FROM t",
        "SELECT count(*), sum(0.1) FROM t",
        "SELECT count(x) FROM (SELECT TRY_CAST(concat('a', id) AS INT) AS x FROM t)",
    ] {
        must_be_as_here(sql, [("t", file.clone())]);
        let (parquet, memory) =
            (query(sql, [("t", file.clone())]), query(sql, [("t", rows.clone())]));
        let [parquet, memory] = [parquet, memory].map(|of| sorted_lines(&of.expect("rows")));
        assert_eq!(parquet, memory, "{sql}");
    }
}

#[test]
fn functions_of_the_program_go_by_their_names() {
    let tables = || [("names", names())];
    must_be_as_here(
        "SELECT id, halved(id) AS half FROM names WHERE shouted(name) = 'N3'",
        tables(),
    );
    must_be_as_here("SELECT name, exact_median(id) FROM names GROUP BY name", tables());
}

#[test]
fn files_are_read_there() {
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path().join("numbers");
    numbered(500, &[500]).write_csv(&folder, WriteOptions::default()).expect("written");
    let files = folder.join("*.csv");
    let csv = Dataset::read_csv(files.to_string_lossy(), CsvOptions::default()).expect("a dataset");
    must_be_as_here("SELECT sum(id) FROM csv WHERE id > 77", [("csv", csv)]);
    must_be_as_here(
        "SELECT label, count(*) FROM digits GROUP BY label ORDER BY label",
        [("digits", digits())],
    );
}

#[test]
fn an_order_that_is_asked_for_is_kept() {
    let wire = Wire::new(|| {});
    let sql = "SELECT id FROM ids ORDER BY id % 10 DESC, id LIMIT 25";
    let ids = numbered(1000, &[90]);
    let there = on(&wire, sql, [("ids", ids.clone())]).expect("by the wire");
    assert_eq!(there, query(sql, [("ids", ids)]).expect("here"));
}

#[test]
fn what_has_no_rows_has_its_columns() {
    for sql in [
        "SELECT id FROM names WHERE 1 = 0",
        "SELECT name, id FROM names LIMIT 0",
        "SELECT count(id) AS n FROM names WHERE 1 = 0",
        "SELECT a.id FROM names a JOIN names b ON false",
    ] {
        let there = on(&Wire::new(|| {}), sql, [("names", names())]).expect("by the wire");
        assert_eq!(there, query(sql, [("names", names())]).expect("here"), "{sql}");
    }
}

/// Its sides come in more parts than there are processors.
#[test]
fn joins_do_not_wait_for_parts_whose_turn_is_to_come() {
    let folder = tempfile::tempdir().expect("a folder");
    let table = |name: &str, rows| {
        let folder = folder.path().join(name);
        let options = WriteOptions::default().with_rows_per_file(100);
        numbered(rows, &[50]).write_parquet(&folder, options).expect("written");
        let files = folder.join("*.parquet");
        Dataset::read_parquet(files.to_string_lossy()).expect("files")
    };
    let (a, b) = (table("a", 2000), table("b", 1000));
    must_be_as_here("SELECT a.id FROM a JOIN b USING (id)", [("a", a), ("b", b)]);
}

/// It was 1, by statistics.
#[test]
fn nothing_has_no_different_values_there() {
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path().join("names");
    names().write_parquet(&folder, WriteOptions::default()).expect("written");
    let none = Dataset::read_parquet(folder.join("*.parquet").to_string_lossy());
    let none = none.expect("a dataset");
    let sql =
        "SELECT count(DISTINCT id), count(DISTINCT name) FROM none WHERE id = 7 AND name = 'x'";
    let counts = on(&Wire::new(|| {}), sql, [("none", none)]).expect("by the wire");
    let count = |column: usize| counts.column(column).as_primitive::<Int64Type>().value(0);
    assert_eq!([count(0), count(1)], [0, 0]);
}

/// What the source finds, a version of it after another.
static FOUND: AtomicUsize = AtomicUsize::new(0);

#[derive(Debug, Serialize, Deserialize)]
struct Versions;

#[typetag::serde]
impl Source for Versions {
    fn open(&self) -> Result<Arc<dyn Blocks>> {
        Ok(Arc::new(Version(FOUND.load(Ordering::SeqCst))))
    }
}

#[derive(Debug)]
struct Version(usize);

impl Blocks for Version {
    fn schema(&self) -> SchemaRef {
        Arc::new(Schema::new(vec![Field::new("id", DataType::Int64, true)]))
    }

    fn rows(&self) -> Vec<u64> {
        vec![1]
    }

    fn fingerprint(&self) -> Result<String> {
        Ok(format!("version {}", self.0))
    }

    fn read(&self, _block: usize, projection: &[usize]) -> Result<BatchIter> {
        let ids: ArrayRef = Arc::new(Int64Array::from(vec![self.0 as i64]));
        Ok(Box::new(std::iter::once(Ok(batch([("id", ids)]).project(projection)?))))
    }
}

#[test]
fn other_data_than_was_planned_for_is_refused() {
    let rows = |on_the_way: OnTheWay| {
        let versions = Dataset::from_source(Versions).expect("a dataset");
        on(&Wire::new(on_the_way), "SELECT max(id) FROM versions", [("versions", versions)])
    };
    let max = |rows: RecordBatch| rows.column(0).as_primitive::<Int64Type>().value(0);
    let changed = rows(|| FOUND.store(1, Ordering::SeqCst));
    let changed = message(changed);
    assert!(
        changed.contains("Versions: its rows are not those where the query was planned"),
        "{changed}"
    );
    for version in [1, 2] {
        FOUND.store(version, Ordering::SeqCst);
        // What was opened for one query is not what the next means.
        assert_eq!(rows(|| {}).map(max).expect("the same"), version as i64);
    }
}

#[test]
fn what_a_function_says_is_told() {
    let failing = numbered(10, &[5]).with_column("half", "halved(id - 5)").expect("a plan");
    let error = on(&Wire::new(|| {}), "SELECT sum(half) FROM failing", [("failing", failing)]);
    let error = message(error);
    assert!(error.contains("halved") && error.contains("a number below zero"), "{error}");
}
