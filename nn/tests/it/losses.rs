//! Cross-entropy and accuracy: values, extremes, bad labels.

use crate::{CPU, normal, normal_f32};
use candle_core::{D, DType, Tensor, Var};
use mobula_nn::{Error, loss, metrics};

fn labels(labels: &[u32]) -> Tensor {
    Tensor::new(labels, &CPU).expect("labels")
}

fn scalar(tensor: Result<Tensor, Error>) -> f64 {
    tensor.expect("loss").to_dtype(DType::F64).expect("f64").to_scalar().expect("scalar")
}

#[test]
fn agrees_with_the_definition() {
    let logits = normal("logits", &[50, 7]);
    let wanted: Vec<u32> = (0..50).map(|row| row % 7).collect();
    let softmax = logits.exp().expect("exp");
    let softmax =
        softmax.broadcast_div(&softmax.sum_keepdim(D::Minus1).expect("sum")).expect("div");
    let softmax: Vec<Vec<f64>> = softmax.to_vec2().expect("values");
    let losses = softmax.iter().zip(&wanted).map(|(row, label)| -row[*label as usize].ln());
    let expected: f64 = losses.sum();
    assert!((scalar(loss::cross_entropy_sum(&logits, &labels(&wanted))) - expected).abs() < 1e-10);
    let mean = scalar(loss::cross_entropy(&logits, &labels(&wanted)));
    assert!((mean - expected / 50.0).abs() < 1e-12);
}

/// Shares of unequal size, summed and divided by all rows, give the gradient of the whole batch.
#[test]
fn sums_over_uneven_shares_add_up() {
    let logits = Var::from_tensor(&normal_f32("logits", &[7, 3])).expect("var");
    let labels = labels(&[0, 1, 2, 0, 1, 2, 0]);
    let whole = loss::cross_entropy(&logits, &labels).expect("loss").backward().expect("backward");
    let share = |from, rows| {
        let sum = loss::cross_entropy_sum(
            &logits.narrow(0, from, rows).expect("rows"),
            &labels.narrow(0, from, rows).expect("rows"),
        );
        let loss = (sum.expect("loss") / 7.0).expect("mean");
        loss.backward().expect("backward").get(&logits).expect("gradient").clone()
    };
    let parts = (share(0, 5) + share(5, 2)).expect("sum");
    let difference = (parts - whole.get(&logits).expect("gradient")).expect("difference");
    let greatest = difference.abs().and_then(|d| d.max_all()).expect("max");
    assert!(greatest.to_scalar::<f32>().expect("scalar") < 1e-7);
}

#[test]
fn extreme_logits_stay_finite() {
    let logits = Var::new(&[[1e30f32, -1e30, 0.0], [-3e38, -3e38, -3e38]], &CPU).expect("var");
    let loss = loss::cross_entropy(&logits, &labels(&[0, 2])).expect("loss");
    let expected = 3f32.ln() / 2.0;
    assert!((loss.to_scalar::<f32>().expect("scalar") - expected).abs() < 1e-6);
    let gradients = loss.backward().expect("backward");
    let gradient = gradients.get(&logits).expect("gradient").flatten_all().expect("flat");
    assert!(gradient.to_vec1::<f32>().expect("values").iter().all(|g| g.is_finite()));
}

/// Nothing may hide a NaN from the training loop.
#[test]
fn a_nan_comes_through() {
    let logits = Tensor::new(&[[f32::NAN, 0.0], [0.0, 1.0]], &CPU).expect("logits");
    assert!(scalar(loss::cross_entropy(&logits, &labels(&[1, 0]))).is_nan());
}

#[test]
fn a_label_out_of_range_is_named() {
    let logits = normal_f32("logits", &[3, 10]);
    let message = |labels: &Tensor| {
        let of = |result: Result<(), Error>| result.expect_err("out of range").to_string();
        let loss = of(loss::cross_entropy(&logits, labels).map(drop));
        assert_eq!(loss, of(metrics::accuracy(&logits, labels).map(drop)));
        loss
    };
    let text = message(&labels(&[1, 10, 99]));
    assert!(text.starts_with("label 10 in row 1 is out of range"), "{text}");
    assert!(text.contains("10 classes, expected 0 to 9"), "{text}");
    let negative = Tensor::new(&[1i64, 2, -1], &CPU).expect("labels");
    assert!(message(&negative).starts_with("label -1 in row 2"));
}

#[test]
fn labels_of_every_integer_type_agree() {
    let logits = normal_f32("logits", &[3, 10]);
    let labels = labels(&[1, 9, 0]);
    let expected = scalar(loss::cross_entropy(&logits, &labels));
    for dtype in [DType::U8, DType::I64] {
        let labels = labels.to_dtype(dtype).expect("cast");
        assert_eq!(scalar(loss::cross_entropy(&logits, &labels)), expected);
    }
    let floats = labels.to_dtype(DType::F32).expect("cast");
    assert!(matches!(loss::cross_entropy(&logits, &floats), Err(Error::LabelType { got: "f32" })));
}

#[test]
fn shapes_that_do_not_match_are_refused() {
    let logits = normal_f32("logits", &[3, 10]);
    let wrong =
        [(logits.clone(), labels(&[1, 2])), (logits.flatten_all().expect("flat"), labels(&[1]))];
    for (logits, labels) in wrong {
        let refused = matches!(loss::cross_entropy(&logits, &labels), Err(Error::Shape { .. }));
        assert!(refused, "{:?} {:?}", logits.dims(), labels.dims());
    }
}

#[test]
fn an_empty_batch_sums_to_0_and_has_no_mean() {
    let logits = Var::zeros((0, 3), DType::F32, &CPU).expect("var");
    let none = Tensor::zeros(0, DType::U32, &CPU).expect("labels");
    let sum = loss::cross_entropy_sum(&logits, &none).expect("sum");
    assert_eq!(sum.to_scalar::<f32>().expect("scalar"), 0.0);
    let gradients = sum.backward().expect("backward");
    assert_eq!(gradients.get(&logits).expect("gradient").dims(), [0, 3]);
    assert!(matches!(loss::cross_entropy(&logits, &none), Err(Error::EmptyBatch { .. })));
    assert_eq!(metrics::correct(&logits, &none).expect("count"), 0);
    assert!(matches!(metrics::accuracy(&logits, &none), Err(Error::EmptyBatch { .. })));
}

#[test]
fn accuracy_counts_the_first_of_equals() {
    let logits =
        Tensor::new(&[[0f32, 1.0], [1.0, 1.0], [2.0, 1.0], [0.0, 3.0]], &CPU).expect("logits");
    assert_eq!(metrics::correct(&logits, &labels(&[1, 0, 0, 0])).expect("count"), 3);
    assert_eq!(metrics::accuracy(&logits, &labels(&[1, 1, 0, 0])).expect("accuracy"), 0.5);
}
