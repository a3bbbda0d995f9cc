//! Every loss: its value by definition, its gradients by finite differences, its weights.

use crate::{CPU, bits, normal, normal_f32};
use candle_core::{D, DType, Tensor, Var};
use mobula_nn::loss::{self, CrossEntropyOptions, LossSum};
use mobula_nn::{Error, Result, gradcheck};

fn var(purpose: &str, shape: &[usize]) -> (String, Var) {
    (purpose.to_owned(), Var::from_tensor(&normal(purpose, shape)).expect("var"))
}

/// Probabilities in the last axis.
fn distributions(purpose: &str, shape: &[usize]) -> Tensor {
    log_softmax(&normal(purpose, shape)).exp().expect("exp")
}

fn log_softmax(x: &Tensor) -> Tensor {
    let sum = x.exp().and_then(|x| x.sum_keepdim(D::Minus1)?.log()).expect("sum");
    x.broadcast_sub(&sum).expect("softmax")
}

fn values(tensor: &Tensor) -> Vec<f64> {
    let tensor = tensor.to_dtype(DType::F64).and_then(|t| t.flatten_all()?.to_vec1());
    tensor.expect("values")
}

fn scalar(tensor: &Tensor) -> f64 {
    values(tensor)[0]
}

fn mean(loss: Result<LossSum>) -> f64 {
    scalar(&loss.and_then(|loss| loss.mean()).expect("loss"))
}

#[track_caller]
fn assert_close(got: f64, expected: f64) {
    assert!((got - expected).abs() < 1e-12 * expected.abs().max(1.0), "{got} {expected}");
}

type Loss = fn(&Tensor, &Tensor, Option<&Tensor>) -> Result<LossSum>;
type Definition = fn(f64, f64) -> f64;

/// The losses of numbers, and their definitions.
const POINTWISE: [(Loss, Definition); 5] = [
    (loss::mse_sum, |x, t| (x - t).powi(2)),
    (loss::l1_sum, |x, t| (x - t).abs()),
    (|x, t, w| loss::huber_sum(x, t, 0.7, w), |x, t| huber(x - t, 0.7)),
    (|x, t, w| loss::smooth_l1_sum(x, t, 0.4, w), |x, t| huber(x - t, 0.4) / 0.4),
    (|x, t, w| loss::bce_with_logits_sum(x, t, None, w), |x, t| bce(x, t, 1.0)),
];

fn huber(d: f64, delta: f64) -> f64 {
    if d.abs() <= delta { d * d / 2.0 } else { delta * (d.abs() - delta / 2.0) }
}

fn bce(x: f64, t: f64, positive: f64) -> f64 {
    let p = 1.0 / (1.0 + (-x).exp());
    -(positive * t * p.ln() + (1.0 - t) * (1.0 - p).ln())
}

#[test]
fn losses_of_numbers_are_what_they_say() {
    // More than a task's worth, and no multiple of a block.
    for shape in [vec![1], vec![3, 5, 7], vec![211, 97]] {
        let (x, t) = (normal("x", &shape), normal("t", &shape));
        let weights = normal("w", &shape[..1]).abs().expect("abs");
        let per_row = x.elem_count() / shape[0];
        let w: Vec<f64> = values(&weights).into_iter().flat_map(|w| vec![w; per_row]).collect();
        for (at, (loss, definition)) in POINTWISE.into_iter().enumerate() {
            let each = values(&x).into_iter().zip(values(&t)).map(|(x, t)| definition(x, t));
            let each: Vec<f64> = each.collect();
            let n = each.len() as f64;
            assert_close(mean(loss(&x, &t, None)), each.iter().sum::<f64>() / n);
            let sum: f64 = each.iter().zip(&w).map(|(loss, w)| loss * w).sum();
            let weighted = loss(&x, &t, Some(&weights)).expect("loss");
            assert_close(scalar(&weighted.sum), sum);
            assert_close(weighted.weight, w.iter().sum());
            let [x, t] = [&x, &t].map(|x| x.to_dtype(DType::F32).expect("f32"));
            let single = mean(loss(&x, &t, None));
            let error = (single - each.iter().sum::<f64>() / n).abs();
            assert!(error < 1e-6 * single.abs().max(1.0), "{at} {error}");
        }
    }
}

#[test]
fn gradients_of_losses_of_numbers() {
    for shape in [vec![1], vec![3, 5], vec![2, 3, 7]] {
        let vars = [var("x", &shape), var("t", &shape)];
        let (x, t) = (&vars[0].1, &vars[1].1);
        let weights = normal("w", &shape[..1]);
        for (loss, _) in POINTWISE {
            gradcheck::check(&vars, || loss(x, t, None)?.mean()).expect("gradients");
            gradcheck::check(&vars, || Ok(loss(x, t, Some(&weights))?.sum)).expect("gradients");
        }
        let classes = &shape[shape.len() - 1..];
        let positive = normal("p", classes).exp().expect("exp");
        let with = || Ok(loss::bce_with_logits_sum(x, t, Some(&positive), None)?.sum);
        gradcheck::check(&vars, with).expect("pos_weight");
    }
}

#[test]
fn operands_need_not_be_contiguous() {
    let vars = [var("x", &[5, 3]), var("t", &[5, 3])];
    let [x, t] = [&vars[0].1, &vars[1].1].map(|x| x.t().expect("view"));
    for (loss, _) in POINTWISE {
        let copies = loss(&x.contiguous().expect("copy"), &t.contiguous().expect("copy"), None);
        assert_eq!(mean(loss(&x, &t, None)), mean(copies));
        gradcheck::check(&vars, || loss(&vars[0].1.t()?, &vars[1].1.t()?, None)?.mean())
            .expect("views");
    }
    let (labels, (_, x)) = (Tensor::new(&[1u32, 0, 4], &CPU).expect("labels"), vars[0].clone());
    gradcheck::check(&[vars[0].clone()], || loss::cross_entropy(&x.t()?, &labels)).expect("view");
}

#[test]
fn where_they_are_equal_the_slope_is_0() {
    let x = Var::new(&[1f64, 2.0], &CPU).expect("var");
    for (loss, _) in &POINTWISE[..4] {
        let sum = loss(&x, &x.detach(), None).expect("loss").sum;
        let gradients = sum.backward().expect("backward");
        assert_eq!(values(gradients.get(&x).expect("gradient")), [0.0, 0.0]);
    }
}

/// Examples of each class count what `pos_weight` says, and what is sure stays finite.
#[test]
fn binary_cross_entropy_weighs_positives_and_takes_extremes() {
    let (x, t) = (normal("x", &[4, 3]), distributions("t", &[4, 3]));
    let positive = Tensor::new(&[0.5f64, 1.0, 4.0], &CPU).expect("weights");
    let expected: f64 = values(&x)
        .into_iter()
        .zip(values(&t))
        .zip([0.5, 1.0, 4.0].into_iter().cycle())
        .map(|((x, t), p)| bce(x, t, p))
        .sum();
    let loss = loss::bce_with_logits_sum(&x, &t, Some(&positive), None).expect("loss");
    assert_close(scalar(&loss.sum), expected);
    assert_eq!(loss.weight, 12.0);
    let x = Var::new(&[300f32, -300.0, 20.0, -20.0], &CPU).expect("var");
    let t = Tensor::new(&[0f32, 1.0, 1.0, 0.0], &CPU).expect("targets");
    let loss = loss::bce_with_logits_sum(&x, &t, None, None).expect("loss").sum;
    assert_eq!(scalar(&loss), 600.0);
    let gradient = loss.backward().expect("backward").get(&x).expect("gradient").clone();
    let sure = (-20f64).exp();
    for (got, expected) in values(&gradient).into_iter().zip([1.0, -1.0, -sure, sure]) {
        assert!((got - expected).abs() < 1e-6 * expected.abs(), "{got} {expected}");
    }
}

#[test]
fn divergence_is_0_between_equals_and_takes_zeros() {
    let p = distributions("p", &[4, 3]);
    let log_q = log_softmax(&normal("q", &[4, 3]));
    let each = values(&p).into_iter().zip(values(&log_q)).map(|(p, q)| p * (p.ln() - q));
    assert_close(scalar(&loss::kl_div(&log_q, &p).expect("loss")), each.sum::<f64>() / 4.0);
    assert!(scalar(&loss::kl_div(&p.log().expect("log"), &p).expect("loss")).abs() < 1e-15);
    let certain = Tensor::new(&[[0f64, 1.0]], &CPU).expect("p");
    let log_q = Tensor::new(&[[f64::NEG_INFINITY, -2.0]], &CPU).expect("q");
    assert_close(scalar(&loss::kl_div(&log_q, &certain).expect("loss")), 2.0);
    let x = var("q", &[2, 3, 5]);
    let p = ("p".to_owned(), Var::from_tensor(&distributions("p", &[2, 3, 5])).expect("var"));
    let weights = normal("w", &[2, 3]).abs().expect("abs");
    let vars = [x, p];
    let kl = || loss::kl_div_sum(&vars[0].1, &vars[1].1, Some(&weights));
    gradcheck::check(&vars, || Ok(kl()?.sum)).expect("gradients");
    assert_close(kl().expect("loss").weight, values(&weights).into_iter().sum());
}

/// PyTorch's definition, row by row.
fn reference(
    logits: &Tensor,
    labels: &[i64],
    weights: &[f64],
    options: &CrossEntropyOptions,
) -> f64 {
    let log = log_softmax(logits);
    let classes = log.dim(D::Minus1).expect("classes");
    let log = values(&log);
    let class_weights = options.class_weights.clone().unwrap_or(vec![1.0; classes]);
    let (mut sum, mut weight) = (0.0, 0.0);
    for ((log, label), w) in log.chunks(classes).zip(labels).zip(weights) {
        if Some(*label) == options.ignored_label {
            continue;
        }
        let label = *label as usize;
        let all: f64 = log.iter().zip(&class_weights).map(|(log, w)| -log * w).sum();
        let e = options.label_smoothing;
        sum += w * (-log[label] * class_weights[label] * (1.0 - e) + all * e / classes as f64);
        weight += w * class_weights[label];
    }
    sum / weight
}

#[test]
fn cross_entropy_takes_options_as_pytorch_does() {
    let logits = var("logits", &[2, 4, 3]);
    let weights = normal("w", &[2, 4]).abs().expect("abs");
    let w = values(&weights);
    let numbers = [0i64, 2, -100, 1, 1, -100, 0, 2];
    let labels = Tensor::from_slice(&numbers, (2, 4), &CPU).expect("labels");
    for (label_smoothing, class_weights) in [
        (0.0, None),
        (0.2, None),
        (0.0, Some(vec![1.0, 0.0, 2.5])),
        (1.0, Some(vec![0.5, 3.0, 1.0])),
    ] {
        let options =
            CrossEntropyOptions { label_smoothing, class_weights, ignored_label: Some(-100) };
        let ours = || loss::cross_entropy_with(&logits.1, &labels, Some(&weights), &options);
        assert_close(mean(ours()), reference(&logits.1, &numbers, &w, &options));
        let plain = loss::cross_entropy_with(&logits.1, &labels, None, &options);
        assert_close(mean(plain), reference(&logits.1, &numbers, &[1.0; 8], &options));
        let log = log_softmax(&logits.1);
        assert_close(mean(loss::nll_with(&log, &labels, Some(&weights), &options)), mean(ours()));
        let vars = [logits.clone()];
        gradcheck::check(&vars, || ours()?.mean()).expect("gradients");
        let nll = || loss::nll_with(&logits.1, &labels, Some(&weights), &options)?.mean();
        gradcheck::check(&vars, nll).expect("gradients");
        // What would look right with options that do nothing.
        let ignores = CrossEntropyOptions { ignored_label: Some(-100), ..Default::default() };
        let without = reference(&logits.1, &numbers, &w, &ignores);
        let same = (mean(ours()) - without).abs() < 1e-3;
        assert_eq!(same, options == ignores, "{options:?}");
    }
}

/// In `f32`, with a vocabulary, as exact as `f64` for all that `f32` can hold.
#[test]
fn large_vocabularies_in_f32_agree_with_f64() {
    let logits = (normal("logits", &[3, 30_011]) * 4.0).expect("logits");
    let labels = Tensor::new(&[0u32, 30_010, 77], &CPU).expect("labels");
    let options = CrossEntropyOptions { label_smoothing: 0.1, ..Default::default() };
    let step = |dtype| {
        let x = Var::from_tensor(
            &logits.to_dtype(DType::F32).and_then(|x| x.to_dtype(dtype)).expect("cast"),
        );
        let x = x.expect("var");
        let loss = loss::cross_entropy_with(&x, &labels, None, &options).expect("loss").sum;
        let gradient = loss.backward().expect("backward").get(&x).expect("gradient").clone();
        (scalar(&loss), values(&gradient))
    };
    let ((single, gradient), (double, expected)) = (step(DType::F32), step(DType::F64));
    assert!((single - double).abs() < 2e-7 * double, "{single} {double}");
    for (got, expected) in gradient.iter().zip(&expected) {
        assert!((got - expected).abs() < 1e-6 * expected.abs() + 1e-9, "{got} {expected}");
    }
}

#[test]
fn shares_with_weights_add_up_to_the_whole() {
    let (_, logits) = var("logits", &[7, 3]);
    let labels = Tensor::new(&[0i64, 1, -1, 0, 1, 2, 0], &CPU).expect("labels");
    let options = CrossEntropyOptions {
        class_weights: Some(vec![1.0, 3.0, 0.5]),
        ignored_label: Some(-1),
        label_smoothing: 0.1,
    };
    let share = |from, rows| {
        let (x, y) = (logits.narrow(0, from, rows), labels.narrow(0, from, rows));
        loss::cross_entropy_with(&x.expect("rows"), &y.expect("rows"), None, &options)
            .expect("loss")
    };
    let (a, b, whole) = (share(0, 5), share(5, 2), share(0, 7));
    assert_close(a.weight + b.weight, whole.weight);
    let total = a.weight + b.weight;
    let parts = [a.sum, b.sum].map(|sum| {
        let loss = (sum / total).expect("mean");
        values(loss.backward().expect("backward").get(&logits).expect("gradient"))
    });
    let whole = whole.mean().expect("mean").backward().expect("backward");
    for ((a, b), whole) in
        parts[0].iter().zip(&parts[1]).zip(values(whole.get(&logits).expect("gradient")))
    {
        assert_close(a + b, whole);
    }
}

#[test]
fn rows_that_do_not_count_are_not_looked_at() {
    let x = Var::new(&[[f32::NAN, 0.0], [0.0, 0.0]], &CPU).expect("var");
    let labels = Tensor::new(&[7u32, 1], &CPU).expect("labels");
    let options = CrossEntropyOptions { ignored_label: Some(7), ..Default::default() };
    let loss = loss::cross_entropy_with(&x, &labels, None, &options).expect("loss");
    assert!((scalar(&loss.sum) - 2f64.ln()).abs() < 1e-6);
    let gradients = loss.sum.backward().expect("backward");
    assert_eq!(values(gradients.get(&x).expect("gradient")), [0.0, 0.0, 0.5, -0.5]);
    let none = Tensor::new(&[7u32, 7], &CPU).expect("labels");
    let loss = loss::cross_entropy_with(&x, &none, None, &options).expect("loss");
    assert_eq!((scalar(&loss.sum), loss.weight), (0.0, 0.0));
    assert!(matches!(loss.mean(), Err(Error::EmptyBatch { .. })));
}

#[test]
fn empty_batches_sum_to_0() {
    let x = Var::zeros((0, 3), DType::F32, &CPU).expect("var");
    for (loss, _) in POINTWISE {
        let loss = loss(&x, &x.detach(), None).expect("sum");
        assert_eq!((scalar(&loss.sum), loss.weight), (0.0, 0.0));
        assert!(matches!(loss.mean(), Err(Error::EmptyBatch { .. })));
        let gradients = loss.sum.backward().expect("backward");
        assert_eq!(gradients.get(&x).expect("gradient").dims(), [0, 3]);
    }
    let sum = loss::kl_div_sum(&x, &x.detach(), None).expect("sum");
    assert_eq!(sum.weight, 0.0);
}

#[test]
fn what_does_not_fit_is_named() {
    let (x, short) = (normal("x", &[4, 3]), normal("t", &[4, 2]));
    let text = |result: Result<LossSum>| result.expect_err("refused").to_string();
    let message = text(loss::mse_sum(&x, &short, None));
    assert_eq!(
        message,
        "the target of mse must have shape [4, 3] as the prediction has, got [4, 2]"
    );
    let message = text(loss::l1_sum(&x, &x, Some(&normal("w", &[3]))));
    assert!(message.contains("weights") && message.contains("[4, 3], got [3]"), "{message}");
    let message = text(loss::bce_with_logits_sum(&x, &x, Some(&normal("w", &[4])), None));
    assert!(
        message.contains("pos_weight must have shape the last axes of [4, 3], got [4]"),
        "{message}"
    );
    let learned = Var::from_tensor(&normal("w", &[4])).expect("var");
    let message = text(loss::mse_sum(&x, &x, Some(&learned)));
    assert!(message.contains("detach"), "{message}");
    let message = text(loss::kl_div_sum(&x, &x, Some(&x)));
    assert!(message.contains("weights of kl_div must have shape [4]"), "{message}");
    for delta in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        let message = text(loss::huber_sum(&x, &x, delta, None));
        assert!(message.contains("delta") && message.contains("a positive number"), "{message}");
    }
    let labels = Tensor::new(&[0u32, 1, 2, 3], &CPU).expect("labels");
    let with = |options| text(loss::cross_entropy_with(&x, &labels, None, &options));
    let options = CrossEntropyOptions::default;
    let message = with(CrossEntropyOptions { ignored_label: Some(9), ..options() });
    assert!(message.starts_with("label 3 in row 3 is out of range"), "{message}");
    let message = with(CrossEntropyOptions { label_smoothing: 1.5, ..options() });
    assert_eq!(message, "option label_smoothing is 1.5, expected a number from 0 to 1");
    let labels = Tensor::zeros(4, DType::U32, &CPU).expect("labels");
    let with = |weights: &[f64]| {
        let options = CrossEntropyOptions { class_weights: Some(weights.to_vec()), ..options() };
        text(loss::cross_entropy_with(&x, &labels, None, &options))
    };
    assert!(with(&[1.0]).contains("class_weights must have shape [3]"), "{}", with(&[1.0]));
    assert!(with(&[1.0, -1.0, 0.0]).contains("at least 0"), "{}", with(&[1.0, -1.0, 0.0]));
}

/// In one pool of threads or another.
#[test]
fn bits_do_not_depend_on_the_number_of_threads() {
    let (x, t) = (normal_f32("x", &[211, 391]), normal_f32("t", &[211, 391]));
    let labels: Vec<u32> = (0..211).map(|row| row * 17 % 391).collect();
    let labels = Tensor::new(labels, &CPU).expect("labels");
    let run = || {
        let x = Var::from_tensor(&x).expect("var");
        let mut all = Vec::new();
        let mut losses: Vec<Tensor> =
            POINTWISE.iter().map(|(loss, _)| loss(&x, &t, None).expect("loss").sum).collect();
        losses.push(loss::cross_entropy(&x, &labels).expect("loss"));
        for loss in losses {
            all.extend(bits(&loss));
            all.extend(bits(loss.backward().expect("backward").get(&x).expect("gradient")));
        }
        all
    };
    crate::assert_same_in_every_pool(run);
}
