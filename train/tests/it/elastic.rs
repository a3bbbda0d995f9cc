//! Training whose workers become fewer and more: with copies of this program as machines, of two CPUs
//! each, of which one is lost within an epoch, and another one joins.

use crate::Test;
use crate::digits::{CLASSES, FEATURES, row};
use candle_core::{Device, Tensor};
use mobula_core::world::free_port;
use mobula_core::{
    Batch, BatchSource, BatchStream, BoxError, Error, Member, OnLoss, PlacementGroupOptions,
    Resources, RunDir, Runtime, Shard, StreamState, remote,
};
use mobula_nn::models::MlpOptions;
use mobula_nn::{Model, ModelSpec, loss::cross_entropy};
use mobula_train::{
    AdamW, AdamWOptions, FailureConfig, ScalingConfig, TrainState, Trainer, TrainingResult,
    WorkerContext, WorkerCount,
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Makes this program one of the copies, with a folder for all of them.
const FOLDER: &str = "MOBULA_TEST_ELASTIC";
const LONG: Duration = Duration::from_secs(120);

const ROWS: usize = 116;
const BATCH: usize = 16;
const STEPS: u64 = ROWS.div_ceil(BATCH) as u64;
/// In the second epoch a machine is lost in this step, and before that one another has joined.
const SHRINK_AT: u64 = STEPS + 2;
const GROW_AT: u64 = STEPS + 5;

pub(crate) const TESTS: &[Test] = &[
    ("elastic::fewer_and_more_workers_lose_no_row_and_no_bit", machines),
    ("elastic::workers_become_more_when_another_job_ends", more),
    ("elastic::what_cannot_be_is_refused", refused),
];

pub(crate) fn folder() -> Option<String> {
    std::env::var(FOLDER).ok()
}

/// What a training does beside training.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Plan {
    folder: PathBuf,
    dropout: f64,
    /// The ranks on the machine that is lost.
    lost: Vec<usize>,
    /// In which step it says that there may be more workers, for whom it waits before [`GROW_AT`].
    grow_from: Option<u64>,
}

/// Rows that know their numbers; each rank takes every `world`-th one of a batch.
struct Numbered {
    shard: Shard,
    epoch: u64,
    step: u64,
}

impl BatchSource for Plan {
    fn open(&self, shard: Shard) -> Result<Box<dyn BatchStream>, Error> {
        Ok(Box::new(Numbered { shard, epoch: 0, step: 0 }))
    }
}

impl BatchStream for Numbered {
    fn next_batch(&mut self) -> Result<Option<Batch>, Error> {
        if self.step == STEPS {
            (self.epoch, self.step) = (self.epoch + 1, 0);
            return Ok(None);
        }
        let places = self.step as usize * BATCH..ROWS.min((self.step as usize + 1) * BATCH);
        self.step += 1;
        let Shard { rank, world } = self.shard;
        let mine = places.clone().filter(|place| place % world == rank);
        let ids: Vec<usize> = mine.map(|at| (at * 7 + self.epoch as usize) % ROWS).collect();
        let x: Vec<f32> = ids.iter().flat_map(|id| row(*id).0).collect();
        let y: Vec<u32> = ids.iter().map(|id| row(*id).1).collect();
        let (rows, id) = (ids.len(), ids.into_iter().map(|id| id as u32).collect());
        let batch = Batch::new(vec![
            ("x".into(), Tensor::from_vec(x, (rows, FEATURES), &Device::Cpu)?),
            ("y".into(), Tensor::from_vec(y, rows, &Device::Cpu)?),
            ("id".into(), Tensor::from_vec::<_, u32>(id, rows, &Device::Cpu)?),
        ])?;
        Ok(Some(batch.with_global_rows(places.len())))
    }

    fn state(&self) -> StreamState {
        let (epoch, step) = (self.epoch, self.step);
        StreamState { manifest: "numbered".into(), version: 1, seed: 0, epoch, step }
    }

    fn restore(&mut self, state: &StreamState) -> Result<(), Error> {
        (self.epoch, self.step) = (state.epoch, state.step);
        Ok(())
    }

    fn steps_per_epoch(&self) -> u64 {
        STEPS
    }
}

impl Plan {
    fn tell(&self, name: &str, text: &str) {
        let draft = self.folder.join(format!("{name}.{}", std::process::id()));
        std::fs::write(&draft, text).expect("writes");
        std::fs::rename(&draft, self.folder.join(name)).expect("renames");
    }

    /// In the ledger of this generation and rank: a step begins, with these rows.
    fn record(&self, generation: u64, rank: usize, step: u64, ids: &[u32]) -> std::io::Result<()> {
        let path = self.folder.join(format!("ledger-{generation}-{rank}"));
        let mut ledger = std::fs::File::options().append(true).create(true).open(path)?;
        let ids: Vec<String> = ids.iter().map(u32::to_string).collect();
        writeln!(ledger, "{step} {}", ids.join(" "))
    }
}

#[remote(crate = mobula_core)]
fn train(member: Member, plan: Plan) -> Result<Vec<f32>, BoxError> {
    let generation = member.generation();
    let mut context = WorkerContext::join(member)?;
    let Shard { rank, world } = context.shard();
    let mut stream = context.batches(&plan)?;
    let options = MlpOptions { dropout: plan.dropout, ..MlpOptions::new(FEATURES, [16], CLASSES) };
    let model = Model::build(&ModelSpec::new("mlp", &options)?, 5, &Device::Cpu)?;
    let mut state = TrainState::new(model, AdamW::new(AdamWOptions::default())?, 5, 3);
    context.restore(&mut state, stream.as_mut())?;
    if rank == 0 {
        plan.tell(&format!("began-{generation}"), &state.step().to_string());
    }
    while !state.is_finished() {
        while let Some(batch) = stream.next_batch()? {
            let step = state.step();
            if let Some(from) = plan.grow_from.filter(|from| world < 4 && step >= *from) {
                plan.tell("smaller", "");
                if step == GROW_AT {
                    wait_for_more(&mut context, &plan)?;
                }
                // So that others come in one step or another.
                std::thread::sleep(Duration::from_millis(if from < GROW_AT { 20 } else { 0 }));
            }
            plan.record(generation, rank, step, &batch.get("id")?.to_vec1::<u32>()?)?;
            context.step(&mut state, &batch, |model, pass, batch| {
                if step == SHRINK_AT && generation == 0 && plan.lost.contains(&rank) {
                    wait_for_the_end(&plan);
                }
                let logits = model.forward(batch.get("x")?, pass)?;
                Ok::<_, BoxError>(cross_entropy(&logits, batch.get("y")?)?)
            })?;
        }
        context.end_epoch(&mut state, stream.as_ref(), &[])?;
    }
    let vars = state.model.params().vars();
    let values = vars.iter().map(|(_, var)| Ok(var.flatten_all()?.to_vec1::<f32>()?));
    Ok(values.collect::<Result<Vec<_>, BoxError>>()?.concat())
}

/// Evaluates until the group has grown.
fn wait_for_more(context: &mut WorkerContext<'_>, plan: &Plan) -> Result<(), BoxError> {
    let deadline = Instant::now() + LONG;
    while Instant::now() < deadline {
        let mut rows = context.batches(plan)?;
        context.mean_over(rows.as_mut(), |batch| Ok::<_, BoxError>(batch.rows() as f64))?;
    }
    Err("nobody has joined".into())
}

/// In the middle of a step, on the machine that is to be lost.
fn wait_for_the_end(plan: &Plan) -> ! {
    // The agent: the fork server is between them.
    plan.tell("victim", &std::env::var("MOBULA_DRIVER_PID").unwrap_or_default());
    loop {
        std::thread::park();
    }
}

fn trainer(plan: &Plan, scaling: ScalingConfig) -> Trainer<Vec<f32>> {
    // At once, so that the tests take no longer than they must.
    let scaling = ScalingConfig { grow_interval: Duration::ZERO, ..scaling };
    // Of which the loss of the machine is one, and the growth is none.
    let failure = FailureConfig {
        max_failures: 1,
        replace_within: Duration::ZERO,
        ..FailureConfig::default()
    };
    let trainer = Trainer::new(train::remote(plan.clone())).with_logs_shown(false);
    trainer.with_scaling(scaling).with_failure(failure)
}

/// All ranks have the same in the end.
fn fit(runtime: &Runtime, plan: &Plan, scaling: ScalingConfig) -> TrainingResult<Vec<f32>> {
    let fit = trainer(plan, scaling).fit(runtime).expect("fit");
    assert!(fit.values.iter().all(|weights| *weights == fit.values[0]));
    fit
}

/// The numbers of the rows of each step that counts, and the steps that generations began with: those
/// of a step that was cut off are in the ledger once more, by those who made it again.
fn committed(folder: &Path) -> (BTreeMap<u64, Vec<u32>>, Vec<u64>) {
    let read = |name: String| std::fs::read_to_string(folder.join(name)).ok();
    let began = (0..).map_while(|generation| read(format!("began-{generation}")));
    let began: Vec<u64> = began.map(|step| step.parse().expect("a step")).collect();
    let mut steps: BTreeMap<u64, Vec<u32>> = BTreeMap::new();
    for (generation, first) in began.iter().enumerate() {
        let end = began.get(generation + 1).copied().unwrap_or(u64::MAX);
        let ledgers = (0..4).filter_map(|rank| read(format!("ledger-{generation}-{rank}")));
        for line in ledgers.flat_map(|text| text.lines().map(str::to_owned).collect::<Vec<_>>()) {
            let mut numbers = line.split(' ').filter(|number| !number.is_empty());
            let step: u64 = numbers.next().and_then(|step| step.parse().ok()).expect("a step");
            if (*first..end).contains(&step) {
                let ids = numbers.map(|id| id.parse::<u32>().expect("a number"));
                steps.entry(step).or_default().extend(ids);
            }
        }
    }
    (steps, began)
}

/// INV-ONCE: in each epoch each row is in exactly one step that counts. Gives the steps that
/// generations began with.
fn assert_each_row_once(folder: &Path) -> Vec<u64> {
    let (steps, began) = committed(folder);
    assert!(steps.keys().copied().eq(0..3 * STEPS), "{:?}", steps.keys());
    for epoch in 0..3 {
        let steps = steps.range(epoch * STEPS..(epoch + 1) * STEPS);
        let mut ids: Vec<u32> = steps.flat_map(|(_, ids)| ids.clone()).collect();
        ids.sort_unstable();
        assert!(ids.into_iter().eq(0..ROWS as u32), "epoch {epoch}");
    }
    began
}

fn wait_until(mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + LONG;
    while !done() {
        assert!(Instant::now() < deadline, "in vain");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn mirrored(scaling: ScalingConfig) -> ScalingConfig {
    ScalingConfig { shard_optimizer: true, mirror_optimizer: true, ..scaling }
}

/// The copy that drives, and copies that never leave `init`.
pub(crate) fn run(folder: &str) -> Result<(), Box<dyn std::error::Error>> {
    let runtime = mobula_core::init_with(Resources::cpus(2.0))?;
    wait_until(|| runtime.nodes().len() == 2);
    let plan = |name: &str, dropout, lost: &[usize]| {
        let folder = Path::new(folder).join(name);
        std::fs::create_dir_all(&folder).expect("folder");
        let grow_from = (!lost.is_empty()).then_some(GROW_AT);
        Plan { folder, dropout, lost: lost.to_vec(), grow_from }
    };
    let disturbed = |plan: &Plan, scaling| {
        let fit = fit(&runtime, plan, scaling);
        assert_eq!((fit.restarts, fit.values.len()), (1, 4));
        let began = assert_each_row_once(&plan.folder);
        // The lost ones may have done a step whose sum the others had yet to get.
        assert!([SHRINK_AT - 1, SHRINK_AT].contains(&began[1]), "{began:?}");
        assert_eq!((began.len(), began[2]), (3, GROW_AT));
        fit
    };
    let in_shards = |scaling| ScalingConfig { virtual_shards: Some(4), ..scaling };
    let whole = plan("whole", 0.3, &[]);
    let undisturbed = fit(&runtime, &whole, in_shards(ScalingConfig::workers(4)));
    assert_eq!(assert_each_row_once(&whole.folder), [0]);
    let shards = plan("shards", 0.3, &[2, 3]);
    let shards = disturbed(&shards, in_shards(ScalingConfig::workers(2..=4)));
    assert_eq!(shards.values[0], undisturbed.values[0], "to the bit");
    // Each of the lost ones has a mirror on the other machine.
    let mirrors = plan("mirrors", 0.3, &[2, 3]);
    let mirrors = disturbed(&mirrors, in_shards(mirrored(ScalingConfig::workers(2..=4))));
    assert_eq!(mirrors.values[0], undisturbed.values[0], "to the bit");
    // Now the first ranks are lost, and those that are left have other ranks then.
    let plain = plan("plain", 0.0, &[0, 1]);
    plain.tell("two machines", "");
    let here = PlacementGroupOptions::new("all that is here", vec![Resources::cpus(2.0)]);
    let _here = runtime.placement_group(&here)?;
    wait_until(|| runtime.nodes().len() == 3);
    disturbed(&plain, ScalingConfig::workers(2..=4));
    Ok(())
}

/// A copy of this program, the driver or a machine that joins it.
fn copy(folder: &Path, role: &str, address: &str) -> Child {
    let mut command = Command::new(std::env::current_exe().expect("this binary"));
    for name in ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK"] {
        command.env_remove(name);
    }
    command.env(role, address).env("MOBULA_SECRET", "of this test").env(FOLDER, folder);
    let printed = std::fs::File::create(folder.join(format!("{role}.log"))).expect("a log");
    let printed = if role == "MOBULA_LISTEN" { printed.into() } else { Stdio::null() };
    command.current_dir(folder).stdin(Stdio::null()).stdout(Stdio::null()).stderr(printed);
    command.spawn().expect("starts")
}

fn machines(_: &Runtime) {
    let folder = tempfile::tempdir().expect("temporary folder");
    let (address, folder) = (format!("127.0.0.1:{}", free_port().expect("a port")), folder.path());
    let mut driver = copy(folder, "MOBULA_LISTEN", &address);
    let mut agents = vec![copy(folder, "MOBULA_JOIN", &address)];
    let log = || std::fs::read_to_string(folder.join("MOBULA_LISTEN.log")).unwrap_or_default();
    let mut wait_for_file = |path: PathBuf| {
        wait_until(|| {
            let ended = driver.try_wait().expect("a child of ours");
            assert!(ended.is_none(), "the driver has ended: {}", log());
            path.exists()
        });
        std::fs::read_to_string(path).expect("reads")
    };
    for name in ["shards", "mirrors", "plain"] {
        if name == "plain" {
            wait_for_file(folder.join(name).join("two machines"));
            agents.push(copy(folder, "MOBULA_JOIN", &address));
        }
        let victim = wait_for_file(folder.join(name).join("victim"));
        let agent = agents.iter_mut().find(|agent| agent.id().to_string() == victim);
        agent.expect("an agent").kill().expect("kill -9");
        wait_for_file(folder.join(name).join("smaller"));
        agents.push(copy(folder, "MOBULA_JOIN", &address));
    }
    let status = driver.wait().expect("ends");
    agents.iter_mut().for_each(|agent| drop(agent.kill().and_then(|()| agent.wait())));
    let log = log();
    assert!(status.success(), "{status}: {log}");
    for lost in ["rank 2, rank 3", "rank 0, rank 1"] {
        let shrunk = format!("train: {lost} lost and not replaced: continuing with 2 workers from");
        assert!(log.contains(&shrunk), "{log}");
    }
    let grown = "train: 2 workers have joined: continuing with 4 workers";
    let grown = format!("{grown} from step {GROW_AT}, which rank ");
    assert_eq!(log.matches(&grown).count(), 3, "{log}");
}

/// CPUs are for other tests, and seats for this one.
fn more(runtime: &Runtime) {
    for (workers, from, is_mirrored) in [
        (1, GROW_AT, false),
        (2, 2, false),
        (2, SHRINK_AT, false),
        (1, GROW_AT, true),
        (2, SHRINK_AT, true),
    ] {
        let folder = tempfile::tempdir().expect("temporary folder");
        let (path, dropout) = (folder.path().to_owned(), 0.0);
        let (lost, grow_from) = (Vec::new(), Some(from));
        let plan = Plan { folder: path.clone(), dropout, lost, grow_from };
        let seat = Resources::default().with_custom("seat", 1.0);
        let options = PlacementGroupOptions::new("another job", vec![seat.clone(); 4 - workers]);
        let others = runtime.placement_group(&options).expect("there are four seats");
        let job = std::thread::spawn(move || {
            wait_until(|| path.join("smaller").exists());
            drop(others);
        });
        let elastic = ScalingConfig::workers(workers..=4);
        let elastic = if is_mirrored { mirrored(elastic) } else { elastic };
        let scaling = ScalingConfig { resources_per_worker: seat, ..elastic };
        let run = RunDir::create(folder.path(), "r", 5, &()).expect("run");
        let fit = trainer(&plan, scaling).with_run(&run).fit(runtime).expect("fit");
        job.join().expect("ends");
        assert_eq!((fit.restarts, fit.values.len()), (0, 4));
        assert!(fit.values.iter().all(|weights| *weights == fit.values[0]));
        let files = std::fs::read_dir(fit.checkpoint.expect("checkpoint").path()).expect("list");
        let sizes = files.map(|file| file.expect("file")).filter_map(|file| {
            let name = file.file_name().into_string().expect("name");
            name.starts_with("optimizer").then(|| file.metadata().expect("size").len() as usize)
        });
        let sizes: Vec<usize> = sizes.collect();
        assert_eq!(sizes.len(), if is_mirrored { 4 } else { 1 });
        // Of two tensors for each, in f32.
        assert!(sizes.iter().sum::<usize>() > 8 * fit.values[0].len(), "{sizes:?}");
        let began = assert_each_row_once(folder.path());
        assert!(began.len() == 2 && (from..=GROW_AT).contains(&began[1]), "{began:?}");
    }
}

fn refused(runtime: &Runtime) {
    let folder = std::env::temp_dir();
    let plan = Plan { folder, dropout: 0.0, lost: Vec::new(), grow_from: None };
    let error = |scaling: ScalingConfig, failure: FailureConfig| {
        let trainer = Trainer::new(train::remote(plan.clone())).with_scaling(scaling);
        trainer.with_failure(failure).fit(runtime).expect_err("refused").to_string()
    };
    let reversed = WorkerCount { min: 4, max: 2 };
    let text = error(ScalingConfig::workers(reversed), FailureConfig::default());
    assert!(text.starts_with("option num_workers is 4..=2, expected the fewest first"), "{text}");
    let shards = ScalingConfig { virtual_shards: Some(8), ..ScalingConfig::workers(5..=7) };
    let text = error(shards, FailureConfig::default());
    assert!(text.starts_with("option num_workers is 5..=7, expected a power of two"), "{text}");
    let parts = ScalingConfig { shard_optimizer: true, ..ScalingConfig::workers(1..=2) };
    let text = error(parts, FailureConfig::default());
    assert!(
        text.contains("expected one number with `local_sgd`, or with `shard_optimizer`"),
        "{text}"
    );
    let failure = FailureConfig { on_loss: OnLoss::RestartAll, ..FailureConfig::default() };
    let text = error(ScalingConfig::workers(1..=2), failure);
    assert!(text.starts_with("option on_loss is RestartAll, expected ReplaceLost"), "{text}");
}
