//! The ready-made loop: what it trains, and when it ends.

use crate::Test;
use crate::digits::{CLASSES, Config, FEATURES, copy, is_of_time, train};
use candle_core::{Device, Tensor};
use mobula_core::checkpoint::Checkpoint;
use mobula_core::{Batch, BatchStream, BoxError, Flow, Member, Placement, RunDir, Runtime, remote};
use mobula_nn::models::MlpOptions;
use mobula_nn::{Model, ModelSpec, Pass, loss::cross_entropy, metrics};
use mobula_train::optim::{Mode, UpdaterOptions};
use mobula_train::{
    AdamW, AdamWOptions, Callback, CheckpointConfig, EarlyStopping, EpochReport, SavedState,
    ScalingConfig, StepReport, TimeBudget, TrainLoop, TrainState, Trainer, TrainingResult,
    WorkerContext,
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

pub(crate) const TESTS: &[Test] = &[
    ("fit::it_trains_as_a_loop_of_ones_own", same),
    ("fit::a_metric_that_no_longer_improves_ends_it", early_stopping),
    ("fit::patience_is_counted", patience),
    ("fit::the_averages_of_the_weights_can_be_validated", of_averages),
    ("fit::two_callbacks_of_one_name_are_refused", one_name),
    ("fit::a_validation_gives_as_many_numbers_as_it_said", totals),
    ("fit::a_time_budget_ends_it_within_an_epoch", time_budget),
    ("fit::callbacks_go_on_from_every_step", goes_on),
    ("fit::validation_within_an_epoch_is_recorded", within),
];

#[derive(Clone, Default, Serialize, Deserialize)]
struct Plan {
    epochs: u64,
    lr: f64,
    patience: Option<u64>,
    /// Ends after so many looks at the clock.
    budget: Option<u64>,
    every_steps: Option<u64>,
    counts: bool,
}

/// What a rank has at the end: weights, steps, and the metrics that the loop gives.
type Ended = (Vec<f32>, u64, BTreeMap<String, f64>);

/// Remembers what it has heard.
#[derive(Default)]
struct Counter(u64, f64, u64);

impl Callback for Counter {
    fn name(&self) -> &str {
        "counter"
    }

    fn on_step(&mut self, step: &StepReport) -> Result<Flow, BoxError> {
        self.0 += 1;
        self.1 += step.loss;
        if self.0 != step.step {
            return Err(format!("heard of {} steps, this is {}", self.0, step.step).into());
        }
        Ok(Flow::Continue)
    }

    fn on_epoch(&mut self, epoch: &EpochReport) -> Result<Flow, BoxError> {
        self.2 += 1;
        assert_eq!(self.2, epoch.epoch);
        Ok(Flow::Continue)
    }

    fn state(&self) -> serde_json::Value {
        serde_json::json!([self.0, self.1, self.2])
    }

    fn restore(&mut self, state: &serde_json::Value) -> Result<(), BoxError> {
        (self.0, self.1, self.2) = serde_json::from_value(state.clone())?;
        Ok(())
    }
}

#[remote(crate = mobula_core)]
fn fit_digits(member: Member, plan: Plan) -> Result<Ended, BoxError> {
    let mut context = WorkerContext::join(member)?;
    let config = Config::new(plan.epochs);
    let (mut batches, test) = (context.batches(&config)?, context.batches(&config)?);
    let mut options = MlpOptions::new(FEATURES, [16], CLASSES);
    options.dropout = 0.0;
    let model = Model::build(&ModelSpec::new("mlp", &options)?, 5, context.device())?;
    let adamw = AdamW::new(AdamWOptions { lr: plan.lr, ..Default::default() })?;
    let mut state = TrainState::new(model, adamw, 5, plan.epochs);
    let mut training = TrainLoop::new(loss).with_validation(test, ["accuracy"], |model, batch| {
        let logits = model.predict(batch.get("x")?)?;
        Ok::<_, BoxError>([metrics::correct(&logits, batch.get("y")?)? as f64])
    });
    if let Some(patience) = plan.patience {
        let stopping = EarlyStopping::new("accuracy", Mode::Max).with_min_delta(1e-3);
        let stopping = stopping.with_patience(patience);
        training = training.with_callback(stopping);
    }
    if let Some(looks) = plan.budget {
        let clock = AtomicU64::new(0);
        let second = move || Duration::from_secs(clock.fetch_add(1, Ordering::Relaxed));
        let budget = TimeBudget::with_clock(Duration::from_secs(looks), second);
        training = training.with_callback(budget);
    }
    if let Some(steps) = plan.every_steps {
        training = training.with_validation_every_steps(steps);
    }
    if plan.counts {
        training = training.with_callback(Counter::default());
    }
    let metrics = training.run(&mut context, &mut state, batches.as_mut())?;
    let mut weights = Vec::new();
    for (_, var) in state.model.params().vars() {
        weights.extend(var.flatten_all()?.to_vec1::<f32>()?);
    }
    Ok((weights, state.step(), metrics))
}

fn plan(epochs: u64) -> Plan {
    Plan { epochs, lr: 0.02, ..Plan::default() }
}

fn fit(runtime: &Runtime, plan: Plan, run: Option<&RunDir>) -> TrainingResult<Ended> {
    let scaling = ScalingConfig { placement: Placement::Thread, ..ScalingConfig::workers(2) };
    let trainer = Trainer::new(fit_digits::remote(plan)).with_logs_shown(false);
    let checkpoints = CheckpointConfig {
        every_steps: Some(1),
        keep: 1000,
        asynchronous: false,
        ..CheckpointConfig::default()
    };
    let trainer = trainer.with_scaling(scaling).with_checkpoints(checkpoints);
    let trainer = match run {
        Some(run) => trainer.with_run(run),
        None => trainer,
    };
    trainer.fit(runtime).expect("fit")
}

fn same(runtime: &Runtime) {
    let ready = fit(runtime, plan(4), None);
    let scaling = ScalingConfig { placement: Placement::Thread, ..ScalingConfig::workers(2) };
    let own = Trainer::new(train::remote(Config::new(4))).with_scaling(scaling);
    let own = own.with_logs_shown(false).fit(runtime).expect("fit");
    assert_eq!(ready.values[0].0, own.values[0].weights);
    assert_eq!(ready.values[0].0, ready.values[1].0);
    let without_rate = |metrics: &BTreeMap<String, f64>| {
        let mut metrics = metrics.clone();
        metrics.retain(|name, _| !is_of_time(name));
        metrics
    };
    assert_eq!(without_rate(&ready.metrics), without_rate(&own.metrics));
    assert_eq!(ready.values[1].2["accuracy"], own.metrics["accuracy"]);
}

fn early_stopping(runtime: &Runtime) {
    let root = tempfile::tempdir().expect("temporary folder");
    let run = RunDir::create(root.path(), "r", 5, &()).expect("run");
    let stops = |patience| fit(runtime, Plan { patience: Some(patience), ..plan(50) }, Some(&run));
    let first = stops(2);
    let (_, steps, metrics) = &first.values[0];
    // It learns all that there is to learn; then three epochs do not improve.
    assert_eq!(metrics["accuracy"], 1.0);
    assert!(*steps < 100, "{steps}");
    assert!(first.values.iter().all(|rank| rank.1 == *steps));
    assert_eq!(first.checkpoint.expect("of the end").step(), *steps);
    // It is over, and stays so. With more patience it goes on.
    assert_eq!(stops(2).values[0].1, *steps);
    assert_eq!(stops(4).values[0].1, steps + 2 * 6);
}

/// By itself, on the metrics that it is told.
fn patience(_: &Runtime) {
    let heard = |mode, min_delta, values: &[f64]| {
        let stopping = EarlyStopping::new("m", mode).with_patience(1);
        let mut stopping = stopping.with_min_delta(min_delta);
        let stop = values.iter().position(|value| {
            let metrics = BTreeMap::from([("m".to_owned(), *value)]);
            let report = EpochReport { epoch: 1, epochs: 9, step: 1, metrics };
            stopping.on_epoch(&report).expect("the metric").is_stop()
        });
        (stop, stopping.best())
    };
    assert_eq!(heard(Mode::Min, 0.0, &[3.0, 2.0, 2.0, 1.0, 2.0, 3.0, 0.0]), (Some(5), Some(1.0)));
    assert_eq!(heard(Mode::Max, 0.0, &[3.0, 2.0, 4.0, 5.0]), (None, Some(5.0)));
    assert_eq!(heard(Mode::Max, 1.0, &[3.0, 3.9, 4.0]), (Some(2), Some(3.0)));
    assert_eq!(heard(Mode::Min, 0.0, &[f64::NAN, 1.0, f64::NAN, f64::NAN]), (Some(3), Some(1.0)));
    let report = EpochReport { epoch: 1, epochs: 1, step: 1, metrics: BTreeMap::new() };
    let error = EarlyStopping::new("m", Mode::Min).on_epoch(&report).expect_err("no metric");
    assert_eq!(
        error.to_string(),
        "early stopping depends on the metric \"m\", but the epoch reports "
    );
}

/// Alone, for two epochs; what the loop gives, and what a loop of one's own would have.
fn of_averages(_: &Runtime) {
    let run = |of_averages: bool| {
        let (mut context, mut state, mut batches) = alone(2);
        let test = context.batches(&Config::new(2)).expect("stream");
        let training = TrainLoop::new(loss).with_validation(test, ["sum"], |model, batch| {
            let weights = model.params().vars()[0].1.sum_all()?.to_scalar::<f32>()?;
            Ok::<_, BoxError>([f64::from(weights) * batch.rows() as f64])
        });
        let mut training = if of_averages { training.with_averages_validated() } else { training };
        let metrics = training.run(&mut context, &mut state, batches.as_mut()).expect("trains");
        let sum = |model: &Model| {
            model.params().vars()[0].1.sum_all().and_then(|sum| sum.to_scalar::<f32>())
        };
        let averages = state.with_averages(sum).expect("averages").expect("sum");
        (metrics["sum"], sum(&state.model).expect("sum"), averages)
    };
    let ((of_weights, weights, averages), (of_averages, ..)) = (run(false), run(true));
    assert!((of_weights - f64::from(weights)).abs() < 1e-6, "{of_weights} {weights}");
    assert!((of_averages - f64::from(averages)).abs() < 1e-6, "{of_averages} {averages}");
    assert!((weights - averages).abs() > 1e-3, "they differ: {weights} {averages}");
}

fn loss(model: &Model, pass: &Pass, batch: &Batch) -> Result<Tensor, BoxError> {
    Ok(cross_entropy(&model.forward(batch.get("x")?, pass)?, batch.get("y")?)?)
}

type Alone = (WorkerContext<'static>, TrainState, Box<dyn BatchStream>);

fn alone(epochs: u64) -> Alone {
    let context = WorkerContext::alone(|_| Ok(Flow::Continue));
    let batches = context.batches(&Config::new(epochs)).expect("stream");
    let spec = ModelSpec::new("mlp", &MlpOptions::new(FEATURES, [16], CLASSES)).expect("spec");
    let model = Model::build(&spec, 5, &Device::Cpu).expect("model");
    let updater = UpdaterOptions { ema: Some(0.9), ..Default::default() }.build().expect("options");
    (context, TrainState::new(model, updater, 5, epochs), batches)
}

fn one_name(_: &Runtime) {
    let (mut context, mut state, mut batches) = alone(1);
    let watch = |metric| EarlyStopping::new(metric, Mode::Min);
    let mut two = TrainLoop::new(loss).with_callback(watch("loss")).with_callback(watch("lr"));
    two.run(&mut context, &mut state, batches.as_mut()).expect("of two metrics");
    let mut same = TrainLoop::new(loss).with_callback(watch("loss")).with_callback(watch("loss"));
    let error = same.run(&mut context, &mut state, batches.as_mut()).expect_err("of one");
    let expected =
        "option name is \"early_stopping/loss\" twice, expected another one for each callback";
    assert_eq!(error.to_string(), expected);
}

fn totals(_: &Runtime) {
    let (mut context, _, mut batches) = alone(1);
    let three = |_: &Batch| Ok::<_, BoxError>(vec![0.0; 3]);
    let error = context.means_over(batches.as_mut(), 2, three).expect_err("one too many");
    assert_eq!(error.to_string(), "a validation gave 3 numbers for a batch, expected 2");
}

fn time_budget(runtime: &Runtime) {
    let root = tempfile::tempdir().expect("temporary folder");
    let run = RunDir::create(root.path(), "r", 5, &()).expect("run");
    // A look at the start and what it remembers then, and two after each step.
    let stopped = fit(runtime, Plan { budget: Some(20), ..plan(50) }, Some(&run));
    assert!(stopped.values.iter().all(|rank| rank.1 == 10), "{}", stopped.values[0].1);
    assert_eq!(stopped.checkpoint.expect("within an epoch").step(), 10);
    // What was spent counts.
    let again = fit(runtime, Plan { budget: Some(20), ..plan(50) }, Some(&run));
    assert_eq!(again.values[0].1, 10);
}

fn goes_on(runtime: &Runtime) {
    let root = tempfile::tempdir().expect("temporary folder");
    let run = RunDir::create(root.path(), "whole", 5, &()).expect("run");
    let plan = || Plan { counts: true, patience: Some(2), lr: 0.005, ..plan(12) };
    let whole = fit(runtime, plan(), Some(&run));
    let remembered = |checkpoint: &Checkpoint| {
        checkpoint.json::<SavedState>("state.json").expect("state").callbacks
    };
    let expected = remembered(whole.checkpoint.as_ref().expect("checkpoint"));
    assert!(expected["counter"][0].as_u64() == Some(whole.values[0].1), "{expected:?}");
    for path in run.checkpoints(1).paths().expect("paths").iter().step_by(5) {
        let name = path.file_name().expect("name");
        let run = RunDir::create(root.path(), &name.to_string_lossy(), 5, &()).expect("run");
        copy(path, &run.checkpoints(1).dir().join(name));
        let resumed = fit(runtime, plan(), Some(&run));
        let ended = |fit: &TrainingResult<Ended>| (fit.values[0].0.clone(), fit.values[0].1);
        assert!(ended(&resumed) == ended(&whole), "{name:?}");
        assert_eq!(remembered(&resumed.checkpoint.expect("checkpoint")), expected);
    }
}

fn within(runtime: &Runtime) {
    let root = tempfile::tempdir().expect("temporary folder");
    let run = RunDir::create(root.path(), "r", 5, &()).expect("run");
    fit(runtime, Plan { every_steps: Some(4), ..plan(2) }, Some(&run));
    let steps = |run: &RunDir| {
        let lines = run.metrics().expect("metrics");
        let steps = lines.iter().filter(|line| line.values.contains_key("accuracy"));
        steps.map(|line| line.step).collect::<Vec<_>>()
    };
    // After every four steps, and at the end of both epochs.
    assert_eq!(steps(&run), [4, 6, 8, 12, 12]);
    // A checkpoint is taken before the validation behind its step.
    for (step, expected) in
        [(3, vec![4, 6, 8, 12, 12]), (4, vec![4, 6, 8, 12, 12]), (6, vec![8, 12, 12])]
    {
        let from = run.checkpoints(1).dir().join(format!("step-{step:010}"));
        let resumed = RunDir::create(root.path(), &step.to_string(), 5, &()).expect("run");
        copy(&from, &resumed.checkpoints(1).dir().join(from.file_name().expect("name")));
        fit(runtime, Plan { every_steps: Some(4), ..plan(2) }, Some(&resumed));
        assert_eq!(steps(&resumed), expected, "from step {step}");
    }
}
