//! Tasks in threads and processes: results, errors, panics, losses, limits.

use crate::Test;
use mobula_core::{ActorOptions, Error, Placement, Resources, Runtime, Task, TaskOptions, remote};
use std::sync::mpsc::channel;
use std::time::Duration;

pub(crate) const TESTS: &[Test] = &[
    ("tasks::a_result_is_the_same_in_a_thread_and_in_a_process", same_everywhere),
    ("tasks::errors_and_panics_name_the_task", errors_and_panics),
    ("tasks::a_lost_process_is_an_error_and_is_retried_if_asked", lost_process),
    ("tasks::what_never_fits_is_refused", never_fits),
    ("tasks::what_does_not_fit_yet_waits", waits_for_room),
    ("tasks::a_queued_task_is_cancelled_at_once", cancel_queued),
    ("tasks::who_gave_up_blocks_nobody", gave_up),
    ("tasks::a_panic_in_the_pool_keeps_its_words", pool_panic),
    ("tasks::a_running_process_is_killed_when_cancelled", cancel_process),
    ("tasks::a_process_has_the_threads_it_asked_for", threads_of_a_process),
    ("tasks::closures_stay_in_process", closures_stay),
    ("tasks::a_result_can_be_awaited", awaited),
];

#[remote(crate = mobula_core)]
pub(crate) fn hypotenuse(a: f64, b: f64) -> f64 {
    a.hypot(b)
}

#[remote(crate = mobula_core)]
fn fail(how: String) -> Result<u32, String> {
    assert!(how != "panic", "asked to panic");
    Err(format!("asked to {how}"))
}

#[remote(crate = mobula_core)]
fn process_and_threads() -> (u32, String, Option<usize>) {
    let threads = std::env::var("RAYON_NUM_THREADS").unwrap_or_default();
    (std::process::id(), threads, rayon::current_thread_index())
}

/// Kills its own process the first time; a file remembers that there was a first time.
#[remote(crate = mobula_core)]
fn die_once(marker: std::path::PathBuf) -> Result<String, std::io::Error> {
    if marker.exists() {
        return Ok("survived".to_owned());
    }
    std::fs::write(&marker, "")?;
    std::process::abort();
}

/// Writes its process id, then never ends.
#[remote(crate = mobula_core)]
fn hang(pid_file: std::path::PathBuf) -> Result<(), std::io::Error> {
    let temporary = pid_file.with_extension("tmp");
    std::fs::write(&temporary, std::process::id().to_string())?;
    std::fs::rename(temporary, &pid_file)?;
    loop {
        std::thread::park();
    }
}

fn same_everywhere(runtime: &Runtime) {
    for placement in [Placement::Thread, Placement::Process] {
        let object = runtime.submit(hypotenuse::remote(3.0, 4.0).on(placement));
        assert_eq!(*object.get().expect("result"), 5.0, "{placement:?}");
    }
    assert_eq!(hypotenuse(3.0, 4.0), 5.0);
}

fn errors_and_panics(runtime: &Runtime) {
    for placement in [Placement::Thread, Placement::Process] {
        let error = runtime.submit(fail::remote("fail".to_owned()).on(placement)).get();
        let text = error.expect_err("must fail").to_string();
        assert!(text.contains("fail failed: asked to fail"), "{text}");
        let error = runtime.submit(fail::remote("panic".to_owned()).on(placement)).get();
        let Err(Error::TaskPanicked { location, message, .. }) = error else {
            panic!("expected a panic as a value");
        };
        assert!(location.contains("tasks.rs") && message.contains("asked to panic"), "{message}");
    }
}

fn lost_process(runtime: &Runtime) {
    let dir = tempfile::tempdir().expect("temporary folder");
    let marker = dir.path().join("marker");
    let task = || die_once::remote(marker.clone()).on(Placement::Process);
    let error = runtime.submit(task()).get().expect_err("the process aborts");
    assert!(error.is_retryable() && error.to_string().contains("signal 6"), "{error}");

    std::fs::remove_file(&marker).expect("remove");
    let options =
        TaskOptions { placement: Placement::Process, max_retries: 1, ..Default::default() };
    let object = runtime.submit(task().with_options(options));
    assert_eq!(*object.get().expect("the second attempt survives"), "survived");
}

fn never_fits(runtime: &Runtime) {
    let task = hypotenuse::remote(1.0, 1.0).with_resources(Resources::cpus(64.0));
    let error = runtime.submit(task).get().expect_err("64 > 4");
    assert_eq!(
        error.to_string(),
        "cannot place 64 CPU: this machine has 4 CPU; ask for less, or run where there is more"
    );
}

fn waits_for_room(_: &Runtime) {
    let runtime = Runtime::local(Resources::cpus(1.0)).expect("runtime");
    let (release, gate) = channel::<()>();
    let first = runtime.submit(Task::new("first", move || gate.recv()));
    let second = runtime.submit(Task::new("second", || Ok::<_, Error>(2)));
    assert_eq!(runtime.free_resources().cpus, 0.0);
    assert!(!second.is_ready(), "one CPU, and the first task holds it");
    release.send(()).expect("the first task waits");
    first.get().expect("first");
    assert_eq!(*second.get().expect("second"), 2);
    assert_eq!(runtime.free_resources().cpus, 1.0);
}

fn cancel_queued(_: &Runtime) {
    let runtime = Runtime::local(Resources::cpus(1.0)).expect("runtime");
    let (release, gate) = channel::<()>();
    let first = runtime.submit(Task::new("first", move || gate.recv()));
    let second = runtime.submit(Task::new("second", || -> Result<(), Error> { panic!("ran") }));
    second.cancel();
    assert!(matches!(second.get(), Err(Error::Cancelled { .. })));
    release.send(()).expect("the first task waits");
    first.get().expect("first");
    runtime.submit(Task::new("third", || Ok::<_, Error>(()))).get().expect("the slot is free");
}

fn cancel_process(runtime: &Runtime) {
    let dir = tempfile::tempdir().expect("temporary folder");
    let pid_file = dir.path().join("pid");
    let object = runtime.submit(hang::remote(pid_file.clone()).on(Placement::Process));
    let pid = crate::driver::wait_for_file(&pid_file);
    object.cancel();
    assert!(matches!(object.get(), Err(Error::Cancelled { .. })));
    crate::driver::assert_gone(&pid);
}

fn threads_of_a_process(runtime: &Runtime) {
    let task = process_and_threads::remote().on(Placement::Process);
    let object = runtime.submit(task.with_resources(Resources::cpus(2.0)));
    let result = object.get().expect("result");
    assert_eq!(result.1, "2");
    assert_ne!(result.0, std::process::id());
    assert_eq!(result.2, Some(0), "what it hands to rayon would wait for another thread");
}

fn closures_stay(runtime: &Runtime) {
    let task = Task::new("a closure", || Ok::<_, Error>(1)).on(Placement::Process);
    let error = runtime.submit(task).get().expect_err("closures cannot travel").to_string();
    assert!(error.contains("a closure") && error.contains("hypotenuse"), "{error}");
}

fn awaited(runtime: &Runtime) {
    let object = runtime.submit(Task::new("answer", || Ok::<_, Error>(42)));
    let tokio = tokio::runtime::Builder::new_current_thread().build().expect("tokio");
    assert_eq!(*tokio.block_on(async { object.await }).expect("result"), 42);
    // An answer that was there before the wait.
    let object = runtime.submit(Task::new("answer", || Ok::<_, Error>(43)));
    object.get_timeout(Duration::from_secs(30)).expect("in time");
    assert_eq!(*tokio.block_on(async { object.await }).expect("result"), 43);
}

fn gave_up(_: &Runtime) {
    let runtime = Runtime::local(Resources::cpus(2.0)).expect("runtime");
    let (release, gate) = channel::<()>();
    let first = runtime.submit(Task::new("first", move || gate.recv()));
    let options = ActorOptions {
        placement_timeout: Duration::from_millis(1),
        ..ActorOptions::new("large").with_resources(Resources::cpus(2.0))
    };
    let error = runtime.spawn_actor(options, || Ok(())).expect_err("one CPU is taken");
    assert!(matches!(&error, Error::NotPlaced { .. }) && !error.is_retryable(), "{error}");
    let cancelled =
        Task::new("cancelled", || Ok::<_, Error>(())).with_resources(Resources::cpus(2.0));
    runtime.submit(cancelled).cancel();
    let small = runtime.submit(Task::new("small", || Ok::<_, Error>(1)));
    assert_eq!(*small.get_timeout(Duration::from_secs(60)).expect("a CPU is free"), 1);
    release.send(()).expect("the first task waits");
    first.get().expect("first");
}

#[remote(crate = mobula_core)]
fn panic_in_pool() {
    rayon::join(|| (), || panic!("in the pool"));
}

fn pool_panic(runtime: &Runtime) {
    for placement in [Placement::Thread, Placement::Process] {
        let task = panic_in_pool::remote().on(placement).with_resources(Resources::cpus(2.0));
        let Err(Error::TaskPanicked { message, .. }) = runtime.submit(task).get() else {
            panic!("expected a panic as a value");
        };
        assert_eq!(message, "in the pool", "{placement:?}");
    }
}
