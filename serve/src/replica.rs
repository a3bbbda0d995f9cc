//! A replica: a model on its own thread, fed one batch at a time.

use crate::dispatcher::{Dispatcher, Flight};
use crate::model::{Model, ModelMetadata, TensorSpec, names};
use crate::{Deployment, Error};
use candle_core::{Device, Tensor};
use mobula_core::error::chain;
use mobula_core::{ActorHandle, ActorOptions, Batch, BoxError, Runtime};
use std::sync::Arc;
use tokio::sync::mpsc;

/// The actor that owns a model.
pub(crate) type Replica = ActorHandle<Box<dyn Model>>;

/// Loads a replica of `deployment` on a thread of its own.
pub(crate) fn start(
    runtime: &Runtime,
    deployment: &Deployment,
    index: usize,
) -> Result<Replica, Error> {
    let model = &deployment.metadata.name;
    let options = ActorOptions::new(format!("{model} replica {index}"))
        .with_resources(deployment.resources.clone())
        .with_mailbox(1);
    let loader = deployment.loader.clone();
    runtime
        .spawn_actor(options, move || loader())
        .map_err(|error| Error::LoadFailed { model: model.clone(), message: chain(&error) })
}

/// Runs the batches that the dispatcher assigns to `replica`, until there are no more.
pub(crate) async fn drive(
    dispatcher: Arc<Dispatcher>,
    replica: Replica,
    mut flights: mpsc::Receiver<Flight>,
) {
    while let Some(flight) = flights.recv().await {
        let metadata = dispatcher.metadata.clone();
        let Flight { inputs, ticket } = flight;
        let run = move |model: &mut Box<dyn Model>| execute(model.as_mut(), &metadata, &inputs);
        let failed = |message: String| Error::ModelFailed {
            model: dispatcher.metadata.name.clone(),
            message,
        };
        match replica.call(run).await {
            Ok(result) => dispatcher.finished(ticket, result),
            // The panic is the batch's fault; core has built the model again.
            Err(mobula_core::Error::TaskPanicked { message, location, .. }) => {
                let message = format!("panicked at {location}: {message}");
                dispatcher.finished(ticket, Err(failed(message)));
            }
            Err(error) => {
                tracing::error!(model = dispatcher.metadata.name, %error, "a replica is lost");
                return dispatcher.lost(&ticket);
            }
        }
    }
}

/// Runs `model` once on the rows of all `inputs`, and gives each its own outputs back.
fn execute(
    model: &mut dyn Model,
    metadata: &ModelMetadata,
    inputs: &[Batch],
) -> Result<Vec<Batch>, Error> {
    let failed = |error: BoxError| Error::ModelFailed {
        model: metadata.name.clone(),
        message: chain(error.as_ref()),
    };
    let stacked = stack(inputs)?;
    let outputs = model.infer(&stacked).map_err(failed)?;
    let outputs = check_outputs(metadata, &outputs, stacked.rows())?;
    split(&outputs, inputs)
}

/// All rows under each other.
fn stack(inputs: &[Batch]) -> Result<Batch, Error> {
    if let [only] = inputs {
        return Ok(only.clone());
    }
    let names = inputs.first().map(Batch::tensors).unwrap_or_default();
    let stack_one = |(name, _): &(String, Tensor)| {
        let parts = inputs.iter().map(|batch| batch.get(name));
        let parts = parts.collect::<Result<Vec<_>, _>>()?;
        let stacked = Tensor::cat(&parts, 0).map_err(mobula_core::Error::from)?;
        Ok((name.clone(), stacked))
    };
    let tensors = names.iter().map(stack_one).collect::<Result<_, mobula_core::Error>>()?;
    Ok(Batch::new(tensors)?)
}

/// The outputs in the metadata's order, on the CPU, if they are what it says.
fn check_outputs(metadata: &ModelMetadata, outputs: &Batch, rows: usize) -> Result<Batch, Error> {
    let check = |spec: &TensorSpec| {
        let invalid = |what, expected: String, got: String| Error::InvalidOutput {
            model: metadata.name.clone(),
            output: spec.name.clone(),
            what,
            expected,
            got,
        };
        let Ok(tensor) = outputs.get(&spec.name) else {
            let got: Vec<&str> = outputs.tensors().iter().map(|(n, _)| n.as_str()).collect();
            let expected = names(&metadata.outputs).join(", ");
            return Err(invalid("name", expected, got.join(", ")));
        };
        if tensor.dtype() != spec.datatype.dtype() {
            let got = tensor.dtype().as_str().to_owned();
            return Err(invalid("datatype", spec.datatype.to_string(), got));
        }
        if !spec.accepts(tensor.dims()) || tensor.dims()[0] != rows {
            let expected = format!("{rows} rows of {:?}", spec.shape);
            return Err(invalid("shape", expected, format!("{:?}", tensor.dims())));
        }
        let tensor = tensor.to_device(&Device::Cpu).map_err(mobula_core::Error::from)?;
        Ok((spec.name.clone(), tensor))
    };
    let tensors = metadata.outputs.iter().map(check).collect::<Result<_, _>>()?;
    Ok(Batch::new(tensors)?)
}

/// The rows of `outputs` that belong to each of `inputs`.
fn split(outputs: &Batch, inputs: &[Batch]) -> Result<Vec<Batch>, Error> {
    let mut first = 0;
    let mut parts = Vec::with_capacity(inputs.len());
    for input in inputs {
        let part = |(name, tensor): &(String, Tensor)| {
            let rows = tensor.narrow(0, first, input.rows());
            Ok((name.clone(), rows.map_err(mobula_core::Error::from)?))
        };
        let tensors = outputs.tensors().iter().map(part).collect::<Result<_, Error>>()?;
        parts.push(Batch::new(tensors)?);
        first += input.rows();
    }
    Ok(parts)
}
