use super::launchers::port_of_job;
use super::*;

fn world(variables: &[(&str, &str)]) -> Result<World, Error> {
    World::from_variables(|name| {
        let last = variables.iter().rev().find(|(key, _)| *key == name);
        last.map(|(_, value)| (*value).to_owned())
    })
}

/// The variables of `base`, with some of them changed, added, or (with "") taken away.
fn with<'a>(base: &[(&'a str, &'a str)], more: &[(&'a str, &'a str)]) -> Vec<(&'a str, &'a str)> {
    [base, more].concat()
}

/// Rank, size, local rank, local size, node.
fn place(world: &World) -> [usize; 5] {
    [world.rank, world.world_size, world.local_rank, world.local_world_size, world.node_rank]
}

fn good(variables: &[(&str, &str)], launcher: Launcher, expected: [usize; 5], master: &str) {
    let world = world(variables).unwrap_or_else(|error| panic!("{variables:?}: {error}"));
    let got =
        (world.launcher, place(&world), format!("{}:{}", world.master_addr, world.master_port));
    assert_eq!(got, (launcher, expected, master.to_owned()), "{variables:?}");
}

/// The error must name the variable and each of `parts`.
fn bad(variables: &[(&str, &str)], name: &str, parts: &[&str]) {
    let error = world(variables).expect_err(name);
    let text = error.to_string();
    assert!(text.starts_with(&format!("{name} is ")), "{variables:?}: {text}");
    assert!(parts.iter().all(|part| text.contains(part)), "{variables:?}: {text}, not {parts:?}");
}

const TORCHRUN: &[(&str, &str)] = &[
    ("RANK", "5"),
    ("WORLD_SIZE", "8"),
    ("LOCAL_RANK", "1"),
    ("LOCAL_WORLD_SIZE", "4"),
    ("GROUP_RANK", "1"),
    ("MASTER_ADDR", "host0"),
    ("MASTER_PORT", "29500"),
];

/// What `srun -N3 -n6` sets for task 4, as Slurm 22.05 does.
const SRUN: &[(&str, &str)] = &[
    ("SLURM_JOB_ID", "1234"),
    ("SLURM_STEP_ID", "0"),
    ("SLURM_PROCID", "4"),
    ("SLURM_LOCALID", "0"),
    ("SLURM_NODEID", "1"),
    ("SLURM_NTASKS", "6"),
    ("SLURM_STEP_NUM_TASKS", "6"),
    ("SLURM_STEP_NUM_NODES", "3"),
    ("SLURM_STEP_NODELIST", "node[1-3]"),
    ("SLURM_JOB_NODELIST", "node[1-3]"),
    ("SLURM_STEP_TASKS_PER_NODE", "4,1(x2)"),
    ("SLURM_LAUNCH_NODE_IPADDR", "10.9.9.9"),
    ("SLURM_SRUN_COMM_HOST", "10.9.9.9"),
];

/// What a batch script of Slurm has: everything but a step.
const BATCH: &[(&str, &str)] = &[
    ("SLURM_JOB_ID", "1234"),
    ("SLURM_PROCID", "0"),
    ("SLURM_LOCALID", "0"),
    ("SLURM_NODEID", "0"),
    ("SLURM_NTASKS", "6"),
    ("SLURM_JOB_NODELIST", "node[1-3]"),
    ("SLURM_TASKS_PER_NODE", "2(x3)"),
];

const OPEN_MPI: &[(&str, &str)] = &[
    ("OMPI_COMM_WORLD_RANK", "2"),
    ("OMPI_COMM_WORLD_SIZE", "4"),
    ("OMPI_COMM_WORLD_LOCAL_RANK", "2"),
    ("OMPI_COMM_WORLD_LOCAL_SIZE", "4"),
    ("OMPI_COMM_WORLD_NODE_RANK", "2"),
    ("OMPI_MCA_ess_base_jobid", "25"),
];

const HYDRA: &[(&str, &str)] =
    &[("PMI_RANK", "1"), ("PMI_SIZE", "2"), ("MPI_LOCALRANKID", "1"), ("MPI_LOCALNRANKS", "2")];

const KUBERNETES: &[(&str, &str)] =
    &[("JOB_COMPLETION_INDEX", "2"), ("WORLD_SIZE", "3"), ("MASTER_ADDR", "job-0.job")];

const ALONE: [usize; 5] = [0, 1, 0, 1, 0];

#[test]
fn nothing_is_a_world_of_one() {
    good(&[], Launcher::Alone, ALONE, "127.0.0.1:0");
    good(&[("RANK", ""), ("WORLD_SIZE", " ")], Launcher::Alone, ALONE, "127.0.0.1:0");
    good(&[("WORLD_SIZE", "1")], Launcher::Alone, ALONE, "127.0.0.1:0");
    assert_eq!(world(&[]).expect("alone"), World::alone());
    bad(&[("WORLD_SIZE", "4")], "WORLD_SIZE", &["\"4\"", "RANK"]);
    // A shell's leftovers without a rank.
    good(&[("LOCAL_RANK", "3"), ("MASTER_ADDR", "a")], Launcher::Alone, ALONE, "127.0.0.1:0");
}

#[test]
fn torchruns_contract() {
    let torchrun = Launcher::Torchrun;
    good(TORCHRUN, torchrun, [5, 8, 1, 4, 1], "host0:29500");
    good(&with(TORCHRUN, &[("GROUP_RANK", "")]), torchrun, [5, 8, 1, 4, 1], "host0:29500");
    // The four that PyTorch needs: one process a node.
    let four = with(TORCHRUN, &[("LOCAL_RANK", ""), ("LOCAL_WORLD_SIZE", ""), ("GROUP_RANK", "")]);
    good(&four, torchrun, [5, 8, 0, 1, 5], "host0:29500");
    good(&[("RANK", "0"), ("WORLD_SIZE", "1")], torchrun, ALONE, "127.0.0.1:0");

    for (name, value, parts) in [
        ("RANK", "-1", &["\"-1\"", "a whole number from 0"][..]),
        ("RANK", "8", &["\"8\"", "less than WORLD_SIZE, which is 8"]),
        ("RANK", "five", &["\"five\""]),
        ("WORLD_SIZE", "0", &["a whole number from 1"]),
        ("WORLD_SIZE", "", &["not set", "since RANK is set"]),
        ("WORLD_SIZE", "99999999999999999999999", &["a whole number from 1"]),
        ("LOCAL_RANK", "4", &["LOCAL_WORLD_SIZE, which is 4"]),
        ("LOCAL_RANK", "", &["not set", "LOCAL_WORLD_SIZE is set"]),
        ("LOCAL_WORLD_SIZE", "9", &["at most WORLD_SIZE, which is 8"]),
        ("LOCAL_WORLD_SIZE", "", &["not set", "LOCAL_RANK is set"]),
        ("GROUP_RANK", "x", &["\"x\""]),
        ("MASTER_ADDR", "", &["not set", "the host of rank 0"]),
        ("MASTER_PORT", "", &["not set", "1 to 65535"]),
        ("MASTER_PORT", "0", &["1 to 65535"]),
        ("MASTER_PORT", "65536", &["\"65536\""]),
        ("RESTART_COUNT", "once", &["\"once\""]),
    ] {
        bad(&with(TORCHRUN, &[(name, value)]), name, parts);
    }
}

#[test]
fn restarts_are_counted_by_whoever_restarts() {
    for (more, expected) in [
        (&[][..], 0),
        (&[("RESTART_COUNT", "2")], 2),
        (&[("TORCHELASTIC_RESTART_COUNT", "3")], 3),
        (&[("SLURM_RESTART_COUNT", "4")], 4),
        (&[("RESTART_COUNT", "2"), ("SLURM_RESTART_COUNT", "4")], 2),
    ] {
        for base in [TORCHRUN, SRUN, BATCH, OPEN_MPI, KUBERNETES] {
            let world = world(&with(base, more)).expect("a world");
            assert_eq!(world.restart_count, expected, "{base:?} {more:?}");
        }
    }
}

#[test]
fn a_rank_of_srun() {
    let port = port_of_job(1234, 0);
    good(SRUN, Launcher::Slurm, [4, 6, 0, 1, 1], &format!("node1:{port}"));
    let first = with(SRUN, &[("SLURM_PROCID", "3"), ("SLURM_LOCALID", "3"), ("SLURM_NODEID", "0")]);
    good(&first, Launcher::Slurm, [3, 6, 3, 4, 0], &format!("node1:{port}"));
    // A smaller step in a larger job: the step counts.
    let small = with(
        SRUN,
        &[
            ("SLURM_STEP_ID", "2"),
            ("SLURM_PROCID", "1"),
            ("SLURM_NTASKS", "2"),
            ("SLURM_STEP_NUM_TASKS", "2"),
            ("SLURM_STEP_NODELIST", "node[2,3]"),
            ("SLURM_STEP_TASKS_PER_NODE", "1(x2)"),
        ],
    );
    let step_port = port_of_job(1234, 2);
    good(&small, Launcher::Slurm, [1, 2, 0, 1, 1], &format!("node2:{step_port}"));
    // Where the script chose the address and the port.
    let chosen = with(SRUN, &[("MASTER_ADDR", "10.0.0.1"), ("MASTER_PORT", "7000")]);
    good(&chosen, Launcher::Slurm, [4, 6, 0, 1, 1], "10.0.0.1:7000");
    good(&with(SRUN, &[("WORLD_SIZE", "6")]), Launcher::Slurm, [4, 6, 0, 1, 1], "node1:21234");

    for (name, value, parts) in [
        ("SLURM_PROCID", "6", &["less than SLURM_STEP_NUM_TASKS, which is 6"][..]),
        ("SLURM_PROCID", "four", &["\"four\""]),
        ("SLURM_LOCALID", "1", &["less than SLURM_STEP_TASKS_PER_NODE, which is 1"]),
        ("SLURM_LOCALID", "", &["not set"]),
        ("SLURM_NODEID", "3", &["less than the 3 nodes of SLURM_STEP_NODELIST"]),
        ("SLURM_STEP_NODELIST", "node[1-", &["\"node[1-\"", "without its ]"]),
        ("SLURM_STEP_TASKS_PER_NODE", "2(x3", &["counts such as 2(x3),1"]),
        ("SLURM_STEP_TASKS_PER_NODE", "4,1", &["3 nodes"]),
        ("SLURM_STEP_TASKS_PER_NODE", "4,1,2", &["6 tasks in all"]),
        ("SLURM_STEP_TASKS_PER_NODE", "1(x4000000000)", &["counts such as"]),
        ("SLURM_STEP_NUM_TASKS", "many", &["\"many\""]),
        ("SLURM_JOB_ID", "", &["not set"]),
        ("WORLD_SIZE", "12", &["6, as SLURM_STEP_NUM_TASKS is beside SLURM_PROCID"]),
        ("MASTER_PORT", "http", &["\"http\""]),
    ] {
        bad(&with(SRUN, &[(name, value)]), name, parts);
    }
}

#[test]
fn a_batch_script_and_the_shell_of_salloc_are_no_ranks() {
    good(BATCH, Launcher::Alone, ALONE, "127.0.0.1:0");
    let salloc = with(BATCH, &[("SLURM_PROCID", ""), ("SLURM_LOCALID", ""), ("SLURM_NODEID", "")]);
    good(&salloc, Launcher::Alone, ALONE, "127.0.0.1:0");
    // The step that `salloc` opens its shell in, and the one of a batch script.
    for step in ["4294967290", "4294967291"] {
        good(&with(SRUN, &[("SLURM_STEP_ID", step)]), Launcher::Alone, ALONE, "127.0.0.1:0");
    }
    // A job submitted from within a step inherits what it has not itself: seen with Slurm 22.05.
    for own in [("SLURM_NTASKS", "3"), ("SLURM_JOB_NODELIST", "node[2-4]")] {
        let inherited = with(SRUN, &[("SLURM_PROCID", "0"), ("SLURM_NODEID", "0"), own]);
        good(&inherited, Launcher::Alone, ALONE, "127.0.0.1:0");
    }
}

#[test]
fn a_rank_of_mpirun() {
    good(OPEN_MPI, Launcher::OpenMpi, [2, 4, 2, 4, 0], "127.0.0.1:20025");
    good(HYDRA, Launcher::Hydra, [1, 2, 1, 2, 0], "127.0.0.1:29400");
    let two_hosts = [
        ("OMPI_COMM_WORLD_LOCAL_RANK", "0"),
        ("OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
        ("MASTER_ADDR", "host0"),
    ];
    good(&with(OPEN_MPI, &two_hosts), Launcher::OpenMpi, [2, 4, 0, 2, 1], "host0:20025");
    bad(&with(OPEN_MPI, &two_hosts[..2]), "MASTER_ADDR", &["not set", "the host of rank 0"]);
    // In an allocation, its first host has rank 0; Slurm's own ranks are those of the daemons.
    let in_slurm = with(SRUN, &with(OPEN_MPI, &two_hosts[..2]));
    good(&in_slurm, Launcher::OpenMpi, [2, 4, 0, 2, 1], "node1:20025");
    good(&with(SRUN, HYDRA), Launcher::Hydra, [1, 2, 1, 2, 0], "127.0.0.1:29400");
    // `srun --mpi=pmi2` sets PMI_RANK too.
    good(
        &with(SRUN, &[("PMI_RANK", "4"), ("PMI_SIZE", "6")]),
        Launcher::Slurm,
        [4, 6, 0, 1, 1],
        "node1:21234",
    );
    // Ranks dealt to the nodes in turn: their node is not known, and is not guessed.
    let in_turn = with(&with(OPEN_MPI, &two_hosts), &[("OMPI_COMM_WORLD_LOCAL_RANK", "1")]);
    bad(&in_turn, "OMPI_COMM_WORLD_LOCAL_RANK", &["set GROUP_RANK"]);
    good(
        &with(&in_turn, &[("GROUP_RANK", "0")]),
        Launcher::OpenMpi,
        [2, 4, 1, 2, 0],
        "host0:20025",
    );

    for (name, value) in [
        ("OMPI_COMM_WORLD_RANK", "4"),
        ("OMPI_COMM_WORLD_SIZE", "0"),
        ("OMPI_COMM_WORLD_SIZE", ""),
        ("OMPI_COMM_WORLD_LOCAL_RANK", "x"),
        ("OMPI_COMM_WORLD_LOCAL_SIZE", ""),
    ] {
        bad(&with(OPEN_MPI, &[("GROUP_RANK", "0"), (name, value)]), name, &[]);
    }
    bad(&with(HYDRA, &[("PMI_SIZE", "two")]), "PMI_SIZE", &["\"two\""]);
}

#[test]
fn a_pod_of_an_indexed_job() {
    good(KUBERNETES, Launcher::Kubernetes, [2, 3, 0, 1, 2], "job-0.job:29400");
    good(
        &with(KUBERNETES, &[("MASTER_PORT", "7")]),
        Launcher::Kubernetes,
        [2, 3, 0, 1, 2],
        "job-0.job:7",
    );
    // Independent pods: each is a world of one.
    good(&KUBERNETES[..1], Launcher::Alone, ALONE, "127.0.0.1:0");
    bad(&KUBERNETES[..2], "MASTER_ADDR", &["not set", "the pod with index 0"]);
    bad(
        &with(KUBERNETES, &[("JOB_COMPLETION_INDEX", "3")]),
        "JOB_COMPLETION_INDEX",
        &["WORLD_SIZE, which is 3"],
    );
    bad(&with(KUBERNETES, &[("JOB_COMPLETION_INDEX", "a")]), "JOB_COMPLETION_INDEX", &["\"a\""]);
}

#[test]
fn rank_beats_the_job_around_it() {
    good(&with(SRUN, TORCHRUN), Launcher::Torchrun, [5, 8, 1, 4, 1], "host0:29500");
    good(&with(OPEN_MPI, TORCHRUN), Launcher::Torchrun, [5, 8, 1, 4, 1], "host0:29500");
    let in_batch = with(BATCH, &[&TORCHRUN[..2], &TORCHRUN[5..]].concat());
    good(&in_batch, Launcher::Torchrun, [5, 8, 0, 1, 5], "host0:29500");
}

#[test]
fn gaps_are_filled_from_a_launcher_that_agrees() {
    // `srun sh -c 'RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS ./program'`
    let agreeing = with(SRUN, &[("RANK", "4"), ("WORLD_SIZE", "6")]);
    good(&agreeing, Launcher::Torchrun, [4, 6, 0, 1, 1], "node1:21234");
    let other = with(SRUN, &[("RANK", "1"), ("WORLD_SIZE", "6")]);
    bad(&other, "MASTER_ADDR", &["not set"]);
}

#[test]
fn neighbouring_jobs_and_the_steps_of_a_job_have_their_own_ports() {
    let ports: std::collections::BTreeSet<u16> = (7_000..10_000)
        .map(|job| port_of_job(job, 0))
        .chain((1..1000).map(|step| port_of_job(7_000, step)))
        .collect();
    let steps_apart = (1..1000u64).filter(|step| (step * 4_099) % 12_000 >= 3_000).count();
    assert_eq!(ports.len(), 3_000 + steps_apart);
    assert!(ports.iter().all(|port| (20_000..32_000).contains(port)));
    assert!((20_000..32_000).contains(&port_of_job(u64::MAX, u64::MAX)));
}

#[test]
fn what_a_rank_starts_for_itself_is_no_rank() {
    let mut command = Command::new("env");
    command.env_clear();
    for (name, value) in [TORCHRUN, SRUN, OPEN_MPI, HYDRA, KUBERNETES].concat() {
        command.env(name, value);
    }
    World::remove_from(&mut command);
    let output = command.output().expect("env runs");
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    let left: Vec<_> = text.lines().filter_map(|line| line.split_once('=')).collect();
    assert!(left.contains(&("SLURM_JOB_ID", "1234")), "{left:?}");
    assert_eq!(world(&left).expect("alone"), World::alone());
}
