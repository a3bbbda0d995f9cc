//! Several machines: this binary, started several times as a launcher would, each copy with the
//! environment of a node of its own. The first copy runs a scenario as the driver.

use crate::Test;
use crate::driver::{assert_gone, wait_for_file};
use mobula_core::group::decode_report;
use mobula_core::status::Status;
use mobula_core::value::Blob;
use mobula_core::{
    ActorOptions, BoxError, Error, Group, GroupEvent, GroupOptions, Member, Node, ObjectRef,
    OnLoss, Placement, PlacementGroup, PlacementGroupOptions, PlacementStrategy, Resources,
    RestartPolicy, Runtime, Task, TaskOptions, Yield, collect, remote,
};
use std::collections::HashSet;
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

const SCENARIO: &str = "MOBULA_TEST_NODES";
pub(crate) const LONG: Duration = Duration::from_secs(60);
pub(crate) const LARGE: usize = 8 << 20;
/// At 64 KiB in 20 ms, more than 6 s.
const SLOW: usize = 20 << 20;
/// Just large enough to stay on the machine that made it.
const SMALL: usize = 64 << 10;
pub(crate) const SECRET: &str = "the secret of this test";

pub(crate) const TESTS: &[Test] = &[
    ("nodes::each_machine_is_used_and_all_end_with_the_driver", each_machine_is_used),
    ("nodes::large_values_go_from_machine_to_machine", large_values),
    ("nodes::a_group_is_spread_over_machines", spread_group),
    ("nodes::what_a_lost_machine_did_is_done_elsewhere", lost_machine),
    ("nodes::groups_go_on_without_the_machine_that_they_lose", groups_lose_a_machine),
    ("nodes::a_saved_actor_outlives_its_machine", saved_actor),
    ("nodes::workers_have_actors_on_all_machines", workers_have_actors),
    ("nodes::a_killed_driver_leaves_no_copy_and_no_worker", killed_driver),
    ("nodes::copies_on_one_machine_count_its_cpus_once", copies_on_one_machine),
    ("nodes::a_silent_machine_is_lost", silent_machine),
    ("nodes::who_waits_for_a_value_of_a_silent_machine_does_not_wait_long", silent_holder),
    ("nodes::a_value_is_made_again_as_often_as_its_task_may_be_retried", lost_twice),
    ("nodes::a_machine_behind_a_slow_network_is_not_lost", slow_network),
    ("nodes::a_machine_joins_later", joins_later),
    ("nodes::values_are_streamed_from_afar", streams),
    ("nodes::what_is_cancelled_leaves_nothing_behind", cancelled),
    ("nodes::who_looks_sees_all_machines_and_waits_for_none", looked_at),
    ("nodes::a_long_chain_is_let_go_of_or_made_again_on_a_small_stack", long_chain),
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
        "groups lose a machine" => scenarios::groups_lose_a_machine,
        "saved actor" => scenarios::saved_actor,
        "workers have actors" => scenarios::workers_have_actors,
        "groups of tasks" => crate::nested_groups::on_two_cpus,
        "groups of tasks elsewhere" => crate::nested_groups::on_two_machines,
        "long task" => scenarios::long_task,
        "count" => scenarios::count,
        "silent machine" => scenarios::silent_machine,
        "silent holder" => scenarios::silent_holder,
        "lost twice" => scenarios::lost_twice,
        "slow network" => scenarios::slow_network,
        "joins later" => scenarios::joins_later,
        "streams" => scenarios::streams,
        "cancelled" => scenarios::cancelled,
        "looked at" => scenarios::looked_at,
        "long chain" => scenarios::long_chain,
        "two machines" => scenarios::two_machines,
        "payload" => scenarios::payload,
        other => return Err(format!("there is no scenario {other}").into()),
    };
    scenario(&runtime);
    Ok(())
}

/// The copies of one launch. Those that are left are killed in the end.
pub(crate) struct Launch {
    pub(crate) copies: Vec<Child>,
    /// What each of them has printed. Files take more than pipes that nobody reads yet.
    printed: Vec<[File; 2]>,
    pub(crate) folder: tempfile::TempDir,
}

impl Launch {
    /// As many copies on each machine as the layout says.
    pub(crate) fn start(
        scenario: &str,
        layout: &[usize],
        change: impl Fn(usize, &mut Command),
    ) -> Self {
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
            command.env("MASTER_ADDR", "127.0.0.1").env("MOBULA_SECRET", SECRET);
            command.env(SCENARIO, scenario).env("MOBULA_TEST_DIR", folder.path());
            command.current_dir(folder.path());
            let printed = [(); 2].map(|()| tempfile::tempfile_in(folder.path()).expect("a file"));
            let [out, err] = printed.each_ref().map(|file| file.try_clone().expect("a file"));
            command.stdin(Stdio::null()).stdout(out).stderr(err);
            change(rank, &mut command);
            (command.spawn().expect("starts"), printed)
        });
        let (copies, printed) = copies.unzip();
        Self { copies, printed, folder }
    }

    /// A driver that listens for agents, and where.
    pub(crate) fn listening(scenario: &str, change: impl Fn(&mut Command)) -> (Self, String) {
        let port = TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a port");
        let launch = Self::start(scenario, &[1], |_, command| {
            alone(command);
            command.env("MOBULA_LISTEN", port.to_string());
            change(command);
        });
        (launch, port.to_string())
    }

    /// An agent of the driver that listens there.
    pub(crate) fn join(&mut self, address: &str, secret: &str) {
        let mut agent = Self::start("joins later", &[1], |_, command| {
            alone(command);
            command.env("MOBULA_JOIN", address).env("MOBULA_SECRET", secret);
            command.env("MOBULA_TEST_DIR", self.folder.path());
        });
        self.copies.append(&mut agent.copies);
        self.printed.append(&mut agent.printed);
    }

    /// Waits until all copies have ended.
    pub(crate) fn end(mut self) -> Vec<Output> {
        self.wait()
    }

    /// The same, while the folder stays.
    pub(crate) fn wait(&mut self) -> Vec<Output> {
        let deadline = Instant::now() + LONG;
        (0..self.copies.len()).map(|rank| self.end_of(rank, deadline)).collect()
    }

    /// Waits until this copy has ended.
    pub(crate) fn end_of(&mut self, rank: usize, deadline: Instant) -> Output {
        let status = status_of(&mut self.copies[rank], deadline);
        let status = status.unwrap_or_else(|| panic!("copy {rank} does not end"));
        let [stdout, stderr] = self.printed[rank].each_mut().map(|file| {
            let mut text = Vec::new();
            file.rewind().and_then(|()| file.read_to_end(&mut text)).expect("reads");
            text
        });
        Output { status, stdout, stderr }
    }

    /// Waits for the end, and expects success of all.
    pub(crate) fn succeed(self) -> Vec<Output> {
        let outputs = self.end();
        for (rank, output) in outputs.iter().enumerate() {
            assert!(output.status.success(), "copy {rank}: {}\n{}", output.status, said(&outputs));
        }
        outputs
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

fn status_of(copy: &mut Child, deadline: Instant) -> Option<ExitStatus> {
    loop {
        let status = copy.try_wait().expect("a child of ours");
        if status.is_some() || Instant::now() >= deadline {
            return status;
        }
        std::thread::sleep(Duration::from_millis(10));
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

pub(crate) fn said(outputs: &[Output]) -> String {
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

fn killed_driver(_: &Runtime) {
    let mut launch = Launch::start("long task", &[1, 1], |_, _| {});
    let worker = wait_for_file(&launch.file("worker"));
    launch.copies[0].kill().expect("kill -9");
    let outputs = launch.end();
    assert_eq!(outputs[1].status.code(), Some(1), "{}", said(&outputs));
    assert!(said(&outputs[1..]).contains("the driver is gone"), "{}", said(&outputs));
    assert_gone(&worker);
}

fn workers_have_actors(_: &Runtime) {
    Launch::start("workers have actors", &[1, 1], |_, _| {}).succeed();
}

fn lost_machine(_: &Runtime) {
    lose_machine("lost machine");
}

fn groups_lose_a_machine(_: &Runtime) {
    lose_machine("groups lose a machine");
}

fn saved_actor(_: &Runtime) {
    lose_machine("saved actor");
}

/// Kills the machine that the scenario says.
fn lose_machine(scenario: &str) {
    let mut launch = Launch::start(scenario, &[1, 1, 1], |_, _| {});
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

fn cancelled(_: &Runtime) {
    Launch::start("cancelled", &[1, 1], |_, _| {}).succeed();
}

fn looked_at(_: &Runtime) {
    let folder = tempfile::tempdir().expect("temporary folder");
    let file = folder.path().join("timeline.json");
    let launch = Launch::start("looked at", &[1, 1], |rank, command| {
        if rank == 0 {
            command.env("MOBULA_TIMELINE", &file);
        }
    });
    launch.succeed();
    let text = std::fs::read_to_string(&file).expect("a timeline");
    let events: Vec<serde_json::Value> = serde_json::from_str(&text).expect("a JSON array");
    let far_process = events.iter().find(|event| {
        let name = event["args"]["name"].as_str().unwrap_or_default();
        event["name"] == "process_name"
            && name.starts_with("tasks on ")
            && name.ends_with(", node 1)")
    });
    let far_process = &far_process.unwrap_or_else(|| panic!("{events:#?}"))["pid"];
    let parents = events.iter().filter(|event| {
        event["ph"] == "X" && event["name"].as_str().is_some_and(|name| name.ends_with("parent"))
    });
    let places: Vec<bool> = parents.map(|event| event["pid"] == *far_process).collect();
    assert_eq!(places, [false, true], "one here, and one there: {events:#?}");
}

fn long_chain(_: &Runtime) {
    let outputs = Launch::start("long chain", &[1, 1], |_, _| {}).end();
    assert!(outputs[0].status.success(), "{}", said(&outputs));
}

fn silent_machine(_: &Runtime) {
    use rustix::process::{Pid, Signal, kill_process};
    let mut launch = Launch::start("silent machine", &[1, 1], |_, _| {});
    wait_for_file(&launch.file("worker"));
    let agent = Pid::from_child(&launch.copies[1]);
    kill_process(agent, Signal::STOP).expect("stops");
    let driver = status_of(&mut launch.copies[0], Instant::now() + LONG);
    assert!(driver.is_some(), "nobody noticed");
    kill_process(agent, Signal::CONT).expect("goes on");
    let outputs = launch.end();
    assert!(outputs[0].status.success(), "{}", said(&outputs));
    assert!(said(&outputs[..1]).contains("no heartbeat for 4s"), "{}", said(&outputs));
}

fn silent_holder(_: &Runtime) {
    let outputs = Launch::start("silent holder", &[1, 1, 1], |_, _| {}).end();
    assert!(outputs[0].status.success(), "{}", said(&outputs));
}

fn lost_twice(_: &Runtime) {
    let outputs = Launch::start("lost twice", &[1, 1, 1], |_, _| {}).end();
    assert!(outputs[0].status.success(), "{}", said(&outputs));
}

fn slow_network(_: &Runtime) {
    let network = TcpListener::bind("127.0.0.1:0").expect("a port");
    let entrance = network.local_addr().expect("bound").port().to_string();
    let launch = Launch::start("slow network", &[1, 1], |rank, command| {
        if rank == 1 {
            command.env("MASTER_PORT", &entrance);
        } else {
            let port = command.get_envs().find(|(name, _)| *name == "MASTER_PORT");
            let port = port.and_then(|(_, port)| port?.to_str()).expect("it is set");
            let driver = format!("127.0.0.1:{port}");
            let network = network.try_clone().expect("a listener");
            // Ends with the test: nobody waits for what never comes.
            std::thread::spawn(move || carry(&network, &driver));
        }
    });
    launch.succeed();
}

/// Takes connections to the driver, and what goes there slowly.
fn carry(network: &TcpListener, driver: &str) {
    for agent in network.incoming().flatten() {
        // One that comes before the driver listens comes again.
        let Ok(driver) = TcpStream::connect(driver) else { continue };
        let (up, down) = (agent.try_clone().expect("a socket"), driver.try_clone().expect("one"));
        std::thread::spawn(move || pour(&up, &driver, Duration::from_millis(20)));
        std::thread::spawn(move || pour(&down, &agent, Duration::ZERO));
    }
}

/// 64 KiB at a time, and so long for each.
fn pour(mut from: &TcpStream, mut to: &TcpStream, pause: Duration) {
    let mut piece = vec![0; 64 << 10];
    while let Ok(bytes @ 1..) = from.read(&mut piece) {
        std::thread::sleep(pause);
        if to.write_all(&piece[..bytes]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(std::net::Shutdown::Both);
}

fn joins_later(_: &Runtime) {
    let (mut launch, address) = Launch::listening("joins later", |_| {});
    wait_for_file(&launch.file("alone"));
    launch.join(&address, SECRET);
    launch.succeed();
}

/// For a copy that nobody has launched.
pub(crate) fn alone(command: &mut Command) {
    for name in ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK"] {
        command.env_remove(name);
    }
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

/// The agent, or the driver, whose worker runs this: the fork server is between them.
pub(crate) fn machine() -> u32 {
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
fn small(byte: u8) -> Result<Blob, Error> {
    Ok(vec![byte; SMALL].into())
}

/// Says that it is about to give a value.
#[remote(crate = mobula_core)]
fn announce(name: String) -> Result<Blob, Error> {
    tell(&name, "");
    Ok(vec![1; SMALL].into())
}

#[remote(crate = mobula_core)]
fn pass_on(value: Blob) -> Result<Blob, Error> {
    Ok(value)
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

/// Says where each member runs, once a machine was lost.
#[remote(crate = mobula_core)]
fn after_the_loss(member: Member) -> Result<Vec<u32>, BoxError> {
    let parent = machine();
    let all = member.all_gather("parents", &parent.to_le_bytes(), LONG)?;
    let number = |bytes: &bytes::Bytes| u32::from_le_bytes(bytes[..].try_into().expect("4 bytes"));
    let parents: Vec<u32> = all.iter().map(number).collect();
    if member.generation() == 0 {
        member.report(&parents)?;
        while member.check_generation().is_ok() {
            std::thread::yield_now();
        }
    }
    Ok(parents)
}

/// One message that takes the slow network longer than a heartbeat.
#[remote(crate = mobula_core)]
fn tell_all(member: Member) -> Result<u64, Error> {
    let all = member.all_gather("large", &vec![1; SLOW], LONG)?;
    Ok(all.iter().map(|part| part.len() as u64).sum())
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

/// Notes what it is given, in order.
struct Notes(Vec<(u8, usize)>);

#[remote(crate = mobula_core)]
impl Notes {
    fn new(first: Blob) -> Self {
        Self(vec![(first.0[0], first.0.len())])
    }

    fn note(&mut self, value: Blob) {
        self.0.push((value.0[0], value.0.len()));
    }

    fn all(&self) -> (Vec<(u8, usize)>, u32) {
        (self.0.clone(), machine())
    }

    fn large(&self, byte: u8) -> Blob {
        vec![byte; LARGE].into()
    }
}

/// The machine of this, and that of its actor.
#[remote(crate = mobula_core)]
fn use_notes(node: Node) -> Result<(u32, u32), Error> {
    let runtime = Runtime::current()?;
    let options = ActorOptions {
        placement: Placement::Process,
        node: Some(node),
        ..ActorOptions::new("notes")
    };
    let blob = |byte: u8, len: usize| Blob::from(vec![byte; len]);
    let notes = runtime.spawn(Notes::remote(blob(0, LARGE)).with_options(options))?;
    let made = notes.large(1);
    let mut calls = Vec::new();
    // Large values, which have to be brought first, and small ones, which are not to overtake them.
    for round in 1..10 {
        calls.push(notes.note(&made));
        calls.push(notes.note(blob(round, LARGE)));
        calls.push(notes.note(blob(round, 1)));
    }
    let all = notes.all().get()?;
    let mut expected = vec![(0, LARGE)];
    (1..10).for_each(|round| expected.extend([(1, LARGE), (round, LARGE), (round, 1)]));
    assert_eq!(all.0, expected);
    collect(&calls)?;
    assert_eq!(made.get()?.0, vec![1; LARGE]);
    Ok((machine(), all.1))
}

/// The count, how many bytes are intact, and the agent.
type Seen = (u32, usize, u32);

/// A counter whose state is larger than what travels in a message.
struct Keeper(u32, Blob);

#[remote(crate = mobula_core)]
impl Keeper {
    fn new() -> Self {
        Self(0, vec![3; LARGE / 8].into())
    }

    #[checkpoint]
    fn save(&self) -> (u32, Blob) {
        (self.0, self.1.clone())
    }

    #[restore]
    fn load(saved: (u32, Blob)) -> Self {
        Self(saved.0, saved.1)
    }

    fn count(&mut self) -> u32 {
        self.0 += 1;
        self.0
    }

    fn peek(&self) -> Seen {
        let intact = self.1.0.iter().filter(|byte| **byte == 3).count();
        (self.0, intact, machine())
    }

    fn abort(&self) {
        std::process::abort();
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

    pub(super) fn workers_have_actors(runtime: &Runtime) {
        let nodes: Vec<Node> = runtime.nodes().iter().map(|info| info.node).collect();
        let agents = nodes.iter().map(|node| agent_of(runtime, *node).as_raw_pid() as u32);
        let agents: Vec<u32> = agents.collect();
        for (from, to) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            let task = use_notes::remote(nodes[to]).with_options(on(nodes[from]));
            let seen = runtime.submit(task).get_timeout(LONG);
            let seen = seen.unwrap_or_else(|error| panic!("{from}, {to}: {error}"));
            assert_eq!(*seen, (agents[from], agents[to]), "{from}, {to}");
        }
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
            for (from, to) in [(Node::HERE, node), (node, Node::HERE), (node, node)] {
                let task = consume::remote(count, size, from).with_options(on(to));
                let whole = runtime.submit(task).get_timeout(LONG);
                assert_eq!(*whole.expect("streams"), count, "{from:?}, {to:?}");
            }
            let task = yield_many::remote(count, size).with_options(on(node));
            let values: Result<Vec<_>, Error> = runtime.submit_stream(task).collect();
            let values = values.expect("streams");
            assert_eq!(values.len(), count);
            for (n, value) in values.iter().enumerate() {
                assert_eq!(value.0, vec![n as u8; size]);
            }
        }
    }

    pub(super) fn cancelled(runtime: &Runtime) {
        let node = runtime.nodes()[1].node;
        let there = || runtime.status().nodes[1].clone();
        let has =
            |count| wait_until(|| !there().silent && there().objects.count == count, LONG / 2);
        let kept = runtime.submit(make::remote(1).with_options(on(node)));
        assert!(has(1), "{:#?}", there());
        for round in 0..10 {
            // Values that are on their way when nobody wants them any more.
            let task = yield_many::remote(64, SMALL).with_options(on(node));
            let mut stream = runtime.submit_stream(task);
            stream.next().expect("the first").expect("comes");
            drop(stream);
            // A result that comes about when its task is called off.
            let name = format!("made-{round}");
            let task = runtime.submit(announce::remote(name.clone()).with_options(on(node)));
            wait_for_file(&folder().join(name));
            task.cancel();
        }
        assert!(has(1), "only what somebody has stays: {:#?}", there());
        drop(kept);
        assert!(has(0), "{:#?}", there());
    }

    pub(super) fn looked_at(runtime: &Runtime) {
        use rustix::process::{Pid, Signal, kill_process};
        let node = runtime.nodes()[1].node;
        runtime.submit(parent::remote().with_options(on(Node::HERE))).get().expect("runs");
        let agent = *runtime.submit(parent::remote().with_options(on(node))).get().expect("runs");
        let nothing = TaskOptions { resources: Resources::default(), ..on(node) };
        let _busy = runtime.submit(linger::remote().with_options(nothing));
        let worker: u32 = wait_for_file(&folder().join("worker")).parse().expect("a number");
        let options = ActorOptions {
            placement: Placement::Process,
            node: Some(node),
            ..ActorOptions::new("counter")
        };
        let counter = runtime.spawn(Counter::remote().with_options(options)).expect("starts");
        counter.count().get().expect("counts");
        let _kept = runtime.submit(make::remote(1).with_options(on(node))).get().expect("made");

        let status = runtime.status();
        let (here, there) = (&status.nodes[0], &status.nodes[1]);
        assert!(there.name.ends_with(" (node 1)") && !there.silent && !here.silent, "{status:#?}");
        assert!(there.objects.budget_bytes > 0, "{status:#?}");
        let find = |status: &Status, pid| {
            let mut workers = status.workers.iter();
            let found = workers.find(|w| w.pid == pid && w.node == status.nodes[1].name);
            found.unwrap_or_else(|| panic!("{pid}: {status:#?}")).clone()
        };
        let busy = find(&status, worker);
        assert_eq!((busy.name.as_str(), busy.busy), ("tasks", true));
        assert!(busy.resident_bytes > 1 << 20, "{status:#?}");
        let actor = &status.actors[0];
        assert_eq!(actor.node.as_ref(), Some(&there.name));
        let idle = find(&status, actor.pid.expect("it runs"));
        assert_eq!((idle.name.as_str(), idle.busy), ("counter", false));
        assert!(status.workers.iter().any(|worker| worker.node == here.name), "{status:#?}");

        // One that cannot answer now holds nobody up, and what the driver knows is shown.
        let agent = Pid::from_raw(agent as i32).expect("a process");
        kill_process(agent, Signal::STOP).expect("stops");
        let status = runtime.status();
        kill_process(agent, Signal::CONT).expect("goes on");
        assert!(status.nodes[1].silent && !status.nodes[0].silent, "{status:#?}");
        let busy = find(&status, worker);
        assert_eq!((busy.busy, busy.resident_bytes), (true, 0));
    }

    fn agent_of(runtime: &Runtime, node: Node) -> rustix::process::Pid {
        let agent = runtime.submit(parent::remote().with_options(on(node))).get().expect("runs");
        rustix::process::Pid::from_raw(*agent as i32).expect("a process")
    }

    /// Nothing else of one machine runs while this is there.
    fn fill(runtime: &Runtime) -> PlacementGroup {
        let all = PlacementGroupOptions::new("all that is here", vec![Resources::cpus(2.0)]);
        runtime.placement_group(&all).expect("is free")
    }

    pub(super) fn silent_holder(runtime: &Runtime) {
        use rustix::process::{Signal, kill_process};
        let nodes = runtime.nodes();
        let (holder, other) = (nodes[1].node, nodes[2].node);
        let agent = agent_of(runtime, holder);
        let retried = TaskOptions { max_retries: 1, node: None, ..on(Node::HERE) };
        let full = fill(runtime);
        let values = [1, 2, 3].map(|byte| {
            let value = runtime.submit(make::remote(byte).with_options(retried.clone()));
            wait_ready(&[&value]);
            value
        });
        drop(full);
        // Both have a connection to the holder, on which nothing will come.
        values[0].get().expect("fetched");
        let there = |value| runtime.submit(pass_on::remote(value).with_options(on(other)));
        wait_ready(&[&there(&values[0])]);
        kill_process(agent, Signal::STOP).expect("stops");
        let start = Instant::now();
        let passed_on = there(&values[1]);
        let again = values[2].get();
        let passed_on = passed_on.get();
        let took = start.elapsed();
        kill_process(agent, Signal::CONT).expect("goes on");
        assert_eq!(again.expect("made again").0, vec![3; LARGE]);
        assert_eq!(passed_on.expect("made again").0, vec![2; LARGE]);
        assert!(took < Duration::from_secs(10), "{took:?}");
    }

    pub(super) fn lost_twice(runtime: &Runtime) {
        use rustix::process::{Signal, kill_process};
        let nodes = runtime.nodes();
        let agents = [1, 2].map(|n: usize| agent_of(runtime, nodes[n].node));
        let retried = |max_retries| {
            let options = TaskOptions { max_retries, node: None, ..on(Node::HERE) };
            runtime.submit(make::remote(1).with_options(options))
        };
        // With the driver's machine full, all is made on the others.
        let full = fill(runtime);
        let [once, twice] = [retried(1), retried(2)];
        wait_ready(&[&once, &twice]);
        for (n, agent) in agents.into_iter().enumerate() {
            kill_process(agent, Signal::KILL).expect("kill -9");
            assert!(wait_until(|| runtime.nodes().len() == 2 - n, LONG), "nobody noticed");
            if n == 0 {
                // Made again on the machine that is left, and not fetched.
                let sum = add::remote(&once, &twice).with_options(on(nodes[2].node));
                assert_eq!(*runtime.submit(sum).get().expect("again"), 2 * LARGE as u64);
            }
        }
        drop(full);
        let error = once.get().expect_err("it was made twice").to_string();
        assert!(error.contains("no retries left"), "{error}");
        assert_eq!(twice.get().expect("made for the third time").0, vec![1; LARGE]);
    }

    /// Values that only the other machine has, each made of the one before it.
    fn chain(runtime: &Runtime, length: usize) -> Vec<ObjectRef<Blob>> {
        let again = |task: Task<Blob>| {
            task.with_options(TaskOptions { max_retries: 1, node: None, ..on(Node::HERE) })
        };
        let mut values = vec![runtime.submit(again(small::remote(7)))];
        while let Some(last) = values.last()
            && values.len() < length
        {
            let next = runtime.submit(again(pass_on::remote(last)));
            values.push(next);
        }
        wait_ready(&[&values[length - 1]]);
        values
    }

    /// In a call deep in a program, there is not much of the stack left.
    fn on_a_stack_of<T: Send + 'static>(bytes: usize, f: impl FnOnce() -> T + Send + 'static) -> T {
        let thread = std::thread::Builder::new().stack_size(bytes).spawn(f);
        thread.expect("starts").join().expect("no panic")
    }

    /// What `docs/guides/cluster.md` promises.
    const LINEAGE_DEPTH: usize = 1000;

    pub(super) fn long_chain(runtime: &Runtime) {
        // With the driver's machine full, all is made on the other one.
        let full = fill(runtime);
        let last = chain(runtime, LINEAGE_DEPTH / 2).pop();
        on_a_stack_of(64 << 10, move || drop(last));
        let values = chain(runtime, LINEAGE_DEPTH + 1);
        let (deepest, too_deep) =
            (values[LINEAGE_DEPTH - 1].clone(), values[LINEAGE_DEPTH].clone());
        drop(values);
        let agent = agent_of(runtime, runtime.nodes()[1].node);
        rustix::process::kill_process(agent, rustix::process::Signal::KILL).expect("kill -9");
        assert!(wait_until(|| runtime.nodes().len() == 1, LONG), "nobody noticed");
        let error = too_deep.get().expect_err("too much to run again").to_string();
        assert!(error.contains("1001") && error.contains("1000"), "{error}");
        drop(full);
        let again = on_a_stack_of(256 << 10, move || deepest.get().map(|value| value.0.clone()));
        assert_eq!(again.expect("made again"), vec![7; SMALL]);
        // What it is made of is there now.
        assert_eq!(too_deep.get().expect("less is to be made").0, vec![7; SMALL]);
    }

    /// A value in a frame, and one that is fetched.
    pub(super) fn payload(runtime: &Runtime) {
        let node = runtime.nodes()[1].node;
        let put = runtime.put(Blob::from(PAYLOAD.repeat(LARGE / PAYLOAD.len() + 1).into_bytes()));
        let task = starts_with::remote(&put, PAYLOAD.to_owned()).with_options(on(node));
        assert!(*runtime.submit(task).get().expect("runs"));
    }

    pub(super) fn silent_machine(runtime: &Runtime) {
        let node = runtime.nodes()[1].node;
        let task = runtime.submit(linger::remote().with_options(on(node)));
        let error = task.get().expect_err("its machine says nothing").to_string();
        assert!(error.contains("node 1"), "{error}");
        assert_eq!(runtime.nodes().len(), 1);
    }

    pub(super) fn slow_network(runtime: &Runtime) {
        let options = GroupOptions {
            strategy: PlacementStrategy::StrictSpread,
            ..GroupOptions::new("apart", 2)
        };
        let group = runtime.group(&options, &tell_all::remote()).expect("fits");
        assert_eq!(group.join(LONG).expect("nobody is lost"), [2 * SLOW as u64; 2]);
        assert_eq!(runtime.nodes().len(), 2);
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

    pub(super) fn two_machines(runtime: &Runtime) {
        tell("alone", "");
        assert!(wait_until(|| runtime.nodes().len() == 2, LONG), "nobody has joined");
    }

    pub(super) fn long_task(runtime: &Runtime) {
        let node = runtime.nodes()[1].node;
        let task = linger::remote().with_options(on(node));
        drop(runtime.submit(task).get());
    }

    pub(super) fn groups_lose_a_machine(runtime: &Runtime) {
        let group = |name: &str, size, strategy, on_loss, cpus| {
            let options = GroupOptions {
                strategy,
                on_loss,
                restart: RestartPolicy::at_most(1),
                resources: Resources::cpus(cpus),
                ..GroupOptions::new(name, size)
            };
            runtime.group(&options, &after_the_loss::remote()).expect("fits")
        };
        // Every member says where all of them run.
        let parents = |group: &mut Group<Vec<u32>>, size| {
            let next = |_| match group.next_event(LONG) {
                Some(GroupEvent::Report { payload, .. }) => decode_report(&payload),
                other => panic!("{other:?}"),
            };
            let said: Vec<Vec<u32>> =
                (0..size).map(next).collect::<Result<_, _>>().expect("decode");
            said[0].clone()
        };
        let (spread, strict) = (PlacementStrategy::Spread, PlacementStrategy::StrictSpread);
        let mut replaced = group("replaced", 3, spread, OnLoss::ReplaceLost, 1.0);
        let mut moved = group("moved", 2, strict, OnLoss::ReplaceLost, 0.5);
        let (before, moved_before) = (parents(&mut replaced, 3), parents(&mut moved, 2));
        assert_eq!(before.iter().collect::<HashSet<_>>().len(), 3);
        let victim = moved_before.iter().find(|parent| **parent != std::process::id());
        let victim = *victim.expect("one of two machines is not the driver's");
        tell("victim", &victim.to_string());
        // The test kills the machine now.
        let after = replaced.join(LONG).expect("goes on").swap_remove(0);
        for (before, after) in before.iter().zip(&after) {
            assert_eq!(before != after, *before == victim, "only the lost one is elsewhere");
        }
        let after = moved.join(LONG).expect("goes on").swap_remove(0);
        assert!(after[0] != after[1] && !after.contains(&victim), "{after:?}");
        // A moment after the last process has ended.
        let all_free = || runtime.free_resources().cpus == 4.0;
        assert!(wait_until(all_free, LONG), "{:?}", runtime.free_resources());
    }

    /// What was answered is in the state, wherever it lives, and what was retried is in it once.
    pub(super) fn saved_actor(runtime: &Runtime) {
        // With the driver's machine full, work is packed onto the next.
        let full = (0..2).map(|_| wait_for_victim::remote().with_options(on(Node::HERE)));
        let full: Vec<_> = full.map(|task| runtime.submit(task)).collect();
        let options = ActorOptions {
            placement: Placement::Process,
            // To abort is retried too.
            restart: RestartPolicy::at_most(3),
            max_task_retries: 1,
            ..ActorOptions::new("keeper")
        };
        let keeper = runtime.spawn(Keeper::remote().with_options(options)).expect("starts");
        let counts = |from: u32| {
            let calls = (from..from + 10).map(|expected| (expected, keeper.count()));
            let looks = calls.map(|(expected, call)| (expected, call, keeper.peek()));
            looks.collect::<Vec<_>>()
        };
        let check = |calls: Vec<(u32, ObjectRef<u32>, ObjectRef<Seen>)>| {
            for (expected, call, look) in calls {
                // The answer to a look is not there before what it saw is safe.
                let (seen, intact, _) = *look.get_timeout(LONG).expect("looks");
                assert_eq!((seen, intact), (expected, LARGE / 8));
                assert_eq!(*call.get_timeout(LONG).expect("counts"), expected);
            }
        };
        check(counts(1));
        let agent = keeper.peek().get_timeout(LONG).expect("answers").2;
        assert_ne!(agent, std::process::id());
        // First its process is lost, then its machine, both with calls under way.
        drop(keeper.abort());
        check(counts(11));
        assert_eq!(keeper.peek().get_timeout(LONG).expect("answers").2, agent);
        let under_way = counts(21);
        tell("victim", &agent.to_string());
        check(under_way);
        let nodes = || runtime.nodes().len() == 2;
        assert!(wait_until(nodes, LONG), "the test kills the machine");
        check(counts(31));
        assert_ne!(keeper.peek().get_timeout(LONG).expect("answers").2, agent);
        collect(&full).expect("the file is there");
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

pub(crate) const PAYLOAD: &str = "what is for the other machine only";

#[remote(crate = mobula_core)]
fn starts_with(blob: Blob, text: String) -> Result<bool, Error> {
    Ok(blob.0.starts_with(text.as_bytes()))
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

/// How many of the values that are made there come as they are to be.
#[remote(crate = mobula_core)]
fn consume(count: usize, size: usize, from: Node) -> Result<usize, Error> {
    let options =
        TaskOptions { placement: Placement::Process, node: Some(from), ..TaskOptions::default() };
    let task = yield_many::remote(count, size).with_options(options).with_buffer(8);
    let values = Runtime::current()?.submit_stream(task).collect::<Result<Vec<_>, _>>()?;
    let is_whole = |(n, value): &(usize, &std::sync::Arc<Blob>)| value.0 == vec![*n as u8; size];
    Ok(values.iter().enumerate().filter(is_whole).count())
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
fn wait_ready(objects: &[&ObjectRef<Blob>]) {
    assert!(wait_until(|| objects.iter().all(|object| object.is_ready()), LONG));
}
