//! A barrier over counters in shared memory: each rank counts its own arrivals, and waits until
//! the counters of all others have come as far. Who is late can be told by name.

use super::region::Region;
use crate::{Error, Result};
use mobula_core::Member;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Index of the counter of arrivals in a rank's cache line.
const ARRIVALS: usize = 0;
/// Turns to look before giving the core to whom it may be waited for: with as many ranks as
/// cores the others arrive within microseconds.
const SPINS: u32 = 2000;
/// Yields before sleeping between looks.
const YIELDS: u32 = 2000;

/// Arrives as number `turn` (1, 2, …) and waits for all others. Gives up when `member` hears that
/// one of them was lost.
pub(crate) fn wait(
    region: &Region,
    member: &Member,
    turn: u64,
    operation: &'static str,
    timeout: Duration,
) -> Result<()> {
    let (rank, world) = (member.rank(), member.world_size());
    region.counter(rank, ARRIVALS).store(turn, Ordering::Release);
    let is_late = |other: &usize| region.counter(*other, ARRIVALS).load(Ordering::Acquire) < turn;
    let begun = Instant::now();
    for other in 0..world {
        let mut looks = 0;
        while is_late(&other) {
            pause(&mut looks);
            if looks <= SPINS {
                continue;
            }
            member.check_generation()?;
            if begun.elapsed() > timeout {
                let late = (0..world).filter(is_late).collect();
                return Err(Error::Straggler { operation, rank, late, after: timeout });
            }
        }
    }
    Ok(())
}

fn pause(looks: &mut u32) {
    *looks = looks.saturating_add(1);
    match *looks {
        0..=SPINS => std::hint::spin_loop(),
        n if n <= SPINS + YIELDS => std::thread::yield_now(),
        _ => std::thread::sleep(Duration::from_micros(50)),
    }
}
