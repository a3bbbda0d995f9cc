//! Scaled losses: steps that overflow are left out on all ranks alike, and nothing else changes.

use crate::Test;
use crate::digits::{CLASSES, Config, FEATURES, Harm, Outcome, Rows, half, learn, train};
use candle_core::Device;
use mobula_core::{BatchStream, BoxError, Flow, RunDir, Runtime, Shard};
use mobula_nn::{Model, ModelSpec, loss::cross_entropy, models::MlpOptions};
use mobula_train::optim::{Clip, LossScaleOptions, Updater, UpdaterOptions};
use mobula_train::{
    AdamW, AdamWOptions, SavedState, ScalingConfig, TrainState, Trainer, TrainingResult,
    WorkerContext,
};

pub(crate) const TESTS: &[Test] = &[
    ("loss_scale::steps_that_overflow_are_left_out", overflows),
    ("loss_scale::a_power_of_two_changes_no_bit", exact),
    ("loss_scale::all_ranks_leave_out_the_same_steps", ranks_agree),
    ("loss_scale::a_resumed_run_goes_on_with_its_scale", resumes),
    ("loss_scale::a_scale_at_its_minimum_is_an_error", minimum),
    ("loss_scale::a_loss_that_is_no_number_stays_an_error", nan),
];

/// Too much for `f16`, whose largest number is 65504: most gradients of logits times this.
const HUGE: f32 = 16_777_216.0;

fn scaled(init_scale: f32) -> LossScaleOptions {
    LossScaleOptions { init_scale, growth_interval: 5, ..Default::default() }
}

fn config(epochs: u64, options: LossScaleOptions) -> Config {
    let updater = UpdaterOptions { loss_scale: Some(options), ..Default::default() };
    Config { updater: Some(updater), harm: Harm::Half, ..Config::new(epochs) }
}

/// On two ranks, of which one overflows; both end with the same weights.
fn fit(runtime: &Runtime, config: Config, run: &RunDir) -> TrainingResult<Outcome> {
    let trainer = Trainer::new(train::remote(config)).with_logs_shown(false).with_run(run);
    let fit = trainer.with_scaling(ScalingConfig::workers(2)).fit(runtime).expect("fit");
    assert_eq!(fit.values[0].weights, fit.values[1].weights);
    fit
}

fn weights(model: &Model) -> Vec<f32> {
    let vars = model.params().vars().into_iter();
    vars.flat_map(|(_, var)| var.flatten_all().and_then(|t| t.to_vec1()).expect("f32")).collect()
}

fn state(options: LossScaleOptions) -> TrainState {
    let mlp = ModelSpec::new("mlp", &MlpOptions::new(FEATURES, [16], CLASSES)).expect("spec");
    let model = Model::build(&mlp, 5, &Device::Cpu).expect("model");
    let updater = Updater::new(AdamW::new(AdamWOptions::default()).expect("options"));
    TrainState::new(model, updater.with_loss_scale(options).expect("options"), 5, 1)
}

fn overflows(_: &Runtime) {
    let mut reported = (f64::NAN, f64::NAN);
    let mut context = WorkerContext::alone(|report| {
        reported = (report.metrics["loss_scale"], report.metrics["skipped_steps"]);
        Ok(Flow::Continue)
    });
    let (mut state, mut stream) = (state(scaled(HUGE)), Rows::open(Shard::ALL, 8));
    let mut taken = 0;
    while let Some(batch) = stream.next_batch().expect("batch") {
        let before = (weights(&state.model), state.updater.loss_scale().cloned().expect("scale"));
        let loss = context.step(&mut state, &batch, |model, pass, batch| -> Result<_, BoxError> {
            let logits = half(&model.forward(batch.get("x")?, pass)?)?;
            Ok(cross_entropy(&logits, batch.get("y")?)?)
        });
        let loss = loss.expect("a step left out is no error");
        assert!((0.1..3.0).contains(&loss), "the loss is told without its scale: {loss}");
        let after = state.updater.loss_scale().cloned().expect("scale");
        let is_skipped = after.skipped_steps() > before.1.skipped_steps();
        assert_eq!(is_skipped, weights(&state.model) == before.0);
        assert_eq!(is_skipped, after.scale() == before.1.scale() / 2.0);
        taken += u64::from(!is_skipped);
    }
    assert_eq!(state.step(), 12, "a step that is left out has had its batch");
    assert_eq!(state.updater.state().expect("state").expect("steps").step, taken, "but no update");
    let scale = state.updater.loss_scale().cloned().expect("scale");
    assert!(taken > 4 && scale.skipped_steps() > 3 && scale.skipped_steps() + taken == 12);
    context.end_epoch(&mut state, &stream, &[]).expect("end");
    drop(context);
    assert_eq!(reported, (scale.scale().into(), scale.skipped_steps() as f64));
}

/// Without overflow the gradients, the clipping included, are those of the loss itself.
fn exact(_: &Runtime) {
    let run = |loss_scale| {
        let clip = Some(Clip::Norm(0.1));
        let updater = Some(UpdaterOptions { loss_scale, clip, ..Default::default() });
        let mut context = WorkerContext::alone(|_| Ok(Flow::Continue));
        learn(&mut context, &Config { updater, ..Config::new(2) }).expect("learn").weights
    };
    assert_eq!(run(Some(scaled(1024.0))), run(None));
    // The control: another scale rounds.
    assert_ne!(run(Some(scaled(1000.0))), run(None));
}

fn ranks_agree(runtime: &Runtime) {
    let root = tempfile::tempdir().expect("temporary folder");
    let run = RunDir::create(root.path(), "scaled", 5, &()).expect("run");
    let scaled = fit(runtime, config(3, scaled(HUGE)), &run);
    assert!(scaled.metrics["skipped_steps"] >= 3.0, "{:?}", scaled.metrics);
    assert!(scaled.metrics["accuracy"] > 0.5, "it learns: {:?}", scaled.metrics);
}

/// With skipped steps and growth before and after the interruption.
fn resumes(runtime: &Runtime) {
    let root = tempfile::tempdir().expect("temporary folder");
    let fit = |name: &str, epochs| {
        let run = RunDir::open_or_create(root.path(), name, 5, &()).expect("run");
        let fit = fit(runtime, config(epochs, scaled(HUGE)), &run);
        let checkpoint = fit.checkpoint.as_ref().expect("checkpoint");
        let saved: SavedState = checkpoint.json("state.json").expect("state");
        (fit.values[0].weights.clone(), saved.updater.loss_scale.expect("scale"))
    };
    let whole = fit("whole", 4);
    let half = fit("parts", 2);
    assert!(half.1.skipped_steps() > 0 && half.1.skipped_steps() < whole.1.skipped_steps());
    assert_eq!(fit("parts", 4), whole);
}

fn minimum(_: &Runtime) {
    let options = LossScaleOptions { min_scale: HUGE / 4.0, ..scaled(HUGE) };
    let mut context = WorkerContext::alone(|_| Ok(Flow::Continue));
    let error = learn(&mut context, &config(1, options)).expect_err("overflows at once");
    let text = error.to_string();
    let expected = "at step 2 is not finite although the loss scale is at its minimum, 4194304";
    assert!(text.contains(expected) && text.contains("lower `min_scale`"), "{text}");
    let below = LossScaleOptions { min_scale: 8.0, ..scaled(4.0) };
    let error = UpdaterOptions { loss_scale: Some(below), ..Default::default() };
    let error = error.build().expect_err("below").to_string();
    assert_eq!(error, "option init_scale is 4, expected finite, `min_scale` or above");
}

/// No scale mends it.
fn nan(_: &Runtime) {
    let harm = Harm::NanLoss { at_step: 4 };
    let config = Config { harm, ..config(1, scaled(1024.0)) };
    let mut context = WorkerContext::alone(|_| Ok(Flow::Continue));
    let error = learn(&mut context, &config).expect_err("NaN").to_string();
    assert!(error.starts_with("the loss at step 4 is NaN"), "{error}");
}
