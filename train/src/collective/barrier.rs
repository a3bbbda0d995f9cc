//! Waiting for counters in shared memory: each rank counts its own turns, and waits until the
//! counters of the others have come as far. Who is late can be told by name.

use crate::{Error, Result};
use mobula_core::Member;
use std::time::{Duration, Instant};

/// Turns to look before giving the core to whom it may be waited for: with as many ranks as
/// cores the others arrive within microseconds.
const SPINS: u32 = 2000;
/// Yields before sleeping between looks.
const YIELDS: u32 = 2000;

/// Waits until none of the ranks, by their places, is late. Gives up when `member` hears that one of
/// them was lost.
pub(super) fn wait(
    member: &Member,
    ranks: &[usize],
    operation: &'static str,
    timeout: Duration,
    is_late: impl Fn(usize) -> bool,
) -> Result<()> {
    let begun = Instant::now();
    for other in 0..ranks.len() {
        let mut looks = 0;
        while is_late(other) {
            pause(&mut looks);
            if looks <= SPINS {
                continue;
            }
            member.check_generation()?;
            if begun.elapsed() > timeout {
                let late = (0..ranks.len()).filter(|at| is_late(*at)).map(|at| ranks[at]).collect();
                return Err(Error::Straggler {
                    operation,
                    rank: member.rank(),
                    late,
                    after: timeout,
                });
            }
        }
    }
    Ok(())
}

/// Between looks at what others are to do: longer ones the longer it takes.
pub(crate) fn pause(looks: &mut u32) {
    *looks = looks.saturating_add(1);
    match *looks {
        0..=SPINS => std::hint::spin_loop(),
        n if n <= SPINS + YIELDS => std::thread::yield_now(),
        _ => std::thread::sleep(Duration::from_micros(50)),
    }
}
