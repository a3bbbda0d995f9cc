//! What this copy of the program is to be.

use super::secret::Secret;
use crate::world::{JOIN_VARIABLE, World};
use crate::{Error, console};
use std::net::{SocketAddr, ToSocketAddrs};
use std::time::{Duration, Instant};

/// Where a driver that nobody launched listens for agents: `HOST:PORT`.
const LISTEN_VARIABLE: &str = "MOBULA_LISTEN";
/// Seconds that copies wait for each other.
const TIMEOUT_VARIABLE: &str = "MOBULA_JOIN_TIMEOUT";
const TIMEOUT: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(100);

#[derive(Debug)]
pub(crate) enum Role {
    /// The only copy.
    Alone,
    /// The one whose `main` runs.
    Driver(Door),
    /// One of the others.
    Member(Join),
}

/// What the driver opens for the others.
#[derive(Debug)]
pub(crate) struct Door {
    pub(super) world: World,
    pub(super) patience: Duration,
}

/// What another copy is to do.
#[derive(Debug)]
pub(crate) struct Join {
    /// `None` where the address was given.
    pub(super) world: Option<World>,
    address: Option<String>,
    /// Whether it is the first copy on a machine that has no other one to speak for it.
    pub(super) is_agent: bool,
    pub(super) deadline: Instant,
}

/// What the environment says.
pub(crate) fn role() -> Result<Role, Error> {
    let patience = patience()?;
    let deadline = Instant::now() + patience;
    if let Some(address) = given(JOIN_VARIABLE) {
        check_form(JOIN_VARIABLE, &address)?;
        let address = Some(address);
        return Ok(Role::Member(Join { world: None, address, is_agent: true, deadline }));
    }
    let world = World::from_env()?;
    Ok(match (world.world_size, world.rank) {
        (1, _) => match given(LISTEN_VARIABLE) {
            Some(address) => Role::Driver(Door { world: listening(&address)?, patience }),
            None => Role::Alone,
        },
        (_, 0) => Role::Driver(Door { world, patience }),
        _ => {
            let is_agent = is_agent(&world);
            Role::Member(Join { world: Some(world), address: None, is_agent, deadline })
        }
    })
}

fn given(variable: &str) -> Option<String> {
    std::env::var(variable).ok().filter(|text| !text.is_empty())
}

/// The world of a driver that others may join later.
fn listening(address: &str) -> Result<World, Error> {
    let address = resolve(LISTEN_VARIABLE, address)?;
    let (master_addr, master_port) = (address.ip().to_string(), address.port());
    Ok(World { master_addr, master_port, ..World::alone() })
}

/// One copy speaks for its machine; on the driver's, the driver does.
fn is_agent(world: &World) -> bool {
    world.node_rank != 0 && world.local_rank == 0
}

fn patience() -> Result<Duration, Error> {
    let Ok(text) = std::env::var(TIMEOUT_VARIABLE) else { return Ok(TIMEOUT) };
    let seconds = text.parse().ok().and_then(|s| Duration::try_from_secs_f64(s).ok());
    seconds.filter(|s| *s <= Duration::from_secs(86_400)).ok_or(Error::LaunchVariable {
        variable: TIMEOUT_VARIABLE.to_owned(),
        got: Some(text),
        expected: "seconds, at most 86400".to_owned(),
    })
}

impl Join {
    /// Where the driver listens.
    pub(super) fn address(&self) -> Result<SocketAddr, Error> {
        match (&self.address, &self.world) {
            (Some(text), _) => resolve(JOIN_VARIABLE, text),
            (None, Some(world)) => world.master(),
            (None, None) => Err(Error::Internal("nothing to join".to_owned())),
        }
    }

    /// Waits for the secret, which the driver may still be about to write.
    pub(super) fn secret(&self) -> Result<Secret, Error> {
        loop {
            if let Some(secret) = Secret::of_agent(self.world.as_ref())? {
                return Ok(secret);
            }
            if self.world.is_none() || Instant::now() >= self.deadline {
                return Err(self.no_secret());
            }
            std::thread::sleep(POLL);
        }
    }

    fn no_secret(&self) -> Error {
        let file = self.world.as_ref().map(Secret::file_of);
        let file = file.map(|file| {
            format!(
                ", or have the driver write {} into a folder that all machines see",
                file.display()
            )
        });
        let file = file.unwrap_or_default();
        Error::Join {
            action: "join the driver".to_owned(),
            reason: format!("there is no secret; set MOBULA_SECRET to that of the driver{file}"),
        }
    }

    /// Whether it is too late to try once more.
    pub(super) fn is_late(&self) -> bool {
        Instant::now() >= self.deadline
    }

    pub(super) fn note(&self, text: &str) {
        let who = self.world.as_ref().map_or("agent".to_owned(), |w| format!("rank {}", w.rank));
        console::note(format!("[{who}] {text}"));
    }
}

/// A host may become known later; what has no port will never have one.
fn check_form(variable: &str, text: &str) -> Result<(), Error> {
    let (host, port) = text.rsplit_once(':').unwrap_or((text, ""));
    match port.parse::<u16>() {
        Ok(1..) if !host.is_empty() => Ok(()),
        Ok(_) | Err(_) => Err(no_address(variable, text, "such as 10.0.0.1:29400")),
    }
}

fn resolve(variable: &str, text: &str) -> Result<SocketAddr, Error> {
    let wrong = |reason: &str| no_address(variable, text, reason);
    let addresses = text.to_socket_addrs().map_err(|error| wrong(&error.to_string()))?;
    addresses.into_iter().next().ok_or_else(|| wrong("no address"))
}

fn no_address(variable: &str, text: &str, reason: &str) -> Error {
    Error::LaunchVariable {
        variable: variable.to_owned(),
        got: Some(text.to_owned()),
        expected: format!("HOST:PORT of the driver ({reason})"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_without_a_port_is_refused_before_anything_is_tried() {
        for wrong in ["10.0.0.1", "host", "host:", ":29400", "host:port", "host:70000", "host:0"] {
            let error = check_form(JOIN_VARIABLE, wrong).expect_err(wrong).to_string();
            assert!(error.contains("MOBULA_JOIN") && error.contains("HOST:PORT"), "{error}");
        }
        for right in ["10.0.0.1:29400", "[::1]:29400", "not-yet-known.example.org:1"] {
            check_form(JOIN_VARIABLE, right).expect(right);
        }
    }

    #[test]
    fn one_copy_speaks_for_each_machine() {
        // `srun -n6` on three nodes, `mpirun -np 4` and `launch --workers 4` on one.
        let agents = |layout: &[usize]| {
            let copies = layout
                .iter()
                .enumerate()
                .flat_map(|(node, copies)| (0..*copies).map(move |local| (node, local)));
            copies
                .filter(|(node_rank, local_rank)| {
                    is_agent(&World {
                        node_rank: *node_rank,
                        local_rank: *local_rank,
                        ..World::alone()
                    })
                })
                .collect::<Vec<_>>()
        };
        assert_eq!(agents(&[2, 2, 2]), [(1, 0), (2, 0)]);
        assert_eq!(agents(&[1, 1, 1]), [(1, 0), (2, 0)]);
        assert!(agents(&[4]).is_empty());
    }
}
