//! Our side of reading data.
//!
//! ```text
//! bench-data FILE     answer requests on standard input
//! ```
//!
//! The requests are described in xtask/src/bench/data.rs.
#![forbid(unsafe_code)]

mod features;
mod images;
mod large;
mod queries;

use anyhow::{Context, Result, bail};
use candle_core::DType;
use mobula_core::{Batch, BatchSource, Shard};
use mobula_data::{Dataset, StreamOptions, TensorSource, TensorSpec};
use serde_json::{Value, json};
use std::io::{BufRead, Write};
use std::time::{Duration, Instant};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const BATCH_SIZE: usize = 8192;
const SEED: u64 = 7;

fn main() -> Result<()> {
    let file = std::env::args().nth(1).context("usage: bench-data FILE")?;
    answer(json!({ "ready": "Mobula" }))?;
    for line in std::io::stdin().lock().lines() {
        answer(work(&file, &line?)?)?;
    }
    Ok(())
}

fn answer(value: Value) -> Result<()> {
    let mut output = std::io::stdout().lock();
    writeln!(output, "{value}")?;
    Ok(output.flush()?)
}

fn work(file: &str, request: &str) -> Result<Value> {
    let words: Vec<&str> = request.split(' ').collect();
    match words[..] {
        ["epoch", columns, order, ranks] => epoch(file, columns, order, ranks.parse()?, count),
        ["check", columns, order, ranks] => epoch(file, columns, order, ranks.parse()?, sum),
        ["first", columns, order] => first(file, columns, order),
        ["resume", columns, order, share] => resume(file, columns, order, share.parse()?),
        ["query", number] => queries::ours(file, number.parse()?),
        ["plain", number] => queries::plain(file, number.parse()?),
        ["large", what] => large::work(file, what),
        ["images", folder] => images::epoch(folder),
        ["features"] => features::write(file),
        ["prepare"] => features::prepare(file),
        _ => bail!("an unknown request: {request:?}"),
    }
}

fn source(file: &str, columns: &str, order: &str) -> Result<TensorSource> {
    let x = TensorSpec::stack("x", columns.split(','));
    let options = StreamOptions::unlabelled([] as [&str; 0]).with_tensor(x);
    let options = options.with_batch_size(BATCH_SIZE);
    let options = if order == "shuffled" { options.with_shuffle(SEED) } else { options };
    Ok(Dataset::read_parquet(file)?.stream(options)?)
}

/// What a batch adds to rows and to a sum.
type Measure = fn(&Batch) -> Result<(usize, f64)>;

fn count(batch: &Batch) -> Result<(usize, f64)> {
    Ok((batch.get("x")?.dims2()?.0, 0.0))
}

fn sum(batch: &Batch) -> Result<(usize, f64)> {
    let x = batch.get("x")?;
    Ok((x.dims2()?.0, x.to_dtype(DType::F64)?.sum_all()?.to_scalar::<f64>()?))
}

/// A whole epoch, each rank on a thread of its own.
fn epoch(file: &str, columns: &str, order: &str, ranks: usize, measure: Measure) -> Result<Value> {
    let (start, cpu) = (Instant::now(), cpu());
    let source = source(file, columns, order)?;
    let rank = |rank| read(&source, Shard { rank, world: ranks }, measure);
    let parts = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..ranks).map(|at| scope.spawn(move || rank(at))).collect();
        threads.into_iter().map(|thread| thread.join().expect("a rank")).collect::<Result<Vec<_>>>()
    })?;
    let seconds = start.elapsed().as_secs_f64();
    let cpu = (self::cpu() - cpu).as_secs_f64();
    let rows: usize = parts.iter().map(|part| part.0).sum();
    let total: f64 = parts.iter().map(|part| part.1).sum();
    Ok(json!({ "seconds": seconds, "cpu": cpu, "rows": rows, "sum": total, "peak": peak()? }))
}

fn read(source: &TensorSource, shard: Shard, measure: Measure) -> Result<(usize, f64)> {
    let mut stream = source.open(shard)?;
    let mut all = (0, 0.0);
    while let Some(batch) = stream.next_batch()? {
        let (rows, sum) = measure(&batch)?;
        all = (all.0 + rows, all.1 + sum);
    }
    Ok(all)
}

/// From the name of the file to the first batch.
fn first(file: &str, columns: &str, order: &str) -> Result<Value> {
    let start = Instant::now();
    let source = source(file, columns, order)?;
    let batch = source.open(Shard::ALL)?.next_batch()?.context("a batch")?;
    let seconds = start.elapsed().as_secs_f64();
    Ok(json!({ "seconds": seconds, "rows": batch.rows() }))
}

/// From a checkpoint's state at a share of the epoch to the batch that comes next.
fn resume(file: &str, columns: &str, order: &str, share: f64) -> Result<Value> {
    let source = source(file, columns, order)?;
    let mut state = source.open(Shard::ALL)?.state();
    state.step = (source.steps_per_epoch() as f64 * share) as u64;
    let start = Instant::now();
    let mut stream = source.open(Shard::ALL)?;
    stream.restore(&state)?;
    let batch = stream.next_batch()?.context("a batch")?;
    let seconds = start.elapsed().as_secs_f64();
    Ok(json!({ "seconds": seconds, "rows": batch.rows() }))
}

/// The CPU time of this process so far.
fn cpu() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec.unsigned_abs() as u32)
}

/// The most memory that this process has had, in bytes.
fn peak() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/self/status")?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("VmHWM")?;
    let kilobytes: u64 = line.trim().trim_end_matches(" kB").trim().parse()?;
    Ok(kilobytes * 1024)
}
