//! Tasks that depend on tasks, wait for tasks and submit tasks.

use crate::Test;
use mobula_core::value::{Blob, TensorValue};
use mobula_core::{
    Error, ObjectRef, Placement, Resources, Runtime, Task, TaskOptions, collect, remote, task, wait,
};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::time::Duration;

const LONG: Duration = Duration::from_secs(60);

pub(crate) const TESTS: &[Test] = &[
    ("graphs::objects_are_arguments_in_threads_and_processes", objects_as_arguments),
    ("graphs::a_deep_and_wide_graph_gives_the_right_sum", deep_and_wide),
    ("graphs::a_chain_of_failures_names_its_root", failures),
    ("graphs::a_failed_input_does_not_wait_for_the_others", fails_fast),
    ("graphs::wait_gives_what_is_there", wait_some),
    ("graphs::nested_tasks_lend_their_cpus", nested),
    ("graphs::a_task_that_runs_a_group_lends_its_cpu", task_with_group),
    ("graphs::children_are_cancelled_with_their_parent", cancel_children),
    ("graphs::errors_are_retried_if_asked", retry_errors),
    ("graphs::what_takes_too_long_times_out", timeouts),
    ("graphs::many_short_tasks_share_warm_workers", many_short),
    ("graphs::a_long_task_does_not_hold_up_those_behind_it", recall),
    ("graphs::large_objects_travel_in_shared_memory", large_objects),
    ("graphs::an_object_outlives_the_process_that_made_it", killed_owner),
    ("graphs::a_worker_over_its_memory_limit_dies_alone", over_limit),
    ("graphs::calling_off_hurts_nobody_else", call_off),
    ("graphs::any_timeout_is_a_timeout", long_timeouts),
    ("graphs::a_task_whose_worker_never_begins_is_lost", never_begins),
    ("graphs::a_killed_worker_loses_only_what_it_ran", lose_one),
];

#[remote(crate = mobula_core)]
fn add(a: u64, b: u64) -> u64 {
    a + b
}

#[remote(crate = mobula_core)]
fn divide(a: u64, b: u64) -> Result<u64, String> {
    a.checked_div(b).ok_or_else(|| format!("{a} by {b}"))
}

#[remote(crate = mobula_core)]
fn pid() -> u32 {
    std::process::id()
}

fn two_cpus() -> Runtime {
    Runtime::local(Resources::cpus(2.0)).expect("runtime")
}

fn objects_as_arguments(runtime: &Runtime) {
    for (first, second) in [
        (Placement::Thread, Placement::Process),
        (Placement::Process, Placement::Thread),
        (Placement::Process, Placement::Process),
    ] {
        let three = runtime.submit(add::remote(1, 2).on(first));
        let ten = runtime.submit(add::remote(&three, 7).on(second));
        let sum = runtime.submit(add::remote(three, ten.clone()).on(first));
        assert_eq!((*sum.get().expect("sum"), *ten.get().expect("ten")), (13, 10));
    }
    let put = runtime.put(41u64);
    assert_eq!(*runtime.submit(add::remote(put, 1)).get().expect("sum"), 42);
}

fn deep_and_wide(_: &Runtime) {
    let runtime = two_cpus();
    let mut tip = runtime.put(0u64);
    for i in 0..20_000u64 {
        tip = runtime.submit(Task::with_inputs("next", (tip,), move |(n,)| {
            Ok::<_, Error>(*n + u64::from(i % 2 == 0))
        }));
    }
    let wide: Vec<ObjectRef<u64>> =
        (0..20_000).map(|i| runtime.submit(Task::new("leaf", move || Ok::<_, Error>(i)))).collect();
    let sum = Task::with_inputs("sum", wide, |leaves| {
        Ok::<_, Error>(leaves.iter().map(|leaf| **leaf).sum::<u64>())
    });
    let sum = runtime.submit(sum);
    assert_eq!(*sum.get_timeout(LONG).expect("sum"), 20_000 * 19_999 / 2);
    assert_eq!(*tip.get_timeout(LONG).expect("tip"), 10_000);
}

fn failures(runtime: &Runtime) {
    let bad = runtime.submit(divide::remote(1, 0).on(Placement::Process));
    let next = runtime.submit(add::remote(bad, 1).named("next"));
    let last = runtime.submit(add::remote(next, 1).named("last"));
    let error = last.get().expect_err("its input's input failed");
    let text = error.to_string();
    assert!(text.starts_with("last was not run, because next was not, because "), "{text}");
    assert!(text.ends_with("divide failed: 1 by 0"), "{text}");
    assert!(matches!(error, Error::InputFailed { root, .. }
        if matches!(&*root, Error::TaskFailed { .. })));
    // A long chain ends without a deep stack, and its error stays short.
    let mut tip = runtime.submit(divide::remote(1, 0));
    for _ in 0..10_000 {
        tip = runtime.submit(add::remote(tip, 1));
    }
    let text = tip.get_timeout(LONG).expect_err("its root failed").to_string();
    assert!(text.len() < 1000 && text.ends_with("1 by 0"), "{text}");
}

fn fails_fast(_: &Runtime) {
    let runtime = two_cpus();
    let (release, gate) = channel::<()>();
    let slow = runtime.submit(Task::new("slow", move || gate.recv()));
    let bad = runtime.submit(Task::new("bad", || Err::<u64, _>("no")));
    let both = Task::with_inputs("both", (slow.clone(), bad), |_| Ok::<_, Error>(()));
    let error = runtime.submit(both).get_timeout(LONG).expect_err("bad failed").to_string();
    assert_eq!(error, "both was not run, because bad failed: no");
    release.send(()).expect("slow waits");
    slow.get().expect("slow");
}

fn wait_some(_: &Runtime) {
    let runtime = two_cpus();
    let (release, gate) = channel::<()>();
    let slow = runtime.submit(Task::new("slow", move || gate.recv().map(|()| 0)));
    let quick = runtime.submit(Task::new("quick", || Ok::<_, Error>(1)));
    let (ready, pending) = wait(vec![slow, quick], 1, Some(LONG));
    assert_eq!((*ready[0].get().expect("quick"), ready.len(), pending.len()), (1, 1, 1));
    let (ready, pending) = wait(pending, 1, Some(Duration::ZERO));
    assert!(ready.is_empty());
    release.send(()).expect("slow waits");
    // More than there are means all.
    let (ready, pending) = wait(pending, 5, Some(LONG));
    assert_eq!((ready.len(), pending.len()), (1, 0));
    assert_eq!(collect(&ready).expect("results").len(), 1);
}

fn nested(_: &Runtime) {
    fn fibonacci(runtime: &Runtime, n: u64) -> Result<u64, Error> {
        if n < 2 {
            return Ok(n);
        }
        let child = |n| {
            let copy = runtime.clone();
            runtime.submit(Task::new("fibonacci", move || fibonacci(&copy, n)))
        };
        let (a, b) = (child(n - 1), child(n - 2));
        Ok(*a.get()? + *b.get()?)
    }
    // One CPU, and a tree of tasks that each wait for two more.
    let runtime = Runtime::local(Resources::cpus(1.0)).expect("runtime");
    let copy = runtime.clone();
    let root = runtime.submit(Task::new("root", move || fibonacci(&copy, 12)));
    assert_eq!(*root.get_timeout(LONG).expect("no deadlock"), 144);
    assert_eq!(runtime.free_resources().cpus, 1.0);
}

#[remote(crate = mobula_core)]
fn rank(member: mobula_core::Member) -> usize {
    member.rank()
}

fn task_with_group(_: &Runtime) {
    let runtime = two_cpus();
    let trials: Vec<ObjectRef<Vec<usize>>> = (0..3)
        .map(|_| {
            let copy = runtime.clone();
            // A trial holds a CPU, and trains with two workers on a machine of two CPUs.
            runtime.submit(Task::new("trial", move || {
                let options = mobula_core::GroupOptions {
                    placement: Placement::Thread,
                    ..mobula_core::GroupOptions::new("workers", 2)
                };
                copy.group(&options, &rank::remote())?.join(LONG)
            }))
        })
        .collect();
    for trial in trials {
        assert_eq!(*trial.get_timeout(LONG).expect("no deadlock"), [0, 1]);
    }
}

fn cancel_children(_: &Runtime) {
    let runtime = Runtime::local(Resources::cpus(1.0)).expect("runtime");
    let (copy, (tell, child_of)) = (runtime.clone(), channel());
    let parent = runtime.submit(Task::new("parent", move || {
        let child = copy.submit(Task::new("child", || {
            while !task::cancelled() {
                std::thread::yield_now();
            }
            Ok::<_, Error>(())
        }));
        let _ = tell.send(child.clone());
        child.get().map(|_| ())
    }));
    let child = child_of.recv().expect("the child was submitted");
    parent.cancel();
    assert!(matches!(parent.get(), Err(Error::Cancelled { .. })));
    assert!(matches!(child.get_timeout(LONG), Err(Error::Cancelled { .. })));
    runtime.submit(Task::new("next", || Ok::<_, Error>(()))).get_timeout(LONG).expect("CPU free");
}

fn retry_errors(_: &Runtime) {
    let runtime = two_cpus();
    let attempts = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&attempts);
    let flaky = move || match count.fetch_add(1, Ordering::SeqCst) {
        n if n < 2 => Err(format!("attempt {n}")),
        n => Ok(n),
    };
    let options = TaskOptions { max_retries: 2, retry_errors: true, ..TaskOptions::default() };
    let flaky_task = || Task::repeatable("flaky", flaky.clone());
    let object = runtime.submit(flaky_task().with_options(options.clone()));
    assert_eq!(*object.get_timeout(LONG).expect("the third attempt"), 2);
    attempts.store(0, Ordering::SeqCst);
    let one_retry = TaskOptions { max_retries: 1, ..options };
    let error = runtime.submit(flaky_task().with_options(one_retry)).get_timeout(LONG);
    assert_eq!(error.expect_err("two attempts are too few").to_string(), "flaky failed: attempt 1");
    assert_eq!(attempts.load(Ordering::SeqCst), 2);
}

#[remote(crate = mobula_core)]
fn sleep_for_ever() {
    loop {
        std::thread::park();
    }
}

fn timeouts(runtime: &Runtime) {
    let short = Duration::from_millis(20);
    for placement in [Placement::Thread, Placement::Process] {
        let options = TaskOptions { timeout: Some(short), placement, ..TaskOptions::default() };
        let task = match placement {
            Placement::Process => sleep_for_ever::remote(),
            Placement::Thread => Task::new("until told", || {
                while !task::cancelled() {
                    std::thread::yield_now();
                }
                Ok::<_, Error>(())
            }),
        };
        let result = runtime.submit(task.with_options(options)).get_timeout(LONG);
        assert!(
            matches!(&result, Err(Error::Timeout { after, .. }) if *after == short),
            "{result:?}"
        );
    }
}

fn many_short(runtime: &Runtime) {
    let pids: Vec<ObjectRef<u32>> =
        (0..2000).map(|_| runtime.submit(pid::remote().on(Placement::Process))).collect();
    let mut pids: Vec<u32> = collect(&pids).expect("results").iter().map(|pid| **pid).collect();
    pids.sort_unstable();
    pids.dedup();
    assert!(pids.len() <= 8, "2000 tasks in {} processes", pids.len());
}

/// Blocks until the file is there.
#[remote(crate = mobula_core)]
fn wait_for(file: std::path::PathBuf) -> u32 {
    while !file.exists() {
        std::thread::yield_now();
    }
    0
}

fn recall(runtime: &Runtime) {
    // One process at a time, by a resource of its own.
    let dir = tempfile::tempdir().expect("temporary folder");
    let gate = dir.path().join("gate");
    collect(&(0..200).map(|_| runtime.submit(quick(&gate))).collect::<Vec<_>>()).expect("warm");
    let all: Vec<ObjectRef<u32>> =
        [runtime.submit(wait_for::remote(gate.clone()).on(Placement::Process))]
            .into_iter()
            .chain((0..200).map(|_| runtime.submit(quick(&gate))))
            .collect();
    let (_, pending) = wait(all, 200, Some(LONG));
    assert_eq!(pending.len(), 1, "the short ones have run elsewhere");
    std::fs::write(&gate, "").expect("write");
    collect(&pending).expect("the long one");
}

fn quick(_: &std::path::Path) -> Task<u32> {
    pid::remote().on(Placement::Process)
}

/// Kills its process on the first run; a file remembers that there was one.
#[remote(crate = mobula_core)]
fn die_at(number: u64, at: u64, log: std::path::PathBuf) -> Result<u64, std::io::Error> {
    use std::io::Write;
    let mut log = std::fs::OpenOptions::new().create(true).append(true).open(log)?;
    // In one write, as several processes write to it.
    log.write_all(format!("{number}\n").as_bytes())?;
    if number == at {
        std::process::abort();
    }
    Ok(number)
}

fn lose_one(runtime: &Runtime) {
    let dir = tempfile::tempdir().expect("temporary folder");
    let log = dir.path().join("log");
    let results: Mutex<Vec<Result<u64, Error>>> = Mutex::default();
    let objects: Vec<ObjectRef<u64>> = (0..600)
        .map(|n| runtime.submit(die_at::remote(n, 400, log.clone()).on(Placement::Process)))
        .collect();
    for object in &objects {
        let result = object.get_timeout(LONG).map(|n| *n);
        results.lock().expect("lock").push(result);
    }
    let results = results.into_inner().expect("results");
    // Replies that the process had not sent yet are lost with it; what had not begun runs.
    let begun = std::fs::read_to_string(&log).expect("log");
    let mut begun: Vec<u64> = begun.lines().map(|line| line.parse().expect("number")).collect();
    begun.sort_unstable();
    assert_eq!(begun, (0..600).collect::<Vec<_>>(), "each has begun once, and only once");
    assert!(matches!(&results[400], Err(Error::WorkerLost { .. })), "{:?}", results[400]);
    let lost = results.iter().filter(|result| result.is_err()).count();
    assert!(lost < 200, "{lost} were lost");
    assert!(results[500..].iter().all(Result::is_ok));
}

#[remote(crate = mobula_core)]
fn make_blob(bytes: usize) -> Blob {
    Blob::from(vec![7u8; bytes])
}

#[remote(crate = mobula_core)]
fn measure(blob: Blob) -> (usize, u64) {
    (blob.0.len(), blob.0.iter().map(|byte| u64::from(*byte)).sum())
}

#[remote(crate = mobula_core)]
fn double(weights: TensorValue) -> Result<TensorValue, candle_core::Error> {
    Ok(TensorValue((weights.0 * 2.0)?))
}

fn large_objects(runtime: &Runtime) {
    const BYTES: usize = 3 << 20;
    for place in [Placement::Thread, Placement::Process] {
        let put = runtime.put(Blob::from(vec![1u8; BYTES]));
        let made = runtime.submit(make_blob::remote(BYTES).on(place));
        for (blob, sum) in [(&put, BYTES), (&made, 7 * BYTES)] {
            for _ in 0..3 {
                let measured = runtime.submit(measure::remote(blob).on(place));
                assert_eq!(*measured.get().expect("measured"), (BYTES, sum as u64));
            }
        }
        assert_eq!(made.get().expect("blob").0.len(), BYTES);
        let ones = candle_core::Tensor::ones(
            (512, 512),
            candle_core::DType::F32,
            &candle_core::Device::Cpu,
        );
        let ones = TensorValue(ones.expect("tensor"));
        let twice = runtime.submit(double::remote(ones).on(place));
        let four = runtime.submit(double::remote(twice).on(place)).get().expect("tensor");
        let sum = four.0.sum_all().and_then(|sum| sum.to_scalar::<f32>()).expect("sum");
        assert_eq!(sum, 4.0 * 512.0 * 512.0);
    }
}

fn killed_owner(runtime: &Runtime) {
    // The process that made it is gone; the driver has it.
    let made = runtime.submit(make_blob::remote(1 << 20).on(Placement::Process));
    made.get().expect("made");
    let dir = tempfile::tempdir().expect("temporary folder");
    let log = dir.path().join("log");
    let dying: Vec<_> = (0..4)
        .map(|_| runtime.submit(die_at::remote(1, 1, log.clone()).on(Placement::Process)))
        .collect();
    wait(dying, 4, Some(LONG));
    let measured = runtime.submit(measure::remote(made).on(Placement::Process));
    assert_eq!(*measured.get_timeout(LONG).expect("measured"), (1 << 20, 7 << 20));
}

/// Takes so much memory, and says so.
#[remote(crate = mobula_core)]
fn take(mebibytes: usize) -> usize {
    let taken = vec![1u8; mebibytes << 20];
    let end = std::time::Instant::now() + Duration::from_secs(10);
    // Until it is killed, or a while if it is not.
    while mebibytes > 100 && std::time::Instant::now() < end {
        std::thread::yield_now();
    }
    taken.len()
}

fn over_limit(runtime: &Runtime) {
    let limited = |mebibytes| {
        let memory_limit = Some(200 << 20);
        let placement = Placement::Process;
        let options = TaskOptions { memory_limit, placement, ..TaskOptions::default() };
        runtime.submit(take::remote(mebibytes).with_options(options))
    };
    let (small, large) = (limited(1), limited(400));
    let error = large.get_timeout(LONG).expect_err("over the limit").to_string();
    assert!(error.contains("over its limit of 200 MiB"), "{error}");
    assert_eq!(*small.get_timeout(LONG).expect("within the limit"), 1 << 20);
}

/// Spins so long, then gives the number.
#[remote(crate = mobula_core)]
fn spin(micros: u64, number: u64) -> u64 {
    let end = std::time::Instant::now() + Duration::from_micros(micros);
    while std::time::Instant::now() < end {
        std::hint::spin_loop();
    }
    number
}

fn call_off(runtime: &Runtime) {
    // Cancelled and late ones, at every moment of their lives, among others that must not notice.
    let late = |n: u64| TaskOptions {
        // Other tests end their workers, and with them what has just ended there: not these.
        resources: Resources::cpus(2.0),
        placement: Placement::Process,
        timeout: (n % 5 == 1).then(|| Duration::from_micros(50 * (n % 37))),
        ..TaskOptions::default()
    };
    let objects: Vec<ObjectRef<u64>> = (0..1500u64)
        .map(|n| {
            let object = runtime.submit(spin::remote(13 * (n % 11), n).with_options(late(n)));
            if n % 5 == 2 {
                let earlier = object.clone();
                std::thread::yield_now();
                earlier.cancel();
            }
            object
        })
        .collect();
    for (n, object) in (0u64..).zip(&objects) {
        match object.get_timeout(LONG) {
            Ok(value) => assert_eq!(*value, n),
            Err(Error::Cancelled { .. }) => assert_eq!(n % 5, 2),
            Err(Error::Timeout { after, .. }) => assert!(n % 5 == 1 && after < LONG, "{n} hangs"),
            Err(error) => panic!("task {n}, which nobody called off: {error}"),
        }
    }
}

fn long_timeouts(runtime: &Runtime) {
    let options = TaskOptions { timeout: Some(Duration::MAX), ..TaskOptions::default() };
    let object = runtime.submit(add::remote(1, 2).with_options(options));
    assert_eq!(*object.get_timeout(Duration::MAX).expect("sum"), 3);
    let (ready, _) = wait(vec![object], 1, Some(Duration::MAX));
    assert_eq!(ready.len(), 1);
}

fn never_begins(_: &Runtime) {
    crate::driver::a_task_in_a_program_that_forgot_init();
}
