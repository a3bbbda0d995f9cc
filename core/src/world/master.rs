//! From the name of rank 0's host to an address.

use super::{Launcher, World};
use crate::Error;
use std::net::{SocketAddr, ToSocketAddrs};
use std::process::{Command, Stdio};
use std::sync::mpsc::sync_channel;
use std::time::Duration;

/// Resolvers and Slurm's controller answer long before, or not at all.
const DEADLINE: Duration = Duration::from_secs(30);

impl World {
    /// The address of rank 0.
    ///
    /// Resolves the name; where it is a Slurm node whose name does not resolve, asks `scontrol`
    /// for the node's address. Errors after 30 seconds without an answer.
    pub fn master(&self) -> Result<SocketAddr, Error> {
        let (send, answer) = sync_channel(1);
        let world = self.clone();
        // A resolver cannot be interrupted: on a thread, it can be left behind.
        let thread = std::thread::Builder::new().name("mobula-resolver".to_owned());
        let resolve = move || drop(send.send(world.resolve()));
        thread.spawn(resolve).map_err(|e| Error::system("starting a thread", e))?;
        let what = || format!("resolving the host of rank 0, {}", self.master_addr);
        let late = |_| Error::Timeout { what: what(), after: DEADLINE };
        answer.recv_timeout(DEADLINE).map_err(late)?
    }

    fn resolve(&self) -> Result<SocketAddr, Error> {
        let name = self.master_addr.as_str();
        let unknown = match first_address(name, self.master_port) {
            Ok(address) => return Ok(address),
            Err(error) => error,
        };
        if self.launcher == Launcher::Slurm
            && let Some(address) = slurm_address(name)
            && let Ok(address) = first_address(&address, self.master_port)
        {
            return Ok(address);
        }
        Err(Error::LaunchVariable {
            variable: "MASTER_ADDR".to_owned(),
            got: Some(name.to_owned()),
            expected: format!("the host of rank 0, by a name that resolves here ({unknown})"),
        })
    }
}

/// IPv4 first, where a host has both: it is what a cluster's fabric has.
fn first_address(host: &str, port: u16) -> std::io::Result<SocketAddr> {
    let addresses: Vec<SocketAddr> = (host, port).to_socket_addrs()?.collect();
    let first = addresses.iter().find(|a| a.is_ipv4()).or(addresses.first()).copied();
    first.ok_or_else(|| std::io::Error::other("it has no address"))
}

/// `NodeAddr` of a node, as Slurm itself reaches it.
fn slurm_address(node: &str) -> Option<String> {
    let mut scontrol = Command::new("scontrol");
    scontrol.args(["--oneliner", "show", "node", node]).stdin(Stdio::null());
    let output = scontrol.output().ok().filter(|output| output.status.success())?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    node_addr(&text).map(str::to_owned)
}

fn node_addr(text: &str) -> Option<&str> {
    text.split_whitespace().find_map(|word| word.strip_prefix("NodeAddr="))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_its_own_name() {
        let world = World { master_port: 29400, ..World::alone() };
        assert_eq!(world.master().expect("loopback").to_string(), "127.0.0.1:29400");
    }

    #[test]
    fn a_name_that_nobody_knows_is_an_error_that_names_it() {
        // RFC 6761: names under .invalid never resolve.
        let world = World { master_addr: "node1.invalid".to_owned(), ..World::alone() };
        let error = world.master().expect_err("no such host").to_string();
        assert!(error.contains("MASTER_ADDR") && error.contains("node1.invalid"), "{error}");
    }

    #[test]
    fn slurm_names_the_address_among_much_else() {
        let text = "NodeName=node1 Arch=x86_64 NodeAddr=10.0.0.11 NodeHostName=x Version=22.05.8\n";
        assert_eq!(node_addr(text), Some("10.0.0.11"));
        assert_eq!(node_addr("Node x not found"), None);
    }
}
