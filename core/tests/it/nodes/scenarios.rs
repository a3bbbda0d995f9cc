//! What the drivers do.

use super::tasks::*;
use super::*;

fn on(node: Node) -> TaskOptions {
    TaskOptions { placement: Placement::Process, node: Some(node), ..TaskOptions::default() }
}

pub(crate) fn count(runtime: &Runtime) {
    println!("{} on {} nodes", runtime.resources(), runtime.nodes().len());
}

pub(crate) fn each_machine(runtime: &Runtime) {
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

pub(crate) fn large_values(runtime: &Runtime) {
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

pub(crate) fn workers_have_actors(runtime: &Runtime) {
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

pub(crate) fn spread_group(runtime: &Runtime) {
    let options = GroupOptions {
        strategy: PlacementStrategy::StrictSpread,
        ..GroupOptions::new("spread", 3)
    };
    let group = runtime.group(&options, &here::remote()).expect("fits");
    assert_eq!(group.join(LONG).expect("gathers"), [3, 3, 3]);
}

pub(crate) fn streams(runtime: &Runtime) {
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

pub(crate) fn cancelled(runtime: &Runtime) {
    let node = runtime.nodes()[1].node;
    let there = || runtime.status().nodes[1].clone();
    let has = |count| wait_until(|| !there().silent && there().objects.count == count, LONG / 2);
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

pub(crate) fn looked_at(runtime: &Runtime) {
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

pub(crate) fn silent_holder(runtime: &Runtime) {
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

pub(crate) fn lost_twice(runtime: &Runtime) {
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

pub(crate) fn long_chain(runtime: &Runtime) {
    // With the driver's machine full, all is made on the other one.
    let full = fill(runtime);
    let last = chain(runtime, LINEAGE_DEPTH / 2).pop();
    on_a_stack_of(64 << 10, move || drop(last));
    let values = chain(runtime, LINEAGE_DEPTH + 1);
    let (deepest, too_deep) = (values[LINEAGE_DEPTH - 1].clone(), values[LINEAGE_DEPTH].clone());
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
pub(crate) fn payload(runtime: &Runtime) {
    let node = runtime.nodes()[1].node;
    let put = runtime.put(Blob::from(PAYLOAD.repeat(LARGE / PAYLOAD.len() + 1).into_bytes()));
    let task = starts_with::remote(&put, PAYLOAD.to_owned()).with_options(on(node));
    assert!(*runtime.submit(task).get().expect("runs"));
}

pub(crate) fn silent_machine(runtime: &Runtime) {
    let node = runtime.nodes()[1].node;
    let task = runtime.submit(linger::remote().with_options(on(node)));
    let error = task.get().expect_err("its machine says nothing").to_string();
    assert!(error.contains("node 1"), "{error}");
    assert_eq!(runtime.nodes().len(), 1);
}

pub(crate) fn slow_network(runtime: &Runtime) {
    let options =
        GroupOptions { strategy: PlacementStrategy::StrictSpread, ..GroupOptions::new("apart", 2) };
    let group = runtime.group(&options, &tell_all::remote()).expect("fits");
    assert_eq!(group.join(LONG).expect("nobody is lost"), [2 * SLOW as u64; 2]);
    assert_eq!(runtime.nodes().len(), 2);
}

pub(crate) fn joins_later(runtime: &Runtime) {
    assert_eq!(runtime.nodes().len(), 1);
    let waits = || place_of_two::remote().on(Placement::Process);
    let tasks: Vec<_> = (0..4).map(|_| runtime.submit(waits())).collect();
    tell("alone", "");
    // Four at a time: two here, and two on the machine that joins.
    assert_eq!(collect(&tasks).expect("run").len(), 4);
    assert_eq!(runtime.resources().cpus, 4.0);
}

pub(crate) fn two_machines(runtime: &Runtime) {
    tell("alone", "");
    assert!(wait_until(|| runtime.nodes().len() == 2, LONG), "nobody has joined");
}

pub(crate) fn long_task(runtime: &Runtime) {
    let node = runtime.nodes()[1].node;
    let task = linger::remote().with_options(on(node));
    drop(runtime.submit(task).get());
}

pub(crate) fn groups_lose_a_machine(runtime: &Runtime) {
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
        let said: Vec<Vec<u32>> = (0..size).map(next).collect::<Result<_, _>>().expect("decode");
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
pub(crate) fn saved_actor(runtime: &Runtime) {
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

pub(crate) fn lost_machine(runtime: &Runtime) {
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
