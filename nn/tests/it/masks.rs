//! Dropout: rates, scale, and masks that do not depend on how the rows are split.

use crate::{CPU, MLP, bits, build, normal_f32};
use candle_core::{DType, Tensor};
use mobula_core::random::Stream;
use mobula_nn::layers::Dropout;
use mobula_nn::{Error, Module, Params, Pass};
use proptest::prelude::*;

fn layer(name: &str, rate: f64) -> Dropout {
    Dropout::new(&Params::new(0, &CPU).scope(name), rate).expect("layer")
}

/// What the layer makes of ones: 0 or the scale.
fn mask(layer: &Dropout, rows: usize, features: usize, pass: Pass) -> Tensor {
    let ones = Tensor::ones((rows, features), DType::F32, &CPU).expect("ones");
    layer.forward(&ones, &pass).expect("forward")
}

fn values(mask: &Tensor) -> Vec<f32> {
    mask.flatten_all().expect("flat").to_vec1().expect("values")
}

#[test]
fn keeps_the_right_share_at_the_right_scale() {
    for rate in [0.1, 0.5, 0.9] {
        let values = values(&mask(&layer("d", rate), 200, 501, Pass::train(1, 1)));
        let scale = (1.0 / (1.0 - rate)) as f32;
        assert!(values.iter().all(|v| *v == 0.0 || *v == scale));
        let kept = values.iter().filter(|v| **v != 0.0).count() as f64 / values.len() as f64;
        let error = 5.0 * (rate * (1.0 - rate) / values.len() as f64).sqrt();
        assert!((kept - (1.0 - rate)).abs() < error, "rate {rate}: kept {kept}");
    }
}

#[test]
fn depends_on_seed_step_name_row_and_feature() {
    let d = layer("d", 0.5);
    let first = bits(&mask(&d, 4, 33, Pass::train(1, 1)));
    assert_eq!(first, bits(&mask(&d, 4, 33, Pass::train(1, 1))));
    assert_ne!(first, bits(&mask(&d, 4, 33, Pass::train(2, 1))));
    assert_ne!(first, bits(&mask(&d, 4, 33, Pass::train(1, 2))));
    assert_ne!(first, bits(&mask(&d, 4, 33, Pass::train(1, 1 + (1 << 32)))));
    assert_ne!(first, bits(&mask(&layer("e", 0.5), 4, 33, Pass::train(1, 1))));
    for row in 1..4 {
        assert_ne!(first[..33], first[33 * row..33 * (row + 1)]);
    }
    let columns = |feature: usize| (0..4).map(|row| first[33 * row + feature]).collect::<Vec<_>>();
    assert!((1..33).any(|feature| columns(feature) != columns(0)));
}

/// A kernel elsewhere may rely on it: word `feature` of `Stream::at(step, row)`. So many features
/// that some are drawn many at a time and some are not.
#[test]
fn draws_the_documented_words() {
    const FEATURES: usize = 150;
    let mask = values(&mask(&layer("d", 0.3), 3, FEATURES, Pass::train(9, 4).with_row_offset(7)));
    for row in 0..3u32 {
        let mut draws = Stream::new(9, "dropout d").at(4, 7 + row);
        for feature in 0..FEATURES {
            let keep = f64::from(draws.word()) / 2f64.powi(32) >= 0.3;
            assert_eq!(mask[row as usize * FEATURES + feature] != 0.0, keep);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// INV-SPLIT: the masks of a batch are the masks of its parts, wherever it is cut.
    #[test]
    fn masks_do_not_depend_on_the_split(
        rows in 2usize..40, features in 1usize..40, offset in 0u64..1000, at in 0.0..1.0f64,
    ) {
        let d = layer("d", 0.4);
        let cut = ((rows as f64 * at) as usize).clamp(1, rows - 1);
        let pass = |from: usize| Pass::train(3, 8).with_row_offset(offset + from as u64);
        let whole = bits(&mask(&d, rows, features, pass(0)));
        let mut parts = bits(&mask(&d, cut, features, pass(0)));
        parts.extend(bits(&mask(&d, rows - cut, features, pass(cut))));
        prop_assert_eq!(whole, parts);
    }
}

/// Enough rows that the kernel splits them between threads.
#[test]
fn large_masks_equal_small_ones() {
    let d = layer("d", 0.4);
    let whole = bits(&mask(&d, 300, 1000, Pass::train(3, 8)));
    for row in [0, 1, 150, 299] {
        let one = bits(&mask(&d, 1, 1000, Pass::train(3, 8).with_row_offset(row as u64)));
        assert_eq!(whole[row * 1000..(row + 1) * 1000], one);
    }
}

#[test]
fn the_identity_in_evaluation_and_at_rate_0() {
    let x = normal_f32("x", &[3, 4]);
    let y = layer("d", 0.5).forward(&x, &Pass::eval().with_row_offset(3)).expect("forward");
    assert_eq!(bits(&x), bits(&y));
    let y = layer("d", 0.0).forward(&x, &Pass::train(1, 1)).expect("forward");
    assert_eq!(bits(&x), bits(&y));
}

#[test]
fn rates_that_make_no_sense_are_refused() {
    for rate in [-0.1, 1.0, 2.0, f64::NAN] {
        let refused = Dropout::new(&Params::new(0, &CPU), rate);
        assert!(matches!(refused, Err(Error::Option { option: "dropout", .. })), "{rate}");
    }
}

#[test]
fn works_on_any_rank_and_on_no_rows() {
    let d = layer("d", 0.5);
    let flat = normal_f32("x", &[2, 12]);
    let deep = flat.reshape((2, 3, 4)).expect("reshape");
    let pass = Pass::train(1, 1);
    let (flat, deep) = (d.forward(&flat, &pass), d.forward(&deep, &pass));
    assert_eq!(bits(&flat.expect("flat")), bits(&deep.expect("deep")));
    assert_eq!(mask(&d, 0, 5, pass).dims(), [0, 5]);
}

/// The layers of one model drop different features, and steps differ.
#[test]
fn a_model_repeats_a_step_and_changes_the_next() {
    let model = build(MLP).expect("model");
    let x = normal_f32("x", &[8, 6]);
    let at = |step| bits(&model.forward(&x, &Pass::train(1, step)).expect("forward"));
    assert_eq!(at(3), at(3));
    assert_ne!(at(3), at(4));
}
