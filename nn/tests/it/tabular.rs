//! The residual network for tables.

use crate::{CPU, build, normal, spec};
use candle_core::{DType, Tensor};
use mobula_core::random::Stream;
use mobula_nn::models::{Tabular, TabularOptions};
use mobula_nn::{Model, ModelSpec, Module, Params, Pass, Registry, gradcheck, loss};

const SMALL: &str = r#"{"architecture": "tabular", "options":
    {"numeric": 2, "categories": [3, 2], "outputs": 3, "embedding": 2, "width": 5, "blocks": 2,
     "hidden": 4, "dropout": 0.2, "residual_dropout": 0.1}}"#;

/// Two numbers, a category of three and one of two.
fn rows(count: usize, dtype: DType) -> Tensor {
    let numbers = normal("numbers", &[count, 2]);
    let ids = (0..count).flat_map(|row| [(row * 2 % 3) as f64, (row / 2 % 2) as f64]);
    let ids = Tensor::from_iter(ids, &CPU).and_then(|ids| ids.reshape((count, 2)));
    let rows = Tensor::cat(&[numbers, ids.expect("ids")], 1);
    rows.and_then(|rows| rows.to_dtype(dtype)).expect("rows")
}

#[test]
fn gradients_are_right() {
    let params = || Params::with_dtype(3, &CPU, DType::F64);
    let others = [
        r#"{"numeric": 4, "outputs": 2, "width": 4}"#,
        r#"{"numeric": 0, "categories": [3, 2, 3, 2], "outputs": 2, "width": 4, "embedding": 3}"#,
    ];
    let others =
        others.map(|options| format!(r#"{{"architecture": "tabular", "options": {options}}}"#));
    let ids =
        Tensor::new(&[[0f64, 1.0, 2.0, 0.0], [2.0, 0.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0]], &CPU);
    let ids = ids.expect("ids");
    for (json, x) in
        [SMALL, &others[0], &others[1]].into_iter().zip([&rows(5, DType::F64), &ids, &ids])
    {
        let model = Registry::builtin().build_in(&spec(json), params()).expect("model");
        let pass = Pass::train(5, 2);
        gradcheck::check(&model.params().vars(), || model.forward(x, &pass)).expect("gradients");
    }
}

/// In evaluation: in training the norms take the mean away, and with it what some biases do.
#[test]
fn every_parameter_has_a_say() {
    let model = build(SMALL).expect("model");
    let y = model.forward(&rows(6, DType::F32), &Pass::eval()).expect("forward");
    let gradients = y.sqr().and_then(|y| y.backward()).expect("backward");
    for (name, var) in model.params().vars() {
        let gradient = gradients.get(&var).unwrap_or_else(|| panic!("{name} has no gradient"));
        let size = gradient.abs().and_then(|g| g.sum_all()?.to_scalar::<f32>()).expect("size");
        assert!(size > 0.0, "{name}");
    }
}

/// The table has the three categories of the first column, then the two of the second.
#[test]
fn each_column_has_vectors_of_its_own() {
    let model = build(SMALL).expect("model");
    let x = Tensor::new(&[[0.3f32, -0.4, 1.0, 1.0]], &CPU).expect("row");
    let y = model.forward(&x, &Pass::eval()).and_then(|y| Ok(y.sum_all()?)).expect("forward");
    let gradients = y.backward().expect("backward");
    let vars = model.params().vars();
    let (_, table) = vars.iter().find(|(name, _)| name == "embedding.weight").expect("table");
    let sizes = gradients.get(table).and_then(|g| g.abs().and_then(|g| g.sum(1)).ok());
    let sizes: Vec<f32> = sizes.and_then(|sizes| sizes.to_vec1().ok()).expect("gradient");
    let used: Vec<bool> = sizes.iter().map(|size| *size > 0.0).collect();
    assert_eq!(used, [false, true, false, false, true]);
}

#[test]
fn the_defaults_are_the_authors() {
    let options: TabularOptions =
        serde_json::from_str(r#"{"numeric": 3, "categories": [5, 4], "outputs": 2}"#)
            .expect("json");
    assert_eq!(options, TabularOptions::new(3, [5, 4], 2));
    let model = Model::build(&ModelSpec::new("tabular", &options).expect("spec"), 7, &CPU);
    let model = model.expect("model");
    assert_eq!((model.input_shape(), model.output_shape()), (&[5][..], &[2][..]));
    let block = 2 * 192 + (192 * 384 + 384) + (384 * 192 + 192);
    let input = (3 + 2 * 64) * 192 + 192;
    let expected = 9 * 64 + input + 2 * block + 2 * 192 + 2 * 192 + 2;
    assert_eq!(model.params().num_elements(), expected);
    let names = model.params().names();
    let first = ["blocks.0.linear1.bias", "blocks.0.linear1.weight", "blocks.0.linear2.bias"];
    assert_eq!(names[..3], first);
    assert!(names.contains(&"embedding.weight".to_owned()), "{names:?}");
}

#[test]
fn rows_of_another_width_are_refused() {
    let options = TabularOptions::new(1, [3, 3], 2);
    let table = Tabular::new(&options, &Params::new(1, &CPU)).expect("table");
    for width in [0, 2, 4] {
        let x = Tensor::zeros((2, width), DType::F32, &CPU).expect("x");
        let error = table.forward(&x, &Pass::eval()).expect_err("refused").to_string();
        assert!(error.contains("[rows, 3]"), "{error}");
    }
}

#[test]
fn an_unknown_category_is_named() {
    let model = build(SMALL).expect("model");
    let cases = [
        ([0.5f32, 0.5, 3.0, 0.0], "category 0 of row 1 is 3, expected a whole number from 0 to 2"),
        ([0.5, 0.5, 0.0, 2.0], "category 1 of row 1 is 2, expected a whole number from 0 to 1"),
        ([0.5, 0.5, 0.5, 0.0], "category 0 of row 1 is 0.5"),
        ([0.5, 0.5, -1.0, 0.0], "category 0 of row 1 is -1"),
    ];
    for (row, expected) in cases {
        let x = Tensor::new(&[[0f32, 0.0, 1.0, 1.0], row], &CPU).expect("x");
        let error = model.predict(&x).expect_err("refused").to_string();
        assert!(error.starts_with(expected) && error.contains("option categories"), "{error}");
    }
}

#[test]
fn options_that_make_no_model_are_refused() {
    let cases = [
        (r#"{"numeric": 0, "outputs": 2}"#, "option numeric is 0"),
        (r#"{"numeric": 1, "categories": [2, 0], "outputs": 2}"#, "option categories is [2, 0]"),
        (r#"{"numeric": 1, "outputs": 2, "blocks": 0}"#, "option blocks is 0"),
        (r#"{"numeric": 1, "outputs": 2, "dropout": 1.0}"#, "option dropout is 1"),
        (r#"{"numeric": 1, "outputs": 2, "layers": 2}"#, "unknown field `layers`"),
    ];
    for (options, expected) in cases {
        let json = format!(r#"{{"architecture": "tabular", "options": {options}}}"#);
        let error = build(&json).map(drop).expect_err("refused").to_string();
        assert!(error.contains(expected), "{error}");
    }
}

/// Whether two numbers have the same sign, turned round by a category: no linear model can tell.
#[test]
fn learns_what_a_linear_model_cannot() {
    let tabular =
        TabularOptions { width: 16, embedding: 4, dropout: 0.1, ..TabularOptions::new(2, [2], 2) };
    let tabular = ModelSpec::new("tabular", &tabular).expect("spec");
    let linear = spec(r#"{"architecture": "mlp", "options": {"inputs": 3, "outputs": 2}}"#);
    let (deep, flat) = (accuracy(&tabular), accuracy(&linear));
    assert!(deep > 0.93 && flat < 0.65, "tabular {deep}, linear {flat}");
}

/// On rows that were not trained on.
fn accuracy(spec: &ModelSpec) -> f64 {
    let model = Model::build(spec, 7, &CPU).expect("model");
    for step in 0..150 {
        let (x, labels) = task(128, step);
        let logits = model.forward(&x, &Pass::train(7, step)).expect("forward");
        let gradients = loss::cross_entropy(&logits, &labels).and_then(|loss| Ok(loss.backward()?));
        let gradients = gradients.expect("backward");
        for (_, var) in model.params().vars() {
            let step = (gradients.get(&var).expect("gradient") * 0.2).expect("step");
            var.set(&(var.as_tensor() - step).expect("less")).expect("set");
        }
    }
    let (x, labels) = task(1000, 1000);
    mobula_nn::metrics::accuracy(&model.predict(&x).expect("predict"), &labels).expect("accuracy")
}

fn task(rows: usize, step: u64) -> (Tensor, Tensor) {
    let mut draws = Stream::new(1, "task").at(step, 0);
    let (mut x, mut labels) = (Vec::new(), Vec::new());
    for _ in 0..rows {
        let (a, b, turned) = (draws.normal(), draws.normal(), draws.below(2) == 1);
        x.extend([a as f32, b as f32, f32::from(u8::from(turned))]);
        labels.push(u32::from((a * b > 0.0) != turned));
    }
    let labels = Tensor::from_vec(labels, rows, &CPU).expect("labels");
    (Tensor::from_vec(x, (rows, 3), &CPU).expect("rows"), labels)
}
