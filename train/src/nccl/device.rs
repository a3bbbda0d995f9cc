//! Gradients on a GPU: summed there on a stream of their own, piece by piece, each of which is copied to the
//! CPU while the next ones are summed.
//!
//! `unsafe` is what addresses on a device take: they are within a slice that is borrowed, or has no other
//! owner, until the device is done with them.
#![allow(unsafe_code)]

use super::communicator::{Communicator, Patience, unique_id};
use super::library::{Functions, UniqueId};
use crate::collective::connect::patience;
use crate::{Error, Result};
use candle_core::cuda_backend::cudarc::driver::{
    CudaSlice, CudaStream, DevicePtrMut, DriverError, result,
};
use candle_core::cuda_backend::{CudaStorage, WrapErr};
use candle_core::{CpuStorage, Device, InplaceOp1, Layout, Tensor};
use mobula_core::{Member, Shard};
use mobula_nn::Gradients;
use std::cell::RefCell;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

/// Numbers of a piece, 8 MiB: enough for the rate of any link, and a few of most models.
const PIECE: usize = 2 << 20;
/// How long the driver may take to tell that a rank was lost whose connection broke.
const GRACE: Duration = Duration::from_secs(10);

/// This rank's part in the sums.
#[derive(Debug)]
pub(crate) struct DeviceSums {
    /// `None` after a sum that has failed. The first to be dropped, for streams wait for what it waits for.
    communicator: Option<Communicator>,
    sums: Arc<CudaStream>,
    copies: Arc<CudaStream>,
}

impl DeviceSums {
    /// Connects a member with all others of its group, and waits for them.
    pub(crate) fn connect(
        member: &Arc<Member>,
        device: &Device,
        timeout: Duration,
    ) -> Result<Self> {
        let shard = Shard { rank: member.rank(), world: member.world_size() };
        let functions = Functions::load()?;
        let id = if shard.rank == 0 { unique_id(&functions, 0)?.0.to_vec() } else { Vec::new() };
        let told = member.all_gather("nccl: identifier", &id, patience(member))?;
        let id = told.first().and_then(|id| id.as_ref().try_into().ok()).map(UniqueId);
        let id = id.ok_or_else(|| Error::program("rank 0 has told no identifier of NCCL's"))?;

        let looker = Arc::clone(member);
        let look = Box::new(move || Ok(looker.check_generation()?));
        Self::of(device, functions, id, shard, Patience { timeout, grace: GRACE, look })
    }

    fn of(
        device: &Device,
        functions: Functions,
        id: UniqueId,
        shard: Shard,
        patience: Patience,
    ) -> Result<Self> {
        let context = Arc::clone(device.as_cuda_device()?.cuda_stream().context());
        // NCCL takes the device that is the thread's.
        context.bind_to_thread().w()?;
        let (sums, copies) = (context.new_stream().w()?, context.new_stream().w()?);
        let communicator = Some(Communicator::connect(functions, id, shard, patience)?);
        Ok(Self { communicator, sums, copies })
    }

    /// Sums the gradients that have stayed on the device over the ranks, all of which have to be here. They are
    /// then among the values, as if they had never been elsewhere.
    pub(crate) fn sum(&mut self, gradients: &mut Gradients) -> Result<()> {
        let there = gradients.take_elsewhere()?;
        self.sum_in_place(&there, gradients.values_mut())
    }

    /// Sums the numbers of a tensor where they are, and copies them.
    fn sum_in_place(&mut self, there: &Tensor, values: &mut [f32]) -> Result<()> {
        let sum = SumInPlace(RefCell::new((self, values, Ok(()))));
        there.inplace_op1(&sum)?;
        sum.0.into_inner().2
    }

    fn sum_into(&mut self, slice: &mut CudaSlice<f32>, values: &mut [f32]) -> Result<()> {
        let Some(mut communicator) = self.communicator.take() else {
            return Err(Error::program("NCCL was ended by a sum that has failed"));
        };
        self.sum_by(&mut communicator, slice, values)?;
        // One that has failed ends here: before anybody frees what it works on.
        self.communicator = Some(communicator);
        Ok(())
    }

    fn sum_by(
        &self,
        communicator: &mut Communicator,
        slice: &mut CudaSlice<f32>,
        values: &mut [f32],
    ) -> Result<()> {
        self.sums.join(&Arc::clone(slice.stream())).map_err(driver)?;
        let mut pieces = Vec::new();
        // The guard tells whoever uses the slice next to wait for this stream.
        let (first, _is_written) = slice.device_ptr_mut(&self.sums);
        for piece in pieces_of(values.len()) {
            let at = first + (piece.start * size_of::<f32>()) as u64;
            // SAFETY: these are numbers of the slice, which is borrowed until they are sums or the
            // communicator is gone. The stream is of the context that the communicator was made in.
            unsafe {
                let stream = self.sums.cu_stream().cast();
                communicator.sum(at as *mut std::ffi::c_void, piece.len(), stream)?;
            }
            pieces.push((at, piece, self.sums.record_event(None).map_err(driver)?));
        }
        for (at, piece, done) in pieces {
            communicator.wait_for("sum gradients", || done.try_is_complete().map_err(driver))?;
            // SAFETY: as many numbers there as here, which nobody writes any more. From the device to memory
            // that is not pinned, this returns when it is done.
            unsafe {
                result::memcpy_dtoh_async(&mut values[piece], at, self.copies.cu_stream())
                    .map_err(driver)?;
            }
        }
        self.copies.synchronize().map_err(driver)
    }
}

fn pieces_of(len: usize) -> impl Iterator<Item = Range<usize>> {
    (0..len).step_by(PIECE).map(move |start| start..len.min(start + PIECE))
}

fn driver(error: DriverError) -> Error {
    Error::Tensor(error.into())
}

/// A sum where candle keeps a tensor's numbers, and what became of it.
struct SumInPlace<'a>(RefCell<(&'a mut DeviceSums, &'a mut [f32], Result<()>)>);

impl InplaceOp1 for SumInPlace<'_> {
    fn name(&self) -> &'static str {
        "sum over GPUs"
    }

    fn cpu_fwd(&self, _: &mut CpuStorage, _: &Layout) -> candle_core::Result<()> {
        candle_core::bail!(
            "the model is on the CPU, and `Transport::Nccl` sums on GPUs: build it on `context.device()`"
        )
    }

    fn cuda_fwd(&self, storage: &mut CudaStorage, layout: &Layout) -> candle_core::Result<()> {
        let (sums, values, done) = &mut *self.0.borrow_mut();
        let slice = storage.as_cuda_slice_mut::<f32>()?;
        if layout.contiguous_offsets() != Some((0, values.len())) || slice.len() != values.len() {
            candle_core::bail!("gradients on a GPU: expected one piece, got {layout:?}")
        }
        *done = sums.sum_into(slice, values);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_all_there_is() {
        assert_eq!((pieces_of(0).next(), pieces_of(5).next()), (None, Some(0..5)));
        let pieces: Vec<_> = pieces_of(2 * PIECE + 1).collect();
        assert_eq!(pieces, [0..PIECE, PIECE..2 * PIECE, 2 * PIECE..2 * PIECE + 1]);
    }

    /// All but other ranks: what it sums are the numbers as they are, in pieces.
    #[test]
    fn a_rank_by_itself_gets_what_it_has() {
        let gpus = mobula_core::Resources::of_this_machine().gpus;
        let functions = match Functions::load() {
            Ok(functions) if gpus > 0.0 => functions,
            Ok(_) => return eprintln!("SKIPPED: no GPU, so nothing ran on one"),
            Err(error) => return eprintln!("SKIPPED: {error}, so nothing was summed by it"),
        };
        let device = Device::new_cuda_with_stream(0).expect("the first GPU");
        let id = unique_id(&functions, 0).expect("an identifier");
        let look = Box::new(|| Ok(()));
        let patience = Patience { timeout: Duration::from_secs(60), grace: GRACE, look };
        let mut sums = DeviceSums::of(&device, functions, id, Shard::ALL, patience).expect("sums");
        let numbers: Vec<f32> = (0..2 * PIECE + 5).map(|at| at as f32).collect();
        for round in 0..3 {
            let there = Tensor::from_slice(&numbers, numbers.len(), &device).expect("there");
            let mut values = vec![0.0; numbers.len()];
            sums.sum_in_place(&there, &mut values).expect("sums");
            assert!(values == numbers, "round {round}");
            assert!(there.to_vec1::<f32>().expect("there") == numbers, "in place");
        }
        let other = Tensor::zeros(3, candle_core::DType::F32, &device).expect("there");
        assert!(sums.sum_in_place(&other, &mut [0.0; 2]).is_err(), "not as many");
    }
}
