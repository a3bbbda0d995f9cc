//! A producer in a worker process: values on their way to the driver, as many as it has granted.
//!
//! Values are gathered while earlier ones are being sent, so that small ones travel many at once
//! and a lone one at once.

use crate::Error;
use crate::parcel::{Outgoing, Packed};
use crate::process::wire::{FromWorker, MAX_FRAME_BYTES};
use crate::store::Offer;
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use tokio::sync::mpsc;

/// Bytes of values that travel in one frame, if one value alone is not larger.
const FRAME_BYTES: usize = 1 << 20;

/// What one call has to send.
pub(crate) struct Outbox {
    call: u64,
    outbound: mpsc::Sender<FromWorker>,
    tokio: tokio::runtime::Handle,
    state: Mutex<State>,
    room: Condvar,
}

struct State {
    /// The driver has the values below this from an earlier attempt.
    skip: u64,
    /// Values below this may be sent.
    granted: u64,
    /// The number of the next value.
    next: u64,
    /// Values that no frame has taken yet.
    pending: VecDeque<Packed>,
    /// Whether somebody is about to send what is pending.
    is_flushing: bool,
    is_closed: bool,
    /// Large values that the driver has not taken over yet.
    offers: VecDeque<(u64, Offer)>,
}

impl std::fmt::Debug for Outbox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Outbox").field("call", &self.call).finish_non_exhaustive()
    }
}

impl Outbox {
    pub(crate) fn new(
        call: u64,
        (skip, granted): (u64, u64),
        outbound: mpsc::Sender<FromWorker>,
        tokio: tokio::runtime::Handle,
    ) -> Arc<Self> {
        let state = State {
            skip,
            granted,
            next: 0,
            pending: VecDeque::new(),
            is_flushing: false,
            is_closed: false,
            offers: VecDeque::new(),
        };
        Arc::new(Self { call, outbound, tokio, state: Mutex::new(state), room: Condvar::new() })
    }

    /// Waits for room, then queues the value that `encode` gives.
    pub(super) fn send(
        self: &Arc<Self>,
        encode: impl FnOnce() -> Result<Outgoing, Error>,
    ) -> Result<(), Error> {
        if self.skips()? {
            return Ok(());
        }
        let (value, offer) = encode()?.into_packed()?;
        let bytes = value.bytes();
        if bytes >= MAX_FRAME_BYTES {
            let message = format!("a value has {bytes} bytes, at most {MAX_FRAME_BYTES} fit");
            return Err(Error::codec("encode", "a value of a stream", message));
        }
        let is_full = |state: &mut State| !state.is_closed && state.next >= state.granted;
        let state = self.room.wait_while(self.state(), is_full);
        let mut state = state.unwrap_or_else(PoisonError::into_inner);
        if state.is_closed {
            return Err(closed());
        }
        let number = state.next;
        state.next += 1;
        state.pending.push_back(value);
        state.offers.extend(offer.map(|offer| (number, offer)));
        if !std::mem::replace(&mut state.is_flushing, true) {
            self.tokio.spawn(Arc::clone(self).flush());
        }
        Ok(())
    }

    /// Whether the driver has the next value already.
    fn skips(&self) -> Result<bool, Error> {
        let mut state = self.state();
        if state.is_closed {
            return Err(closed());
        }
        let skips = state.next < state.skip;
        state.next += u64::from(skips);
        Ok(skips)
    }

    async fn flush(self: Arc<Self>) {
        while let Ok(permit) = self.outbound.reserve().await {
            // Sent under the lock, so that frames keep their order.
            let mut state = self.state();
            match state.frame(self.call) {
                Some(frame) => permit.send(frame),
                None => {
                    state.is_flushing = false;
                    return;
                }
            }
        }
    }

    pub(crate) fn grant(&self, granted: u64) {
        let mut state = self.state();
        state.granted = state.granted.max(granted);
        self.room.notify_all();
    }

    /// The driver has the values below this number.
    pub(crate) fn adopted(&self, below: u64) {
        let mut state = self.state();
        let kept = state.offers.iter().position(|(number, _)| *number >= below);
        let count = kept.unwrap_or(state.offers.len());
        let adopted: Vec<_> = state.offers.drain(..count).collect();
        drop(state);
        drop(adopted);
    }

    /// The function has ended: sends what is left, before anything else of this call. `false` when
    /// the driver has gone.
    pub(crate) fn close(&self) -> bool {
        self.state().is_closed = true;
        self.room.notify_all();
        loop {
            let Some(frame) = self.state().frame(self.call) else { return true };
            if self.outbound.blocking_send(frame).is_err() {
                return false;
            }
        }
    }

    /// Whether the driver has all large values.
    pub(crate) fn is_done(&self) -> bool {
        let state = self.state();
        state.is_closed && state.offers.is_empty()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn frame(&mut self, call: u64) -> Option<FromWorker> {
        let first = self.next - self.pending.len() as u64;
        let (mut values, mut bytes) = (Vec::new(), 0);
        while bytes < FRAME_BYTES
            && let Some(value) = self.pending.pop_front()
        {
            bytes += value.bytes();
            values.push(value);
        }
        (!values.is_empty()).then_some(FromWorker::Yielded { call, first, values })
    }
}

fn closed() -> Error {
    Error::Cancelled { task: "a function that has ended".to_owned() }
}
