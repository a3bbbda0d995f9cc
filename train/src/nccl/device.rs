//! Gradients on a GPU: summed there, on a stream of their own.
//!
//! `unsafe` is what addresses on a device take: they are within a slice that is borrowed, or has no other
//! owner, until the device is done with them.
#![allow(unsafe_code)]

use super::communicator::{Communicator, Patience, unique_id};
use super::library::{Functions, UniqueId};
use crate::collective::barrier::pause;
use crate::collective::connect::patience;
use crate::collective::{Collective, ReduceOp};
use crate::{Error, Result};
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaStream, DevicePtrMut, DriverError};
use candle_core::cuda_backend::{CudaStorage, WrapErr};
use candle_core::{CpuStorage, Device, InplaceOp1, Layout, Tensor};
use mobula_core::{Member, Shard};
use mobula_nn::Gradients;
use std::cell::RefCell;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long the driver may take to tell that a rank was lost whose connection broke.
const GRACE: Duration = Duration::from_secs(10);

/// The first GPU that this process sees.
///
/// One stream for all threads: candle's other way has one for each, of which none waits for another. And no
/// events for each operation, by which several streams would wait for each other.
pub(crate) fn first_gpu() -> Result<Device> {
    let device = Device::new_cuda_with_stream(0)?;
    // SAFETY: all tensors are on the one stream of the device, which is also what frees them. The stream of
    // `DeviceSums` waits for it, and it does not go on before that is done.
    unsafe { device.as_cuda_device()?.disable_event_tracking() };
    Ok(device)
}

/// This rank's part in the sums.
#[derive(Debug)]
pub(crate) struct DeviceSums {
    /// `None` after a sum that has failed. The first to be dropped, for streams wait for what it waits for.
    communicator: Option<Communicator>,
    sums: Arc<CudaStream>,
    shard: Shard,
    timeout: Duration,
    /// As many numbers as all ranks are known to have.
    agreed: Option<usize>,
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
        if std::env::var("NCCL_COMM_BLOCKING").is_ok_and(|value| value != "0") {
            let reason = "with NCCL_COMM_BLOCKING it would wait without an end: unset it";
            return Err(failed(shard.rank, "connect the ranks", reason));
        }
        let id = if shard.rank == 0 { unique_id(&functions, 0)?.0.to_vec() } else { Vec::new() };
        let told = member.all_gather("nccl: identifier", &id, patience(member))?;
        let id = told.first().and_then(|id| id.as_ref().try_into().ok()).map(UniqueId);
        let id = id.ok_or_else(|| {
            failed(shard.rank, "connect the ranks", "rank 0 has told no identifier")
        })?;
        let looker = Arc::clone(member);
        let look = Box::new(move || Ok(looker.check_generation()?));
        // Connections are made until the first sum has come back.
        let patient = Patience { timeout: timeout.max(patience(member)), grace: GRACE, look };
        Self::of(device, functions, id, shard, patient, timeout)
    }

    fn of(
        device: &Device,
        functions: Functions,
        id: UniqueId,
        shard: Shard,
        patient: Patience,
        timeout: Duration,
    ) -> Result<Self> {
        let context = Arc::clone(device.as_cuda_device()?.cuda_stream().context());
        // NCCL takes the device that is the thread's.
        context.bind_to_thread().w()?;
        let sums = context.new_stream().w()?;
        let communicator = Some(Communicator::connect(functions, id, shard, patient)?);
        Ok(Self { communicator, sums, shard, timeout, agreed: None })
    }

    /// Meets the other ranks, with loss and weight of the step: those that are late are told by name here, as
    /// NCCL could not.
    pub(crate) fn meet(&mut self, ranks: &dyn Collective, gradients: &mut Gradients) -> Result<()> {
        let len = gradients.values().len();
        if self.agreed != Some(len) {
            self.agree(len, &ranks.gather_one(len as f64)?)?;
        }
        ranks.all_reduce(&mut gradients.as_reduced_mut()[len..], ReduceOp::Sum)
    }

    /// Sums the gradients that have stayed on the device over all ranks, which have met.
    pub(crate) fn sum(&mut self, gradients: &mut Gradients) -> Result<()> {
        let there = gradients.take_elsewhere()?;
        self.sum_in_place(&there)?;
        Ok(gradients.put_elsewhere(there)?)
    }

    /// NCCL does not notice that ranks have differently many.
    fn agree(&mut self, len: usize, all: &[f64]) -> Result<()> {
        let other = all.iter().position(|other| *other != len as f64);
        match other {
            None => self.agreed = Some(len),
            Some(other) => {
                let (rank, other_len) = (self.shard.rank, all[other] as usize);
                return Err(Error::CollectiveLength { rank, len, other, other_len });
            }
        }
        Ok(())
    }

    /// Sums the numbers of a tensor where they are, and waits for the sums.
    fn sum_in_place(&mut self, there: &Tensor) -> Result<()> {
        let sum = SumInPlace(RefCell::new((self, Ok(()))));
        there.inplace_op1(&sum)?;
        let (this, done) = sum.0.into_inner();
        if done.is_err() && !this.are_idle() {
            // Whoever frees them would give memory to others that is still written to.
            std::mem::forget(there.clone());
        }
        done
    }

    /// Whether nothing is left on the streams, as it should be behind a communicator that has ended.
    fn are_idle(&self) -> bool {
        let (begun, mut looks) = (Instant::now(), 0);
        let Ok(end) = self.sums.record_event(None) else { return false };
        while begun.elapsed() < GRACE {
            match end.try_is_complete() {
                Ok(false) => pause(&mut looks),
                Ok(true) => return true,
                Err(_) => return false,
            }
        }
        false
    }

    fn sum_into(&mut self, slice: &mut CudaSlice<f32>) -> Result<()> {
        let rank = self.shard.rank;
        if slice.context() != self.sums.context() {
            let [theirs, own] = [slice.context(), self.sums.context()].map(|c| c.ordinal());
            let reason = format!(
                "the model is on GPU {theirs}, the worker's is {own}: build it on `context.device()`"
            );
            return Err(failed(rank, SUM, reason));
        }
        let Some(mut communicator) = self.communicator.take() else {
            return Err(failed(rank, SUM, "it was ended by a sum that has failed"));
        };
        self.sum_by(&mut communicator, slice)?;
        // One that has failed ends before anybody frees what it works on.
        communicator.patience.timeout = self.timeout;
        self.communicator = Some(communicator);
        Ok(())
    }

    fn sum_by(&self, communicator: &mut Communicator, slice: &mut CudaSlice<f32>) -> Result<()> {
        let driver = |error: DriverError| failed(self.shard.rank, SUM, error);
        self.sums.join(&Arc::clone(slice.stream())).map_err(driver)?;
        let len = slice.len();
        let (first, _written) = slice.device_ptr_mut(&self.sums);
        // SAFETY: these are the numbers of the slice, which is borrowed until they are sums; if that fails,
        // `sum_in_place` sees to it that they stay. The stream is of the context that the communicator was
        // made in, and so is the slice.
        unsafe {
            let stream = self.sums.cu_stream().cast();
            communicator.sum(first as *mut std::ffi::c_void, len, stream)?;
        }
        let done = self.sums.record_event(None).map_err(driver)?;
        communicator.wait_for(SUM, || done.try_is_complete().map_err(driver))
    }
}

const SUM: &str = "sum gradients";

fn failed(rank: usize, action: &'static str, reason: impl ToString) -> Error {
    Error::Nccl { rank, action, reason: reason.to_string() }
}

/// A sum where candle keeps a tensor's numbers, and what became of it.
struct SumInPlace<'a>(RefCell<(&'a mut DeviceSums, Result<()>)>);

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
        let (sums, done) = &mut *self.0.borrow_mut();
        let slice = storage.as_cuda_slice_mut::<f32>()?;
        if layout.contiguous_offsets() != Some((0, slice.len())) {
            candle_core::bail!("internal error: gradients in one piece expected, got {layout:?}")
        }
        *done = sums.sum_into(slice);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All but other ranks: what it sums are the numbers as they are.
    #[test]
    fn a_rank_by_itself_gets_what_it_has() {
        let gpus = mobula_core::Resources::of_this_machine().gpus;
        let functions = match Functions::load() {
            Ok(functions) if gpus > 0.0 => functions,
            Ok(_) => return eprintln!("SKIPPED: no GPU, so nothing ran on one"),
            Err(error) => return eprintln!("SKIPPED: {error}, so nothing was summed by it"),
        };
        let device = first_gpu().expect("the first GPU");
        let id = unique_id(&functions, 0).expect("an identifier");
        let look = Box::new(|| Ok(()));
        let timeout = Duration::from_secs(60);
        let patience = Patience { timeout, grace: GRACE, look };
        let sums = DeviceSums::of(&device, functions, id, Shard::ALL, patience, timeout);
        let mut sums = sums.expect("connects");
        let numbers: Vec<f32> = (0..(4 << 20) + 5).map(|at| at as f32).collect();
        for round in 0..3 {
            let there = Tensor::from_slice(&numbers, numbers.len(), &device).expect("there");
            sums.sum_in_place(&there).expect("sums");
            assert!(there.to_vec1::<f32>().expect("there") == numbers, "round {round}");
        }
        let part = Tensor::zeros(3, candle_core::DType::F32, &device).expect("there");
        let part = part.narrow(0, 1, 2).expect("a part");
        assert!(sums.sum_in_place(&part).is_err(), "not all of what is there");
    }
}
