//! Several machines: this binary, started several times as a launcher would, each copy with the
//! environment of a node of its own. The first copy runs a scenario as the driver.

mod scenarios;
mod tasks;

use crate::Test;
use crate::driver::{assert_gone, wait_for_file};
use mobula_core::group::decode_report;
use mobula_core::status::Status;
use mobula_core::value::Blob;
use mobula_core::world::free_port;
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
pub(crate) const PAYLOAD: &str = "what is for the other machine only";

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
        "elastic" => crate::elastic::on_machines,
        "elastic by powers of two" => crate::elastic::by_powers_of_two,
        "elastic with too few" => crate::elastic::with_too_few,
        "elastic on one machine" => crate::elastic::on_one_machine,
        "elastic group of a task" => crate::elastic::of_a_task,
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
        let port = free_port().expect("a port");
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
                ("MASTER_PORT", usize::from(port)),
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
        let address = format!("127.0.0.1:{}", free_port().expect("a port"));
        let launch = Self::start(scenario, &[1], |_, command| {
            alone(command);
            command.env("MOBULA_LISTEN", &address);
            change(command);
        });
        (launch, address)
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
pub(crate) fn tell(name: &str, text: &str) {
    let path = folder().join(name);
    let draft = path.with_extension(format!("{}.tmp", std::process::id()));
    std::fs::write(&draft, text).and_then(|()| std::fs::rename(&draft, &path)).expect("writes");
}

/// The agent, or the driver, whose worker runs this: the fork server is between them.
pub(crate) fn machine() -> u32 {
    std::env::var("MOBULA_DRIVER_PID").ok().and_then(|pid| pid.parse().ok()).unwrap_or(0)
}
