//! One rank's part in NCCL's sums. Every wait looks at the time, at what NCCL says of itself, and at whether
//! another rank was lost.

use super::library::{
    Code, Functions, IN_PROGRESS, REMOTE_ERROR, RawCommunicator, SUCCESS, SYSTEM_ERROR, UniqueId,
};
use crate::collective::barrier::pause;
use crate::{Error, Result};
use mobula_core::Shard;
use std::ffi::c_void;
use std::time::{Duration, Instant};

/// Errors when there is no use in waiting any more.
pub(super) type Look = Box<dyn Fn() -> Result<()> + Send>;

/// How long a rank waits.
pub(super) struct Patience {
    /// For what NCCL does, once it was told to.
    pub(super) timeout: Duration,
    /// For the news that another rank was lost, when NCCL has lost a connection.
    pub(super) grace: Duration,
    pub(super) look: Look,
}

/// A connection with all other ranks, until it is dropped.
pub(super) struct Communicator {
    raw: RawCommunicator,
    rank: usize,
    patience: Patience,
}

impl std::fmt::Debug for Communicator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Communicator").field("rank", &self.rank).finish_non_exhaustive()
    }
}

/// For one rank to make, and all to know.
pub(super) fn unique_id(functions: &Functions, rank: usize) -> Result<UniqueId> {
    let failed = |reason| Error::Nccl { rank, action: "begin", reason };
    functions.make_unique_id().map_err(failed)
}

impl Communicator {
    /// Connects this rank, whose device is the thread's, with all that have the same identifier.
    pub(super) fn connect(
        functions: Functions,
        id: UniqueId,
        shard: Shard,
        patience: Patience,
    ) -> Result<Self> {
        let (raw, code) = RawCommunicator::begin(functions, id, shard);
        let this = Self { raw, rank: shard.rank, patience };
        this.settle("connect the ranks", code)?;
        Ok(this)
    }

    /// Has the numbers on the device become their sums over all ranks, once the stream comes to it.
    ///
    /// # Safety
    ///
    /// `values` are `len` `f32` on this rank's device, of which nobody else knows until the stream has come
    /// past this or the communicator is dropped; the stream is of that device.
    #[expect(unsafe_code, reason = "passes on what its caller vouches for")]
    pub(super) unsafe fn sum(
        &mut self,
        values: *mut c_void,
        len: usize,
        stream: *mut c_void,
    ) -> Result<()> {
        // SAFETY: the caller's.
        let code = unsafe { self.raw.sum(values, len, stream) };
        self.settle("begin a sum of gradients", code)
    }

    /// Waits for what the device does, and NCCL on it.
    pub(super) fn wait_for(
        &self,
        action: &'static str,
        is_done: impl Fn() -> Result<bool>,
    ) -> Result<()> {
        self.wait(action, || {
            self.is_settled(action)?;
            is_done()
        })
    }

    /// A call that was accepted may still be under way.
    fn settle(&self, action: &'static str, code: Code) -> Result<()> {
        match code {
            SUCCESS => Ok(()),
            IN_PROGRESS => self.wait(action, || self.is_settled(action)),
            _ => Err(self.failed(action, code)),
        }
    }

    fn is_settled(&self, action: &'static str) -> Result<bool> {
        match self.raw.state() {
            SUCCESS => Ok(true),
            IN_PROGRESS => Ok(false),
            code => Err(self.failed(action, code)),
        }
    }

    fn wait(&self, action: &'static str, is_done: impl Fn() -> Result<bool>) -> Result<()> {
        let (begun, mut looks) = (Instant::now(), 0);
        while !is_done()? {
            (self.patience.look)()?;
            if begun.elapsed() > self.patience.timeout {
                let reason = format!(
                    "no end after {:?}, although all ranks were there: look at the GPUs and the network \
                     between them; NCCL_DEBUG=INFO shows what NCCL does",
                    self.patience.timeout
                );
                return Err(Error::Nccl { rank: self.rank, action, reason });
            }
            pause(&mut looks);
        }
        Ok(())
    }

    /// A connection that broke is how a lost rank may show here first; the driver tells soon.
    fn failed(&self, action: &'static str, code: Code) -> Error {
        let (begun, mut looks) = (Instant::now(), 0);
        while matches!(code, SYSTEM_ERROR | REMOTE_ERROR) && begun.elapsed() < self.patience.grace {
            if let Err(lost) = (self.patience.look)() {
                return lost;
            }
            pause(&mut looks);
        }
        Error::Nccl { rank: self.rank, action, reason: self.raw.explain(code) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::fake::{FAKE, FUNCTIONS, Fake};
    use super::*;
    use std::cell::{Cell, RefCell};

    fn connect(fake: Fake, timeout: Duration, look: Look) -> Result<Communicator> {
        FAKE.set(Fake::default());
        let id = unique_id(&FUNCTIONS, 1).expect("an identifier");
        FAKE.set(fake);
        let patience = Patience { timeout, grace: timeout, look };
        Communicator::connect(FUNCTIONS, id, Shard { rank: 1, world: 2 }, patience)
    }

    fn fine() -> Look {
        Box::new(|| Ok(()))
    }

    fn calls() -> Vec<&'static str> {
        FAKE.with_borrow(|fake| fake.calls.clone())
    }

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn versions_are_written_as_people_write_them() {
        assert_eq!(FUNCTIONS.version(), Ok("2.27.3".to_owned()));
    }

    #[test]
    fn what_is_under_way_is_waited_for() {
        let fake = Fake { busy: 3, ..Fake::default() };
        let mut communicator = connect(fake, LONG, fine()).expect("connects");
        let mut values = [1f32, 2.0, 3.0];
        FAKE.with_borrow_mut(|fake| fake.busy = 2);
        // SAFETY: what stands for the device is this thread.
        #[expect(unsafe_code, reason = "the numbers are here")]
        let sum = unsafe { communicator.sum(values.as_mut_ptr().cast(), 3, std::ptr::null_mut()) };
        sum.expect("sums");
        assert_eq!((values, FAKE.with_borrow(|fake| fake.busy)), ([2.0, 4.0, 6.0], 0));
        let looks = Cell::new(0);
        let done = communicator.wait_for("sum gradients", || {
            looks.set(looks.get() + 1);
            Ok(looks.get() == 5)
        });
        assert!(done.is_ok() && looks.get() == 5);
        drop(communicator);
        assert_eq!(calls(), ["init", "all_reduce", "abort"]);
    }

    #[test]
    fn what_does_not_end_is_ended() {
        let fake = Fake { busy: u32::MAX, ..Fake::default() };
        let error = connect(fake, Duration::ZERO, fine()).expect_err("never").to_string();
        assert!(error.starts_with("rank 1: NCCL could not connect the ranks: no end"), "{error}");
        assert_eq!(calls(), ["init", "abort"]);
    }

    #[test]
    fn a_refusal_is_told_in_its_words() {
        let fake = Fake { refuses: 5, ..Fake::default() };
        let error = connect(fake, LONG, fine()).expect_err("refused").to_string();
        let expected = "rank 1: NCCL could not connect the ranks: invalid usage: Duplicate GPU detected : \
                        rank 1 and rank 0 both on CUDA device 1000";
        assert_eq!(error, expected);
        assert_eq!(calls(), ["init", "abort"]);
    }

    /// Of a connection that broke the driver knows more, soon.
    #[test]
    fn a_lost_rank_is_told_by_who_knows() {
        let said = RefCell::new(0);
        let look: Look = Box::new(move || {
            *said.borrow_mut() += 1;
            match *said.borrow() {
                3.. => Err(Error::program("rank 0 was lost")),
                _ => Ok(()),
            }
        });
        let communicator = connect(Fake::default(), LONG, look).expect("connects");
        FAKE.with_borrow_mut(|fake| fake.fails = REMOTE_ERROR);
        let error = communicator.wait_for("sum gradients", || Ok(false)).expect_err("lost");
        assert_eq!(error.to_string(), "rank 0 was lost");

        let communicator = connect(Fake::default(), Duration::ZERO, fine()).expect("connects");
        FAKE.with_borrow_mut(|fake| fake.fails = REMOTE_ERROR);
        let error = communicator.wait_for("sum gradients", || Ok(false)).expect_err("unknown");
        assert!(error.to_string().ends_with("or there was a network error"), "{error}");
    }
}
