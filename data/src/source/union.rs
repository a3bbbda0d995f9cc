//! The rows of several datasets, one after another.

use super::{BatchIter, Blocks, Source, columns, hash};
use crate::Dataset;
use crate::error::{Error, Result};
use crate::plan::Compiled;
use crate::runtime::block_on;
use arrow::array::RecordBatchOptions;
use arrow::datatypes::{Field, Schema, SchemaRef};
use arrow::record_batch::RecordBatch;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

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
    pub(super) compiled: Compiled,
    pub(super) rows: Vec<u64>,
    fingerprint: String,
}

impl Input {
    /// Counts the rows, which reads them where an operation drops or adds some.
    pub(super) fn open(dataset: &Dataset) -> Result<Self> {
        let (compiled, rows) = (dataset.compile()?, dataset.count_blocks()?);
        Ok(Self { compiled, rows, fingerprint: dataset.plan_hash()? })
    }

    pub(super) fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// The rows of a block.
    pub(super) fn read(&self, block: usize) -> Result<Vec<RecordBatch>> {
        let compiled = self.compiled.clone();
        block_on(async move { compiled.execute(block).await })
    }
}

/// The columns at `projection`, as those of `schema`.
pub(super) fn project(
    batch: &RecordBatch,
    schema: &SchemaRef,
    projection: &[usize],
) -> Result<RecordBatch> {
    let schema = Arc::new(schema.project(projection)?);
    let columns = projection.iter().map(|at| batch.column(*at).clone()).collect();
    let options = RecordBatchOptions::new().with_row_count(Some(batch.num_rows()));
    Ok(RecordBatch::try_new_with_options(schema, columns, &options)?)
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
        self.inputs[input].compiled.source().name(block)
    }

    fn read(&self, block: usize, projection: &[usize]) -> Result<BatchIter> {
        let (input, block) = self.blocks[block];
        let (batches, schema) = (self.inputs[input].read(block)?, self.schema.clone());
        let projection = projection.to_vec();
        let batches = batches.into_iter().map(move |batch| project(&batch, &schema, &projection));
        Ok(Box::new(batches))
    }
}
