//! Connections between ranks on different hosts.

use crate::{Error, Result};
use mobula_core::Member;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::collections::BTreeMap;
use std::io::{ErrorKind, IoSlice, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a wait goes on without asking whether a member was lost.
const LOOK: Duration = Duration::from_millis(100);
/// How often a rank looks again before it sleeps: to be woken takes longer than most waits.
const LOOKS: u32 = 100;
/// Bytes that are read at a time, and worked on while they are in a cache.
pub(super) const SEGMENT: usize = 256 << 10;
/// Bytes of the secret that a connection begins with.
const SECRET: usize = 16;
/// Bytes before what is transferred: what it is part of.
const HEADER: usize = 24;
/// How long a connection may take to be made.
const TIMEOUT: Duration = Duration::from_secs(60);
/// How long the driver may take to tell that a rank was lost whose connection broke.
const PATIENCE: Duration = Duration::from_secs(10);

/// Where a rank listens, and what who connects has to know.
#[derive(Clone)]
pub(super) struct Door {
    pub(super) address: SocketAddr,
    pub(super) secret: [u8; SECRET],
}

impl Door {
    /// Opens one at the address by which the other hosts know this one.
    pub(super) fn open(own: IpAddr, others: &[IpAddr]) -> Result<(TcpListener, Self)> {
        let own = if own.is_unspecified() { towards(others).unwrap_or(own) } else { own };
        let wanted = SocketAddr::new(own, 0);
        let listener = TcpListener::bind(wanted).map_err(|source| Error::Connection {
            action: "listen at",
            address: wanted,
            source,
        })?;
        let port = listener.local_addr().map_or(0, |address| address.port());
        let address = SocketAddr::new(own, port);
        let secret = secret().map_err(|source| Error::Connection {
            action: "listen at",
            address,
            source,
        })?;
        Ok((listener, Self { address, secret }))
    }

    pub(super) fn encode(&self) -> String {
        let secret: String = self.secret.iter().map(|byte| format!("{byte:02x}")).collect();
        format!("{} {secret}", self.address)
    }

    pub(super) fn decode(text: &str) -> Option<Self> {
        let (address, secret) = text.split_once(' ')?;
        let byte = |at: usize| u8::from_str_radix(secret.get(2 * at..2 * at + 2)?, 16).ok();
        let bytes: Vec<u8> = (0..SECRET).map_while(byte).collect();
        Some(Self { address: address.parse().ok()?, secret: bytes.try_into().ok()? })
    }
}

/// Connections of one rank to those that it exchanges values with.
#[derive(Debug)]
pub(super) struct Links {
    member: Arc<Member>,
    timeout: Duration,
    peers: BTreeMap<usize, TcpStream>,
    /// Aligned for every type.
    scratch: Vec<u64>,
}

/// What all ranks must want alike.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted {
    pub(super) operation: &'static str,
    pub(super) code: u64,
    pub(super) len: usize,
    pub(super) patience: Duration,
}

/// What goes to one rank while something comes from one.
pub(super) struct Transfer<'a> {
    pub(super) wanted: &'a Wanted,
    pub(super) to: usize,
    pub(super) send: &'a [u8],
    pub(super) from: usize,
    /// Bytes to come.
    pub(super) receive: usize,
    /// Bytes of one number, of which segments have whole ones.
    pub(super) grain: usize,
}

impl Links {
    /// Connects to `peers`: the higher rank to the lower one.
    pub(super) fn connect(
        member: &Arc<Member>,
        listener: &TcpListener,
        doors: &BTreeMap<usize, Door>,
        peers: &[usize],
        timeout: Duration,
    ) -> Result<Self> {
        let me = member.rank();
        let mut links = Self {
            member: Arc::clone(member),
            timeout,
            peers: BTreeMap::new(),
            scratch: vec![0; SEGMENT / 8],
        };
        let deadline = Instant::now() + TIMEOUT;
        for peer in peers.iter().filter(|peer| **peer < me) {
            let stream = call(member, &doors[peer], deadline)?;
            links.peers.insert(*peer, stream);
        }
        let expected = peers.iter().filter(|peer| **peer > me).count();
        while links.peers.len() < peers.len() {
            let (peer, stream) = links.answer(listener, &doors[&me], deadline, expected)?;
            if peers.contains(&peer) && peer > me {
                links.peers.insert(peer, stream);
            }
        }
        for stream in links.peers.values() {
            stream.set_nonblocking(true).map_err(|e| broken("prepare", stream, e))?;
        }
        Ok(links)
    }

    /// The next rank that knows the secret.
    fn answer(
        &self,
        listener: &TcpListener,
        door: &Door,
        deadline: Instant,
        expected: usize,
    ) -> Result<(usize, TcpStream)> {
        let failed =
            |source| Error::Connection { action: "answer at", address: door.address, source };
        loop {
            self.member.check_generation()?;
            if Instant::now() > deadline {
                let missing = format!("{expected} ranks should have come within {TIMEOUT:?}");
                return Err(failed(std::io::Error::new(ErrorKind::TimedOut, missing)));
            }
            wait(&mut [PollFd::new(listener, PollFlags::IN)]).map_err(failed)?;
            listener.set_nonblocking(true).map_err(failed)?;
            match listener.accept() {
                Ok((stream, _)) => {
                    if let Some(peer) = greeted(&stream, door) {
                        return Ok((peer, stream));
                    }
                }
                Err(error) if is_passing(&error) => {}
                Err(error) => return Err(failed(error)),
            }
        }
    }

    /// Sends and receives at once; what comes goes to `take` with its place, in order.
    pub(super) fn transfer(
        &mut self,
        job: &Transfer<'_>,
        mut take: impl FnMut(usize, &[u8]),
    ) -> Result<()> {
        let mut scratch = std::mem::take(&mut self.scratch);
        let done = self.transfer_through(job, bytemuck::cast_slice_mut(&mut scratch), &mut take);
        self.scratch = scratch;
        done
    }

    fn transfer_through(
        &self,
        job: &Transfer<'_>,
        scratch: &mut [u8],
        take: &mut impl FnMut(usize, &[u8]),
    ) -> Result<()> {
        let (mut outgoing, mut incoming) = (Outgoing::of(job), Incoming::of(job));
        let (mut looks, mut last) = (0, Instant::now());
        while !outgoing.is_done() || !incoming.is_done() {
            // First: whoever differs is to hear of it before this rank finds out and leaves.
            let sent = outgoing.go_on(&self.peers[&job.to]);
            let received = incoming.go_on(&self.peers[&job.from], scratch, take);
            // What has come may say why nobody takes what is sent.
            self.check(job, &incoming)?;
            let sent = sent.or_else(|error| self.lost(job.to, error))?;
            let received = received.or_else(|error| self.lost(job.from, error))?;
            if sent || received {
                (looks, last) = (0, Instant::now());
            } else if looks < LOOKS {
                looks += 1;
                std::thread::yield_now();
            } else {
                self.pause(job, !outgoing.is_done(), !incoming.is_done(), last)?;
            }
        }
        Ok(())
    }

    /// A connection that broke is how a lost rank shows here first; the driver tells soon.
    fn lost<T>(&self, rank: usize, source: std::io::Error) -> Result<T> {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            self.member.check_generation()?;
            std::thread::sleep(Duration::from_millis(10));
        }
        Err(Error::PeerLost { rank, source })
    }

    fn check(&self, job: &Transfer<'_>, incoming: &Incoming) -> Result<()> {
        let (expected, got) = (header(job.wanted, job.receive), incoming.header);
        if incoming.received < HEADER || expected == got {
            return Ok(());
        }
        let (rank, other, len) = (self.member.rank(), job.from, job.wanted.len);
        let other_len = u64::from_le_bytes(std::array::from_fn(|at| got[8 + at])) as usize;
        match other_len == len {
            true => {
                let operation = job.wanted.operation;
                Err(Error::CollectiveMismatch { rank, operation, other })
            }
            false => Err(Error::CollectiveLength { rank, len, other, other_len }),
        }
    }

    /// Waits until a socket is ready.
    fn pause(&self, job: &Transfer<'_>, sends: bool, receives: bool, last: Instant) -> Result<()> {
        let (to, from) = (&self.peers[&job.to], &self.peers[&job.from]);
        let mut sockets = Vec::with_capacity(2);
        if sends {
            sockets.push(PollFd::new(to, PollFlags::OUT));
        }
        if receives {
            sockets.push(PollFd::new(from, PollFlags::IN));
        }
        wait(&mut sockets).or_else(|error| self.lost(job.from, error))?;
        self.member.check_generation()?;
        let timeout = self.timeout.max(job.wanted.patience);
        if last.elapsed() < timeout {
            return Ok(());
        }
        let late = [(sends, job.to), (receives, job.from)];
        let mut late: Vec<usize> = late.iter().filter(|late| late.0).map(|late| late.1).collect();
        late.dedup();
        let (rank, operation) = (self.member.rank(), job.wanted.operation);
        Err(Error::Straggler { operation, rank, late, after: timeout })
    }
}

fn header(wanted: &Wanted, bytes: usize) -> [u8; HEADER] {
    let numbers = [wanted.code, wanted.len as u64, bytes as u64];
    let mut header = [0; HEADER];
    header.copy_from_slice(bytemuck::bytes_of(&numbers.map(u64::to_le)));
    header
}

/// What is still to be sent.
struct Outgoing<'a> {
    header: [u8; HEADER],
    content: &'a [u8],
    /// Of both.
    sent: usize,
}

impl<'a> Outgoing<'a> {
    fn of(job: &Transfer<'a>) -> Self {
        Self { header: header(job.wanted, job.send.len()), content: job.send, sent: 0 }
    }

    fn is_done(&self) -> bool {
        self.content.is_empty() || self.sent == HEADER + self.content.len()
    }

    /// Sends what goes through at once; says whether any did.
    fn go_on(&mut self, mut stream: &TcpStream) -> std::io::Result<bool> {
        if self.is_done() {
            return Ok(false);
        }
        let first = self.sent.saturating_sub(HEADER);
        let end = self.content.len().min(first + SEGMENT);
        let head = &self.header[self.sent.min(HEADER)..];
        let pieces = [IoSlice::new(head), IoSlice::new(&self.content[first..end])];
        let sent = some(stream.write_vectored(&pieces))?;
        self.sent += sent;
        Ok(sent > 0)
    }
}

/// What is still to come.
struct Incoming {
    header: [u8; HEADER],
    content: usize,
    grain: usize,
    /// Of both.
    received: usize,
    /// Bytes of the content that were handed on.
    taken: usize,
}

impl Incoming {
    fn of(job: &Transfer<'_>) -> Self {
        let (content, grain) = (job.receive, job.grain);
        Self { header: [0; HEADER], content, grain, received: 0, taken: 0 }
    }

    fn is_done(&self) -> bool {
        self.content == 0 || self.taken == self.content
    }

    /// Receives what is there, and hands on whole numbers; says whether anything came.
    fn go_on(
        &mut self,
        mut stream: &TcpStream,
        scratch: &mut [u8],
        take: &mut impl FnMut(usize, &[u8]),
    ) -> std::io::Result<bool> {
        if self.is_done() {
            return Ok(false);
        }
        if self.received < HEADER {
            let came = some(stream.read(&mut self.header[self.received..]))?;
            self.received += came;
            return Ok(came > 0);
        }
        let kept = self.received - HEADER - self.taken;
        let room = (self.content - self.taken).min(SEGMENT);
        let came = some(stream.read(&mut scratch[kept..room]))?;
        self.received += came;
        let whole = (kept + came) / self.grain * self.grain;
        take(self.taken, &scratch[..whole]);
        scratch.copy_within(whole..kept + came, 0);
        self.taken += whole;
        Ok(came > 0)
    }
}

fn secret() -> std::io::Result<[u8; SECRET]> {
    let mut secret = [0; SECRET];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut secret)?;
    Ok(secret)
}

/// This host's address on the way to others. Nothing is sent.
fn towards(others: &[IpAddr]) -> Option<IpAddr> {
    let other = others.iter().find(|other| !other.is_unspecified())?;
    let own = match other {
        IpAddr::V4(_) => IpAddr::from(Ipv4Addr::UNSPECIFIED),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((own, 0)).ok()?;
    socket.connect((*other, 9)).ok()?;
    socket.local_addr().ok().map(|address| address.ip())
}

fn call(member: &Member, door: &Door, deadline: Instant) -> Result<TcpStream> {
    let (address, me) = (door.address, member.rank());
    let failed = |source| Error::Connection { action: "connect to", address, source };
    let stream = loop {
        member.check_generation()?;
        match TcpStream::connect_timeout(&address, Duration::from_secs(1)) {
            Ok(stream) => break stream,
            Err(error) if error.kind() == ErrorKind::TimedOut && Instant::now() < deadline => {}
            Err(error) => return Err(failed(error)),
        }
    };
    stream.set_nodelay(true).map_err(failed)?;
    let mut greeting = door.secret.to_vec();
    greeting.extend((me as u32).to_le_bytes());
    (&stream).write_all(&greeting).map_err(failed)?;
    Ok(stream)
}

/// Nothing that a rank did.
fn is_passing(error: &std::io::Error) -> bool {
    use ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted, WouldBlock};
    matches!(error.kind(), WouldBlock | Interrupted | ConnectionAborted | ConnectionReset)
}

/// Who is there, if it knows the secret and says so soon.
fn greeted(stream: &TcpStream, door: &Door) -> Option<usize> {
    stream.set_nonblocking(false).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(2))).ok()?;
    stream.set_nodelay(true).ok()?;
    let mut greeting = [0; SECRET + 4];
    let mut reader = stream;
    // It comes in one piece; whoever sends it byte by byte is no rank.
    let came = reader.read(&mut greeting).ok()?;
    if came < greeting.len() {
        return None;
    }
    let (secret, rank) = greeting.split_at(SECRET);
    let rank = u32::from_le_bytes(rank.try_into().ok()?);
    (secret == door.secret).then_some(rank as usize)
}

fn wait(sockets: &mut [PollFd<'_>]) -> std::io::Result<()> {
    let time = Timespec { tv_sec: 0, tv_nsec: LOOK.as_nanos() as i64 };
    match poll(sockets, Some(&time)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Bytes that went through; none when it would have to wait.
fn some(done: std::io::Result<usize>) -> std::io::Result<usize> {
    match done {
        Ok(0) => Err(ErrorKind::UnexpectedEof.into()),
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
            Ok(0)
        }
        other => other,
    }
}

fn broken(action: &'static str, stream: &TcpStream, source: std::io::Error) -> Error {
    let address = stream.peer_addr().unwrap_or(([0, 0, 0, 0], 0).into());
    Error::Connection { action, address, source }
}
