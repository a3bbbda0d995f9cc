//! Saved models: back bit for bit, and clear words for files that do not fit.

use crate::{CNN, CPU, LSTM, MLP, bits, build, normal_f32, spec};
use candle_core::Tensor;
use mobula_nn::{Init, Model, Params, Pass};
use std::collections::HashMap;
use std::path::Path;

fn params(shapes: &[(&str, &[usize])]) -> Params {
    let params = Params::new(1, &CPU);
    for (name, shape) in shapes {
        params.get(*shape, name, Init::Normal { mean: 0.0, std: 1.0 }).expect("parameter");
    }
    params
}

fn all_bits(params: &Params) -> Vec<Vec<u32>> {
    params.vars().iter().map(|(_, var)| bits(var)).collect()
}

#[test]
fn a_model_comes_back_bit_for_bit() {
    for (json, shape) in [(MLP, [3, 6].as_slice()), (CNN, &[3, 2, 7, 6]), (LSTM, &[3, 4, 3])] {
        let dir = tempfile::tempdir().expect("folder");
        let model = Model::build(&spec(json), 99, &CPU).expect("model");
        model.save(dir.path().join("new")).expect("save");
        let loaded = Model::load(dir.path().join("new"), &CPU).expect("load");
        assert_eq!(loaded.spec(), model.spec());
        assert_eq!(all_bits(loaded.params()), all_bits(model.params()));
        let x = normal_f32("x", shape);
        let run = |model: &Model| bits(&model.forward(&x, &Pass::eval()).expect("forward"));
        assert_eq!(run(&loaded), run(&model));
    }
}

/// The layout that every reader of the format expects: a header of JSON, then the numbers.
#[test]
fn the_file_is_plain_safetensors() {
    let dir = tempfile::tempdir().expect("folder");
    let path = dir.path().join("model.safetensors");
    params(&[("b", &[2]), ("a", &[2, 3])]).save(&path).expect("save");
    let bytes = std::fs::read(&path).expect("read");
    let header = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes")) as usize;
    let json: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header]).expect("header");
    assert_eq!(json["a"]["dtype"], "F32");
    assert_eq!(json["a"]["shape"], serde_json::json!([2, 3]));
    assert_eq!(bytes.len(), 8 + header + 8 * 4);
}

fn load_error(saved: &[(&str, &[usize])], model: &[(&str, &[usize])]) -> String {
    let dir = tempfile::tempdir().expect("folder");
    let path = dir.path().join("w.safetensors");
    params(saved).save(&path).expect("save");
    let model = params(model);
    for (_, var) in model.vars() {
        var.set(&var.zeros_like().expect("zeros")).expect("set");
    }
    let error = model.load(&path).expect_err("does not fit").to_string();
    let untouched = all_bits(&model).iter().flatten().all(|bits| *bits == 0);
    assert!(untouched, "a failed load changes nothing");
    assert!(error.contains("w.safetensors"), "{error}");
    error
}

#[test]
fn weights_that_do_not_fit_are_explained() {
    let shape = load_error(&[("a", &[2]), ("w", &[2, 3])], &[("a", &[2]), ("w", &[3, 2])]);
    assert!(
        shape.contains("\"w\"") && shape.contains("[2, 3], the model expects [3, 2]"),
        "{shape}"
    );
    let missing = load_error(&[("a", &[2])], &[("a", &[2]), ("w", &[2]), ("z", &[2])]);
    assert!(missing.contains("lacks parameters of the model: w, z"), "{missing}");
    let extra = load_error(&[("a", &[2]), ("w", &[2])], &[("a", &[2])]);
    assert!(extra.contains("has parameters that the model does not: w"), "{extra}");
}

#[test]
fn other_float_types_are_converted() {
    let params = params(&[("a", &[2])]);
    let half = Tensor::new(&[0.5f64, 2.0], &CPU).expect("tensor");
    let half = half.to_dtype(candle_core::DType::BF16).expect("cast");
    params.load_tensors("a test", &HashMap::from([("a".to_owned(), half)])).expect("load");
    assert_eq!(params.vars()[0].1.to_vec1::<f32>().expect("values"), [0.5, 2.0]);
}

fn break_and_load(harm: impl Fn(&Path)) -> String {
    let dir = tempfile::tempdir().expect("folder");
    build(MLP).expect("model").save(dir.path()).expect("save");
    harm(dir.path());
    Model::load(dir.path(), &CPU).map(drop).expect_err("broken").to_string()
}

#[test]
fn broken_folders_are_explained() {
    let cut = break_and_load(|dir| {
        let path = dir.join(Model::WEIGHTS_FILE);
        let bytes = std::fs::read(&path).expect("read");
        std::fs::write(&path, &bytes[..bytes.len() / 2]).expect("write");
    });
    assert!(cut.contains("model.safetensors as safetensors"), "{cut}");
    let empty =
        break_and_load(|dir| std::fs::write(dir.join(Model::WEIGHTS_FILE), b"").expect("write"));
    assert!(empty.contains("model.safetensors as safetensors"), "{empty}");
    let missing =
        break_and_load(|dir| std::fs::remove_file(dir.join(Model::WEIGHTS_FILE)).expect("remove"));
    assert!(missing.contains("cannot read") && missing.contains("model.safetensors"), "{missing}");
    let no_spec =
        break_and_load(|dir| std::fs::remove_file(dir.join(Model::SPEC_FILE)).expect("remove"));
    assert!(no_spec.contains("model.json"), "{no_spec}");
    let bad_spec =
        break_and_load(|dir| std::fs::write(dir.join(Model::SPEC_FILE), b"{").expect("write"));
    assert!(bad_spec.contains("model.json is not a model description"), "{bad_spec}");
}
