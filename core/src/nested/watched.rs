//! The driver's side of groups that workers have handles of.

use super::door::Door;
use super::wire::{Ask, Failure, Said};
use crate::group::{Gang, HangUp};
use crate::parcel::Parcel;
use crate::remote::{RemoteFn, decode};
use crate::runtime::Runtime;
use crate::{Error, GroupEvent, GroupOptions, GroupTask, ObjectRef};
use serde::Serialize;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

/// So many events at most are sent at once.
const MOST_EVENTS: usize = 64;

/// A group that is watched over for a worker.
#[derive(Default)]
pub(super) struct Watched {
    state: Mutex<State>,
    /// Once its members have been started.
    hang_up: OnceLock<HangUp>,
    /// For what the worker asks.
    door: Arc<Door>,
}

#[derive(Default)]
struct State {
    /// While it is there.
    gang: Option<Gang<Parcel>>,
    /// What the member has given that has finished last.
    value: Option<Parcel>,
}

impl Watched {
    pub(super) fn start(
        self: &Arc<Self>,
        runtime: Runtime,
        function: &str,
        options: &[u8],
        args: Vec<Parcel>,
    ) -> Result<ObjectRef<Parcel>, Error> {
        let task = GroupTask::raw(RemoteFn::find(function)?.name());
        let options: GroupOptions = decode("the options of a group", options)?;
        let (object, promise) = ObjectRef::pending(options.name.as_str().into());
        let watched = Arc::clone(self);
        self.door.pass(true, move || {
            let is_wanted = || !promise.is_settled();
            let gang = runtime.gang(&options, &task, args, &is_wanted);
            promise.resolve(gang.and_then(|gang| watched.hold(gang)));
        });
        Ok(object)
    }

    fn hold(&self, gang: Gang<Parcel>) -> Result<Parcel, Error> {
        // There is one only.
        let _ = self.hang_up.set(gang.hang_up());
        self.state().gang = Some(gang);
        answer(&())
    }

    /// Does what is asked, after what was asked before.
    pub(super) fn ask(self: &Arc<Self>, ask: Ask) -> ObjectRef<Parcel> {
        let (object, promise) = ObjectRef::pending("a group".into());
        let watched = Arc::clone(self);
        let takes_long = matches!(ask, Ask::Events { .. });
        self.door.pass(takes_long, move || {
            let answer = watched.state().answer(ask);
            promise.resolve(answer);
        });
        object
    }

    /// Nobody wants it any more: it ends. That may take a moment.
    pub(super) fn let_go(self: &Arc<Self>) {
        self.hang_up.get().into_iter().for_each(HangUp::now);
        let watched = Arc::clone(self);
        self.door.pass(true, move || {
            let gang = watched.state().gang.take();
            drop(gang);
        });
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn answer(&mut self, ask: Ask) -> Result<Parcel, Error> {
        let gone = || Error::Internal("a group was asked that has ended".to_owned());
        let gang = self.gang.as_mut().ok_or_else(gone)?;
        match ask {
            Ask::Events { timeout } => return answer(&self.events(timeout)),
            Ask::Value => return self.value.take().ok_or_else(gone),
            Ask::Pids => return answer(&gang.pids()),
            Ask::SetContext { context } => gang.set_context(context),
            Ask::Tell { message } => gang.tell(&message),
            Ask::Stop => gang.stop(),
        }
        answer(&())
    }

    /// What has happened, within `timeout`. Reports come together; whatever else happens is the last
    /// thing, as the worker may have to say something to it.
    fn events(&mut self, timeout: Duration) -> Vec<Said> {
        let mut said = Vec::new();
        let mut wait = timeout;
        while said.len() < MOST_EVENTS
            && let Some(event) = self.gang.as_mut().and_then(|gang| gang.next_event(wait))
        {
            said.push(self.said(event));
            if !matches!(said.last(), Some(Said::Report { .. })) {
                break;
            }
            wait = Duration::ZERO;
        }
        said
    }

    fn said(&mut self, event: GroupEvent<Parcel>) -> Said {
        match event {
            GroupEvent::Report { rank, payload } => Said::Report { rank, payload },
            GroupEvent::Finished { rank, value } => {
                self.value = Some(value);
                Said::Finished { rank }
            }
            GroupEvent::Failed { rank, error } => {
                Said::Failed { rank, error: Failure::from(&error) }
            }
            GroupEvent::Restarting { generation, replaced, error } => {
                Said::Restarting { generation, replaced, error: Failure::from(&error) }
            }
            GroupEvent::Resized { generation, gone, size } => {
                Said::Resized { generation, gone, size }
            }
        }
    }
}

fn answer(value: &impl Serialize) -> Result<Parcel, Error> {
    Parcel::new("a driver's answer", value)
}
