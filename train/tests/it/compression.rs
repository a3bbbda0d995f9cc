//! Gradients that are rounded to `bf16` on their way between hosts.

use crate::Test;
use crate::digits::{Config, Outcome, train};
use candle_core::{Device, Tensor};
use mobula_core::random::Stream;
use mobula_core::{Batch, BoxError, GroupOptions, Member, Placement, Resources, Runtime, remote};
use mobula_nn::{Model, ModelSpec, loss::LossSum, models::MlpOptions};
use mobula_train::{
    AdamW, AdamWOptions, Compression, ScalingConfig, TrainState, Trainer, TrainingResult,
    Transport, WorkerContext,
};
use serde::{Deserialize, Serialize};
use std::time::Duration;

const LONG: Duration = Duration::from_secs(60);
/// Tokens of a rank: more than eight bits can tell apart.
const TOKENS: f64 = 1001.0;

pub(crate) const TESTS: &[Test] = &[
    ("compression::sums_are_as_exact_as_promised", errors),
    ("compression::all_ranks_get_the_same_bits", same_bits),
    ("compression::what_is_no_number_stays_so_on_all_ranks", no_numbers),
    ("compression::training_comes_as_far", training),
    ("compression::on_one_host_nothing_is_rounded", one_host),
    ("compression::not_with_virtual_shards", refused),
];

/// What a rank has after a step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Sums {
    /// By their bits: NaN is as good as any.
    gradients: Vec<u32>,
    loss: u32,
    weight: f32,
}

/// The gradient of a rank: mostly small, some large.
fn gradient(rank: usize, len: usize) -> Vec<f32> {
    let mut draws = Stream::new(7, "gradients").at(len as u64, rank as u32);
    (0..len).map(|_| (draws.normal() * (4.0 * draws.normal()).exp2()) as f32).collect()
}

/// One step of a linear model for each length: the gradient of its weights is the rank's input.
#[remote(crate = mobula_core)]
fn step(member: Member, lengths: Vec<usize>, first: Option<f32>) -> Result<Vec<Sums>, BoxError> {
    let rank = member.rank();
    let mut context = WorkerContext::join(member)?;
    let sums = lengths.into_iter().map(|len| {
        let spec = ModelSpec::new("mlp", &MlpOptions::new(len, [], 1))?;
        let model = Model::build(&spec, 3, &Device::Cpu)?;
        let mut state = TrainState::new(model, AdamW::new(AdamWOptions::default())?, 1, 1);
        let mut input = gradient(rank, len);
        if let (Some(first), 1) = (first, rank) {
            input[0] = first;
        }
        let x = Tensor::from_vec(input, (1, len), &Device::Cpu)?;
        let batch = Batch::new(vec![("x".into(), x)])?.with_global_rows(1);
        let _ = context.step(&mut state, &batch, |model, pass, batch| {
            let sum = model.forward(batch.get("x")?, pass)?.sum_all()?;
            Ok::<_, BoxError>(LossSum { sum, weight: TOKENS })
        });
        let gradients = state.gradients();
        // The bias comes first, by name.
        let bits = gradients.values()[1..].iter().map(|value| value.to_bits()).collect();
        let (loss, weight) = (gradients.loss().to_bits(), gradients.weight());
        Ok(Sums { gradients: bits, loss, weight })
    });
    sums.collect()
}

fn steps(
    runtime: &Runtime,
    hosts: &[u64],
    compression: Compression,
    lengths: &[usize],
    first: Option<f32>,
) -> Vec<Vec<Sums>> {
    let mut setup = crate::collectives::no_setup();
    setup["hosts"] = serde_json::to_value(hosts).expect("JSON");
    setup["compression"] = serde_json::to_value(compression).expect("JSON");
    let options = GroupOptions {
        placement: Placement::Thread,
        resources: Resources::cpus(0.5),
        ..GroupOptions::new("compressed", hosts.len())
    };
    let options = options.with_context(&setup).expect("context");
    let group = runtime.group(&options, &step::remote(lengths.to_vec(), first)).expect("group");
    group.join(LONG).expect("join")
}

/// Around a ring, and halved and doubled. Compared with sums in `f64`.
fn errors(runtime: &Runtime) {
    for world in [2usize, 3, 4, 8] {
        let hosts: Vec<u64> = (0..world as u64).collect();
        let lengths = [1, 1000, (1 << 17) * world + 1];
        let [rounded, exact] = [Compression::Bf16, Compression::None]
            .map(|compression| steps(runtime, &hosts, compression, &lengths, None).swap_remove(0));
        for ((len, rounded), exact) in lengths.into_iter().zip(rounded).zip(exact) {
            let given: Vec<_> = (0..world).map(|rank| gradient(rank, len)).collect();
            let mut differ = 0;
            for at in 0..len {
                let values = given.iter().map(|values| f64::from(values[at]));
                let (sum, size) = (values.clone().sum::<f64>(), values.map(f64::abs).sum::<f64>());
                let [got, plain] =
                    [&rounded, &exact].map(|sums| f32::from_bits(sums.gradients[at]));
                // Each of `world` roundings is off by 2⁻⁸ of what was added up by then.
                let bound = size * ((1.0 + 0.5f64.powi(8)).powi(world as i32) - 1.0);
                // The gradient of a mean over all tokens.
                let error = (f64::from(got) * TOKENS * world as f64 - sum).abs();
                let bound = bound + size * 1e-6;
                assert!(error <= bound, "{world} {len}: {got} for {sum}, off by more than {bound}");
                differ += usize::from(got != plain);
            }
            // The control: they are rounded.
            assert!(differ * 10 > len * 8, "{differ} of {len}");
            // Loss and weight are not.
            assert_eq!((rounded.weight, rounded.loss), (exact.weight, exact.loss));
            assert_eq!(rounded.weight, (TOKENS * world as f64) as f32);
        }
    }
}

fn same_bits(runtime: &Runtime) {
    let mut draws = Stream::new(3, "lengths").at(0, 0);
    let layouts: [&[u64]; 6] = [
        &[0, 1],
        &[0, 0, 1],
        &[1, 0, 1, 0],
        &[0, 1, 2],
        &[0, 1, 2, 3, 4],
        &[0, 0, 1, 2, 2, 1, 3, 3],
    ];
    for hosts in layouts {
        let mut lengths: Vec<usize> = (0..12).map(|_| 1 + draws.word() as usize % 3000).collect();
        lengths.push((1 << 17) * hosts.len() + draws.word() as usize % 1000);
        let ranks = steps(runtime, hosts, Compression::Bf16, &lengths, None);
        assert!(ranks.iter().all(|rank| *rank == ranks[0]), "{hosts:?} {lengths:?}");
        let again = steps(runtime, hosts, Compression::Bf16, &lengths, None);
        assert_eq!(again[0], ranks[0], "runs differ");
    }
}

fn no_numbers(runtime: &Runtime) {
    // The largest that rounds to infinity, too.
    for value in [f32::NAN, -f32::NAN, f32::INFINITY, f32::MAX] {
        for hosts in [&[0, 1][..], &[0, 1, 2], &[0, 0, 1, 2]] {
            let ranks = steps(runtime, hosts, Compression::Bf16, &[3, 1 << 19], Some(value));
            for (sums, first) in ranks.iter().flat_map(|rank| rank.iter().zip(&ranks[0])) {
                assert_eq!(sums.gradients, first.gradients, "{value} {hosts:?}");
                assert_eq!(f32::from_bits(sums.gradients[0]).is_nan(), value.is_nan());
                assert!(!f32::from_bits(sums.gradients[0]).is_finite());
            }
        }
    }
}

fn fit(
    runtime: &Runtime,
    transport: Transport,
    compression: Compression,
) -> TrainingResult<Outcome> {
    let scaling = ScalingConfig { transport, compression, ..ScalingConfig::workers(3) };
    let trainer = Trainer::new(train::remote(Config::new(6))).with_logs_shown(false);
    let fit = trainer.with_scaling(scaling).fit(runtime).expect("fit");
    assert!(fit.values.iter().all(|rank| rank.weights == fit.values[0].weights));
    fit
}

fn training(runtime: &Runtime) {
    let [plain, rounded] = [Compression::None, Compression::Bf16]
        .map(|compression| fit(runtime, Transport::Tcp, compression));
    assert_ne!(plain.values[0].weights, rounded.values[0].weights);
    let [plain, rounded] =
        [plain, rounded].map(|fit| (fit.values[0].accuracy, fit.metrics["loss"]));
    assert!(plain.0 > 0.95 && rounded.0 > 0.95, "{plain:?} {rounded:?}");
    assert!((plain.1 - rounded.1).abs() < 0.02 * plain.1, "{plain:?} {rounded:?}");
}

fn one_host(runtime: &Runtime) {
    let [plain, rounded] = [Compression::None, Compression::Bf16]
        .map(|compression| fit(runtime, Transport::Auto, compression));
    assert_eq!(plain.values[0].weights, rounded.values[0].weights);
}

fn refused(runtime: &Runtime) {
    let compression = Compression::Bf16;
    let scaling =
        ScalingConfig { virtual_shards: Some(4), compression, ..ScalingConfig::workers(2) };
    let trainer = Trainer::new(train::remote(Config::new(1))).with_scaling(scaling);
    let error = trainer.fit(runtime).expect_err("bits would differ").to_string();
    let expected = "option compression is Bf16, expected None where there are virtual shards: \
                    roundings depend on the machines";
    assert_eq!(error, expected);
}
