//! Resources in exact arithmetic: ten thousandths, so that a million tenths add up to what they
//! should.

use crate::Resources;
use std::collections::BTreeMap;

/// One CPU, GPU or custom unit.
pub(crate) const UNIT: i64 = 10_000;

/// What [`Resources`] says, as the scheduler counts it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Amounts {
    pub(crate) cpus: i64,
    pub(crate) gpus: i64,
    pub(crate) memory: i64,
    pub(crate) custom: BTreeMap<String, i64>,
}

impl Amounts {
    pub(crate) fn cpus(cpus: i64) -> Self {
        Self { cpus, ..Self::default() }
    }

    /// Whether every amount is at most that of `free`.
    pub(crate) fn fits(&self, free: &Self) -> bool {
        let has = |(name, amount): (&String, &i64)| *amount <= free.custom_amount(name);
        self.cpus <= free.cpus
            && self.gpus <= free.gpus
            && self.memory <= free.memory
            && self.custom.iter().all(has)
    }

    pub(crate) fn add(&mut self, other: &Self) {
        self.combine(other, |mine, theirs| mine + theirs);
    }

    pub(crate) fn subtract(&mut self, other: &Self) {
        self.combine(other, |mine, theirs| mine - theirs);
    }

    /// Subtracts, but nothing below zero.
    pub(crate) fn subtract_what_is_there(&mut self, other: &Self) {
        self.combine(other, |mine, theirs| (mine - theirs).max(0));
    }

    #[cfg(test)]
    pub(crate) fn is_negative(&self) -> bool {
        let amounts = [self.cpus, self.gpus, self.memory].into_iter();
        amounts.chain(self.custom.values().copied()).any(|amount| amount < 0)
    }

    fn custom_amount(&self, name: &str) -> i64 {
        self.custom.get(name).copied().unwrap_or(0)
    }

    fn combine(&mut self, other: &Self, apply: impl Fn(i64, i64) -> i64) {
        self.cpus = apply(self.cpus, other.cpus);
        self.gpus = apply(self.gpus, other.gpus);
        self.memory = apply(self.memory, other.memory);
        for (name, amount) in &other.custom {
            let mine = self.custom.entry(name.clone()).or_default();
            *mine = apply(*mine, *amount);
        }
    }
}

impl From<&Resources> for Amounts {
    /// Rounds down, so that three thirds fit into one, but never to nothing.
    fn from(resources: &Resources) -> Self {
        let whole = |amount: f64| (amount * UNIT as f64 + 1e-6).floor() as i64;
        let units = |amount: f64| whole(amount).max(i64::from(amount > 0.0));
        Self {
            cpus: units(resources.cpus),
            gpus: units(resources.gpus),
            memory: i64::try_from(resources.memory).unwrap_or(i64::MAX),
            custom: resources.custom.iter().map(|(k, v)| (k.clone(), units(*v))).collect(),
        }
    }
}

impl From<&Amounts> for Resources {
    fn from(amounts: &Amounts) -> Self {
        let whole = |units: i64| units as f64 / UNIT as f64;
        Self {
            cpus: whole(amounts.cpus),
            gpus: whole(amounts.gpus),
            memory: amounts.memory.unsigned_abs(),
            custom: amounts.custom.iter().map(|(k, v)| (k.clone(), whole(*v))).collect(),
        }
    }
}
