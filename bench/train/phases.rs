//! Where the time of a training step goes, by itself and on one device.

use anyhow::Result;
use candle_core::Device;
use mobula_bench::{Fixture, SEED, case, optimizer};
use mobula_nn::{Gradients, Pass, loss};
use mobula_train::Updater;
use std::path::Path;
use std::time::Instant;

const STEPS: usize = 30;

/// Prints the median milliseconds of each phase. The device is waited for at the end of each.
pub(super) fn phases(model: &str, fixture: &Path, device: &str) -> Result<()> {
    let device = match device {
        "cuda" => Device::new_cuda_with_stream(0)?,
        _ => Device::Cpu,
    };
    let case = case(model)?;
    let Fixture { weights, batches } = case.read_fixture(fixture)?;
    let model = case.model(&device)?;
    model.params().load_tensors("the fixture", &weights)?;
    let mut gradients = Gradients::zeros(model.params());
    gradients.stay_elsewhere(true);
    let mut updater = Updater::new(optimizer()?);
    let mut times: [Vec<f64>; 4] = Default::default();
    for step in 0..STEPS {
        let batch = batches[step % batches.len()].to_device(&device)?;
        let mut start = Instant::now();
        let mut ended = |phase: usize| -> Result<()> {
            device.synchronize()?;
            times[phase].push(start.elapsed().as_secs_f64() * 1e3);
            start = Instant::now();
            Ok(())
        };
        let pass = Pass::train(SEED, step as u64);
        let loss = loss::cross_entropy(&model.forward(batch.get("x")?, &pass)?, batch.get("y")?)?;
        ended(0)?;
        let _ = loss.backward()?;
        ended(1)?;
        gradients.backward(&loss, 1.0)?;
        ended(2)?;
        updater.step(model.params(), &mut gradients)?;
        ended(3)?;
    }
    let names = ["forward", "candle's backward pass", "backward pass", "update"];
    for (name, times) in names.iter().zip(&mut times) {
        times.sort_by(f64::total_cmp);
        println!("{name}: {:.2} ms", times[STEPS / 2]);
    }
    Ok(())
}
