//! The architectures that are compared.

use crate::Result;
use candle_core::{Device, Tensor};
use mobula_core::random::Stream;

/// An architecture with options of three classes.
pub(super) struct Sample {
    pub(super) name: &'static str,
    pub(super) options: &'static str,
    /// Of an input.
    pub(super) shape: &'static [usize],
    /// How many numbers at the end of a row are ids of three things.
    pub(super) ids: usize,
}

impl Sample {
    /// An input: standard normal numbers, then ids.
    pub(super) fn input(&self) -> Result<Tensor> {
        let width = self.shape[self.shape.len() - 1];
        let mut draws = Stream::new(1, "agreement").at(0, 0);
        let number = |at: usize| match at % width < width - self.ids {
            true => draws.normal(),
            false => draws.below(3) as f64,
        };
        let values: Vec<f64> = (0..self.shape.iter().product()).map(number).collect();
        Ok(Tensor::from_vec(values, self.shape, &Device::Cpu)?)
    }
}

/// Every architecture, in the order of their names, some with several options.
pub(super) const MODELS: &[Sample] = &[
    Sample {
        name: "cnn",
        options: r#"{"channels": 2, "height": 7, "width": 6, "conv": [3, 4], "hidden": 5,
            "outputs": 3, "dropout": 0.3}"#,
        shape: &[4, 2, 7, 6],
        ids: 0,
    },
    Sample {
        name: "lstm",
        options: r#"{"inputs": 3, "length": 4, "hidden": 5, "layers": 2, "outputs": 3,
            "bidirectional": true, "dropout": 0.3}"#,
        shape: &[4, 4, 3],
        ids: 0,
    },
    Sample {
        name: "lstm",
        options: r#"{"inputs": 3, "length": 4, "hidden": 5, "outputs": 3, "cell": "gru"}"#,
        shape: &[4, 4, 3],
        ids: 0,
    },
    Sample {
        name: "mlp",
        options: r#"{"inputs": 6, "hidden": [5, 4], "outputs": 3, "dropout": 0.3}"#,
        shape: &[4, 6],
        ids: 0,
    },
    Sample {
        name: "resnet",
        options: r#"{"channels": 2, "height": 6, "width": 5, "base": 3, "blocks": [1, 1],
            "outputs": 3}"#,
        shape: &[4, 2, 6, 5],
        ids: 0,
    },
    Sample {
        name: "resnet",
        options: r#"{"channels": 2, "height": 33, "width": 32, "base": 2, "blocks": [1, 1],
            "outputs": 3, "large_images": true}"#,
        shape: &[3, 2, 33, 32],
        ids: 0,
    },
    Sample {
        name: "tabular",
        options: r#"{"numeric": 2, "categories": [3, 4], "outputs": 3, "embedding": 2, "width": 8,
            "blocks": 1, "residual_dropout": 0.1}"#,
        shape: &[4, 4],
        ids: 2,
    },
    Sample {
        name: "tabular",
        options: r#"{"numeric": 6, "outputs": 3, "width": 8, "hidden": 10}"#,
        shape: &[4, 6],
        ids: 0,
    },
    Sample {
        name: "transformer",
        options: r#"{"length": 5, "inputs": 3, "features": 8, "heads": 2, "layers": 2,
            "hidden": 6, "outputs": 3, "dropout": 0.2, "attention_dropout": 0.2, "causal": true}"#,
        shape: &[4, 5, 3],
        ids: 0,
    },
    Sample {
        name: "transformer",
        options: r#"{"length": 5, "vocabulary": 3, "features": 8, "heads": 2, "layers": 1,
            "outputs": 3, "tied": true, "causal": true, "pooling": "each", "positions": "rotary"}"#,
        shape: &[4, 5],
        ids: 5,
    },
    Sample {
        name: "transformer",
        options: r#"{"length": 5, "vocabulary": 4, "features": 8, "heads": 2, "layers": 1,
            "outputs": 3, "positions": "none"}"#,
        shape: &[4, 5],
        ids: 5,
    },
];
