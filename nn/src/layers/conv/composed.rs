//! Convolutions in candle's own operations, for devices that this crate has no kernel for.

use super::geometry::Axis;
use crate::link::has_gradients;
use candle_core::backend::BackendStorage;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp2, Error, Layout, MetalStorage, Result, Shape, Storage, Tensor,
};
use std::sync::{Mutex, PoisonError};

/// How windows move, without padding, over images that end with the last one.
#[derive(Clone, Copy)]
pub(super) struct Windows {
    pub(super) stride: usize,
    pub(super) dilation: usize,
    pub(super) groups: usize,
}

/// Candle's convolution of images with a weight `[outputs, inputs / groups, height, width]`, and another
/// backward pass: candle's own has a transposed convolution, which is no product of matrices. With it a step of
/// ResNet-18 took an H200 70 ms, without it 57.
pub(super) fn conv2d(x: &Tensor, weight: &Tensor, windows: Windows) -> Result<Tensor> {
    let Windows { stride, dilation, groups } = windows;
    let y = x.detach().conv2d(&weight.detach(), 0, stride, dilation, groups)?;
    match has_gradients() && (x.track_op() || weight.track_op()) {
        true => x.apply_op2(weight, Convolved { windows, y: Mutex::new(Some(y)) }),
        false => Ok(y),
    }
}

/// The weight with which a convolution takes gradients back to images: turned around, its outputs inputs.
pub(super) fn turned(weight: &Tensor, groups: usize) -> Result<Tensor> {
    let (outputs, inputs, height, width) = weight.dims4()?;
    let weight = weight.reshape((groups, outputs / groups, inputs, height * width))?;
    let weight = weight.transpose(1, 2)?.contiguous()?;
    let weight = weight.reshape((groups * inputs, outputs / groups, height, width))?;
    let backwards = |size: usize| Tensor::from_iter((0..size as u32).rev(), weight.device());
    weight.index_select(&backwards(height)?, 2)?.index_select(&backwards(width)?, 3)
}

/// With `stride − 1` zeros between any two, and at either end as many as a convolution needs that is to have
/// each pixel under each tap.
pub(super) fn spread(x: &Tensor, dim: usize, axis: Axis) -> Result<Tensor> {
    let (size, border) = (x.dim(dim)?, Axis::reach(axis.kernel, axis.dilation) - 1);
    let x = x.unsqueeze(dim + 1)?.pad_with_zeros(dim + 1, 0, axis.stride - 1)?;
    let x = x.flatten(dim, dim + 1)?.narrow(dim, 0, (size - 1) * axis.stride + 1)?;
    x.pad_with_zeros(dim, border, border)
}

impl Windows {
    fn of_images(self, weight: &Tensor, gradient: &Tensor) -> Result<Tensor> {
        let Self { stride, dilation, .. } = self;
        let axis =
            |dim| Ok::<_, Error>(Axis { kernel: weight.dim(dim)?, stride, dilation, ..Axis::ONE });
        let gradient = spread(&spread(gradient, 2, axis(2)?)?, 3, axis(3)?)?;
        let weight = turned(weight, self.groups)?;
        gradient.contiguous()?.conv2d(&weight, 0, 1, self.dilation, self.groups)
    }

    /// Images and gradients change places with their channels: each tap is a sum over all of them.
    fn of_weight(self, x: &Tensor, gradient: &Tensor) -> Result<Tensor> {
        let group = |(x, gradient): (&Tensor, &Tensor)| {
            let (x, gradient) = (x.transpose(0, 1)?, gradient.transpose(0, 1)?.contiguous()?);
            x.conv2d(&gradient, 0, self.dilation, self.stride, 1)?.transpose(0, 1)
        };
        let (x, gradient) = (x.chunk(self.groups, 1)?, gradient.chunk(self.groups, 1)?);
        let groups = x.iter().zip(&gradient).map(group).collect::<Result<Vec<_>>>()?;
        Tensor::cat(&groups, 0)
    }
}

/// Gives a backward pass to what came out, which becomes the graph's.
struct Convolved {
    windows: Windows,
    y: Mutex<Option<Tensor>>,
}

impl Convolved {
    fn take(&self) -> Result<Tensor> {
        let y = self.y.lock().unwrap_or_else(PoisonError::into_inner).take();
        y.ok_or_else(|| Error::msg("internal error: what a convolution gives is taken once"))
    }
}

fn is_elsewhere<T>() -> Result<T> {
    Err(Error::msg("internal error: what a convolution gives is on another device"))
}

impl CustomOp2 for Convolved {
    fn name(&self) -> &'static str {
        "conv2d"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let y = self.take()?;
        let (storage, layout) = y.storage_and_layout();
        match &*storage {
            Storage::Cpu(storage) => Ok((storage.try_clone(layout)?, layout.shape().clone())),
            _ => is_elsewhere(),
        }
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let y = self.take()?;
        let (storage, layout) = y.storage_and_layout();
        match &*storage {
            Storage::Cuda(storage) => Ok((storage.try_clone(layout)?, layout.shape().clone())),
            _ => is_elsewhere(),
        }
    }

    fn metal_fwd(
        &self,
        _: &MetalStorage,
        _: &Layout,
        _: &MetalStorage,
        _: &Layout,
    ) -> Result<(MetalStorage, Shape)> {
        let y = self.take()?;
        let (storage, layout) = y.storage_and_layout();
        match &*storage {
            Storage::Metal(storage) => Ok((storage.try_clone(layout)?, layout.shape().clone())),
            _ => is_elsewhere(),
        }
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let of_images = || self.windows.of_images(&weight.detach(), gradient);
        let of_images = x.track_op().then(of_images).transpose()?;
        Ok((of_images, Some(self.windows.of_weight(&x.detach(), gradient)?)))
    }
}
