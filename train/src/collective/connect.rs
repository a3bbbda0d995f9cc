//! How ranks find each other.

use super::hosts::Ways;
use super::links::{Door, Links};
use super::region::Region;
use super::shared::SharedMemory;
use super::tcp::Tcp;
use super::{Alone, Collective, Compression, Connected, Transport};
use crate::{Error, Result};
use mobula_core::{Member, Shard};
use std::collections::BTreeMap;
use std::net::{IpAddr, TcpListener};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// How long members may take to start.
const TIMEOUT: Duration = Duration::from_secs(60);
/// After a loss those that are left come when they have noticed it, behind whatever they are at.
const PATIENCE: Duration = Duration::from_secs(600);

/// How long ranks wait for each other to come.
pub(crate) fn patience(member: &Member) -> Duration {
    if member.generation() == 0 { TIMEOUT } else { PATIENCE }
}

/// Connects a member with all others of its group, and waits for them. `in_tree` fixes the order of
/// additions: neighbouring ranks, then neighbouring pairs of them, and so on, however they are
/// connected; their number must be a power of two.
pub(crate) fn connect(
    member: &Arc<Member>,
    transport: Transport,
    compression: Compression,
    in_tree: bool,
    timeout: Duration,
    hosts: Option<&[u64]>,
) -> Result<Arc<dyn Collective>> {
    let shard = Shard { rank: member.rank(), world: member.world_size() };
    if shard.world == 1 {
        return Ok(Arc::new(Alone));
    }
    let mut meeting = Meeting::hold(member, transport, in_tree, hosts)?;
    let local = meeting.shared_memory(member, timeout)?;
    let collective: Arc<dyn Collective> = match (meeting.leaders.len(), local) {
        (1, Some(memory)) => Arc::new(Connected::new(shard, memory, false, meeting.machines)),
        (_, local) => {
            let far = meeting.links(member, in_tree, timeout)?;
            let hosts = meeting.hosts;
            let ways = Ways { shard, hosts, compression, in_tree, local, far };
            Arc::new(Connected::new(shard, ways, true, meeting.machines))
        }
    };
    // Who leaves before others have opened what it has made would take that along.
    member.all_gather("collective: connected", b"", patience(member))?;
    Ok(collective)
}

/// What the ranks have told each other.
struct Meeting {
    /// The host of each rank, in the order of their first ranks.
    hosts: Vec<usize>,
    /// The machine of each rank, of which each may be several hosts here.
    machines: Vec<u64>,
    /// The first rank of each host.
    leaders: Vec<usize>,
    /// The ranks of this host.
    neighbours: Vec<usize>,
    /// What this rank has made for others.
    region: Option<Region>,
    listener: Option<TcpListener>,
    /// Where each leader's region is, and where it listens.
    regions: BTreeMap<usize, String>,
    doors: BTreeMap<usize, Door>,
}

impl Meeting {
    fn hold(
        member: &Arc<Member>,
        transport: Transport,
        in_tree: bool,
        hosts: Option<&[u64]>,
    ) -> Result<Self> {
        let machine = hosts.map_or(member.host().node, |hosts| hosts[member.rank()]);
        let host = match (hosts, transport) {
            (None, Transport::Tcp) => member.rank() as u64,
            _ => machine,
        };
        let said = format!("{host} {} {machine}", member.host().address);
        let said = member.all_gather("collective: hosts", said.as_bytes(), patience(member))?;
        let said: Vec<_> = said.iter().map(|said| String::from_utf8_lossy(said)).collect();
        let said: Vec<_> = said.iter().map(|s| s.rsplit_once(' ').unwrap_or_default()).collect();
        let machines = said.iter().map(|said| said.1.parse().unwrap_or_default()).collect();
        let said: Vec<_> = said.iter().map(|s| s.0.split_once(' ').unwrap_or_default()).collect();
        let mut names: Vec<String> = said.iter().map(|said| said.0.to_owned()).collect();
        if in_tree && !are_branches(&names) {
            // Each for itself.
            names = (0..names.len()).map(|rank| format!("rank {rank}")).collect();
        }
        let others = said.iter().filter(|said| said.0 != host.to_string());
        let others: Vec<IpAddr> = others.filter_map(|said| said.1.parse().ok()).collect();
        let mut leaders: Vec<usize> = Vec::new();
        let mut hosts = Vec::with_capacity(names.len());
        for rank in 0..names.len() {
            let known = leaders.iter().position(|leader| names[*leader] == names[rank]);
            hosts.push(known.unwrap_or(leaders.len()));
            if known.is_none() {
                leaders.push(rank);
            }
        }
        let me = member.rank();
        let neighbours = (0..hosts.len()).filter(|rank| hosts[*rank] == hosts[me]).collect();
        let (region, listener) = (None, None);
        let (regions, doors) = (BTreeMap::new(), BTreeMap::new());
        let meeting =
            Self { hosts, machines, leaders, neighbours, region, listener, regions, doors };
        meeting.exchange_addresses(member, &others)
    }

    /// Leaders make what the others open.
    fn exchange_addresses(mut self, member: &Arc<Member>, others: &[IpAddr]) -> Result<Self> {
        let is_leader = self.leaders.contains(&member.rank());
        let (mut path, mut address) = (String::new(), String::new());
        if is_leader && self.neighbours.len() > 1 {
            let (region, at) = Region::create(self.neighbours.len())?;
            (self.region, path) = (Some(region), at);
        }
        if is_leader && self.leaders.len() > 1 {
            let (listener, door) = Door::open(member.host().address, others)?;
            (self.listener, address) = (Some(listener), door.encode());
        }
        let said = format!("{path}\n{address}");
        let all = member.all_gather("collective: addresses", said.as_bytes(), patience(member))?;
        for leader in &self.leaders {
            let said = String::from_utf8_lossy(&all[*leader]).into_owned();
            let (path, address) = said.split_once('\n').unwrap_or_default();
            self.regions.insert(*leader, path.to_owned());
            self.doors.extend(Door::decode(address).map(|door| (*leader, door)));
        }
        Ok(self)
    }

    /// With the other ranks of this host, if there are any.
    fn shared_memory(
        &mut self,
        member: &Arc<Member>,
        timeout: Duration,
    ) -> Result<Option<SharedMemory>> {
        let (neighbours, leader) = (self.neighbours.clone(), self.neighbours[0]);
        if neighbours.len() == 1 {
            return Ok(None);
        }
        let region = match self.region.take() {
            Some(region) => region,
            None => Region::open(Path::new(&self.regions[&leader]), neighbours.len())?,
        };
        Ok(Some(SharedMemory::new(member, neighbours, region, timeout)))
    }

    /// With the leaders of the other hosts, if this is one.
    fn links(&self, member: &Arc<Member>, in_tree: bool, timeout: Duration) -> Result<Option<Tcp>> {
        let Some(listener) = &self.listener else {
            return Ok(None);
        };
        let me = self.hosts[member.rank()];
        if let Some(missing) = self.leaders.iter().find(|leader| !self.doors.contains_key(leader)) {
            return Err(internal(&format!("rank {missing} has not told its address")));
        }
        let peers = Tcp::peers(me, self.leaders.len());
        let peers: Vec<usize> = peers.into_iter().map(|place| self.leaders[place]).collect();
        let links = Links::connect(member, listener, &self.doors, &peers, timeout)?;
        Ok(Some(Tcp::new(self.leaders.clone(), me, in_tree, links)))
    }
}

/// Whether the ranks of each host are neighbours, and as many, a power of two.
fn are_branches(hosts: &[String]) -> bool {
    let mut blocks = hosts.chunk_by(|a, b| a == b);
    let each = blocks.next().map_or(1, <[_]>::len);
    let distinct: std::collections::BTreeSet<_> = hosts.iter().collect();
    let is_whole = each.is_power_of_two() && distinct.len() * each == hosts.len();
    is_whole && blocks.all(|block| block.len() == each)
}

fn internal(text: &str) -> Error {
    mobula_core::Error::Internal(text.to_owned()).into()
}
