//! What is to be served: a model's description, how to load it, and how many replicas of it.

use crate::Error;
use crate::model::{Loader, ModelMetadata};
use crate::options::BatchingOptions;
use mobula_core::Resources;
use std::fmt;

/// A model to serve, with its replicas and batching.
///
/// ```
/// use mobula_serve::{BatchingOptions, Datatype, Deployment, Model, ModelMetadata, TensorSpec};
/// use mobula_core::{Batch, BoxError};
/// use std::sync::Arc;
///
/// let double = |batch: &Batch| -> Result<Batch, BoxError> {
///     Ok(Batch::new(vec![("y".to_owned(), (batch.get("x")? * 2.0)?)])?)
/// };
/// let metadata = ModelMetadata::new("double")
///     .with_input(TensorSpec::new("x", Datatype::Fp32, [3]))
///     .with_output(TensorSpec::new("y", Datatype::Fp32, [3]));
/// let loader = Arc::new(move || Ok(Box::new(double) as Box<dyn Model>));
/// let deployment = Deployment::new(metadata, loader)
///     .with_replicas(2)
///     .with_batching(BatchingOptions { max_batch_size: 64, ..Default::default() });
/// # let _ = deployment;
/// ```
#[derive(Clone)]
pub struct Deployment {
    pub(crate) metadata: ModelMetadata,
    pub(crate) loader: Loader,
    pub(crate) replicas: usize,
    pub(crate) resources: Resources,
    pub(crate) batching: BatchingOptions,
}

impl fmt::Debug for Deployment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Deployment")
            .field("metadata", &self.metadata)
            .field("replicas", &self.replicas)
            .field("resources", &self.resources)
            .field("batching", &self.batching)
            .finish_non_exhaustive()
    }
}

impl Deployment {
    /// One replica of the model on one CPU, with default batching.
    pub fn new(metadata: ModelMetadata, loader: Loader) -> Self {
        Self {
            metadata,
            loader,
            replicas: 1,
            resources: Resources::cpus(1.0),
            batching: BatchingOptions::default(),
        }
    }

    /// The same with so many replicas, each with its own copy of the model on its own thread.
    pub fn with_replicas(self, replicas: usize) -> Self {
        Self { replicas, ..self }
    }

    /// The same with other resources for each replica (the default is 1 CPU).
    pub fn with_resources(self, resources: Resources) -> Self {
        Self { resources, ..self }
    }

    /// The same with other batching.
    pub fn with_batching(self, batching: BatchingOptions) -> Self {
        Self { batching, ..self }
    }

    pub(crate) fn check(&self) -> Result<(), Error> {
        let name = &self.metadata.name;
        let invalid = |option, expected: &str, got: String| Error::InvalidOption {
            model: name.clone(),
            option,
            expected: expected.to_owned(),
            got,
        };
        if name.is_empty() || name.contains('/') {
            return Err(invalid("name", "a name without '/'", format!("{name:?}")));
        }
        if self.replicas == 0 {
            return Err(invalid("replicas", "at least 1", "0".to_owned()));
        }
        if self.metadata.inputs.is_empty() {
            return Err(invalid("inputs", "at least one", "none".to_owned()));
        }
        for spec in self.metadata.inputs.iter().chain(&self.metadata.outputs) {
            if spec.shape.iter().any(|size| *size != -1 && *size < 1) {
                let expected = "sizes from 1 up, or -1 for an open one";
                return Err(invalid("shape", expected, format!("{:?}", spec.shape)));
            }
        }
        self.batching.check(name)
    }
}
