//! Blocks computed by processes. These are this same binary, so `init()` comes first and the harness is
//! libtest-mimic.

use arrow::array::{ArrayRef, AsArray, Int64Array, UInt32Array};
use arrow::datatypes::{DataType, Field, Int64Type, Schema, UInt32Type};
use arrow::record_batch::RecordBatch;
use libtest_mimic::{Arguments, Failed, Trial};
use mobula_core::{
    ActorOptions, ActorPoolOptions, BoxError, Placement, Resources, RestartPolicy, Runtime,
};
use mobula_data::{BatchActor, BatchFn, Dataset, inventory};
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

/// Which process a row was computed in, and the how manieth batch of its state it was in.
struct Where {
    calls: i64,
}

impl BatchActor for Where {
    fn new() -> Result<Self, BoxError> {
        Ok(Self { calls: 0 })
    }

    fn columns(_input: &Schema) -> Result<Schema, BoxError> {
        let field = |name, of| Field::new(name, of, false);
        Ok(Schema::new(vec![
            field("id", DataType::Int64),
            field("process", DataType::UInt32),
            field("calls", DataType::Int64),
        ]))
    }

    fn call(&mut self, batch: &RecordBatch) -> Result<RecordBatch, BoxError> {
        self.calls += 1;
        let rows = batch.num_rows();
        let id: ArrayRef = batch.column(0).clone();
        let process: ArrayRef = Arc::new(UInt32Array::from(vec![std::process::id(); rows]));
        let calls: ArrayRef = Arc::new(Int64Array::from(vec![self.calls; rows]));
        let schema = Arc::new(Self::columns(&batch.schema())?);
        Ok(RecordBatch::try_new(schema, vec![id, process, calls])?)
    }
}

/// The square of the ids. The first to meet 25,000 dies of it.
struct Dies;

/// Is there once a process has died.
const MARKER: &str = "MOBULA_TEST_MARKER";

impl BatchActor for Dies {
    fn new() -> Result<Self, BoxError> {
        Ok(Self)
    }

    fn columns(_input: &Schema) -> Result<Schema, BoxError> {
        Ok(Schema::new(vec![Field::new("id", DataType::Int64, false)]))
    }

    fn call(&mut self, batch: &RecordBatch) -> Result<RecordBatch, BoxError> {
        let ids = batch.column(0).as_primitive::<Int64Type>();
        let marker = std::env::var(MARKER)?;
        if ids.values().contains(&25_000) && !Path::new(&marker).exists() {
            std::fs::write(&marker, "")?;
            std::process::abort();
        }
        let squares: ArrayRef =
            Arc::new(Int64Array::from_iter_values(ids.values().iter().map(|id| id * id)));
        Ok(RecordBatch::try_new(Arc::new(Self::columns(&batch.schema())?), vec![squares])?)
    }
}

inventory::submit! { BatchFn::actor::<Where>("where") }
inventory::submit! { BatchFn::actor::<Dies>("dies") }

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = tempfile::tempdir()?;
    // SAFETY: nothing else runs yet.
    #[expect(unsafe_code, reason = "workers inherit it")]
    unsafe {
        if std::env::var_os(MARKER).is_none() {
            std::env::set_var(MARKER, folder.path().join("died"));
        }
    }
    let runtime = mobula_core::init_with(Resources::cpus(4.0))?;
    type Test = fn(&Runtime) -> Result<(), BoxError>;
    let tests: [(&str, Test); 3] = [
        ("each_process_has_a_state_of_its_own", each_process_has_a_state_of_its_own),
        (
            "a_block_whose_process_died_is_computed_by_the_next",
            a_block_whose_process_died_is_computed_by_the_next,
        ),
        ("errors_are_the_callers", errors_are_the_callers),
    ];
    let trial = |(name, test): (&'static str, Test)| {
        let runtime = runtime.clone();
        Trial::test(name, move || test(&runtime).map_err(|error| Failed::from(error.to_string())))
    };
    let tests = tests.into_iter().map(trial).collect();
    let conclusion = libtest_mimic::run(&Arguments::from_args(), tests);
    drop(runtime);
    drop(folder);
    conclusion.exit()
}

fn processes(name: &str) -> ActorOptions {
    ActorOptions {
        placement: Placement::Process,
        restart: RestartPolicy::at_most(3),
        max_task_retries: 3,
        ..ActorOptions::new(name)
    }
}

fn each_process_has_a_state_of_its_own(runtime: &Runtime) -> Result<(), BoxError> {
    let rows = Dataset::range(40_960)?.map_batches("where")?;
    let kept = rows.select(["id"])?.persist_with(
        runtime,
        ActorPoolOptions::fixed(2),
        &processes("where"),
    )?;
    assert_eq!(kept.collect()?, Dataset::range(40_960)?.collect()?);
    // Its rows say where they were computed, so that they are others when they are computed again.
    let refused = rows.persist_with(runtime, ActorPoolOptions::fixed(2), &processes("where"));
    let text = refused.expect_err("not repeatable").to_string();
    assert!(text.contains("gives other rows when it is computed again"), "{text}");

    let threads = ActorOptions::new("threads");
    let kept = rows.select(["id", "process"])?.persist_with(
        runtime,
        ActorPoolOptions::fixed(2),
        &threads,
    )?;
    let kept = kept.collect()?;
    let ids: BTreeSet<_> = kept.column(1).as_primitive::<UInt32Type>().values().iter().collect();
    assert_eq!(ids, BTreeSet::from([&std::process::id()]));
    Ok(())
}

fn a_block_whose_process_died_is_computed_by_the_next(runtime: &Runtime) -> Result<(), BoxError> {
    let squares = Dataset::range(40_960)?.map_batches("dies")?;
    let kept = squares.persist_with(runtime, ActorPoolOptions::fixed(2), &processes("dies"))?;
    assert!(Path::new(&std::env::var(MARKER)?).exists(), "one died");
    let kept = kept.collect()?;
    let ids = kept.column(0).as_primitive::<Int64Type>();
    assert!(ids.values().iter().copied().eq((0..40_960).map(|id| id * id)));
    Ok(())
}

fn fails(batch: &RecordBatch) -> Result<RecordBatch, BoxError> {
    if batch.num_rows() > 0 { Err("no such luck".into()) } else { Ok(batch.clone()) }
}

inventory::submit! { BatchFn::new("fails", fails) }

fn errors_are_the_callers(runtime: &Runtime) -> Result<(), BoxError> {
    let rows = Dataset::range(10_000)?.map_batches("fails")?;
    let failed = rows.persist_with(runtime, ActorPoolOptions::fixed(1), &processes("fails"));
    let error: mobula_core::Error = failed.expect_err("an error").into();
    let text = mobula_core::error::chain(&error);
    assert!(text.contains("\"fails\" failed: no such luck"), "{text}");
    Ok(())
}
