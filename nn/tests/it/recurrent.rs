//! LSTM, GRU and embeddings: gradients, lengths, PyTorch's numbers, threads.

use crate::{CPU, bits, normal, normal_f32};
use candle_core::{DType, Tensor, Var};
use mobula_nn::layers::{Embedding, Gru, Lstm, LstmState, RecurrentOptions};
use mobula_nn::{Error, Gradients, Module, Params, Pass, gradcheck};
use serde_json::Value;
use std::collections::HashMap;

fn params(dtype: DType) -> Params {
    Params::with_dtype(3, &CPU, dtype)
}

/// Either kind of layer, with all that it takes and gives.
enum Layer {
    Lstm(Lstm),
    Gru(Gru),
}

impl Layer {
    fn new(kind: &str, params: &Params, inputs: usize, hidden: usize, o: RecurrentOptions) -> Self {
        match kind {
            "lstm" => Self::Lstm(Lstm::new(params, inputs, hidden, o).expect("lstm")),
            _ => Self::Gru(Gru::new(params, inputs, hidden, o).expect("gru")),
        }
    }

    /// Outputs, final hidden state, final cell state.
    fn run(&self, x: &Tensor, lengths: Option<&[usize]>, state: &[Tensor]) -> Vec<Tensor> {
        let pass = Pass::train(1, 1);
        match self {
            Self::Lstm(lstm) => {
                let state = match state {
                    [hidden, cell] => {
                        Some(LstmState { hidden: hidden.clone(), cell: cell.clone() })
                    }
                    _ => None,
                };
                let (y, state) =
                    lstm.forward_from(x, lengths, state.as_ref(), &pass).expect("forward");
                vec![y, state.hidden, state.cell]
            }
            Self::Gru(gru) => {
                let (y, hidden) =
                    gru.forward_from(x, lengths, state.first(), &pass).expect("forward");
                vec![y, hidden]
            }
        }
    }
}

fn flat(tensors: &[Tensor]) -> Tensor {
    let flat: Vec<Tensor> = tensors.iter().map(|t| t.flatten_all().expect("flat")).collect();
    Tensor::cat(&flat, 0).expect("cat")
}

/// Every gradient, of outputs and final states together, with an initial state.
fn check(kind: &str, [rows, length, inputs, hidden]: [usize; 4], options: RecurrentOptions) {
    let params = params(DType::F64);
    let layer = Layer::new(kind, &params, inputs, hidden, options);
    let states = options.layers * (1 + usize::from(options.bidirectional));
    let var = |name: &str, shape: [usize; 3]| {
        (name.to_owned(), Var::from_tensor(&normal(name, &shape)).expect("var"))
    };
    let mut vars = vec![var("x", [rows, length, inputs]), var("h", [states, rows, hidden])];
    if kind == "lstm" {
        vars.push(var("c", [states, rows, hidden]));
    }
    let inputs: Vec<Tensor> = vars.iter().map(|(_, var)| var.as_tensor().clone()).collect();
    vars.extend(params.vars());
    let short: Vec<usize> = (0..rows).map(|row| (row * 2 + 1) % (length + 1)).collect();
    for lengths in [None, Some(short.as_slice())] {
        let run = || Ok(flat(&layer.run(&inputs[0], lengths, &inputs[1..])));
        gradcheck::check(&vars, run).expect("right gradients");
    }
}

#[test]
fn gradients_are_right() {
    let one = RecurrentOptions::default();
    let many = RecurrentOptions { layers: 2, bidirectional: true, dropout: 0.3 };
    for kind in ["lstm", "gru"] {
        for shape in [[1, 1, 1, 1], [3, 1, 2, 5], [1, 4, 3, 3], [3, 4, 2, 17]] {
            check(kind, shape, one);
        }
        check(kind, [3, 3, 2, 3], RecurrentOptions { layers: 2, ..one });
        check(kind, [2, 3, 2, 3], RecurrentOptions { bidirectional: true, ..one });
        check(kind, [3, 4, 2, 3], many);
    }
}

/// What is used of the results may be any of them, and the same graph goes back twice.
#[test]
fn each_result_has_its_own_gradient() {
    let params = params(DType::F64);
    let layer = Layer::new("lstm", &params, 2, 3, RecurrentOptions::default());
    let x = normal("x", &[2, 4, 2]);
    let results = layer.run(&x, None, &[]);
    let gradients = |loss: &Tensor| -> Vec<f64> {
        let store = loss.sum_all().and_then(|loss| loss.backward()).expect("backward");
        let gradients = params.vars();
        let gradients =
            gradients.iter().map(|(_, var)| store.get(var.as_tensor()).expect("gradient").clone());
        flat(&gradients.collect::<Vec<_>>()).to_vec1().expect("values")
    };
    let parts: Vec<Vec<f64>> = results.iter().map(gradients).collect();
    let sum = gradients(&flat(&results));
    for (at, sum) in sum.iter().enumerate() {
        let parts: f64 = parts.iter().map(|part| part[at]).sum();
        assert!((sum - parts).abs() < 1e-12);
    }
    let last = results[0].narrow(1, 3, 1).expect("last step");
    assert_eq!(gradients(&last), parts[1], "the last output is the final hidden state");
}

/// A row of its own length is the row cut to it.
#[test]
fn lengths_are_as_if_each_row_were_alone() {
    let options = RecurrentOptions { layers: 2, bidirectional: true, dropout: 0.0 };
    for kind in ["lstm", "gru"] {
        let params = params(DType::F64);
        let layer = Layer::new(kind, &params, 2, 5, options);
        let x = normal("x", &[4, 6, 2]);
        let lengths = [3, 6, 1, 5];
        let results = layer.run(&x, Some(&lengths), &[]);
        for (row, length) in lengths.into_iter().enumerate() {
            let row_of = |t: &Tensor, dim| t.narrow(dim, row, 1).expect("row");
            let alone = row_of(&x, 0).narrow(1, 0, length).expect("cut");
            let alone = layer.run(&alone, None, &[]);
            let y = row_of(&results[0], 0);
            let (live, padding) = (y.narrow(1, 0, length), y.narrow(1, length, 6 - length));
            close(&live.expect("live"), &alone[0], 1e-12);
            let padding = padding.and_then(|padding| padding.abs()?.sum_all()?.to_scalar::<f64>());
            assert_eq!(padding.expect("sum"), 0.0);
            for (state, alone) in results[1..].iter().zip(&alone[1..]) {
                close(&row_of(state, 1), alone, 1e-12);
            }
        }
    }
}

fn distance(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.dims(), b.dims());
    let values = |t: &Tensor| -> Vec<f64> {
        let flat = t.flatten_all().and_then(|t| t.to_dtype(DType::F64)?.to_vec1());
        flat.expect("values")
    };
    let off = values(a).into_iter().zip(values(b)).map(|(a, b)| (a - b).abs() / b.abs().max(1.0));
    off.fold(0.0, |max, off| if off <= max { max } else { off })
}

fn close(a: &Tensor, b: &Tensor, tolerance: f64) {
    let off = distance(a, b);
    assert!(off < tolerance, "off by {off:e}");
}

/// What `bench/fixtures/recurrent.py` wrote.
struct Fixture {
    cases: HashMap<String, Value>,
    tensors: HashMap<String, Tensor>,
}

impl Fixture {
    fn read() -> Self {
        let path =
            concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/recurrent/pytorch.safetensors");
        let bytes = std::fs::read(path).expect("fixture");
        let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).expect("header");
        let about = &header.metadata().as_ref().expect("metadata")["about"];
        let about: Value = serde_json::from_str(about).expect("about");
        let cases = serde_json::from_value(about["cases"].clone()).expect("cases");
        let tensors = candle_core::safetensors::load_buffer(&bytes, &CPU).expect("tensors");
        Self { cases, tensors }
    }

    fn get(&self, case: &str, name: &str) -> Tensor {
        self.tensors[&format!("{case}/{name}")].clone()
    }

    /// The case's tensors whose names have this prefix, without it.
    fn under(&self, case: &str, prefix: &str) -> HashMap<String, Tensor> {
        let prefix = format!("{case}/{prefix}.");
        let named = self.tensors.iter();
        let named = named.filter_map(|(name, t)| Some((name.strip_prefix(&prefix)?, t.clone())));
        named.map(|(name, tensor)| (name.to_owned(), tensor)).collect()
    }
}

/// How far results and gradients are off from PyTorch's, whose weights are first changed by
/// `change`.
fn off(
    fixture: &Fixture,
    case: &str,
    dtype: DType,
    change: impl Fn(&str, &Tensor) -> Tensor,
) -> f64 {
    let about = &fixture.cases[case];
    let options = RecurrentOptions {
        layers: about["layers"].as_u64().expect("layers") as usize,
        bidirectional: about["bidirectional"].as_bool().expect("bidirectional"),
        dropout: 0.0,
    };
    let lengths: Option<Vec<usize>> =
        serde_json::from_value(about["lengths"].clone()).expect("lengths");
    let params = params(dtype);
    let layer = Layer::new(about["cell"].as_str().expect("cell"), &params, 3, 5, options);
    let weights = fixture.under(case, "p");
    let weights = weights.iter().map(|(name, weight)| (name.clone(), change(name, weight)));
    params.load_tensors("the fixture", &weights.collect()).expect("weights");
    let mut vars = params.vars();
    let inputs: Vec<Tensor> = ["x", "h", "c"]
        .into_iter()
        .filter(|name| fixture.tensors.contains_key(&format!("{case}/{name}")))
        .map(|name| {
            let input = fixture.get(case, name).to_dtype(dtype).expect("cast");
            vars.push((name.to_owned(), Var::from_tensor(&input).expect("var")));
            vars[vars.len() - 1].1.as_tensor().clone()
        })
        .collect();
    let results = layer.run(&inputs[0], lengths.as_deref(), &inputs[1..]);
    let (mut off, mut terms) = (0.0, Vec::new());
    for (result, name) in results.iter().zip(["y", "hn", "cn"]) {
        off = f64::max(off, distance(result, &fixture.get(case, name)));
        let weight = fixture.get(case, &format!("w.{name}")).to_dtype(dtype).expect("cast");
        terms.push((result * weight).expect("term"));
    }
    let store = flat(&terms).sum_all().and_then(|loss| loss.backward()).expect("backward");
    for (name, var) in vars {
        let gradient = store.get(var.as_tensor()).expect("gradient");
        off = f64::max(off, distance(gradient, &fixture.get(case, &format!("d.{name}"))));
    }
    off
}

#[test]
fn results_and_gradients_are_pytorchs() {
    let fixture = Fixture::read();
    assert_eq!(fixture.cases.len(), 4);
    for case in fixture.cases.keys() {
        for (dtype, tolerance) in [(DType::F64, 2e-7), (DType::F32, 5e-6)] {
            let off = off(&fixture, case, dtype, |_, weight| weight.clone());
            assert!(off < tolerance, "{case} {dtype:?}: {off:e}");
        }
    }
}

/// The negative control: two gates in each other's place.
#[test]
fn another_order_of_the_gates_is_not_pytorchs() {
    let fixture = Fixture::read();
    for case in fixture.cases.keys() {
        for at in 0..2 {
            let swapped = |name: &str, weight: &Tensor| match name.ends_with("_l0") {
                true => {
                    let gates = weight.dims()[0] / 5;
                    let mut parts = weight.chunk(gates, 0).expect("gates");
                    parts.swap(at, at + 1);
                    Tensor::cat(&parts, 0).expect("cat")
                }
                false => weight.clone(),
            };
            let off = off(&fixture, case, DType::F64, swapped);
            assert!(off > 1e-2, "{case}: {off:e}");
        }
    }
}

#[test]
fn embeddings_are_pytorchs() {
    let fixture = Fixture::read();
    for (dtype, tolerance) in [(DType::F64, 2e-7), (DType::F32, 1e-6)] {
        let params = params(dtype);
        let embedding = Embedding::new(&params, 5, 3).expect("embedding");
        let embedding = embedding.with_padding(1).expect("padding");
        let row = embedding.weight().get(1).and_then(|row| row.to_dtype(DType::F64));
        let row = row.and_then(|row| row.to_vec1::<f64>());
        assert_eq!(row.expect("row"), [0.0; 3]);
        let weights = HashMap::from([("weight".to_owned(), fixture.get("embedding", "p"))]);
        params.load_tensors("the fixture", &weights).expect("weights");
        let indices = fixture.get("embedding", "indices");
        let y = embedding.forward(&indices).expect("forward");
        close(&y, &fixture.get("embedding", "y"), 1e-12);
        let w = fixture.get("embedding", "w").to_dtype(dtype).expect("cast");
        let store = (y * w).and_then(|y| y.sum_all()?.backward()).expect("backward");
        let gradient = store.get(embedding.weight()).expect("gradient");
        close(gradient, &fixture.get("embedding", "d"), tolerance);
    }
}

#[test]
fn gradients_of_embeddings_are_right_and_add_up() {
    let params = params(DType::F64);
    let embedding = Embedding::new(&params, 4, 3).expect("embedding");
    let indices = Tensor::new(&[[3u32, 0, 3], [1, 3, 0]], &CPU).expect("indices");
    gradcheck::check(&params.vars(), || embedding.forward(&indices)).expect("right gradients");
    let params = self::params(DType::F32);
    let embedding = Embedding::new(&params, 3, 1).expect("embedding");
    let (a, b) = (Tensor::new(&[0u32, 2, 2], &CPU), Tensor::new(&[2i64], &CPU));
    let (a, b) = (embedding.forward(&a.expect("a")), embedding.forward(&b.expect("b")));
    let loss = Tensor::cat(&[a.expect("a"), b.expect("b")], 0).and_then(|y| y.sum_all());
    let mut gradients = Gradients::zeros(&params);
    gradients.backward(&loss.expect("loss"), 1.0).expect("backward");
    assert_eq!(gradients.values(), [1.0, 0.0, 3.0]);
}

#[test]
fn indices_that_are_not_in_the_table_are_named() {
    let params = Params::new(1, &CPU);
    let embedding = Embedding::new(&params, 4, 2).expect("embedding");
    let error = |indices: Tensor| embedding.forward(&indices).expect_err("refused").to_string();
    let negative = error(Tensor::new(&[[1i64, 2], [-1, 0]], &CPU).expect("indices"));
    let expected = "index -1 at position 2 is out of range: the table has 4 rows, expected 0 to 3";
    assert_eq!(negative, expected);
    let text = error(Tensor::new(&[1f32], &CPU).expect("indices"));
    assert!(text.contains("must be integers (u32 or i64), got f32"), "{text}");
    let text = embedding.clone().with_padding(4).expect_err("refused").to_string();
    assert_eq!(text, "option padding is 4, expected less than 4, the count");
    let none = Tensor::zeros((2, 0), DType::U32, &CPU).expect("indices");
    assert_eq!(embedding.forward(&none).expect("no indices").dims(), [2, 0, 2]);
}

#[test]
fn what_does_not_fit_is_explained() {
    let lstm = Lstm::new(&Params::new(1, &CPU).scope("rnn"), 3, 4, RecurrentOptions::default());
    let (lstm, x) = (lstm.expect("lstm"), normal_f32("x", &[2, 5, 3]));
    let run = |x: &Tensor, lengths: Option<&[usize]>, state: Option<&LstmState>| -> Error {
        lstm.forward_from(x, lengths, state, &Pass::eval()).map(drop).expect_err("refused")
    };
    let text = run(&normal_f32("x", &[2, 5, 4]), None, None).to_string();
    let expected = "the input of recurrent layer \"rnn\" must have shape [rows, length, 3], got";
    assert!(text.starts_with(expected), "{text}");
    let text = run(&x, Some(&[5]), None).to_string();
    assert!(text.ends_with("must have shape [2], one per row, got [1]"), "{text}");
    let text = run(&x, Some(&[5, 6]), None).to_string();
    assert_eq!(text, "option lengths is 6, expected at most 5, the steps of x");
    let wrong = normal_f32("state", &[1, 3, 4]);
    let text = run(&x, None, Some(&LstmState { hidden: wrong.clone(), cell: wrong })).to_string();
    assert!(text.ends_with("must have shape [1, 2, 4], got [1, 3, 4]"), "{text}");
    let none = RecurrentOptions { layers: 0, ..RecurrentOptions::default() };
    let text = Lstm::new(&Params::new(1, &CPU), 3, 4, none).map(drop).expect_err("no layers");
    assert_eq!(text.to_string(), "option layers is 0, expected at least 1");
}

#[test]
fn nothing_to_read_leaves_the_state() {
    let params = Params::new(1, &CPU);
    let options = RecurrentOptions { bidirectional: true, ..RecurrentOptions::default() };
    let gru = Gru::new(&params, 3, 4, options).expect("gru");
    let state = normal_f32("state", &[2, 2, 4]);
    let x = Tensor::zeros((2, 0, 3), DType::F32, &CPU).expect("x");
    let (y, last) = gru.forward_from(&x, None, Some(&state), &Pass::eval()).expect("forward");
    assert_eq!(y.dims(), [2, 0, 8]);
    assert_eq!(bits(&last), bits(&state));
    let x = Tensor::zeros((0, 5, 3), DType::F32, &CPU).expect("x");
    let y = gru.forward(&x, &Pass::train(1, 1)).expect("forward");
    assert_eq!(y.dims(), [0, 5, 8]);
    y.sum_all().and_then(|loss| loss.backward()).expect("backward");
}

/// Outputs and all gradients, at sizes that get split.
fn digest() -> Vec<u32> {
    let params = Params::new(5, &CPU);
    let embedding = Embedding::new(&params.scope("table"), 3000, 24).expect("embedding");
    let options = RecurrentOptions { bidirectional: true, ..RecurrentOptions::default() };
    let lstm = Lstm::new(&params.scope("lstm"), 24, 130, options).expect("lstm");
    let gru = Gru::new(&params.scope("gru"), 260, 70, RecurrentOptions::default()).expect("gru");
    let indices: Vec<u32> = (0..300 * 5).map(|at: u32| at * at % 2999 % 700).collect();
    let indices = Tensor::from_vec(indices, (300, 5), &CPU).expect("indices");
    let pass = Pass::train(1, 1);
    let x = embedding.forward(&indices).expect("embedding");
    let y = lstm.forward(&x, &pass).and_then(|y| gru.forward(&y, &pass)).expect("forward");
    let loss = (&y * normal_f32("weights", y.dims())).and_then(|y| y.sum_all()).expect("loss");
    let mut gradients = Gradients::zeros(&params);
    gradients.backward(&loss, 1.0).expect("backward");
    assert!(gradients.missing().is_empty());
    let mut all = bits(&y);
    all.extend(gradients.values().iter().map(|value| value.to_bits()));
    all
}

#[test]
fn bits_do_not_depend_on_the_threads() {
    let with = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("pool");
        pool.install(digest)
    };
    let one = with(1);
    for threads in [2, 3] {
        assert!(one == with(threads), "1 thread and {threads}");
    }
}
