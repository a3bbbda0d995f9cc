//! Steps whose products are of `bf16`, on weights of `f32`.

use crate::Test;
use crate::digits::{Config, Outcome, Rows, learn, train};
use candle_core::{Device, Tensor};
use mobula_core::{Batch, BatchStream, BoxError, Flow, RunDir, Runtime, Shard};
use mobula_nn::{Model, ModelSpec, Pass, Precision, loss::cross_entropy};
use mobula_train::{AdamW, AdamWOptions, ScalingConfig, TrainState, Trainer, WorkerContext};

pub(crate) const TESTS: &[Test] = &[
    ("precision::steps_make_passes_with_it", passes),
    ("precision::it_learns_as_well", learns),
    ("precision::every_architecture_learns", architectures),
    ("precision::a_resumed_run_is_exact", resumes),
];

fn config(epochs: u64, precision: Precision) -> Config {
    Config { precision, ..Config::new(epochs) }
}

fn alone(config: &Config) -> Outcome {
    learn(&mut WorkerContext::alone(|_| Ok(Flow::Continue)), config).expect("learn")
}

fn state(spec: &str, precision: Precision) -> TrainState {
    let spec: ModelSpec = serde_json::from_str(spec).expect("a spec");
    let model = Model::build(&spec, 5, &Device::Cpu).expect("model");
    let optimizer = AdamW::new(AdamWOptions { lr: 0.01, ..Default::default() }).expect("options");
    TrainState::new(model, optimizer, 5, 1).with_precision(precision)
}

fn passes(_: &Runtime) {
    let mlp = r#"{"architecture": "mlp", "options": {"inputs": 8, "hidden": [], "outputs": 3}}"#;
    let mut context = WorkerContext::alone(|_| Ok(Flow::Continue));
    for precision in [Precision::F32, Precision::Bf16] {
        let (mut state, mut seen) = (state(mlp, precision), Vec::new());
        let batch = Rows::open(Shard::ALL, 8).next_batch().expect("batch").expect("rows");
        let mut loss = |model: &Model, pass: &Pass, batch: &Batch| -> Result<Tensor, BoxError> {
            seen.push(pass.precision());
            Ok(cross_entropy(&model.forward(batch.get("x")?, pass)?, batch.get("y")?)?)
        };
        let step = context.step(&mut state, &batch, &mut loss);
        step.expect("step");
        context.step_accumulated(&mut state, &[batch.clone(), batch], loss).expect("step");
        assert_eq!((seen, state.precision()), (vec![precision; 3], precision));
    }
}

fn learns(_: &Runtime) {
    let [exact, rounded] = [Precision::F32, Precision::Bf16].map(|p| alone(&config(6, p)));
    assert!(
        exact.accuracy > 0.9 && rounded.accuracy > 0.9,
        "{} {}",
        exact.accuracy,
        rounded.accuracy
    );
    let off = exact.weights.iter().zip(&rounded.weights).map(|(a, b)| (a - b).abs());
    let off = off.fold(0.0, f32::max);
    assert!(off < 0.2, "{off}");
    // The control: where there are such products, they were taken.
    assert_eq!(off > 0.0, has_bf16());
}

fn has_bf16() -> bool {
    #[cfg(target_arch = "x86_64")]
    return is_x86_feature_detected!("avx512bf16")
        && is_x86_feature_detected!("avx512bw")
        && std::env::var_os("MOBULA_AVX512").is_none_or(|wanted| wanted != "0");
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// One batch, by heart: the loss falls as far as it does in `f32`.
fn architectures(_: &Runtime) {
    let cases: [(&str, &[usize]); 4] = [
        (
            r#"{"architecture": "cnn", "options": {"channels": 1, "height": 8, "width": 8,
                "conv": [16, 16], "hidden": 16, "outputs": 3, "dropout": 0.0}}"#,
            &[24, 1, 8, 8],
        ),
        (
            r#"{"architecture": "resnet", "options": {"channels": 1, "height": 8, "width": 8,
                "base": 16, "blocks": [1, 1], "outputs": 3}}"#,
            &[24, 1, 8, 8],
        ),
        (
            r#"{"architecture": "lstm", "options": {"inputs": 4, "length": 6, "hidden": 16,
                "outputs": 3}}"#,
            &[24, 6, 4],
        ),
        (
            r#"{"architecture": "transformer", "options": {"length": 6, "inputs": 4,
                "features": 16, "heads": 2, "layers": 1, "outputs": 3}}"#,
            &[24, 6, 4],
        ),
    ];
    for (spec, shape) in cases {
        let last =
            [Precision::F32, Precision::Bf16].map(|precision| by_heart(spec, shape, precision));
        assert!(last.iter().all(|loss| *loss < 0.4), "{spec}: {last:?}");
    }
}

fn by_heart(spec: &str, shape: &[usize], precision: Precision) -> f64 {
    let mut draws = mobula_core::random::Stream::new(1, "by heart").at(0, 0);
    let x = (0..shape.iter().product()).map(|_| draws.normal() as f32).collect();
    let x = Tensor::from_vec::<_, f32>(x, shape, &Device::Cpu).expect("x");
    let y: Vec<u32> = (0..shape[0] as u32).map(|row| row % 3).collect();
    let y = Tensor::new(y, &Device::Cpu).expect("y");
    let batch = Batch::new(vec![("x".into(), x), ("y".into(), y)]).expect("batch");
    let (mut context, mut state) =
        (WorkerContext::alone(|_| Ok(Flow::Continue)), state(spec, precision));
    let mut step = || {
        context.step(&mut state, &batch, |model, pass, batch| -> Result<_, BoxError> {
            Ok(cross_entropy(&model.forward(batch.get("x")?, pass)?, batch.get("y")?)?)
        })
    };
    (0..40).map(|_| step().expect("step")).last().expect("steps")
}

/// On two ranks, after a checkpoint, to the bit.
fn resumes(runtime: &Runtime) {
    let root = tempfile::tempdir().expect("temporary folder");
    let fit = |name: &str, epochs| {
        let run = RunDir::open_or_create(root.path(), name, 5, &()).expect("run");
        let trainer = Trainer::new(train::remote(config(epochs, Precision::Bf16))).with_run(&run);
        let trainer = trainer.with_scaling(ScalingConfig::workers(2)).with_logs_shown(false);
        let fit = trainer.fit(runtime).expect("fit");
        (fit.values[0].weights.clone(), fit.values[0].began_at)
    };
    let (whole, _) = fit("whole", 4);
    fit("parts", 2);
    let (resumed, began_at) = fit("parts", 4);
    assert!(began_at > 0 && resumed == whole);
}
