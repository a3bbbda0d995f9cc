//! Functions on record batches that have a name, so that a description can mean them.

use crate::error::{Error, Result};
use arrow::datatypes::SchemaRef;
use arrow::record_batch::RecordBatch;
use mobula_core::BoxError;
use std::sync::{Arc, Mutex, PoisonError};

/// A function that [`Dataset::map_batches`](crate::Dataset::map_batches) can name. Worker
/// processes are the same binary, so they find it too.
///
/// ```
/// use arrow::record_batch::RecordBatch;
/// use mobula_core::BoxError;
///
/// fn first_half(batch: &RecordBatch) -> Result<RecordBatch, BoxError> {
///     Ok(batch.slice(0, batch.num_rows() / 2))
/// }
/// mobula_data::inventory::submit! { mobula_data::BatchFn::new("first_half", first_half) }
/// ```
#[derive(Debug)]
pub struct BatchFn {
    name: &'static str,
    kind: Kind,
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Function(fn(&RecordBatch) -> Result<RecordBatch, BoxError>),
    Actor(fn(&'static str) -> Arc<dyn BatchMap>),
}

inventory::collect!(BatchFn);

impl BatchFn {
    /// Gives `function` a name. It is also called with an empty batch, to learn its columns, and
    /// must return the same for the same rows.
    pub const fn new(
        name: &'static str,
        function: fn(&RecordBatch) -> Result<RecordBatch, BoxError>,
    ) -> Self {
        Self { name, kind: Kind::Function(function) }
    }

    /// Gives a function with a state a name.
    pub const fn actor<A: BatchActor>(name: &'static str) -> Self {
        Self { name, kind: Kind::Actor(actor::<A>) }
    }
}

/// A batch function that holds something which takes long to make, such as a model.
///
/// A process that runs a plan makes one when the first batch comes, and gives it one batch at a time.
/// For more at a time, on their own CPUs or GPUs, see
/// [`Dataset::persist_with`](crate::Dataset::persist_with).
///
/// ```
/// use arrow::datatypes::Schema;
/// use arrow::record_batch::RecordBatch;
/// use mobula_core::BoxError;
/// use mobula_data::{BatchActor, BatchFn};
///
/// struct Embed {
///     // model: …
/// }
///
/// impl BatchActor for Embed {
///     fn new() -> Result<Self, BoxError> {
///         Ok(Self {}) // reads the weights
///     }
///
///     fn columns(input: &Schema) -> Result<Schema, BoxError> {
///         Ok(input.clone())
///     }
///
///     fn call(&mut self, batch: &RecordBatch) -> Result<RecordBatch, BoxError> {
///         Ok(batch.clone())
///     }
/// }
///
/// mobula_data::inventory::submit! { BatchFn::actor::<Embed>("embed") }
/// ```
pub trait BatchActor: Send + Sized + 'static {
    /// Makes the state.
    fn new() -> Result<Self, BoxError>;

    /// The columns that it makes of those of `input`, without the state: a plan is made in the driver,
    /// where there may be no room for it.
    fn columns(input: &arrow::datatypes::Schema) -> Result<arrow::datatypes::Schema, BoxError>;

    /// What it makes of a batch: the same for the same rows.
    fn call(&mut self, batch: &RecordBatch) -> Result<RecordBatch, BoxError>;
}

/// A function from a batch to a batch, and from columns to columns.
pub(crate) trait BatchMap: Send + Sync {
    fn columns(&self, input: &SchemaRef) -> Result<SchemaRef>;

    fn map(&self, batch: &RecordBatch) -> Result<RecordBatch>;

    /// Whether it may wait for something, as functions of the program may.
    fn may_wait(&self) -> bool {
        false
    }

    /// The same for a function of where the rows are, too: the first is row `row` of block `block`.
    fn map_at(&self, batch: &RecordBatch, _block: usize, _row: u64) -> Result<RecordBatch> {
        self.map(batch)
    }
}

/// It shows its columns when it is given an empty batch.
impl<F: Fn(&RecordBatch) -> Result<RecordBatch> + Send + Sync> BatchMap for F {
    fn columns(&self, input: &SchemaRef) -> Result<SchemaRef> {
        Ok(self(&RecordBatch::new_empty(input.clone()))?.schema())
    }

    fn map(&self, batch: &RecordBatch) -> Result<RecordBatch> {
        self(batch)
    }
}

/// An actor, once there is one.
struct Acting<A> {
    name: &'static str,
    state: Mutex<Option<A>>,
}

impl<A> Acting<A> {
    fn failed(&self, source: BoxError) -> Error {
        Error::BatchFn { name: self.name.to_owned(), source }
    }
}

impl<A: BatchActor> BatchMap for Acting<A> {
    fn columns(&self, input: &SchemaRef) -> Result<SchemaRef> {
        A::columns(input).map(Arc::new).map_err(|error| self.failed(error))
    }

    fn map(&self, batch: &RecordBatch) -> Result<RecordBatch> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        // One that panicked or failed is made anew.
        let actor = match state.take() {
            Some(actor) => Ok(actor),
            None => A::new(),
        };
        let mut actor = actor.map_err(|error| self.failed(error))?;
        let made = actor.call(batch).map_err(|error| self.failed(error))?;
        *state = Some(actor);
        Ok(made)
    }

    fn may_wait(&self) -> bool {
        true
    }
}

/// A function of the program.
struct Function {
    name: &'static str,
    function: fn(&RecordBatch) -> Result<RecordBatch, BoxError>,
}

impl BatchMap for Function {
    fn columns(&self, input: &SchemaRef) -> Result<SchemaRef> {
        Ok(self.map(&RecordBatch::new_empty(input.clone()))?.schema())
    }

    fn map(&self, batch: &RecordBatch) -> Result<RecordBatch> {
        let failed = |source| Error::BatchFn { name: self.name.to_owned(), source };
        (self.function)(batch).map_err(failed)
    }

    fn may_wait(&self) -> bool {
        true
    }
}

fn actor<A: BatchActor>(name: &'static str) -> Arc<dyn BatchMap> {
    Arc::new(Acting { name, state: Mutex::new(None::<A>) })
}

pub(crate) fn lookup(name: &str) -> Result<Arc<dyn BatchMap>> {
    let all = || inventory::iter::<BatchFn>.into_iter();
    let Some(found) = all().find(|f| f.name == name) else {
        let registered = all().map(|f| f.name.to_owned()).collect();
        return Err(Error::NotRegistered { name: name.to_owned(), registered });
    };
    let name = found.name;
    Ok(match found.kind {
        Kind::Actor(make) => make(name),
        Kind::Function(function) => Arc::new(Function { name, function }),
    })
}
