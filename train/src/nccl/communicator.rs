//! One rank's part in NCCL's sums. Every wait looks at the time, at what NCCL says of itself, and at whether
//! another rank was lost.

use super::library::{
    Code, Functions, IN_PROGRESS, REMOTE_ERROR, RawCommunicator, SUCCESS, SYSTEM_ERROR, UniqueId,
};
use crate::collective::barrier::pause;
use crate::{Error, Result};
use mobula_core::Shard;
use std::ffi::c_void;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

/// Errors when there is no use in waiting any more.
pub(super) type Look = Box<dyn Fn() -> Result<()> + Send>;

/// How long a rank waits.
pub(super) struct Patience {
    /// For what NCCL does, once it was told to.
    pub(super) timeout: Duration,
    /// For the news that another rank was lost, when NCCL has lost a connection, and for the end of a
    /// communicator.
    pub(super) grace: Duration,
    pub(super) look: Look,
}

/// A connection with all other ranks, until it is dropped.
pub(super) struct Communicator {
    /// There until the end.
    raw: Option<RawCommunicator>,
    /// Nothing that it was to do has failed.
    is_sound: bool,
    pub(super) rank: usize,
    pub(super) patience: Patience,
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
        let mut this = Self { raw: Some(raw), is_sound: true, rank: shard.rank, patience };
        this.settle("connect the ranks", code)?;
        Ok(this)
    }

    /// Has the numbers on the device become their sums over all ranks, once the stream comes to it.
    ///
    /// # Safety
    ///
    /// `values` are `len` `f32` on this rank's device, of which nobody else knows until the stream has come
    /// past this, and which stay until then; the stream is of that device.
    #[expect(unsafe_code, reason = "passes on what its caller vouches for")]
    pub(super) unsafe fn sum(
        &mut self,
        values: *mut c_void,
        len: usize,
        stream: *mut c_void,
    ) -> Result<()> {
        // SAFETY: the caller's.
        let code = self.raw.as_mut().map(|raw| unsafe { raw.sum(values, len, stream) });
        self.settle("begin a sum of gradients", code.unwrap_or(SUCCESS))
    }

    /// Waits for what the device does, and NCCL on it.
    pub(super) fn wait_for(
        &mut self,
        action: &'static str,
        mut is_done: impl FnMut() -> Result<bool>,
    ) -> Result<()> {
        self.wait(action, |this| {
            // What is done here is done, whatever has become of the others since.
            let done = is_done()?;
            if !done {
                this.is_settled(action)?;
            }
            Ok(done)
        })
    }

    /// A call that was accepted may still be under way.
    fn settle(&mut self, action: &'static str, code: Code) -> Result<()> {
        match code {
            SUCCESS => Ok(()),
            IN_PROGRESS => self.wait(action, |this| this.is_settled(action)),
            _ => Err(self.failed(action, code)),
        }
    }

    fn is_settled(&mut self, action: &'static str) -> Result<bool> {
        match self.raw.as_mut().map_or(SUCCESS, RawCommunicator::state) {
            SUCCESS => Ok(true),
            IN_PROGRESS => Ok(false),
            code => Err(self.failed(action, code)),
        }
    }

    fn wait(
        &mut self,
        action: &'static str,
        is_done: impl FnMut(&mut Self) -> Result<bool>,
    ) -> Result<()> {
        let waited = self.wait_at_most(self.patience.timeout, action, is_done);
        self.is_sound &= waited.is_ok();
        waited
    }

    fn wait_at_most(
        &mut self,
        timeout: Duration,
        action: &'static str,
        mut is_done: impl FnMut(&mut Self) -> Result<bool>,
    ) -> Result<()> {
        let (begun, mut looks) = (Instant::now(), 0);
        while !is_done(self)? {
            (self.patience.look)()?;
            if begun.elapsed() > timeout {
                let reason = format!(
                    "no end after {timeout:?}, although all ranks were there: look at the GPUs and the network \
                     between them; NCCL_DEBUG=INFO shows what NCCL does"
                );
                return Err(Error::Nccl { rank: self.rank, action, reason });
            }
            pause(&mut looks);
        }
        Ok(())
    }

    /// A connection that broke is how a lost rank may show here first; the driver tells soon.
    fn failed(&mut self, action: &'static str, code: Code) -> Error {
        self.is_sound = false;
        let (begun, mut looks) = (Instant::now(), 0);
        while matches!(code, SYSTEM_ERROR | REMOTE_ERROR) && begun.elapsed() < self.patience.grace {
            if let Err(lost) = (self.patience.look)() {
                return lost;
            }
            pause(&mut looks);
        }
        let reason = self.raw.as_ref().map_or(String::new(), |raw| raw.explain(code));
        Error::Nccl { rank: self.rank, action, reason }
    }

    /// Sends what others have yet to get of sums that are done here.
    fn finalize(&mut self) -> Result<()> {
        let action = "finish";
        match self.raw.as_mut().map_or(SUCCESS, RawCommunicator::finalize) {
            SUCCESS => Ok(()),
            IN_PROGRESS => {
                self.wait_at_most(self.patience.grace, action, |this| this.is_settled(action))
            }
            code => Err(self.failed(action, code)),
        }
    }
}

/// One that has failed, or that cannot come to an end in an orderly way, is aborted: whoever frees the device's
/// memory would wait for what waits there.
impl Drop for Communicator {
    fn drop(&mut self) {
        let is_finished = self.is_sound && self.finalize().is_ok();
        let Some(raw) = self.raw.take() else { return };
        let (ends, ended) = channel();
        let end = move || {
            if is_finished {
                raw.destroy()
            } else {
                raw.abort()
            }
            drop(ends);
        };
        // It waits for threads of its own, which a broken driver may hold: not for ever.
        if std::thread::Builder::new().name("nccl-end".to_owned()).spawn(end).is_ok() {
            let _: Result<(), _> = ended.recv_timeout(self.patience.grace);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::fake::{FUNCTIONS, Fake, fake};
    use super::*;
    use std::cell::{Cell, RefCell};

    fn connect(with: Fake, timeout: Duration, look: Look) -> Result<Communicator> {
        let id = unique_id(&FUNCTIONS, 1).expect("an identifier");
        fake(|fake| *fake = with);
        let patience = Patience { timeout, grace: timeout, look };
        Communicator::connect(FUNCTIONS, id, Shard { rank: 1, world: 2 }, patience)
    }

    fn fine() -> Look {
        Box::new(|| Ok(()))
    }

    fn calls() -> Vec<&'static str> {
        fake(|fake| fake.calls.clone())
    }

    const LONG: Duration = Duration::from_secs(60);
    /// For what never ends.
    const SHORT: Duration = Duration::from_millis(20);

    #[test]
    fn versions_are_written_as_people_write_them() {
        fake(|fake| fake.version = 22_703);
        assert_eq!(FUNCTIONS.version(), Ok("2.27.3".to_owned()));
        assert!(FUNCTIONS.unless_too_old().is_ok());
        fake(|fake| fake.version = 21_705);
        let error = FUNCTIONS.unless_too_old().err().expect("too old");
        assert_eq!(error, "it is version 2.17.5, 2.18 is the oldest that will do");
    }

    #[test]
    fn what_is_under_way_is_waited_for() {
        let mut communicator =
            connect(Fake { busy: 3, ..Fake::default() }, LONG, fine()).expect("connects");
        let mut values = [1f32, 2.0, 3.0];
        fake(|fake| fake.busy = 2);
        // SAFETY: what stands for the device is this thread.
        #[expect(unsafe_code, reason = "the numbers are here")]
        let sum = unsafe { communicator.sum(values.as_mut_ptr().cast(), 3, std::ptr::null_mut()) };
        sum.expect("sums");
        assert_eq!((values, fake(|fake| fake.busy)), ([2.0, 4.0, 6.0], 0));
        let looks = Cell::new(0);
        let done = communicator.wait_for("sum gradients", || {
            looks.set(looks.get() + 1);
            Ok(looks.get() == 5)
        });
        assert!(done.is_ok() && looks.get() == 5);
        drop(communicator);
        assert_eq!(calls(), ["init", "all_reduce", "finalize", "destroy"]);
    }

    /// Others may be gone by then: they had what they needed.
    #[test]
    fn what_is_done_is_done() {
        let mut communicator = connect(Fake::default(), LONG, fine()).expect("connects");
        fake(|fake| fake.fails = REMOTE_ERROR);
        communicator.wait_for("sum gradients", || Ok(true)).expect("it is done");
    }

    #[test]
    fn what_does_not_end_is_ended() {
        let error = connect(Fake { busy: u32::MAX, ..Fake::default() }, SHORT, fine());
        let error = error.expect_err("never").to_string();
        assert!(error.starts_with("rank 1: NCCL could not connect the ranks: no end"), "{error}");
        assert_eq!(calls(), ["init", "abort"]);

        let communicator = connect(Fake::default(), SHORT, fine()).expect("connects");
        fake(|fake| fake.busy = u32::MAX);
        drop(communicator);
        assert_eq!(calls(), ["init", "finalize", "abort"]);

        let communicator = connect(Fake::default(), SHORT, fine()).expect("connects");
        fake(|fake| fake.hangs = true);
        drop(communicator);
        assert_eq!(calls(), ["init", "finalize", "destroy"], "and nobody waits for it for ever");
    }

    #[test]
    fn a_refusal_is_told_in_its_words() {
        let error = connect(Fake { refuses: 5, ..Fake::default() }, LONG, fine());
        let expected = "rank 1: NCCL could not connect the ranks: invalid usage: Duplicate GPU detected : \
                        rank 1 and rank 0 both on CUDA device 1000";
        assert_eq!(error.expect_err("refused").to_string(), expected);
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
        let mut communicator = connect(Fake::default(), LONG, look).expect("connects");
        fake(|fake| fake.fails = REMOTE_ERROR);
        let error = communicator.wait_for("sum gradients", || Ok(false)).expect_err("lost");
        assert_eq!(error.to_string(), "rank 0 was lost");
        drop(communicator);
        assert_eq!(calls(), ["init", "abort"]);

        let mut communicator = connect(Fake::default(), SHORT, fine()).expect("connects");
        fake(|fake| fake.fails = REMOTE_ERROR);
        let error = communicator.wait_for("sum gradients", || Ok(false)).expect_err("unknown");
        assert!(error.to_string().ends_with("or there was a network error"), "{error}");
    }
}
