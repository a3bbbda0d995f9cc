//! A group whose maker is in a worker process: its driver starts the members, and is asked for what
//! they have said.

use super::{GroupEvent, GroupOptions, GroupTask};
use crate::Error;
use crate::nested::{Ask, Nested, Said, Up};
use crate::parcel::Parcel;
use crate::value::decode;
use bytes::Bytes;
use serde::de::DeserializeOwned;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

/// Dropping it ends the group.
pub(super) struct Remote<T> {
    up: Arc<Up>,
    size: usize,
    generation: u64,
    /// What has come and was not asked for yet.
    said: VecDeque<Said>,
    /// The driver does not know it any more.
    is_lost: bool,
    decode: fn(&Parcel) -> Result<T, Error>,
}

impl<T> std::fmt::Debug for Remote<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let generation = self.generation;
        f.debug_struct("Remote").field("generation", &generation).finish_non_exhaustive()
    }
}

impl<T> Remote<T> {
    pub(super) fn start(
        nested: &Nested,
        options: &GroupOptions,
        task: &GroupTask<T>,
        args: &[Parcel],
    ) -> Result<Self, Error> {
        let mut remote = Self {
            up: nested.start_group(options, task.function, args)?,
            size: options.size,
            generation: options.generation,
            said: VecDeque::new(),
            is_lost: false,
            decode: task.decode,
        };
        if options.elastic.is_some() {
            remote.size = remote.ask::<Vec<Option<u32>>>(Ask::Pids)?.len();
        }
        Ok(remote)
    }

    pub(super) fn next_event(&mut self, timeout: Duration) -> Option<GroupEvent<T>> {
        if self.said.is_empty() && !self.is_lost {
            match self.ask(Ask::Events { timeout }) {
                Ok(said) => self.said = said,
                Err(error) => {
                    self.is_lost = true;
                    return Some(GroupEvent::Failed { rank: 0, error });
                }
            }
        }
        Some(match self.said.pop_front()? {
            Said::Report { rank, payload } => GroupEvent::Report { rank, payload },
            Said::Finished { rank } => match self.value() {
                Ok(value) => GroupEvent::Finished { rank, value },
                Err(error) => GroupEvent::Failed { rank, error },
            },
            Said::Failed { rank, error } => GroupEvent::Failed { rank, error: error.into() },
            Said::Restarting { generation, replaced, error } => {
                self.generation = generation;
                GroupEvent::Restarting { generation, replaced, error: error.into() }
            }
            Said::Resized { generation, gone, size } => {
                (self.generation, self.size) = (generation, size);
                GroupEvent::Resized { generation, gone, size }
            }
        })
    }

    pub(super) fn generation(&self) -> u64 {
        self.generation
    }

    pub(super) fn size(&self) -> usize {
        self.size
    }

    pub(super) fn set_context(&mut self, context: Bytes) -> Result<(), Error> {
        self.ask(Ask::SetContext { context })
    }

    pub(super) fn stop(&mut self) {
        // A group that is lost has stopped.
        let _ = self.ask::<()>(Ask::Stop);
    }

    pub(super) fn tell(&self, message: Bytes) -> Result<(), Error> {
        self.ask(Ask::Tell { message })
    }

    pub(super) fn pids(&self) -> Vec<Option<u32>> {
        self.ask(Ask::Pids).unwrap_or_else(|_| vec![None; self.size])
    }

    /// What the member has given that has finished last.
    fn value(&self) -> Result<T, Error> {
        (self.decode)(&Parcel::Up(self.up.ask_group(Ask::Value)?))
    }

    fn ask<R: DeserializeOwned>(&self, ask: Ask) -> Result<R, Error> {
        decode("a driver's answer", &self.up.ask_group(ask)?.open()?)
    }
}
