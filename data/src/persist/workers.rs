//! Blocks computed by a pool of actors, each with a plan and its states of its own.

use super::{BlockRef, Keep, StorageLevel};
use crate::Dataset;
use crate::error::{Error, Result};
use crate::plan::Compiled;
use crate::runtime::block_on;
use arrow::record_batch::RecordBatch;
use mobula_core::{ActorOptions, ActorPoolOptions, ObjectRef, Runtime};
use std::collections::VecDeque;
use std::path::PathBuf;

/// Calls for each actor that are under way: one that runs, and one that waits for it.
const AHEAD: usize = 2;

impl Dataset {
    /// [`persist`](Self::persist) on disk, by a pool of actors: threads, or processes that survive the
    /// loss of each other, with the CPUs and GPUs that `actor` asks for. Each makes the states of
    /// [`BatchActor`](crate::BatchActor)s once and computes one block at a time: batch inference.
    ///
    /// With `restart` and `max_task_retries` in `actor`, a block whose process was lost is computed by
    /// the next one. On other machines the folder for temporary files must be a shared one.
    ///
    /// ```no_run
    /// use mobula_core::{ActorOptions, ActorPoolOptions, Placement, Resources, RestartPolicy};
    /// use mobula_data::Dataset;
    ///
    /// let runtime = mobula_core::init()?;
    /// let rows = Dataset::read_parquet("texts")?.map_batches("embed")?;
    /// let actor = ActorOptions {
    ///     resources: Resources { gpus: 1.0, ..Resources::cpus(2.0) },
    ///     placement: Placement::Process,
    ///     restart: RestartPolicy::at_most(3),
    ///     max_task_retries: 3,
    ///     ..ActorOptions::new("embed")
    /// };
    /// let embedded = rows.persist_with(&runtime, ActorPoolOptions::fixed(4), &actor)?;
    /// # Ok::<(), mobula_core::Error>(())
    /// ```
    pub fn persist_with(
        &self,
        runtime: &Runtime,
        pool: ActorPoolOptions,
        actor: &ActorOptions,
    ) -> Result<Self> {
        let (schema, plan) = (self.compile()?.schema(), self.plan_hash()?);
        let keep = Keep::new(schema, StorageLevel::Disk, plan.clone());
        let (dataset, folder, options) =
            (self.clone(), keep.here.folder()?.to_owned(), actor.clone());
        let pool = runtime.actor_pool(pool, move |_| {
            let (dataset, folder) = (dataset.clone(), folder.clone());
            BlockWorker::remote(dataset, plan.clone(), folder).with_options(options.clone())
        })?;
        let (mut blocks, mut coming) = (Vec::new(), VecDeque::<ObjectRef<BlockRef>>::new());
        for block in 0..self.open()?.blocks().len() {
            if coming.len() >= AHEAD * pool.size().max(1) {
                blocks.extend(coming.pop_front().map(taken).transpose()?);
            }
            coming.push_back(pool.call(|actor| actor.compute(block))?);
        }
        for block in coming {
            blocks.push(taken(block)?);
        }
        if let Some(block) = blocks.iter().find(|block| block.rows > 0) {
            let again = pool.call(|actor| actor.compute_again(block.partition))?.get()?;
            self.must_be(&block.hash, &again, block.partition)?;
        }
        keep.dataset(Some(self.clone()), blocks)
    }

    fn must_be(&self, hash: &str, again: &str, block: usize) -> Result<()> {
        if hash == again {
            return Ok(());
        }
        let place = self.open()?.name(block);
        Err(Error::NotRepeatable { place, reason: self.suspects() })
    }
}

fn taken(block: ObjectRef<BlockRef>) -> Result<BlockRef> {
    Ok(BlockRef::clone(&*block.get()?))
}

/// Computes blocks of a dataset into a folder.
struct BlockWorker {
    compiled: Compiled,
    keep: Keep,
}

#[mobula_core::remote(crate = mobula_core)]
impl BlockWorker {
    fn new(dataset: Dataset, plan: String, folder: PathBuf) -> Result<Self> {
        let compiled = dataset.compile()?;
        let keep = Keep::into_folder(compiled.schema(), plan, &folder);
        Ok(Self { compiled, keep })
    }

    fn compute(&mut self, block: usize) -> Result<BlockRef> {
        self.keep.block(block, &self.rows(block)?)
    }

    fn compute_again(&mut self, block: usize) -> Result<String> {
        let bytes = crate::store::encode(&self.rows(block)?)?;
        Ok(crate::store::content_hash(&bytes))
    }
}

impl BlockWorker {
    fn rows(&self, block: usize) -> Result<RecordBatch> {
        let compiled = self.compiled.clone();
        block_on(async move { compiled.whole(block).await })
    }
}
