//! The rows of several datasets, one after another.

use super::{BatchIter, Blocks, Source, columns, hash};
use crate::Dataset;
use crate::error::{Error, Result};
use crate::plan::Compiled;
use crate::runtime::block_on;
use crate::store::relabel;
use arrow::datatypes::{Field, Schema, SchemaRef};
use arrow::record_batch::RecordBatch;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Union {
    pub(crate) inputs: Vec<Dataset>,
}

#[typetag::serde(name = "union")]
impl Source for Union {
    fn open(&self) -> Result<Arc<dyn Blocks>> {
        let inputs = self.inputs.iter().map(Input::open).collect::<Result<Vec<_>>>()?;
        let schema = schema_of(&self.inputs)?;
        let blocks_of =
            |(at, input): (usize, &Input)| (0..input.rows.len()).map(move |block| (at, block));
        let blocks = inputs.iter().enumerate().flat_map(blocks_of).collect();
        Ok(Arc::new(UnionBlocks { schema, inputs, blocks }))
    }

    fn inputs(&self) -> Vec<(String, &Dataset)> {
        let named = |(at, input)| (format!("dataset {}", at + 1), input);
        self.inputs.iter().enumerate().map(named).collect()
    }
}

/// The columns that all have; one that may be missing in any of them may be missing.
pub(crate) fn schema_of(inputs: &[Dataset]) -> Result<SchemaRef> {
    let schemas = inputs.iter().map(Dataset::schema).collect::<Result<Vec<_>>>()?;
    let first = schemas.first().ok_or(Error::Empty { after: "" })?;
    let mut fields: Vec<Field> =
        first.fields().iter().map(|field| field.as_ref().clone()).collect();
    for (at, schema) in schemas.iter().enumerate() {
        let same = |(own, other): (&Field, &Arc<Field>)| {
            own.name() == other.name() && own.data_type() == other.data_type()
        };
        let all = fields.iter().zip(schema.fields()).all(same);
        if fields.len() != schema.fields().len() || !all {
            let path = format!("dataset {} of a union", at + 1).into();
            return Err(Error::SchemaDiffers {
                path,
                expected: columns(first),
                got: columns(schema),
            });
        }
        for (own, other) in fields.iter_mut().zip(schema.fields()) {
            own.set_nullable(own.is_nullable() || other.is_nullable());
        }
    }
    Ok(Arc::new(Schema::new(fields)))
}

/// A dataset whose blocks, and the rows of each, are known.
#[derive(Debug)]
pub(super) struct Input {
    dataset: Dataset,
    pub(super) rows: Vec<u64>,
    schema: SchemaRef,
    fingerprint: String,
    /// Plans for the columns that were asked for.
    compiled: Mutex<HashMap<Vec<usize>, Compiled>>,
}

impl Input {
    /// Counts the rows, which reads them where an operation drops or adds some.
    pub(super) fn open(dataset: &Dataset) -> Result<Self> {
        Self::open_until(dataset, u64::MAX)
    }

    /// The same, when no row behind the first `most` will be read.
    pub(super) fn open_until(dataset: &Dataset, most: u64) -> Result<Self> {
        Ok(Self {
            dataset: dataset.clone(),
            rows: dataset.count_blocks_until(most)?,
            schema: dataset.compile()?.schema(),
            fingerprint: dataset.plan_hash()?,
            compiled: Mutex::default(),
        })
    }

    pub(super) fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    pub(super) fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    pub(super) fn name(&self, block: usize) -> Result<String> {
        Ok(self.dataset.open()?.name(block))
    }

    pub(super) fn waits(&self) -> bool {
        self.dataset.open().is_ok_and(|source| source.waits())
    }

    /// The rows of a block, of the columns at `projection`.
    pub(super) fn read(&self, block: usize, projection: &[usize]) -> Result<Vec<RecordBatch>> {
        let compiled = self.compiled(projection)?;
        block_on(async move { compiled.execute(block).await })
    }

    fn compiled(&self, projection: &[usize]) -> Result<Compiled> {
        let known = || self.compiled.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(compiled) = known().get(projection) {
            return Ok(compiled.clone());
        }
        let names = projection.iter().map(|at| self.schema.field(*at).name().clone());
        let compiled = self.dataset.select(names)?.compile()?;
        known().insert(projection.to_vec(), compiled.clone());
        Ok(compiled)
    }
}

/// The same columns as those at `projection` of `schema`, which may say otherwise what can be missing.
pub(super) fn relabelled(
    batches: Vec<RecordBatch>,
    schema: &SchemaRef,
    projection: &[usize],
) -> Result<BatchIter> {
    let schema = Arc::new(schema.project(projection)?);
    Ok(Box::new(batches.into_iter().map(move |batch| relabel(&batch, &schema))))
}

#[derive(Debug)]
struct UnionBlocks {
    schema: SchemaRef,
    inputs: Vec<Input>,
    /// Input and its block.
    blocks: Vec<(usize, usize)>,
}

impl Blocks for UnionBlocks {
    fn schema(&self) -> SchemaRef {
        self.schema.clone()
    }

    fn rows(&self) -> Vec<u64> {
        self.blocks.iter().map(|&(input, block)| self.inputs[input].rows[block]).collect()
    }

    fn fingerprint(&self) -> Result<String> {
        Ok(hash(self.inputs.iter().map(|input| input.fingerprint().as_bytes())))
    }

    fn name(&self, block: usize) -> String {
        let (input, block) = self.blocks[block];
        self.inputs[input]
            .name(block)
            .unwrap_or_else(|_| format!("block {block} of dataset {input}"))
    }

    fn waits(&self) -> bool {
        self.inputs.iter().any(Input::waits)
    }

    fn read(&self, block: usize, projection: &[usize]) -> Result<BatchIter> {
        let (input, block) = self.blocks[block];
        relabelled(self.inputs[input].read(block, projection)?, &self.schema, projection)
    }
}
