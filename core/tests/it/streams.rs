//! Tasks that give many values: order, back-pressure, ends, losses.

use crate::Test;
use mobula_core::value::Blob;
use mobula_core::{
    Error, ObjectStream, Placement, Resources, Runtime, StreamTask, Task, TaskOptions, Yield,
    remote,
};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::time::Duration;

const LONG: Duration = Duration::from_secs(60);
const PLACES: [Placement; 2] = [Placement::Thread, Placement::Process];

pub(crate) const TESTS: &[Test] = &[
    ("streams::values_come_in_order_and_end", in_order),
    ("streams::large_values_come_whole", large),
    ("streams::a_producer_waits_for_its_consumer", back_pressure),
    ("streams::errors_and_panics_come_after_the_values", errors),
    ("streams::a_producer_ends_when_nobody_listens", dropped),
    ("streams::a_process_ends_when_nobody_listens", dropped_process),
    ("streams::a_lost_process_ends_the_stream", lost),
    ("streams::what_was_delivered_is_skipped_by_the_next_attempt", retried),
    ("streams::time_can_be_limited", timeouts),
    ("streams::a_consumer_lends_its_cpus", lends),
    ("streams::values_can_be_polled", polled),
    ("streams::objects_are_arguments", objects),
    ("streams::a_yield_outlives_its_producer_for_nothing", outlived),
];

#[remote(crate = mobula_core)]
fn count(to: u64, out: Yield<u64>) -> Result<(), Error> {
    (0..to).try_for_each(|n| out.send(n))
}

#[remote(crate = mobula_core)]
fn blobs(count: usize, bytes: usize, out: Yield<Blob>) -> Result<(), Error> {
    (0..count).try_for_each(|n| out.send(Blob::from(vec![n as u8; bytes])))
}

/// Gives three values, then ends as it is told.
#[remote(crate = mobula_core)]
fn three_and(how: String, out: Yield<u32>) -> Result<(), Error> {
    (0..3).try_for_each(|n| out.send(n))?;
    match &*how {
        "panic" => panic!("asked to panic"),
        "abort" => std::process::abort(),
        other => Err(Error::layer(other)),
    }
}

/// Gives numbers without end, each written to the file before it is sent.
#[remote(crate = mobula_core)]
fn log_numbers(log: PathBuf, out: Yield<u64>) -> Result<(), Error> {
    for n in 0.. {
        std::fs::write(&log, n.to_string()).map_err(Error::layer)?;
        out.send(n)?;
    }
    Ok(())
}

/// Writes its process id, then gives numbers without end.
#[remote(crate = mobula_core)]
fn endless(pid_file: PathBuf, out: Yield<u64>) -> Result<(), Error> {
    let temporary = pid_file.with_extension("tmp");
    std::fs::write(&temporary, std::process::id().to_string()).map_err(Error::layer)?;
    std::fs::rename(temporary, &pid_file).map_err(Error::layer)?;
    (0..).try_for_each(|n| out.send(n))
}

/// Gives ten values; the first attempt ends its process after six.
#[remote(crate = mobula_core)]
fn die_after_six(marker: PathBuf, size: usize, out: Yield<Vec<u8>>) -> Result<(), Error> {
    for n in 0..10 {
        if n == 6 && !marker.exists() {
            std::fs::write(&marker, "").map_err(Error::layer)?;
            std::process::abort();
        }
        out.send(vec![n; size])?;
    }
    Ok(())
}

fn next<T: Send + Sync + 'static>(stream: &mut ObjectStream<T>) -> Option<Result<Arc<T>, Error>> {
    stream.next_timeout(LONG)
}

fn all<T: Clone + Send + Sync + 'static>(stream: ObjectStream<T>) -> Result<Vec<T>, Error> {
    stream.map(|value| value.map(|value| T::clone(&value))).collect()
}

fn in_order(runtime: &Runtime) {
    for (place, buffer) in PLACES.into_iter().flat_map(|place| [(place, 1), (place, 16)]) {
        let task = count::remote(3000).on(place).with_buffer(buffer);
        let values = all(runtime.submit_stream(task)).expect("values");
        assert_eq!(values, (0..3000).collect::<Vec<_>>(), "{place:?}, {buffer}");
        let mut nothing = runtime.submit_stream(count::remote(0).on(place));
        assert!(next(&mut nothing).is_none() && next(&mut nothing).is_none());
    }
}

fn large(runtime: &Runtime) {
    for (place, bytes) in PLACES.into_iter().flat_map(|place| [(place, 100), (place, 1 << 20)]) {
        let stream = runtime.submit_stream(blobs::remote(40, bytes).on(place).with_buffer(4));
        let mut expected = 0;
        for blob in stream {
            let blob = blob.expect("blob");
            assert_eq!(blob.0.len(), bytes);
            assert!(blob.0.iter().all(|byte| *byte == expected), "{expected}");
            expected += 1;
        }
        assert_eq!(expected, 40);
    }
}

fn back_pressure(runtime: &Runtime) {
    for place in PLACES {
        let dir = tempfile::tempdir().expect("temporary folder");
        let log = dir.path().join("log");
        let task = log_numbers::remote(log.clone()).on(place).with_buffer(4);
        let mut stream = runtime.submit_stream(task);
        for expected in 0..50 {
            let value = next(&mut stream).expect("endless").expect("value");
            assert_eq!(*value, expected);
            let begun: u64 = std::fs::read_to_string(&log).expect("log").parse().unwrap_or(0);
            // It may have begun one more than there is room for.
            assert!(begun <= expected + 1 + 4, "{begun} when {expected} was taken");
        }
    }
}

fn errors(runtime: &Runtime) {
    for place in PLACES {
        for (how, text) in [("fail", "three_and failed: fail"), ("panic", "asked to panic")] {
            let mut stream = runtime.submit_stream(three_and::remote(how.to_owned()).on(place));
            for expected in 0..3 {
                assert_eq!(*next(&mut stream).expect("three").expect("value"), expected);
            }
            let error = next(&mut stream).expect("an end").expect_err("an error").to_string();
            assert!(error.contains(text), "{error}");
            assert!(next(&mut stream).is_none(), "one error");
        }
    }
    let closure: StreamTask<u8> = Task::stream("a closure", |_| Ok::<_, Error>(()));
    let mut refused = runtime.submit_stream(closure.on(Placement::Process));
    let error = next(&mut refused).expect("an error").expect_err("refused").to_string();
    assert!(error.contains("a closure") && error.contains("count"), "{error}");
}

fn dropped(runtime: &Runtime) {
    let (ended, end) = channel();
    let mut stream = runtime.submit_stream(Task::stream("numbers", move |out| {
        let error = (0_u64..).try_for_each(|n| out.send(n)).expect_err("nobody listens");
        ended.send(error.to_string()).map_err(Error::layer)
    }));
    assert_eq!(*next(&mut stream).expect("endless").expect("value"), 0);
    drop(stream);
    assert_eq!(end.recv_timeout(LONG).expect("it returned"), "numbers was cancelled");
}

fn dropped_process(runtime: &Runtime) {
    let dir = tempfile::tempdir().expect("temporary folder");
    let pid_file = dir.path().join("pid");
    let task = endless::remote(pid_file.clone()).on(Placement::Process);
    let mut stream = runtime.submit_stream(task);
    assert_eq!(*next(&mut stream).expect("endless").expect("value"), 0);
    let pid = crate::driver::wait_for_file(&pid_file);
    drop(stream);
    crate::driver::assert_gone(&pid);
}

/// Resources that no other test asks for, so that no other test has a call in that process.
fn alone(retries: u32) -> TaskOptions {
    TaskOptions {
        placement: Placement::Process,
        resources: Resources::cpus(0.3),
        max_retries: retries,
        ..TaskOptions::default()
    }
}

fn lost(runtime: &Runtime) {
    let task = three_and::remote("abort".to_owned()).with_options(alone(0));
    let mut stream = runtime.submit_stream(task);
    let ends = std::iter::from_fn(|| next(&mut stream)).find_map(Result::err).expect("an error");
    assert!(ends.is_retryable() && ends.to_string().contains("signal 6"), "{ends}");
    assert!(next(&mut stream).is_none());
}

fn retried(runtime: &Runtime) {
    for (size, buffer) in [(10, 1), (10, 16), (100_000, 3)] {
        let dir = tempfile::tempdir().expect("temporary folder");
        let task = die_after_six::remote(dir.path().join("marker"), size);
        let task = task.with_options(alone(1)).with_buffer(buffer);
        let values = all(runtime.submit_stream(task)).expect("values");
        let expected: Vec<Vec<u8>> = (0..10).map(|n| vec![n; size]).collect();
        assert!(values == expected, "{size} bytes, buffer {buffer}");
    }
    let attempts = Arc::new(AtomicU64::new(0));
    let copy = Arc::clone(&attempts);
    let task = Task::stream("twice", move |out| {
        (0..5).try_for_each(|n| out.send(n))?;
        match copy.fetch_add(1, Ordering::Relaxed) {
            0 => Err(Error::layer("not yet")),
            _ => out.send(5),
        }
    });
    let options = TaskOptions { max_retries: 1, retry_errors: true, ..TaskOptions::default() };
    let values = all(runtime.submit_stream(task.with_options(options).with_buffer(2)));
    assert_eq!(values.expect("values"), [0, 1, 2, 3, 4, 5]);
    assert_eq!(attempts.load(Ordering::Relaxed), 2);
}

fn timeouts(runtime: &Runtime) {
    let (release, gate) = channel::<()>();
    let task = Task::stream("slow", move |out| {
        gate.recv().map_err(Error::layer)?;
        out.send(1)
    });
    let mut stream = runtime.submit_stream(task);
    let late = stream.next_timeout(Duration::ZERO).expect("not the end").expect_err("late");
    assert!(matches!(late, Error::Timeout { .. }), "{late}");
    release.send(()).expect("the producer waits");
    assert_eq!(*next(&mut stream).expect("a value").expect("value"), 1);
    assert!(next(&mut stream).is_none());

    // Nobody takes its values: its time is over while it waits for room.
    for place in PLACES {
        let options = TaskOptions {
            placement: place,
            timeout: Some(Duration::from_millis(300)),
            ..TaskOptions::default()
        };
        let dir = tempfile::tempdir().expect("temporary folder");
        let task = endless::remote(dir.path().join("pid")).with_options(options).with_buffer(2);
        let mut stream = runtime.submit_stream(task);
        let first = stream.next().expect("a value or an error");
        let rest: Vec<_> = match first {
            Err(error) => vec![Err(error)],
            Ok(_) => std::iter::from_fn(|| next(&mut stream)).collect(),
        };
        assert!(matches!(rest.last(), Some(Err(Error::Timeout { .. }))), "{place:?}: {rest:?}");
    }
}

fn lends(_: &Runtime) {
    let runtime = Runtime::local(Resources::cpus(1.0)).expect("runtime");
    let copy = runtime.clone();
    let outer = runtime.submit(Task::new("outer", move || {
        let inner = Task::stream("inner", |out| (1..=10).try_for_each(|n| out.send(n)));
        let values: Result<Vec<_>, Error> = copy.submit_stream(inner).collect();
        values.map(|values| values.iter().map(|n| **n).sum::<i32>())
    }));
    assert_eq!(*outer.get_timeout(LONG).expect("one CPU is enough"), 55);
}

fn polled(runtime: &Runtime) {
    use futures::StreamExt;
    for place in PLACES {
        let mut stream = runtime.submit_stream(count::remote(100).on(place).with_buffer(3));
        let polled = futures::stream::poll_fn(move |context| stream.poll_next(context));
        let tokio = tokio::runtime::Builder::new_current_thread().build().expect("tokio");
        let values: Vec<_> = tokio.block_on(polled.collect());
        let values: Vec<u64> = values.into_iter().map(|value| *value.expect("value")).collect();
        assert_eq!(values, (0..100).collect::<Vec<_>>());
    }
}

fn objects(runtime: &Runtime) {
    for place in PLACES {
        let (release, gate) = channel::<()>();
        let to = runtime.submit(Task::new("to", move || gate.recv().map(|()| 3_u64)));
        let stream = runtime.submit_stream(count::remote(&to).on(place));
        release.send(()).expect("it waits");
        assert_eq!(all(stream).expect("values"), [0, 1, 2]);
        let failed = runtime.submit(Task::new("failed", || Err::<u64, _>("no")));
        let mut stream = runtime.submit_stream(count::remote(failed).on(place));
        let error = next(&mut stream).expect("an error").expect_err("failed").to_string();
        assert_eq!(error, format!("{} was not run, because failed failed: no", stream.task()));
    }
}

#[remote(crate = mobula_core)]
fn leak(out: Yield<u8>) -> Result<(), Error> {
    out.send(1)?;
    std::mem::forget(std::thread::spawn(move || while out.send(2).is_ok() {}));
    Ok(())
}

fn outlived(runtime: &Runtime) {
    for place in PLACES {
        let values = runtime.submit_stream(leak::remote().on(place).with_buffer(1000));
        let values = all(values).expect("values");
        assert!(values[0] == 1 && values[1..].iter().all(|value| *value == 2), "{values:?}");
    }
}
