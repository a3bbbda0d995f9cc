//! Gradients that are collected flat are those that candle hands out.

use crate::{CPU, MODELS, bits, build, normal_f32};
use candle_core::{Tensor, Var};
use mobula_nn::layers::Linear;
use mobula_nn::{Error, Gradients, Init, Module, Params, Pass};

fn loss(y: &Tensor) -> Tensor {
    let weights = normal_f32("weights", y.dims());
    (y * weights).and_then(|y| y.sum_all()).expect("loss")
}

fn bits_of(gradients: &Gradients) -> Vec<u32> {
    gradients.values().iter().map(|value| value.to_bits()).collect()
}

#[test]
fn flat_gradients_are_candles() {
    for (json, shape) in MODELS {
        let model = build(json).expect("model");
        let y = model.forward(&normal_f32("x", shape), &Pass::train(1, 2)).expect("forward");
        let store = loss(&y).backward().expect("backward");
        let expected: Vec<u32> = model
            .params()
            .vars()
            .iter()
            .flat_map(|(_, var)| bits(store.get(var).expect("gradient")))
            .collect();
        let mut gradients = Gradients::zeros(model.params());
        for _ in 0..2 {
            gradients.backward(&loss(&y), 1.0).expect("backward");
            assert_eq!(bits_of(&gradients), expected);
            assert!(gradients.missing().is_empty());
        }
    }
}

/// A layer used twice, an operation of candle's on the same parameter, and micro-batches.
#[test]
fn what_comes_twice_is_added() {
    let params = Params::new(1, &CPU);
    let layer = Linear::new(&params, 3, 3).expect("layer");
    let x = normal_f32("x", &[4, 3]);
    let forward = |x: &Tensor| layer.forward(x, &Pass::train(1, 1)).expect("forward");
    let y = (forward(&forward(&x))
        + layer.weight().sum_all().expect("sum").broadcast_as((4, 3)).expect("shape"))
    .expect("y");
    let store = loss(&y).backward().expect("backward");
    let mut gradients = Gradients::zeros(&params);
    gradients.backward(&loss(&y), 1.0).expect("backward");
    gradients.add_backward(&loss(&y), 2.0).expect("backward");
    let expected = params.vars().into_iter().flat_map(|(_, var)| {
        store
            .get(&var)
            .expect("gradient")
            .flatten_all()
            .expect("flat")
            .to_vec1::<f32>()
            .expect("f32")
    });
    for (got, expected) in gradients.values().iter().zip(expected) {
        assert!((got - 3.0 * expected).abs() < 1e-4 * expected.abs().max(1.0), "{got} {expected}");
    }
    let value = loss(&y).to_scalar::<f32>().expect("scalar");
    assert!((gradients.loss() - 3.0 * value).abs() < 1e-4 * value.abs());
}

#[test]
fn missing_parameters_are_named_and_zero() {
    let params = Params::new(1, &CPU);
    let used = params.get(2, "used", Init::Ones).expect("parameter");
    params.get(3, "unused", Init::Ones).expect("parameter");
    let loss = (&used * 3.0).and_then(|y| y.sum_all()).expect("loss");
    let mut gradients = Gradients::zeros(&params);
    gradients.values_mut().fill(7.0);
    gradients.backward(&loss, 1.0).expect("backward");
    assert_eq!(gradients.missing(), ["unused"]);
    assert_eq!(gradients.values(), [0.0, 0.0, 0.0, 3.0, 3.0]);
}

#[test]
fn only_a_number_has_a_backward_pass() {
    let x = Var::new(&[1f32, 2.0], &CPU).expect("var");
    let error = Gradients::zeros(&Params::new(1, &CPU)).backward(&x, 1.0).expect_err("two");
    assert!(matches!(error, Error::Shape { .. }), "{error}");
}

#[test]
fn values_that_are_no_numbers_are_found() {
    let params = Params::new(1, &CPU);
    let w = params.get(20_000, "w", Init::Ones).expect("parameter");
    let mut gradients = Gradients::zeros(&params);
    gradients.backward(&w.sum_all().expect("sum"), -1.0).expect("backward");
    assert_eq!(gradients.first_non_finite(), None);
    for bad in [f32::NAN, f32::NEG_INFINITY] {
        gradients.values_mut()[17_001] = bad;
        assert_eq!(gradients.first_non_finite(), Some("w"));
    }
}

/// Whoever listens sees each gradient when it is written, the last layer's first.
#[test]
fn gradients_are_heard_of_when_they_are_written() {
    let params = Params::new(1, &CPU);
    let layers = ["a", "b"].map(|name| Linear::new(&params.scope(name), 2, 2).expect(name));
    let x = normal_f32("x", &[3, 2]);
    let forward = |x: &Tensor, at: usize| layers[at].forward(x, &Pass::train(1, 2)).expect("y");
    let mut gradients = Gradients::zeros(&params);
    let heard = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let log = std::sync::Arc::clone(&heard);
    gradients.set_listener(Some(Box::new(move |place, values| {
        log.lock().expect("lock").push((place, values.to_vec()));
    })));
    gradients.backward(&loss(&forward(&forward(&x, 0), 1)), 1.0).expect("backward");
    let take = || std::mem::take(&mut *heard.lock().expect("lock"));
    let once = take();
    let order: Vec<_> =
        once.iter().map(|(place, _)| gradients.places()[*place].0.as_str()).collect();
    assert!(order[..2].iter().all(|name| name.starts_with("b.")), "{order:?}");
    assert!(order[2..].iter().all(|name| name.starts_with("a.")), "{order:?}");
    assert_eq!(order.len(), 4);
    for (place, values) in &once {
        assert_eq!(*values, gradients.values()[gradients.places()[*place].1.clone()]);
    }
    // A layer that is used twice is heard of twice.
    gradients.backward(&loss(&forward(&forward(&x, 0), 0)), 1.0).expect("backward");
    assert_eq!(take().iter().filter(|(place, _)| *place == 0).count(), 2);
    gradients.set_listener(None);
    gradients.backward(&loss(&forward(&x, 0)), 1.0).expect("backward");
    assert!(take().is_empty());
}
