//! Ports for those who are told of one before they listen.

use std::io::{Error, ErrorKind, Result};
use std::net::{Ipv4Addr, TcpListener};
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Below those that systems give to whoever asks for any: on Linux from 32768 on.
const PORTS: Range<u16> = 10_000..30_000;

/// A port of this machine for a process that is to listen and has not started yet, such as rank 0
/// (`MASTER_PORT`). It is free now, and no other program is given it by chance, as one is that asks for any; this
/// process gives it to nobody else.
///
/// Fails if none from 10000 to 29999 is free.
pub fn free_port() -> Result<u16> {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    // Processes that look at the same time begin in places of their own.
    let first = std::process::id().wrapping_mul(61) as usize;
    let next = || first.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)) % PORTS.len();
    let mut ports = std::iter::repeat_with(|| PORTS.start + next() as u16).take(PORTS.len());
    let free = ports.find(|port| TcpListener::bind((Ipv4Addr::LOCALHOST, *port)).is_ok());
    let none = || format!("no port from {} to {} is free", PORTS.start, PORTS.end - 1);
    free.ok_or_else(|| Error::new(ErrorKind::AddrInUse, none()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_free_and_given_once() {
        let [one, other] = [free_port(), free_port()].map(|port| port.expect("a port"));
        assert!(one != other && PORTS.contains(&one) && PORTS.contains(&other));
        let _taken = TcpListener::bind((Ipv4Addr::LOCALHOST, one)).expect("it is free");
        let rest = (0..PORTS.len()).filter(|_| free_port().expect("a port") == one).count();
        assert_eq!(rest, 0, "a port that is taken is not free");
    }
}
