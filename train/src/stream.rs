//! Where a worker computes.

use candle_core::Device;
use mobula_core::{Batch, BatchStream, Error, StreamState};

/// A stream whose batches are moved to a device.
pub(crate) struct OnDevice {
    pub(crate) stream: Box<dyn BatchStream>,
    pub(crate) device: Device,
}

impl BatchStream for OnDevice {
    fn next_batch(&mut self) -> Result<Option<Batch>, Error> {
        match self.stream.next_batch()? {
            // Nothing computes with it, and CUDA knows no empty tensors.
            Some(batch) if batch.rows() > 0 => batch.to_device(&self.device).map(Some),
            other => Ok(other),
        }
    }

    fn state(&self) -> StreamState {
        self.stream.state()
    }

    fn restore(&mut self, state: &StreamState) -> Result<(), Error> {
        self.stream.restore(state)
    }

    fn steps_per_epoch(&self) -> u64 {
        self.stream.steps_per_epoch()
    }
}
