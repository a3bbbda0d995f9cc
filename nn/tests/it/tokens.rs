//! Transformers over token ids: what they take, what they refuse, what they learn.

use crate::{CPU, bits, build, spec};
use candle_core::{DType, Tensor, Var};
use mobula_nn::models::TransformerOptions;
use mobula_nn::{Gradients, Model, ModelSpec, Params, Pass, Registry, gradcheck, loss};

/// Tied: the embedding is used twice.
const DECODER: &str = r#"{"architecture": "transformer", "options":
    {"vocabulary": 7, "length": 4, "features": 6, "heads": 1, "layers": 1, "hidden": 5,
     "outputs": 7, "tied": true, "causal": true, "pooling": "each", "dropout": 0.2}}"#;
const ENCODER: &str = r#"{"architecture": "transformer", "options":
    {"vocabulary": 7, "length": 4, "features": 6, "heads": 3, "layers": 1, "hidden": 5,
     "outputs": 2, "positions": "rotary"}}"#;

fn tokens() -> Tensor {
    Tensor::new(&[[0u32, 6, 3, 3], [1, 2, 3, 4]], &CPU).expect("tokens")
}

#[test]
fn gradients_are_right() {
    for json in [DECODER, ENCODER] {
        let params = Params::with_dtype(3, &CPU, DType::F64);
        let model = Registry::builtin().build_in(&spec(json), params).expect("model");
        let pass = Pass::train(5, 2);
        let forward = || model.forward(&tokens(), &pass);
        gradcheck::check(&model.params().vars(), forward).expect("gradients");
    }
}

/// The two uses of a tied embedding add up in the buffer that a trainer reads.
#[test]
fn both_uses_of_the_embedding_are_in_the_gradients() {
    let model = build(DECODER).expect("model");
    let y = model.forward(&tokens(), &Pass::train(5, 2)).expect("forward");
    let loss = loss::cross_entropy(&y, &tokens()).expect("loss");
    let store = loss.backward().expect("backward");
    let mut gradients = Gradients::zeros(model.params());
    let again = model.forward(&tokens(), &Pass::train(5, 2)).expect("forward");
    let again = loss::cross_entropy(&again, &tokens()).expect("loss");
    gradients.backward(&again, 1.0).expect("backward");
    assert!(gradients.missing().is_empty());
    for ((name, range), (_, var)) in gradients.places().iter().zip(model.params().vars()) {
        let expected = store.get(&var).expect("gradient").flatten_all().expect("flat");
        for (got, expected) in
            gradients.values()[range.clone()].iter().zip(expected.to_vec1::<f32>().expect("values"))
        {
            assert!((got - expected).abs() < 1e-5, "{name}: {got} and {expected}");
        }
    }
}

#[test]
fn shapes_and_names_are_those_of_the_options() {
    let decoder = build(DECODER).expect("model");
    assert_eq!((decoder.input_shape(), decoder.output_shape()), (&[4][..], &[4, 7][..]));
    let names = decoder.params().names();
    assert_eq!(names[0], "embed.weight");
    assert!(names.contains(&"positions".to_owned()) && !names.contains(&"head.weight".to_owned()));
    let encoder = build(ENCODER).expect("model");
    assert_eq!(encoder.predict(&tokens()).expect("predict").dims(), [2, 2]);
    assert!(encoder.params().names().contains(&"head.weight".to_owned()));
}

/// A stream, a sweep and a server have inputs in `f32`.
#[test]
fn ids_of_every_number_type_give_the_same_bits() {
    let model = build(DECODER).expect("model");
    let expected = bits(&model.predict(&tokens()).expect("predict"));
    for dtype in [DType::F32, DType::F64, DType::I64, DType::U8] {
        let same = model.predict(&tokens().to_dtype(dtype).expect("cast")).expect("predict");
        assert_eq!(bits(&same), expected, "{dtype:?}");
    }
}

#[test]
fn an_unknown_id_is_named_with_its_row_and_the_vocabulary() {
    let model = build(DECODER).expect("model");
    let cases = [(7.0f32, "7"), (-1.0, "-1"), (2.5, "2.5"), (f32::NAN, "NaN")];
    for (id, text) in cases {
        let x = Tensor::new(&[[0f32, 1.0, 2.0, 3.0], [0.0, 1.0, id, 3.0]], &CPU).expect("x");
        let error = model.predict(&x).expect_err("refused").to_string();
        let expected = format!("token 2 of row 1 is {text}, expected a whole number from 0 to 6");
        assert!(error.starts_with(&expected) && error.contains("option vocabulary"), "{error}");
    }
}

#[test]
fn options_that_make_no_model_are_refused() {
    let cases = [
        (r#"{"vocabulary": 7, "tied": true}"#, "option outputs is 10, expected 7, the vocabulary"),
        (r#"{"tied": true}"#, "option vocabulary is 0"),
    ];
    for (options, expected) in cases {
        let json = format!(r#"{{"architecture": "transformer", "options": {options}}}"#);
        let error = build(&json).map(drop).expect_err("refused").to_string();
        assert!(error.contains(expected), "{error}");
    }
    // Of vectors only.
    assert!(
        build(r#"{"architecture": "transformer", "options": {"vocabulary": 7, "inputs": 0}}"#)
            .is_ok()
    );
}

/// Each place sees only those before it: a later token changes no earlier logits.
#[test]
fn a_decoder_does_not_look_ahead() {
    let model = build(DECODER).expect("model");
    let logits = |last: u32| {
        let x = Tensor::new(&[[5u32, 1, 2, last]], &CPU).expect("x");
        let y = model.predict(&x).expect("predict");
        let until = |places| bits(&y.narrow(1, 0, places).expect("narrow"));
        (until(3), until(4))
    };
    let (a, b) = (logits(0), logits(6));
    assert!(a.0 == b.0 && a.1 != b.1);
}

#[test]
fn a_saved_language_model_gives_the_same_bits() {
    let folder = tempfile::tempdir().expect("folder");
    let model = build(DECODER).expect("model");
    model.save(folder.path()).expect("save");
    let loaded = Model::load(folder.path(), &CPU).expect("load");
    let predict = |model: &Model| bits(&model.predict(&tokens()).expect("predict"));
    assert_eq!(predict(&model), predict(&loaded));
}

/// "0 1 2 3 4 0 1 .." from any start: after a token comes the next one.
#[test]
fn a_language_model_learns_to_count() {
    let options = TransformerOptions {
        features: 16,
        layers: 1,
        heads: 2,
        ..TransformerOptions::language_model(5, 6)
    };
    let spec = ModelSpec::new("transformer", &options).expect("spec");
    let model = Model::build(&spec, 7, &CPU).expect("model");
    let count = |from: u32| {
        let values: Vec<u32> = (0..5).flat_map(|row| (0..6).map(move |at| row + at)).collect();
        let values: Vec<u32> = values.into_iter().map(|value| (value + from) % 5).collect();
        Tensor::from_vec(values, (5, 6), &CPU).expect("tokens")
    };
    let mut last = f32::INFINITY;
    for step in 0..60 {
        let logits = model.forward(&count(0), &Pass::train(7, step)).expect("forward");
        let loss = loss::cross_entropy(&logits, &count(1)).expect("loss");
        descend(&model.params().vars(), &loss, 0.3);
        last = loss.to_scalar().expect("loss");
    }
    assert!(last < 0.1, "{last}");
}

fn descend(vars: &[(String, Var)], loss: &Tensor, rate: f64) {
    let gradients = loss.backward().expect("backward");
    for (_, var) in vars {
        let step = (gradients.get(var).expect("gradient") * rate).expect("step");
        var.set(&(var.as_tensor() - step).expect("less")).expect("set");
    }
}
