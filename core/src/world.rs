//! What this process is in a launch: one of how many, on which node, and where rank 0 is.

mod hostlist;
mod launchers;
mod master;
mod port;
mod slurm;
#[cfg(test)]
mod tests;
mod variables;

pub use port::free_port;

use crate::Error;
use serde::{Deserialize, Serialize};
use std::process::Command;
use variables::Variables;

/// What started the copies of this program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Launcher {
    /// Nothing did: this is the only copy.
    Alone,
    /// torchrun, `mobula launch`, or whatever else sets `RANK` and `WORLD_SIZE`.
    Torchrun,
    /// Open MPI's `mpirun`.
    OpenMpi,
    /// `mpiexec` of MPICH and its kin, such as Intel MPI.
    Hydra,
    /// `srun`.
    Slurm,
    /// An Indexed Job of Kubernetes.
    Kubernetes,
}

/// What this process is in a launch.
///
/// A launcher starts `world_size` copies of a program and tells each by its environment which one
/// it is. The names are torchrun's, and the values are taken from what is there, in this order:
///
/// 1. `RANK` and `WORLD_SIZE`, with `LOCAL_RANK`, `LOCAL_WORLD_SIZE` and `GROUP_RANK`. What is
///    missing of them is taken from a launcher below that agrees on rank and size, and else means
///    one process a node. Whoever sets `RANK` was asked to by someone, so it beats what the
///    environment of a surrounding job says.
/// 2. Open MPI's `OMPI_COMM_WORLD_RANK`, then Hydra's `PMI_RANK`. Both beat Slurm's variables:
///    inside an allocation those describe the daemons of `mpirun`, not its ranks.
/// 3. `SLURM_PROCID` in a step, that is below `srun`. A batch script and the shell of `salloc` have
///    most of the same variables but are no copies of a program: there this process is alone.
/// 4. `JOB_COMPLETION_INDEX` of Kubernetes together with `WORLD_SIZE`. The index without a
///    `WORLD_SIZE` is a job of independent pods: this process is alone.
///
/// `MASTER_ADDR`, `MASTER_PORT` and `RESTART_COUNT` (or `TORCHELASTIC_RESTART_COUNT`) hold in all
/// of them. Where they are not set, the address is the first host of the step, the port follows
/// from the number of the job, and the count is `SLURM_RESTART_COUNT`. A variable that is set to
/// nothing counts as not set; a `WORLD_SIZE` that contradicts the launcher is an error.
///
/// ```
/// use mobula_core::World;
///
/// let environment = [("OMPI_COMM_WORLD_RANK", "3"), ("OMPI_COMM_WORLD_SIZE", "4"),
///     ("OMPI_COMM_WORLD_LOCAL_RANK", "3"), ("OMPI_COMM_WORLD_LOCAL_SIZE", "4")];
/// let world = World::from_variables(|name| {
///     environment.iter().find(|(key, _)| *key == name).map(|(_, value)| value.to_string())
/// })?;
/// assert_eq!((world.rank, world.world_size, world.node_rank), (3, 4, 0));
/// # Ok::<(), mobula_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct World {
    /// Which copy this is, from 0; rank 0 is the driver.
    pub rank: usize,
    /// How many copies there are, at least 1.
    pub world_size: usize,
    /// Which of the copies on this node, from 0.
    pub local_rank: usize,
    /// How many copies there are on this node, at least 1.
    pub local_world_size: usize,
    /// Which node, from 0.
    pub node_rank: usize,
    /// The host of rank 0, a name or an address; [`World::master`] resolves it.
    pub master_addr: String,
    /// The port that rank 0 is to listen on; 0 in a world of one that was given none.
    pub master_port: u16,
    /// How often the launch was started again.
    pub restart_count: u32,
    /// Where all this comes from.
    pub launcher: Launcher,
}

/// What tells a process of its rank. A program that it starts for its own ends inherits them.
const RANK_VARIABLES: &[&str] = &[
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "RESTART_COUNT",
    "TORCHELASTIC_RESTART_COUNT",
    "OMPI_COMM_WORLD_RANK",
    "PMI_RANK",
    "SLURM_STEP_ID",
    "SLURM_STEPID",
    "JOB_COMPLETION_INDEX",
];

impl World {
    /// What this process's environment says.
    pub fn from_env() -> Result<Self, Error> {
        Self::from_variables(|name| {
            std::env::var_os(name).map(|value| value.to_string_lossy().into_owned())
        })
    }

    /// What an environment says, given by a function that looks up a variable.
    ///
    /// Errors name the variable, its value and what was expected.
    pub fn from_variables(lookup: impl Fn(&str) -> Option<String>) -> Result<Self, Error> {
        let variables = Variables::new(&lookup);
        let world = match variables.text("RANK") {
            Some(_) => launchers::torchrun(&variables),
            None => launchers::of_engine(&variables),
        }?;
        world.check()?;
        Ok(world)
    }

    /// The world of a process that nothing launched.
    pub fn alone() -> Self {
        Self {
            rank: 0,
            world_size: 1,
            local_rank: 0,
            local_world_size: 1,
            node_rank: 0,
            master_addr: LOOPBACK.to_owned(),
            master_port: 0,
            restart_count: 0,
            launcher: Launcher::Alone,
        }
    }

    /// Takes from the environment of `command` what would make it believe that it is a rank of
    /// this process's launch: for programs that a rank starts for ends of its own.
    pub fn remove_from(command: &mut Command) {
        RANK_VARIABLES.iter().for_each(|name| {
            command.env_remove(name);
        });
    }

    /// Whether all ranks run on this node.
    pub fn is_one_node(&self) -> bool {
        self.local_world_size == self.world_size
    }

    /// Each number in its range, whatever launcher said it.
    fn check(&self) -> Result<(), Error> {
        let [rank, size, local_rank, local_size, _] = launchers::names(self.launcher);
        below(rank, self.rank, size, self.world_size)?;
        below(local_rank, self.local_rank, local_size, self.local_world_size)?;
        if self.local_world_size > self.world_size {
            let expected = format!("at most {size}, which is {}", self.world_size);
            return Err(variables::invalid(local_size, self.local_world_size, expected));
        }
        Ok(())
    }
}

/// The variable with the secret that all copies know, and that lets them in: at most 1024 bytes, and
/// with the feature `tls` at least 16.
pub const SECRET_VARIABLE: &str = "MOBULA_SECRET";

/// The variable with where an agent that nobody launched is to join, `HOST:PORT`.
pub const JOIN_VARIABLE: &str = "MOBULA_JOIN";

const LOOPBACK: &str = "127.0.0.1";

fn below(name: &str, value: usize, bound_name: &str, bound: usize) -> Result<(), Error> {
    if value < bound {
        return Ok(());
    }
    Err(variables::invalid(name, value, format!("less than {bound_name}, which is {bound}")))
}
