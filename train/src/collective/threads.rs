//! Ranks on threads that do each operation in the plainest way: for tests of what is built on them.

use super::{Collective, Exchange, ReduceOp, Values};
use crate::Result;
use mobula_core::Shard;
use std::sync::{Arc, Barrier, Mutex};

#[derive(Debug)]
struct Thread {
    shard: Shard,
    all: Arc<All>,
}

#[derive(Debug)]
struct All {
    met: Barrier,
    brought: Mutex<Vec<Vec<f64>>>,
}

/// So many ranks, each for a thread of its own.
pub(crate) fn threads(world: usize) -> Vec<Arc<dyn Collective>> {
    let brought = Mutex::new(vec![Vec::new(); world]);
    let all = Arc::new(All { met: Barrier::new(world), brought });
    let thread = |rank| -> Arc<dyn Collective> {
        Arc::new(Thread { shard: Shard { rank, world }, all: Arc::clone(&all) })
    };
    (0..world).map(thread).collect()
}

impl Collective for Thread {
    fn shard(&self) -> Shard {
        self.shard
    }

    fn exchange(&self, values: Values<'_>, exchange: &Exchange) -> Result<()> {
        match values {
            Values::F32(values) => {
                let wide =
                    self.all.exchange(self.shard, values.iter().map(|v| (*v).into()), exchange);
                values.iter_mut().zip(wide).for_each(|(to, wide)| *to = wide as f32);
            }
            Values::F64(values) => {
                let all = self.all.exchange(self.shard, values.iter().copied(), exchange);
                values.copy_from_slice(&all);
            }
            Values::Bf16(_) | Values::F16(_) => panic!("of f32 or f64"),
        }
        Ok(())
    }
}

impl All {
    fn exchange(
        &self,
        Shard { rank, world }: Shard,
        values: impl Iterator<Item = f64>,
        exchange: &Exchange,
    ) -> Vec<f64> {
        self.brought.lock().expect("lock")[rank] = values.collect();
        self.met.wait();
        let brought = self.brought.lock().expect("lock").clone();
        // Nobody brings the next values before all have seen these.
        self.met.wait();
        let len = brought[rank].len();
        let mut result = brought[rank].clone();
        for owner in 0..world {
            for at in exchange.parts.of(owner, world, len) {
                let column = brought.iter().map(|values| values[at]);
                result[at] = match exchange.reduce {
                    None => brought[owner][at],
                    Some(ReduceOp::Sum) => column.sum(),
                    Some(ReduceOp::Mean) => column.sum::<f64>() / world as f64,
                    Some(ReduceOp::Max) => column.fold(f64::NEG_INFINITY, f64::max),
                };
            }
        }
        result
    }
}
