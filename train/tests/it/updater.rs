//! What goes with an optimizer: schedules, averages, accumulation, scales, in trainings.

use crate::Test;
use crate::digits::{CLASSES, Config, FEATURES, Rows, is_of_time, learn_with, train};
use crate::optim::{build, some_gradients, some_params, values};
use candle_core::{DType, Device, Tensor};
use mobula_core::{
    Batch, BatchStream, BoxError, Flow, GroupOptions, Member, Placement, RunDir, Runtime, Shard,
    remote,
};
use mobula_nn::loss::cross_entropy;
use mobula_nn::models::MlpOptions;
use mobula_nn::{Init, Model, ModelSpec, Params, Pass};
use mobula_train::optim::{
    AdamW, AdamWOptions, Ema, LossScale, LossScaleOptions, PlateauOptions, Schedule, Updater,
    UpdaterOptions,
};
use mobula_train::{Error, ScalingConfig, TrainState, Trainer, WorkerContext};
use serde_json::json;
use std::collections::HashMap;

pub(crate) const TESTS: &[Test] = &[
    ("updater::a_parameter_without_gradient_is_an_error_that_names_it", no_gradient),
    ("updater::a_cycle_whose_rise_has_no_steps_begins_at_its_peak", short_cycle),
    ("updater::averages_of_a_model_with_statistics_are_whole_weights", whole_averages),
    ("updater::the_loss_scale_backs_off_and_grows", loss_scale),
    ("updater::schedules_follow_each_other", schedules),
    ("updater::accumulated_batches_are_one_batch", accumulated),
    ("updater::a_resumed_run_keeps_schedule_averages_and_plateau", resumes),
    ("updater::averages_are_what_is_evaluated", averages),
    ("updater::a_panic_in_an_evaluation_leaves_the_weights", averages_panic),
    ("updater::the_learning_rate_is_reported", reported),
    ("updater::ranks_keep_one_learning_rate", one_rate),
    ("updater::a_plateau_needs_its_metric", no_metric),
];

fn loss_scale(_: &Runtime) {
    let options = LossScaleOptions { growth_interval: 3, ..Default::default() };
    let mut scale = LossScale::new(options).expect("options");
    let history = [true, true, false, true, true, true, true].map(|finite| {
        // It is saved after every step.
        let text = serde_json::to_string(&scale).expect("json");
        scale = serde_json::from_str(&text).expect("json");
        assert_eq!(scale.update(finite), finite);
        scale.scale()
    });
    assert_eq!(history, [65536., 65536., 32768., 32768., 32768., 65536., 65536.]);
    assert_eq!(scale.good_steps(), 1);
    let huge = LossScaleOptions { init_scale: 3e38, growth_interval: 1, ..options };
    let mut huge = LossScale::new(huge).expect("options");
    assert!(huge.update(true) && huge.scale() == 3e38, "it never grows beyond what f32 holds");
}

fn schedules(_: &Runtime) {
    let linear =
        |start_factor, end_factor, steps| Schedule::Linear { start_factor, end_factor, steps };
    let three = linear(0.0, 1.0, 4).then(linear(1.0, 0.5, 2)).then(linear(0.5, 0.25, 2));
    let lrs: Vec<_> = (0..10).map(|step| three.lr(2.0, step)).collect();
    assert_eq!(lrs, [0., 0.5, 1., 1.5, 2., 1.5, 1., 0.75, 0.5, 0.5]);
    assert_eq!(three.steps(), Some(8));
    three.validate().expect("valid");
    let endless = Schedule::Constant {}.then(Schedule::cosine(5));
    assert_eq!(endless.lr(2.0, 1_000_000), 2.0);
    let error = endless.validate().expect_err("endless").to_string();
    assert!(error.contains("a schedule without an end"), "{error}");
}

fn mlp() -> Model {
    let mut options = MlpOptions::new(FEATURES, [16], CLASSES);
    options.dropout = 0.5;
    Model::build(&ModelSpec::new("mlp", &options).expect("spec"), 5, &Device::Cpu).expect("model")
}

/// 7 rows as one batch and as batches of 3, 3 and 1, dropout included.
fn accumulated(_: &Runtime) {
    let rows = |range: std::ops::Range<usize>| -> Batch {
        let mut stream = Rows::open(Shard::ALL, 7);
        let whole = stream.next_batch().expect("batch").expect("a batch");
        let part = |name| {
            let tensor = whole.get(name).expect("column").narrow(0, range.start, range.len());
            (name.to_owned(), tensor.and_then(|t| t.contiguous()).expect("rows"))
        };
        Batch::new(vec![part("x"), part("y")]).expect("batch")
    };
    let run = |batches: &[Batch]| {
        let mut context = WorkerContext::alone(|_| Ok(Flow::Continue));
        let adamw = AdamW::new(AdamWOptions { lr: 0.1, ..Default::default() }).expect("options");
        let mut state = TrainState::new(mlp(), adamw, 5, 1);
        let mut last = f64::NAN;
        for _ in 0..3 {
            last = context
                .step_accumulated(&mut state, batches, |model, pass, batch| {
                    let logits = model.forward(batch.get("x")?, pass)?;
                    cross_entropy(&logits, batch.get("y")?).map_err(BoxError::from)
                })
                .expect("step");
        }
        assert_eq!(state.step(), 3);
        (last, state.gradients().values().to_vec())
    };
    let close = |a: &(f64, Vec<f32>), b: &(f64, Vec<f32>)| {
        let far = a.1.iter().zip(&b.1).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        (a.0 - b.0).abs() < 1e-5 && far < 1e-5
    };
    let whole = run(&[rows(0..7)]);
    assert!(close(&run(&[rows(0..3), rows(3..6), rows(6..7)]), &whole));
    // The control: other rows are another step.
    assert!(!close(&run(&[rows(0..3), rows(3..6)]), &whole));
}

fn everything() -> UpdaterOptions {
    serde_json::from_value(json!({
        "optimizer": {"name": "adamw", "lr": 0.02},
        "groups": [{"max_dims": 1, "weight_decay": 0.0}],
        "schedule": {"name": "join", "boundaries": [5],
            "schedules": [{"name": "linear", "steps": 5}, {"name": "cosine", "steps": 40}]},
        "plateau": {"metric": "accuracy", "mode": "max", "patience": 0, "factor": 0.5,
            "threshold": 0.5},
        "clip": {"norm": 0.5},
        "ema": 0.9, "loss_scale": {},
    }))
    .expect("options")
}

/// 2 and 3 epochs are 5 epochs, to the bit, in all that a checkpoint has.
fn resumes(runtime: &Runtime) {
    let root = tempfile::tempdir().expect("temporary folder");
    let fit = |name: &str, epochs| {
        let run = RunDir::open_or_create(root.path(), name, 5, &()).expect("run");
        let config = Config { updater: Some(everything()), ..Config::new(epochs) };
        let trainer = Trainer::new(train::remote(config)).with_run(&run).with_logs_shown(false);
        let trainer = trainer.with_scaling(ScalingConfig::workers(2));
        let result = trainer.fit(runtime).expect("fit");
        let checkpoint = result.checkpoint.expect("checkpoint");
        let file = |name: &str| std::fs::read(checkpoint.path().join(name)).expect(name);
        let tensors = |name: &str| {
            let bytes = file(name);
            let read = safetensors::SafeTensors::deserialize(&bytes).expect(name);
            let mut tensors: Vec<_> =
                read.tensors().into_iter().map(|(k, t)| (k, t.data().to_vec())).collect();
            tensors.sort();
            tensors
        };
        let mut state: serde_json::Value =
            serde_json::from_slice(&file("state.json")).expect("state");
        let metrics = state["metrics"].as_object_mut().expect("metrics");
        metrics.retain(|name, _| !is_of_time(name));
        (tensors("optimizer.safetensors"), tensors("ema.safetensors"), state)
    };
    fit("stopped", 2);
    let (whole, resumed) = (fit("whole", 5), fit("stopped", 5));
    assert_eq!(whole.2, resumed.2);
    assert!(whole.0 == resumed.0, "moments");
    assert!(whole.1 == resumed.1, "averages");
    let saved = &whole.2["updater"];
    assert_eq!(saved["schedule"]["name"], "join");
    assert!(saved["plateau"]["scale"].as_f64().expect("scale") < 1.0, "{saved}");
}

fn averages(_: &Runtime) {
    let mut state = TrainState::new(mlp(), everything().build().expect("updater"), 5, 1);
    let mut context = WorkerContext::alone(|_| Ok(Flow::Continue));
    let mut stream = Rows::open(Shard::ALL, 16);
    let mut expected = Ema::new(0.9).expect("decay");
    while let Some(batch) = stream.next_batch().expect("batch") {
        context
            .step(&mut state, &batch, |model, pass, batch| {
                let logits = model.forward(batch.get("x")?, pass)?;
                cross_entropy(&logits, batch.get("y")?).map_err(BoxError::from)
            })
            .expect("step");
        expected.update(state.model.params()).expect("average");
    }
    let before = values(state.model.params());
    let seen = state.with_averages(|model| values(model.params())).expect("averages");
    let names = state.model.params().names();
    let expected: HashMap<_, _> = names.into_iter().zip(expected.averages().to_vec()).collect();
    assert_eq!(seen, expected);
    assert_ne!(seen, before);
    assert_eq!(values(state.model.params()), before);

    let mut without = TrainState::new(mlp(), build("sgd"), 5, 1);
    let error = without.with_averages(|_| ()).expect_err("none").to_string();
    assert_eq!(error, "no averages of the weights are kept: give the updater an `ema`");
}

fn averages_panic(_: &Runtime) {
    let (params, mut updater) =
        (some_params(), Updater::new(build("sgd")).with_ema(0.9).expect("ema"));
    for step in 0..2 {
        updater.step(&params, &mut some_gradients(&params, step)).expect("step");
    }
    let averages = |updater: &Updater| updater.ema().expect("averages").averages().to_vec();
    let before = (values(&params), averages(&updater));
    // A panic that says nothing.
    let evaluation = || updater.with_averages(&params, || std::panic::resume_unwind(Box::new(())));
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(evaluation));
    assert!(panicked.is_err());
    assert_eq!((values(&params), averages(&updater)), before);
}

fn reported(_: &Runtime) {
    let schedule = Schedule::Step { every: 6, gamma: 0.5 };
    let updater = Updater::new(build("sgd")).with_schedule(schedule).expect("schedule");
    assert_eq!(updater.lr(), 1e-3);
    let mut lrs = Vec::new();
    let mut context = WorkerContext::alone(|report: &mobula_train::EpochReport| {
        lrs.push(report.metrics["lr"]);
        Ok(Flow::Continue)
    });
    learn_with(&mut context, &Config::new(3), updater).expect("learn");
    drop(context);
    // An epoch has six steps: the last one of each is reported.
    assert_eq!(lrs, [1e-3, 5e-4, 2.5e-4]);
}

fn no_metric(_: &Runtime) {
    let options = PlateauOptions { metric: "recall".into(), ..Default::default() };
    let updater = Updater::new(build("sgd")).with_plateau(options).expect("options");
    let mut context = WorkerContext::alone(|_| Ok(Flow::Continue));
    let error = learn_with(&mut context, &Config::new(1), updater).expect_err("no recall");
    let expected = "the learning rate depends on the metric \"recall\", but the epoch reports \
        accuracy, loss, lr, samples_per_second";
    assert_eq!(error.to_string(), expected);
}

fn no_gradient(_: &Runtime) {
    let mut state = TrainState::new(mlp(), Updater::new(build("sgd")), 5, 1);
    let x = Tensor::zeros((2, 4), DType::F32, &Device::Cpu).expect("x");
    let batch = Batch::new(vec![("x".to_owned(), x)]).expect("batch");
    let mut context = WorkerContext::alone(|_| Ok(Flow::Continue));
    let first = |model: &Model, _: &Pass, _: &Batch| model.params().vars()[0].1.sum_all();
    let error = context.step(&mut state, &batch, first).expect_err("the others get none");
    let mut expected = state.model.params().names();
    expected.remove(0);
    assert!(matches!(error, Error::NoGradient { names } if names == expected));
}

fn short_cycle(_: &Runtime) {
    let schedule = json!({"name": "one_cycle", "steps": 10, "pct_start": 0.1});
    let schedule: Schedule = serde_json::from_value(schedule).expect("a schedule");
    schedule.validate().expect("valid");
    let rates: Vec<f64> = (0..10).map(|step| schedule.lr(1.0, step)).collect();
    assert_eq!(rates[0], 1.0);
    assert!(rates.windows(2).all(|pair| pair[1] < pair[0]), "{rates:?}");
}

fn whole_averages(_: &Runtime) {
    let params = Params::new(1, &Device::Cpu);
    params.get(2, "w", Init::Ones).expect("parameter");
    params.buffer(2, "running_mean", Init::Const(3.0)).expect("buffer");
    let dir = tempfile::tempdir().expect("folder");
    let path = dir.path().join("ema.safetensors");
    let ema = Ema::new(0.9).expect("decay");
    ema.save(&params, &path).expect("save");
    params.buffers()[0].1.zero_set().expect("zeros");
    params.load(&path).expect("load");
    assert_eq!(params.buffers()[0].1.to_vec1::<f32>().expect("values"), [3.0, 3.0]);
}

/// Ends two epochs with a metric that improves on rank 1 only, and gives the learning rate.
#[remote(crate = mobula_core)]
fn rate(member: Member) -> Result<f64, BoxError> {
    let rank = member.rank();
    let mut context = WorkerContext::join(member)?;
    let options = PlateauOptions { metric: "m".into(), patience: 0, ..Default::default() };
    let updater = Updater::new(build("sgd")).with_plateau(options)?;
    let mut state = TrainState::new(mlp(), updater, 5, 2);
    let stream = Rows::open(context.shard(), 16);
    for epoch in 0..2 {
        let metric = if rank == 0 { 1.0 } else { 1.0 - f64::from(epoch) / 2.0 };
        context.end_epoch(&mut state, &stream, &[("m", metric)])?;
    }
    Ok(state.updater.lr())
}

fn one_rate(runtime: &Runtime) {
    let options = GroupOptions { placement: Placement::Thread, ..GroupOptions::new("rates", 2) };
    let options = options.with_context(&crate::collectives::no_setup()).expect("context");
    let group = runtime.group(&options, &rate::remote()).expect("group");
    let rates = group.join(std::time::Duration::from_secs(60)).expect("join");
    assert_eq!(rates, [1e-4, 1e-4]);
}
