//! A worker's share of a stream: on its device, in the parts of its virtual shards, each batch with
//! the position behind it.

use candle_core::Device;
use mobula_core::{Batch, BatchSource, BatchStream, Error, Shard, StreamState};
use std::ops::Range;

/// The streams of a worker's shards, as one.
pub(crate) struct WorkerStream {
    streams: Vec<Box<dyn BatchStream>>,
    is_virtual: bool,
    device: Device,
}

impl WorkerStream {
    /// The stream of a rank, or of its virtual shards.
    pub(crate) fn open(
        source: &dyn BatchSource,
        shard: Shard,
        virtual_shards: Option<usize>,
        device: &Device,
    ) -> Result<Self, Error> {
        let shards = match virtual_shards {
            Some(world) => owned(shard, world).map(|rank| Shard { rank, world }).collect(),
            None => vec![shard],
        };
        let streams =
            shards.into_iter().map(|shard| source.open(shard)).collect::<Result<_, _>>()?;
        Ok(Self { streams, is_virtual: virtual_shards.is_some(), device: device.clone() })
    }

    /// The next batches of all shards: at the end of an epoch there is none for any.
    fn next(&mut self) -> Result<Option<Batch>, Error> {
        let next = self.streams.iter_mut().map(|stream| stream.next_batch());
        let next = next.collect::<Result<Vec<_>, _>>()?;
        let Some(mut batches) = next.into_iter().collect::<Option<Vec<_>>>() else {
            return Ok(None);
        };
        let global_rows = batches.first().map_or(0, Batch::global_rows);
        let batch = match self.is_virtual {
            true => Batch::concat(&batches)?,
            false => batches.pop().unwrap_or_default(),
        };
        Ok(Some(batch.with_global_rows(global_rows)))
    }
}

/// The virtual shards of a rank: neighbours, so that what they sum is a branch of the tree in which
/// those of all ranks are summed.
pub(crate) fn owned(shard: Shard, virtual_shards: usize) -> Range<usize> {
    let each = virtual_shards / shard.world;
    shard.rank * each..(shard.rank + 1) * each
}

impl BatchStream for WorkerStream {
    fn next_batch(&mut self) -> Result<Option<Batch>, Error> {
        let Some(batch) = self.next()? else {
            return Ok(None);
        };
        // Nothing computes with a batch without rows, and CUDA knows no empty tensors.
        let batch = match &self.device {
            device if !device.is_cpu() && batch.rows() > 0 => batch.to_device(device)?,
            _ => batch,
        };
        Ok(Some(batch.with_position(self.state())))
    }

    fn state(&self) -> StreamState {
        self.streams.first().map(|stream| stream.state()).unwrap_or_default()
    }

    fn restore(&mut self, state: &StreamState) -> Result<(), Error> {
        self.streams.iter_mut().try_for_each(|stream| stream.restore(state))
    }

    fn steps_per_epoch(&self) -> u64 {
        self.streams.first().map_or(0, |stream| stream.steps_per_epoch())
    }
}
