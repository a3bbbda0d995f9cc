//! What comes from a worker, in the order in which it came, though some of it has to wait for values
//! of other machines.

use crate::threads;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

type Job = Box<dyn FnOnce() + Send>;

/// Lets one after the other through.
#[derive(Default)]
pub(super) struct Door {
    /// Who waits; `None` when nobody is on the way through.
    waiting: Mutex<Option<VecDeque<Job>>>,
}

impl Door {
    /// Does this at once, or after all that came before. What takes long is done on a thread of its
    /// own: not on the one that serves the others. For one caller at a time.
    pub(super) fn pass(self: &Arc<Self>, takes_long: bool, job: impl FnOnce() + Send + 'static) {
        {
            let mut waiting = self.waiting();
            match &mut *waiting {
                Some(queue) => return queue.push_back(Box::new(job)),
                None if takes_long => *waiting = Some(VecDeque::from([Box::new(job) as Job])),
                None => {
                    drop(waiting);
                    return job();
                }
            }
        }
        let door = Arc::clone(self);
        if threads::run(1, move || door.let_through()).is_err() {
            // It cannot be helped.
            self.let_through();
        }
    }

    fn let_through(&self) {
        while let Some(job) = self.next() {
            job();
        }
    }

    fn next(&self) -> Option<Job> {
        let mut waiting = self.waiting();
        let next = waiting.as_mut().and_then(VecDeque::pop_front);
        if next.is_none() {
            *waiting = None;
        }
        next
    }

    fn waiting(&self) -> MutexGuard<'_, Option<VecDeque<Job>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    #[test]
    fn nothing_overtakes_what_waits() {
        let door = Arc::new(Door::default());
        let (release, released) = channel::<()>();
        let (sender, order) = channel();
        let says = |n: u32| {
            let sender = sender.clone();
            move || sender.send(n).expect("somebody listens")
        };
        door.pass(false, says(0));
        assert_eq!(order.try_recv(), Ok(0), "at once");
        let first = says(1);
        door.pass(true, move || {
            released.recv().expect("released");
            first();
        });
        door.pass(false, says(2));
        door.pass(true, says(3));
        assert!(order.try_recv().is_err(), "all wait");
        release.send(()).expect("it waits");
        assert_eq!([(); 3].map(|()| order.recv().expect("comes")), [1, 2, 3]);
    }
}
