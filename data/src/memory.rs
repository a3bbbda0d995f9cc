//! One budget of memory for what the crate holds: queries, blocks that are kept, blocks read ahead.

use crate::error::{Error, Result};
use crate::spill::SpillFiles;
use datafusion::execution::disk_manager::{DiskManagerBuilder, DiskManagerMode};
use datafusion::execution::memory_pool::{
    FairSpillPool, MemoryConsumer, MemoryPool, MemoryReservation, TrackConsumersPool,
};
use datafusion::execution::runtime_env::{RuntimeEnv, RuntimeEnvBuilder};
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock};

/// The budget in bytes, for a program that is to use more or less.
pub(crate) const VARIABLE: &str = "MOBULA_DATA_BYTES";

/// Of the memory that the process may use, unless told otherwise.
const PERCENT: u64 = 30;

/// How many holders of memory an error names.
const NAMED: NonZeroUsize = NonZeroUsize::MIN.saturating_add(2);

static MEMORY: LazyLock<Result<Memory, mobula_core::Error>> = LazyLock::new(Memory::new);

struct Memory {
    budget: usize,
    pool: Arc<dyn MemoryPool>,
    engine: Arc<RuntimeEnv>,
}

impl Memory {
    fn new() -> Result<Self, mobula_core::Error> {
        let budget = mobula_core::scratch::memory_budget(VARIABLE, PERCENT)?;
        let budget = usize::try_from(budget).unwrap_or(usize::MAX);
        let pool = TrackConsumersPool::new(FairSpillPool::new(budget), NAMED);
        let pool: Arc<dyn MemoryPool> = Arc::new(pool);
        let disk =
            DiskManagerBuilder::default().with_mode(DiskManagerMode::Custom(Arc::new(SpillFiles)));
        let engine = RuntimeEnvBuilder::new()
            .with_memory_pool(pool.clone())
            .with_disk_manager_builder(disk)
            .build_arc()
            .map_err(Error::engine("start the query engine"))?;
        Ok(Self { budget, pool, engine })
    }
}

fn memory() -> Result<&'static Memory> {
    Ok(MEMORY.as_ref().map_err(Clone::clone)?)
}

/// What the query engine runs in: it takes its memory from the budget and spills beyond it.
pub(crate) fn engine() -> Result<Arc<RuntimeEnv>> {
    Ok(memory()?.engine.clone())
}

/// Bytes of the budget.
pub(crate) fn budget() -> Result<usize> {
    Ok(memory()?.budget)
}

/// Memory that counts as used until this is dropped.
#[derive(Debug)]
pub(crate) struct Taken {
    reservation: MemoryReservation,
    /// The count of those that are of the same kind.
    of: &'static AtomicUsize,
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.of.fetch_sub(self.reservation.size(), Ordering::Relaxed);
    }
}

/// Blocks that are kept for as long as their dataset.
static KEPT: AtomicUsize = AtomicUsize::new(0);
/// Blocks that were read ahead of who takes them.
static AHEAD: AtomicUsize = AtomicUsize::new(0);

/// Memory for a block that is kept, if there is room: half of the budget at most, so that queries
/// have some however much is kept.
pub(crate) fn try_keep(bytes: usize) -> Result<Option<Taken>> {
    let memory = memory()?;
    Ok(memory.try_take(bytes, "kept blocks", &KEPT, memory.budget / 2))
}

/// Memory for a block that is read ahead, if there is room: a quarter of the budget at most.
pub(crate) fn try_read_ahead(bytes: usize) -> Result<Option<Taken>> {
    let memory = memory()?;
    Ok(memory.try_take(bytes, "blocks read ahead", &AHEAD, memory.budget / 4))
}

/// Memory for a block that is needed now, whether there is room or not.
pub(crate) fn take(bytes: usize) -> Result<Taken> {
    let reservation = MemoryConsumer::new("blocks in use").register(&memory()?.pool);
    reservation.grow(bytes);
    AHEAD.fetch_add(bytes, Ordering::Relaxed);
    Ok(Taken { reservation, of: &AHEAD })
}

impl Memory {
    fn try_take(
        &self,
        bytes: usize,
        name: &str,
        of: &'static AtomicUsize,
        most: usize,
    ) -> Option<Taken> {
        let fits = |used: usize| used.checked_add(bytes).filter(|sum| *sum <= most);
        of.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits).ok()?;
        let reservation = MemoryConsumer::new(name).register(&self.pool);
        if reservation.try_grow(bytes).is_err() {
            of.fetch_sub(bytes, Ordering::Relaxed);
            return None;
        }
        Some(Taken { reservation, of })
    }
}
