//! What a task asks for, and what a machine has.

use crate::Error;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;

/// An amount of each resource: what a request asks for, or what a machine has.
///
/// ```
/// use mobula_core::Resources;
///
/// let one_gpu = Resources::cpus(2.0).with_gpus(1.0);
/// assert_eq!(one_gpu.to_string(), "2 CPU, 1 GPU");
/// ```
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Resources {
    /// Logical CPUs; fractions share one.
    pub cpus: f64,
    /// GPUs; fractions share one.
    pub gpus: f64,
    /// Bytes of memory; 0 asks for none in particular.
    pub memory: u64,
    /// Anything else by name.
    pub custom: BTreeMap<String, f64>,
}

impl Resources {
    /// So many CPUs and nothing else.
    pub fn cpus(cpus: f64) -> Self {
        Self { cpus, ..Self::default() }
    }

    /// The same with so many GPUs.
    pub fn with_gpus(self, gpus: f64) -> Self {
        Self { gpus, ..self }
    }

    /// The same with so many bytes of memory.
    pub fn with_memory(self, memory: u64) -> Self {
        Self { memory, ..self }
    }

    /// The same with an amount of a custom resource.
    pub fn with_custom(mut self, name: impl Into<String>, amount: f64) -> Self {
        self.custom.insert(name.into(), amount);
        self
    }

    /// This machine: its CPUs as the scheduler lets us use them, its memory, and the GPUs that
    /// `CUDA_VISIBLE_DEVICES` names or `/dev/nvidia*` shows. In a step of a Slurm job, at most what
    /// the job has on this node.
    pub fn of_this_machine() -> Self {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        let machine = Self {
            cpus: cpus as f64,
            gpus: visible_gpus() as f64,
            memory: memory_bytes(),
            custom: BTreeMap::new(),
        };
        machine.within_step(|name| std::env::var(name).ok())
    }

    /// Not every cluster binds the processes of a job to the CPUs and the memory that it has.
    fn within_step(self, lookup: impl Fn(&str) -> Option<String>) -> Self {
        if lookup("SLURM_STEP_ID").is_none() {
            return self;
        }
        let number = |name| lookup(name).and_then(|text| text.parse::<u32>().ok());
        let cpus = number("SLURM_CPUS_ON_NODE").map_or(self.cpus, f64::from);
        // 0 stands for all that the node has.
        let mib = number("SLURM_MEM_PER_NODE").filter(|mib| *mib > 0);
        let memory = mib.map_or(self.memory, |mib| u64::from(mib) << 20);
        Self { cpus: self.cpus.min(cpus), memory: self.memory.min(memory), ..self }
    }

    /// So many times these resources.
    pub fn times(&self, n: usize) -> Self {
        let n_f = n as f64;
        Self {
            cpus: self.cpus * n_f,
            gpus: self.gpus * n_f,
            memory: self.memory * n as u64,
            custom: self.custom.iter().map(|(k, v)| (k.clone(), v * n_f)).collect(),
        }
    }

    /// Whether `self` fits into `free`.
    pub fn fits(&self, free: &Self) -> bool {
        const EPSILON: f64 = 1e-9;
        self.cpus <= free.cpus + EPSILON
            && self.gpus <= free.gpus + EPSILON
            && self.memory <= free.memory
            && self.custom.iter().all(|(name, amount)| {
                *amount <= free.custom.get(name).copied().unwrap_or(0.0) + EPSILON
            })
    }

    /// Refuses what could never fit into `total`, however long one waits.
    pub fn check_within(&self, total: &Self) -> Result<(), Error> {
        if !self.is_valid() {
            return Err(Error::InvalidResources { asked: Box::new(self.clone()) });
        }
        if self.fits(total) {
            return Ok(());
        }
        Err(Error::Unplaceable { asked: Box::new(self.clone()), total: Box::new(total.clone()) })
    }

    /// Whether every amount is one. GPUs are shared, or whole.
    pub(crate) fn is_valid(&self) -> bool {
        let is_whole = self.gpus <= 1.0 || self.gpus.fract() == 0.0;
        let amounts = [self.cpus, self.gpus].into_iter().chain(self.custom.values().copied());
        is_whole && amounts.into_iter().all(|amount| (0.0..1e9).contains(&amount))
    }

    /// Threads that a worker with these resources computes on: the CPUs rounded up, at least 1.
    pub fn threads(&self) -> usize {
        (self.cpus.ceil() as usize).max(1)
    }
}

impl fmt::Display for Resources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = vec![format!("{} CPU", self.cpus)];
        if self.gpus > 0.0 {
            parts.push(format!("{} GPU", self.gpus));
        }
        if self.memory > 0 {
            parts.push(format!("{:.1} GiB memory", self.memory as f64 / (1u64 << 30) as f64));
        }
        parts.extend(self.custom.iter().map(|(name, amount)| format!("{amount} {name}")));
        f.write_str(&parts.join(", "))
    }
}

/// GPUs that this process may use.
pub(crate) fn visible_gpus() -> usize {
    if let Ok(list) = std::env::var("CUDA_VISIBLE_DEVICES") {
        // As CUDA reads it: an invalid index, such as -1, hides itself and all after it.
        let ids = list.split(',').map(str::trim);
        return ids.take_while(|id| !id.is_empty() && !id.starts_with('-')).count();
    }
    (0..64).take_while(|i| std::path::Path::new(&format!("/dev/nvidia{i}")).exists()).count()
}

/// Total memory in bytes, 0 where the system does not say.
fn memory_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib = line.and_then(|rest| rest.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_never_fits_is_refused_with_both_sides_named() {
        let total = Resources::cpus(2.0);
        let error = Resources::cpus(64.0).check_within(&total).expect_err("64 > 2");
        let text = error.to_string();
        assert!(text.contains("64 CPU") && text.contains("2 CPU"), "{text}");
        assert!(Resources::cpus(1.0).with_custom("tpu", 1.0).check_within(&total).is_err());
    }

    #[test]
    fn a_step_of_a_job_has_no_more_than_the_job() {
        let machine = || Resources::cpus(64.0).with_memory(256 << 30);
        let within = |step: &[(&str, &str)]| {
            machine().within_step(|name| {
                let found = step.iter().find(|(known, _)| *known == name);
                found.map(|(_, value)| (*value).to_owned())
            })
        };
        let job = [("SLURM_CPUS_ON_NODE", "4"), ("SLURM_MEM_PER_NODE", "4096")];
        let step = [&[("SLURM_STEP_ID", "0")], &job[..]].concat();
        assert_eq!(within(&step), Resources::cpus(4.0).with_memory(4 << 30));
        // A batch script is no step, and `--mem=0` asks for all.
        assert_eq!(within(&job), machine());
        assert_eq!(within(&[("SLURM_STEP_ID", "0"), ("SLURM_MEM_PER_NODE", "0")]), machine());
    }

    #[test]
    fn amounts_that_are_none_are_refused() {
        let total = Resources::cpus(2.0).with_gpus(4.0);
        for asked in [f64::NAN, f64::INFINITY, -1.0] {
            let error = Resources::cpus(asked).check_within(&total).expect_err("no amount");
            assert!(matches!(error, Error::InvalidResources { .. }), "{error}");
        }
        assert!(Resources::cpus(1.0).with_gpus(1.5).check_within(&total).is_err());
        assert!(Resources::cpus(0.5).with_gpus(0.25).check_within(&total).is_ok());
    }
}
