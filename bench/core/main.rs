//! Our side of the core benchmarks, and tokio's channels alone.
//!
//! ```text
//! bench-core CASE      CASE: see `case` below; answers `run STEPS` on standard input
//! ```
//!
//! The lines are described in xtask/src/bench/worker.rs; where a training side has its loss, this
//! one has the case's answer. Its peers are peer_ray.py and peer_dask.py.
#![forbid(unsafe_code)]

use anyhow::{Context, Result, bail};
use mobula_core::value::Blob;
use mobula_core::{ActorOptions, Error, ObjectRef, Placement, Runtime, Task, Yield};
use serde_json::json;
use std::io::{BufRead, Write};
use std::time::Instant;
use tokio::sync::{mpsc, oneshot};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Calls or tasks that are in flight together.
const BATCH: u64 = 1000;
const MIB: usize = 1 << 20;
const TASKS: u64 = 100_000;
/// Of a layer.
const WIDTH: usize = 1000;
const MODULUS: u64 = 1_000_003;

/// Runs so many steps: the time of each, and an answer.
type Run = Box<dyn FnMut(usize) -> Result<(Vec<f64>, u64)>>;

fn main() -> Result<()> {
    let runtime = mobula_core::init()?;
    let name = std::env::args().nth(1).context("usage: bench-core CASE")?;
    let mut run = case(&name, &runtime)?;
    if name != "start" {
        run(2)?; // starts the workers
    }
    let side = if name == "tokio_calls" { "tokio mpsc + oneshot" } else { "Mobula" };
    answer(json!({ "ready": side }))?;
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let steps = line.strip_prefix("run ").with_context(|| format!("got {line:?}"))?;
        let (seconds, result) = run(steps.parse()?)?;
        answer(json!({ "seconds": seconds, "loss": result }))?;
    }
    Ok(())
}

fn case(name: &str, runtime: &Runtime) -> Result<Run> {
    let here = runtime.clone();
    match name {
        "start" => Ok(timed(move || Ok(*here.submit(process_noop(1)).get()?))),
        "actor_call" => actor_call(runtime),
        "actor_calls" => actor_calls(runtime),
        "actor_create" => Ok(actor_create(here)),
        "tasks" => Ok(timed(move || tasks(&here))),
        "tasks_of_a_task" => Ok(timed(move || Ok(*here.submit(process_fan_out()).get()?))),
        "stream" => Ok(timed(move || stream(&here))),
        "by_reference" => by_reference(runtime),
        "graph_layered" => Ok(timed(move || graph_layered(&here))),
        "graph_wide" => Ok(timed(move || graph_wide(&here))),
        "thread_actor_calls" => thread_actor_calls(runtime),
        "tokio_calls" => tokio_calls(),
        _ => bail!("{name} is no case"),
    }
}

/// The answer is the last step's.
fn timed(mut step: impl FnMut() -> Result<u64> + 'static) -> Run {
    Box::new(move |steps| {
        let (mut seconds, mut answer) = (Vec::with_capacity(steps), 0);
        for _ in 0..steps {
            let begin = Instant::now();
            answer = step()?;
            seconds.push(begin.elapsed().as_secs_f64());
        }
        Ok((seconds, answer))
    })
}

#[mobula_core::remote(crate = mobula_core)]
fn noop(x: u64) -> u64 {
    x
}

fn process_noop(x: u64) -> Task<u64> {
    noop::remote(x).on(Placement::Process)
}

/// Tasks in processes, submitted and summed up by one.
#[mobula_core::remote(crate = mobula_core)]
fn fan_out(tasks: u64) -> Result<u64> {
    let runtime = Runtime::current()?;
    sum((0..tasks).map(|x| runtime.submit(process_noop(x))).collect())
}

fn process_fan_out() -> Task<u64> {
    fan_out::remote(BATCH).on(Placement::Process)
}

#[mobula_core::remote(crate = mobula_core)]
fn count(values: u64, out: Yield<u64>) -> Result<(), Error> {
    (0..values).try_for_each(|value| out.send(value))
}

fn stream(runtime: &Runtime) -> Result<u64> {
    let values = runtime.submit_stream(count::remote(BATCH).on(Placement::Process));
    values.map(|value| Ok(*value?)).sum()
}

struct Counter(u64);

#[mobula_core::remote(crate = mobula_core)]
impl Counter {
    fn new(start: u64) -> Self {
        Self(start)
    }

    fn add(&mut self, n: u64) -> u64 {
        self.0 += n;
        self.0
    }

    fn probe(&mut self, data: Blob) -> u64 {
        let bytes = data.as_ref();
        bytes.len() as u64 + u64::from(bytes[0]) + u64::from(bytes[bytes.len() - 1])
    }
}

fn counter(runtime: &Runtime, start: u64) -> Result<CounterHandle> {
    Ok(runtime.spawn(Counter::remote(start).on(Placement::Process))?)
}

fn actor_call(runtime: &Runtime) -> Result<Run> {
    let counter = counter(runtime, 0)?;
    Ok(timed(move || Ok(*counter.add(1u64).get()?)))
}

fn actor_calls(runtime: &Runtime) -> Result<Run> {
    let counter = counter(runtime, 0)?;
    Ok(timed(move || sum((0..BATCH).map(|_| counter.add(1u64)).collect())))
}

/// Until the first call has answered; the actor's end is not measured.
fn actor_create(runtime: Runtime) -> Run {
    Box::new(move |steps| {
        let (mut seconds, mut answer) = (Vec::new(), 0);
        for i in 0..steps {
            let begin = Instant::now();
            let counter = counter(&runtime, i as u64)?;
            answer += *counter.add(1u64).get()?;
            seconds.push(begin.elapsed().as_secs_f64());
        }
        Ok((seconds, answer))
    })
}

fn tasks(runtime: &Runtime) -> Result<u64> {
    sum((0..BATCH).map(|x| runtime.submit(process_noop(x))).collect())
}

fn by_reference(runtime: &Runtime) -> Result<Run> {
    let counter = counter(runtime, 0)?;
    let data: Vec<u8> = (0..MIB).map(|i| i as u8).collect();
    let data = runtime.put(Blob::from(data));
    Ok(timed(move || sum((0..BATCH).map(|_| counter.probe(data.clone())).collect())))
}

/// Layers of tasks; each takes two neighbours of the layer before.
fn graph_layered(runtime: &Runtime) -> Result<u64> {
    let mut layer: Vec<_> = (0..WIDTH as u64)
        .map(|i| runtime.submit(Task::new("leaf", move || Ok::<_, String>(i))))
        .collect();
    for _ in 0..TASKS / WIDTH as u64 {
        layer = (0..WIDTH)
            .map(|i| {
                let inputs = (layer[i].clone(), layer[(i + 1) % WIDTH].clone());
                runtime.submit(Task::with_inputs("add", inputs, |(a, b)| {
                    Ok::<_, String>((*a + *b) % MODULUS)
                }))
            })
            .collect();
    }
    sum(layer)
}

/// Tasks without inputs, and one that sums them up.
fn graph_wide(runtime: &Runtime) -> Result<u64> {
    let leaves: Vec<_> =
        (0..TASKS).map(|x| runtime.submit(Task::new("noop", move || Ok::<_, String>(x)))).collect();
    let total = Task::with_inputs("total", leaves, |values| {
        Ok::<_, String>(values.iter().map(|value| **value).sum::<u64>())
    });
    Ok(*runtime.submit(total).get()?)
}

/// All are under way before the first is waited for.
fn sum(objects: Vec<ObjectRef<u64>>) -> Result<u64> {
    objects.iter().map(|object| Ok(*object.get()?)).sum()
}

fn thread_actor_calls(runtime: &Runtime) -> Result<Run> {
    let options = ActorOptions::new("counter").with_mailbox(BATCH as usize);
    let counter = runtime.spawn_actor(options, || Ok(0u64))?;
    let add = |total: &mut u64| {
        *total += 1;
        *total
    };
    let caller = tokio::runtime::Builder::new_current_thread().build()?;
    Ok(timed(move || {
        let replies: Vec<_> = (0..BATCH).map(|_| counter.try_call(add)).collect();
        caller.block_on(async {
            let mut sum = 0;
            for reply in replies {
                sum += reply?.await?;
            }
            Ok(sum)
        })
    }))
}

/// The least that an actor can be: a thread that takes messages from a bounded channel and answers
/// each through a channel of its own.
fn tokio_calls() -> Result<Run> {
    let (sender, mut mailbox) = mpsc::channel::<(u64, oneshot::Sender<u64>)>(BATCH as usize);
    std::thread::spawn(move || {
        let mut total = 0;
        while let Some((n, reply)) = mailbox.blocking_recv() {
            total += n;
            // Who asked may have gone.
            let _ = reply.send(total);
        }
    });
    let call = move || {
        let (reply, answer) = oneshot::channel();
        sender.try_send((1, reply)).map(|()| answer)
    };
    let caller = tokio::runtime::Builder::new_current_thread().build()?;
    Ok(timed(move || {
        let replies: Vec<_> = (0..BATCH).map(|_| call()).collect();
        caller.block_on(async {
            let mut sum = 0;
            for reply in replies {
                sum += reply?.await?;
            }
            Ok(sum)
        })
    }))
}

fn answer(value: serde_json::Value) -> Result<()> {
    let mut output = std::io::stdout().lock();
    writeln!(output, "{value}")?;
    Ok(output.flush()?)
}
