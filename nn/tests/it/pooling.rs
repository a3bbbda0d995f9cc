//! Pooling against its definition, and its gradients.

use crate::{CPU, bits, normal, normal_f32};
use candle_core::{DType, Tensor, Var};
use mobula_nn::layers::{
    PoolOptions, adaptive_avg_pool1d, adaptive_avg_pool2d, avg_pool1d, avg_pool2d, global_avg_pool,
    max_pool1d, max_pool2d,
};
use mobula_nn::{Error, Result, gradcheck};

fn var(shape: &[usize]) -> (String, Var) {
    ("x".to_owned(), Var::from_tensor(&normal("x", shape)).expect("var"))
}

fn options(kernel: usize, stride: usize, padding: usize) -> PoolOptions {
    PoolOptions { stride, padding, ..PoolOptions::new(kernel) }
}

fn values(tensor: &Tensor) -> Vec<f64> {
    tensor.flatten_all().and_then(|t| t.to_vec1()).expect("f64")
}

/// One plane by definition: `f` is given the pixels of each window, and how many it has with those
/// outside.
fn reference(plane: &[Vec<f64>], options: PoolOptions, f: fn(&[f64], f64) -> f64) -> Vec<f64> {
    let PoolOptions { kernel, stride, padding, .. } = options;
    let (h, w) = (plane.len(), plane[0].len());
    let out = |size: usize| (size + 2 * padding - kernel) / stride + 1;
    let mut all = Vec::new();
    for (oy, ox) in (0..out(h)).flat_map(|oy| (0..out(w)).map(move |ox| (oy, ox))) {
        let mut window = Vec::new();
        for (ky, kx) in (0..kernel).flat_map(|ky| (0..kernel).map(move |kx| (ky, kx))) {
            let row = plane.get((oy * stride + ky).wrapping_sub(padding));
            window.extend(row.and_then(|row| row.get((ox * stride + kx).wrapping_sub(padding))));
        }
        all.push(f(&window, (kernel * kernel) as f64));
    }
    all
}

const SHAPES: [[usize; 4]; 3] = [[2, 3, 7, 5], [1, 1, 3, 8], [3, 2, 9, 9]];

fn all_options() -> [PoolOptions; 7] {
    [
        options(1, 1, 0),
        options(2, 2, 0),
        options(3, 3, 0),
        options(3, 2, 1),
        options(3, 1, 1),
        options(2, 3, 1),
        options(1, 2, 0),
    ]
}

#[test]
fn windows_are_where_they_should_be() {
    let max: fn(&[f64], f64) -> f64 = |window, _| window.iter().copied().fold(f64::MIN, f64::max);
    let padded: fn(&[f64], f64) -> f64 = |window, count| window.iter().sum::<f64>() / count;
    let within: fn(&[f64], f64) -> f64 =
        |window, _| window.iter().sum::<f64>() / window.len() as f64;
    for (shape, options) in SHAPES.into_iter().flat_map(|s| all_options().map(|o| (s, o))) {
        let x = normal("x", &shape);
        let planes = x.flatten(0, 1).and_then(|x| x.to_vec3()).expect("planes");
        let expected = |f| -> Vec<f64> {
            planes.iter().flat_map(|plane| reference(plane, options, f)).collect()
        };
        assert_eq!(values(&max_pool2d(&x, options).expect("max")), expected(max));
        let unpadded = PoolOptions { count_include_pad: false, ..options };
        for (options, f) in [(options, padded), (unpadded, within)] {
            let averages = values(&avg_pool2d(&x, options).expect("average"));
            let expected = expected(f);
            assert_eq!(averages.len(), expected.len());
            for (got, expected) in averages.iter().zip(expected) {
                assert!((got - expected).abs() < 1e-14, "{options:?} {got} {expected}");
            }
        }
        // What is averaged over matters exactly where a window stands out.
        let differ = expected(padded) != expected(within);
        assert_eq!(differ, options.padding > 0);
    }
}

#[test]
fn gradients() {
    for shape in SHAPES {
        let vars = [var(&shape)];
        let x = &vars[0].1;
        for options in all_options() {
            gradcheck::check(&vars, || max_pool2d(x, options)).expect("max");
            gradcheck::check(&vars, || avg_pool2d(x, options)).expect("average");
            let options = PoolOptions { count_include_pad: false, ..options };
            gradcheck::check(&vars, || avg_pool2d(x, options)).expect("average");
        }
        for out in [[1, 1], [2, 3], [4, 4], [shape[2], shape[3] + 2]] {
            gradcheck::check(&vars, || adaptive_avg_pool2d(x, out)).expect("adaptive");
        }
        gradcheck::check(&vars, || global_avg_pool(x)).expect("global");
        let across = || max_pool2d(&x.transpose(2, 3)?, options(3, 2, 1));
        gradcheck::check(&vars, across).expect("not contiguous");
        gradcheck::check(&vars, || avg_pool2d(&x.transpose(1, 3)?, 1)).expect("not contiguous");
    }
    let vars = [var(&[2, 3, 9])];
    let x = &vars[0].1;
    for options in all_options() {
        gradcheck::check(&vars, || max_pool1d(x, options)).expect("max");
        gradcheck::check(&vars, || avg_pool1d(x, options)).expect("average");
    }
    gradcheck::check(&vars, || adaptive_avg_pool1d(x, 4)).expect("adaptive");
    gradcheck::check(&vars, || global_avg_pool(x)).expect("global");
    // One after the other, where gradients go past candle.
    gradcheck::check(&vars, || avg_pool1d(&max_pool1d(x, options(3, 1, 1))?, 2)).expect("chain");
}

/// Known numbers of PyTorch's `adaptive_avg_pool1d`: windows 0–2, 1–4, 3–5.
#[test]
fn adaptive_windows_are_pytorchs() {
    let x = Tensor::new(&[[[1f64, 2.0, 3.0, 4.0, 5.0]]], &CPU).expect("tensor");
    assert_eq!(values(&adaptive_avg_pool1d(&x, 3).expect("average")), [1.5, 3.0, 4.5]);
    let x = normal("x", &[2, 3, 6, 8]);
    let even = avg_pool2d(&x, 2).expect("average");
    assert_eq!(values(&adaptive_avg_pool2d(&x, [3, 4]).expect("average")), values(&even));
    let mean = x.mean((2, 3)).expect("mean");
    for y in [global_avg_pool(&x), adaptive_avg_pool2d(&x, [1, 1])] {
        let y = y.expect("average");
        for (got, expected) in values(&y).into_iter().zip(values(&mean)) {
            assert!((got - expected).abs() < 1e-14);
        }
    }
    assert_eq!(global_avg_pool(&x).expect("average").dims(), [2, 3]);
}

/// Along one axis as along an image of one row.
#[test]
fn sequences_are_images_of_one_row() {
    let x = normal("x", &[2, 3, 11]);
    let image = x.unsqueeze(2).expect("image");
    for kernel in [2, 3] {
        let max = max_pool1d(&x, kernel).expect("max");
        assert_eq!(max.dims(), [2, 3, 11 / kernel]);
        let tall = image.broadcast_as((2, 3, kernel, 11)).expect("copies");
        assert_eq!(values(&max), values(&max_pool2d(&tall, kernel).expect("max")));
        let average = avg_pool1d(&x, kernel).expect("average");
        let of_copies = values(&avg_pool2d(&tall, kernel).expect("average"));
        for (got, expected) in values(&average).into_iter().zip(of_copies) {
            assert!((got - expected).abs() < 1e-14);
        }
    }
}

#[test]
fn ties_go_to_the_first_and_a_nan_is_not_hidden() {
    let x = Var::new(&[[[1f32, 1.0, 1.0, 0.0]]], &CPU).expect("var");
    let y = max_pool1d(&x, options(3, 1, 1)).expect("max");
    let gradients = y.sum_all().expect("sum").backward().expect("backward");
    let gradient = gradients.get(&x).expect("gradient").flatten_all().expect("flat");
    assert_eq!(gradient.to_vec1::<f32>().expect("values"), [2.0, 1.0, 1.0, 0.0]);
    let x = Tensor::new(&[[[1f32, f32::NAN, 2.0, f32::NEG_INFINITY]]], &CPU).expect("tensor");
    let y: Vec<f32> = max_pool1d(&x, options(2, 1, 0))
        .expect("max")
        .flatten_all()
        .and_then(|y| y.to_vec1())
        .expect("values");
    assert!(y[0].is_nan() && y[1].is_nan() && y[2] == 2.0);
    let nothing = Tensor::full(f32::NEG_INFINITY, (1, 1, 4), &CPU).expect("tensor");
    let y = max_pool1d(&nothing, options(3, 1, 1))
        .expect("max")
        .sum_all()
        .and_then(|y| y.to_scalar::<f32>());
    assert_eq!(y.expect("sum"), f32::NEG_INFINITY);
}

#[test]
fn no_rows_give_no_rows() {
    let x = Var::zeros((0, 3, 5, 5), DType::F32, &CPU).expect("var");
    let pooled: [Result<Tensor>; 4] = [
        max_pool2d(&x, 2),
        max_pool2d(&x, options(3, 2, 1)),
        avg_pool2d(&x, 2),
        adaptive_avg_pool2d(&x, [2, 2]),
    ];
    for y in pooled {
        let y = y.expect("pooling");
        assert_eq!(y.dims()[..2], [0, 3]);
        let gradients = y.sum_all().expect("sum").backward().expect("backward");
        assert_eq!(gradients.get(&x).expect("gradient").dims(), [0, 3, 5, 5]);
    }
}

#[test]
fn what_does_not_fit_is_named() {
    let (image, sequence) = (normal("x", &[1, 2, 4, 5]), normal("x", &[1, 2, 3]));
    let text = |result: Result<Tensor>| result.expect_err("refused").to_string();
    let message = text(max_pool2d(&image, 5));
    assert_eq!(
        message,
        "the input of max_pool2d must have shape [rows, channels, height, width] with a 5×5 window in it, got [1, 2, 4, 5]"
    );
    assert!(text(avg_pool2d(&sequence, 2)).contains("avg_pool2d"));
    assert!(
        text(max_pool1d(&image, 2)).contains("max_pool1d must have shape [rows, channels, length]")
    );
    assert!(text(avg_pool1d(&sequence, 4)).contains("a window of 4"));
    assert!(text(adaptive_avg_pool2d(&image, [0, 1])).contains("adaptive_avg_pool2d"));
    assert!(text(adaptive_avg_pool1d(&image, 1)).contains("adaptive_avg_pool1d"));
    assert!(text(global_avg_pool(&normal("x", &[1, 2]))).contains("global_avg_pool"));
    assert_eq!(text(max_pool2d(&image, 0)), "option kernel is 0, expected at least 1");
    assert_eq!(
        text(max_pool2d(&image, options(2, 0, 0))),
        "option stride is 0, expected at least 1"
    );
    let message = text(avg_pool2d(&image, options(3, 1, 2)));
    assert_eq!(message, "option padding is 2, expected half of the kernel, 1, at most");
    let bytes = image.to_dtype(DType::U8).expect("cast");
    assert!(matches!(max_pool2d(&bytes, 2), Err(Error::Tensor(_))));
}

#[test]
fn bits_do_not_depend_on_the_number_of_threads() {
    let image = normal_f32("x", &[5, 7, 61, 67]);
    crate::assert_same_in_every_pool(|| {
        let x = Var::from_tensor(&image).expect("var");
        let mut all = Vec::new();
        for y in [
            max_pool2d(&x, 2),
            max_pool2d(&x, options(3, 2, 1)),
            avg_pool2d(&x, options(5, 1, 2)),
            global_avg_pool(&x),
        ] {
            let y = y.expect("pooling");
            let gradients = y.sqr().and_then(|y| y.sum_all()?.backward()).expect("backward");
            all.extend([bits(&y), bits(gradients.get(&x).expect("gradient"))].concat());
        }
        all
    });
}
