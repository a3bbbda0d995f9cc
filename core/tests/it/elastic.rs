//! Groups that have more members in one generation than in another, on machines that go and come.

use crate::Test;
use crate::driver::{assert_gone, wait_for_file};
use crate::nodes::{LONG, Launch, SECRET, machine, said, tell};
use mobula_core::group::decode_report;
use mobula_core::{
    BoxError, Elastic, Error, Group, GroupEvent, GroupOptions, Member, OnLoss, Placement,
    PlacementGroupOptions, PlacementStrategy, Resources, RestartPolicy, Runtime, remote,
};
use std::time::{Duration, Instant};

pub(crate) const TESTS: &[Test] = &[
    ("elastic::it_goes_on_without_a_lost_machine_and_grows_when_another_joins", comes_and_goes),
    ("elastic::who_is_no_power_of_two_is_let_go", powers_of_two),
    ("elastic::with_fewer_than_its_least_size_it_ends", too_few),
    ("elastic::who_is_lost_alone_is_replaced", replaced),
    ("elastic::it_grows_when_others_free_what_they_hold", grows),
    ("elastic::so_does_the_group_of_a_task", nested),
    ("elastic::what_cannot_be_is_refused", refused),
];

/// Who it is, where, and among how many.
type Said = (u32, u32, usize);

/// Says who it is, and stays until there is a newer generation or it is told to stop.
#[remote(crate = mobula_core)]
fn stay(member: Member) -> Result<Said, BoxError> {
    let me = (std::process::id(), machine(), member.world_size());
    // All of a generation know each other by the ranks that they have in it.
    let all = member.all_gather("ranks", &member.rank().to_le_bytes(), LONG)?;
    let ranks = all.iter().map(|rank| rank.as_ref().try_into().map(usize::from_le_bytes));
    assert_eq!(ranks.collect::<Result<Vec<_>, _>>()?, (0..me.2).collect::<Vec<_>>());
    member.report(&me)?;
    while !member.stop_requested() {
        member.check_generation()?;
        std::thread::yield_now();
    }
    Ok(me)
}

/// The same by one who goes on where it is: of two members one is there before the other.
#[remote(crate = mobula_core)]
fn stay_in_hand(member: Member) -> Result<Said, BoxError> {
    let mut expected: Vec<usize> = (0..member.world_size()).collect();
    loop {
        assert_eq!(member.rendezvous(LONG)?.started, expected);
        let me = (std::process::id(), machine(), member.world_size());
        member.report(&me)?;
        while member.check_generation().is_ok() {
            if member.stop_requested() {
                return Ok(me);
            }
            std::thread::yield_now();
        }
        expected = vec![1];
    }
}

/// Grows and shrinks at once, survives one loss.
fn options(size: usize, min_size: usize) -> GroupOptions {
    let (replace_within, grow_interval) = (Duration::ZERO, Duration::ZERO);
    let elastic = Elastic { min_size, replace_within, grow_interval, ..Elastic::default() };
    GroupOptions {
        elastic: Some(elastic),
        on_loss: OnLoss::ReplaceLost,
        restart: RestartPolicy::at_most(1),
        strategy: PlacementStrategy::Spread,
        show_logs: false,
        ..GroupOptions::new("gang", size)
    }
}

/// What all members of the generation say, by rank.
fn roll_call<T: std::fmt::Debug>(group: &mut Group<T>) -> Vec<Said> {
    let size = group.size();
    let mut said: Vec<(usize, Said)> = (0..size)
        .map(|_| match group.next_event(LONG) {
            Some(GroupEvent::Report { rank, payload }) => {
                (rank, decode_report(&payload).expect("decodes"))
            }
            other => panic!("{other:?}"),
        })
        .collect();
    said.sort_by_key(|(rank, _)| *rank);
    assert!(said.iter().enumerate().all(|(at, (rank, said))| at == *rank && said.2 == size));
    said.into_iter().map(|(_, said)| said).collect()
}

fn restarting<T: std::fmt::Debug>(group: &mut Group<T>) -> (u64, Vec<usize>) {
    match group.next_event(LONG) {
        Some(GroupEvent::Restarting { generation, replaced, .. }) => (generation, replaced),
        other => panic!("{other:?}"),
    }
}

fn resized<T: std::fmt::Debug>(group: &mut Group<T>) -> (u64, Vec<usize>, usize) {
    match group.next_event(LONG) {
        Some(GroupEvent::Resized { generation, gone, size }) => (generation, gone, size),
        other => panic!("{other:?}"),
    }
}

fn wait_for_machines(runtime: &Runtime, count: usize) {
    wait_until(|| runtime.nodes().len() == count);
}

fn wait_until(done: impl Fn() -> bool) {
    let deadline = Instant::now() + LONG;
    while !done() {
        assert!(Instant::now() < deadline, "in vain");
        std::thread::yield_now();
    }
}

fn kill(pid: u32) {
    let pid = rustix::process::Pid::from_raw(pid as i32).expect("a process id");
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("kill -9");
}

/// A driver, and so many machines that have joined it.
fn launch(scenario: &str, machines: usize) -> (Launch, String) {
    let (mut launch, address) = Launch::listening(scenario, |_| {});
    (0..machines).for_each(|_| launch.join(&address, SECRET));
    (launch, address)
}

/// Kills the machine that the driver says.
fn lose_victim(launch: &mut Launch) {
    let agent = wait_for_file(&launch.file("victim"));
    let victim = launch.copies.iter_mut().find(|copy| copy.id().to_string() == agent);
    victim.expect("an agent").kill().expect("kill -9");
}

fn driver_succeeds(launch: Launch) {
    let outputs = launch.end();
    assert!(outputs[0].status.success(), "{}", said(&outputs));
}

fn comes_and_goes(_: &Runtime) {
    let (mut launch, address) = launch("elastic", 2);
    lose_victim(&mut launch);
    wait_for_file(&launch.file("smaller"));
    launch.join(&address, SECRET);
    driver_succeeds(launch);
}

/// Six members on three machines, of which one is lost.
pub(crate) fn on_machines(runtime: &Runtime) {
    wait_for_machines(runtime, 3);
    let mut group = runtime.group(&options(6, 2), &stay::remote()).expect("starts");
    let six = roll_call(&mut group);
    let victim = six[1].1;
    let lost: Vec<usize> = (0..6).filter(|rank| six[*rank].1 == victim).collect();
    assert_eq!(lost, [1, 4], "{six:?}");
    tell("victim", &victim.to_string());
    assert_eq!(restarting(&mut group).0, 1);
    assert_eq!(resized(&mut group), (1, lost, 4));
    let four = roll_call(&mut group);
    let pids = |said: &[Said]| said.iter().map(|said| said.0).collect::<Vec<_>>();
    assert_eq!(pids(&four), [six[0].0, six[2].0, six[3].0, six[5].0], "in their order");
    assert_eq!((group.size(), group.pids().len()), (4, 4));
    tell("smaller", "");
    assert_eq!(resized(&mut group), (2, vec![], 6));
    let six = roll_call(&mut group);
    assert_eq!(pids(&six)[..4], pids(&four), "who was there stays, and has its rank");
    assert!(!pids(&four).contains(&six[4].0) && six[4].1 == six[5].1 && six[4].1 != victim);
    // The growth was no loss, and the loss of the machine the only one that is survived.
    kill(six[3].0);
    let Some(GroupEvent::Failed { rank: 3, error: Error::WorkerLost { .. } }) =
        group.next_event(LONG)
    else {
        panic!("one loss too many");
    };
}

fn powers_of_two(_: &Runtime) {
    let (mut launch, _) = launch("elastic by powers of two", 3);
    lose_victim(&mut launch);
    driver_succeeds(launch);
}

/// Four members that have a machine each.
pub(crate) fn by_powers_of_two(runtime: &Runtime) {
    wait_for_machines(runtime, 4);
    let options = options(7, 1);
    let elastic = options.elastic.map(|elastic| Elastic { powers_of_two: true, ..elastic });
    let options = GroupOptions { elastic, resources: Resources::cpus(2.0), ..options };
    let mut group = runtime.group(&options, &stay::remote()).expect("starts");
    let four = roll_call(&mut group);
    tell("victim", &four[1].1.to_string());
    assert_eq!(restarting(&mut group), (1, vec![1]));
    assert_eq!(resized(&mut group), (1, vec![1, 3], 2));
    let two = roll_call(&mut group);
    assert_eq!([two[0].0, two[1].0], [four[0].0, four[2].0]);
    assert_gone(&four[3].0.to_string());
    wait_until(|| runtime.free_resources().cpus == 2.0);
    group.stop();
    assert_eq!(group.join(LONG).expect("ends").len(), 2);
}

fn too_few(_: &Runtime) {
    let (mut launch, _) = launch("elastic with too few", 1);
    lose_victim(&mut launch);
    driver_succeeds(launch);
}

/// Of four members on two machines three are needed.
pub(crate) fn with_too_few(runtime: &Runtime) {
    wait_for_machines(runtime, 2);
    let mut group = runtime.group(&options(4, 3), &stay::remote()).expect("starts");
    let four = roll_call(&mut group);
    let victim = four.iter().find(|said| said.1 != std::process::id()).expect("elsewhere").1;
    tell("victim", &victim.to_string());
    assert_eq!(restarting(&mut group).0, 1);
    let Some(GroupEvent::Failed { error, .. }) = group.next_event(LONG) else {
        panic!("expected an end");
    };
    let text = error.to_string();
    let expected =
        "gang has room for 2 of its members, needs 3 at least, and found no room for more";
    assert!(text.starts_with(expected), "{text}");
    assert!(!error.is_retryable());
}

/// Its machine is there, and so is its room.
fn replaced(runtime: &Runtime) {
    let mut group = runtime.group(&options(2, 2), &stay::remote()).expect("starts");
    let before = roll_call(&mut group);
    kill(before[0].0);
    assert_eq!(restarting(&mut group), (1, vec![0]));
    let after = roll_call(&mut group);
    assert_eq!(after[1], before[1]);
    assert_ne!(after[0].0, before[0].0);
}

fn grows(_: &Runtime) {
    Launch::start("elastic on one machine", &[1], |_, _| {}).succeed();
}

/// Of two CPUs; restarts are none.
pub(crate) fn on_one_machine(runtime: &Runtime) {
    let options = GroupOptions { restart: RestartPolicy::default(), ..options(2, 1) };
    let hold = |cpus| {
        let bundles = vec![Resources::cpus(cpus)];
        runtime.placement_group(&PlacementGroupOptions::new("job", bundles)).expect("fits")
    };
    let others = hold(2.0);
    let hasty = GroupOptions { placement_timeout: Duration::ZERO, ..options.clone() };
    let error = runtime.group(&hasty, &stay::remote()).expect_err("no room for one");
    assert!(matches!(error, Error::NotPlaced { .. }), "{error}");
    drop(others);
    for task in [stay::remote(), stay_in_hand::remote()] {
        let others = hold(1.0);
        let mut group = runtime.group(&options, &task).expect("starts");
        let one = roll_call(&mut group);
        assert_eq!(one.len(), 1);
        drop(others);
        assert_eq!(resized(&mut group), (1, vec![], 2));
        let two = roll_call(&mut group);
        assert_eq!(two[0].0, one[0].0);
        group.stop();
        assert_eq!(group.join(LONG).expect("ends"), two);
        // The processes end a moment later.
        wait_until(|| runtime.free_resources() == runtime.resources());
    }
}

fn nested(_: &Runtime) {
    Launch::start("elastic group of a task", &[1], |_, _| {}).succeed();
}

#[remote(crate = mobula_core)]
fn hold_elastic() -> Result<usize, Error> {
    let mut group = Runtime::current()?.group(&options(2, 1), &stay::remote())?;
    assert_eq!((group.size(), roll_call(&mut group).len()), (1, 1));
    tell("started", "");
    assert_eq!(resized(&mut group), (1, vec![], 2));
    assert_eq!((group.generation(), roll_call(&mut group).len()), (1, 2));
    group.stop();
    Ok(group.join(LONG)?.len())
}

/// Of two CPUs, one of which the task lends to its group.
pub(crate) fn of_a_task(runtime: &Runtime) {
    let bundles = PlacementGroupOptions::new("job", vec![Resources::cpus(1.0)]);
    let others = runtime.placement_group(&bundles).expect("fits");
    let task = runtime.submit(hold_elastic::remote().on(Placement::Process));
    let folder = std::env::var("MOBULA_TEST_DIR").expect("a folder");
    wait_for_file(&std::path::Path::new(&folder).join("started"));
    drop(others);
    assert_eq!(*task.get_timeout(LONG).expect("runs"), 2);
}

fn refused(runtime: &Runtime) {
    let error =
        |options| runtime.group(&options, &stay::remote()).expect_err("refused").to_string();
    let text = error(options(2, 3));
    assert_eq!(text, "min_size of group gang is 3, expected 1 to its size 2");
    let strategy = PlacementStrategy::StrictSpread;
    let text = error(GroupOptions { strategy, ..options(2, 1) });
    assert!(text.starts_with("strategy of group gang is StrictSpread, expected pack"), "{text}");
    let text = error(options(6, 5));
    assert!(text.contains("cannot place 5 CPU: this machine has 4 CPU"), "{text}");
}
