//! Slurm's variables.

use super::variables::{Variables, invalid, missing, parse};
use super::{Launcher, World, hostlist, launchers};
use crate::Error;

/// Step numbers from here up are Slurm's own: the batch script, the shell of `salloc`.
const FIRST_RESERVED_STEP: u32 = 0xffff_fff0;

/// Whether `srun` started this process. A batch script has a `SLURM_PROCID` and an `SLURM_NTASKS`
/// too, but no step; the shell that `salloc` opens on a node is in a step with a reserved number.
pub(super) fn in_step(variables: &Variables<'_>) -> bool {
    let Some((_, step)) = variables.first(&STEP_ID) else { return false };
    let is_reserved = step.parse::<u32>().is_ok_and(|step| step >= FIRST_RESERVED_STEP);
    !is_reserved && variables.text("SLURM_PROCID").is_some() && !is_inherited(variables)
}

/// Whether the step is another job's: a job that was submitted from within a step inherits the
/// variables of that step where it has none of its own. Then what describes the step disagrees
/// with what describes the job and its processes.
fn is_inherited(variables: &Variables<'_>) -> bool {
    let number = |name| variables.text(name)?.parse::<usize>().ok();
    let tasks = number("SLURM_NTASKS").zip(number("SLURM_STEP_NUM_TASKS"));
    if tasks.is_some_and(|(job, step)| job != step) {
        return true;
    }
    let hosts = |name| hostlist::expand(name, &variables.text(name)?).ok();
    let hosts = hosts("SLURM_JOB_NODELIST").zip(hosts("SLURM_STEP_NODELIST"));
    hosts.is_some_and(|(job, step)| !step.iter().all(|host| job.contains(host)))
}

const STEP_ID: [&str; 2] = ["SLURM_STEP_ID", "SLURM_STEPID"];
const JOB_ID: [&str; 2] = ["SLURM_JOB_ID", "SLURM_JOBID"];
const SIZE: [&str; 3] = ["SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS"];
const TASKS: [&str; 2] = ["SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"];
const HOSTS: [&str; 3] = ["SLURM_STEP_NODELIST", "SLURM_NODELIST", "SLURM_JOB_NODELIST"];
const BECAUSE: &str = "SLURM_STEP_ID";

/// The step's own variables come first: those of the job may describe more.
pub(super) fn world(variables: &Variables<'_>) -> Result<World, Error> {
    let number = "a whole number from 0";
    let need = |names: &[&'static str], expected| {
        variables.first(names).ok_or_else(|| missing(names[0], expected, BECAUSE))
    };
    let (step_name, step) = need(&STEP_ID, number)?;
    let step: u64 = parse(step_name, &step, number)?;
    let (job_name, job) = need(&JOB_ID, number)?;
    let job: u64 = parse(job_name, &job, number)?;
    let (size_name, _) = need(&SIZE, "a whole number from 1")?;
    let world_size = variables.need_size(size_name, BECAUSE)?;
    let node_rank = variables.need_index("SLURM_NODEID", BECAUSE)?;

    let (tasks_name, tasks_text) = need(&TASKS, "the tasks on each node, such as 2(x3),1")?;
    let tasks = tasks_per_node(tasks_name, &tasks_text)?;
    let (hosts_name, hosts_text) = need(&HOSTS, "the names of the nodes")?;
    let mut hosts = hostlist::expand(hosts_name, &hosts_text)?;
    if hosts.len() != tasks.len() {
        let expected = format!("{} nodes, as {hosts_name}={hosts_text} has", hosts.len());
        return Err(invalid(tasks_name, tasks_text, expected));
    }
    if tasks.iter().sum::<usize>() != world_size {
        let expected = format!("{world_size} tasks in all, as {size_name} says");
        return Err(invalid(tasks_name, tasks_text, expected));
    }
    let Some(local_world_size) = tasks.get(node_rank).copied() else {
        let expected = format!("less than the {} nodes of {hosts_name}", hosts.len());
        return Err(invalid("SLURM_NODEID", node_rank, expected));
    };
    let port = launchers::port_of_job(job, step);
    Ok(World {
        rank: variables.need_index("SLURM_PROCID", BECAUSE)?,
        world_size,
        local_rank: variables.need_index("SLURM_LOCALID", BECAUSE)?,
        local_world_size,
        node_rank,
        // Task 0 is on the first node in every distribution. Not SLURM_LAUNCH_NODE_IPADDR: that is
        // where `srun` was typed, often a login node.
        master_addr: variables.text("MASTER_ADDR").unwrap_or_else(|| hosts.swap_remove(0)),
        master_port: variables.master_port()?.unwrap_or(port),
        restart_count: variables.restart_count()?,
        launcher: Launcher::Slurm,
    })
}

/// `2(x3),1` is 2, 2, 2, 1.
fn tasks_per_node(name: &str, text: &str) -> Result<Vec<usize>, Error> {
    let wrong = || invalid(name, text, "counts such as 2(x3),1");
    let mut tasks = Vec::new();
    for part in text.split(',') {
        let (count, times) = match part.split_once("(x") {
            Some((count, rest)) => (count, rest.strip_suffix(')').ok_or_else(wrong)?),
            None => (part, "1"),
        };
        let count: u32 = count.trim().parse().map_err(|_| wrong())?;
        let times: usize = times.parse().map_err(|_| wrong())?;
        if times > hostlist::MOST_HOSTS {
            return Err(wrong());
        }
        tasks.extend(std::iter::repeat_n(count as usize, times));
    }
    Ok(tasks)
}
