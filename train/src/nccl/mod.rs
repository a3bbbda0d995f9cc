//! Sums of gradients where they are: on the workers' GPUs, by NVIDIA's NCCL.
//!
//! NCCL is a library of the machine that is loaded when it is asked for. It has no deadlines, and waits
//! for a rank that is gone until it is told to stop; so the ranks first meet by the ways that have
//! deadlines and know who is late, with loss and weight of the step. What NCCL is given after that
//! waits for nobody, unless a rank is lost or the network between the GPUs is, which is seen while it is
//! waited for.

#[cfg(any(feature = "cuda", test))]
mod communicator;
#[cfg(feature = "cuda")]
mod device;
#[cfg(test)]
mod fake;
#[cfg(any(feature = "cuda", test))]
mod library;

#[cfg(feature = "cuda")]
pub(crate) use device::{DeviceSums, first_gpu};
#[cfg(feature = "cuda")]
pub use library::nccl_version;

/// Without the feature `cuda` there are no GPUs; who asks for some is told so before the start.
#[cfg(not(feature = "cuda"))]
pub(crate) fn first_gpu() -> crate::Result<candle_core::Device> {
    Ok(candle_core::Device::new_cuda(0)?)
}

/// The same of sums on them.
#[cfg(not(feature = "cuda"))]
#[derive(Debug)]
pub(crate) enum DeviceSums {}

#[cfg(not(feature = "cuda"))]
impl DeviceSums {
    pub(crate) fn connect(
        _: &std::sync::Arc<mobula_core::Member>,
        _: &candle_core::Device,
        _: std::time::Duration,
    ) -> crate::Result<Self> {
        let (gpus, missing) = (0.0, "to be built with the feature `cuda`");
        Err(crate::Error::Gpus { gpus, missing })
    }

    pub(crate) fn meet(
        &mut self,
        _: &dyn crate::Collective,
        _: &mut mobula_nn::Gradients,
    ) -> crate::Result<()> {
        match *self {}
    }

    pub(crate) fn sum(&mut self, _: &mut mobula_nn::Gradients) -> crate::Result<()> {
        match *self {}
    }
}
