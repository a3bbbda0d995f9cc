//! Other machines. The driver's copy of the program opens a door; the first copy on every other
//! machine joins it as that machine's *agent*, tells what the machine has, starts worker processes
//! when asked to, and passes on what they and the driver say to each other.
//!
//! A worker sees no difference: it talks to its agent as it would to its driver. What the agent adds
//! is the way of large values. They stay in the store of the machine that made them, and a message
//! only says where ([`FarPlace`]); a machine that needs one fetches it from the other, once, without
//! a detour over the driver.
//!
//! What is said on a connection is for those who know the program's secret only. Who calls shows it
//! (`clear`), and takes on trust whoever is called; with the feature `tls`, both ends show keys that
//! are made of it (`tls`).
//!
//! Invariants:
//! * NODE-1: nobody who calls joins or gets a value without the secret: who does not show that they
//!   know it has no connection.
//! * NODE-2: a machine that has been silent for 4 seconds is lost: nothing is placed there any more,
//!   before anybody hears that its workers are gone. Silence is that no bytes come.
//! * NODE-3: an agent ends with its driver, and its workers end with it.
//! * NODE-4: a value that an agent keeps has an owner in the driver from the moment that the frame
//!   which tells of it is decoded; where that is dropped, the agent lets go of the value.

mod agent;
#[cfg(not(feature = "tls"))]
mod clear;
mod far;
mod hub;
mod knock;
mod lineage;
mod lines;
mod link;
mod look;
mod object;
mod role;
mod secret;
mod server;
mod silence;
mod strangers;
#[cfg(feature = "tls")]
mod tls;
mod transfer;
mod wire;
mod worker;

pub(crate) use far::FarLink;
pub(crate) use hub::{hub, say_goodbye};
pub(crate) use lineage::Recipe;
pub(crate) use look::{NodeView, look_around};
pub(crate) use object::{Far, FarPlace, Owned};
pub(crate) use role::{Role, role};
pub(crate) use transfer::forget_everywhere;

use crate::scheduler::NodeId;
use crate::{Error, Resources, Runtime};
use std::net::{IpAddr, Ipv4Addr};

/// Becomes an agent, or a copy that only waits; gives the exit code.
pub(crate) fn serve(join: role::Join, total: &Resources) -> i32 {
    agent::serve(join, total)
}

/// Opens the driver's door, and waits for the others to come in.
pub(crate) fn open(door: role::Door, runtime: &Runtime) -> Result<(), Error> {
    hub::open(door, runtime)
}

/// By which the program's machines reach one of them; loopback where there is no other.
pub(crate) fn address_of(node: NodeId) -> IpAddr {
    let address = hub().ok().and_then(|hub| hub.address_of(node));
    address.unwrap_or(Ipv4Addr::LOCALHOST.into())
}

/// This machine's name.
pub(crate) fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}
