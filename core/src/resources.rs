//! What a task asks for, and the ledger of what is free.

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
    /// `CUDA_VISIBLE_DEVICES` names or `/dev/nvidia*` shows.
    pub fn of_this_machine() -> Self {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            cpus: cpus as f64,
            gpus: visible_gpus() as f64,
            memory: memory_bytes(),
            custom: BTreeMap::new(),
        }
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

    fn is_valid(&self) -> bool {
        let amounts = [self.cpus, self.gpus].into_iter().chain(self.custom.values().copied());
        amounts.into_iter().all(|amount| amount.is_finite() && amount >= 0.0)
    }

    /// Threads that a worker with these resources computes on: the CPUs rounded up, at least 1.
    pub fn threads(&self) -> usize {
        (self.cpus.ceil() as usize).max(1)
    }

    fn add(&mut self, other: &Self, sign: f64) {
        self.cpus += sign * other.cpus;
        self.gpus += sign * other.gpus;
        self.memory = self.memory.saturating_add_signed(sign as i64 * other.memory as i64);
        for (name, amount) in &other.custom {
            *self.custom.entry(name.clone()).or_default() += sign * amount;
        }
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

/// The account of a machine: what it has and what is taken. Pure state; the runtime owns one.
#[derive(Clone, Debug)]
pub struct Ledger {
    total: Resources,
    free: Resources,
}

impl Ledger {
    /// A ledger with everything free.
    pub fn new(total: Resources) -> Self {
        Self { free: total.clone(), total }
    }

    /// What the machine has.
    pub fn total(&self) -> &Resources {
        &self.total
    }

    /// What is free now.
    pub fn free(&self) -> &Resources {
        &self.free
    }

    /// Refuses what could never fit, however long one waits.
    pub fn check(&self, asked: &Resources) -> Result<(), Error> {
        if !asked.is_valid() {
            return Err(Error::InvalidResources { asked: Box::new(asked.clone()) });
        }
        if asked.fits(&self.total) {
            return Ok(());
        }
        Err(Error::Unplaceable {
            asked: Box::new(asked.clone()),
            total: Box::new(self.total.clone()),
        })
    }

    /// Takes the resources if they are free now.
    pub fn take(&mut self, asked: &Resources) -> bool {
        let fits = asked.fits(&self.free);
        if fits {
            self.free.add(asked, -1.0);
        }
        fits
    }

    /// Gives back what [`Ledger::take`] took.
    pub fn give_back(&mut self, taken: &Resources) {
        self.free.add(taken, 1.0);
    }
}

fn visible_gpus() -> usize {
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
    use proptest::prelude::*;

    #[test]
    fn what_never_fits_is_refused_with_both_sides_named() {
        let ledger = Ledger::new(Resources::cpus(2.0));
        let error = ledger.check(&Resources::cpus(64.0)).expect_err("64 > 2");
        let text = error.to_string();
        assert!(text.contains("64 CPU") && text.contains("2 CPU"), "{text}");
        assert!(ledger.check(&Resources::cpus(1.0).with_custom("tpu", 1.0)).is_err());
    }

    proptest! {
        /// INV-LEDGER: free + taken = total, and free never goes below zero.
        #[test]
        fn takes_and_returns_balance(asks in prop::collection::vec((0u32..=8, 0u32..=2), 1..40)) {
            let mut ledger = Ledger::new(Resources::cpus(4.0).with_gpus(1.0));
            let mut held: Vec<Resources> = Vec::new();
            for (quarters, gpus) in asks {
                let ask = Resources::cpus(f64::from(quarters) / 4.0).with_gpus(f64::from(gpus));
                if ledger.take(&ask) {
                    held.push(ask);
                } else if let Some(done) = held.pop() {
                    ledger.give_back(&done);
                }
                let cpus: f64 = held.iter().map(|r| r.cpus).sum();
                let gpus: f64 = held.iter().map(|r| r.gpus).sum();
                prop_assert!((ledger.free().cpus + cpus - 4.0).abs() < 1e-9);
                prop_assert!((ledger.free().gpus + gpus - 1.0).abs() < 1e-9);
                prop_assert!(ledger.free().cpus > -1e-9 && ledger.free().gpus > -1e-9);
            }
        }
    }
}
