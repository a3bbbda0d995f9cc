//! What a program tells of itself: to its own code, to other programs, to Prometheus, and in a
//! timeline.

use crate::Test;
use crate::driver::{assert_gone, wait_for_file};
use mobula_core::status::{self, ActorState, Status};
use mobula_core::{
    ActorOptions, GroupOptions, Member, Placement, Resources, RestartPolicy, RunDir, Runtime, Task,
    remote,
};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const MODE: &str = "MOBULA_TEST_STATUS";
const LONG: Duration = Duration::from_secs(60);

pub(crate) const TESTS: &[Test] = &[
    ("status::tasks_are_counted_by_where_they_stand", counts),
    ("status::a_program_answers_who_asks", answers),
    ("status::only_the_user_reaches_the_socket", private),
    ("status::what_a_killed_program_left_is_cleaned_up", cleaned),
    ("status::a_run_leads_to_its_program_however_long_its_path", runs),
    ("status::who_asks_nonsense_or_nothing_harms_nobody", nonsense),
    ("status::prometheus_scrapes_over_http", scraped),
    ("status::a_wrong_address_for_metrics_is_an_error", wrong_address),
    ("status::the_timeline_has_what_ran_and_is_valid_when_killed", timeline),
];

/// Whether this process was started by a test of this module.
pub(crate) fn requested() -> bool {
    std::env::var_os(MODE).is_some()
}

/// The program that is looked at: it does known work, says so, and waits to be killed.
pub(crate) fn run() -> Result<(), Box<dyn std::error::Error>> {
    let runtime = mobula_core::init_with(Resources::cpus(6.0).with_custom("\"desk\"", 1.0))?;
    let folder = PathBuf::from(std::env::var(MODE)?);
    let _run = RunDir::create_at(folder.join("run"), 1, &())?;
    for i in 0..3 {
        runtime.submit(double::remote(i).on(Placement::Process)).get()?;
        runtime.submit(Task::new("here", || Ok::<_, String>(()))).get()?;
    }
    let failed = runtime.submit(Task::new("fails", || Err::<(), _>("on purpose".to_owned())));
    assert!(failed.get().is_err());
    let crashed = runtime.submit(crash::remote().on(Placement::Process));
    assert!(crashed.get().is_err());
    let large = runtime.submit(make_large::remote().on(Placement::Process));
    large.get()?;
    let stuck = runtime.submit(linger::remote().on(Placement::Process));
    let restart = RestartPolicy::at_most(1);
    let options =
        ActorOptions { placement: Placement::Process, restart, ..ActorOptions::new("desk") };
    let desk = runtime.spawn(Desk::remote().with_options(options))?;
    let _ = desk.crash().get();
    desk.work().get()?;
    let clerk = runtime.spawn_actor(ActorOptions::new("clerk"), || Ok(0))?;
    clerk.call_blocking(|count| *count += 1)?;
    let group = runtime.group(&GroupOptions::new("choir", 1), &sing::remote())?;
    // Last: what waits for all CPUs holds up what comes after it.
    let all = Resources::cpus(6.0);
    let never = runtime.submit(Task::new("never", || Ok::<_, String>(())).with_resources(all));
    let gone = runtime
        .submit(Task::new("gone", || Ok::<_, String>(())).with_resources(Resources::cpus(6.0)));
    gone.cancel();
    std::fs::write(folder.join("ready.tmp"), "")?;
    std::fs::rename(folder.join("ready.tmp"), folder.join("ready"))?;
    let _kept = (large, stuck, never, desk, clerk, group);
    loop {
        std::thread::park();
    }
}

#[remote(crate = mobula_core)]
fn double(n: u64) -> u64 {
    2 * n
}

#[remote(crate = mobula_core)]
fn crash() {
    std::process::abort();
}

#[remote(crate = mobula_core)]
fn make_large() -> Vec<u8> {
    vec![1; 1 << 20]
}

#[remote(crate = mobula_core)]
fn linger() {
    loop {
        std::thread::park();
    }
}

#[remote(crate = mobula_core)]
fn sing(_member: Member) -> Result<(), String> {
    loop {
        std::thread::park();
    }
}

struct Desk;

#[remote(crate = mobula_core)]
impl Desk {
    fn new() -> Self {
        Self
    }

    fn work(&self) {}

    fn crash(&self) {
        std::process::abort();
    }
}

/// The program under test, in a folder of its own; killed when dropped.
struct Program {
    child: Child,
    folder: tempfile::TempDir,
}

impl Program {
    fn start(variables: &[(&str, &str)]) -> Self {
        let folder = tempfile::tempdir().expect("temporary folder");
        let exe = std::env::current_exe().expect("this binary");
        let mut command = Command::new(exe);
        command.env(MODE, folder.path()).envs(variables.iter().copied());
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        Self { child: command.spawn().expect("start the program"), folder }
    }

    fn ready(variables: &[(&str, &str)]) -> Self {
        let program = Self::start(variables);
        wait_for_file(&program.folder.path().join("ready"));
        program
    }

    fn run(&self) -> PathBuf {
        self.folder.path().join("run")
    }

    fn socket(&self) -> PathBuf {
        std::fs::read_link(self.run().join("status.sock")).expect("a link to the socket")
    }

    fn kill(&mut self) {
        self.child.kill().expect("kill -9");
        self.child.wait().expect("reap");
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A task's end is counted just after its result is there.
fn until(look: impl Fn() -> Status, done: impl Fn(&Status) -> bool) -> Status {
    let deadline = Instant::now() + LONG;
    loop {
        let status = look();
        if done(&status) {
            return status;
        }
        assert!(Instant::now() < deadline, "{status:#?}");
        std::thread::yield_now();
    }
}

fn counts(_: &Runtime) {
    let runtime = Runtime::local(Resources::cpus(1.0)).expect("a runtime");
    let (open, gate) = std::sync::mpsc::channel::<()>();
    let gate = std::sync::Mutex::new(gate);
    let blocked = runtime.submit(Task::new("blocked", move || {
        let _ = gate.lock().expect("one at a time").recv();
        Ok::<_, String>(())
    }));
    let queued = runtime.submit(Task::new("queued", || Ok::<_, String>(())));
    let cancelled = runtime.submit(Task::new("cancelled", || Ok::<_, String>(())));
    cancelled.cancel();
    let tasks = |status: &Status| {
        let tasks = status.tasks;
        [tasks.waiting, tasks.running, tasks.finished, tasks.failed, tasks.cancelled]
    };
    let status = until(|| runtime.status(), |status| tasks(status) == [1, 1, 0, 0, 1]);
    assert_eq!(status.nodes[0].total, Resources::cpus(1.0));
    assert_eq!(status.nodes[0].free, Resources::cpus(0.0));
    open.send(()).expect("it waits");
    blocked.get().expect("unblocked");
    queued.get().expect("its turn came");
    let failed = runtime.submit(Task::new("failed", || Err::<(), _>("no".to_owned())));
    failed.get().expect_err("it fails");
    let status = until(|| runtime.status(), |status| tasks(status) == [0, 0, 2, 1, 1]);
    assert_eq!(status.tasks.submitted, 4);
    assert!(status.workers.is_empty() && status.actors.is_empty());
}

fn answers(_: &Runtime) {
    let program = Program::ready(&[]);
    let pid = program.child.id();
    let look = || status::of_pid(pid).expect("it answers");
    // Six that ran, one that makes a large value; one that fails, one that crashes.
    let done = |status: &Status| {
        let tasks = status.tasks;
        let ended = [tasks.finished, tasks.failed, tasks.cancelled];
        [tasks.waiting, tasks.running] == [1, 1] && ended == [7, 2, 1]
    };
    let status = until(look, done);
    assert_eq!(status.program.pid, pid);
    assert_eq!(status.program.runs, [program.run()]);
    assert!(status.program.resident_bytes > 0);
    let node = &status.nodes[0];
    assert_eq!((node.total.cpus, node.total.custom["\"desk\""]), (6.0, 1.0));
    // One for the task that lingers, the actors and the member of the group.
    assert_eq!(node.free.cpus, 2.0);
    assert!(status.objects.count >= 1 && status.objects.memory_bytes >= 1 << 20);
    assert!(status.objects.budget_bytes > status.objects.memory_bytes);

    let actor = |name: &str| status.actors.iter().find(|actor| actor.name == name).expect(name);
    let desk = actor("desk");
    assert_eq!((desk.state, desk.restarts, desk.pending), (ActorState::Running, 1, 0));
    assert_eq!((actor("clerk").state, actor("clerk").pid), (ActorState::Running, None));
    let worker = |name: &str| status.workers.iter().find(|worker| worker.name == name).expect(name);
    assert_eq!((Some(worker("desk").pid), worker("desk").busy), (desk.pid, false));
    assert!(worker("choir rank 0").busy);
    assert!(status.workers.iter().any(|worker| worker.name == "tasks" && worker.busy));
    // One that ends in this moment has none.
    assert!(worker("desk").resident_bytes > 1 << 20);
    // Its process may have been started a moment ago.
    assert!(worker("choir rank 0").resident_bytes > 0);
    assert!(status::running().iter().any(|(other, answer)| *other == pid && answer.is_ok()));
}

fn private(_: &Runtime) {
    let program = Program::ready(&[]);
    let socket = program.socket();
    let mode = |path: &Path| {
        std::fs::symlink_metadata(path).expect("is there").permissions().mode() & 0o777
    };
    assert_eq!(mode(&socket), 0o600);
    assert_eq!(mode(socket.parent().expect("a folder")), 0o700);
}

fn cleaned(_: &Runtime) {
    let mut program = Program::ready(&[]);
    let (pid, socket) = (program.child.id(), program.socket());
    program.kill();
    assert!(socket.exists(), "nobody could take it away");
    assert!(status::running().iter().all(|(other, _)| *other != pid));
    assert!(!socket.exists());
    let error = status::of_pid(pid).expect_err("it is gone").to_string();
    assert!(error.contains(&pid.to_string()), "{error}");
    let error = status::of_run(program.run()).expect_err("it is gone").to_string();
    assert!(error.contains("interrupted"), "{error}");
    assert!(std::fs::symlink_metadata(program.run().join("status.sock")).is_err());
}

fn runs(runtime: &Runtime) {
    let folder = tempfile::tempdir().expect("temporary folder");
    let run = RunDir::create(folder.path().join("x".repeat(200)), "long", 1, &()).expect("a run");
    let status = status::of_run(run.path()).expect("this program answers");
    assert_eq!(status.program.pid, std::process::id());
    assert!(status.program.runs.iter().any(|path| path.ends_with("long")));
    run.set_state(mobula_core::run::RunState::Finished).expect("written");
    let error = status::of_run(run.path()).expect_err("nobody works on it").to_string();
    assert!(error.contains("finished"), "{error}");
    assert_eq!(runtime.status().program.pid, std::process::id());
}

fn nonsense(_: &Runtime) {
    let program = Program::ready(&[]);
    let connect = || std::os::unix::net::UnixStream::connect(program.socket()).expect("it listens");
    // As many as are answered at one time say nothing, and are sent away when their time is over.
    let _silent: Vec<_> = (0..4).map(|_| connect()).collect();
    let mut wrong = connect();
    wrong.write_all(b"GET / HTTP/1.1\r\n\r\n").expect("it reads");
    let mut answer = String::new();
    let _ = wrong.read_to_string(&mut answer);
    assert!(answer.contains("\"error\""), "{answer}");
    status::of_pid(program.child.id()).expect("it still answers");
}

fn scraped(_: &Runtime) {
    let mut program = Program::ready(&[("MOBULA_METRICS", "127.0.0.1:0")]);
    let mut said = BufReader::new(program.child.stderr.take().expect("piped")).lines();
    let address = said.find_map(|line| {
        let line = line.expect("text");
        let address = line.strip_prefix("Metrics at http://")?.strip_suffix("/metrics")?;
        Some(address.to_owned())
    });
    let address = address.expect("an address");
    let get = |request: &str| {
        let mut stream = TcpStream::connect(&address).expect("it listens");
        let request = format!("{request} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).expect("it reads");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        answer
    };
    let page = get("GET /metrics");
    assert!(page.starts_with("HTTP/1.1 200 OK\r\n"), "{page}");
    assert!(page.contains("content-type: text/plain; version=0.0.4"), "{page}");
    for line in [
        "# TYPE mobula_tasks gauge",
        r#"mobula_tasks{state="waiting"} 1"#,
        r#"resource="\"desk\""} 1"#,
        r#"mobula_actor_restarts{actor="desk"} 1"#,
    ] {
        assert!(page.contains(line), "{line} in\n{page}");
    }
    assert!(get("GET /other").starts_with("HTTP/1.1 404 "));
    assert!(get("POST /metrics").starts_with("HTTP/1.1 405 "));
}

fn wrong_address(_: &Runtime) {
    let mut program = Program::start(&[("MOBULA_METRICS", "here")]);
    let mut said = String::new();
    let mut stderr = program.child.stderr.take().expect("piped");
    stderr.read_to_string(&mut said).expect("text");
    assert!(!program.child.wait().expect("it ends").success());
    assert!(said.contains("MOBULA_METRICS") && said.contains("127.0.0.1:9100"), "{said}");
}

fn timeline(_: &Runtime) {
    let folder = tempfile::tempdir().expect("temporary folder");
    let file = folder.path().join("timeline.json");
    let path = file.to_str().expect("a path in UTF-8");
    let mut program = Program::ready(&[("MOBULA_TIMELINE", path)]);
    // Another program with the same environment leaves the file alone.
    let other = Program::ready(&[("MOBULA_TIMELINE", path)]);
    let beside = folder.path().join(format!("timeline.{}.json", other.child.id()));
    assert!(wait_for_file(&beside).contains("driver"));

    let events = || -> Vec<serde_json::Value> {
        serde_json::from_str(&wait_for_file(&file)).expect("a JSON array")
    };
    let has = |end: &str| {
        let ends =
            |event: &serde_json::Value| event["name"].as_str().is_some_and(|n| n.ends_with(end));
        events().iter().any(ends)
    };
    let deadline = Instant::now() + LONG;
    while !has("actor restarts") || !has("work") {
        assert!(Instant::now() < deadline, "{:#?}", events());
        std::thread::yield_now();
    }
    let pid = program.child.id();
    program.kill();
    let events = events();
    let named = |name: &str| {
        let matching = events.iter().filter(|event| event["name"] == name);
        matching.cloned().collect::<Vec<_>>()
    };
    let here = named("here");
    assert_eq!(here.len(), 3);
    assert!(here.iter().all(|e| e["ph"] == "X" && e["pid"] == pid && e["dur"].is_number()));
    let outcome = |name: &str| named(name)[0]["args"]["outcome"].clone();
    assert_eq!(outcome("fails"), "failed");
    let of = |end: &str| {
        let ends =
            |event: &&serde_json::Value| event["name"].as_str().is_some_and(|n| n.ends_with(end));
        events.iter().filter(ends).cloned().collect::<Vec<_>>()
    };
    assert_eq!(of("double").len(), 3, "{events:#?}");
    assert!(of("double").iter().all(|event| event["pid"] != pid));
    assert_eq!(of("crash").iter().filter(|e| e["args"]["outcome"] == "lost").count(), 2);
    assert_eq!(of("work")[0]["args"]["outcome"], "finished");
    let names = named("process_name");
    let is_named = |start: &str| {
        names.iter().any(|e| e["args"]["name"].as_str().is_some_and(|name| name.starts_with(start)))
    };
    assert!(is_named("driver (") && is_named("tasks (") && is_named("desk (") && is_named("choir"));
    assert!(named("process ended").len() >= 2, "{events:#?}");
    assert_gone(&pid.to_string());
}
