//! Sums over the ranks that begin while the backward pass still computes.
//!
//! As in Li et al., *PyTorch Distributed* (2020, arXiv 2006.15704): gradients travel in buckets, in the
//! order in which the pass comes to the parameters, and a thread sums one after the other. Here that order is
//! seen in the first step of rank 0, and holds for all; also for the sums of that step, so that a
//! training that goes on from a checkpoint adds up in the same order.

mod buckets;

use crate::collective::Collective;
use crate::{Error, Result};
use buckets::{Filling, Plan, counts, last_first};
use mobula_nn::Gradients;
use serde::{Deserialize, Serialize};
use std::ops::Range;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Whether gradients are summed over the workers while the backward pass still computes. For steps of one
/// model: where two take turns, the order is agreed upon anew each time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Overlap {
    /// Where workers are on several machines, in buckets of 25 MiB. Within one machine there is little
    /// to wait for that computing could hide.
    #[default]
    Auto,
    /// In one piece, after the pass.
    Never,
    /// In buckets of at most so many bytes, the first of at most 1 MiB, so that the sums begin early.
    Buckets {
        /// Of gradients; those of one parameter stay together.
        bytes: usize,
    },
}

/// PyTorch's.
const DEFAULT: usize = 25 << 20;

impl Overlap {
    /// Bytes of a bucket, if there are any.
    fn bytes(self, is_between_hosts: bool) -> Option<usize> {
        match self {
            Self::Auto => is_between_hosts.then_some(DEFAULT),
            Self::Never => None,
            Self::Buckets { bytes } => Some(bytes),
        }
    }
}

/// Which sums begin early, of one model.
pub(crate) struct EarlySums {
    collective: Arc<dyn Collective>,
    bytes: usize,
    /// Of the gradients, by place.
    lens: Vec<usize>,
    /// How often a pass of this rank writes each place, once there was one.
    writes: Option<Vec<u32>>,
    lane: Option<Lane>,
    pass: Arc<Mutex<Pass>>,
}

/// What a pass tells of itself.
#[derive(Debug, Default)]
struct Pass {
    /// Places, as they were written.
    log: Vec<usize>,
    filling: Option<Filling>,
}

/// The thread that sums one bucket after the other.
struct Lane {
    plan: Plan,
    full: SyncSender<(usize, Vec<f32>)>,
    summed: Receiver<(usize, Vec<f32>, Result<()>)>,
    /// The memory of the step before.
    spare: Vec<Vec<f32>>,
}

impl EarlySums {
    pub(crate) fn new(collective: &Arc<dyn Collective>, overlap: Overlap) -> Option<Self> {
        let bytes = overlap.bytes(collective.is_between_hosts())?;
        if collective.shard().world == 1 {
            return None;
        }
        let (lens, pass) = (Vec::new(), Arc::default());
        let collective = Arc::clone(collective);
        Some(Self { collective, bytes, lens, writes: None, lane: None, pass })
    }

    /// The last pass of a step begins.
    pub(crate) fn begin(&mut self, gradients: &mut Gradients) {
        let lens: Vec<_> = gradients.places().iter().map(|(_, range)| range.len()).collect();
        if lens != self.lens {
            (self.lens, self.writes, self.lane) = (lens, None, None);
        }
        let full = self.lane.as_ref().map(|lane| lane.full.clone());
        let filling = self.lane.as_mut().map(|lane| lane.filling(&self.lens, &self.writes));
        *lock(&self.pass) = Pass { log: Vec::new(), filling };
        let pass = Arc::clone(&self.pass);
        gradients.set_listener(Some(Box::new(move |place, values| {
            let mut pass = lock(&pass);
            pass.log.push(place);
            let ready = pass.filling.as_mut().map(|filling| filling.written(place, values));
            for bucket in ready.into_iter().flatten() {
                // Whether the thread is there will be seen at the end.
                let _ = full.as_ref().map(|full| full.send(bucket));
            }
        })));
    }

    /// It has failed: whatever is under way is forgotten.
    pub(crate) fn reset(&mut self, gradients: &mut Gradients) {
        gradients.set_listener(None);
        (self.lens, self.writes, self.lane, self.pass) = (Vec::new(), None, None, Arc::default());
    }

    /// It is over: sends what is left, and puts the sums in the place of the gradients.
    pub(crate) fn finish(&mut self, gradients: &mut Gradients) -> Result<()> {
        gradients.set_listener(None);
        let Pass { log, filling } = std::mem::take(&mut *lock(&self.pass));
        if self.writes.is_none() && !log.is_empty() {
            self.writes = Some(counts(&log, self.lens.len()));
        }
        let lane = match self.lane.take() {
            Some(lane) => lane,
            None => Lane::start(self.plan(&log)?, &self.collective)?,
        };
        let lane = self.lane.insert(lane);
        let mut filling = filling.unwrap_or_else(|| lane.filling(&self.lens, &None));
        let places: Vec<_> = gradients.places().iter().map(|(_, range)| range.clone()).collect();
        let rest = filling.rest(&places, gradients.values());
        if let Some(late) = filling.late {
            return Err(Error::LateGradient { parameter: gradients.places()[late].0.clone() });
        }
        rest.into_iter().try_for_each(|bucket| lane.full.send(bucket)).map_err(|_| gone())?;
        lane.take(&places, gradients.values_mut())
    }

    /// All ranks have that of rank 0.
    fn plan(&self, log: &[usize]) -> Result<Plan> {
        let mut order: Vec<f64> = last_first(log, self.lens.len()).map(|at| at as f64).collect();
        self.collective.broadcast(&mut order, 0)?;
        let order: Vec<_> = order.into_iter().map(|at| at as usize).collect();
        Ok(Plan::of(&order, &self.lens, self.bytes))
    }
}

impl Lane {
    fn start(plan: Plan, collective: &Arc<dyn Collective>) -> Result<Self> {
        let (full, to_sum) = sync_channel::<(usize, Vec<f32>)>(plan.buckets.len());
        let (sums, summed) = sync_channel(plan.buckets.len());
        let collective = Arc::clone(collective);
        let sum = move || {
            while let Ok((at, mut bucket)) = to_sum.recv() {
                let done = collective.sum_gradients(&mut bucket, 0);
                if sums.send((at, bucket, done)).is_err() {
                    return;
                }
            }
        };
        // It ends with the lane.
        std::thread::Builder::new()
            .name("gradients".to_owned())
            .spawn(sum)
            .map_err(Error::program)?;
        Ok(Self { plan, full, summed, spare: Vec::new() })
    }

    fn filling(&mut self, lens: &[usize], writes: &Option<Vec<u32>>) -> Filling {
        let writes = writes.clone().unwrap_or_else(|| vec![0; lens.len()]);
        Filling::of(&self.plan, lens, writes, std::mem::take(&mut self.spare))
    }

    /// Waits for all sums.
    fn take(&mut self, places: &[Range<usize>], values: &mut [f32]) -> Result<()> {
        self.spare.resize_with(self.plan.buckets.len(), Vec::new);
        for _ in 0..self.plan.buckets.len() {
            let (at, bucket, done) = self.summed.recv().map_err(|_| gone())?;
            done?;
            let mut rest = bucket.as_slice();
            for place in &self.plan.buckets[at] {
                let (sums, others) = rest.split_at(places[*place].len());
                values[places[*place].clone()].copy_from_slice(sums);
                rest = others;
            }
            self.spare[at] = bucket;
        }
        Ok(())
    }
}

fn gone() -> Error {
    Error::program("the thread that sums gradients has ended")
}

fn lock(pass: &Mutex<Pass>) -> MutexGuard<'_, Pass> {
    pass.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Shape, Tensor};
    use mobula_nn::{Module, Params, layers::Linear};

    /// A rank of two, whose other one has zeros. Knows how many sums there were.
    #[derive(Debug, Default)]
    struct Recorder(Mutex<usize>, std::sync::Condvar);

    impl Collective for Recorder {
        fn shard(&self) -> mobula_core::Shard {
            mobula_core::Shard { rank: 0, world: 2 }
        }

        fn exchange(
            &self,
            _: crate::collective::Values<'_>,
            _: &crate::collective::Exchange,
        ) -> Result<()> {
            *self.0.lock().expect("lock") += 1;
            self.1.notify_all();
            Ok(())
        }
    }

    /// An operation between two layers whose backward pass goes on when there were so many sums.
    struct UntilSummed(Arc<Recorder>, Arc<Mutex<usize>>);

    impl CustomOp1 for UntilSummed {
        fn name(&self) -> &'static str {
            "until-summed"
        }

        fn cpu_fwd(
            &self,
            storage: &CpuStorage,
            layout: &Layout,
        ) -> candle_core::Result<(CpuStorage, Shape)> {
            Ok((storage.clone(), layout.shape().clone()))
        }

        fn bwd(
            &self,
            _: &Tensor,
            _: &Tensor,
            grad: &Tensor,
        ) -> candle_core::Result<Option<Tensor>> {
            let wanted = *self.1.lock().expect("lock");
            let sums = self.0.0.lock().expect("lock");
            let long = std::time::Duration::from_secs(60);
            let waited = self.0.1.wait_timeout_while(sums, long, |sums| *sums < wanted);
            assert!(!waited.expect("lock").1.timed_out(), "no sum before the pass is over");
            Ok(Some(grad.clone()))
        }
    }

    /// The second layer's gradients are summed before the first layer's are known.
    #[test]
    fn sums_begin_before_the_pass_is_over() {
        let params = Params::new(7, &Device::Cpu);
        let layers = ["fc1", "fc2"].map(|name| Linear::new(&params.scope(name), 4, 4).expect(name));
        let x = Tensor::ones((2, 4), DType::F32, &Device::Cpu).expect("x");
        let recorder = Arc::new(Recorder::default());
        let wanted = Arc::new(Mutex::new(0));
        let collective: Arc<dyn Collective> = recorder.clone();
        let mut sums = EarlySums::new(&collective, Overlap::Buckets { bytes: 1 }).expect("sums");
        let mut gradients = Gradients::zeros(&params);
        let mut step = || {
            sums.begin(&mut gradients);
            let y = layers[0].forward(&x, &Default::default()).expect("forward");
            let wait = UntilSummed(Arc::clone(&recorder), Arc::clone(&wanted));
            let y = y.apply_op1(wait).expect("wait");
            let y = layers[1].forward(&y, &Default::default()).expect("forward");
            gradients.backward(&y.sum_all().expect("sum"), 1.0).expect("backward");
            sums.finish(&mut gradients).expect("finish");
            gradients.values().to_vec()
        };
        let first = step();
        // An order of parameters, and a bucket each.
        assert_eq!(*recorder.0.lock().expect("lock"), 5);
        *wanted.lock().expect("lock") = 5 + 2;
        assert_eq!(step(), first);
        assert_eq!(*recorder.0.lock().expect("lock"), 9);
    }
}
