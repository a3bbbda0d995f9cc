//! Pools: several actors of one kind, of which the least loaded gets the next call.

use super::handle::RemoteActor;
use super::remote::ActorCall;
use crate::Error;
use crate::runtime::Runtime;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How many actors a pool has. Every default is here.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ActorPoolOptions {
    /// Never fewer than this. Default: 1.
    pub min: usize,
    /// Never more than this. Default: 1.
    pub max: usize,
    /// One more is started when the least loaded has so many calls under way. Default: 2.
    pub grow_at: usize,
    /// One is let go when nothing was called for so long. Default: 10 s.
    pub idle: Duration,
}

impl ActorPoolOptions {
    /// So many, always.
    pub fn fixed(size: usize) -> Self {
        Self::elastic(size, size)
    }

    /// From `min` to `max`, as the load demands.
    pub fn elastic(min: usize, max: usize) -> Self {
        let min = min.max(1);
        Self { min, max: max.max(min), grow_at: 2, idle: Duration::from_secs(10) }
    }
}

/// What a pool is to do about its size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    None,
    Grow,
    Shrink,
}

impl ActorPoolOptions {
    /// Pure: from the calls under way at each member, and the time since the last call.
    fn change(&self, loads: &[usize], since_last: Duration) -> Change {
        let least = loads.iter().copied().min().unwrap_or(usize::MAX);
        if loads.len() < self.min || (loads.len() < self.max && least >= self.grow_at) {
            Change::Grow
        } else if loads.len() > self.min && least == 0 && since_last >= self.idle {
            Change::Shrink
        } else {
            Change::None
        }
    }
}

/// Actors that all do the same. A call goes to the one with the fewest calls under way.
///
/// A pool grows when all of its members have enough to do, as far as the resources are free, and
/// shrinks after a pause; it looks at both when it is called.
pub struct ActorPool<A: RemoteActor> {
    runtime: Runtime,
    options: ActorPoolOptions,
    make: Box<dyn Fn(usize) -> ActorCall<A> + Send + Sync>,
    members: Mutex<Members<A::Handle>>,
}

struct Members<H> {
    handles: Vec<H>,
    started: usize,
    last_call: Instant,
}

impl<A: RemoteActor> std::fmt::Debug for ActorPool<A> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ActorPool").field("options", &self.options).finish_non_exhaustive()
    }
}

impl Runtime {
    /// Starts a pool; `make` describes its `n`th actor. Errors when the first `min` cannot be had.
    pub fn actor_pool<A: RemoteActor>(
        &self,
        options: ActorPoolOptions,
        make: impl Fn(usize) -> ActorCall<A> + Send + Sync + 'static,
    ) -> Result<ActorPool<A>, Error> {
        let members = Members { handles: Vec::new(), started: 0, last_call: Instant::now() };
        let (runtime, make) = (self.clone(), Box::new(make));
        let pool = ActorPool { runtime, options, make, members: Mutex::new(members) };
        for _ in 0..options.min {
            pool.grow(&mut pool.members())?;
        }
        Ok(pool)
    }
}

impl<A: RemoteActor> ActorPool<A> {
    /// Runs `send` with the handle of the least loaded actor: `pool.call(|actor| actor.add(1))`.
    /// Errors when no member is alive and none can be started.
    pub fn call<R>(&self, send: impl FnOnce(&A::Handle) -> R) -> Result<R, Error>
    where
        A::Handle: Clone,
    {
        let handle = {
            let mut members = self.members();
            self.resize(&mut members)?;
            members.last_call = Instant::now();
            let least = members.handles.iter().min_by_key(|handle| handle.as_ref().pending());
            least.cloned()
        };
        let none = || Error::Internal("a pool without members".to_owned());
        handle.map(|handle| send(&handle)).ok_or_else(none)
    }

    /// Its members now.
    pub fn size(&self) -> usize {
        self.members().handles.len()
    }

    fn resize(&self, members: &mut Members<A::Handle>) -> Result<(), Error> {
        members.handles.retain(|handle| handle.as_ref().is_alive());
        let loads: Vec<usize> = members.handles.iter().map(|h| h.as_ref().pending()).collect();
        match self.options.change(&loads, members.last_call.elapsed()) {
            Change::None => {}
            Change::Shrink => {
                let idle = loads.iter().rposition(|load| *load == 0);
                drop(idle.map(|at| members.handles.remove(at)));
            }
            Change::Grow => match self.grow(members) {
                Err(error) if members.handles.is_empty() => return Err(error),
                Err(error) => tracing::debug!(%error, "the pool stays as it is"),
                Ok(()) => {}
            },
        }
        Ok(())
    }

    /// Starts one more; beyond the first ones only if that needs no waiting for resources.
    fn grow(&self, members: &mut Members<A::Handle>) -> Result<(), Error> {
        let mut call = (self.make)(members.started);
        if members.handles.len() >= self.options.min {
            call = call.at_once();
        }
        members.handles.push(self.runtime.spawn(call)?);
        members.started += 1;
        Ok(())
    }

    fn members(&self) -> MutexGuard<'_, Members<A::Handle>> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pool_grows_under_load_and_shrinks_after_a_pause() {
        let options = ActorPoolOptions::elastic(1, 3);
        let (now, later) = (Duration::ZERO, Duration::from_secs(10));
        assert_eq!(options.change(&[1], now), Change::None);
        assert_eq!(options.change(&[2], now), Change::Grow);
        assert_eq!(options.change(&[2, 0], now), Change::None, "one has nothing to do");
        assert_eq!(options.change(&[9, 9, 9], later), Change::None, "never more than 3");
        assert_eq!(options.change(&[0, 5], later), Change::Shrink);
        assert_eq!(options.change(&[0], later), Change::None, "never fewer than 1");
        assert_eq!(ActorPoolOptions::fixed(2).change(&[0], now), Change::Grow);
    }
}
