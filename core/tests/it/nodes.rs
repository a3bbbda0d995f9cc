//! Several machines: this binary, started several times as a launcher would, each copy with the
//! environment of a node of its own. The first copy runs a scenario as the driver.

use crate::Test;
use crate::driver::{assert_gone, wait_for_file};
use mobula_core::value::Blob;
use mobula_core::{
    ActorOptions, Error, GroupOptions, Member, Node, Placement, PlacementGroupOptions,
    PlacementStrategy, Resources, RestartPolicy, Runtime, Task, TaskOptions, Yield, collect,
    remote,
};
use std::collections::HashSet;
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

const SCENARIO: &str = "MOBULA_TEST_NODES";
const LONG: Duration = Duration::from_secs(60);
const LARGE: usize = 8 << 20;

pub(crate) const TESTS: &[Test] = &[
    ("nodes::each_machine_is_used_and_all_end_with_the_driver", each_machine_is_used),
    ("nodes::large_values_go_from_machine_to_machine", large_values),
    ("nodes::a_group_is_spread_over_machines", spread_group),
    ("nodes::what_a_lost_machine_did_is_done_elsewhere", lost_machine),
    ("nodes::a_killed_driver_leaves_no_copy_and_no_worker", killed_driver),
    ("nodes::copies_on_one_machine_count_its_cpus_once", copies_on_one_machine),
    ("nodes::nobody_joins_without_the_secret", wrong_secret),
    ("nodes::a_file_will_do_for_a_secret", secret_in_a_file),
    ("nodes::a_silent_machine_is_lost", silent_machine),
    ("nodes::a_machine_joins_later", joins_later),
    ("nodes::values_are_streamed_from_afar", streams),
];

/// Whether this process was started by a test of this module.
pub(crate) fn requested() -> bool {
    std::env::var_os(SCENARIO).is_some()
}

/// The program under test: copy 0 runs the scenario, the others never leave `init`.
pub(crate) fn run() -> Result<(), Box<dyn std::error::Error>> {
    let runtime = mobula_core::init_with(Resources::cpus(2.0))?;
    let scenario: fn(&Runtime) = match std::env::var(SCENARIO)?.as_str() {
        "each machine" => scenarios::each_machine,
        "large values" => scenarios::large_values,
        "spread group" => scenarios::spread_group,
        "lost machine" => scenarios::lost_machine,
        "long task" => scenarios::long_task,
        "count" => scenarios::count,
        "silent machine" => scenarios::silent_machine,
        "joins later" => scenarios::joins_later,
        "streams" => scenarios::streams,
        other => return Err(format!("there is no scenario {other}").into()),
    };
    scenario(&runtime);
    Ok(())
}

/// The copies of one launch. Those that are left are killed in the end.
struct Launch {
    copies: Vec<Child>,
    folder: tempfile::TempDir,
}

impl Launch {
    /// As many copies on each machine as the layout says.
    fn start(scenario: &str, layout: &[usize], change: impl Fn(usize, &mut Command)) -> Self {
        let folder = tempfile::tempdir().expect("temporary folder");
        let port = TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a port");
        let places = layout.iter().enumerate();
        let places =
            places.flat_map(|(node, size)| (0..*size).map(move |local| (node, local, size)));
        let copies = places.enumerate().map(|(rank, (node, local, size))| {
            let mut command = Command::new(std::env::current_exe().expect("this binary"));
            let numbers = [
                ("RANK", rank),
                ("WORLD_SIZE", layout.iter().sum()),
                ("LOCAL_RANK", local),
                ("LOCAL_WORLD_SIZE", *size),
                ("GROUP_RANK", node),
                ("MASTER_PORT", usize::from(port.port())),
            ];
            command.envs(numbers.map(|(name, number)| (name, number.to_string())));
            command.env("MASTER_ADDR", "127.0.0.1").env("MOBULA_SECRET", "for this test");
            command.env(SCENARIO, scenario).env("MOBULA_TEST_DIR", folder.path());
            command.current_dir(folder.path());
            command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
            change(rank, &mut command);
            command.spawn().expect("starts")
        });
        let copies = copies.collect();
        Self { copies, folder }
    }

    /// Waits until all copies have ended.
    fn end(mut self) -> Vec<Output> {
        let deadline = Instant::now() + LONG;
        for (rank, copy) in self.copies.iter_mut().enumerate() {
            while copy.try_wait().expect("a child of ours").is_none() {
                assert!(Instant::now() < deadline, "copy {rank} does not end");
                std::thread::yield_now();
            }
        }
        let copies = std::mem::take(&mut self.copies).into_iter();
        copies.map(|copy| copy.wait_with_output().expect("output")).collect()
    }

    /// Waits for the end, and expects success of all.
    fn succeed(self) -> Vec<Output> {
        let outputs = self.end();
        for (rank, output) in outputs.iter().enumerate() {
            assert!(output.status.success(), "copy {rank}: {}\n{}", output.status, said(&outputs));
        }
        outputs
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

impl Drop for Launch {
    fn drop(&mut self) {
        for copy in &mut self.copies {
            let _ = copy.kill();
            let _ = copy.wait();
        }
    }
}

fn said(outputs: &[Output]) -> String {
    let text = |output: &Output| {
        format!(
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        )
    };
    outputs.iter().map(text).collect::<Vec<_>>().join("\n--\n")
}

fn each_machine_is_used(_: &Runtime) {
    Launch::start("each machine", &[1, 1, 1], |_, _| {}).succeed();
}

fn large_values(_: &Runtime) {
    Launch::start("large values", &[1, 1, 1], |_, _| {}).succeed();
}

fn spread_group(_: &Runtime) {
    let outputs = Launch::start("spread group", &[1, 1, 1], |_, _| {}).succeed();
    // What a worker prints on another machine reaches the driver.
    let driver = said(&outputs[..1]);
    for rank in 0..3 {
        assert!(driver.contains(&format!("[rank {rank}] here is {rank}")), "{driver}");
    }
}

fn copies_on_one_machine(_: &Runtime) {
    let outputs = Launch::start("count", &[4], |_, _| {}).succeed();
    assert!(said(&outputs[..1]).contains("2 CPU on 1 nodes"), "{}", said(&outputs));
    let outputs = Launch::start("count", &[2, 2, 2], |_, _| {}).succeed();
    assert!(said(&outputs[..1]).contains("6 CPU on 3 nodes"), "{}", said(&outputs));
}

fn wrong_secret(_: &Runtime) {
    let launch = Launch::start("count", &[1, 1, 1], |rank, command| {
        command.env("MOBULA_JOIN_TIMEOUT", "4");
        if rank == 1 {
            command.env("MOBULA_SECRET", "for another test");
        }
    });
    let outputs = launch.end();
    let codes: Vec<_> = outputs.iter().map(|output| output.status.code()).collect();
    assert_eq!(codes, [Some(0), Some(1), Some(0)], "{}", said(&outputs));
    assert!(said(&outputs[..1]).contains("4 CPU on 2 nodes"), "{}", said(&outputs));
    assert!(said(&outputs[..1]).contains("1 of 2 other copies have joined"), "{}", said(&outputs));
    assert!(said(&outputs[1..2]).contains("set MOBULA_SECRET alike"), "{}", said(&outputs));
}

fn secret_in_a_file(_: &Runtime) {
    let launch = Launch::start("count", &[1, 1], |_, command| {
        command.env_remove("MOBULA_SECRET");
    });
    let runs = launch.file("runs");
    let outputs = launch.end();
    assert!(said(&outputs[..1]).contains("4 CPU on 2 nodes"), "{}", said(&outputs));
    assert!(!runs.exists(), "the folder of the test goes with the launch");
}

fn killed_driver(_: &Runtime) {
    let mut launch = Launch::start("long task", &[1, 1], |_, _| {});
    let worker = wait_for_file(&launch.file("worker"));
    launch.copies[0].kill().expect("kill -9");
    let outputs = launch.end();
    assert_eq!(outputs[1].status.code(), Some(1), "{}", said(&outputs));
    assert!(said(&outputs[1..]).contains("the driver is gone"), "{}", said(&outputs));
    assert_gone(&worker);
}

fn lost_machine(_: &Runtime) {
    let mut launch = Launch::start("lost machine", &[1, 1, 1], |_, _| {});
    let agent = wait_for_file(&launch.file("victim"));
    let victim = launch.copies.iter_mut().find(|copy| copy.id().to_string() == agent);
    victim.expect("an agent").kill().expect("kill -9");
    let outputs = launch.end();
    assert!(outputs[0].status.success(), "{}", said(&outputs));
    let lost = outputs.iter().filter(|output| !output.status.success()).count();
    assert_eq!(lost, 1, "{}", said(&outputs));
}

fn streams(_: &Runtime) {
    Launch::start("streams", &[1, 1], |_, _| {}).succeed();
}

fn silent_machine(_: &Runtime) {
    use rustix::process::{Pid, Signal, kill_process};
    let mut launch = Launch::start("silent machine", &[1, 1], |_, _| {});
    wait_for_file(&launch.file("worker"));
    let agent = Pid::from_child(&launch.copies[1]);
    kill_process(agent, Signal::STOP).expect("stops");
    let deadline = Instant::now() + LONG;
    while launch.copies[0].try_wait().expect("a child of ours").is_none() {
        assert!(Instant::now() < deadline, "nobody noticed");
        std::thread::yield_now();
    }
    kill_process(agent, Signal::CONT).expect("goes on");
    let outputs = launch.end();
    assert!(outputs[0].status.success(), "{}", said(&outputs));
    assert!(said(&outputs[..1]).contains("no heartbeat for 4s"), "{}", said(&outputs));
}

fn joins_later(_: &Runtime) {
    let port = TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a port");
    let alone = |command: &mut Command| {
        let launched = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK"];
        for name in launched {
            command.env_remove(name);
        }
    };
    let mut launch = Launch::start("joins later", &[1], |_, command| {
        alone(command);
        command.env("MOBULA_LISTEN", port.to_string());
    });
    wait_for_file(&launch.file("alone"));
    let mut agent = Launch::start("joins later", &[1], |_, command| {
        alone(command);
        command.env("MOBULA_JOIN", port.to_string());
        command.env("MOBULA_TEST_DIR", launch.folder.path());
    });
    launch.copies.append(&mut agent.copies);
    launch.succeed();
}

fn folder() -> PathBuf {
    std::env::var_os("MOBULA_TEST_DIR").expect("set by the test").into()
}

/// Written beside and renamed, so that who reads it reads all of it.
fn tell(name: &str, text: &str) {
    let path = folder().join(name);
    let draft = path.with_extension(format!("{}.tmp", std::process::id()));
    std::fs::write(&draft, text).and_then(|()| std::fs::rename(&draft, &path)).expect("writes");
}

/// The agent, or the driver, whose worker runs this.
/// The process of this worker's machine: the fork server is between them.
fn machine() -> u32 {
    std::env::var("MOBULA_DRIVER_PID").ok().and_then(|pid| pid.parse().ok()).unwrap_or(0)
}

#[remote(crate = mobula_core)]
fn parent() -> Result<u32, Error> {
    Ok(machine())
}

#[remote(crate = mobula_core)]
fn make(byte: u8) -> Result<Blob, Error> {
    Ok(vec![byte; LARGE].into())
}

#[remote(crate = mobula_core)]
fn add(a: Blob, b: Blob) -> Result<u64, Error> {
    assert_eq!((a.0.len(), b.0.len()), (LARGE, LARGE));
    Ok(a.0.iter().chain(b.0.iter()).map(|byte| u64::from(*byte)).sum())
}

/// Its own tasks go wherever there is room; what they give is only looked at by others.
#[remote(crate = mobula_core)]
fn add_made(n: u8) -> Result<u64, Error> {
    let runtime = Runtime::current()?;
    let submit = |byte| runtime.submit(make::remote(byte).on(Placement::Process));
    let (a, b) = (submit(n), submit(n + 1));
    let sum = *runtime.submit(add::remote(&a, &b).on(Placement::Process)).get()?;
    assert_eq!(a.get()?.0[0], n);
    Ok(sum)
}

#[remote(crate = mobula_core)]
fn here(member: Member) -> Result<u32, Error> {
    println!("here is {}", member.rank());
    let parent = machine();
    let all = member.all_gather("parents", &parent.to_le_bytes(), LONG)?;
    let all: HashSet<_> = all.into_iter().collect();
    Ok(all.len() as u32)
}

/// Where it runs first it stays until its machine is lost; elsewhere it returns.
#[remote(crate = mobula_core)]
fn stay(name: String) -> Result<u32, Error> {
    let parent = machine();
    if wait_until(|| folder().join("victim").exists(), Duration::ZERO) {
        return Ok(parent);
    }
    tell(&name, &parent.to_string());
    loop {
        std::thread::park();
    }
}

fn wait_until(done: impl Fn() -> bool, timeout: Duration) -> bool {
    let deadline = Instant::now() + timeout;
    while !done() {
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::yield_now();
    }
    true
}

struct Counter(u32);

#[remote(crate = mobula_core)]
impl Counter {
    fn new() -> Result<Self, Error> {
        Ok(Self(0))
    }

    fn count(&mut self) -> Result<u32, Error> {
        self.0 += 1;
        Ok(self.0)
    }

    fn parent(&mut self) -> Result<u32, Error> {
        Ok(machine())
    }
}

mod scenarios {
    use super::*;

    fn on(node: Node) -> TaskOptions {
        TaskOptions { placement: Placement::Process, node: Some(node), ..TaskOptions::default() }
    }

    pub(super) fn count(runtime: &Runtime) {
        println!("{} on {} nodes", runtime.resources(), runtime.nodes().len());
    }

    pub(super) fn each_machine(runtime: &Runtime) {
        assert_eq!(runtime.resources().cpus, 6.0);
        let nodes: Vec<Node> = runtime.nodes().iter().map(|info| info.node).collect();
        assert_eq!((nodes.len(), nodes[0]), (3, Node::HERE));
        let parents = nodes.iter().map(|node| parent::remote().with_options(on(*node)));
        let parents: Vec<_> = parents.map(|task| runtime.submit(task)).collect();
        let parents: HashSet<u32> =
            collect(&parents).expect("run").iter().map(|parent| **parent).collect();
        assert_eq!(parents.len(), 3, "one parent on each machine");
        assert!(parents.contains(&std::process::id()));
        // One bundle a machine, all or none; more than there are machines never fit.
        let bundles = |n| vec![Resources::cpus(2.0); n];
        let strict = |n| {
            let options = PlacementGroupOptions::new("strict", bundles(n));
            runtime.placement_group(&options.with_strategy(PlacementStrategy::StrictSpread))
        };
        assert!(matches!(strict(4), Err(Error::Unplaceable { .. })));
        let group = strict(3).expect("one a machine");
        assert_eq!(runtime.free_resources().cpus, 0.0);
        let inside = (0..3).map(|bundle| {
            let bundle = Some(group.bundle(bundle).expect("three"));
            let options = TaskOptions { bundle, node: None, ..on(Node::HERE) };
            runtime.submit(parent::remote().with_options(options))
        });
        let inside: Vec<_> = inside.collect();
        let inside: HashSet<u32> = collect(&inside).expect("run").iter().map(|p| **p).collect();
        assert_eq!(inside, parents);
        drop(group);
        // Threads are the driver's: the CPUs of others are of no use to them.
        let wide = Task::new("wide", || Ok::<_, Error>(())).with_resources(Resources::cpus(3.0));
        assert!(matches!(runtime.submit(wide).get(), Err(Error::Unplaceable { .. })));
        let far = Task::new("far", || Ok::<_, Error>(()))
            .with_options(TaskOptions { placement: Placement::Thread, ..on(nodes[1]) });
        assert!(matches!(runtime.submit(far).get(), Err(Error::ThreadElsewhere { .. })));
        // Many small ones at once.
        let many: Vec<_> =
            (0..500).map(|_| runtime.submit(parent::remote().on(Placement::Process))).collect();
        collect(&many).expect("run");
    }

    pub(super) fn large_values(runtime: &Runtime) {
        let nodes: Vec<Node> = runtime.nodes().iter().map(|info| info.node).collect();
        let made: Vec<_> = (0..3)
            .map(|i| runtime.submit(make::remote(i as u8 + 1).with_options(on(nodes[i]))))
            .collect();
        let put = runtime.put(Blob::from(vec![4; LARGE]));
        let mut sums = Vec::new();
        for (n, node) in nodes.iter().enumerate() {
            for (i, object) in made.iter().enumerate() {
                let task = add::remote(object, &put).with_options(on(*node));
                sums.push((n, i, runtime.submit(task)));
            }
        }
        for (n, i, sum) in sums {
            let expected = (i as u64 + 1 + 4) * LARGE as u64;
            assert_eq!(*sum.get().expect("sums"), expected, "value of node {i} on node {n}");
        }
        for (i, object) in made.iter().enumerate() {
            assert_eq!(object.get().expect("fetched").0, vec![i as u8 + 1; LARGE]);
        }
        // Tasks of tasks, from every machine, with hardly a CPU to spare.
        let sums = nodes
            .iter()
            .flat_map(|node| (0..2).map(move |n| (n, add_made::remote(n).with_options(on(*node)))));
        let sums: Vec<_> = sums.map(|(n, task)| (n, runtime.submit(task))).collect();
        for (n, sum) in sums {
            assert_eq!(*sum.get().expect("sums"), (2 * u64::from(n) + 1) * LARGE as u64);
        }
        // An actor far away takes values from everywhere, and a thread here too.
        let here = add::remote(&made[1], &made[2]).on(Placement::Thread);
        assert_eq!(*runtime.submit(here).get().expect("sums"), 5 * LARGE as u64);
    }

    pub(super) fn spread_group(runtime: &Runtime) {
        let options = GroupOptions {
            strategy: PlacementStrategy::StrictSpread,
            ..GroupOptions::new("spread", 3)
        };
        let group = runtime.group(&options, &here::remote()).expect("fits");
        assert_eq!(group.join(LONG).expect("gathers"), [3, 3, 3]);
    }

    pub(super) fn streams(runtime: &Runtime) {
        let node = runtime.nodes()[1].node;
        // More than may be under way, small ones and large ones.
        for (count, size) in [(500, 10), (20, 1 << 20)] {
            let task = yield_many::remote(count, size).with_options(on(node));
            let values: Result<Vec<_>, Error> = runtime.submit_stream(task).collect();
            let values = values.expect("streams");
            assert_eq!(values.len(), count);
            for (n, value) in values.iter().enumerate() {
                assert_eq!(value.0, vec![n as u8; size]);
            }
        }
    }

    pub(super) fn silent_machine(runtime: &Runtime) {
        let node = runtime.nodes()[1].node;
        let task = runtime.submit(linger::remote().with_options(on(node)));
        let error = task.get().expect_err("its machine says nothing").to_string();
        assert!(error.contains("node 1"), "{error}");
        assert_eq!(runtime.nodes().len(), 1);
    }

    pub(super) fn joins_later(runtime: &Runtime) {
        assert_eq!(runtime.nodes().len(), 1);
        let waits = || place_of_two::remote().on(Placement::Process);
        let tasks: Vec<_> = (0..4).map(|_| runtime.submit(waits())).collect();
        tell("alone", "");
        // Four at a time: two here, and two on the machine that joins.
        assert_eq!(collect(&tasks).expect("run").len(), 4);
        assert_eq!(runtime.resources().cpus, 4.0);
    }

    pub(super) fn long_task(runtime: &Runtime) {
        let node = runtime.nodes()[1].node;
        let task = linger::remote().with_options(on(node));
        drop(runtime.submit(task).get());
    }

    pub(super) fn lost_machine(runtime: &Runtime) {
        let nodes = runtime.nodes();
        let (victim, survivor) = (nodes[1].node, nodes[2].node);
        let retried = TaskOptions { max_retries: 1, node: None, ..on(victim) };
        // With the driver's machine full, work is packed onto the next.
        let full = (0..2).map(|_| wait_for_victim::remote().with_options(on(Node::HERE)));
        let full: Vec<_> = full.map(|task| runtime.submit(task)).collect();
        let agent = *runtime.submit(parent::remote().with_options(on(victim))).get().expect("runs");
        // Values that only the victim has: one that can be made again, and one that cannot.
        let kept = runtime.submit(make::remote(1).with_options(retried.clone()));
        let lost = runtime.submit(make::remote(2).with_options(on(victim)));
        wait_ready(&[&kept, &lost]);
        // Work under way there: an actor, a task with retries, one without.
        let actor = ActorOptions {
            placement: Placement::Process,
            restart: RestartPolicy::at_most(1),
            ..ActorOptions::new("counter")
        };
        let counter = runtime.spawn(Counter::remote().with_options(actor)).expect("starts");
        assert_eq!(*counter.parent().get().expect("answers"), agent);
        assert_eq!(*counter.count().get().expect("counts"), 1);
        let again = runtime.submit(stay::remote("again".to_owned()).with_options(retried));
        assert_eq!(wait_for_file(&folder().join("again")), agent.to_string());
        let nothing = TaskOptions { resources: Resources::default(), ..on(victim) };
        let never = runtime.submit(linger::remote().with_options(nothing));
        wait_for_file(&folder().join("worker"));
        tell("victim", &agent.to_string());
        // The test kills the machine now.
        let error = never.get().expect_err("its machine is gone").to_string();
        assert!(error.contains("node 1") && error.contains("was lost"), "{error}");
        assert_ne!(*again.get().expect("runs elsewhere"), agent);
        collect(&full).expect("the file is there");
        assert_eq!(*counter.count().get().expect("lives elsewhere"), 1, "made anew");
        assert_ne!(*counter.parent().get().expect("answers"), agent);
        assert_eq!((runtime.nodes().len(), runtime.resources().cpus), (2, 4.0));
        // What waits for a machine that is gone is told so.
        let late = runtime.submit(parent::remote().with_options(on(victim)));
        assert!(matches!(late.get(), Err(Error::NodeGone { .. })));
        // Its values: one is made again, for a task elsewhere and for the driver.
        let sum = runtime.submit(add::remote(&kept, &kept).with_options(on(survivor)));
        assert_eq!(*sum.get().expect("made again"), 2 * LARGE as u64);
        assert_eq!(kept.get().expect("made again").0, vec![1; LARGE]);
        let error = lost.get().expect_err("nobody may make it again").to_string();
        assert!(error.contains("node 1") && error.contains("no retries"), "{error}");
        let sum = runtime.submit(add::remote(&lost, &kept).with_options(on(survivor)));
        let error = sum.get().expect_err("its input is lost").to_string();
        assert!(error.contains("no retries"), "{error}");
    }
}

/// Returns when four of them run.
#[remote(crate = mobula_core)]
fn place_of_two() -> Result<(), Error> {
    tell(&format!("runs-{}", std::process::id()), "");
    let all_run = || {
        let entries = std::fs::read_dir(folder()).into_iter().flatten().flatten();
        let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
        names.filter(|name| name.starts_with("runs-") && !name.ends_with("tmp")).count() == 4
    };
    assert!(wait_until(all_run, LONG), "four never ran at the same time");
    Ok(())
}

#[remote(crate = mobula_core)]
fn yield_many(count: usize, size: usize, out: Yield<Blob>) -> Result<(), Error> {
    (0..count).try_for_each(|n| out.send(vec![n as u8; size].into()))
}

#[remote(crate = mobula_core)]
fn linger() -> Result<(), Error> {
    tell("worker", &std::process::id().to_string());
    loop {
        std::thread::park();
    }
}

#[remote(crate = mobula_core)]
fn wait_for_victim() -> Result<(), Error> {
    wait_for_file(&folder().join("victim"));
    Ok(())
}

/// Until they are there, wherever, without fetching them.
fn wait_ready(objects: &[&mobula_core::ObjectRef<Blob>]) {
    assert!(wait_until(|| objects.iter().all(|object| object.is_ready()), LONG));
}
