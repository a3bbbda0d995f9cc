//! The convolution of [`Conv2d`](super::Conv2d) as one operation with its own backward pass.

use super::im2col::Geometry;
use crate::cpu::elements;
use candle_core::backend::BackendStorage;
use candle_core::{
    CpuStorage, CustomOp3, Device, Error, Layout, Result, Shape, Storage, Tensor, WithDType,
};
use rayon::prelude::*;

const OP: &str = "conv2d";

/// Of images, a weight and a bias, all contiguous.
#[derive(Clone, Copy)]
pub(super) struct Convolution {
    pub(super) stride: usize,
    pub(super) padding: usize,
}

type Gradients = (Option<Tensor>, Option<Tensor>, Option<Tensor>);

impl Convolution {
    fn geometry(&self, x: &Shape, weight: &Shape) -> Result<Geometry> {
        let (_, channels, height, width) = x.dims4()?;
        let (outputs, _, kernel, _) = weight.dims4()?;
        Ok(Geometry {
            channels,
            height,
            width,
            outputs,
            kernel,
            stride: self.stride,
            padding: self.padding,
        })
    }

    fn backward<T: WithDType>(
        &self,
        x: &Tensor,
        weight: &Tensor,
        grad: &Tensor,
    ) -> Result<Gradients> {
        let geometry = self.geometry(x.shape(), weight.shape())?;
        let matrix = weight.detach().reshape((geometry.outputs, geometry.taps()))?;
        // The images themselves rarely need a gradient; then its product is not computed.
        let mut sums = Sums::<T>::new(&geometry, x.track_op().then_some(x.elem_count()))?;
        with_elements(x, |x: &[T]| {
            with_elements(grad, |grad: &[T]| sums.add_all(&matrix, x, grad))
        })?;
        let Sums { x: dx, weight: dw, bias: db, .. } = sums;
        let dx = dx.map(|dx| Tensor::from_vec(dx, x.shape(), &Device::Cpu)).transpose()?;
        let db = db.into_iter().map(T::from_f64).collect();
        let db = Tensor::from_vec(db, geometry.outputs, &Device::Cpu)?;
        Ok((dx, Some(dw.reshape(weight.shape())?), Some(db)))
    }
}

/// `y = weight · im2col(x) + bias`, some images at a time.
fn forward<T: WithDType>(geometry: &Geometry, x: &[T], weight: &[T], bias: &[T]) -> Result<Vec<T>> {
    let shape = (geometry.outputs, geometry.taps());
    let weight = Tensor::from_slice(weight, shape, &Device::Cpu)?;
    let mut y = vec![T::zero(); x.len() / geometry.image() * geometry.out_image()];
    let images = geometry.images_at_once();
    let parts = x.chunks(images * geometry.image());
    for (x, y) in parts.zip(y.chunks_mut(images * geometry.out_image())) {
        let product = weight.matmul(&as_matrix(geometry.im2col(x), geometry.taps())?)?;
        with_elements(&product, |product| {
            geometry.images_first(product, bias, y);
            Ok(())
        })?;
    }
    Ok(y)
}

/// The gradients, summed over the images in their order.
struct Sums<'a, T> {
    geometry: &'a Geometry,
    x: Option<Vec<T>>,
    weight: Tensor,
    bias: Vec<f64>,
}

impl<'a, T: WithDType> Sums<'a, T> {
    fn new(geometry: &'a Geometry, x_elements: Option<usize>) -> Result<Self> {
        let shape = (geometry.outputs, geometry.taps());
        Ok(Self {
            geometry,
            x: x_elements.map(|elements| vec![T::zero(); elements]),
            weight: Tensor::zeros(shape, T::DTYPE, &Device::Cpu)?,
            bias: vec![0.0; geometry.outputs],
        })
    }

    fn add_all(&mut self, weight: &Tensor, x: &[T], grad: &[T]) -> Result<()> {
        let (images, geometry) = (self.geometry.images_at_once(), self.geometry);
        let parts = x.chunks(images * geometry.image());
        for (part, (x, grad)) in parts.zip(grad.chunks(images * geometry.out_image())).enumerate() {
            let grad = geometry.outputs_first(grad);
            add_row_sums(&grad, &mut self.bias);
            let grad = as_matrix(grad, geometry.outputs)?;
            let columns = as_matrix(geometry.im2col(x), geometry.taps())?;
            self.weight = (&self.weight + grad.matmul(&columns.t()?)?)?;
            if let Some(dx) = &mut self.x {
                let start = part * images * geometry.image();
                let columns = weight.t()?.matmul(&grad)?;
                with_elements(&columns, |columns| {
                    geometry.col2im(columns, &mut dx[start..start + x.len()]);
                    Ok(())
                })?;
            }
        }
        Ok(())
    }
}

fn as_matrix<T: WithDType>(elements: Vec<T>, rows: usize) -> Result<Tensor> {
    let columns = elements.len() / rows;
    Tensor::from_vec(elements, (rows, columns), &Device::Cpu)
}

/// Adds each row's sum to its element of `sums`, in `f64`.
fn add_row_sums<T: WithDType>(matrix: &[T], sums: &mut [f64]) {
    let columns = matrix.len() / sums.len();
    let rows = matrix.par_chunks(columns.max(1)).zip(sums);
    rows.for_each(|(row, sum)| *sum += lane_sum(row));
}

/// A sum in eight lanes, which the compiler turns into vector additions.
fn lane_sum<T: WithDType>(row: &[T]) -> f64 {
    let (chunks, rest) = row.as_chunks::<8>();
    let mut lanes = [0.0; 8];
    for chunk in chunks {
        lanes.iter_mut().zip(chunk).for_each(|(lane, value)| *lane += value.to_f64());
    }
    lanes.iter().sum::<f64>() + rest.iter().map(|value| value.to_f64()).sum::<f64>()
}

/// Calls `f` with the elements of a contiguous CPU tensor.
fn with_elements<T: WithDType>(tensor: &Tensor, f: impl FnOnce(&[T]) -> Result<()>) -> Result<()> {
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => f(elements(storage.as_slice()?, layout, OP)?),
        _ => Err(Error::Msg("the kernel of conv2d runs on the CPU alone".into()).bt()),
    }
}

impl CustomOp3 for Convolution {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let geometry = self.geometry(x_layout.shape(), weight_layout.shape())?;
        fn run<T: WithDType>(
            g: &Geometry,
            parts: [(&CpuStorage, &Layout); 3],
        ) -> Result<CpuStorage> {
            let [x, weight, bias] = parts.map(|(s, l)| elements(s.as_slice::<T>()?, l, OP));
            Ok(T::to_cpu_storage_owned(forward(g, x?, weight?, bias?)?))
        }
        let parts = [(x, x_layout), (weight, weight_layout), (bias, bias_layout)];
        let y = match x {
            CpuStorage::F32(_) => run::<f32>(&geometry, parts)?,
            CpuStorage::F64(_) => run::<f64>(&geometry, parts)?,
            other => return Err(Error::UnsupportedDTypeForOp(other.dtype(), OP).bt()),
        };
        let rows = x_layout.dims()[0];
        let shape = (rows, geometry.outputs, geometry.out_height(), geometry.out_width());
        Ok((y, shape.into()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _bias: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<Gradients> {
        let grad = grad.contiguous()?;
        match x.dtype() {
            candle_core::DType::F64 => self.backward::<f64>(x, weight, &grad),
            _ => self.backward::<f32>(x, weight, &grad),
        }
    }
}
