//! The crate through its public interface.

mod backward;
mod gradients;
mod initialisers;
mod losses;
mod masks;
mod norms;
mod recurrent;
mod registry;
mod threads;
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
const LSTM: &str = r#"{"architecture": "lstm", "options": {"inputs": 3, "length": 4, "hidden": 5,
    "layers": 2, "outputs": 3, "bidirectional": true, "dropout": 0.3}}"#;
const GRU: &str = r#"{"architecture": "lstm", "options":
    {"inputs": 3, "length": 4, "hidden": 5, "outputs": 3, "cell": "gru"}}"#;
