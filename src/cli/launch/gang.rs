//! When to start, signal and give up the copies of a launch. Pure: events in, commands out.

use rustix::process::Signal;
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Event {
    /// The copy of this rank has ended, with this exit code (128 + n for signal n).
    Exited { rank: usize, code: u8 },
    /// The launcher was asked to end.
    Signalled(Signal),
    /// Time has passed.
    Tick,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Command {
    /// Start all ranks; the launch was started so many times before.
    StartAll {
        restart_count: u32,
    },
    Signal {
        rank: usize,
        signal: Signal,
    },
    /// All copies have ended, and this is the exit code of the launch.
    Finish {
        code: u8,
    },
}

/// The copies of a program that run, fail and are started again together.
#[derive(Debug)]
pub(super) struct Gang {
    size: usize,
    max_restarts: u32,
    grace: Duration,
    restart_count: u32,
    running: BTreeSet<usize>,
    /// The first code that was not 0, of this start.
    failure: Option<u8>,
    /// The signal that asked the launcher to end.
    interrupt: Option<Signal>,
    /// When patience with those who were asked to end is over.
    kill_at: Option<Instant>,
}

impl Gang {
    pub(super) fn new(size: usize, max_restarts: u32, grace: Duration) -> Self {
        Self {
            size,
            max_restarts,
            grace,
            restart_count: 0,
            running: BTreeSet::new(),
            failure: None,
            interrupt: None,
            kill_at: None,
        }
    }

    pub(super) fn start(&mut self) -> Vec<Command> {
        self.running = (0..self.size).collect();
        vec![Command::StartAll { restart_count: self.restart_count }]
    }

    /// When to call [`Gang::step`] with a tick, if nothing else happens before.
    pub(super) fn wake_at(&self) -> Option<Instant> {
        self.kill_at
    }

    /// Whether the copies have been asked to end, or one has failed: no further failure is news.
    pub(super) fn is_ending(&self) -> bool {
        self.failure.is_some() || self.interrupt.is_some()
    }

    pub(super) fn step(&mut self, event: Event, now: Instant) -> Vec<Command> {
        match event {
            Event::Exited { rank, code } => self.exited(rank, code, now),
            Event::Signalled(signal) => self.signalled(signal, now),
            Event::Tick if self.kill_at.is_some_and(|at| at <= now) => self.kill_all(),
            Event::Tick => Vec::new(),
        }
    }

    fn exited(&mut self, rank: usize, code: u8, now: Instant) -> Vec<Command> {
        self.running.remove(&rank);
        let is_first_failure = code != 0 && self.failure.is_none();
        if is_first_failure {
            self.failure = Some(code);
        }
        if self.running.is_empty() {
            return self.all_exited();
        }
        if is_first_failure && self.interrupt.is_none() {
            return self.ask_all(Signal::TERM, now);
        }
        Vec::new()
    }

    fn all_exited(&mut self) -> Vec<Command> {
        self.kill_at = None;
        let code = match (self.interrupt, self.failure) {
            (Some(signal), _) => 128 + signal.as_raw() as u8,
            (None, None) => 0,
            (None, Some(_)) if self.restart_count < self.max_restarts => {
                self.restart_count += 1;
                self.failure = None;
                return self.start();
            }
            (None, Some(code)) => code,
        };
        vec![Command::Finish { code }]
    }

    /// Who asks twice is in a hurry.
    fn signalled(&mut self, signal: Signal, now: Instant) -> Vec<Command> {
        match self.interrupt.replace(signal) {
            None => self.ask_all(signal, now),
            Some(_) => self.kill_all(),
        }
    }

    fn ask_all(&mut self, signal: Signal, now: Instant) -> Vec<Command> {
        self.kill_at = Some(now + self.grace);
        self.signal_all(signal)
    }

    fn kill_all(&mut self) -> Vec<Command> {
        self.kill_at = None;
        self.signal_all(Signal::KILL)
    }

    fn signal_all(&self, signal: Signal) -> Vec<Command> {
        self.running.iter().map(|&rank| Command::Signal { rank, signal }).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mobula::random::Stream;

    const GRACE: Duration = Duration::from_secs(10);

    fn signals(ranks: &[usize], signal: Signal) -> Vec<Command> {
        ranks.iter().map(|&rank| Command::Signal { rank, signal }).collect()
    }

    fn exited(rank: usize, code: u8) -> Event {
        Event::Exited { rank, code }
    }

    #[test]
    fn all_good_is_good() {
        let (mut gang, now) = (Gang::new(2, 3, GRACE), Instant::now());
        assert_eq!(gang.start(), [Command::StartAll { restart_count: 0 }]);
        assert_eq!(gang.step(exited(1, 0), now), []);
        assert_eq!(gang.wake_at(), None);
        assert_eq!(gang.step(exited(0, 0), now), [Command::Finish { code: 0 }]);
    }

    #[test]
    fn one_failure_ends_all_and_the_first_code_counts() {
        let (mut gang, now) = (Gang::new(3, 0, GRACE), Instant::now());
        gang.start();
        assert_eq!(gang.step(exited(1, 7), now), signals(&[0, 2], Signal::TERM));
        assert_eq!(gang.step(exited(0, 143), now), []);
        assert_eq!(gang.step(Event::Tick, now + GRACE / 2), []);
        assert_eq!(gang.step(Event::Tick, now + GRACE), signals(&[2], Signal::KILL));
        assert_eq!(gang.step(exited(2, 137), now + GRACE), [Command::Finish { code: 7 }]);
    }

    #[test]
    fn restarts_are_counted_and_bounded() {
        let (mut gang, now) = (Gang::new(1, 2, GRACE), Instant::now());
        gang.start();
        for restart_count in [1, 2] {
            assert_eq!(gang.step(exited(0, 3), now), [Command::StartAll { restart_count }]);
        }
        assert_eq!(gang.step(exited(0, 3), now), [Command::Finish { code: 3 }]);
    }

    #[test]
    fn a_signal_is_passed_on_and_a_second_one_kills() {
        let (mut gang, now) = (Gang::new(2, 5, GRACE), Instant::now());
        gang.start();
        let interrupt = Event::Signalled(Signal::INT);
        assert_eq!(gang.step(interrupt, now), signals(&[0, 1], Signal::INT));
        assert_eq!(gang.step(exited(0, 130), now), []);
        assert_eq!(gang.step(interrupt, now), signals(&[1], Signal::KILL));
        // No restart: somebody wants it to end.
        assert_eq!(gang.step(exited(1, 137), now), [Command::Finish { code: 130 }]);
    }

    /// Whatever happens in whatever order: it ends once, when all copies have ended; it never
    /// starts a copy that runs; and once one has failed, all that run have been asked to end.
    #[test]
    fn every_history_ends_once() {
        for seed in 0..2_000 {
            let mut dice = Stream::new(seed, "gang").at(0, 0);
            let size = 1 + dice.below(4) as usize;
            let max_restarts = dice.below(3) as u32;
            let mut gang = Gang::new(size, max_restarts, GRACE);
            let (mut now, mut starts, mut code) = (Instant::now(), 0, None);
            let (mut running, mut asked) = (BTreeSet::new(), BTreeSet::new());
            let mut commands = gang.start();
            while code.is_none() {
                for command in std::mem::take(&mut commands) {
                    match command {
                        Command::StartAll { restart_count } => {
                            assert!(running.is_empty() && restart_count == starts, "seed {seed}");
                            starts += 1;
                            (running, asked) = ((0..size).collect(), BTreeSet::new());
                        }
                        Command::Signal { rank, .. } => {
                            assert!(running.contains(&rank), "seed {seed}");
                            asked.insert(rank);
                        }
                        Command::Finish { code: last } => code = Some(last),
                    }
                }
                let failed = !asked.is_empty();
                assert!(!failed || running.is_subset(&asked), "seed {seed}: {running:?} {asked:?}");
                assert_eq!(running.is_empty(), code.is_some(), "seed {seed}");
                now += Duration::from_secs(dice.below(8));
                let pick = dice.below(8);
                let any =
                    running.iter().nth(dice.below(size as u64) as usize % running.len().max(1));
                commands = match (pick, any.copied()) {
                    (0, _) if code.is_none() => gang.step(Event::Signalled(Signal::TERM), now),
                    (1 | 2, _) => gang.step(Event::Tick, now),
                    (_, Some(rank)) => {
                        running.remove(&rank);
                        gang.step(exited(rank, u8::from(pick == 3)), now)
                    }
                    _ => Vec::new(),
                };
            }
            assert!(starts <= max_restarts + 1, "seed {seed}");
        }
    }
}
