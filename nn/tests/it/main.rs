//! The crate through its public interface.

mod attention;
mod backward;
mod convolutions;
mod gradients;
mod initialisers;
mod loss_functions;
mod losses;
mod masks;
mod norms;
mod pooling;
mod recurrent;
mod registry;
mod tabular;
mod threads;
mod tokens;
mod weights;

use candle_core::{Device, Tensor};
use mobula_core::random::Stream;
use mobula_nn::{Error, Model, ModelSpec};

const CPU: Device = Device::Cpu;

/// Standard normal numbers, the same for the same purpose.
fn normal(purpose: &str, shape: &[usize]) -> Tensor {
    let mut draws = Stream::new(1, purpose).at(0, 0);
    let values: Vec<f64> = (0..shape.iter().product()).map(|_| draws.normal()).collect();
    Tensor::from_vec(values, shape, &CPU).expect("tensor")
}

/// The same in `f32`.
fn normal_f32(purpose: &str, shape: &[usize]) -> Tensor {
    normal(purpose, shape).to_dtype(candle_core::DType::F32).expect("cast")
}

fn bits(tensor: &Tensor) -> Vec<u32> {
    let values: Vec<f32> = tensor.flatten_all().expect("flat").to_vec1().expect("f32");
    values.into_iter().map(f32::to_bits).collect()
}

/// `run` gives the same on one thread and on several.
fn assert_same_in_every_pool<R: PartialEq + Send>(run: impl Fn() -> R + Send + Sync) {
    let with = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("pool");
        pool.install(&run)
    };
    let one = with(1);
    assert!([2, 3, 7].into_iter().all(|threads| with(threads) == one));
}

fn spec(json: &str) -> ModelSpec {
    serde_json::from_str(json).expect("a model description")
}

fn build(json: &str) -> Result<Model, Error> {
    Model::build(&spec(json), 7, &CPU)
}

const MLP: &str = r#"{"architecture": "mlp", "options":
    {"inputs": 6, "hidden": [5, 4], "outputs": 3, "dropout": 0.3}}"#;
const CNN: &str = r#"{"architecture": "cnn", "options":
    {"channels": 2, "height": 7, "width": 6, "conv": [3, 4], "hidden": 5, "outputs": 3, "dropout": 0.3}}"#;
const TRANSFORMER: &str = r#"{"architecture": "transformer", "options":
    {"length": 5, "inputs": 3, "features": 8, "heads": 2, "layers": 2, "hidden": 6, "outputs": 3,
     "dropout": 0.2, "causal": true}}"#;
const ROTARY: &str = r#"{"architecture": "transformer", "options":
    {"length": 4, "inputs": 2, "features": 4, "heads": 1, "layers": 1, "outputs": 3,
     "positions": "rotary", "pooling": "each"}}"#;
const LSTM: &str = r#"{"architecture": "lstm", "options": {"inputs": 3, "length": 4, "hidden": 5,
    "layers": 2, "outputs": 3, "bidirectional": true, "dropout": 0.3}}"#;
const GRU: &str = r#"{"architecture": "lstm", "options":
    {"inputs": 3, "length": 4, "hidden": 5, "outputs": 3, "cell": "gru"}}"#;
const RESNET: &str = r#"{"architecture": "resnet", "options":
    {"channels": 2, "height": 6, "width": 5, "base": 3, "blocks": [1, 1], "outputs": 3}}"#;
/// Every built-in architecture, and an input of it.
const MODELS: [(&str, &[usize]); 7] = [
    (MLP, &[3, 6]),
    (CNN, &[2, 2, 7, 6]),
    (TRANSFORMER, &[2, 5, 3]),
    (ROTARY, &[2, 4, 2]),
    (RESNET, &[3, 2, 6, 5]),
    (LSTM, &[2, 4, 3]),
    (GRU, &[2, 4, 3]),
];
