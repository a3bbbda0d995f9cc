//! Who kills workers meanwhile: when, whom and how is drawn from the seed.

use crate::processes::{Worker, victims};
use crate::tally::Tally;
use mobula_core::random::Philox;
use rustix::process::Signal;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

/// The signals that end a process which has not asked to hear of them.
const SIGNALS: [(Signal, &str); 15] = [
    (Signal::KILL, "KILL"),
    (Signal::TERM, "TERM"),
    (Signal::SEGV, "SEGV"),
    (Signal::ABORT, "ABRT"),
    (Signal::INT, "INT"),
    (Signal::HUP, "HUP"),
    (Signal::QUIT, "QUIT"),
    (Signal::BUS, "BUS"),
    (Signal::FPE, "FPE"),
    (Signal::ILL, "ILL"),
    (Signal::USR1, "USR1"),
    (Signal::USR2, "USR2"),
    (Signal::ALARM, "ALRM"),
    (Signal::SYS, "SYS"),
    (Signal::TRAP, "TRAP"),
];

/// Kills until it is stopped, or has killed enough.
pub(crate) struct Killer {
    stop: Sender<()>,
    thread: JoinHandle<Tally>,
}

impl Killer {
    pub(crate) fn start(mut draw: Philox, kills: u64) -> Self {
        let (stop, stopped) = channel();
        let thread = std::thread::spawn(move || {
            let mut tally = Tally::default();
            for _ in 0..kills {
                let pause = Duration::from_millis(draw.below(60));
                // The same draws for each blow, whatever comes of it.
                let (victim, how, rest) = (draw.uniform(), draw.below(18), draw.below(50));
                if stopped.recv_timeout(pause) != Err(RecvTimeoutError::Timeout) {
                    break;
                }
                let candidates = victims();
                let victim = candidates.get((victim * candidates.len() as f64) as usize);
                if let Some(worker) = victim.and_then(|pid| Worker::open(*pid)) {
                    strike(&worker, how as usize, Duration::from_millis(rest), &mut tally);
                }
            }
            tally
        });
        Self { stop, thread }
    }

    /// What it has done.
    pub(crate) fn stop(self) -> Tally {
        drop(self.stop);
        self.thread.join().unwrap_or_default()
    }
}

fn strike(worker: &Worker, how: usize, rest: Duration, tally: &mut Tally) {
    let Some((signal, name)) = SIGNALS.get(how) else {
        worker.signal(Signal::STOP);
        std::thread::sleep(rest);
        let (signal, name) = match how % 2 {
            0 => (Signal::CONT, "STOP, CONT"),
            _ => (Signal::KILL, "STOP, KILL"),
        };
        worker.signal(signal);
        return tally.killed(name);
    };
    worker.signal(*signal);
    // Rust's own handler takes the first one of these for a stack overflow that it was not.
    if matches!(*signal, Signal::SEGV | Signal::BUS) {
        worker.signal(*signal);
    }
    tally.killed(name);
}
