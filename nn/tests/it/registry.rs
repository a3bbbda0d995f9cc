//! Descriptions, options and shapes: what builds, and what is refused with which words.

use crate::{CNN, CPU, GRU, LSTM, MLP, build, normal_f32};
use candle_core::{DType, Tensor};
use mobula_nn::models::{CnnOptions, MlpOptions};
use mobula_nn::{Model, ModelSpec, Pass, Registry};

fn refusal(json: &str) -> String {
    build(json).map(drop).expect_err("refused").to_string()
}

#[test]
fn an_unknown_architecture_lists_the_known_ones() {
    let text = refusal(r#"{"architecture": "mpl"}"#);
    assert!(text.contains("no architecture \"mpl\"; known: cnn, lstm, mlp"), "{text}");
    let more = Registry::builtin().with::<MlpOptions>("twin");
    assert_eq!(more.names(), ["cnn", "lstm", "mlp", "resnet", "tabular", "transformer", "twin"]);
}

#[test]
fn bad_options_are_named() {
    let cases = [
        (r#"{"inputs": 4, "outputs": 2, "hiden": [3]}"#, "unknown field `hiden`"),
        (r#"{"inputs": 4}"#, "missing field `outputs`"),
        (r#"{"inputs": -4, "outputs": 2}"#, "invalid value"),
        (r#"{"inputs": 0, "outputs": 2}"#, "option inputs is 0, expected at least 1"),
        (r#"{"inputs": 4, "outputs": 2, "hidden": [3, 0]}"#, "option hidden is 0"),
        (r#"{"inputs": 4, "outputs": 2, "hidden": [3], "dropout": 1.0}"#, "option dropout is 1"),
        (r#"{"inputs": 4, "outputs": 2, "activation": "rlu"}"#, "unknown variant `rlu`"),
    ];
    for (options, expected) in cases {
        let text = refusal(&format!(r#"{{"architecture": "mlp", "options": {options}}}"#));
        assert!(text.contains(expected), "{text}");
    }
}

#[test]
fn an_image_too_small_for_its_poolings_is_refused() {
    let text = refusal(r#"{"architecture": "cnn", "options": {"height": 4, "conv": [8, 8, 8]}}"#);
    assert!(text.contains("4×28 pixels") && text.contains("2×2 pooling"), "{text}");
    let even = refusal(r#"{"architecture": "cnn", "options": {"kernel": 4}}"#);
    assert!(even.contains("option kernel is 4, expected an odd number"), "{even}");
    assert!(refusal(r#"{"architecture": "cnn", "options": {"conv": [8, 0]}}"#).contains("[8, 0]"));
}

#[test]
fn a_description_reads_from_toml() {
    let text = "architecture = \"mlp\"\n[options]\ninputs = 64\nhidden = [32]\noutputs = 10\ndropout = 0.5\n";
    let spec: ModelSpec = toml::from_str(text).expect("toml");
    let options = MlpOptions { dropout: 0.5, ..MlpOptions::new(64, [32], 10) };
    assert!(Model::build(&spec, 1, &CPU).is_ok());
    let same = ModelSpec::new("mlp", &options).expect("spec");
    assert_eq!(spec.options["inputs"], same.options["inputs"]);
    assert!(toml::from_str::<ModelSpec>("architecture = \"mlp\"\n[params]\ninputs = 64").is_err());
}

#[test]
fn a_description_survives_json() {
    let spec = ModelSpec::new("cnn", &CnnOptions::default()).expect("spec");
    let text = serde_json::to_string(&spec).expect("json");
    assert_eq!(serde_json::from_str::<ModelSpec>(&text).expect("spec"), spec);
    assert!(ModelSpec::new("cnn", &3).is_err());
}

#[test]
fn the_default_cnn_is_for_fashion_mnist() {
    let spec = ModelSpec::new("cnn", &CnnOptions::default()).expect("spec");
    let model = Model::build(&spec, 1, &CPU).expect("model");
    assert_eq!(model.input_shape(), [1, 28, 28]);
    assert_eq!(model.output_shape(), [10]);
    let names = ["conv1.bias", "conv1.weight", "conv2.bias", "conv2.weight"];
    assert_eq!(model.params().names()[..4], names);
    assert_eq!(model.params().num_elements(), 320 + 18_496 + 401_536 + 1_290);
}

#[test]
fn recurrent_models_have_pytorchs_parameters() {
    let lstm = build(crate::LSTM).expect("model");
    assert_eq!(lstm.input_shape(), [4, 3]);
    let names = lstm.params().names();
    assert_eq!(names.len(), 16 + 2);
    assert!(names.contains(&"rnn.weight_hh_l1_reverse".to_owned()), "{names:?}");
    let gru = build(crate::GRU).expect("model");
    assert_eq!(gru.params().num_elements(), 15 * (3 + 5 + 2) + 3 * 5 + 3);
    let text = refusal(
        r#"{"architecture": "lstm", "options":
        {"inputs": 3, "length": 0, "hidden": 5, "outputs": 3}}"#,
    );
    assert!(text.contains("option length is 0"), "{text}");
}

#[test]
fn rows_are_taken_flat_or_shaped_and_refused_otherwise() {
    let model =
        build(r#"{"architecture": "cnn", "options": {"conv": [4], "hidden": 8}}"#).expect("model");
    let x = normal_f32("images", &[2, 1, 28, 28]);
    let y = model.forward(&x, &Pass::eval()).expect("forward");
    assert_eq!(y.dims(), [2, 10]);
    for shape in [[2, 784].as_slice(), &[2, 28, 28], &[2, 28, 28, 1]] {
        let same = model.forward(&x.reshape(shape).expect("reshape"), &Pass::eval());
        assert_eq!(crate::bits(&same.expect("forward")), crate::bits(&y));
    }
    for shape in [[8, 196].as_slice(), &[2, 14, 56], &[1568]] {
        let refused = model.forward(&x.reshape(shape).expect("reshape"), &Pass::eval());
        let text = refused.expect_err("refused").to_string();
        assert!(text.contains("\"cnn\" model must have shape [rows, 1, 28, 28], got"), "{text}");
    }
}

#[test]
fn channels_in_another_place_are_not_guessed_at() {
    let model = build(CNN).expect("model");
    let last = normal_f32("images", &[2, 7, 6, 2]);
    assert!(model.forward(&last, &Pass::eval()).is_err());
}

/// The last step of an epoch may leave a worker without rows. Candle then skips some parameters
/// in the backward pass; what it does not skip must be 0.
#[test]
fn no_rows_go_through_a_model() {
    for (json, shape) in
        [(MLP, [0, 6].as_slice()), (CNN, &[0, 2, 7, 6]), (LSTM, &[0, 4, 3]), (GRU, &[0, 4, 3])]
    {
        let model = build(json).expect("model");
        let x = Tensor::zeros(shape, DType::F32, &CPU).expect("tensor");
        let y = model.forward(&x, &Pass::train(1, 1)).expect("forward");
        assert_eq!(y.dims(), [0, 3]);
        let none = Tensor::zeros(0, DType::U32, &CPU).expect("labels");
        let loss = mobula_nn::loss::cross_entropy_sum(&y, &none).expect("loss");
        let gradients = loss.backward().expect("backward");
        for (name, var) in model.params().vars() {
            let Some(gradient) = gradients.get(&var) else {
                continue;
            };
            let values = gradient.flatten_all().and_then(|g| g.to_vec1::<f32>()).expect("values");
            assert!(values.iter().all(|v| *v == 0.0), "{name}: {values:?}");
        }
    }
}
