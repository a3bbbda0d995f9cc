//! Actors and streams that belong to what runs in a worker process.

use crate::Test;
use crate::driver::{assert_gone, wait_for_file};
use mobula_core::value::Blob;
use mobula_core::{
    ActorOptions, ActorPoolOptions, Error, Group, GroupOptions, Member, Placement, Resources,
    RestartPolicy, Runtime, Task, TaskOptions, Yield, collect, remote,
};
use std::path::{Path, PathBuf};
use std::time::Duration;

const LONG: Duration = Duration::from_secs(60);
const LARGE: usize = 4 << 20;

pub(crate) const TESTS: &[Test] = &[
    ("upward::calls_of_a_worker_keep_their_order", order),
    ("upward::what_fails_keeps_its_kind", failures),
    ("upward::a_lost_actor_is_started_again_if_asked", restarts),
    ("upward::an_actor_can_be_killed_and_asked_how_it_is", killed),
    ("upward::the_last_handle_ends_the_actor", last_handle),
    ("upward::an_actor_ends_with_the_worker_that_made_it", lost_creator),
    ("upward::an_actor_stays_for_whoever_has_a_handle", kept),
    ("upward::named_actors_of_the_driver_are_found", named),
    ("upward::a_mailbox_is_bounded_for_each_worker", full),
    ("upward::who_waits_for_room_lends_and_goes_on", waits_for_room),
    ("upward::large_values_go_to_actors_and_back", large),
    ("upward::who_waits_for_a_constructor_lends_its_cpus", constructor_lends),
    ("upward::an_actor_that_has_no_room_is_refused_as_in_the_driver", no_room),
    ("upward::actors_and_members_have_actors_too", everywhere),
    ("upward::concurrent_and_urgent_calls_are_what_they_are_in_the_driver", concurrent),
    ("upward::pools_work", pools),
    ("upward::streams_come_in_order_and_end", streams),
    ("upward::large_values_of_a_stream_come_whole", large_stream),
    ("upward::errors_come_after_the_values", failing_streams),
    ("upward::a_producer_is_no_further_ahead_than_its_buffer", back_pressure),
    ("upward::a_producer_ends_with_its_consumer", dropped_streams),
    ("upward::a_stream_is_tried_again_without_what_was_delivered", retried_stream),
];

struct Counter(u64);

#[remote(crate = mobula_core)]
impl Counter {
    fn new(start: u64) -> Result<Self, String> {
        assert!(start != 99, "99 is too much");
        if start == 13 { Err("13 is no start".to_owned()) } else { Ok(Self(start)) }
    }

    fn add(&mut self, n: u64) -> u64 {
        self.0 += n;
        self.0
    }

    fn divide(&mut self, by: u64) -> Result<u64, String> {
        assert!(by != 99, "99 is too much");
        self.0.checked_div(by).ok_or_else(|| "by zero".to_owned())
    }

    fn pid(&self) -> u32 {
        std::process::id()
    }

    /// Kills its process the first time; the file remembers that there was a first time.
    fn die_once(&self, marker: PathBuf) -> Result<u64, std::io::Error> {
        if marker.exists() {
            return Ok(self.0);
        }
        std::fs::write(&marker, "")?;
        std::process::abort();
    }

    fn wait_for(&self, file: PathBuf) {
        wait_for_file(&file);
    }

    fn for_ever(&self, file: PathBuf) {
        tell(&file, std::process::id());
        loop {
            std::thread::park();
        }
    }

    #[group("door")]
    fn knock(&self) {}

    fn turn(&mut self, blob: Blob) -> Blob {
        blob.0.iter().rev().copied().collect::<Vec<_>>().into()
    }
}

/// Written beside and renamed, so that who reads it reads all of it.
fn tell(path: &Path, what: impl ToString) {
    let name = path.file_name().expect("a file").to_string_lossy();
    let draft = path.with_file_name(format!("{name}.{}.tmp", std::process::id()));
    let written = std::fs::write(&draft, what.to_string());
    written.and_then(|()| std::fs::rename(&draft, path)).expect("writes");
}

/// Without CPUs of its own: tests beside this one ask for all there are, and would wait for it.
fn in_process(start: u64) -> mobula_core::remote::ActorCall<Counter> {
    Counter::remote(start).on(Placement::Process).with_resources(Resources::default())
}

fn options(name: &str) -> ActorOptions {
    ActorOptions {
        placement: Placement::Process,
        resources: Resources::default(),
        ..ActorOptions::new(name)
    }
}

fn kind(error: &Error) -> String {
    let kind = match error {
        Error::TaskFailed { .. } => "failed",
        Error::TaskPanicked { .. } => "panicked",
        Error::WorkerLost { .. } => "lost",
        Error::NotPlaced { .. } => "not placed",
        Error::Unplaceable { .. } => "unplaceable",
        Error::NoSuchActor { .. } => "unknown",
        _ => "something else",
    };
    format!("{kind}: {error}")
}

/// Where the actor lived, and its sums.
#[remote(crate = mobula_core)]
fn thousand_calls() -> Result<(u32, Vec<u64>), Error> {
    let counter = Runtime::current()?.spawn(in_process(0))?;
    let sums: Vec<_> = (0..1000).map(|_| counter.add(1)).collect();
    let pid = *counter.pid().get()?;
    assert_ne!(pid, std::process::id());
    Ok((pid, collect(&sums)?.iter().map(|sum| **sum).collect()))
}

fn order(runtime: &Runtime) {
    let task = thousand_calls::remote().on(Placement::Process);
    let result = runtime.submit(task).get_timeout(LONG).expect("counts");
    assert_eq!(result.1, (1..=1000).collect::<Vec<_>>());
    assert_ne!(result.0, std::process::id());
    assert_gone(&result.0.to_string());
}

#[remote(crate = mobula_core)]
fn describe_failures() -> Result<Vec<String>, Error> {
    let runtime = Runtime::current()?;
    let large = in_process(1).with_resources(Resources::cpus(64.0));
    let refused = [in_process(13), in_process(99), large].map(|call| runtime.spawn(call));
    let mut said: Vec<_> =
        refused.iter().map(|refused| kind(refused.as_ref().expect_err("fails"))).collect();
    let counter = runtime.spawn(in_process(5))?;
    counter.add(5).get()?;
    said.push(kind(&counter.divide(0).get().expect_err("by zero")));
    assert_eq!(*counter.add(0).get()?, 10, "an error leaves the state");
    said.push(kind(&counter.divide(99).get().expect_err("a panic")));
    assert_eq!(*counter.add(0).get()?, 5, "a panic loses the state");
    Ok(said)
}

fn failures(runtime: &Runtime) {
    let task = describe_failures::remote().on(Placement::Process);
    let said = runtime.submit(task).get_timeout(LONG).expect("describes");
    let expected = [
        ("failed", "13 is no start"),
        ("panicked", "99 is too much"),
        ("unplaceable", "64 CPU"),
        ("failed", "divide failed: by zero"),
        ("panicked", "99 is too much"),
    ];
    assert_eq!(said.len(), expected.len());
    for (said, (kind, text)) in said.iter().zip(expected) {
        assert!(said.starts_with(kind) && said.contains(text), "{said}");
    }
}

#[remote(crate = mobula_core)]
fn call_after_a_death(marker: PathBuf, max_restarts: u32) -> Result<Vec<String>, Error> {
    let options =
        ActorOptions { restart: RestartPolicy::at_most(max_restarts), ..options("counter") };
    let counter = Runtime::current()?.spawn(Counter::remote(7).with_options(options))?;
    counter.add(1).get()?;
    let mut calls = vec![counter.die_once(marker)];
    calls.extend((0..3).map(|_| counter.add(1)));
    let result = |result: Result<_, Error>| {
        result.map_or_else(|e| kind(&e), |sum: std::sync::Arc<u64>| sum.to_string())
    };
    Ok(calls.iter().map(|call| result(call.get())).collect())
}

fn restarts(runtime: &Runtime) {
    for max_restarts in [0, 1] {
        let folder = tempfile::tempdir().expect("temporary folder");
        let marker = folder.path().join("marker");
        let task = call_after_a_death::remote(marker, max_restarts).on(Placement::Process);
        let said = runtime.submit(task).get_timeout(LONG).expect("says");
        assert!(
            said[0].starts_with("lost: counter was lost") && said[0].contains("signal 6"),
            "{}",
            said[0]
        );
        if max_restarts == 1 {
            assert_eq!(said[1..], ["8", "9", "10"], "built anew, in order");
        } else {
            assert!(said[1..].iter().all(|said| said.starts_with("lost: ")), "{said:?}");
        }
    }
}

/// Its process, before and after.
#[remote(crate = mobula_core)]
fn kill_one() -> Result<(u32, String), Error> {
    let counter = Runtime::current()?.spawn(in_process(0))?;
    let pid = counter.actor().pid().expect("it runs");
    assert_eq!(pid, *counter.pid().get()?);
    assert!(counter.actor().is_alive());
    counter.actor().kill();
    let error = counter.add(1).get().expect_err("it was killed");
    assert!(!counter.actor().is_alive());
    assert_eq!(counter.actor().pending(), 0);
    Ok((pid, kind(&error)))
}

fn killed(runtime: &Runtime) {
    let task = kill_one::remote().on(Placement::Process);
    let result = runtime.submit(task).get_timeout(LONG).expect("kills");
    assert!(
        result.1.starts_with("lost: ") && result.1.contains("killed by its owner"),
        "{}",
        result.1
    );
    assert_gone(&result.0.to_string());
}

/// What was sent before the last handle went, and whose process that was.
#[remote(crate = mobula_core)]
fn drop_the_last() -> Result<(u32, u64), Error> {
    let counter = Runtime::current()?.spawn(in_process(1))?;
    let pid = *counter.pid().get()?;
    let copy = counter.clone();
    drop(counter);
    let last = copy.urgent().add(1);
    drop(copy);
    let sum = *last.get()?;
    // While the worker that had the handles is still there.
    assert_gone(&pid.to_string());
    Ok((pid, sum))
}

fn last_handle(runtime: &Runtime) {
    let task = drop_the_last::remote().on(Placement::Process);
    let result = runtime.submit(task).get_timeout(LONG).expect("ends");
    assert_eq!(result.1, 2, "what was sent is done");
}

#[remote(crate = mobula_core)]
fn make_and_wait(folder: PathBuf, how: String) -> Result<(), Error> {
    let counter = Runtime::current()?.spawn(in_process(0).named("left alone"))?;
    let _calls = match how.as_str() {
        "idle" => {
            tell(&folder.join("actor"), *counter.pid().get()?);
            None
        }
        // Of which nobody will hear.
        _ => Some((counter.for_ever(folder.join("actor")), counter.add(1))),
    };
    wait_for_file(&folder.join("actor"));
    tell(&folder.join("creator"), std::process::id());
    loop {
        std::thread::park();
    }
}

fn lost_creator(runtime: &Runtime) {
    for how in ["idle", "in the middle of a call"] {
        let folder = tempfile::tempdir().expect("temporary folder");
        let task = make_and_wait::remote(folder.path().to_owned(), how.to_owned());
        let task = runtime.submit(task.on(Placement::Process));
        let [creator, actor] =
            ["creator", "actor"].map(|name| wait_for_file(&folder.path().join(name)));
        kill(&creator);
        assert!(matches!(task.get_timeout(LONG), Err(Error::WorkerLost { .. })), "{how}");
        assert_gone(&actor);
    }
}

fn kill(pid: &str) {
    let pid = rustix::process::Pid::from_raw(pid.parse().expect("a number")).expect("a process");
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("kill -9");
}

fn kept(runtime: &Runtime) {
    let folder = tempfile::tempdir().expect("temporary folder");
    let task = make_and_wait::remote(folder.path().to_owned(), "idle".to_owned());
    let task = runtime.submit(task.on(Placement::Process));
    let [creator, actor] =
        ["creator", "actor"].map(|name| wait_for_file(&folder.path().join(name)));
    let counter = runtime.named_actor::<Counter>("left alone").expect("the driver knows it");
    assert_eq!(*counter.add(2).get_timeout(LONG).expect("adds"), 2);
    kill(&creator);
    assert!(task.get_timeout(LONG).is_err());
    assert_eq!(*counter.add(2).get_timeout(LONG).expect("still adds"), 4);
    drop(counter);
    assert_gone(&actor);
}

#[remote(crate = mobula_core)]
fn add_to(name: String) -> Result<Result<u64, String>, Error> {
    let found = Runtime::current()?.named_actor::<Counter>(&name);
    let sum = |counter: CounterHandle| counter.add(1).get().map(|sum| *sum);
    Ok(found.and_then(sum).map_err(|error| kind(&error)))
}

fn named(runtime: &Runtime) {
    let add_to = |name: &str| {
        let task = add_to::remote(name.to_owned()).on(Placement::Process);
        (*runtime.submit(task).get_timeout(LONG).expect("says")).clone()
    };
    for (place, name) in [(Placement::Process, "in a process"), (Placement::Thread, "on a thread")]
    {
        let counter = runtime.spawn(Counter::remote(5).on(place).named(name)).expect("starts");
        assert_eq!(add_to(name), Ok(6));
        assert_eq!(*counter.add(1).get_timeout(LONG).expect("adds"), 7, "it is this one");
        assert_eq!(add_to(name), Ok(8));
    }
    let unknown = add_to("in a process").expect_err("its handle is gone");
    assert!(unknown.starts_with("unknown: there is no actor named"), "{unknown}");
}

#[remote(crate = mobula_core)]
fn fill(gate: PathBuf) -> Result<String, Error> {
    let options = ActorOptions { mailbox: 2, ..options("small") };
    let counter = Runtime::current()?.spawn(Counter::remote(0).with_options(options))?;
    let held = counter.wait_for(gate.clone());
    let waiting = counter.try_add(1)?;
    let refused = counter.try_add(1).expect_err("full");
    assert!(refused.is_overloaded(), "{refused}");
    assert_eq!(counter.actor().pending(), 2);
    let urgent = counter.urgent().try_add(1)?;
    // Waits for room, which there is once the gate is open.
    let sender = {
        let counter = counter.clone();
        std::thread::spawn(move || counter.add(1).get().map(|sum| *sum))
    };
    // Messages come in order: when this one is answered, beside the call that waits, the urgent one is there.
    counter.urgent().knock().get()?;
    tell(&gate, "");
    held.get()?;
    assert_eq!((*urgent.get()?, *waiting.get()?), (1, 2));
    assert_eq!(sender.join().expect("no panic")?, 3);
    Ok(refused.to_string())
}

fn full(runtime: &Runtime) {
    let folder = tempfile::tempdir().expect("temporary folder");
    let task = fill::remote(folder.path().join("gate")).on(Placement::Process);
    let said = runtime.submit(task).get_timeout(LONG).expect("fills");
    assert_eq!(*said, "the mailbox of small is full (2 messages)");
}

#[remote(crate = mobula_core)]
fn wait_for_room(calls: u64) -> Result<u64, Error> {
    let options = ActorOptions { mailbox: 16, ..options("small") };
    let counter = Runtime::current()?.spawn(Counter::remote(0).with_options(options))?;
    let sums: Vec<_> = (0..calls).map(|_| counter.add(1)).collect();
    assert!(collect(&sums)?.iter().map(|sum| **sum).eq(1..=calls), "in order");
    Ok(calls)
}

fn waits_for_room(runtime: &Runtime) {
    let task = wait_for_room::remote(300).on(Placement::Process);
    assert_eq!(*runtime.submit(task).get_timeout(LONG).expect("no deadlock"), 300);
}

#[remote(crate = mobula_core)]
fn turn_twice(blob: Blob) -> Result<(u8, u8), Error> {
    let runtime = Runtime::current()?;
    let counter = runtime.spawn(in_process(0))?;
    let turned = counter.turn(blob);
    // One that nobody here looks at on its way.
    let back = counter.turn(&turned);
    let first = back.get()?.0[0];
    let made = runtime.submit(make::remote(3).on(Placement::Process));
    Ok((first, counter.turn(&made).get()?.0[LARGE - 1]))
}

#[remote(crate = mobula_core)]
fn make(byte: u8) -> Blob {
    vec![byte; LARGE].into()
}

fn large(runtime: &Runtime) {
    let mut blob = vec![1; LARGE];
    blob[0] = 2;
    let task = turn_twice::remote(Blob::from(blob)).on(Placement::Process);
    assert_eq!(*runtime.submit(task).get_timeout(LONG).expect("turns"), (2, 3));
}

/// An actor whose constructor needs more than it holds itself.
struct Demanding;

#[remote(crate = mobula_core)]
impl Demanding {
    fn new(cpus: f64) -> Result<Self, Error> {
        let task = make::remote(1).on(Placement::Process).with_resources(Resources::cpus(cpus));
        Runtime::current()?.submit(task).get()?;
        Ok(Self)
    }

    fn ready(&self) -> bool {
        true
    }
}

#[remote(crate = mobula_core)]
fn make_a_demanding_one(cpus: f64) -> Result<bool, Error> {
    let actor = Runtime::current()?.spawn(Demanding::remote(cpus).on(Placement::Process))?;
    Ok(*actor.ready().get()?)
}

fn constructor_lends(runtime: &Runtime) {
    // Of four there are, the task holds two and the actor one: three can be had if both lend them.
    let cpus = Resources::cpus(2.0);
    let task = make_a_demanding_one::remote(3.0).with_resources(cpus.clone());
    let task = runtime.submit(task.on(Placement::Process));
    assert!(*task.get_timeout(LONG).expect("no deadlock"));
    let inner = runtime.clone();
    let thread = Task::new("thread", move || {
        inner.spawn(Demanding::remote(3.0).on(Placement::Process)).map(drop)
    });
    let thread = runtime.submit(thread.with_resources(cpus));
    thread.get_timeout(LONG).expect("nor in the driver");
}

fn for_a_moment() -> ActorOptions {
    ActorOptions {
        placement: Placement::Process,
        resources: Resources::cpus(2.0),
        placement_timeout: Duration::from_millis(50),
        ..ActorOptions::new("one too many")
    }
}

#[remote(crate = mobula_core)]
fn ask_for_room() -> Result<String, Error> {
    let refused = Runtime::current()?.spawn(Counter::remote(0).with_options(for_a_moment()));
    Ok(refused.err().map_or_else(|| "it starts".to_owned(), |error| kind(&error)))
}

fn no_room(runtime: &Runtime) {
    // An actor keeps what it gets: who lends what it gets does not have that back.
    let most = Resources::cpus(runtime.resources().cpus - 1.0);
    let task = ask_for_room::remote().on(Placement::Process).with_resources(most.clone());
    let said = runtime.submit(task).get_timeout(LONG).expect("says");
    let inner = runtime.clone();
    let thread = Task::new("thread", move || {
        let refused = inner.spawn(Counter::remote(0).with_options(for_a_moment()));
        Ok::<_, Error>(refused.err().map(|error| kind(&error)))
    });
    let in_driver = runtime.submit(thread.with_resources(most)).get_timeout(LONG).expect("says");
    for said in [Some(&*said), in_driver.as_ref().as_ref()] {
        let said = said.expect("it is refused");
        assert!(said.starts_with("not placed: one too many waited 50ms for 2 CPU"), "{said}");
    }
}

/// An actor that has another one.
struct Boss(CounterHandle);

#[remote(crate = mobula_core)]
impl Boss {
    fn new() -> Result<Self, Error> {
        Ok(Self(Runtime::current()?.spawn(in_process(10))?))
    }

    fn add(&self, n: u64) -> Result<u64, Error> {
        Ok(*self.0.add(n).get()?)
    }

    fn pid(&self) -> Result<u32, Error> {
        Ok(*self.0.pid().get()?)
    }
}

#[remote(crate = mobula_core)]
fn member(member: Member) -> Result<u64, Error> {
    let counter = Runtime::current()?.spawn(in_process(member.rank() as u64))?;
    Ok(*counter.add(100).get()?)
}

fn everywhere(runtime: &Runtime) {
    let boss = runtime.spawn(Boss::remote().with_options(options("boss"))).expect("starts");
    assert_eq!(*boss.add(1).get_timeout(LONG).expect("adds"), 11);
    let pid = boss.pid().get_timeout(LONG).expect("pid");
    drop(boss);
    assert_gone(&pid.to_string());
    let options = GroupOptions { placement: Placement::Process, ..GroupOptions::new("makers", 2) };
    let group: Group<u64> = runtime.group(&options, &member::remote()).expect("starts");
    assert_eq!(group.join(LONG).expect("answers"), [100, 101]);
}

/// Answers while it waits.
struct Patient;

#[remote(crate = mobula_core)]
impl Patient {
    fn new() -> Self {
        Self
    }

    fn wait_for(&self, file: PathBuf) {
        wait_for_file(&file);
    }

    fn touch(&self, file: PathBuf) {
        tell(&file, "");
    }

    #[group("health")]
    fn is_well(&self) -> bool {
        true
    }
}

#[remote(crate = mobula_core)]
fn wait_and_touch(file: PathBuf) -> Result<(), Error> {
    let runtime = Runtime::current()?;
    let patient = Patient::remote().with_options(options("patient"));
    assert!(matches!(
        runtime.spawn(Patient::remote().with_group("wealth", 2)),
        Err(Error::NoSuchGroup { .. })
    ));
    let patient = runtime.spawn(patient.with_concurrency(2))?;
    let waits = patient.wait_for(file.clone());
    assert!(*patient.is_well().get()?);
    patient.urgent().touch(file).get()?;
    waits.get().map(drop)
}

fn concurrent(runtime: &Runtime) {
    let folder = tempfile::tempdir().expect("temporary folder");
    let task = wait_and_touch::remote(folder.path().join("file")).on(Placement::Process);
    runtime.submit(task).get_timeout(LONG).expect("no deadlock");
}

/// How many members the pool has.
#[remote(crate = mobula_core)]
fn use_a_pool(gate: PathBuf) -> Result<usize, Error> {
    let pool = Runtime::current()?.actor_pool(ActorPoolOptions::fixed(2), |_| in_process(0))?;
    let held = pool.call(|counter| counter.wait_for(gate.clone()))?;
    // The other one has less to do.
    let calls = (0..4).map(|_| pool.call(|counter| counter.add(1))?.get());
    let sums: Vec<u64> = calls.map(|sum| sum.map(|sum| *sum)).collect::<Result<_, Error>>()?;
    assert_eq!(sums, [1, 2, 3, 4]);
    tell(&gate, "");
    held.get()?;
    Ok(pool.size())
}

fn pools(runtime: &Runtime) {
    let folder = tempfile::tempdir().expect("temporary folder");
    let task = use_a_pool::remote(folder.path().join("gate")).on(Placement::Process);
    assert_eq!(*runtime.submit(task).get_timeout(LONG).expect("calls"), 2);
}

#[remote(crate = mobula_core)]
fn count(to: u64, out: Yield<u64>) -> Result<(), Error> {
    (0..to).try_for_each(|n| out.send(n))
}

#[remote(crate = mobula_core)]
fn consume(to: u64, buffer: usize) -> Result<Vec<u64>, Error> {
    let task = count::remote(to).on(Placement::Process).with_buffer(buffer);
    let mut stream = Runtime::current()?.submit_stream(task);
    let values = stream.by_ref().map(|value| value.map(|n| *n)).collect();
    assert!(stream.next().is_none(), "it has ended");
    values
}

fn streams(runtime: &Runtime) {
    for (to, buffer) in [(0, 4), (3000, 1), (3000, 16)] {
        let task = consume::remote(to, buffer).on(Placement::Process);
        let values = runtime.submit(task).get_timeout(LONG).expect("values");
        assert_eq!(*values, (0..to).collect::<Vec<_>>(), "{buffer}");
    }
}

#[remote(crate = mobula_core)]
fn blobs(count: usize, out: Yield<Blob>) -> Result<(), Error> {
    (0..count).try_for_each(|n| out.send(Blob::from(vec![n as u8; LARGE / 4])))
}

/// What was intact, and kept to the end.
#[remote(crate = mobula_core)]
fn consume_blobs(count: usize) -> Result<usize, Error> {
    let task = blobs::remote(count).on(Placement::Process).with_buffer(3);
    let stream = Runtime::current()?.submit_stream(task);
    let kept = stream.collect::<Result<Vec<_>, Error>>()?;
    let is_whole = |(n, blob): &(usize, std::sync::Arc<Blob>)| {
        blob.0.len() == LARGE / 4 && blob.0.iter().all(|byte| *byte == *n as u8)
    };
    Ok(kept.into_iter().enumerate().filter(is_whole).count())
}

fn large_stream(runtime: &Runtime) {
    let task = consume_blobs::remote(20).on(Placement::Process);
    assert_eq!(*runtime.submit(task).get_timeout(LONG).expect("values"), 20);
}

/// Gives three values, then ends as it is told.
#[remote(crate = mobula_core)]
fn three_and(how: String, out: Yield<u32>) -> Result<(), Error> {
    (0..3).try_for_each(|n| out.send(n))?;
    match &*how {
        "panic" => panic!("as told"),
        "abort" => std::process::abort(),
        other => Err(Error::layer(other)),
    }
}

/// How many came before the error, and what that was.
#[remote(crate = mobula_core)]
fn consume_failing(how: String) -> Result<(usize, String), Error> {
    let stream = three_and::remote(how).on(Placement::Process);
    let mut values: Vec<_> = Runtime::current()?.submit_stream(stream).collect();
    let error = values.pop().expect("an end").expect_err("an error");
    assert!(values.iter().all(Result::is_ok), "one error, and that last");
    Ok((values.len(), kind(&error)))
}

fn failing_streams(runtime: &Runtime) {
    let expected = [("fail", "failed: "), ("panic", "panicked: "), ("abort", "lost: ")];
    for (how, kind) in expected {
        let task = consume_failing::remote(how.to_owned()).on(Placement::Process);
        let result = runtime.submit(task).get_timeout(LONG).expect("says");
        assert!(result.1.starts_with(kind) && result.1.contains("three_and"), "{result:?}");
        // What its process had not sent when it aborted is lost with it.
        assert!(result.0 == 3 || (how == "abort" && result.0 < 3), "{result:?}");
    }
}

/// Gives numbers without end, each written to the file before it is sent.
#[remote(crate = mobula_core)]
fn log_numbers(log: PathBuf, out: Yield<u64>) -> Result<(), Error> {
    tell(&log.with_extension("pid"), std::process::id());
    for n in 0.. {
        tell(&log, n);
        out.send(n)?;
    }
    Ok(())
}

/// The most that the producer was ahead.
#[remote(crate = mobula_core)]
fn consume_slowly(log: PathBuf, buffer: usize) -> Result<u64, Error> {
    let task = log_numbers::remote(log.clone()).on(Placement::Process).with_buffer(buffer);
    let stream = Runtime::current()?.submit_stream(task);
    let mut most = 0;
    for (taken, value) in (1..=50).zip(stream) {
        assert_eq!(*value?, taken - 1);
        let begun: u64 = wait_for_file(&log).parse().expect("a number");
        most = most.max((begun + 1).saturating_sub(taken));
    }
    Ok(most)
}

fn back_pressure(runtime: &Runtime) {
    let folder = tempfile::tempdir().expect("temporary folder");
    for buffer in [1, 4] {
        let log = folder.path().join(buffer.to_string());
        let task = consume_slowly::remote(log.clone(), buffer).on(Placement::Process);
        let most = *runtime.submit(task).get_timeout(LONG).expect("consumes");
        // It may have begun one more than there is room for.
        assert!(most <= buffer as u64 + 1, "{most} ahead, with room for {buffer}");
        // Its consumer has had enough.
        assert_gone(&wait_for_file(&log.with_extension("pid")));
    }
}

#[remote(crate = mobula_core)]
fn consume_one_and(log: PathBuf, how: String) -> Result<(), Error> {
    let task = log_numbers::remote(log.clone()).on(Placement::Process);
    let mut stream = Runtime::current()?.submit_stream(task);
    stream.next().expect("endless")?;
    if how == "wait" {
        tell(&log.with_extension("consumer"), std::process::id());
        stream.for_each(drop);
        return Ok(());
    }
    stream.cancel();
    let last = stream.last().expect("an end").expect_err("an error");
    assert!(matches!(last, Error::Cancelled { .. }), "{last}");
    Ok(())
}

fn dropped_streams(runtime: &Runtime) {
    let folder = tempfile::tempdir().expect("temporary folder");
    let log = |name: &str| folder.path().join(name);
    let task = consume_one_and::remote(log("cancelled"), "cancel".to_owned());
    runtime.submit(task.on(Placement::Process)).get_timeout(LONG).expect("ends");
    assert_gone(&wait_for_file(&log("cancelled.pid")));
    let task = consume_one_and::remote(log("killed"), "wait".to_owned()).on(Placement::Process);
    let task = runtime.submit(task);
    kill(&wait_for_file(&log("killed.consumer")));
    assert!(matches!(task.get_timeout(LONG), Err(Error::WorkerLost { .. })));
    assert_gone(&wait_for_file(&log("killed.pid")));
}

/// Gives ten values; the first attempt ends its process after six.
#[remote(crate = mobula_core)]
fn die_after_six(marker: PathBuf, size: usize, out: Yield<Vec<u8>>) -> Result<(), Error> {
    for n in 0..10 {
        if n == 6 && !marker.exists() {
            tell(&marker, "");
            std::process::abort();
        }
        out.send(vec![n; size])?;
    }
    Ok(())
}

#[remote(crate = mobula_core)]
fn consume_retried(marker: PathBuf, size: usize) -> Result<Vec<u8>, Error> {
    let options =
        TaskOptions { placement: Placement::Process, max_retries: 1, ..TaskOptions::default() };
    let task = die_after_six::remote(marker, size).with_options(options).with_buffer(2);
    let stream = Runtime::current()?.submit_stream(task);
    stream.map(|value| value.map(|value| value[size - 1])).collect()
}

fn retried_stream(runtime: &Runtime) {
    let folder = tempfile::tempdir().expect("temporary folder");
    for size in [10, LARGE / 4] {
        let marker = folder.path().join(size.to_string());
        let task = consume_retried::remote(marker, size).on(Placement::Process);
        let values = runtime.submit(task).get_timeout(LONG).expect("values");
        assert_eq!(*values, (0..10).collect::<Vec<u8>>());
    }
}
