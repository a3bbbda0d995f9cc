//! How the operations of this crate stand in candle's graph.
//!
//! Candle adds each gradient to a tensor of zeros, into a third one, even where a value is used
//! once. Between operations of this crate gradients go past it. What candle's graph holds for a
//! result is a *token*, one number, whose node knows the backward pass; the result itself is a
//! second node above the token, for operations of others. An operation of this crate that is
//! given such a result builds on its token: then candle orders the passes, as it does for
//! everything, and adds up tokens, while the gradients are handed over through a [`Slot`].
//!
//! A slot belongs to the graph: of results that two losses share, one backward pass at a time.
//!
//! ```text
//! x, w, b → token of y ─→ token of z ─→ ..      candle's order, a number each
//!               │ └ slot ←── gradient of y ───┘    ours
//!               └→ y                              for anybody else
//! ```

use crate::cpu::{elements, tensor, unsupported};
use crate::kernels::{Real, add_assign};
use candle_core::backend::BackendStorage;
use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, CustomOp3, DType, Device, Error, Layout, Result, Shape,
    Storage, Tensor, TensorId,
};
use std::cell::Cell;
use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, OnceLock, PoisonError};

/// The gradient of a result, as far as those who used it have given theirs.
#[derive(Debug, Default)]
struct Slot(Mutex<Option<Arc<CpuStorage>>>);

/// A result of this crate, by the id of its tensor.
#[derive(Clone)]
struct Link {
    token: Tensor,
    slot: Arc<Slot>,
    /// The tensors that show it, for who forgets them.
    views: Arc<Mutex<Vec<TensorId>>>,
}

/// Of the results that exist. Global, because tensors go from thread to thread.
static LINKS: LazyLock<Mutex<HashMap<TensorId, Link>>> = LazyLock::new(Mutex::default);

/// An input of an operation, and where its gradient goes.
#[derive(Clone)]
pub(crate) struct Source {
    /// What stands for it in the graph.
    graph: Tensor,
    shape: Shape,
    slot: Option<Arc<Slot>>,
    is_tracked: bool,
}

thread_local! {
    /// How many [`no_grad`] this thread is in.
    static WITHOUT: Cell<u32> = const { Cell::new(0) };
}

/// Runs `f` so that what the operations of this crate compute in it on the CPU has no gradients:
/// they keep nothing for a backward pass. For evaluation and serving, as `torch.no_grad`, on this
/// thread.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use mobula_nn::{Module, Params, Pass, layers::Linear, no_grad};
///
/// let layer = Linear::new(&Params::new(7, &Device::Cpu), 2, 1)?;
/// let x = Tensor::new(&[[3f32, 5.0]], &Device::Cpu)?;
/// let y = no_grad(|| layer.forward(&x, &Pass::eval()))?;
/// assert!(!y.track_op());
/// # Ok::<(), mobula_nn::Error>(())
/// ```
pub fn no_grad<R>(f: impl FnOnce() -> R) -> R {
    struct Inside;
    impl Drop for Inside {
        fn drop(&mut self) {
            WITHOUT.set(WITHOUT.get() - 1);
        }
    }
    WITHOUT.set(WITHOUT.get() + 1);
    let _inside = Inside;
    f()
}

/// Whether this thread is not in [`no_grad`].
pub(crate) fn has_gradients() -> bool {
    WITHOUT.get() == 0
}

/// What a backward pass tells candle about one input.
pub(crate) type Told = Option<Tensor>;

impl Source {
    pub(crate) fn of(x: &Tensor) -> Self {
        let link = lock(&LINKS).get(&x.id()).cloned();
        let (graph, slot) = match link {
            Some(Link { token, slot, .. }) => (token, Some(slot)),
            None => (x.clone(), None),
        };
        let is_tracked = graph.track_op() && has_gradients();
        Self { graph, shape: x.shape().clone(), slot, is_tracked }
    }

    /// Whether somebody wants its gradient.
    pub(crate) fn is_tracked(&self) -> bool {
        self.is_tracked
    }

    /// Hands over its gradient, of one of the uses that it has.
    pub(crate) fn give<T: Real>(&self, gradient: Vec<T>) -> Result<Told> {
        match &self.slot {
            _ if !self.is_tracked() => Ok(None),
            Some(slot) => {
                slot.add(Arc::new(T::to_cpu_storage_owned(gradient)))?;
                Ok(Some(self.graph.zeros_like()?))
            }
            None => tensor(gradient, self.shape.clone()).map(Some),
        }
    }

    /// The same with a gradient that others get too.
    pub(crate) fn give_shared<T: Real>(&self, gradient: &Arc<CpuStorage>) -> Result<Told> {
        match &self.slot {
            Some(slot) if self.is_tracked() => {
                slot.add(Arc::clone(gradient))?;
                Ok(Some(self.graph.zeros_like()?))
            }
            _ => self.give(T::cpu_storage_as_slice(gradient)?.to_vec()),
        }
    }
}

impl Slot {
    fn add(&self, gradient: Arc<CpuStorage>) -> Result<()> {
        let mut slot = lock(&self.0);
        let sum = match slot.take() {
            None => gradient,
            Some(before) => sum(before, gradient)?,
        };
        *slot = Some(sum);
        Ok(())
    }

    fn take(&self) -> Result<Arc<CpuStorage>> {
        let gradient = lock(&self.0).take();
        gradient
            .ok_or_else(|| Error::Msg("a backward pass came to a result nobody used".into()).bt())
    }
}

/// In place of whichever nobody else has.
fn sum(mut a: Arc<CpuStorage>, mut b: Arc<CpuStorage>) -> Result<Arc<CpuStorage>> {
    if let Some(owned) = Arc::get_mut(&mut a) {
        add_to(owned, &b)?;
        return Ok(a);
    }
    add_to(Arc::make_mut(&mut b), &a)?;
    Ok(b)
}

fn add_to(sum: &mut CpuStorage, other: &CpuStorage) -> Result<()> {
    match (sum, other) {
        (CpuStorage::F32(sum), CpuStorage::F32(other)) => add_assign(sum, other),
        (CpuStorage::F64(sum), CpuStorage::F64(other)) => add_assign(sum, other),
        (sum, _) => return Err(unsupported(sum.dtype(), "gradient sum")),
    }
    Ok(())
}

/// The gradient of a result. It may be shared.
pub(crate) type Gradient = Arc<CpuStorage>;

/// The elements of a gradient, to work on in place; copied only if others have it too.
pub(crate) fn owned<T: Real>(gradient: Gradient) -> Result<Vec<T>> {
    T::cpu_storage_data(Arc::unwrap_or_clone(gradient))
}

/// A result of an operation of this crate on `sources`: `values` in `shape`, on the CPU.
///
/// `backward` is given the gradient of the result and gives that of each source, in their order.
/// Where no source is tracked it is dropped, with what it holds.
pub(crate) fn result<T: Real>(
    values: Vec<T>,
    shape: impl Into<Shape>,
    sources: &[&Source],
    backward: impl Fn(Gradient) -> Result<Vec<Told>> + Send + Sync + 'static,
) -> Result<Tensor> {
    let shape = shape.into();
    if !sources.iter().any(|source| source.is_tracked()) {
        return tensor(values, shape);
    }
    let slot = Arc::new(Slot::default());
    let tracked: Vec<bool> = sources.iter().map(|source| source.is_tracked()).collect();
    let graph = sources.iter().filter(|source| source.is_tracked());
    let graph: Vec<Tensor> = graph.map(|source| source.graph.clone()).collect();
    let gradient = Arc::clone(&slot);
    let told = move || {
        let told = backward(gradient.take()?)?.into_iter().zip(&tracked);
        Ok(told.filter(|(_, is_tracked)| **is_tracked).map(|(told, _)| told).collect())
    };
    let token = Token { dtype: T::DTYPE, told: Box::new(told) }.on_all(&graph)?;
    reveal(&token, slot, T::to_cpu_storage_owned(values), shape)
}

/// The same for a backward pass that looks at the result, which is kept for it.
pub(crate) fn result_kept<T: Real>(
    values: Vec<T>,
    shape: impl Into<Shape>,
    sources: &[&Source],
    backward: impl Fn(Gradient, &Tensor) -> Result<Vec<Told>> + Send + Sync + 'static,
) -> Result<Tensor> {
    let kept = Arc::new(OnceLock::new());
    let inner = Arc::clone(&kept);
    let y = result(values, shape, sources, move |gradient| {
        let y = inner.get().ok_or_else(|| Error::Msg("a result without its values".into()).bt())?;
        backward(gradient, y)
    })?;
    // Without its place in the graph, which would be a circle.
    let _ = kept.set(y.detach());
    Ok(y)
}

/// The values of a result that stands on `token`.
fn reveal(token: &Tensor, slot: Arc<Slot>, values: CpuStorage, shape: Shape) -> Result<Tensor> {
    let link = Link { token: token.clone(), slot: Arc::clone(&slot), views: Arc::default() };
    let (values, views) = (Mutex::new(Some(values)), Arc::clone(&link.views));
    let y = token.apply_op1(Reveal { values, shape, slot, views })?;
    link.register(&y);
    Ok(y)
}

/// The same elements in another shape. Gradients between operations of this crate go past it.
pub(crate) fn reshape(x: &Tensor, shape: impl Into<Shape>) -> Result<Tensor> {
    let y = x.reshape(shape.into())?;
    let link = lock(&LINKS).get(&x.id()).cloned();
    if let Some(link) = link.filter(|_| x.is_contiguous()) {
        // Its graph goes through `x`, whose operation forgets them both.
        link.register(&y);
    }
    Ok(y)
}

impl Link {
    fn register(self, view: &Tensor) {
        lock(&self.views).push(view.id());
        lock(&LINKS).insert(view.id(), self);
    }
}

/// How many inputs candle's operations have.
const MOST: usize = 3;

/// A node of candle's graph whose value is one number that nobody reads.
struct Token {
    dtype: DType,
    /// The gradients of what it stands on.
    told: Box<dyn Fn() -> Result<Vec<Told>> + Send + Sync>,
}

impl Token {
    /// Its tensor, on up to three others.
    fn on(self, tensors: &[Tensor]) -> Result<Tensor> {
        match tensors {
            [a] => a.apply_op1(self),
            [a, b] => a.apply_op2(b, self),
            [a, b, c] => a.apply_op3(b, c, self),
            _ => Err(Error::Msg(format!("an operation of {} tensors", tensors.len())).bt()),
        }
    }

    /// Its tensor, on as many as there are: more than three go through tokens in between.
    fn on_all(self, tensors: &[Tensor]) -> Result<Tensor> {
        if tensors.len() <= MOST {
            return self.on(tensors);
        }
        let (dtype, shared) = (self.dtype, Arc::new(Mutex::new(Vec::new())));
        let fan = |(at, tensors): (usize, &[Tensor])| {
            let shared = Arc::clone(&shared);
            let told = Box::new(move || Ok(take_some(&mut lock(&shared), at)));
            Self { dtype, told }.on(tensors)
        };
        let fans = tensors.chunks(MOST).enumerate().map(fan).collect::<Result<Vec<_>>>()?;
        let count = fans.len();
        let told = move || {
            *lock(&shared) = (self.told)()?;
            let token = Tensor::zeros((), dtype, &Device::Cpu)?;
            Ok(vec![Some(token); count])
        };
        Self { dtype, told: Box::new(told) }.on(&fans)
    }

    fn forward(&self) -> Result<(CpuStorage, Shape)> {
        let token = match self.dtype {
            DType::F64 => CpuStorage::F64(vec![0.0]),
            _ => CpuStorage::F32(vec![0.0]),
        };
        Ok((token, ().into()))
    }

    fn backward(&self) -> Result<(Told, Told, Told)> {
        let mut told = (self.told)()?.into_iter();
        let mut next = || told.next().flatten();
        Ok((next(), next(), next()))
    }
}

/// What is told to the sources of number `fan`.
fn take_some(told: &mut [Told], fan: usize) -> Vec<Told> {
    told.iter_mut().skip(fan * MOST).take(MOST).map(Option::take).collect()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

const NAME: &str = "mobula-nn";

impl CustomOp1 for Token {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.forward()
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<Told> {
        self.backward().map(|told| told.0)
    }
}

impl CustomOp2 for Token {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.forward()
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<(Told, Told)> {
        self.backward().map(|told| (told.0, told.1))
    }
}

impl CustomOp3 for Token {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.forward()
    }

    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
    ) -> Result<(Told, Told, Told)> {
        self.backward()
    }
}

/// The values of a result, for operations that are not this crate's.
struct Reveal {
    values: Mutex<Option<CpuStorage>>,
    shape: Shape,
    slot: Arc<Slot>,
    views: Arc<Mutex<Vec<TensorId>>>,
}

impl CustomOp1 for Reveal {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        let values = lock(&self.values).take();
        let values = values.ok_or_else(|| Error::Msg("a result is computed once".into()).bt())?;
        Ok((values, self.shape.clone()))
    }

    fn bwd(&self, token: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Told> {
        let grad = grad.contiguous()?;
        let (storage, layout) = grad.storage_and_layout();
        let gradient = match &*storage {
            Storage::Cpu(CpuStorage::F32(values)) => {
                CpuStorage::F32(elements(values, layout, NAME)?.to_vec())
            }
            Storage::Cpu(CpuStorage::F64(values)) => {
                CpuStorage::F64(elements(values, layout, NAME)?.to_vec())
            }
            _ => return Err(unsupported(grad.dtype(), NAME)),
        };
        self.slot.add(Arc::new(gradient))?;
        token.zeros_like().map(Some)
    }
}

impl Drop for Reveal {
    fn drop(&mut self) {
        let views = std::mem::take(&mut *lock(&self.views));
        // They may own other results, whose end locks the map again.
        let forgotten: Vec<Option<Link>> = {
            let mut links = lock(&LINKS);
            views.iter().map(|view| links.remove(view)).collect()
        };
        drop(forgotten);
    }
}
