//! INV-THREADS: the bits of a result do not depend on the number of threads.
//!
//! Candle's matrix products read their number of threads from the environment, so the test runs
//! this binary again, once per number, and compares the digests that the children print.

use crate::{bits, normal_f32};
use candle_core::Tensor;
use mobula_nn::models::{CnnOptions, MlpOptions};
use mobula_nn::{Model, ModelSpec, Pass, Precision, loss};
use std::process::Command;

const CHILD: &str = "MOBULA_NN_TEST_DIGEST";
const MARK: &str = "digest=";

#[test]
fn bits_do_not_depend_on_the_number_of_threads() {
    if std::env::var_os(CHILD).is_some() {
        println!("{MARK}{:016x}", digest());
        return;
    }
    let one = digest_with("1");
    for threads in ["2", "3", "8"] {
        assert_eq!(one, digest_with(threads), "1 thread and {threads}");
    }
}

fn digest_with(threads: &str) -> String {
    let test = "threads::bits_do_not_depend_on_the_number_of_threads";
    let mut child = Command::new(std::env::current_exe().expect("this binary"));
    child.args(["--exact", test, "--nocapture"]);
    let output = child.env(CHILD, "1").env("RAYON_NUM_THREADS", threads).output().expect("run");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let digest = text.lines().find_map(|line| line.split(MARK).nth(1));
    digest.unwrap_or_else(|| panic!("no digest in {text:?}")).to_owned()
}

/// Over the outputs, the loss and every gradient of both models in both precisions, at sizes that
/// get split.
fn digest() -> u64 {
    let mlp =
        ModelSpec::new("mlp", &MlpOptions { dropout: 0.2, ..MlpOptions::new(784, [300, 200], 10) });
    let cnn = ModelSpec::new("cnn", &CnnOptions { dropout: 0.2, ..CnnOptions::default() });
    let (mlp, cnn) = (mlp.expect("mlp"), cnn.expect("cnn"));
    let [f32, bf16] = [Precision::F32, Precision::Bf16]
        .map(|p| [step(&mlp, 1, p), step(&mlp, 33, p), step(&mlp, 256, p), step(&cnn, 20, p)]);
    let all = [f32, bf16].concat().concat();
    all.iter().fold(0xcbf2_9ce4_8422_2325, |hash: u64, bits| {
        (hash ^ u64::from(*bits)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

fn step(spec: &ModelSpec, rows: usize, precision: Precision) -> Vec<u32> {
    let model = Model::build(spec, 5, &crate::CPU).expect("model");
    let x = normal_f32("x", &[rows, 784]);
    let labels: Vec<u32> = (0..rows as u32).map(|row| row % 10).collect();
    let labels = Tensor::new(labels, &crate::CPU).expect("labels");
    let logits = model.forward(&x, &Pass::train(5, 1).with_precision(precision)).expect("forward");
    let loss = loss::cross_entropy(&logits, &labels).expect("loss");
    let gradients = loss.backward().expect("backward");
    let mut all = [bits(&logits), bits(&loss)].concat();
    for (_, var) in model.params().vars() {
        all.extend(bits(gradients.get(&var).expect("gradient")));
    }
    all
}
