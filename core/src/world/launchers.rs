//! One function a launcher: from its variables to a [`World`].

use super::variables::{Variables, invalid, missing};
use super::{LOOPBACK, Launcher, World, hostlist, slurm};
use crate::Error;

/// A launcher's names for rank, size, local rank, local size and node.
pub(super) fn names(launcher: Launcher) -> [&'static str; 5] {
    match launcher {
        Launcher::OpenMpi => [
            "OMPI_COMM_WORLD_RANK",
            "OMPI_COMM_WORLD_SIZE",
            "OMPI_COMM_WORLD_LOCAL_RANK",
            "OMPI_COMM_WORLD_LOCAL_SIZE",
            // Not OMPI_COMM_WORLD_NODE_RANK, which is the rank on its node once more.
            "GROUP_RANK",
        ],
        Launcher::Hydra => {
            ["PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", "GROUP_RANK"]
        }
        Launcher::Slurm => [
            "SLURM_PROCID",
            "SLURM_STEP_NUM_TASKS",
            "SLURM_LOCALID",
            "SLURM_STEP_TASKS_PER_NODE",
            "SLURM_NODEID",
        ],
        Launcher::Kubernetes => {
            ["JOB_COMPLETION_INDEX", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK"]
        }
        Launcher::Torchrun | Launcher::Alone => {
            ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK"]
        }
    }
}

/// `RANK` is set. PyTorch itself needs only `RANK WORLD_SIZE MASTER_ADDR MASTER_PORT`, and some
/// launchers set no more than these, with one process a node.
pub(super) fn torchrun(variables: &Variables<'_>) -> Result<World, Error> {
    let rank = variables.need_index("RANK", "RANK")?;
    let world_size = variables.need_size("WORLD_SIZE", "RANK")?;
    // Only to fill gaps: what is wrong with it is no matter where there are none.
    let below = of_engine(variables).ok();
    let below = below.filter(|w| (w.rank, w.world_size) == (rank, world_size) && world_size > 1);
    let below = below.as_ref();
    let (local_rank, local_world_size) = torchrun_local(variables, world_size, below)?;
    let node_rank = match (variables.index("GROUP_RANK")?, below) {
        (Some(node), _) => node,
        (None, Some(below)) => below.node_rank,
        (None, None) => node_in_blocks(Launcher::Torchrun, rank, local_rank, local_world_size)?,
    };
    let is_one_node = local_world_size == world_size;
    let master_addr = variables
        .text("MASTER_ADDR")
        .or_else(|| below.map(|below| below.master_addr.clone()))
        .or_else(|| is_one_node.then(|| LOOPBACK.to_owned()))
        .ok_or_else(|| missing("MASTER_ADDR", "the host of rank 0", "RANK"))?;
    let master_port = variables
        .master_port()?
        .or(below.map(|below| below.master_port))
        .or((world_size == 1).then_some(0))
        .ok_or_else(|| missing("MASTER_PORT", "a port from 1 to 65535", "RANK"))?;
    let (restart_count, launcher) = (variables.restart_count()?, Launcher::Torchrun);
    Ok(World {
        rank,
        world_size,
        local_rank,
        local_world_size,
        node_rank,
        master_addr,
        master_port,
        restart_count,
        launcher,
    })
}

/// The rank and the number of ranks on this node.
fn torchrun_local(
    variables: &Variables<'_>,
    world_size: usize,
    below: Option<&World>,
) -> Result<(usize, usize), Error> {
    let (rank, size) = (variables.index("LOCAL_RANK")?, variables.size("LOCAL_WORLD_SIZE")?);
    match (rank, size, below) {
        (Some(rank), Some(size), _) => Ok((rank, size)),
        (rank, size, Some(below)) => {
            Ok((rank.unwrap_or(below.local_rank), size.unwrap_or(below.local_world_size)))
        }
        (Some(_), None, None) if world_size > 1 => {
            Err(missing("LOCAL_WORLD_SIZE", "a whole number from 1", "LOCAL_RANK"))
        }
        (None, Some(2..), None) => {
            Err(missing("LOCAL_RANK", "a whole number from 0", "LOCAL_WORLD_SIZE"))
        }
        (rank, _, None) => Ok((rank.unwrap_or(0), 1)),
    }
}

/// `RANK` is not set: what an engine that places processes says.
pub(super) fn of_engine(variables: &Variables<'_>) -> Result<World, Error> {
    let world = if variables.text("OMPI_COMM_WORLD_RANK").is_some() {
        open_mpi(variables)
    } else if variables.text("PMI_RANK").is_some() && variables.text("MPI_LOCALRANKID").is_some() {
        hydra(variables)
    } else if slurm::in_step(variables) {
        slurm::world(variables)
    } else if variables.text("JOB_COMPLETION_INDEX").is_some() {
        kubernetes(variables)
    } else {
        alone(variables)
    }?;
    agree_on_size(variables, &world)?;
    Ok(world)
}

/// A `WORLD_SIZE` that a script has exported must be the launcher's.
fn agree_on_size(variables: &Variables<'_>, world: &World) -> Result<(), Error> {
    let [rank, size, ..] = names(world.launcher);
    match variables.size("WORLD_SIZE")? {
        Some(said) if said != world.world_size && variables.text("RANK").is_none() => {
            let expected = match world.launcher {
                Launcher::Alone => "1, or RANK to be set too".to_owned(),
                _ => format!("{}, as {size} is beside {rank}", world.world_size),
            };
            Err(invalid("WORLD_SIZE", said, expected))
        }
        _ => Ok(()),
    }
}

fn alone(variables: &Variables<'_>) -> Result<World, Error> {
    Ok(World { restart_count: variables.restart_count()?, ..World::alone() })
}

fn open_mpi(variables: &Variables<'_>) -> Result<World, Error> {
    // Ports of two launches on one host differ: `mpirun` numbers its jobs.
    let job = variables.text("OMPI_MCA_ess_base_jobid").and_then(|job| job.parse::<u64>().ok());
    mpi(variables, Launcher::OpenMpi, job.map_or(DEFAULT_PORT, |job| port_of_job(job, 0)))
}

fn hydra(variables: &Variables<'_>) -> Result<World, Error> {
    mpi(variables, Launcher::Hydra, DEFAULT_PORT)
}

fn mpi(variables: &Variables<'_>, launcher: Launcher, port: u16) -> Result<World, Error> {
    let [rank_name, size, local_rank, local_size, node] = names(launcher);
    let rank = variables.need_index(rank_name, rank_name)?;
    let world_size = variables.need_size(size, rank_name)?;
    let local_rank = variables.need_index(local_rank, rank_name)?;
    let local_world_size = variables.need_size(local_size, rank_name)?;
    let node_rank = match variables.index(node)? {
        Some(node) => node,
        None => node_in_blocks(launcher, rank, local_rank, local_world_size)?,
    };
    let master_addr = match variables.text("MASTER_ADDR") {
        Some(address) => address,
        None if local_world_size == world_size => LOOPBACK.to_owned(),
        // Inside an allocation, rank 0 is on its first host.
        None => match variables.first(&["SLURM_JOB_NODELIST"]) {
            Some((name, list)) => hostlist::expand(name, &list)?.swap_remove(0),
            None => {
                let because = format!("{size} is more than {local_size} and {rank_name}");
                return Err(missing("MASTER_ADDR", "the host of rank 0", &because));
            }
        },
    };
    Ok(World {
        rank,
        world_size,
        local_rank,
        local_world_size,
        node_rank,
        master_addr,
        master_port: variables.master_port()?.unwrap_or(port),
        restart_count: variables.restart_count()?,
        launcher,
    })
}

/// One pod a node: the index is the rank, and the manifest names the rest.
fn kubernetes(variables: &Variables<'_>) -> Result<World, Error> {
    const INDEX: &str = "JOB_COMPLETION_INDEX";
    let Some(world_size) = variables.size("WORLD_SIZE")? else {
        return alone(variables);
    };
    let rank = variables.need_index(INDEX, INDEX)?;
    let master_addr = match variables.text("MASTER_ADDR") {
        Some(address) => address,
        None if world_size == 1 => LOOPBACK.to_owned(),
        None => {
            let expected = "the host name of the pod with index 0";
            return Err(missing("MASTER_ADDR", expected, INDEX));
        }
    };
    Ok(World {
        rank,
        world_size,
        local_rank: 0,
        local_world_size: 1,
        node_rank: rank,
        master_addr,
        // A pod has its ports for itself.
        master_port: variables.master_port()?.unwrap_or(DEFAULT_PORT),
        restart_count: variables.restart_count()?,
        launcher: Launcher::Kubernetes,
    })
}

/// The node of a rank where nothing names it: ranks fill one node after the other. Refuses ranks
/// that visibly do not.
fn node_in_blocks(
    launcher: Launcher,
    rank: usize,
    local_rank: usize,
    local_world_size: usize,
) -> Result<usize, Error> {
    if rank % local_world_size == local_rank {
        return Ok(rank / local_world_size);
    }
    let [rank_name, _, local_name, local_size, node] = names(launcher);
    let expected = format!(
        "{} as {rank_name} is {rank} and {local_size} is {local_world_size}; where ranks do not \
         fill one node after the other, set {node} to the number of the node",
        rank % local_world_size
    );
    Err(invalid(local_name, local_rank, expected))
}

/// Where nothing numbers the jobs.
const DEFAULT_PORT: u16 = 29_400;

/// A port for a job, so that two on one node do not meet: neighbouring jobs have neighbouring
/// ports, steps of one job are far from each other, and all are below Linux's ephemeral ports
/// (from 32768), which any connection may take.
pub(super) fn port_of_job(job: u64, step: u64) -> u16 {
    const FIRST: u64 = 20_000;
    const PORTS: u64 = 12_000;
    // A prime that does not divide PORTS: the ports of a job's steps are all different.
    const STEP: u64 = 4_099;
    let offset = (job % PORTS + step % PORTS * STEP) % PORTS;
    u16::try_from(FIRST + offset).unwrap_or(DEFAULT_PORT)
}
