//! Tasks of tasks: what runs in a worker process has its driver run more.
//!
//! The worker describes what it wants, under a ticket, and goes on. The driver runs it like any
//! other; when it has ended, the worker is told, and a large result stays where it is until somebody
//! decodes it. A worker that waits for such a result lends its CPUs, as threads do. What it has
//! submitted is cancelled with it.
//!
//! An actor's ticket stands for a handle, which the driver holds for the worker, and a call of the
//! actor is one more thing that can be wanted. The values of a stream are sent on to the worker as
//! they come; its window is the consumer's. A group's ticket stands for the group: the driver watches
//! over it, and the worker asks what has happened.

mod actors;
mod door;
mod groups;
mod held;
mod relay;
mod tickets;
mod watched;
mod wire;
mod worker;

pub(crate) use tickets::{Tickets, set_driver};
pub(crate) use wire::{Ask, Condition, Failure, Said, Submission, Wanted};
pub(crate) use worker::{Nested, Up, nested, open};
