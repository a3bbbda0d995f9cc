//! All-reduce through shared memory: give, meet, add one's own chunk, meet, take.
//!
//! Each byte is copied in once, read once per rank by one adder, and copied out once: 2·P·n bytes
//! of traffic for P ranks, where a ring over sockets moves each byte through the kernel 2·(P−1)/P
//! times more.

use super::region::Region;
use super::{Element, TIMEOUT, barrier};
use crate::{Error, Result};
use mobula_core::Member;
use std::path::Path;
use std::sync::atomic::Ordering;

/// Index of the counter that holds how many values a rank brought.
const LENGTH: usize = 1;

/// One rank's view of the shared region, which grows to the largest sum asked for.
#[derive(Debug)]
pub(crate) struct SharedMemory {
    rank: usize,
    world: usize,
    region: Option<Region>,
    /// Regions made so far: the same number on every rank.
    regions: u64,
    /// Barriers passed in this region.
    turn: u64,
}

impl SharedMemory {
    pub(crate) fn new(rank: usize, world: usize) -> Self {
        Self { rank, world, region: None, regions: 0, turn: 0 }
    }

    pub(crate) fn all_reduce<T: Element>(
        &mut self,
        member: &Member,
        values: &mut [T],
    ) -> Result<()> {
        self.reserve(member, size_of_val(values))?;
        self.publish(values.len() as u64)?;
        self.region()?.give(self.rank, values);
        self.meet(member, "all_reduce")?;
        self.check_lengths(values.len() as u64)?;
        self.region()?.reduce::<T>(self.chunk(values.len()), values.len());
        self.meet(member, "all_reduce")?;
        self.region()?.take(values);
        // No third barrier: a rank can give again only into its own slot, which nobody reads
        // any more, and can touch the sum only after the next barrier.
        Ok(())
    }

    /// Makes sure of a region with slots of so many bytes. Whether ranks that differ in length
    /// come here together or not, each finds out: by what the others say here, by the lengths
    /// that they publish, or by the deadline.
    fn reserve(&mut self, member: &Member, bytes: usize) -> Result<()> {
        if self.region.as_ref().is_some_and(|region| region.capacity() >= bytes) {
            return Ok(());
        }
        self.regions += 1;
        let made = match self.rank {
            0 => Some(Region::create(self.world, bytes)?),
            _ => None,
        };
        let path = self.agree(member, bytes, made.as_ref().map_or("", |(_, path)| path))?;
        self.region = Some(match made {
            Some((region, _)) => region,
            None => Region::open(Path::new(&path), self.world, bytes)?,
        });
        self.turn = 0;
        Ok(())
    }

    /// Compares the sizes that all ranks ask for; gives the path of rank 0's region.
    fn agree(&self, member: &Member, bytes: usize, path: &str) -> Result<String> {
        let key = format!("shared-memory-{}", self.regions);
        let all = member.all_gather(&key, format!("{bytes} {path}").as_bytes(), TIMEOUT)?;
        let mut paths = Vec::with_capacity(all.len());
        for (other, said) in all.iter().enumerate() {
            let said = String::from_utf8_lossy(said).into_owned();
            let (size, path) = said.split_once(' ').unwrap_or((&said, ""));
            let other_len = size.parse().unwrap_or(0);
            if other_len != bytes {
                let (rank, len) = (self.rank, bytes);
                return Err(Error::CollectiveLength { rank, len, other, other_len, unit: "bytes" });
            }
            paths.push(path.to_owned());
        }
        Ok(paths.swap_remove(0))
    }

    fn publish(&self, len: u64) -> Result<()> {
        self.region()?.counter(self.rank, LENGTH).store(len, Ordering::Relaxed);
        Ok(())
    }

    fn check_lengths(&self, len: u64) -> Result<()> {
        let region = self.region()?;
        for other in 0..self.world {
            let other_len = region.counter(other, LENGTH).load(Ordering::Relaxed);
            if other_len != len {
                let (len, other_len) = (len as usize, other_len as usize);
                let rank = self.rank;
                return Err(Error::CollectiveLength {
                    rank,
                    len,
                    other,
                    other_len,
                    unit: "elements",
                });
            }
        }
        Ok(())
    }

    fn meet(&mut self, member: &Member, operation: &'static str) -> Result<()> {
        self.turn += 1;
        barrier::wait(self.region()?, member, self.turn, operation, TIMEOUT)
    }

    /// The part of the sum that this rank adds up.
    fn chunk(&self, len: usize) -> std::ops::Range<usize> {
        len * self.rank / self.world..len * (self.rank + 1) / self.world
    }

    fn region(&self) -> Result<&Region> {
        self.region.as_ref().ok_or_else(|| {
            mobula_core::Error::Internal("a collective without its shared memory".to_owned()).into()
        })
    }
}
