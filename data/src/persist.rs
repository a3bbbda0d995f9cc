//! Datasets that are computed once: their blocks, where these are, and how to get one back that was
//! lost.

mod workers;

use crate::Dataset;
use crate::dataset::{Op, fold_blocks};
use crate::error::{Error, Result};
use crate::memory::{self, Taken};
use crate::plan::Compiled;
use crate::runtime::block_on;
use crate::source::memory::MemoryTable;
use crate::source::{BatchIter, Blocks, Source, hash};
use crate::store::{bytes_of, content_hash, decode, encode};
use arrow::compute::concat_batches;
use arrow::datatypes::SchemaRef;
use arrow::record_batch::RecordBatch;
use mobula_core::error::AtPath;
use mobula_core::scratch::ScratchFolder;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

/// Where [`Dataset::persist`] keeps blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StorageLevel {
    /// In the memory of the process that computed them, up to half of the budget. The others are
    /// computed again each time, and so are all of them once in another process, which then keeps
    /// them in its own memory.
    Memory,
    /// In a folder of the one for temporary files, for all processes of the machine.
    Disk,
    /// In memory as far as they fit, and else on disk.
    MemoryThenDisk,
}

/// A block that was computed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockRef {
    /// Which plan it is a block of: a hash of the data and of the operations that can be described.
    pub plan: String,
    /// Which of the plan's blocks it is.
    pub partition: usize,
    /// Its rows.
    pub rows: u64,
    /// Its length in Arrow's IPC stream format.
    pub bytes: u64,
    /// XXH3 (128 bits) of these bytes. A block that is computed again must have the same.
    pub hash: String,
    /// Its file; none for a block in memory, for one without rows, and for one that is not kept.
    pub path: Option<PathBuf>,
}

/// What computes datasets ahead of their use.
impl Dataset {
    /// Computes all blocks now and keeps them: the dataset that results reads those. What is done to
    /// it from here on is not computed again for each epoch, process or query what is behind it.
    ///
    /// A block that is lost (its file was removed or damaged, or it is in the memory of another
    /// process) is computed again when it is read, and must come out the same; if not, the error is
    /// [`Error::NotRepeatable`]. To find that out early, one block is computed twice.
    ///
    /// Files are removed with the last clone of the dataset in this process, or, if it was killed,
    /// by the next on this machine.
    pub fn persist(&self, level: StorageLevel) -> Result<Self> {
        let compiled = self.compile()?;
        let keep = Keep::new(compiled.schema(), level, self.plan_hash()?);
        let blocks = keep.all(compiled.clone(), |batch| Ok(batch.clone()))?;
        if let Some(block) = blocks.iter().find(|block| block.rows > 0) {
            self.compute_again(&compiled, block)?;
        }
        keep.dataset(Some(self.clone()), blocks)
    }

    /// What `function` makes of each block, with columns `schema`, on disk. Nobody can compute a block
    /// again, as the function goes with this process.
    pub(crate) fn computed(
        &self,
        schema: SchemaRef,
        function: impl Fn(&RecordBatch) -> Result<RecordBatch> + Send + Sync + 'static,
    ) -> Result<Self> {
        let keep = Keep::new(schema, StorageLevel::Disk, self.plan_hash()?);
        let blocks = keep.all(self.compile()?, function)?;
        keep.dataset(None, blocks)
    }

    /// [`persist`](Self::persist) in memory as far as it fits, and else on disk.
    pub fn materialize(&self) -> Result<Self> {
        self.persist(StorageLevel::MemoryThenDisk)
    }

    /// The blocks of a dataset that was persisted, if nothing was done to it since.
    pub fn block_refs(&self) -> Option<&[BlockRef]> {
        if self.ops().is_empty() { self.source().block_refs() } else { None }
    }

    /// What the rows are a function of.
    pub(crate) fn plan_hash(&self) -> Result<String> {
        let ops = serde_json::to_vec(self.ops()).map_err(mobula_core::Error::layer)?;
        Ok(hash([self.open()?.fingerprint()?.as_bytes(), &ops]))
    }

    /// The block, which must be what it was.
    fn compute_again(
        &self,
        compiled: &Compiled,
        block: &BlockRef,
    ) -> Result<(RecordBatch, Vec<u8>)> {
        let at = block.partition;
        let plan = compiled.clone();
        let again = block_on(async move { plan.whole(at).await })?;
        let bytes = encode(&again)?;
        if content_hash(&bytes) == block.hash {
            return Ok((again, bytes));
        }
        let place = compiled.source().name(at);
        Err(Error::NotRepeatable { place, reason: self.suspects() })
    }

    /// What may give other rows when it is called again.
    fn suspects(&self) -> String {
        let function = |op: &Op| match op {
            Op::MapBatches { function } => Some(format!("{function:?}")),
            _ => None,
        };
        let functions: Vec<_> = self.ops().iter().filter_map(function).collect();
        if functions.is_empty() {
            return "the data changed, or their source gives other rows each time; write() the dataset and read that instead".to_owned();
        }
        let functions = functions.join(", ");
        format!(
            "the batch function {functions} may draw random numbers or look at the time, or the data changed; make its result a function of the rows, or write() the dataset and read that instead"
        )
    }
}

/// Keeps blocks while they are computed.
#[derive(Clone)]
pub(crate) struct Keep {
    here: Arc<Here>,
    schema: SchemaRef,
    level: StorageLevel,
    plan: String,
}

impl Keep {
    fn new(schema: SchemaRef, level: StorageLevel, plan: String) -> Self {
        Self { here: Arc::default(), schema, level, plan }
    }

    /// The same in a folder of another process.
    fn into_folder(schema: SchemaRef, plan: String, folder: &Path) -> Self {
        let here =
            Here { folder: OnceLock::from(Folder::Theirs(folder.to_owned())), ..Here::default() };
        Self { here: Arc::new(here), schema, level: StorageLevel::Disk, plan }
    }

    /// What `function` makes of all blocks.
    fn all(
        &self,
        compiled: Compiled,
        function: impl Fn(&RecordBatch) -> Result<RecordBatch> + Send + Sync + 'static,
    ) -> Result<Vec<BlockRef>> {
        let (keep, input) = (self.clone(), compiled.schema());
        let compute = move |block, batches: Vec<RecordBatch>| {
            keep.block(block, &function(&concat_batches(&input, &batches)?)?)
        };
        fold_blocks(compiled, compute, Vec::new(), |all: &mut Vec<BlockRef>, block| all.push(block))
    }

    fn block(&self, partition: usize, batch: &RecordBatch) -> Result<BlockRef> {
        let batch = batch.clone().with_schema(self.schema.clone())?;
        let (rows, bytes) = (batch.num_rows() as u64, encode(&batch)?);
        let path = match rows {
            0 => None,
            _ => self.here.keep(self.level, partition, batch, &bytes)?,
        };
        let (plan, hash) = (self.plan.clone(), content_hash(&bytes));
        Ok(BlockRef { plan, partition, rows, bytes: bytes.len() as u64, hash, path })
    }

    fn dataset(self, input: Option<Dataset>, blocks: Vec<BlockRef>) -> Result<Dataset> {
        let columns = MemoryTable::new(vec![RecordBatch::new_empty(self.schema.clone())])?;
        let input = input.map(|input| input.closed());
        let source = Persisted { input, columns, level: self.level, blocks, here: self.here };
        Ok(Dataset::unopened(source).with_schema(self.schema))
    }
}

/// What this process has of a persisted dataset.
#[derive(Debug, Default)]
struct Here {
    kept: Mutex<HashMap<usize, Kept>>,
    /// Where this process writes files.
    folder: OnceLock<Folder>,
    compiled: OnceLock<Compiled>,
}

#[derive(Debug)]
enum Folder {
    Own(ScratchFolder),
    Theirs(PathBuf),
}

impl Folder {
    fn path(&self) -> &Path {
        match self {
            Self::Own(folder) => folder.path(),
            Self::Theirs(path) => path,
        }
    }
}

#[derive(Clone, Debug)]
enum Kept {
    InMemory { batch: RecordBatch, _memory: Arc<Taken> },
    InFile(PathBuf),
}

impl Here {
    /// Keeps a block; in which file, if not in memory.
    fn keep(
        &self,
        level: StorageLevel,
        block: usize,
        batch: RecordBatch,
        bytes: &[u8],
    ) -> Result<Option<PathBuf>> {
        let room = match level {
            StorageLevel::Disk => None,
            StorageLevel::Memory | StorageLevel::MemoryThenDisk => {
                memory::try_keep(bytes_of(&batch)?)?
            }
        };
        let kept = match (room, level) {
            // Of its own: the batch may be a slice of much more.
            (Some(memory), _) => {
                Kept::InMemory { batch: decode(bytes.to_vec())?, _memory: Arc::new(memory) }
            }
            (None, StorageLevel::Memory) => return Ok(None),
            (None, _) => Kept::InFile(write(self.folder()?, block, bytes)?),
        };
        let path = match &kept {
            Kept::InFile(path) => Some(path.clone()),
            Kept::InMemory { .. } => None,
        };
        self.kept().insert(block, kept);
        Ok(path)
    }

    fn get(&self, block: usize) -> Option<Kept> {
        self.kept().get(&block).cloned()
    }

    fn kept(&self) -> MutexGuard<'_, HashMap<usize, Kept>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn folder(&self) -> Result<&Path> {
        if let Some(folder) = self.folder.get() {
            return Ok(folder.path());
        }
        let made = Folder::Own(ScratchFolder::create(&std::env::temp_dir())?);
        Ok(self.folder.get_or_init(|| made).path())
    }
}

/// The file is there as a whole or not at all.
fn write(folder: &Path, block: usize, bytes: &[u8]) -> Result<PathBuf> {
    let path = folder.join(format!("{block:05}-{}.arrows", content_hash(bytes)));
    let file = tempfile::NamedTempFile::new_in(folder).at("create a file in", folder)?;
    std::fs::write(file.path(), bytes).at("write", &path)?;
    file.persist(&path).map_err(|error| error.error).at("write", &path)?;
    Ok(path)
}

/// The description of a persisted dataset. Another process reads the files, and computes what it
/// does not find.
#[derive(Debug, Serialize, Deserialize)]
struct Persisted {
    /// What computes a block again, if that can be described.
    input: Option<Dataset>,
    /// Without rows.
    columns: MemoryTable,
    level: StorageLevel,
    blocks: Vec<BlockRef>,
    #[serde(skip)]
    here: Arc<Here>,
}

#[typetag::serde(name = "persisted")]
impl Source for Persisted {
    fn open(&self) -> Result<Arc<dyn Blocks>> {
        let (input, level, here) = (self.input.clone(), self.level, self.here.clone());
        let (schema, blocks) = (self.columns.schema(), self.blocks.clone());
        Ok(Arc::new(PersistedBlocks { input, schema, level, blocks, here }))
    }

    fn block_refs(&self) -> Option<&[BlockRef]> {
        Some(&self.blocks)
    }

    fn summary(&self) -> String {
        let on_disk = self.blocks.iter().filter(|block| block.path.is_some()).count();
        format!("{} blocks, {on_disk} of them on disk", self.blocks.len())
    }

    fn inputs(&self) -> Vec<(String, &Dataset)> {
        self.input.iter().map(|input| ("input".to_owned(), input)).collect()
    }
}

#[derive(Debug)]
struct PersistedBlocks {
    input: Option<Dataset>,
    schema: SchemaRef,
    level: StorageLevel,
    blocks: Vec<BlockRef>,
    here: Arc<Here>,
}

impl Blocks for PersistedBlocks {
    fn schema(&self) -> SchemaRef {
        self.schema.clone()
    }

    fn rows(&self) -> Vec<u64> {
        self.blocks.iter().map(|block| block.rows).collect()
    }

    fn fingerprint(&self) -> Result<String> {
        Ok(hash(self.blocks.iter().map(|block| block.hash.as_bytes())))
    }

    fn name(&self, block: usize) -> String {
        match &self.blocks[block].path {
            Some(path) => path.display().to_string(),
            None => format!("block {block} of a persisted dataset"),
        }
    }

    fn read(&self, block: usize, projection: &[usize]) -> Result<BatchIter> {
        if self.blocks[block].rows == 0 {
            return Ok(Box::new(std::iter::empty()));
        }
        let batch = self.block(block)?.project(projection)?;
        Ok(Box::new(std::iter::once(Ok(batch))))
    }
}

impl PersistedBlocks {
    fn block(&self, at: usize) -> Result<RecordBatch> {
        let block = &self.blocks[at];
        let path = match self.here.get(at) {
            Some(Kept::InMemory { batch, .. }) => return Ok(batch),
            Some(Kept::InFile(path)) => Some(path),
            None => block.path.clone(),
        };
        if let Some(path) = path {
            match (load(&path, block), &self.input) {
                (Ok(batch), _) => return Ok(batch),
                (Err(why), None) => return Err(Error::BlockLost { reason: why.to_string() }),
                (Err(why), Some(_)) => {
                    tracing::warn!(path = %path.display(), %why, "computing a lost block again");
                }
            }
        }
        let lost = || Error::BlockLost { reason: format!("{} is gone", self.name(at)) };
        let input = self.input.as_ref().ok_or_else(lost)?;
        let (batch, bytes) = input.compute_again(self.compiled(input)?, block)?;
        self.keep_again(at, &batch, &bytes);
        Ok(batch)
    }

    fn compiled(&self, input: &Dataset) -> Result<&Compiled> {
        if let Some(compiled) = self.here.compiled.get() {
            return Ok(compiled);
        }
        let compiled = input.compile()?;
        Ok(self.here.compiled.get_or_init(|| compiled))
    }

    /// In its old place if that is there: others look there too. Without room, the next one who needs
    /// the block computes it again.
    fn keep_again(&self, at: usize, batch: &RecordBatch, bytes: &[u8]) {
        let folder = self.blocks[at].path.as_ref().and_then(|path| path.parent());
        let kept = match folder.filter(|folder| folder.is_dir()) {
            Some(folder) => write(folder, at, bytes).map(drop),
            None => self.here.keep(self.level, at, batch.clone(), bytes).map(drop),
        };
        if let Err(error) = kept {
            tracing::warn!(block = at, %error, "a block that was computed again is not kept");
        }
    }
}

fn load(path: &Path, block: &BlockRef) -> Result<RecordBatch> {
    let bytes = std::fs::read(path).at("read", path)?;
    let hash = content_hash(&bytes);
    if hash == block.hash {
        return decode(bytes);
    }
    let reason = format!("its {} bytes have the hash {hash}, expected {}", bytes.len(), block.hash);
    Err(Error::Corrupt { path: path.to_owned(), format: "block", reason })
}
