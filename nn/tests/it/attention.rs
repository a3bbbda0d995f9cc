//! Attention: dropout of its weights, which is drawn and drawn again, never stored.

use crate::{CPU, assert_same_in_every_pool, bits, normal, normal_f32};
use candle_core::{DType, Tensor, Var};
use mobula_core::random::Stream;
use mobula_nn::layers::{Activation, AttentionMask, MultiHeadAttention, Rotary, TransformerBlock};
use mobula_nn::{Error, Module, Params, Pass, gradcheck};

const FEATURES: usize = 4;
const HEADS: usize = 2;

fn layer(name: &str, rate: f64) -> (Params, MultiHeadAttention) {
    let params = Params::with_dtype(7, &CPU, DType::F64);
    let layer = MultiHeadAttention::new(&params.scope(name), FEATURES, HEADS).expect("layer");
    (params, layer.with_dropout(rate).expect("rate"))
}

fn set(params: &Params, name: &str, values: &[f64]) {
    let vars = params.vars();
    let (_, var) = vars.iter().find(|(full, _)| full.ends_with(name)).expect("parameter");
    let values = Tensor::from_slice(values, var.shape(), &CPU).expect("values");
    var.set(&values).expect("set");
}

/// The weights `[heads, queries, keys]` of one row, by what comes out where the values of all keys
/// but one are 0: all keys weigh the same without dropout.
fn weights(name: &str, rate: f64, places: usize, pass: &Pass) -> Vec<Vec<Vec<f64>>> {
    let (params, layer) = layer(name, rate);
    let feature = |of: usize| (0..FEATURES).map(move |at| f64::from(u8::from(at == of)));
    let identity: Vec<f64> = (0..FEATURES).flat_map(feature).collect();
    // Queries and keys are zeros, values and what comes out the input.
    set(
        &params,
        "in_proj_weight",
        &[vec![0.0; 2 * FEATURES * FEATURES], identity.clone()].concat(),
    );
    set(&params, "out_proj.weight", &identity);
    set(&params, "out_proj.bias", &[0.0; FEATURES]);
    let mut weights = vec![vec![vec![0.0; places]; places]; HEADS];
    for key in 0..places {
        let values = (0..places * FEATURES).map(|at| f64::from(u8::from(at / FEATURES == key)));
        let x = Tensor::from_iter(values, &CPU).and_then(|x| x.reshape((1, places, FEATURES)));
        let y = layer.forward(&x.expect("x"), pass).expect("forward");
        let y = y.squeeze(0).and_then(|y| y.to_vec2::<f64>()).expect("values");
        for (head, weights) in weights.iter_mut().enumerate() {
            for (query, weights) in weights.iter_mut().enumerate() {
                weights[key] = y[query][head * FEATURES / HEADS] * places as f64;
            }
        }
    }
    weights
}

#[test]
fn drops_the_right_share_and_scales_the_rest() {
    for rate in [0.1, 0.5, 0.9] {
        let weights = weights("a", rate, 90, &Pass::train(1, 1)).concat().concat();
        let kept: Vec<&f64> = weights.iter().filter(|weight| **weight != 0.0).collect();
        assert!(kept.iter().all(|weight| (**weight - 1.0 / (1.0 - rate)).abs() < 1e-9));
        let share = kept.len() as f64 / weights.len() as f64;
        let error = 5.0 * (rate * (1.0 - rate) / weights.len() as f64).sqrt();
        assert!((share - (1.0 - rate)).abs() < error, "rate {rate}: kept {share}");
    }
}

/// A kernel elsewhere may rely on it.
#[test]
fn draws_the_documented_words() {
    let drawn = weights("b.self_attn", 0.3, 70, &Pass::train(9, 4).with_row_offset(7));
    let stream = Stream::new(9, "dropout b.self_attn.dropout");
    for (head, drawn) in drawn.iter().enumerate() {
        for (query, drawn) in drawn.iter().enumerate() {
            let mut draws = stream.child(head as u64).child(query as u64).at(4, 7);
            for (key, weight) in drawn.iter().enumerate() {
                let keep = f64::from(draws.word()) / 2f64.powi(32) >= 0.3;
                assert_eq!(*weight != 0.0, keep, "head {head}, query {query}, key {key}");
            }
        }
    }
}

#[test]
fn depends_on_seed_step_name_row_head_and_query() {
    let draw = |name, pass: &Pass| weights(name, 0.5, 12, pass);
    let first = draw("a", &Pass::train(1, 1));
    assert_eq!(first, draw("a", &Pass::train(1, 1)));
    let others = [Pass::train(2, 1), Pass::train(1, 2), Pass::train(1, 1).with_row_offset(1)];
    for pass in &others {
        assert_ne!(first, draw("a", pass), "{pass:?}");
    }
    assert_ne!(first, draw("b", &Pass::train(1, 1)));
    assert_ne!(first[0], first[1]);
    assert_ne!(first[0][0], first[0][1]);
}

#[test]
fn nothing_is_dropped_in_evaluation_and_at_rate_0() {
    let x = normal("x", &[2, 5, FEATURES]);
    let values = |rate, pass: Pass| {
        let y = layer("a", rate).1.forward(&x, &pass).expect("forward");
        y.flatten_all().and_then(|y| y.to_vec1::<f64>()).expect("values")
    };
    let plain = values(0.0, Pass::eval());
    assert_eq!(plain, values(0.5, Pass::eval().with_row_offset(1)));
    assert_eq!(plain, values(0.0, Pass::train(1, 1)));
    assert_ne!(plain, values(0.5, Pass::train(1, 1)));
}

#[test]
fn rates_that_make_no_sense_are_refused() {
    for rate in [-0.1, 1.0, f64::NAN] {
        let refused = layer("a", 0.0).1.with_dropout(rate);
        assert!(matches!(refused, Err(Error::Option { option: "dropout", .. })), "{rate}");
    }
}

fn masks() -> [AttentionMask; 4] {
    let bias = normal("bias", &[5, 5]);
    [
        AttentionMask::default(),
        AttentionMask::causal(),
        AttentionMask::causal().with_lengths([4, 2]),
        AttentionMask::default().with_bias(&bias).expect("mask"),
    ]
}

#[test]
fn gradients_are_right() {
    for mask in masks() {
        let (params, layer) = layer("a", 0.4);
        let layer = layer.with_rotary(Rotary::new(FEATURES / HEADS, 10.0).expect("rotary"));
        let x = Var::from_tensor(&normal("x", &[2, 5, FEATURES])).expect("var");
        let mut vars = params.vars();
        vars.push(("x".to_owned(), x.clone()));
        let pass = Pass::train(5, 2).with_row_offset(3);
        gradcheck::check(&vars, || layer.forward_masked(&x, &mask, &pass)).expect("gradients");
        // The negative control: the slope of one mask is not that of another.
        let calls = std::cell::Cell::new(0);
        let wrong = gradcheck::check(&vars, || {
            calls.set(calls.get() + 1);
            let pass = Pass::train(5, if calls.get() == 1 { 2 } else { 3 });
            layer.forward_masked(&x, &mask, &pass)
        });
        assert!(matches!(wrong, Err(Error::WrongGradient { .. })));
    }
}

/// A block of the kernel has 64 queries: several of them, cut anywhere.
#[test]
fn a_batch_is_the_sum_of_its_parts() {
    let run = |x: &Tensor, first: u64| {
        let params = Params::new(7, &CPU);
        let layer = MultiHeadAttention::new(&params, 8, 2).and_then(|l| l.with_dropout(0.3));
        let x = Var::from_tensor(x).expect("var");
        let pass = Pass::train(3, 8).with_row_offset(first);
        let y = layer.expect("layer").forward_masked(&x, &AttentionMask::causal(), &pass);
        let y = y.expect("forward");
        let gradients = y.sqr().and_then(|y| y.backward()).expect("backward");
        (bits(&y), bits(gradients.get(&x).expect("gradient")))
    };
    let x = normal_f32("x", &[3, 130, 8]);
    let whole = run(&x, 40);
    let part = |from, rows| run(&x.narrow(0, from, rows).expect("part"), 40 + from as u64);
    let parts = [part(0, 1), part(1, 2)];
    assert_eq!(whole.0, [parts[0].0.clone(), parts[1].0.clone()].concat());
    assert_eq!(whole.1, [parts[0].1.clone(), parts[1].1.clone()].concat());
}

#[test]
fn bits_do_not_depend_on_the_number_of_threads() {
    let x = normal_f32("x", &[3, 130, 8]);
    assert_same_in_every_pool(|| {
        let params = Params::new(7, &CPU);
        let layer = MultiHeadAttention::new(&params, 8, 2).and_then(|l| l.with_dropout(0.3));
        let y = layer.expect("layer").forward(&x, &Pass::train(3, 8)).expect("forward");
        let gradients = y.sqr().and_then(|y| y.backward()).expect("backward");
        let of = |(_, var): &(String, Var)| bits(gradients.get(var).expect("gradient"));
        let gradients: Vec<_> = params.vars().iter().map(of).collect();
        (bits(&y), gradients)
    });
}

/// The block hands its rate on, under the name of its attention.
#[test]
fn a_block_drops_weights_of_its_attention() {
    let forward = |rate: f64| {
        let params = Params::new(7, &CPU);
        let block = TransformerBlock::new(&params, 8, 2, 8, Activation::Relu, 0.0);
        let block = block.and_then(|block| block.with_attention_dropout(rate)).expect("block");
        let y = block.forward(&normal_f32("x", &[2, 6, 8]), &Pass::train(1, 1));
        bits(&y.expect("forward"))
    };
    assert_ne!(forward(0.0), forward(0.5));
    assert_eq!(forward(0.5), forward(0.5));
}
