//! One process that forks the workers: it is this same binary, which has run `main` up to `init()`,
//! so that a worker begins there, in a millisecond, and shares the memory of all that came before.
//!
//! It outlives its driver by a moment. Whatever workers have started and left behind is its to
//! kill: a worker's process group when the worker ends, and all that is left when the driver ends,
//! in whatever way that was. If it is killed itself, the kernel kills its workers.
//!
//! Driver and fork server talk over a socket pair that keeps messages apart and carries
//! descriptors.

mod client;
mod serve;
mod system;

pub(super) use client::{ForkServer, NotForked, NotStarted};
pub(crate) use serve::serve;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::io::{Error, IoSlice, IoSliceMut, Result};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Descriptors that a message may carry: those of a request.
const MOST_FDS: usize = 3;
/// Messages are a few numbers.
const MOST_BYTES: usize = 256;

/// What the driver asks for.
#[derive(Debug, Serialize, Deserialize)]
enum Request {
    /// A worker, with its control stream, the pipe for its output, and the folder to start in.
    Fork,
}

/// What the fork server says.
#[derive(Debug, Serialize, Deserialize)]
enum Report {
    /// The first one: it serves.
    Ready,
    /// The first and last one: it cannot serve, for that reason.
    Unfit { reason: String },
    /// The answer to a request, with the pidfd of the new process, if the driver has room for it.
    Forked { pid: i32 },
    /// The other answer.
    NotForked { errno: i32 },
    /// A worker was reaped.
    Ended {
        pid: i32,
        /// As `wait4` gives it.
        status: i32,
        /// The most bytes that it, or a program that it ran and waited for, held in memory.
        peak: u64,
    },
}

/// Sends one message; the other end having gone is an error.
fn send(socket: &OwnedFd, message: &impl Serialize, fds: &[BorrowedFd<'_>]) -> Result<()> {
    let bytes = rmp_serde::to_vec(message).map_err(Error::other)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FDS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(Error::other(format!("{} descriptors, at most {MOST_FDS} fit", fds.len())));
    }
    let sent = rustix::io::retry_on_intr(|| {
        sendmsg(socket.as_fd(), &[IoSlice::new(&bytes)], &mut ancillary, SendFlags::NOSIGNAL)
    });
    Ok(sent.map(drop)?)
}

/// Waits for the next message; `None` when the other end has gone. Descriptors that this process has
/// no room for are missing.
fn receive<M: DeserializeOwned>(socket: &OwnedFd) -> Result<Option<(M, Vec<OwnedFd>)>> {
    let mut bytes = [0; MOST_BYTES];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FDS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::io::retry_on_intr(|| {
        let mut slices = [IoSliceMut::new(&mut bytes)];
        recvmsg(socket.as_fd(), &mut slices, &mut ancillary, RecvFlags::CMSG_CLOEXEC)
    });
    let length = match received {
        Err(rustix::io::Errno::CONNRESET) => 0,
        received => received?.bytes,
    };
    if length == 0 {
        return Ok(None);
    }
    let rights = ancillary.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    let fds = rights.flatten().collect();
    Ok(Some((rmp_serde::from_slice(&bytes[..length]).map_err(Error::other)?, fds)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    use std::io::{Read, Write};

    #[test]
    fn a_message_brings_its_descriptors_and_an_end_is_told() {
        let kind = SocketType::SEQPACKET;
        let (ours, theirs) = socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)
            .expect("a socket pair");
        let (mut output, input) = std::io::pipe().expect("a pipe");
        send(&ours, &Request::Fork, &[input.as_fd()]).expect("send");
        send(&ours, &Report::NotForked { errno: 11 }, &[]).expect("send");
        drop((ours, input));
        let (_, fds) = receive::<Request>(&theirs).expect("receive").expect("a request");
        let [input] = <[OwnedFd; 1]>::try_from(fds).expect("one descriptor");
        std::fs::File::from(input).write_all(b"through").expect("write");
        let mut text = String::new();
        output.read_to_string(&mut text).expect("read");
        assert_eq!(text, "through");
        let (report, fds) = receive::<Report>(&theirs).expect("receive").expect("a report");
        assert!(matches!(report, Report::NotForked { errno: 11 }) && fds.is_empty());
        assert!(receive::<Report>(&theirs).expect("the end").is_none());
    }
}
