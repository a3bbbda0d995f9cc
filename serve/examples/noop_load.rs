//! What the server itself costs: a model that does nothing, under 64 keep-alive clients.
//!
//! `cargo run --release -p mobula-serve --example noop_load [REQUESTS] [ROW_SIZE]`

use candle_core::{Device, Tensor};
use mobula_core::{Batch, BoxError, Resources, Runtime};
use mobula_serve::{Datatype, Deployment, LoadTest, Model, ModelMetadata, Server, TensorSpec};
use std::sync::Arc;
use std::time::Duration;

fn main() -> Result<(), BoxError> {
    let mut args = std::env::args().skip(1).map(|arg| arg.parse::<usize>());
    let requests = args.next().transpose()?.unwrap_or(50_000);
    let size = args.next().transpose()?.unwrap_or(64);
    let metadata = ModelMetadata::new("noop")
        .with_input(TensorSpec::new("x", Datatype::Fp32, [size as i64]))
        .with_output(TensorSpec::new("y", Datatype::Fp32, [10]));
    let noop = |batch: &Batch| -> Result<Batch, BoxError> {
        Ok(Batch::new(vec![("y".to_owned(), batch.get("x")?.narrow(1, 0, 10)?)])?)
    };
    let loader = Arc::new(move || Ok(Box::new(noop) as Box<dyn Model>));

    let runtime = Runtime::local(Resources::cpus(2.0))?;
    let server = Server::new(&runtime)
        .deploy(Deployment::new(metadata, loader).with_replicas(2))?
        .bind("127.0.0.1:0")?;
    let row = Tensor::arange(0f32, size as f32, &Device::Cpu)?.reshape((1, size))?;
    let row = Batch::new(vec![("x".to_owned(), (row / 16.0)?)])?;
    for clients in [1, 64] {
        let requests = if clients == 1 { requests / 10 } else { requests };
        let load = LoadTest { clients, requests, ..LoadTest::default() };
        load.run(server.addr(), "noop", |_| Ok(row.clone()))?; // Warm-up.
        let before = server.stats("noop")?;
        let report = load.run(server.addr(), "noop", |_| Ok(row.clone()))?;
        let after = server.stats("noop")?;
        println!(
            "{clients:3} clients: {:7.0} requests/s, p50 {:?}, p99 {:?}, {} failed, {:.2} rows/batch",
            report.requests_per_second,
            report.p50,
            report.p99,
            report.failures,
            (after.rows - before.rows) as f64 / (after.batches - before.batches) as f64,
        );
    }
    Ok(server.shutdown(Duration::from_secs(5))?)
}
